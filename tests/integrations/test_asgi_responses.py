"""Responses that cannot be kept, or are cut off: streams, files, large and encoded ones, under uvicorn."""

import asyncio
import gzip
from typing import Any

import httpx
import pytest

from asyncidem import Idempotency, MemoryStore
from asyncidem.integrations.asgi import IdempotencyMiddleware

from asgi_apps import Endpoint, fixed, respond
from web import Connection, raw, serving

KEY = {"Idempotency-Key": "order-1"}


def guard(endpoint: Any, **options: Any) -> IdempotencyMiddleware:
    """Guard an application over a store in memory."""
    idem = Idempotency(MemoryStore(), **{k: options.pop(k) for k in ("on_cancel", "on_failure") if k in options})
    return IdempotencyMiddleware(endpoint, idem, principal=None, **options)


async def post(address: str, path: str = "/pay") -> httpx.Response:
    """Send one request on a connection of its own."""
    async with httpx.AsyncClient(base_url=address) as client:
        return await client.post(path, headers=KEY)


async def status_of(client: Connection) -> int | None:
    """Return the status of a whole answer; None if it is cut off, or the server speaks for an endpoint that says nothing."""
    try:
        status = (await client.answer()).status
    except asyncio.IncompleteReadError:
        return None
    return None if status == 500 else status


async def test_a_stream_goes_to_its_client_as_it_comes_and_never_runs_again() -> None:
    """The first piece arrives while the second is not there yet; a duplicate gets 409 with a type of its own."""
    more = asyncio.Event()

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        await more.wait()
        await send({"type": "http.response.body", "body": b"two", "more_body": True})
        await send({"type": "http.response.body"})

    endpoint = Endpoint(answer)
    async with serving(guard(endpoint)) as address:
        async with (
            httpx.AsyncClient(base_url=address) as client,
            client.stream("POST", "/pay", headers=KEY) as stream,
        ):
            pieces = stream.aiter_raw()
            assert await anext(pieces) == b"one "
            during = await post(address)
            more.set()
            assert await anext(pieces) == b"two"
            assert [piece async for piece in pieces] == []
        after = await post(address)
    assert (during.status_code, during.json()["type"]) == (409, "urn:asyncidem:in-progress")
    assert (after.status_code, after.json()["type"]) == (409, "urn:asyncidem:response-not-kept")
    assert "retry-after" not in after.headers
    assert len(endpoint.calls) == 1


async def test_a_duplicate_that_waits_for_a_stream_is_told_at_its_end() -> None:
    """It does not wait out its patience for an answer that will never be there."""
    endpoint = Endpoint(fixed(200, [], b"one", b"two"))
    endpoint.hold.clear()
    async with serving(guard(endpoint, wait=3600)) as address:
        first = asyncio.create_task(post(address))
        await endpoint.reached.wait()
        second = asyncio.create_task(post(address))
        endpoint.hold.set()
        assert (await first).content == b"onetwo"
        assert (await second).json()["type"] == "urn:asyncidem:response-not-kept"


@pytest.mark.parametrize("parts", [1, 2, 5])
async def test_a_response_in_parts_that_says_its_length_is_kept(parts: int) -> None:
    """Quart and Starlette's BaseHTTPMiddleware send what is whole in several messages."""
    pieces = [b"ab"] * parts

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, 200, [(b"content-length", b"%d" % (2 * parts))], *pieces, b"")

    endpoint = Endpoint(answer)
    async with serving(guard(endpoint)) as address:
        answers = [await post(address) for _ in range(2)]
    assert [answer.content for answer in answers] == [b"ab" * parts] * 2
    assert answers[1].headers["idempotent-replayed"] == "true"


@pytest.mark.parametrize(
    ("headers", "parts"),
    [
        ([], [b"x" * 101]),
        ([(b"content-length", b"101")], [b"x" * 50, b"x" * 51]),
        ([(b"content-encoding", b"gzip")], [gzip.compress(b"x")]),
        ([(b"content-length", b"10"), (b"content-encoding", b"br")], [b"12345", b"67890"]),
    ],
    ids=["large", "large in parts", "encoded", "encoded in parts"],
)
async def test_what_cannot_be_kept_reaches_its_client_whole(headers: Any, parts: list[bytes]) -> None:
    """Byte for byte, and a duplicate does not run again."""
    endpoint = Endpoint(fixed(200, headers, *parts))
    async with serving(guard(endpoint, max_response=100)) as address, raw(address) as client:
        first = await client.request("POST", "/pay", "Idempotency-Key: a")
        again = await client.request("POST", "/pay", "Idempotency-Key: a")
    assert first.body == b"".join(parts)
    assert (first.status, again.status) == (200, 409)
    assert len(endpoint.calls) == 1


async def test_an_encoding_that_is_none_is_kept() -> None:
    """Content-Encoding: identity says nothing."""
    endpoint = Endpoint(fixed(200, [(b"content-encoding", b"identity")], b"x"))
    async with serving(guard(endpoint, max_response=1)) as address:
        assert [(await post(address)).status_code for _ in range(2)] == [200, 200]


