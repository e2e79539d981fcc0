"""One Redis with functions under Powertools: orphans of either side, zombies, other names, clusters and crowds."""

import asyncio
import time
from collections import Counter
from typing import Any

import pytest

from asyncidem import Claimed, FingerprintMismatchError, Idempotency, InProgress, LeaseLostError, RedisStore, Replay
from asyncidem.testing import FaultyStore

from powertools import ATTRIBUTES, KEY, ORDER, TAMPERED, Peer, before, connect, exceptions, handler_of, key_of, mark_of
from servers import Cluster


async def test_they_take_our_orphan_over(earlier: RedisStore, peer: Peer) -> None:
    """Powertools runs what a dead owner of ours left; if that owner lives after all, it is told, and changes nothing."""
    claim = await earlier.claim(KEY)
    assert isinstance(claim, Claimed)
    ran, handler = handler_of("theirs")
    assert peer.function(handler)(ORDER) == "theirs"
    assert ran == [ORDER]
    assert peer.client.get(f"{KEY}:lock") == "True"
    with pytest.raises(LeaseLostError, match="no record of ours"):
        await earlier.complete(claim, '"ours"')
    assert peer.record(KEY)["data"] == '"theirs"'


async def test_we_take_their_orphan_over(store: RedisStore, peer: Peer) -> None:
    """What a dead Lambda left is run by asyncidem, as the second attempt, and holds the lock that Powertools asks for."""
    peer.die(ORDER)
    claim = await store.claim(KEY)
    assert isinstance(claim, Claimed)
    assert claim.attempt == 2
    assert peer.client.get(f"{KEY}:lock") == claim.owner
    assert 5_000 < peer.client.pttl(f"{KEY}:lock") <= 10_000
    await store.complete(claim, '"ours"')
    assert peer.function(handler_of("theirs")[1])(ORDER) == "ours"


async def test_a_released_takeover_is_theirs(store: RedisStore, peer: Peer) -> None:
    """What asyncidem took over and released is an orphan that Powertools may take at once, without waiting for a lock."""
    peer.die(ORDER)
    claim = await store.claim(KEY)
    assert isinstance(claim, Claimed)
    await store.release(claim)
    ran, handler = handler_of("theirs")
    assert peer.function(handler)(ORDER) == "theirs"
    assert ran == [ORDER]


async def test_a_deleted_claim_is_theirs(store: RedisStore, peer: Peer) -> None:
    """A claim of ours that an operator deletes is an orphan that Powertools may take at once."""
    claim = await store.claim(KEY)
    assert isinstance(claim, Claimed)
    assert await store.delete(KEY)
    assert peer.function(handler_of("theirs")[1])(ORDER) == "theirs"
    with pytest.raises(LeaseLostError):
        await store.renew(claim)


async def test_their_late_takeover_meets_our_lock(store: RedisStore, peer: Peer) -> None:
    """A peer that saw an orphan before asyncidem took it over does not write: it has no lock."""
    peer.die(ORDER)
    claims: list[Any] = []
    loop = asyncio.get_running_loop()
    before(
        peer.client,
        "set",
        lambda: claims.append(asyncio.run_coroutine_threadsafe(store.claim(KEY), loop).result(10)),
        lock=True,
    )
    ran, handler = handler_of("theirs")
    with pytest.raises(exceptions.IdempotencyAlreadyInProgressError):
        await asyncio.to_thread(peer.function(handler), ORDER)
    assert ran == []
    await store.complete(claims[0], '"ours"')
    assert peer.function(handler)(ORDER) == "ours"


async def test_our_late_takeover_meets_their_lock(store: RedisStore, peer: Peer) -> None:
    """Where Powertools takes an orphan over between our look and our lock, it is in progress, and nothing is written."""
    peer.die(ORDER)
    faulty = FaultyStore(store)
    # In the middle of a takeover: it holds the lock and has not written yet.
    is_lock = lambda key, _: key.endswith(":lock")
    taken = faulty.fault(
        "put_if_absent", before=lambda: peer.client.set(f"{KEY}:lock", "True", ex=10, nx=True), when=is_lock
    )
    orphan = peer.record(KEY)
    assert isinstance(await faulty.claim(KEY), InProgress)
    assert taken.reached.is_set()
    assert peer.record(KEY) == orphan
    assert peer.client.get(f"{KEY}:lock") == "True"


async def test_our_takeover_under_a_stale_look(store: RedisStore, peer: Peer) -> None:
    """Where Powertools took over and completed after our first look, its result is replayed under our own lock."""
    peer.die(ORDER)
    faulty = FaultyStore(store)

    def take_over() -> None:
        peer.function(handler_of("theirs")[1])(ORDER)
        peer.client.delete(f"{KEY}:lock")  # ten seconds later

    faulty.fault("put_if_absent", before=take_over, when=lambda key, _: key.endswith(":lock"))
    replay = await faulty.claim(KEY)
    assert isinstance(replay, Replay)
    assert replay.record.data == '"theirs"'
    assert not peer.client.exists(f"{KEY}:lock")


