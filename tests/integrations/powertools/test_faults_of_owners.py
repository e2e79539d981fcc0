"""What Powertools 3.37 does wrong with owners, clocks and times, shown on it, and what asyncidem does instead.

The first half of a test is evidence for what the guide says of that version; the second is the promise.
"""

import time
from typing import Any

import pytest

from asyncidem import (
    Claimed,
    Idempotency,
    InProgress,
    LeaseLostError,
    RedisStore,
    Replay,
)
from asyncidem.testing import FaultyStore

from powertools import KEY, ORDER, Died, Peer, async_handler_of, before, exceptions, handler_of, set_clock

LOCK = f"{KEY}:lock"


async def orphan_of(store: RedisStore, peer: Peer) -> Claimed:
    """Leave an orphan of ours behind: a claim whose lease is over by the time that Redis says it has left."""
    claim = await store.claim(KEY, lease=30, ttl=3_600)
    assert isinstance(claim, Claimed)
    peer.client.pexpire(KEY, 3_600_000 - 31_000)
    return claim


# -- owners that were replaced -----------------------------------------------------------------------------------------


async def test_takeover_by_a_stale_look(store: RedisStore, peer: Peer) -> None:
    """A worker that saw an orphan, and then sleeps while another one takes it over and completes, does not run again."""
    peer.die(ORDER)
    ran, handler = handler_of("second")

    def meanwhile() -> None:
        assert peer.function(handler_of("first")[1])(ORDER) == "first"
        peer.client.delete(LOCK)  # ten seconds later

    before(peer.client, "set", meanwhile, lock=True)
    assert peer.function(handler)(ORDER) == "second"
    assert ran == [ORDER]
    assert peer.record(KEY)["data"] == '"second"'

    peer.client.flushdb()
    await orphan_of(store, peer)
    other = FaultyStore(store)

    async def take_over() -> None:
        claim = await store.claim(KEY)
        assert isinstance(claim, Claimed)
        await store.complete(claim, '"first"')
        peer.client.delete(LOCK)

    fault = other.fault("put_if_absent", before=take_over, when=lambda key, _: key == LOCK)
    replay = await other.claim(KEY)
    assert fault.reached.is_set()
    assert isinstance(replay, Replay)
    assert replay.record.data == '"first"'


async def test_takeover_by_a_stale_look_under_the_lock(store: RedisStore, peer: Peer) -> None:
    """Nor does one that sleeps behind its last look, with a lock that has ended meanwhile."""
    await orphan_of(store, peer)
    other = FaultyStore(store)

    async def take_over() -> None:
        peer.client.delete(LOCK)
        claim = await store.claim(KEY)
        assert isinstance(claim, Claimed)
        await store.complete(claim, '"first"')

    fault = other.fault("swap", before=take_over)
    replay = await other.claim(KEY)
    assert fault.reached.is_set()
    assert isinstance(replay, Replay)
    assert replay.record.data == '"first"'


async def test_completion_of_a_zombie(store: RedisStore, peer: Peer) -> None:
    """An owner that was replaced does not overwrite its successor's result."""

    def zombie(order: Any) -> str:
        assert peer.function(handler_of("successor")[1])(order) == "successor"
        return "zombie"

    assert peer.function(zombie, remaining_ms=-2_000)(ORDER) == "zombie"
    assert peer.record(KEY)["data"] == '"zombie"'

    peer.client.flushdb()
    claim = await orphan_of(store, peer)
    assert await Idempotency(store).run(KEY, async_handler_of("successor")[1], ORDER) == "successor"
    with pytest.raises(LeaseLostError):
        await store.complete(claim, '"zombie"')
    assert peer.record(KEY)["data"] == '"successor"'


async def test_exception_of_a_zombie(store: RedisStore, peer: Peer) -> None:
    """An owner that was replaced, and fails, does not delete its successor's record."""

    def zombie(order: Any) -> None:
        assert peer.function(handler_of("successor")[1])(order) == "successor"
        raise ValueError("zombie")

    with pytest.raises(ValueError, match="zombie"):
        peer.function(zombie, remaining_ms=-2_000)(ORDER)
    assert not peer.client.exists(KEY)

    peer.client.flushdb()
    claim = await orphan_of(store, peer)
    assert await Idempotency(store).run(KEY, async_handler_of("successor")[1], ORDER) == "successor"
    await store.release(claim)
    assert peer.record(KEY)["data"] == '"successor"'


