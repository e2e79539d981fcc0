"""Which responses of aiohttp are kept, and what comes back of them."""

import asyncio
import gzip
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.typedefs import Handler

from integrations.aiohttp_sites import Effect, Reply, Site, guarded, message, serve


async def twice(site: Site, **more: Any) -> tuple[Reply, Reply]:
    """Send one request twice."""
    return await site.post(**more), await site.post(**more)


def same(first: Reply, second: Reply) -> bool:
    """Tell whether the second is a replay of the first, to the byte."""
    assert second.replayed
    return first._replace(lines=first.kept_lines) == second._replace(lines=second.kept_lines)


@pytest.mark.parametrize(
    "make",
    [
        lambda: web.json_response({"a": 1}, status=201),
        lambda: web.Response(text="café", headers={"X-Name": "café", "X-Twice": "1"}),
        lambda: web.Response(body=b"\x00\xff\xfe"),
        lambda: web.Response(body=bytearray(b"array"), content_type="text/plain"),
        lambda: web.Response(body="text as body"),
        lambda: web.Response(body=aiohttp.JsonPayload({"a": 1})),
        lambda: web.Response(status=204),
        web.Response,
        lambda: web.Response(text="paid", reason="Paid In Full"),
        lambda: web.Response(text="?", status=299),
        lambda: web.Response(text="x", headers=[("Link", "<a>"), ("Link", "<b>")]),
    ],
)
async def test_replays_are_equal_to_the_byte(make: Any) -> None:
    """Status, reason, header lines in UTF-8 as aiohttp sends them, and body."""
    effect = Effect(lambda _: make())
    async with serve(guarded(effect.run)) as site:
        first, second = await twice(site)
    assert same(first, second)
    assert effect.count == 1


async def test_header_that_is_no_text_does_not_come_between_effect_and_completion() -> None:
    """What aiohttp makes of a lone surrogate is its business; the effect has happened, and does not happen again."""
    effect = Effect(lambda _: web.Response(text="ok", headers={"X-Raw": "caf\udce9"}))
    statuses = []
    async with serve(guarded(effect.run)) as site:
        for _ in range(2):
            try:
                statuses.append((await site.post()).status)
            except aiohttp.ClientError:  # the server without its C extensions cannot send it
                statuses.append(0)
    assert statuses[0] == statuses[1]
    assert effect.count == 1


async def test_what_belongs_to_one_answer_is_not_replayed() -> None:
    """The handler's own Date, Server and hop-by-hop headers, CORS headers and cookies; `store_cookies` keeps those."""

    def answer(request: web.Request) -> web.Response:
        headers = {"Date": "then", "Server": "mine", "X-Hop": "1", "X-Stays": "1", "Access-Control-Allow-Origin": "*"}
        response = web.Response(text="ok", headers={**headers, "Connection": "keep-alive, X-Hop"})
        response.set_cookie("session", "secret", httponly=True)
        response.set_cookie("other", "1")
        return response

    for store_cookies in (False, True):
        async with serve(guarded(Effect(answer).run, store_cookies=store_cookies)) as site:
            first, second = await twice(site)
        assert first.header("Date") == "then"
        assert first.header("Access-Control-Allow-Origin") == "*"
        assert second.header("X-Stays") == "1"
        assert second.header("Date") != "then"
        assert second.header("Server") != "mine"
        for name in ("X-Hop", "Access-Control-Allow-Origin"):
            assert second.header(name) is None
        cookies = [[value for name, value in reply.lines if name == b"Set-Cookie"] for reply in (first, second)]
        assert len(cookies[0]) == 2
        assert cookies[1] == (cookies[0] if store_cookies else [])


