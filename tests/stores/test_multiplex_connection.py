"""One connection for a whole crowd, on real servers: what breaks it, and what everybody gets afterwards."""

import asyncio
import json
import logging
import random
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable

import pytest
from fakeredis import FakeAsyncRedis as FakeRedis
from redis.asyncio import Redis

from asyncidem import (
    Claimed,
    Idempotency,
    InProgress,
    Record,
    RedisStore,
    Replay,
    ResultUnavailableError,
    StoreError,
)
from asyncidem.stores.channel import CHUNK, MultiplexedWire
from asyncidem.stores.multiplex import MultiplexedLink

from conftest import ServerFactory
from proxy import Proxy
from servers import HOST, Server

SET = b"\r\nSET\r\n"


@pytest.fixture
async def proxy(redis_url: str, server: Server) -> AsyncIterator[Proxy]:
    """A proxy to the shared server."""
    async with Proxy(HOST, server.port) as proxy:
        yield proxy


@pytest.fixture
async def store(proxy: Proxy) -> AsyncIterator[RedisStore]:
    """A store with its one connection and its scripts loaded; nothing of that is counted."""
    async with RedisStore.from_url(proxy.url, timeout=6) as store:
        claim = await claimed(store, "before")
        await store.renew(claim)
        await store.release(claim)
        proxy.reset_counters()
        yield store


async def claimed(store: RedisStore, key: str) -> Claimed:
    """Return the claim of a key that is free."""
    claim = await store.claim(key)
    assert isinstance(claim, Claimed)
    return claim


def wire_of(store: RedisStore, *, large: bool = False) -> MultiplexedWire:
    """Return the store's connection."""
    link = store._link
    assert isinstance(link, MultiplexedLink)
    (channel,) = (link._large if large else link._channels).values()
    assert channel._wire is not None
    return channel._wire


async def crowd(store: RedisStore, name: str, size: int = 64) -> None:
    """Run so many operations at once, and see that each result is its own, also from the record."""
    idem = Idempotency(store)
    runs = [idem.run(f"{name}{number}", asyncio.sleep, 0, {"is": number}) for number in range(size)]
    assert await asyncio.gather(*runs) == [{"is": number} for number in range(size)]
    records = await asyncio.gather(*(store.get(f"{name}{number}") for number in range(size)))
    assert [json.loads(record.data or "") for record in records if record] == [{"is": number} for number in range(size)]


# -- one for all -----------------------------------------------------------------------------------------------------------


async def test_crowd_on_one_connection(store: RedisStore, proxy: Proxy) -> None:
    """Three hundred operations at once go over one connection, in a few writes, each with its own replies."""
    await crowd(store, "k", 300)
    assert proxy.connections == 0
    assert proxy.open_connections == 1


async def test_crowd_of_a_fresh_store(proxy: Proxy) -> None:
    """The first calls of a store share the connection that is made for them."""
    async with RedisStore.from_url(proxy.url) as store:
        await crowd(store, "k")
        assert proxy.connections == 1


async def test_one_winner(store: RedisStore, proxy: Proxy) -> None:
    """Of a crowd that claims one key over one connection, one wins."""
    claims = await asyncio.gather(*(store.claim("k") for _ in range(100)))
    assert sum(isinstance(claim, Claimed) for claim in claims) == 1
    assert sum(isinstance(claim, InProgress) for claim in claims) == 99
    assert proxy.connections == 0


# -- what breaks it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["requests", "replies"])
async def test_cut_in_the_middle_of_crowds(store: RedisStore, proxy: Proxy, where: str) -> None:
    """A connection that breaks at any command of a crowd loses none of them, and mixes none up."""
    chance = random.Random(3)
    drop = proxy.drop_requests if where == "requests" else proxy.drop_replies
    for turn in range(15):
        drop(1, match=b"k%d-%d\r\n" % (turn, chance.randrange(40)))
        await crowd(store, f"k{turn}-", 40)
    assert proxy.connections == 15


async def test_killed_while_a_crowd_works(store: RedisStore, server: Server, proxy: Proxy) -> None:
    """A server that kills connections again and again under a crowd fails nobody."""

    async def kill() -> None:
        for _ in range(10):
            await asyncio.sleep(0.003)
            server.command("CLIENT", "KILL", "TYPE", "normal")

    killing = asyncio.ensure_future(kill())
    for turn in range(20):
        await crowd(store, f"k{turn}-", 30)
        if killing.done():
            break
    await killing
    assert proxy.connections >= 1


@pytest.mark.parametrize("extra", [b"+OK\r\n", b"$-1\r\n", b"?garbage\r\n", b"-ERR goodbye\r\n"])
async def test_reply_that_nobody_asked_for(store: RedisStore, proxy: Proxy, extra: bytes) -> None:
    """A server that says what nobody asked for gets a new connection, and the next caller its own reply."""
    claim = await claimed(store, "k")
    (connection,) = proxy._links
    connection.client.write(extra)
    await proxy.until_open(0)
    await store.complete(claim, "1")
    replay = await store.claim("k")
    assert isinstance(replay, Replay)
    assert replay.record.data == "1"
    await crowd(store, "c", 20)
    assert proxy.connections == 1