# -- clocks and times --------------------------------------------------------------------------------------------------


async def test_a_clock_that_is_ahead(
    store: RedisStore, redis_url: str, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose clock is ahead takes no lease that still runs, and runs nothing again that was completed."""
    stolen, steal = handler_of("thief")

    def owner(order: Any) -> str:
        with monkeypatch.context() as patch:
            set_clock(patch, 5)
            assert peer.function(steal)(order) == "thief"
        return "owner"

    peer.function(owner, remaining_ms=3_000)(ORDER)
    assert stolen == [ORDER]
    peer.client.flushdb()
    again, handler = handler_of("again")
    peer.function(handler, expires_after_seconds=60)(ORDER)
    with monkeypatch.context() as patch:
        set_clock(patch, 62)
        peer.function(handler, expires_after_seconds=60)(ORDER)
    assert again == [ORDER, ORDER]

    peer.client.flushdb()
    ahead = [time.time() + 5]
    async with RedisStore.from_url(redis_url, prefix="", wall=lambda: ahead[0]) as other:
        claim = await store.claim(KEY, lease=3, ttl=60)
        assert isinstance(claim, Claimed)
        assert isinstance(await other.claim(KEY), InProgress)
        await store.complete(claim, "1")
        ahead[0] += 57
        assert isinstance(await other.claim(KEY), Replay)


async def test_the_lock_of_a_takeover(store: RedisStore, peer: Peer) -> None:
    """A takeover that fails in its turn blocks nobody for ten seconds: its lock lives no longer than its lease."""
    peer.die(ORDER)
    peer.die(ORDER, expires_after_seconds=2)  # takes over, and dies
    assert 5_000 < peer.client.pttl(LOCK) <= 10_000
    with pytest.raises(exceptions.IdempotencyInconsistentStateError):
        peer.function(handler_of("retry")[1])(ORDER)

    peer.client.flushdb()
    await orphan_of(store, peer)
    claim = await store.claim(KEY, lease=2)
    assert isinstance(claim, Claimed)
    assert 0 < peer.client.pttl(LOCK) <= 2_000
    await store.release(claim)
    retry = await store.claim(KEY, lease=2)
    assert isinstance(retry, Claimed)
    assert retry.attempt == 2


async def test_a_ttl_below_a_second(idem: Idempotency, peer: Peer) -> None:
    """A ttl under a second is a second, not an error."""
    with pytest.raises(exceptions.IdempotencyPersistenceLayerError, match="invalid expire time"):
        peer.function(handler_of("result")[1], expires_after_seconds=0)(ORDER)

    assert await idem.run(KEY, async_handler_of("result")[1], ORDER, ttl=0.01) == "result"
    assert 500 < peer.client.pttl(KEY) <= 1_000


async def test_another_name_of_the_expiry(redis_url: str, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expiry under another name is read, not only written: an orphan's age is reckoned from it."""
    ran, handler = handler_of("result")
    named = peer.layer(expiry_attr="expires")
    for layer in (peer.layer(), named):
        peer.client.flushdb()
        peer.function(handler, layer=layer)(ORDER)
        with monkeypatch.context() as patch:
            set_clock(patch, 3_602)
            peer.function(handler, layer=layer)(ORDER)
    assert len(ran) == 3  # expired and run again under the first name, never under the second

    peer.client.flushdb()
    peer.die(ORDER, layer=named, expires_after_seconds=60)
    assert "expiration" not in peer.record(KEY)
    async with RedisStore.from_url(redis_url, prefix="", expiry_attr="expires") as store:
        claim = await store.claim(KEY)
        assert isinstance(claim, Claimed)
        assert claim.attempt == 2
        peer.client.delete(KEY)
        running = peer.layer(expiry_attr="expires")
        with pytest.raises(Died):
            peer.function(_dies, layer=running, remaining_ms=20_000)(ORDER)
        outcome = await store.claim(KEY)
        assert isinstance(outcome, InProgress)
        assert 15 < outcome.retry_after <= 21


def _dies(order: Any) -> None:
    raise Died
