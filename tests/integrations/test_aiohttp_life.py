"""What becomes of an operation when clients go, servers stop, leases are lost: on real aiohttp servers."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import redis.asyncio
from aiohttp import web
from aiohttp.typedefs import Handler

from asyncidem import Idempotency, MemoryStore, RedisStore, State, StoreUnavailableError, current_operation
from asyncidem.integrations.aiohttp import IDEMPOTENCY, idempotency_middleware
from asyncidem.testing import FaultyStore, ManualClock

from integrations import aiohttp_worker
from integrations.aiohttp_sites import (
    HOST,
    WITHIN,
    Effect,
    Gate,
    Site,
    guarded,
    make_idempotency,
    message,
    receive,
    serve,
    until,
    who,
)
from servers import free_port

KEY = "Idempotency-Key: k"


class Statuses:
    """A middleware outside of the guard that knows what became of each request."""

    def __init__(self, app: web.Application) -> None:
        self.seen: list[object] = []
        self.changed = asyncio.Event()

        @web.middleware
        async def outside(request: web.Request, handler: Handler) -> web.StreamResponse:
            end: object = None
            try:
                response = await handler(request)
                end = response.status
                return response
            except BaseException as error:
                end = type(error)
                raise
            finally:
                self.seen.append(end)
                self.changed.set()

        app.middlewares.insert(0, outside)

    async def next(self) -> object:
        """Return what the next request comes to."""
        await asyncio.wait_for(self.changed.wait(), WITHIN)
        self.changed.clear()
        return self.seen[-1]


def attempt() -> int:
    """Return the attempt of the running operation."""
    op = current_operation()
    assert op is not None
    return op.attempt


@asynccontextmanager
async def lone_client(site: Site, **more: Any) -> AsyncIterator[asyncio.StreamReader]:
    """A client that sends a request, and goes when the block ends."""
    async with site.socket() as (reader, writer):
        writer.write(message(KEY, **more))
        yield reader


async def test_twenty_at_once_have_one_effect() -> None:
    """One answer, and nineteen times 409 with Retry-After; with `wait`, twenty times the same answer."""
    for wait in (None, 5):
        gate = Gate()
        async with serve(guarded(gate.run, wait=wait)) as site:
            asked = [asyncio.create_task(site.post(json={"amount": 1})) for _ in range(20)]
            await gate.running.wait()
            if wait is None:
                await until(lambda: sum(one.done() for one in asked) == 19)
            gate.open.set()
            replies = await asyncio.gather(*asked)
        assert gate.count == 1
        if wait is None:
            assert sorted(reply.status for reply in replies) == [201] + [409] * 19
            assert all(int(reply.header("retry-after") or 0) >= 1 for reply in replies if reply.status == 409)
        else:
            assert {(reply.status, reply.body) for reply in replies} == {(201, b'{"charged": 1}')}
            assert sum(reply.replayed for reply in replies) == 19


async def test_result_is_stored_though_its_client_went() -> None:
    """A handler whose client disconnects goes on, reads its body to the end, and the retry gets its answer."""
    left, gone = asyncio.Event(), asyncio.Event()
    ran = []

    async def handler(request: web.Request) -> web.Response:
        ran.append(1)
        left.set()
        await until(lambda: request.transport is None)
        gone.set()
        async for part in await request.multipart():
            assert isinstance(part, aiohttp.BodyPartReader)
            return web.Response(body=await part.read())
        raise NotImplementedError

    body = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\npaid\r\n--b--\r\n'
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    app = guarded(handler)
    statuses = Statuses(app)
    async with serve(app) as site:
        async with site.socket() as (_, writer):
            writer.write(message(KEY, *(f"{name}: {value}" for name, value in form.items()), body=body))
            await left.wait()
        assert await statuses.next() == 200
        retry = await site.post(data=body, headers=form)
    assert (retry.body, retry.replayed, len(ran)) == (b"paid", True, 1)


@pytest.mark.parametrize("on_cancel", ["keep", "release"])
@pytest.mark.parametrize("ends", ["disconnect", "shutdown"])
async def test_cancelled_handler_follows_on_cancel(on_cancel: Any, ends: str) -> None:
    """By a disconnect where the server cancels for it, or by a graceful shutdown: kept for the lease, or released."""
    clock = ManualClock()
    store = MemoryStore(clock=clock.monotonic, wall=clock.wall)
    idempotency, gate = Idempotency(store, on_cancel=on_cancel), Gate()
    async with serve(guarded(gate.run, idempotency=idempotency), handler_cancellation=True) as site:
        async with lone_client(site):
            await gate.running.wait()
            if ends == "shutdown":
                await site.runner.cleanup()
        await asyncio.wait_for(gate.cancelled.wait(), WITHIN)

    def answer(request: web.Request) -> web.Response:
        return web.json_response(attempt())

    async with serve(guarded(Effect(answer).run, idempotency=idempotency)) as site:
        first = await site.post()
        if on_cancel == "keep":
            assert first.status == 409
            clock.advance(31)
            first = await site.post()
        assert first.body == (b"2" if on_cancel == "keep" else b"1")
        assert (await site.post()).replayed


@pytest.mark.parametrize("options", [{}, {"handler_cancellation": True}])
async def test_disconnect_of_a_waiting_duplicate_ends_its_wait(options: dict[str, Any]) -> None:
    """It goes at once, and does not take over when the first call fails."""
    ran, fail = asyncio.Event(), asyncio.Event()
    count = []

    async def handler(request: web.Request) -> web.Response:
        count.append(1)
        ran.set()
        await fail.wait()
        return web.Response(status=503)

    app = guarded(handler, wait=30)
    statuses = Statuses(app)
    async with serve(app, **options) as site:
        first = asyncio.create_task(site.post())
        await ran.wait()
        async with lone_client(site):
            await until(lambda: waiting(app))
        assert await statuses.next() == (asyncio.CancelledError if options else 499)
        fail.set()
        assert (await first).status == 503
    assert len(count) == 1


def waiting(app: web.Application) -> bool:
    """Tell whether a duplicate waits in the store of an application."""
    for local in app[IDEMPOTENCY].store.companions.values():
        if any(watch.groups for watch in local.watches._watches.values()):  # type: ignore[attr-defined]
            return True
    return False


async def test_duplicate_whose_client_went_before_it_waited_does_not_wait() -> None:
    """The disconnect came while the principal was looked up."""
    gate, asked, found = Gate(), asyncio.Event(), asyncio.Event()

    async def principal(request: web.Request) -> str | None:
        if "slow" in request.headers:
            asked.set()
            await found.wait()
        return who(request)

    app = guarded(gate.run, wait=30, principal=principal)
    statuses = Statuses(app)
    async with serve(app) as site:
        first = asyncio.create_task(site.post())
        await gate.running.wait()
        async with site.socket() as (_, writer):
            writer.write(message(KEY, "slow: 1"))
            await asked.wait()
        (connection,) = [one for one in site.runner.server.connections if one is not None][1:]  # type: ignore[union-attr]
        await until(lambda: connection.transport is None)
        found.set()
        assert await statuses.next() == 499
        gate.open.set()
        assert (await first).status == 201


async def test_shutdown_answers_a_waiting_duplicate() -> None:
    """Its client is there, and is told to come back."""
    gate = Gate()
    app = guarded(gate.run, wait=30)
    async with serve(app) as site, lone_client(site), site.socket() as (reader, writer):
        await gate.running.wait()
        writer.write(message(KEY))
        await until(lambda: waiting(app))
        await site.runner.cleanup()
        reply = await receive(reader)
    assert (reply.status, reply.header("retry-after")) == (409, "1")


async def test_owner_that_was_replaced_has_no_answer_to_give() -> None:
    """Found out at the completion, or by the renewer, which cancels the handler: 409, for another owner answers."""
    for forever in (False, True):
        idempotency = make_idempotency(lease=0.15)

        async def handler(request: web.Request) -> web.Response:
            op = current_operation()
            assert op is not None
            await idempotency.store.delete(op.key)
            if forever:
                await asyncio.Event().wait()
            return web.Response(text="mine")

        async with serve(guarded(handler, idempotency=idempotency)) as site:
            reply = await site.post()
        assert (reply.status, b"in-progress" in reply.body) == (409, True)


async def test_stream_of_an_owner_that_was_replaced_breaks_off() -> None:
    """No second answer is written into the first; one that was already whole stays."""
    for forever in (False, True):
        idempotency = make_idempotency(lease=0.15)

        async def handler(request: web.Request) -> web.StreamResponse:
            op = current_operation()
            assert op is not None
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"part")
            await idempotency.store.delete(op.key)
            if forever:
                await asyncio.Event().wait()
            return response

        async with serve(guarded(handler, idempotency=idempotency)) as site:
            if forever:
                with pytest.raises(aiohttp.ClientPayloadError):
                    await site.post()
            else:
                assert (await site.post()).body == b"part"


@pytest.mark.parametrize("raised", [False, True])
async def test_completion_that_is_not_acknowledged_is_503_where_that_is_asked_for(*, raised: bool) -> None:
    """`on_completion_error="raise"`: the client repeats; by default it gets the answer."""

    def answer(request: web.Request) -> web.Response:
        if raised:
            raise web.HTTPConflict
        return web.Response(status=409)

    for option, status in (("raise", 503), ("return", 409)):
        store = FaultyStore(MemoryStore())
        store.fault("swap", before=StoreUnavailableError("down"), times=None)
        idempotency = make_idempotency(store, on_completion_error=option)
        async with serve(guarded(Effect(answer).run, idempotency=idempotency)) as site:
            assert (await site.post()).status == status
        store.faults.clear()
        await store.aclose()


@asynccontextmanager
async def worker(port: int, url: str, ledger: Path) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A server in a process of its own."""
    process = subprocess.Popen([sys.executable, aiohttp_worker.__file__, str(port), url, str(ledger)])
    try:
        end = time.monotonic() + WITHIN
        while True:
            try:
                (await asyncio.open_connection(HOST, port))[1].close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < end
                await asyncio.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


