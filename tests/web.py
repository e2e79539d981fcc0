"""Real servers for HTTP tests, on free loopback ports, and requests byte by byte."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import uvicorn

__all__ = ["Connection", "Raw", "raw", "serving", "stable"]


@contextlib.asynccontextmanager
async def serving(app: Any, **options: Any) -> AsyncGenerator[str]:
    """Serve an ASGI application by uvicorn on the running loop; yield its address.

    Its end is a graceful shutdown, as after SIGTERM: a request that is still running after a moment is cancelled.
    """
    settings: dict[str, Any] = {"lifespan": "off", "log_config": None, "timeout_graceful_shutdown": 1, "ws": "none"}
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, **settings | options))
    started = asyncio.Event()
    original = server.startup

    async def startup(sockets: Any = None) -> None:
        await original(sockets)
        started.set()

    server.startup = startup  # type: ignore[method-assign]
    # Not `serve`, which takes the signals of the process.
    serve = asyncio.create_task(server._serve([listener]))
    try:
        waiting = asyncio.create_task(started.wait())
        await asyncio.wait((serve, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serve
        listener.close()


class Raw:
    """An answer, as it came over the wire."""

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def all(self, name: bytes) -> list[bytes]:
        """Return the value of every line of a header."""
        return [value for header, value in self.headers if header.lower() == name.lower()]


@contextlib.asynccontextmanager
async def raw(address: str) -> AsyncGenerator["Connection"]:
    """Open a connection to a server."""
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class Connection:
    """A client's connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, method: str, path: str, *lines: str, body: bytes = b"", chunked: bool = False) -> None:
        """Write a request; ``lines`` are those of its header."""
        head = [f"{method} {path} HTTP/1.1", "Host: localhost", *lines]
        if chunked:
            head.append("Transfer-Encoding: chunked")
            parts = [part for part in (body[: len(body) // 2], body[len(body) // 2 :]) if part]
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))
        else:
            head.append(f"Content-Length: {len(body)}")
        self.writer.write("\r\n".join((*head, "", "")).encode("latin-1") + body)
        await self.writer.drain()

    async def answer(self) -> Raw:
        """Read a response."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].split(b"\r\n")
        headers = [(name, value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
        response = Raw(int(first.split()[1]), headers, b"")
        if response.all(b"transfer-encoding"):
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                response.body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readuntil(b"\r\n")
        elif length := response.all(b"content-length"):
            response.body = await self.reader.readexactly(int(length[0]))
        return response

    async def request(self, method: str, path: str, *lines: str, body: bytes = b"", chunked: bool = False) -> Raw:
        """Write a request and read its response."""
        await self.send(method, path, *lines, body=body, chunked=chunked)
        return await self.answer()


def stable(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that a replay repeats."""
    return {name: value for name, value in headers.items() if name not in ("date", "server", "idempotent-replayed")}
