"""What a call costs, counted in round trips by a proxy between the store and a real server."""

import contextlib
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from asyncidem import Claimed, Idempotency, InProgress, InProgressError, RedisStore, Replay

from conftest import StoreFactory
from proxy import Proxy
from servers import HOST, Server

KEY = "asyncidem:k"


@pytest.fixture
async def proxy(redis_url: str, server: Server) -> AsyncIterator[Proxy]:
    """A proxy to the shared server."""
    async with Proxy(HOST, server.port) as proxy:
        yield proxy


@contextlib.asynccontextmanager
async def fresh_store(store_at: StoreFactory, proxy: Proxy) -> AsyncIterator[RedisStore]:
    """A store that has only read so far, over a connection whose handshake is done and not counted."""
    async with store_at(proxy.url) as store:
        await store.get("nothing")
        proxy.reset_counters()
        yield store


@pytest.fixture
async def store(store_at: StoreFactory, proxy: Proxy) -> AsyncIterator[RedisStore]:
    """A store in the middle of its life: it has claimed, renewed, completed and released before."""
    async with fresh_store(store_at, proxy) as store:
        for key in ("before", "before it"):
            claim = await store.claim(key)
            assert isinstance(claim, Claimed)
            await store.renew(claim)
            await (store.complete(claim, "1") if key == "before" else store.release(claim))
        proxy.reset_counters()
        yield store


async def answer() -> int:
    """Return what is stored."""
    return 42


async def test_first_call(store: RedisStore, proxy: Proxy) -> None:
    """A first call costs two round trips: claim and completion."""
    assert await Idempotency(store).run("k", answer) == 42
    assert (proxy.round_trips, proxy.connections) == (2, 0)


async def test_first_call_with_local_cache(store: RedisStore, proxy: Proxy) -> None:
    """A first call that also asks for the time left costs no round trip more."""
    assert await Idempotency(store, local_cache=8).run("k", answer) == 42
    assert proxy.round_trips == 2


async def test_first_call_of_a_fresh_store(store: RedisStore, store_at: StoreFactory, proxy: Proxy) -> None:
    """The very first call of a store costs two round trips, too."""
    async with fresh_store(store_at, proxy) as fresh:
        assert await Idempotency(fresh).run("k", answer) == 42
        assert proxy.round_trips == 2


async def test_first_call_on_a_fresh_server(store_at: StoreFactory, proxy: Proxy) -> None:
    """The very first call costs two round trips on a server that has never seen a script, too."""
    async with fresh_store(store_at, proxy) as fresh:
        assert await Idempotency(fresh).run("k", answer) == 42
        assert proxy.round_trips == 2


async def test_replay(store: RedisStore, proxy: Proxy) -> None:
    """A replay costs one round trip."""
    idem = Idempotency(store)
    await idem.run("k", answer)
    proxy.reset_counters()
    assert await idem.run("k", answer) == 42
    assert proxy.round_trips == 1


async def test_replay_from_the_local_cache(store: RedisStore, proxy: Proxy) -> None:
    """A replay from the local cache costs nothing, whether a first call or a replay filled it, which costs one."""
    idem = Idempotency(store, local_cache=8)
    await idem.run("k", answer)
    proxy.reset_counters()
    assert await idem.run("k", answer) == 42
    assert proxy.round_trips == 0
    other = Idempotency(store, local_cache=8)
    assert await other.run("k", answer) == 42
    assert proxy.round_trips == 1
    assert await other.run("k", answer) == 42
    assert proxy.round_trips == 1


async def test_conflict(store: RedisStore, proxy: Proxy) -> None:
    """A duplicate of a running call is told so after two round trips at most."""
    assert isinstance(await store.claim("k"), Claimed)
    proxy.reset_counters()
    assert isinstance(await store.claim("k"), InProgress)
    assert proxy.round_trips <= 2
    proxy.reset_counters()
    with pytest.raises(InProgressError):
        await Idempotency(store, local_cache=8).run("k", answer)
    assert proxy.round_trips <= 2


@pytest.mark.parametrize("local_cache", [0, 8])
async def test_takeover(store: RedisStore, proxy: Proxy, redis_url: str, local_cache: int) -> None:
    """A takeover costs five round trips at most until the claim is won, and one more for its completion."""
    assert isinstance(await store.claim("k", lease=30, ttl=3600), Claimed)
    async with Redis.from_url(redis_url) as direct:
        await direct.pexpire(KEY, 3_569_000)
    proxy.reset_counters()
    at_start = 0

    async def count() -> int:
        nonlocal at_start
        at_start = proxy.round_trips
        return 42

    assert await Idempotency(store, local_cache=local_cache).run("k", count) == 42
    assert 2 < at_start <= 5
    assert proxy.round_trips == at_start + 1


async def test_store_calls(store: RedisStore, proxy: Proxy) -> None:
    """Each awaited call of the store on its own costs one round trip."""
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    assert proxy.round_trips == 1
    await store.renew(claim)
    assert proxy.round_trips == 2
    await store.complete(claim, "1")
    assert proxy.round_trips == 3
    assert isinstance(await store.claim("k"), Replay)
    assert proxy.round_trips == 4
    assert await store.get("k") is not None
    assert proxy.round_trips == 5
    other = await store.claim("other")
    assert isinstance(other, Claimed)
    await store.release(other)
    assert proxy.round_trips == 7
