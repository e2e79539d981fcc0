"""Bodies of guarded requests: read for the fingerprint, and read again by the handler, in whatever way it likes."""

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.typedefs import Handler

from asyncidem import MemoryStore
from asyncidem.integrations.aiohttp import IDEMPOTENCY
from asyncidem.testing import FaultyStore

from integrations.aiohttp_sites import Effect, guarded, make_idempotency, message, receive, serve


def form(**more: Any) -> aiohttp.FormData:
    """Return a multipart form with a file. Its boundary is another one each time."""
    data = aiohttp.FormData()
    data.add_field("order", more.get("order", "7"))
    data.add_field("scan", more.get("scan", b"\x00\xff" * 1000), filename="scan.png", content_type="image/png")
    return data


async def fields(request: web.Request) -> web.Response:
    """Answer with what `post()` finds."""
    post = await request.post()
    scan = post["scan"]
    assert isinstance(scan, web.FileField)
    return web.json_response({"order": post["order"], "name": scan.filename, "size": len(scan.file.read())})


async def parts(request: web.Request) -> web.Response:
    """Answer with what `multipart()` finds."""
    sizes = {}
    async for part in await request.multipart():
        assert isinstance(part, aiohttp.BodyPartReader)
        sizes[part.name] = len(await part.read())
    return web.json_response(sizes)


async def streamed(request: web.Request) -> web.Response:
    """Answer with what comes in pieces of the stream."""
    return web.json_response([len(piece) async for piece in request.content.iter_chunked(600)])


async def all_ways(request: web.Request) -> web.Response:
    """Answer with what is found after another reading."""
    assert request.can_read_body
    assert request.body_exists
    text, data = await request.text(), await request.read()
    return web.json_response([text == data.decode(), await request.json(), request.can_read_body])


SMALL = '{"a": 1}'


@pytest.mark.parametrize(
    ("handler", "make", "answer"),
    [
        (fields, form, {"order": "7", "name": "scan.png", "size": 2000}),
        (parts, form, {"order": 1, "scan": 2000}),
        (streamed, lambda: b"x" * 1000, [600, 400]),
        (all_ways, lambda: SMALL, [True, {"a": 1}, False]),
    ],
)
async def test_handler_reads_its_body_as_if_nobody_had(
    handler: Callable[[web.Request], Awaitable[web.Response]], make: Callable[[], Any], answer: object
) -> None:
    """post, multipart, the stream, text, read and json; a retry, with another boundary, is a replay."""
    async with serve(guarded(handler)) as site:
        first, second = await site.post(data=make()), await site.post(data=make())
    assert first.status == 200, first
    assert web.json_response(answer).body == first.body == second.body
    assert second.replayed


async def test_urlencoded_form() -> None:
    """A form is read by `post()`; other fields are another payload."""

    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=str((await request.post())["amount"]))

    async with serve(guarded(handler)) as site:
        assert (await site.post(data={"amount": "12"})).body == b"12"
        assert (await site.post(data={"amount": "12"})).replayed
        assert (await site.post(data={"amount": "13"})).status == 422


async def test_request_without_a_body() -> None:
    """It stays one without a body, and has a key like any other."""
    seen = []

    def answer(request: web.Request) -> web.Response:
        seen.append((request.body_exists, request.can_read_body))
        return web.Response(text="done")

    async with serve(guarded(Effect(answer).run, wait=5)) as site:
        assert [(await site.post()).body for _ in range(2)] == [b"done", b"done"]
    assert seen == [(False, False)]


async def test_chunked_and_compressed_requests() -> None:
    """A body is what is in the chunks, and what was compressed: the same payload as when it is sent at once."""

    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    async def pieces() -> Any:
        for piece in (b"one ", b"two ", b"three"):
            yield piece

    plain = {"Content-Type": "text/plain"}
    async with serve(guarded(handler)) as site:
        assert (await site.post(data=pieces(), headers=plain)).body == b"one two three"
        packed = {**plain, "Content-Encoding": "deflate"}
        for headers, data in ((plain, b"one two three"), (packed, zlib.compress(b"one two three"))):
            assert (await site.post(data=data, headers=headers)).replayed


async def test_middleware_outside_may_have_read_the_body() -> None:
    """What it read is fingerprinted and found again, and a stream that it only looked at is whole."""

    @web.middleware
    async def log(request: web.Request, handler: Handler) -> web.StreamResponse:
        if "read" in request.query:
            await request.read()
        assert request.content is not None
        return await handler(request)

    app = guarded(streamed)
    app.middlewares.insert(0, log)
    app.router.add_post("/form", fields)
    async with serve(app) as site:
        assert (await site.post(data=b"x" * 700)).body == b"[600, 100]"
        assert (await site.post("/pay?read", key="b", data=b"x" * 700)).body == b"[600, 100]"
        assert (await site.post("/pay?read", key="b", data=b"y" * 700)).status == 422
        assert (await site.post("/form?read", data=form())).status == 200