async def test_garbage_among_replies(store: RedisStore, proxy: Proxy) -> None:
    """Garbage in the middle of a crowd's replies costs a connection, and nobody's result."""
    idem = Idempotency(store)
    proxy.hold_replies(SET)
    runs = [asyncio.ensure_future(idem.run(f"k{number}", asyncio.sleep, 0, number)) for number in range(30)]
    await proxy.reply_held.wait()
    (connection,) = proxy._links
    while len(connection.held_replies) < 30:
        await asyncio.sleep(0)
    connection.held_replies.insert(15, b"!!\r\n")
    proxy.release_replies()
    assert await asyncio.gather(*runs) == list(range(30))
    assert proxy.connections == 1


async def test_push_messages(proxy: Proxy) -> None:
    """A push message of RESP3 is nobody's reply, and costs no connection."""
    async with RedisStore.from_url(proxy.url, protocol=3) as store:
        claim = await claimed(store, "k")
        (connection,) = proxy._links
        connection.client.write(b">3\r\n$7\r\nmessage\r\n+moving\r\n:5\r\n")
        await store.complete(claim, "1")
        proxy.hold_replies()
        reading = [asyncio.ensure_future(store.get("k")) for _ in range(3)]
        await proxy.reply_held.wait()
        connection.held_replies.insert(1, b">1\r\n+x\r\n")
        proxy.release_replies()
        records = await asyncio.gather(*reading)
        assert [record.data for record in records if isinstance(record, Record)] == ["1"] * 3
        assert proxy.connections == 1


async def test_silence_moves_the_crowd(proxy: Proxy) -> None:
    """A connection that falls silent, half open, is left by the whole crowd after a third of the time, for one new one."""
    async with RedisStore.from_url(proxy.url, timeout=1.5) as store:
        await crowd(store, "before")
        proxy.reset_counters()
        proxy.hold_replies(b"k7\r\n")
        began = time.monotonic()
        runs = asyncio.ensure_future(crowd(store, "k"))
        await proxy.reply_held.wait()
        proxy._hold_replies.left = 0  # what is held stays held, and nothing more is
        await runs
        assert 0.4 < time.monotonic() - began < 1.4
        assert proxy.connections == 1