async def test_signals_that_prepare_responses_run_for_replays_too() -> None:
    """What they add stands once on each answer, and is not stored."""

    async def stamp(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.add("X-Request", request.query.get("id", ""))

    app = guarded(Effect().run, fingerprint=lambda _, body: body)
    app.on_response_prepare.append(stamp)
    async with serve(app) as site:
        replies = [await site.post(f"/pay?id={number}") for number in range(2)]
    assert [[value for name, value in reply.lines if name == b"X-Request"] for reply in replies] == [[b"0"], [b"1"]]


class PaymentRequired(web.HTTPClientError):
    """An exception of an application's own."""

    status_code = 402


class Teapot(web.HTTPClientError):
    """One of a status that aiohttp has no class for."""

    status_code = 418


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (lambda: web.HTTPUnprocessableEntity(text="café", headers={"X-Why": "é"}), web.HTTPUnprocessableEntity),
        (lambda: web.HTTPConflict(reason="Sold Out"), web.HTTPConflict),
        (web.HTTPNoContent, web.HTTPNoContent),
        (lambda: PaymentRequired(text="declined", content_type="text/html"), web.HTTPPaymentRequired),
        (Teapot, web.HTTPException),
        (lambda: web.HTTPUnavailableForLegalReasons("https://example.com", text="no"), web.HTTPException),
    ],
)
async def test_raised_responses_are_raised_again(make: Any, seen: Any) -> None:
    """A raised HTTPException is a response, and middlewares outside that catch it catch its replay."""

    def answer(request: web.Request) -> Any:
        raise make()

    caught = []

    @web.middleware
    async def outside(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            caught.append(error)
            raise

    effect = Effect(answer)
    app = guarded(effect.run)
    app.middlewares.insert(0, outside)
    async with serve(app) as site:
        first, second = await twice(site)
    assert same(first, second)
    assert effect.count == 1
    assert isinstance(caught[1], seen)
    assert (caught[1].status, caught[1].reason) == (caught[0].status, caught[0].reason)
    assert caught[1].text == caught[0].text or caught[0].empty_body


async def test_returned_responses_are_not_raised() -> None:
    """An error that was returned passes the middlewares that catch exceptions, the second time as the first."""

    @web.middleware
    async def outside(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException:
            return web.Response(text="an error page")

    app = guarded(Effect(lambda _: web.json_response({}, status=422)).run)
    app.middlewares.insert(0, outside)
    async with serve(app) as site:
        assert [reply.status for reply in await twice(site)] == [422, 422]


async def stream(request: web.Request) -> web.StreamResponse:
    """Answer in pieces."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for number in range(3):
        await response.write(b"data: %d\n\n" % number)
    await response.write_eof()
    return response


async def payload(request: web.Request) -> web.StreamResponse:
    """Answer with an iterable."""

    async def pieces() -> Any:
        for number in range(3):
            yield b"%d" % number

    return web.Response(body=pieces())


async def unprepared(request: web.Request) -> web.StreamResponse:
    """Answer with a stream that the server begins and ends."""
    return web.StreamResponse(status=202)


async def sent(request: web.Request) -> web.StreamResponse:
    """Answer with a response that the handler has begun to send itself."""
    response = web.Response(text="sent")
    await response.prepare(request)
    return response


async def compressed(request: web.Request) -> web.StreamResponse:
    """Answer with a body that is encoded for this client."""
    response = web.Response(text="x" * 1000)
    response.enable_compression()
    return response


async def encoded(request: web.Request) -> web.StreamResponse:
    """Answer with a body that has been encoded."""
    return web.Response(body=gzip.compress(b"x" * 1000), headers={"Content-Encoding": "gzip"})


async def large(request: web.Request) -> web.StreamResponse:
    """Answer with more than is kept."""
    return web.Response(body=b"x" * 10_001)


async def file(request: web.Request) -> web.StreamResponse:
    """Answer with a file."""
    return web.FileResponse(__file__)


@pytest.mark.parametrize(
    ("handler", "body"),
    [
        (stream, b"data: 0\n\ndata: 1\n\ndata: 2\n\n"),
        (payload, b"012"),
        (unprepared, b""),
        (sent, b"sent"),
        (compressed, b"x" * 1000),
        (encoded, b"x" * 1000),
        (large, b"x" * 10_001),
        (file, Path(__file__).read_bytes()),
    ],
)
async def test_what_cannot_be_kept_goes_out_whole_and_never_runs_again(handler: Any, body: bytes) -> None:
    """Its operation has completed; a duplicate gets 409 with a type of its own."""
    async with serve(guarded(handler, max_response=10_000)) as site:
        first, second = await twice(site)
    assert (first.status // 100, first.body) == (2, body)
    assert second.status == 409
    assert b"urn:asyncidem:response-not-kept" in second.body


async def test_file_that_is_not_there_releases_the_key(tmp_path: Path) -> None:
    """Its 404, and the 403 of what is no file, are known when it is sent; they are no results."""
    path = tmp_path / "report.pdf"
    effect = Effect(lambda _: web.FileResponse(path))
    async with serve(guarded(effect.run)) as site:
        assert [reply.status for reply in await twice(site)] == [404, 404]
        path.mkdir()
        assert (await site.post()).status == 403
        path.rmdir()
        path.write_bytes(b"report")
        first, second = await twice(site)
    assert (first.status, first.body, second.status) == (200, b"report", 409)
    assert effect.count == 4


async def test_compressed_file_beside_the_name_is_the_file(tmp_path: Path) -> None:
    """What aiohttp sends instead is an answer: the operation has completed."""
    (tmp_path / "report.txt.gz").write_bytes(gzip.compress(b"report"))
    effect = Effect(lambda _: web.FileResponse(tmp_path / "report.txt"))
    async with serve(guarded(effect.run)) as site:
        first, second = await twice(site)
    assert (first.status, first.body, second.status, effect.count) == (200, b"report", 409, 1)


async def test_file_that_may_not_be_read_releases_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused by aiohttp, with 403 or, by older ones, 404."""
    seen = tmp_path / "secret.pdf"
    seen.write_bytes(b"x")
    plain = Path.stat

    def refuse(path: Path, **more: Any) -> Any:
        if path == seen:
            raise PermissionError
        return plain(path, **more)

    effect = Effect(lambda _: web.FileResponse(seen))
    async with serve(guarded(effect.run)) as site:
        monkeypatch.setattr(Path, "stat", refuse)
        assert {reply.status for reply in await twice(site)} <= {403, 404}
    assert effect.count == 2


@pytest.mark.parametrize(
    "error", [OSError("source"), web.HTTPBadRequest(), None], ids=["exception", "another response", "client left"]
)
async def test_stream_that_breaks_off_is_no_failure(error: Exception | None) -> None:
    """Its effect may have happened, so the key is not free; nor is what was raised behind it the answer."""
    ran, broken = [], asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        ran.append(1)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        if error is not None:
            raise error
        try:
            while True:  # until aiohttp says that nobody is there
                await response.write(b"more")
                await asyncio.sleep(0)
        finally:
            broken.set()

    async with serve(guarded(handler)) as site:
        if error is None:
            async with site.socket() as (reader, writer):
                writer.write(message("Idempotency-Key: k"))
                await reader.readuntil(b"half")
                writer.transport.abort()
            await asyncio.wait_for(broken.wait(), 10)
        else:
            with pytest.raises(aiohttp.ClientError):
                await site.post()
        assert (await site.post()).status == 409
    assert len(ran) == 1


@pytest.mark.parametrize("returned", [None, web.Response(text="second")], ids=["nothing", "another"])
async def test_response_that_went_out_and_was_not_returned_is_not_kept(returned: Any) -> None:
    """What the handler returned is not what its client got; it has run to its end, and does not run again."""
    ran = []

    async def handler(request: web.Request) -> Any:
        ran.append(1)
        response = web.Response(text="first")
        await response.prepare(request)
        await response.write_eof()
        return returned

    async with serve(guarded(handler)) as site:
        assert (await site.post()).body == b"first"
        again = await site.post()
        assert again.status == 409
        assert b"response-not-kept" in again.body
    assert len(ran) == 1


async def test_websockets_pass_untouched() -> None:
    """A handshake with a key, on a guarded route, is nobody's business."""

    async def handler(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(await socket.receive_str())
        return socket

    async with (
        serve(guarded(handler, required=True)) as site,
        site.session.ws_connect(f"{site.url}/pay", headers={"Idempotency-Key": "k"}) as socket,
    ):
        await socket.send_str("echo")
        assert await socket.receive_str() == "echo"