async def test_state_is_shared_with_middlewares_outside_and_clones_work_inside() -> None:
    """What the handler leaves in its request is seen outside of the guard; a middleware inside may clone the request."""
    seen = []

    @web.middleware
    async def outside(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        seen.append(request is state.get("request"))
        return response

    state: dict[str, object] = {}

    @web.middleware
    async def inside(request: web.Request, handler: Handler) -> web.StreamResponse:
        state["request"] = request
        return await handler(request.clone(remote="192.0.2.1"))

    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=f"{request.remote} {await request.text()}")

    app = guarded(handler)
    app.middlewares.insert(0, outside)
    app.middlewares.append(inside)
    async with serve(app) as site:
        assert (await site.post(data=b"body")).body == b"192.0.2.1 body"
    assert seen == [True]


@pytest.mark.parametrize("how", ["length", "chunked", "read before"])
async def test_body_over_max_body_is_413_without_a_record(how: str) -> None:
    """Told by its length, or met while it is read; a body of just that size goes through."""
    effect, store = Effect(), FaultyStore(MemoryStore())
    app = guarded(effect.run, max_body=1000, idempotency=make_idempotency(store))

    @web.middleware
    async def read(request: web.Request, handler: Handler) -> web.StreamResponse:
        if how == "read before":
            await request.read()
        return await handler(request)

    async def pieces(count: int) -> Any:
        for _ in range(count):
            yield b"x" * 100

    app.middlewares.insert(0, read)
    async with serve(app) as site:
        reply = await site.post(data=pieces(11) if how == "chunked" else b"x" * 1001)
        assert (reply.status, reply.header("content-type")) == (413, "application/problem+json")
        assert (effect.count, store.calls) == (0, [])
        assert (await site.post(data=pieces(10) if how == "chunked" else b"x" * 1000)).status == 201
        assert (await site.post(key=None, data=b"x" * 1001)).status == 201  # no key, no limit of ours


async def test_connection_goes_on_after_413() -> None:
    """What was pipelined behind a body that is too large is answered, in order."""
    effect = Effect()
    async with serve(guarded(effect.run, max_body=1000)) as site, site.socket() as (reader, writer):
        writer.write(message("Idempotency-Key: a", body=b"x" * 50_000))
        writer.write(message("Idempotency-Key: b", body=b"y"))
        writer.write(message("Idempotency-Key: b", body=b"y"))
        replies = [await receive(reader) for _ in range(3)]
    assert [(reply.status, reply.replayed) for reply in replies] == [(413, False), (201, False), (201, True)]
    assert effect.count == 1


@pytest.mark.parametrize("framing", ["Content-Length: 5000", "Transfer-Encoding: chunked"])
async def test_413_does_not_wait_for_the_rest_of_the_body(framing: str) -> None:
    """It comes as soon as the length is known, or exceeded."""
    async with serve(guarded(Effect().run, max_body=1000)) as site, site.socket() as (reader, writer):
        head = message("Idempotency-Key: a").replace(b"Content-Length: 0", framing.encode())
        writer.write(head + (b"7d0\r\n" + b"x" * 2000 if "chunked" in framing else b""))
        assert (await receive(reader)).status == 413


async def test_client_limit_of_the_application_stays_the_handlers() -> None:
    """A body within `max_body` and over `client_max_size` is refused by aiohttp where the handler reads it, not stored."""

    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    app = web.Application(client_max_size=10, middlewares=guarded(handler).middlewares)
    app.router.add_post("/pay", handler)

    app[IDEMPOTENCY] = make_idempotency()
    async with serve(app) as site:
        assert [(await site.post(data=b"x" * 11)).status for _ in range(2)] == [413, 413]
        assert (await site.post(data=b"x" * 9)).body == b"x" * 9


async def test_upload_that_breaks_off_leaves_nothing() -> None:
    """A client that goes in the middle of its body has claimed nothing."""
    effect, store = Effect(), FaultyStore(MemoryStore())
    done = asyncio.Event()

    @web.middleware
    async def outside(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        finally:
            done.set()

    app = guarded(effect.run, idempotency=make_idempotency(store))
    app.middlewares.insert(0, outside)
    async with serve(app) as site:
        async with site.socket() as (_, writer):
            whole = message("Idempotency-Key: a", body=b"x" * 1000)
            writer.write(whole[:-10])
            await writer.drain()
        await asyncio.wait_for(done.wait(), 5)
        assert (effect.count, store.calls) == (0, [])


async def test_one_connection_serves_request_after_request() -> None:
    """Keep-alive: first calls, replays and refusals follow each other on one connection."""
    effect = Effect()
    async with serve(guarded(effect.run)) as site, site.socket() as (reader, writer):
        statuses = []
        for key in ("a", "a", "b c", "d", "a"):
            writer.write(message(f"Idempotency-Key: {key}", body=b"x"))
            statuses.append((await receive(reader)).status)
    assert statuses == [201, 201, 400, 201, 201]
    assert effect.count == 2