@pytest.mark.parametrize("on_cancel", ["keep", "release"])
@pytest.mark.parametrize("form", ["nothing", "start", "stream", "short"])
async def test_a_response_without_its_end_is_never_replayed(form: str, on_cancel: str) -> None:
    """The application returned in the middle: its outcome is unknown, and on_cancel decides."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if form == "nothing":
            return
        length = [(b"content-length", b"10")] if form == "short" else []
        await send({"type": "http.response.start", "status": 200, "headers": length})
        if form == "stream":
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
        if form == "short":
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    endpoint = Endpoint(answer)
    statuses: list[int | None] = []
    async with serving(guard(endpoint, on_cancel=on_cancel)) as address:
        for _ in range(2):
            async with raw(address) as client:
                await client.send("POST", "/pay", "Idempotency-Key: a")
                statuses.append(await status_of(client))
    assert statuses == [None, 409 if on_cancel == "keep" else None]
    assert [call["attempt"] for call in endpoint.calls] == [1] * statuses.count(None)


@pytest.mark.parametrize("on_cancel", ["keep", "release"])
@pytest.mark.parametrize("error", [RuntimeError("no more"), OSError("the client has gone, says a server of ASGI 2.4")])
async def test_a_stream_that_breaks_is_no_failure(error: Exception, on_cancel: Any) -> None:
    """Its effect may have happened, and it may be its client that left: the outcome is not known."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        raise error

    endpoint = Endpoint(answer)
    async with serving(guard(endpoint, on_cancel=on_cancel)) as address:
        with pytest.raises(httpx.RemoteProtocolError):
            await post(address)
        if on_cancel == "keep":
            assert (await post(address)).status_code == 409
        else:
            with pytest.raises(httpx.RemoteProtocolError):
                await post(address)
    assert len(endpoint.calls) == (1 if on_cancel == "keep" else 2)


async def test_what_follows_the_response_does_not_change_it() -> None:
    """A background task runs after the last message, and may fail; a retry does not wait for it."""
    background = asyncio.Event()

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, 201, [], b"done")
        await background.wait()
        raise RuntimeError("in the background")

    endpoint = Endpoint(answer)
    async with serving(guard(endpoint)) as address:
        first = await post(address)
        during = await post(address)
        background.set()
        after = await post(address)
    assert [one.content for one in (first, during, after)] == [b"done"] * 3
    assert len(endpoint.calls) == 1


async def test_headers_may_be_read_once() -> None:
    """They are an iterable (ASGI, response start), and reach the first client, too."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 201, "headers": iter([(b"x-receipt", b"7")])})
        await send({"type": "http.response.body", "body": b"paid"})

    async with serving(guard(Endpoint(answer))) as address:
        assert [(await post(address)).headers["x-receipt"] for _ in range(2)] == ["7", "7"]


async def test_shortcuts_of_servers_are_not_offered() -> None:
    """A path that is sent past the body, and trailers, would be no part of the record; other extensions stay."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope.get("extensions"))
        await send({"type": "http.response.debug", "info": {}})
        await respond(send, 200, [], b"")

    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    extensions: Any = {"http.response.pathsend": {}, "http.response.trailers": {}, "http.response.debug": {}}
    given = dict(extensions)
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"idempotency-key", b"a")]}
    await guard(app)({**scope, "extensions": extensions}, receive, send)
    await guard(app)({**scope}, receive, send)
    assert seen == [{"http.response.debug": {}}, None]
    assert extensions == given
    assert sent == ["http.response.debug", "http.response.start", "http.response.body"] * 2


async def test_a_body_without_a_start_is_for_the_server_to_refuse() -> None:
    """The middleware passes on what it does not understand, and the operation has failed."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.body", "body": b"x"})

    endpoint = Endpoint(answer)
    async with serving(guard(endpoint)) as address:
        assert [(await post(address)).status_code for _ in range(2)] == [500, 500]
    assert len(endpoint.calls) == 2


async def test_a_start_that_is_malformed_leaves_no_key_taken() -> None:
    """It fails like any fault of the application: the next request runs."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    endpoint = Endpoint(answer)
    async with serving(guard(endpoint)) as address:
        assert [(await post(address)).status_code for _ in range(2)] == [500, 500]
    assert [call["attempt"] for call in endpoint.calls] == [1, 1]


async def test_the_handler_may_listen_after_the_body() -> None:
    """It hears of a disconnect when there is one, and not before."""
    heard: list[str] = []
    gone = asyncio.Event()

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        heard.append((await receive())["type"])
        gone.set()
        await respond(send, 200, [], b"")

    endpoint = Endpoint(answer)
    async with serving(guard(endpoint)) as address:
        async with raw(address) as client:
            await client.send("POST", "/pay", "Idempotency-Key: a")
            await endpoint.reached.wait()
            assert heard == []
        await gone.wait()
    assert heard == ["http.disconnect"]
