"""A server that may evict records is warned of once: what it evicts runs again."""

import asyncio
import logging
from collections.abc import Callable, Iterator

import pytest

from asyncidem import Claimed, RedisStore

from conftest import StoreFactory
from servers import Cluster, Server

Settings = Callable[[str, str], None]


@pytest.fixture
def settings(redis_url: str, server: Server) -> Iterator[Settings]:
    """Sets `maxmemory` and `maxmemory-policy` of the shared server, for one test."""

    def set_both(limit: str, policy: str) -> None:
        assert server.command("CONFIG", "SET", "maxmemory", limit) == "+OK"
        assert server.command("CONFIG", "SET", "maxmemory-policy", policy) == "+OK"

    yield set_both
    set_both("0", "noeviction")


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return the warnings of the package."""
    return [record for record in caplog.records if record.name == "asyncidem" and record.levelno == logging.WARNING]


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
@pytest.mark.parametrize("protocol", [2, 3])
async def test_eviction(
    settings: Settings,
    redis_url: str,
    store_at: StoreFactory,
    caplog: pytest.LogCaptureFixture,
    policy: str,
    protocol: int,
) -> None:
    """A policy that may evict is named in one log line, at the first claim, won or not."""
    settings("100mb", policy)
    for turn in range(2):
        async with store_at(redis_url, protocol=protocol) as store:
            await store.get("nothing")
            assert len(warnings_in(caplog)) == turn
            for key in ("k", "k", f"k{turn}"):
                await store.claim(key)
        assert len(warnings_in(caplog)) == turn + 1
    assert f"eviction_possible: the server's maxmemory-policy is {policy};" in warnings_in(caplog)[0].getMessage()
    assert vars(warnings_in(caplog)[0])["maxmemory_policy"] == policy


@pytest.mark.parametrize(("limit", "policy"), [("0", "allkeys-lru"), ("100mb", "noeviction"), ("0", "noeviction")])
async def test_no_eviction(
    settings: Settings,
    redis_url: str,
    store_at: StoreFactory,
    caplog: pytest.LogCaptureFixture,
    limit: str,
    policy: str,
) -> None:
    """Nothing is said where nothing can be evicted: by `noeviction`, or without a limit."""
    settings(limit, policy)
    async with store_at(redis_url) as store:
        assert isinstance(await store.claim("k"), Claimed)
    assert not warnings_in(caplog)


async def test_user_who_may_not_ask(
    settings: Settings, redis_url: str, server: Server, store_at: StoreFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is said, and nothing fails, where the user may not ask."""
    settings("100mb", "allkeys-lru")
    server.command("ACL", "SETUSER", "worker", "reset", "on", ">secret", "~*", "+@all", "-info")
    async with store_at(redis_url, username="worker", password="secret") as store:
        assert isinstance(await store.claim("k"), Claimed)
        assert not isinstance(await store.claim("k"), Claimed)
    assert not warnings_in(caplog)


async def test_first_claims_at_once(
    settings: Settings, redis_url: str, store_at: StoreFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """Of several first claims at once, one warns."""
    settings("100mb", "allkeys-lru")
    async with store_at(redis_url) as store:
        claims = await asyncio.gather(*(store.claim(str(number)) for number in range(5)))
    assert all(isinstance(claim, Claimed) for claim in claims)
    assert len(warnings_in(caplog)) == 1


async def test_after_other_calls(
    settings: Settings, redis_url: str, store_at: StoreFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the first claim that asks, whatever the store was used for before it."""
    settings("100mb", "allkeys-lru")
    async with store_at(redis_url) as store, RedisStore.from_url(redis_url) as other:
        claim = await other.claim("k")
        assert isinstance(claim, Claimed)
        caplog.clear()
        await store.release(claim)
        await store.complete(await _claimed(other, "k2"), "1")
        assert not warnings_in(caplog)
        assert isinstance(await store.claim("k"), Claimed)
    assert len(warnings_in(caplog)) == 1


async def _claimed(store: RedisStore, key: str) -> Claimed:
    claim = await store.claim(key)
    assert isinstance(claim, Claimed)
    return claim


async def test_cluster(cluster: Cluster, store_at: StoreFactory, caplog: pytest.LogCaptureFixture) -> None:
    """On a cluster it is the node of the first claim that is asked, and it is asked once."""
    cluster.reset()
    for node in cluster.masters:
        node.command("CONFIG", "SET", "maxmemory", "100mb")
        node.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lfu")
    try:
        async with store_at(cluster.url, cluster=True) as store:
            for number in range(12):
                assert isinstance(await store.claim(str(number)), Claimed)
    finally:
        for node in cluster.masters:
            node.command("CONFIG", "SET", "maxmemory", "0")
            node.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert len(warnings_in(caplog)) == 1
