"""Real aiohttp servers on loopback, and clients for them: aiohttp's own, and a socket that sends what it is told."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

from aiohttp import ClientSession, web

from asyncidem import Idempotency, MemoryStore, Store
from asyncidem.integrations.aiohttp import IDEMPOTENCY, idempotency_middleware

HOST: Final = "127.0.0.1"
WITHIN: Final = 10.0

Handler = Callable[[web.Request], Awaitable[Any]]


class Reply(NamedTuple):
    """What a client got."""

    status: int
    reason: str
    lines: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def kept_lines(self) -> list[tuple[bytes, bytes]]:
        """Return the header lines that a replay must have, as bytes."""
        return sorted(line for line in self.lines if line[0].lower() not in (b"date", b"idempotent-replayed"))

    @property
    def replayed(self) -> bool:
        """Tell whether it is marked as a replay."""
        return (b"idempotent-replayed", b"true") in [(name.lower(), value) for name, value in self.lines]

    def header(self, name: str) -> str | None:
        """Return the value of a header line; None if there is none."""
        found = [value.decode() for line, value in self.lines if line.lower() == name.lower().encode()]
        return found[0] if found else None


class Site:
    """A running server, and a client of it."""

    def __init__(self, runner: web.AppRunner, port: int, session: ClientSession) -> None:
        self.runner = runner
        self.port = port
        self.session = session
        self.url = f"http://{HOST}:{port}"

    async def ask(
        self, method: str, path: str, *, key: str | None = "k", user: str | None = "ann", **more: Any
    ) -> Reply:
        """Send a request and return the whole answer."""
        headers = dict(more.pop("headers", {}))
        if key is not None:
            headers["Idempotency-Key"] = key
        if user is not None:
            headers["X-User"] = user
        more.setdefault("allow_redirects", False)
        async with self.session.request(method, self.url + path, headers=headers, **more) as response:
            body = await response.read()
            return Reply(response.status, response.reason or "", [*response.raw_headers], body)

    async def post(self, path: str = "/pay", **more: Any) -> Reply:
        """Send a POST."""
        return await self.ask("POST", path, **more)

    @asynccontextmanager
    async def socket(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A plain connection."""
        reader, writer = await asyncio.open_connection(HOST, self.port)
        try:
            yield reader, writer
        finally:
            writer.close()


def message(*lines: str, path: str = "/pay", body: bytes = b"") -> bytes:
    """Return a POST as bytes, with user and content type of `Site.post` unless the lines say otherwise."""
    head = [f"POST {path} HTTP/1.1", "Host: test", *lines]
    for line in ("X-User: ann", "Content-Type: application/octet-stream"):
        if not any(given.lower().startswith(line.partition(":")[0].lower()) for given in lines):
            head.append(line)
    head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


async def receive(reader: asyncio.StreamReader) -> Reply:
    """Read one answer with a Content-Length, and leave what comes behind it."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WITHIN)
    first, *rest = head[:-4].split(b"\r\n")
    lines = [(name, value) for name, _, value in (line.partition(b": ") for line in rest)]
    _, status, reason = first.split(b" ", 2)
    reply = Reply(int(status), reason.decode(), lines, b"")
    return reply._replace(body=await reader.readexactly(int(reply.header("content-length") or 0)))


@asynccontextmanager
async def serve(app: web.Application, **options: Any) -> AsyncIterator[Site]:
    """Run an application until the block ends."""
    options.setdefault("shutdown_timeout", 0.1)
    runner = web.AppRunner(app, **options)
    await runner.setup()
    try:
        site = web.TCPSite(runner, HOST, 0)
        await site.start()
        async with ClientSession() as session:
            yield Site(runner, runner.addresses[0][1], session)
    finally:
        await runner.cleanup()


def who(request: web.Request) -> str | None:
    """Return the user of a request: tests believe what they are told."""
    return request.headers.get("X-User")


def make_idempotency(store: Store | None = None, **options: Any) -> Idempotency:
    """Return one, in memory unless there is a store."""
    return Idempotency(store or MemoryStore(), **options)


def guarded(handler: Handler, *, idempotency: Idempotency | None = None, **options: Any) -> web.Application:
    """Return an application with a guarded route `/pay`, for all methods."""
    options.setdefault("principal", who)
    app = web.Application(middlewares=[idempotency_middleware(**options)])
    app[IDEMPOTENCY] = idempotency or make_idempotency()
    app.router.add_route("*", "/pay", handler)
    return app


class Effect:
    """A handler that counts how often it ran, and answers with the count."""

    def __init__(self, answer: Callable[[web.Request], Any] | None = None) -> None:
        self.count = 0
        self._answer = answer

    async def run(self, request: web.Request) -> Any:
        """Run."""
        self.count += 1
        if self._answer is not None:
            return self._answer(request)
        return web.json_response({"charged": self.count}, status=201)


class Gate:
    """A handler that says that it runs, and goes on when it is told to."""

    def __init__(self) -> None:
        self.count = 0
        self.running = asyncio.Event()
        self.open = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def run(self, request: web.Request) -> web.Response:
        """Run until the gate opens."""
        self.count += 1
        count = self.count
        self.running.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return web.json_response({"charged": count}, status=201)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so that no event tells."""
    async with asyncio.timeout(WITHIN):
        while not condition():
            await asyncio.sleep(0.002)