async def test_a_blind_write_is_detected(idem: Idempotency, peer: Peer) -> None:
    """An owner of ours whose record a zombie of Powertools overwrote gets `LeaseLostError`, with its result."""
    loop = asyncio.get_running_loop()

    async def ours(order: Any) -> str:
        inside.set()
        await overwritten.wait()
        return "ours"

    inside, overwritten = asyncio.Event(), asyncio.Event()

    def zombie(order: Any) -> str:
        async def take_over() -> asyncio.Task[str]:
            task = asyncio.create_task(idem.run(KEY, ours, ORDER))
            await inside.wait()
            return task

        running.append(asyncio.run_coroutine_threadsafe(take_over(), loop).result(10))
        return "zombie"

    running: list[asyncio.Task[str]] = []
    assert await asyncio.to_thread(peer.function(zombie, remaining_ms=-2_000), ORDER) == "zombie"
    overwritten.set()
    with pytest.raises(LeaseLostError) as lost:
        await running[0]
    assert lost.value.result == "ours"
    assert peer.record(KEY)["data"] == '"zombie"'


# -- other names, clusters, crowds -------------------------------------------------------------------------------------


async def test_other_attribute_names(redis_url: str, peer: Peer) -> None:
    """Records with attributes of other names are replayed, refused, validated and taken over, both ways."""
    ran, handler = handler_of("theirs")
    theirs = peer.function(handler, layer=peer.layer(**ATTRIBUTES), payload_validation_jmespath="amount")
    wall = [time.time()]
    async with RedisStore.from_url(redis_url, prefix="", wall=lambda: wall[0], **ATTRIBUTES) as store:
        idem = Idempotency(store, ttl=3_600)

        async def ours(order: Any) -> str:
            assert set(peer.record(KEY)) >= set("seiv")
            with pytest.raises(exceptions.IdempotencyAlreadyInProgressError):
                theirs(ORDER)
            return "ours"

        assert await idem.run(KEY, ours, ORDER, payload=mark_of(ORDER)) == "ours"
        assert theirs(ORDER) == "ours"
        with pytest.raises(exceptions.IdempotencyValidationError):
            theirs(TAMPERED)
        assert ran == []

        peer.client.flushdb()
        peer.die(ORDER, layer=peer.layer(**ATTRIBUTES), payload_validation_jmespath="amount")
        with pytest.raises(FingerprintMismatchError):
            await idem.run(KEY, ours, TAMPERED, payload=mark_of(TAMPERED))
        assert await idem.run(KEY, ours, ORDER, payload=mark_of(ORDER)) == "ours"

        peer.client.flushdb()
        assert theirs(ORDER) == "theirs"
        assert set(peer.record(KEY)) == set("dse")
        assert await idem.run(KEY, ours, ORDER, payload=mark_of(ORDER)) == "theirs"

        peer.client.flushdb()
        wall[0] -= 60
        assert isinstance(await store.claim(KEY), Claimed)
        assert peer.function(handler, layer=peer.layer(**ATTRIBUTES))(ORDER) == "theirs"


async def test_on_a_cluster(cluster: Cluster) -> None:
    """On a cluster both sides take each other's orphans over, though the lock lies in another slot than the key."""
    cluster.reset()
    client = connect(cluster.url, cluster=True)
    peer = Peer(client)
    try:
        wall = [time.time()]
        async with RedisStore.from_url(cluster.url, cluster=True, prefix="", wall=lambda: wall[0]) as store:
            peer.die(ORDER)
            claim = await store.claim(KEY)
            assert isinstance(claim, Claimed)
            assert peer.client.get(f"{KEY}:lock") == claim.owner
            await store.complete(claim, '"ours"')
            theirs = peer.function(handler_of("theirs")[1])
            assert theirs(ORDER) == "ours"

            assert await store.delete(KEY)
            client.delete(f"{KEY}:lock")
            wall[0] -= 60
            assert isinstance(await store.claim(KEY), Claimed)
            assert theirs(ORDER) == "theirs"
            replay = await store.claim(KEY)
            assert isinstance(replay, Replay)
            assert replay.record.data == '"theirs"'
    finally:
        client.close()


async def test_a_crowd_of_both(idem: Idempotency, peer: Peer) -> None:
    """Of threads under Powertools and tasks of asyncidem that all want the same keys, one runs for each key."""
    effects: Counter[str] = Counter()
    orders = [{"order_id": str(number)} for number in range(20)]

    def handler(order: Any) -> str:
        effects[order["order_id"]] += 1
        time.sleep(0.002)  # for others to come in between
        return f"r-{order['order_id']}"

    async def ours(order: Any) -> str:
        effects[order["order_id"]] += 1
        await asyncio.sleep(0.002)
        return f"r-{order['order_id']}"

    def there(order: Any) -> Any:
        try:
            return peer.function(handler)(order)
        except exceptions.IdempotencyAlreadyInProgressError:
            return None

    async def here(order: Any) -> Any:
        key = key_of(order)
        return await idem.run(key, ours, order, wait=20)

    calls = [call for order in orders for call in (asyncio.to_thread(there, order), here(order))]
    calls += [call for order in orders for call in (here(order), asyncio.to_thread(there, order))]
    answers = await asyncio.gather(*calls)
    assert effects == {order["order_id"]: 1 for order in orders}
    assert set(answers) <= {None, *(f"r-{order['order_id']}" for order in orders)}
