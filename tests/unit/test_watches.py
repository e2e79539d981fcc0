"""What a watch knows of its key: an owner in this process, one that is forgotten, a lock, a record that is not ours."""

import asyncio
import gc

import pytest

from asyncidem import Idempotency, InProgressError, StoreError, StoreUnavailableError, WaitTimeoutError

from faulty import FaultyStore, settle, virtual


async def forever() -> str:
    """Return long after every lease of these tests."""
    await asyncio.sleep(1000)
    return "late"


async def second() -> str:
    """Return at once."""
    return "second"


@virtual
async def test_who_waits_too_short_for_an_owner_here_is_told_the_rest_of_its_lease() -> None:
    """The lease of an owner of this process is known without a question to the store."""
    store = FaultyStore.here()
    idem = Idempotency(store, lease=30, renew=False, wait=10)
    owner = asyncio.create_task(idem.run("k", forever))
    await settle()
    with pytest.raises(WaitTimeoutError) as caught:
        await idem.run("k", second)
    assert caught.value.retry_after == pytest.approx(20)
    assert store.counts == {"put_if_absent": 1}
    owner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await owner


@virtual
async def test_an_owner_that_was_forgotten_blocks_nobody_for_longer_than_its_lease() -> None:
    """An operation that was entered and dropped is renewed no more, and those who wait here take over."""
    store = FaultyStore.here()
    idem = Idempotency(store, lease=10, wait=60)
    operation = idem.operation("k")
    await asyncio.create_task(operation.__aenter__())  # in a context of its own, or the waiter would be inside it
    waiter = asyncio.create_task(idem.run("k", second))
    await settle()
    del operation
    gc.collect()
    began = store.clock()
    assert await waiter == "second"
    assert store.clock() - began < 15


@virtual
async def test_the_lease_of_a_key_that_an_owner_here_kept_is_waited_for_exactly() -> None:
    """After a failure with "keep" a waiter takes over when the lease is over, not a poll later."""
    store = FaultyStore.here()
    idem = Idempotency(store, lease=10, renew=False, on_failure="keep", wait=60)

    async def fail() -> str:
        await asyncio.sleep(3)
        raise ValueError

    owner = asyncio.create_task(idem.run("k", fail))
    await settle()
    waiter = asyncio.create_task(idem.run("k", second))
    with pytest.raises(ValueError):
        await owner
    assert await waiter == "second"
    assert store.clock() == pytest.approx(10, abs=0.2)


@virtual
async def test_a_lock_that_a_peer_holds_is_waited_for() -> None:
    """An orphan whose lock is taken counts as in progress: a waiter tries again, and has it when the lock is gone."""
    store = FaultyStore.here()
    claim = await store.claim("k", lease=1)
    await asyncio.sleep(2)
    await store.put_if_absent("k:lock", b"peer", 3000)
    idem = Idempotency(store, wait=60)
    assert await idem.run("k", second) == "second"
    assert store.clock() == pytest.approx(5, abs=1.5)
    assert claim is not None


@virtual
async def test_a_record_that_turns_unreadable_is_an_error_of_all_who_wait() -> None:
    """A record of a newer version is not waited out: whoever waits is told at once."""
    store = FaultyStore.here()
    idem = Idempotency(store, wait=60)
    await store.claim("k", lease=30)
    waiters = [asyncio.create_task(idem.run("k", second)) for _ in range(3)]
    await asyncio.sleep(0.1)
    await store.remove("k", b"", exact=False)
    await store.put_if_absent("k", b'{"owner": "o", "status": "PAUSED"}', 60_000)
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert [type(result) for result in results] == [StoreError] * 3
    assert store.clock() < 2


@virtual
async def test_a_store_that_is_down_fails_all_who_waited_for_its_answer() -> None:
    """Who waited through a whole failing call does not make one of his own after it."""
    store = FaultyStore.here(timeout=5)
    idem = Idempotency(store, wait=60)
    store.fault("put_if_absent", before=5.0, after=StoreUnavailableError("down"), times=None)
    callers = [asyncio.create_task(idem.run("k", second)) for _ in range(10)]
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert {type(result) for result in results} == {StoreUnavailableError}
    assert store.clock() < 6
    assert store.counts["put_if_absent"] == 1
    await store.aclose()


@virtual
async def test_a_key_seen_in_progress_is_not_run_unprotected() -> None:
    """With on_store_error="run" a store that dies while its key was in progress is an error, not a second run."""
    store = FaultyStore.here()
    idem = Idempotency(store, wait=10, on_store_error="run")
    await store.claim("k", lease=300)
    store.fault("read", before=StoreUnavailableError("down"), skip=1, times=None)
    with pytest.raises(StoreUnavailableError, match="in progress when last seen"):
        await idem.run("k", second)


@virtual
async def test_a_waiter_that_is_late_in_the_same_moment_is_not_elected() -> None:
    """A release reaches those who still wait, and not one whose time ran out just before."""
    store = FaultyStore.here()
    idem = Idempotency(store, lease=30)

    async def fail() -> str:
        await asyncio.sleep(5)
        raise ValueError

    owner = asyncio.create_task(idem.run("k", fail))
    await settle()
    late = asyncio.create_task(idem.run("k", second, wait=5))
    patient = asyncio.create_task(idem.run("k", second, wait=50))
    results = await asyncio.gather(owner, late, patient, return_exceptions=True)
    assert isinstance(results[0], ValueError)
    assert results[2] == "second"
    assert results[1] == "second" or isinstance(results[1], InProgressError)


@virtual
async def test_what_was_seen_of_another_payload_is_looked_at_again() -> None:
    """A record that was seen is not held against a newcomer when another one stands there by now."""
    store = FaultyStore.here()
    idem = Idempotency(store, wait=60)
    claim = await store.claim("k", lease=30, fingerprint="another")
    waiter = asyncio.create_task(idem.run("k", second))
    await asyncio.sleep(3)
    await store.release(claim)  # type: ignore[arg-type]
    mine = await store.claim("k", lease=30)
    newcomer = asyncio.create_task(idem.run("k", second, payload=1))
    await settle()
    assert not newcomer.done()
    await store.complete(mine, '"theirs"')  # type: ignore[arg-type]
    assert await asyncio.gather(waiter, newcomer) == ["theirs", "theirs"]
