"""A guarded ASGI application in a process of its own: ``python served.py URL``; it writes its address first.

Without a URL it runs over a store in memory. It counts its effects in the server at ``URL``; ``POST /pay`` waits after its effect while the key ``hold`` is there,
``POST /stream`` sends 50 MB. Tests kill it, and look at its memory.
"""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncidem

__all__ = ["Process", "process"]

PIECE = bytes(64 * 1024)
PIECES = 50 * 1024 * 1024 // len(PIECE)


class Process:
    """The application in a process of its own.

    Attributes:
        address: of its server.
        pid: of the process.
    """

    def __init__(self, url: str | None) -> None:
        self._url = url
        self.start()

    def start(self) -> None:
        """Start it; after a kill, again."""
        command = [sys.executable, str(Path(__file__).resolve()), *([] if self._url is None else [self._url])]
        # What is beside this file, which a safe path leaves out, and the package where that is not installed.
        paths = [str(Path(__file__).parent), str(Path(asyncidem.__file__).parents[1])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        assert self._child.stdout is not None
        self.pid = self._child.pid
        self.address = self._child.stdout.readline().strip()
        assert self.address, "the application did not start"

    def kill(self) -> None:
        """Send SIGKILL."""
        self._child.kill()
        self._child.wait()
        assert self._child.stdout is not None
        self._child.stdout.close()

    def memory(self, field: str) -> int:
        """Return bytes of memory: ``VmRSS`` is what it has, ``VmHWM`` the most that it had."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


@contextmanager
def process(url: str | None) -> Iterator[Process]:
    """Run the application."""
    child = Process(url)
    try:
        yield child
    finally:
        child.kill()


def main() -> None:
    """Serve until the process ends."""
    import redis.asyncio

    from asyncidem import Idempotency, MemoryStore, RedisStore, Store, current_operation
    from asyncidem.integrations.asgi import IdempotencyMiddleware

    from asgi_apps import json_response, read_body
    from web import serving

    url = sys.argv[1] if sys.argv[1:] else None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await read_body(receive)
        op = current_operation()
        if scope["path"] == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(PIECES):
                await send({"type": "http.response.body", "body": PIECE, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        if url is None:
            await json_response(send, 201, {})
            return
        async with redis.asyncio.Redis.from_url(url) as client:
            number = await client.rpush("effects", -1 if op is None else op.attempt)
            while await client.exists("hold"):
                await asyncio.sleep(0.01)
        await json_response(send, 201, {"charge": number})

    async def serve() -> None:
        store: Store = MemoryStore() if url is None else RedisStore.from_url(url)
        idem = Idempotency(store, lease=1)
        async with serving(IdempotencyMiddleware(app, idem, principal=None, wait=30)) as address:
            sys.stdout.write(f"{address}\n")
            sys.stdout.flush()
            await asyncio.Event().wait()

    # The test that started it has gone: nobody else would end it.
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            threading.Event().wait(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    asyncio.run(serve())


if __name__ == "__main__":
    main()
