"""What a watch knows of its key: an owner in this process, one that is forgotten, a lock, a record that is not ours."""

import asyncio
import gc
from typing import Any

import pytest

from asyncidem import (
    FingerprintMismatchError,
    Idempotency,
    InProgressError,
    StoreError,
    StoreUnavailableError,
    WaitTimeoutError,
    current_operation,
)
from asyncidem.waiting import Watch

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
    assert caught.value.retry_after == pytest.approx(20, abs=0.002)
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
    idem = Idempotency(store, lease=40, renew=False, on_failure="keep", wait=60)

    async def fail() -> str:
        await asyncio.sleep(39.5)
        raise ValueError

    owner = asyncio.create_task(idem.run("k", fail))
    await settle()
    waiter = asyncio.create_task(idem.run("k", second))
    with pytest.raises(ValueError):
        await owner
    assert await waiter == "second"
    assert store.clock() == pytest.approx(40, abs=0.01)


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
async def test_an_end_and_a_time_out_in_one_moment_harm_nobody() -> None:
    """Whether the release or the other's time-out comes first, the patient waiter gets its result."""
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


@virtual
async def test_who_calls_in_the_moment_of_the_end_is_answered_at_once() -> None:
    """The owner's own next call, made before its waiters have run, does not wait for a poll that nobody makes."""
    store = FaultyStore.here(turns=1)
    idem = Idempotency(store, wait=0.5)

    async def handler() -> str:
        await asyncio.sleep(0.1)
        return "done"

    async def owner() -> list[str]:
        return [await idem.run("k", handler), await idem.run("k", handler)]

    task = asyncio.create_task(owner())
    await asyncio.sleep(0.05)
    assert await idem.run("k", handler) == "done"
    assert await task == ["done", "done"]
    assert store.clock() == pytest.approx(0.1)


@virtual
async def test_waiters_of_an_owner_elsewhere_may_call_again_at_once() -> None:
    """Each of several waiters that learned of a completion gets it again from the store, without a wait."""
    store = FaultyStore.here(turns=1)
    idem = Idempotency(store, wait=60)
    claim = await store.claim("k", lease=100)

    async def twice() -> list[str]:
        return [await idem.run("k", second), await idem.run("k", second, wait=0.5)]

    waiters = [asyncio.create_task(twice()) for _ in range(3)]
    await asyncio.sleep(9)
    await store.complete(claim, '"done"')  # type: ignore[arg-type]
    assert await asyncio.gather(*waiters) == [["done", "done"]] * 3


@virtual
async def test_a_store_that_is_closed_runs_nothing_unprotected() -> None:
    """Who waits for an owner of this process when the store is closed gets an error, also with on_store_error="run"."""
    store = FaultyStore.here()
    idem = Idempotency(store, wait=60, on_store_error="run")
    runs: list[str] = []

    async def handler() -> str:
        runs.append("ran")
        await asyncio.sleep(5)
        return "done"

    callers = [asyncio.create_task(idem.run("k", handler)) for _ in range(5)]
    await asyncio.sleep(1)
    await store.aclose()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert runs == ["ran"]
    assert results[0] == "done"
    assert {type(result).__mro__[1] for result in results[1:]} == {StoreUnavailableError}
    assert len({id(result) for result in results[1:]}) == 4, "each waiter raises an error of its own"


@virtual
async def test_a_failure_that_has_passed_is_not_held_against_the_store() -> None:
    """A poll that failed before the store answered again does not turn a late waiter's time-out into an outage."""
    store = FaultyStore.here()
    idem = Idempotency(store)

    async def fail() -> str:
        await asyncio.sleep(1)
        raise ValueError

    async def handler() -> str:
        await asyncio.sleep(20)
        return "done"

    owner = asyncio.create_task(idem.run("k", fail))
    await settle()
    store.fault("read", before=StoreUnavailableError("down"), skip=1, times=None)
    waiters = [asyncio.create_task(idem.run("k", handler, wait=wait)) for wait in (60, 10)]
    results = await asyncio.gather(owner, *waiters, return_exceptions=True)
    assert isinstance(results[0], ValueError)
    assert results[1] == "done"
    assert isinstance(results[2], WaitTimeoutError)