async def test_large_value_over_a_slow_line(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that needs longer to be sent than a server may be silent arrives, for some of it always does."""
    async with RedisStore.from_url(proxy.url, timeout=3) as store:
        silence = 1.0
        await claimed(store, "before")
        small = set(proxy._links)
        await store.complete(await claimed(store, "warm"), json.dumps("x" * 70_000))
        (line,) = proxy._links - small
        side, receive = line.client, line.client.data_received

        def slowly(data: bytes) -> None:
            receive(data)
            assert side.transport is not None
            if time.monotonic() - began < silence + 0.1:
                side.transport.pause_reading()
                asyncio.get_running_loop().call_later(0.02, side.transport.resume_reading)

        monkeypatch.setattr(side, "data_received", slowly)
        claim = await claimed(store, "k")
        proxy.reset_counters()
        began = time.monotonic()
        await store.complete(claim, json.dumps("x" * 30_000_000))
        assert time.monotonic() - began > silence
        assert proxy.connections == 0


# -- clients -----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("redis_url")
async def test_connection_is_the_stores_own(server: Server) -> None:
    """The connection has the name, the database and the user that the client has, and is none of its pool."""
    async with Redis(port=server.port, client_name="payments", db=5) as client, RedisStore(client) as store:
        await crowd(store, "k", 5)
        (mine,) = [entry for entry in await client.client_list() if entry["cmd"] in ("get|pttl", "pttl", "evalsha")]
        assert (mine["name"], mine["db"]) == ("payments", "5")
        assert await client.dbsize() == 5


async def test_client_without_a_transport(caplog: pytest.LogCaptureFixture) -> None:
    """A client whose connections have no transport works over them as they are, and one log line says so."""
    async with FakeRedis() as client, RedisStore(client) as store:
        with caplog.at_level(logging.INFO, "asyncidem"):
            await crowd(store, "k", 20)
            await store.complete(await claimed(store, "large"), json.dumps("x" * 100_000))
        (record,) = [record for record in caplog.records if record.name.startswith("asyncidem")]
        assert record.getMessage().startswith("fallback_mode: a connection for every command")
        assert await client.dbsize() == 21


# -- back-pressure ---------------------------------------------------------------------------------------------------------


async def test_stalled_server_costs_no_memory(private_server: ServerFactory) -> None:
    """A thousand large values that wait for a server that is frozen are neither packed nor written; then all go."""
    server = private_server()
    async with RedisStore.from_url(server.url, timeout=30) as store:
        value = b"v" * 100_000

        async def write(key: str) -> bool:
            swap = await store.swap(key, b"", value, 60_000, exact=False, or_absent=True)
            return swap.written

        assert await write("before")
        server.pause()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            writes = [asyncio.ensure_future(write(f"k{number}")) for number in range(1000)]
            await asyncio.sleep(0.05)
            # Tasks, futures and commands are small; each value was packed on its way only if it was written.
            assert tracemalloc.get_traced_memory()[1] - before < 10_000_000
        finally:
            tracemalloc.stop()
        wire = wire_of(store, large=True)
        assert wire.paused
        assert wire.transport.get_write_buffer_size() <= 64 * 1024 + CHUNK + len(value) + 200
        assert len(wire.inflight) < 100
        server.resume()
        assert all(await asyncio.gather(*writes))
        assert server.command("DBSIZE") == ":1001"


# -- large values ----------------------------------------------------------------------------------------------------------


async def test_small_calls_beside_a_large_value(store: RedisStore, proxy: Proxy) -> None:
    """What is large has a connection of its own: small calls go on while it is held up, and it is stored all the same."""
    claim = await claimed(store, "large")
    text = json.dumps("x" * 300_000)
    proxy.hold_requests(b"xxxxxxxx")
    completion = asyncio.ensure_future(store.complete(claim, text))
    await proxy.request_held.wait()
    assert proxy.open_connections == 2
    await asyncio.wait_for(crowd(store, "small"), 2)
    assert not completion.done()
    proxy.release_requests()
    await completion
    record = await store.get("large")
    assert record is not None
    assert record.data == text
    await crowd(store, "more")
    assert proxy.connections == 1


async def test_order_of_a_large_value(store: RedisStore, proxy: Proxy) -> None:
    """A large completion that is repeated, cancelled and replayed comes before whatever follows it on its key."""
    for number in range(5):
        key = f"k{number}"
        claim = await claimed(store, key)
        await store.renew(claim)
        text = json.dumps(str(number) * 100_000)
        if number % 2:
            proxy.drop_replies(1, b"000000" if number == 0 else str(number).encode() * 10)
        completion = asyncio.ensure_future(store.complete(claim, text))
        await asyncio.sleep(0)
        if number > 2:
            completion.cancel()
            await asyncio.wait([completion])
        else:
            await completion
        replay = await store.claim(key)
        assert isinstance(replay, Replay)
        assert replay.record.data == text


async def test_too_large(private_server: ServerFactory) -> None:
    """A result that the server refuses for its size is recorded as completed without one, and its caller has it."""
    server = private_server("--proto-max-bulk-len", "1048576")
    async with RedisStore.from_url(server.url, timeout=3) as store:
        idem = Idempotency(store)
        result = "x" * 2_000_000
        assert await idem.run("k", asyncio.sleep, 0, result) == result
        record = await store.get("k")
        assert record is not None
        assert record.outcome == "too_large"
        with pytest.raises(ResultUnavailableError):
            await idem.run("k", asyncio.sleep, 0, 1)


# -- the connection's own way through each state ---------------------------------------------------------------------------


async def _cut(proxy: Proxy, _: Server) -> None:
    proxy.cut()


async def _refuse(proxy: Proxy, _: Server) -> None:
    proxy.refuse()
    asyncio.get_running_loop().call_later(0.1, lambda: asyncio.ensure_future(proxy.start()))


async def _hang(proxy: Proxy, _: Server) -> None:
    proxy.cut()
    proxy.black_hole(requests=True)
    asyncio.get_running_loop().call_later(0.1, proxy.heal)


async def _restart(_: Proxy, server: Server) -> None:
    await asyncio.to_thread(server.restart)


async def _freeze(_: Proxy, server: Server) -> None:
    server.pause()
    asyncio.get_running_loop().call_later(0.1, server.resume)


@pytest.mark.parametrize("how", [_cut, _refuse, _hang, _restart, _freeze], ids=lambda how: how.__name__.strip("_"))
async def test_reconnects(private_server: ServerFactory, how: Callable[[Proxy, Server], object]) -> None:
    """Whatever ends or blocks the connection between two calls or under them, a crowd goes on over the next."""
    server = private_server("--appendonly", "yes")
    async with Proxy(HOST, server.port) as proxy, RedisStore.from_url(proxy.url, timeout=4) as store:
        await crowd(store, "before", 10)
        under = [asyncio.ensure_future(crowd(store, f"under{number}", 10)) for number in range(3)]
        await asyncio.sleep(0)
        await how(proxy, server)  # type: ignore[misc]
        await crowd(store, "after", 10)
        await asyncio.gather(*under)
        assert await store.get("nothing") is None
        await proxy.until_open(1)


async def test_refused_for_too_long(proxy: Proxy, store: RedisStore) -> None:
    """A server that is gone is an error that says nothing was written, in the time of the call, for a whole crowd."""
    wire = wire_of(store)
    proxy.refuse()
    while wire.open:
        await asyncio.sleep(0)
    store.timeout = 0.3
    began = time.monotonic()
    errors = await asyncio.gather(*(store.claim(f"k{number}") for number in range(50)), return_exceptions=True)
    assert time.monotonic() - began < 1.5
    assert all(isinstance(error, StoreError) and not error.outcome_unknown for error in errors)