async def test_killed_server_runs_once_more_and_stores_one_result(redis_url: str, tmp_path: Path) -> None:
    """SIGKILL in the middle of a handler: after restart and lease the retry is attempt 2, and the last that runs."""
    port, ledger = free_port(), tmp_path / "ledger"
    headers = {"Idempotency-Key": "k", "X-User": "ann"}

    async def pay(session: aiohttp.ClientSession) -> tuple[int, bytes, str | None]:
        async with session.post(f"http://{HOST}:{port}/pay", headers=headers) as response:
            return response.status, await response.read(), response.headers.get("Idempotent-Replayed")

    async with aiohttp.ClientSession() as session:
        async with worker(port, redis_url, ledger) as process:
            lost = asyncio.create_task(pay(session))
            await until(lambda: ledger.exists() and ledger.read_text() == "1\n")
            process.send_signal(signal.SIGKILL)
            with pytest.raises(aiohttp.ClientError):
                await lost
        async with worker(port, redis_url, ledger):
            replies = [await pay(session) for _ in range(3)]
    body = b'{"attempt": 2}'
    assert replies == [(201, body, None), (201, body, "true"), (201, body, "true")]
    assert ledger.read_text() == "1\n2\n"
    async with redis.asyncio.from_url(redis_url) as client, RedisStore(client) as store:
        (name,) = [name.decode() for name in await client.keys("*") if not name.endswith(b":lock")]
        record = await store.get(name.removeprefix("asyncidem:"))
    assert record is not None
    assert (record.state, record.attempt) == (State.COMPLETED, 2)


async def test_middleware_is_what_aiohttp_takes_for_one() -> None:
    """Of the new style: the old one is deprecated, and warned about."""
    middleware: Any = idempotency_middleware(principal=None)
    assert middleware.__middleware_version__ == 1