@virtual
async def test_a_look_under_way_elects_nobody_beside_an_owner_here() -> None:
    """A look at the store that saw the key free, and comes back after a task here has claimed it, is no news."""
    store = FaultyStore.here()
    idem = Idempotency(store, wait=60)
    claim = await store.claim("k", lease=30, fingerprint="another")

    async def handler() -> str:
        await asyncio.sleep(10)
        return "done"

    waiters = [asyncio.create_task(idem.run("k", handler)) for _ in range(3)]
    await asyncio.sleep(3)
    await store.release(claim)  # type: ignore[arg-type]
    store.fault("read", after=3.0)
    newcomer = asyncio.create_task(idem.run("k", handler, payload=1))
    assert await asyncio.gather(*waiters, newcomer) == ["done"] * 4
    assert store.counts["put_if_absent"] == 3, "the owner's, the first waiter's in vain, and one after the release"


@virtual
async def test_polls_belong_to_no_caller() -> None:
    """What a store does on behalf of all who wait does not run inside the operation of one of them."""
    seen: list[object] = []
    store = FaultyStore.here()
    store.fault("read", before=lambda: seen.append(current_operation()), skip=2, times=3)
    idem = Idempotency(store)
    claim = await store.claim("k", lease=30)
    async with idem.operation("outer"):
        waiter = asyncio.create_task(idem.run("k", second, wait=60))
        await asyncio.sleep(1)
        await store.complete(claim, '"done"')  # type: ignore[arg-type]
        assert await waiter == "done"
    assert seen == [None] * 3


@virtual
async def test_another_payload_than_that_of_a_call_elsewhere_is_refused_at_once() -> None:
    """A caller that would wait is told of the mismatch by its own claim, and leaves no watch behind."""
    store = FaultyStore.here()
    idem = Idempotency(store, wait=60)
    await store.claim("k", lease=30, fingerprint="another")
    for _ in range(2):
        with pytest.raises(FingerprintMismatchError):
            await idem.run("k", second, payload=1)
    assert store.clock() == 0
    assert store.counts == {"put_if_absent": 3}


async def test_a_timer_that_fires_after_the_answer_changes_nothing() -> None:
    """A waiter that was elected and has not run yet is not late."""
    loop = asyncio.get_running_loop()
    watch = Watch("k", loop)
    waiter: asyncio.Future[Any] = loop.create_future()
    group = watch.join(waiter, None, loop.time(), 10)
    watch.elect()
    answer = waiter.result()
    assert group.timer is not None
    group.timer.cancel()
    watch._late(group, loop.time() + 10)
    assert waiter.result() is answer
    assert watch.groups == {}


async def test_the_one_who_waits_longest_is_elected() -> None:
    """Whatever the patience of those who wait is, and whoever has given up."""
    loop = asyncio.get_running_loop()
    watch = Watch("k", loop)
    gone, longest, later = (loop.create_future() for _ in range(3))
    groups = [watch.join(gone, None, 0, 50), watch.join(longest, None, 1, 90), watch.join(later, None, 2, 50)]
    gone.cancel()
    watch.elect()
    assert (longest.done(), later.done()) == (True, False)
    for waiter, group in zip((gone, longest, later), groups, strict=True):
        watch.leave(waiter, group)
    assert all(group.timer is None for group in groups)


@virtual
async def test_the_time_of_a_claim_is_part_of_the_wait() -> None:
    """Who claims first, and slowly, does not wait longer for it."""
    store = FaultyStore.here()
    idem = Idempotency(store, wait=5)
    await store.claim("k", lease=60)
    store.fault("put_if_absent", after=2.0)
    with pytest.raises(WaitTimeoutError):
        await idem.run("k", second)
    assert store.clock() == pytest.approx(5)


@virtual
async def test_the_block_of_a_replay_is_inside_of_its_operation() -> None:
    """Code further down sees the replay as its operation, and nothing after the block."""
    idem = Idempotency(FaultyStore.here())
    await idem.run("k", second)
    async with idem.operation("k") as op:
        assert current_operation() is op
        assert op.replayed
    assert current_operation() is None
