"""A scenario over HTTP: requests a second of an endpoint that does nothing, guarded and not, under uvicorn."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

from benchmarks.figures import BARE, OURS, TIMES, Measured, Spread
from benchmarks.harness import fresh_keys, interleaved
from benchmarks.stage import Stage

CONNECTIONS: Final = 64
CONTENT: Final = "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
ROUNDS: Final = ("http_first", "http_replay")


class _Path(NamedTuple):
    name: str
    path: str


FASTAPI: Final = "FastAPI"
DEPENDENCY: Final = "FastAPI, IdempotencyGuard"
PATHS: Final = (
    *(_Path(BARE, "/bare"), _Path(OURS, "/guarded")),
    *(_Path(FASTAPI, "/api/bare"), _Path(DEPENDENCY, "/api/guarded")),
)


def over_http(stage: Stage) -> dict[str, Measured]:
    """First calls and replays over kept connections; the server is a process of its own, and so is this client."""
    with _served(stage.server.url) as port:
        series = asyncio.run(_compare(stage, port))
    rows: dict[str, Measured] = {}
    for row in ROUNDS:
        dependency = Spread.of(series.ratios(DEPENDENCY, row, FASTAPI)).median
        note = (
            f"Starlette under uvicorn, {CONNECTIONS} connections; bare is the unguarded endpoint. "
            f"FastAPI's guard: {dependency:.2f} {TIMES} its unguarded endpoint"
        )
        rows[row] = series.row(row, unit="requests/s", note=note)
    return rows


async def _compare(stage: Stage, port: int) -> Any:
    async with _connected(port) as clients:

        async def sample(side: _Path) -> dict[str, float]:
            keys = fresh_keys(max(512, stage.effort.concurrent // 4))
            return {row: await _rate(clients, side.path, keys) for row in ROUNDS}

        return await interleaved(PATHS, stage.effort, sample, stage.flush)


async def _rate(clients: "list[Client]", path: str, keys: list[str]) -> float:
    """Return requests a second; each connection sends the next one when it has the answer."""
    left, began = iter(keys), time.perf_counter()
    await asyncio.gather(*(client.work(path, left) for client in clients))
    return len(keys) / (time.perf_counter() - began)


class Client(asyncio.Protocol):
    """One connection that asks for one thing after the other, and costs the machine as little as it can."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._data = b""
        self._done: asyncio.Future[None] | None = None
        self._path = ""
        self._keys: Iterator[str] = iter(())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer; with its end, ask the next."""
        self._data += data
        head, separator, body = self._data.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n", 1)[0])
        if len(body) < length:
            return
        self._data = b""
        assert head.startswith(b"HTTP/1.1 200"), head
        self._next()

    async def work(self, path: str, keys: Iterator[str]) -> None:
        """Send a request for each key that is left."""
        self._done = asyncio.get_running_loop().create_future()
        self._path, self._keys = path, keys
        self._next()
        await self._done

    def _next(self) -> None:
        key = next(self._keys, None)
        assert self._done is not None
        if key is None:
            self._done.set_result(None)
            return
        head = f"POST {self._path} HTTP/1.1\r\nHost: a\r\nIdempotency-Key: {key}\r\n{CONTENT}"
        self._transport.write(head.encode())


@contextlib.asynccontextmanager
async def _connected(port: int) -> AsyncGenerator[list[Client]]:
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(Client, "127.0.0.1", port) for _ in range(CONNECTIONS)]
    try:
        yield [client for _, client in made]
    finally:
        for transport, _ in made:
            transport.close()


@contextlib.contextmanager
def _served(url: str) -> Iterator[int]:
    context = get_context("spawn")
    mine, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, url), daemon=True)
    server.start()
    try:
        yield mine.recv()
    finally:
        server.terminate()
        server.join()


def serve(pipe: Connection, url: str) -> None:
    """Be the server: ``/bare`` and ``/guarded`` of Starlette, and both below ``/api`` of FastAPI."""
    import uvicorn
    from fastapi import Depends, FastAPI
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Mount, Route

    from asyncidem import Idempotency, RedisStore
    from asyncidem.integrations.asgi import IdempotencyMiddleware
    from asyncidem.integrations.fastapi import IdempotencyGuard

    result = {"id": "ch_000000000042", "amount": 1250, "currency": "EUR"}

    async def nothing(request: Request) -> Response:
        await request.body()
        return JSONResponse(result)

    async def plain(payment: dict[str, int]) -> dict[str, Any]:
        return result

    idem = Idempotency(RedisStore.from_url(url))
    guard = Middleware(IdempotencyMiddleware, idempotency=idem, principal=None)
    site = Starlette(
        routes=[
            Route("/bare", nothing, methods=["POST"]),
            Mount("/", routes=[Route("/guarded", nothing, methods=["POST"])], middleware=[guard]),
        ]
    )
    api = FastAPI(openapi_url=None)
    dependency = IdempotencyGuard(idem, principal=None)
    dependency.install(api)
    api.post("/api/bare")(plain)
    api.post("/api/guarded", dependencies=[Depends(dependency)])(plain)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (api if scope["path"].startswith("/api/") else site)(scope, receive, send)

    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
    asyncio.run(uvicorn.Server(config).serve([listener]))
