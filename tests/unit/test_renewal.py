"""Leases that are renewed while their handler runs, and never after it."""

import asyncio
import gc
from collections import Counter
from typing import Any

import pytest

import asyncidem.testing
from asyncidem import (
    Claimed,
    Event,
    Idempotency,
    InProgressError,
    LeaseLostError,
    MemoryStore,
    State,
    StoreError,
    StoreUnavailableError,
    current_operation,
)
from asyncidem.renewal import SLICE, Renewer

from faulty import FaultyStore, down, settle, virtual


def times(store: FaultyStore, primitive: str = "swap") -> list[float]:
    """Return when a primitive was called, on the virtual clock."""
    return [pytest.approx(at, abs=0.002) for name, _, at in store.calls if name == primitive]


async def claimed(store: FaultyStore, key: str = "k", **options: Any) -> Claimed:
    """Claim a key that is free."""
    claim = await store.claim(key, **options)
    assert isinstance(claim, Claimed)
    return claim


def sleeper(seconds: float) -> Any:
    """Return a handler that sleeps, and returns its attempt."""

    async def handler() -> int:
        op = current_operation()
        assert op is not None
        await asyncio.sleep(seconds)
        return op.attempt

    return handler


@pytest.mark.parametrize("turns", [0, 2])
@virtual
async def test_a_handler_of_many_leases_stays_alone(turns: int) -> None:
    """It is renewed at each third of its lease, so that no other caller gets the key, however long it runs."""
    store = FaultyStore.here(turns=turns)
    events: list[Event] = []
    idem = Idempotency(store, lease=3, hooks=[events.append])
    other = Idempotency(store, lease=3)
    running = asyncio.create_task(idem.run("k", sleeper(30.5)))
    for _ in range(30):
        await asyncio.sleep(1)
        with pytest.raises(InProgressError) as caught:
            await other.run("k", sleeper(0))
        assert 1.9 < caught.value.retry_after <= 3
    assert await running == 1
    assert times(store) == [*range(1, 31), 30.5]
    assert [event.name for event in events] == ["claimed", *["renewed"] * 30, "completed"]
    assert await other.run("k", sleeper(0)) == 1


@virtual
async def test_a_third_of_the_lease_is_the_rhythm_of_each() -> None:
    """Claims of different leases are renewed at their own thirds, each counted from its own claim."""
    store = FaultyStore.here()
    idem = Idempotency(store)
    tasks = [asyncio.create_task(idem.run("slow", sleeper(10), lease=12))]
    await asyncio.sleep(0.5)
    tasks.append(asyncio.create_task(idem.run("quick", sleeper(5), lease=6)))
    await asyncio.sleep(0.25)
    tasks.append(asyncio.create_task(idem.run("twin", sleeper(5), lease=6)))
    await asyncio.gather(*tasks)
    renewed = {
        key: [at for name, k, at in store.calls if name == "swap" and k == key] for key in ("slow", "quick", "twin")
    }
    assert renewed == {
        "slow": [pytest.approx(at) for at in (4, 8, 10)],
        "quick": [pytest.approx(at) for at in (2.5, 4.5, 5.5)],
        "twin": [pytest.approx(at) for at in (2.75, 4.75, 5.75)],
    }


@virtual
async def test_one_timer_serves_all_leases() -> None:
    """A thousand operations cost no timer, and no task, of their own."""
    loop: Any = asyncio.get_running_loop()
    store = FaultyStore.here()
    idem, go = Idempotency(store, lease=30), asyncio.Event()

    async def handler() -> None:
        await go.wait()

    tasks = [asyncio.create_task(idem.run(f"k{n}", handler, lease=30 + n % 3)) for n in range(1000)]
    await settle()
    assert len([timer for timer in loop._scheduled if not timer.cancelled()]) == 1
    assert len(asyncio.all_tasks()) == 1001
    await asyncio.sleep(10.5)
    assert store.counts["swap"] == 1000 - 333
    go.set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("ending", ["result", "failure", "keep", "cancelled", "unrenewed"])
@virtual
async def test_nothing_is_renewed_after_the_end(ending: str) -> None:
    """However an operation ends, its lease is not renewed any more; with `renew=False` it never is."""
    store = FaultyStore.here()
    idem = Idempotency(
        store, lease=3, renew=ending != "unrenewed", on_failure="keep" if ending == "keep" else "release"
    )

    async def handler() -> None:
        await asyncio.sleep(1.5)
        if ending in ("failure", "keep"):
            raise ValueError

    task = asyncio.create_task(idem.run("k", handler))
    await asyncio.sleep(1.2)
    if ending == "cancelled":
        task.cancel()
    await asyncio.wait([task])
    calls = store.counts.total()
    await asyncio.sleep(20)
    assert store.counts.total() == calls
    assert store.counts["swap"] == {"result": 2, "unrenewed": 1}.get(ending, 1)
    assert task.cancelled() or isinstance(task.exception(), ValueError | None)


@pytest.mark.parametrize("outcome", [None, down()])
@virtual
async def test_a_renewal_in_flight_at_the_end_is_the_last(outcome: Exception | None) -> None:
    """A key that is kept after a failure is over one lease after the renewal that was under way, at the latest."""
    store = FaultyStore.here()
    idem = Idempotency(store, lease=3, on_failure="keep")
    flying = store.fault("swap", before=1.0, after=outcome)

    op = idem.operation("k")
    with pytest.raises(ValueError):
        async with op:
            await flying.reached.wait()
            raise ValueError
    await asyncio.sleep(1 + 3)
    assert times(store) == [1]
    assert op.attempt == 1  # whoever holds on to the operation keeps nothing alive
    assert await idem.run("k", sleeper(0)) == 2


@virtual
async def test_without_renewal_another_takes_over() -> None:
    """With `renew=False` the lease ends while the handler runs: its caller is told of it at the end."""
    store = FaultyStore.here()
    idem = Idempotency(store, lease=3, renew=False)
    running = asyncio.create_task(idem.run("k", sleeper(4)))
    await asyncio.sleep(3)
    assert await idem.run("k", sleeper(0)) == 2
    with pytest.raises(LeaseLostError) as caught:
        await running
    assert caught.value.result == 1


@virtual
async def test_a_failed_renewal_is_retried_sooner() -> None:
    """While the store does not answer, it is asked at each twelfth of the lease; then the rhythm is the usual one."""
    store = FaultyStore.here()
    events: list[str] = []
    idem = Idempotency(store, lease=12, hooks=[lambda event: events.append(event.name)])
    store.fault("swap", before=down(), times=2)
    store.fault("swap", before=StoreError("refused"))
    store.fault("swap", after=OSError("reset"))
    assert await idem.run("k", sleeper(14)) == 1
    assert times(store) == [4, 5, 6, 7, 8, 12, 14]
    assert events == ["claimed", "renewed", "renewed", "completed"]


@virtual
async def test_a_lease_that_was_lost_is_lost_at_the_next_renewal() -> None:
    """The handler is cancelled there and then; nothing is renewed after it, and the successor stays alone."""
    loop = asyncio.get_running_loop()
    store = FaultyStore.here(turns=1)
    idem = Idempotency(store, lease=3)
    running = asyncio.create_task(idem.run("k", sleeper(100)))
    await asyncio.sleep(1.5)
    await store.delete("k")
    successor = await claimed(store, lease=60)
    with pytest.raises(LeaseLostError):
        await running
    assert loop.time() == 2
    calls = store.counts.total()
    await asyncio.sleep(10)
    assert store.counts.total() == calls
    record = await store.get("k")
    assert record is not None
    assert record.owner == successor.owner


@virtual
async def test_a_loss_that_is_learnt_after_the_end_cancels_nobody() -> None:
    """A renewal that was in flight when the handler returned must not cancel what its task does next."""
    store = FaultyStore.here()
    events: list[str] = []
    idem = Idempotency(store, lease=3, hooks=[lambda event: events.append(event.name)])

    async def lose() -> None:
        await store.delete("k")
        await claimed(store)
        await store.fault("swap", before=2.0).reached.wait()

    with pytest.raises(LeaseLostError):
        await idem.run("k", lose)
    task = asyncio.current_task()
    assert task is not None
    await asyncio.sleep(10)
    assert (task.cancelling(), events) == (0, ["claimed", "lease_lost"])


@virtual
async def test_aclose_stops_renewing() -> None:
    """Closing the store leaves neither a timer nor a renewal in flight behind."""
    loop: Any = asyncio.get_running_loop()
    store = FaultyStore.here()
    idem = Idempotency(store, lease=3)
    running = [asyncio.create_task(idem.run(key, sleeper(7))) for key in ("a", "b")]
    stuck = store.fault("swap", before=asyncio.Event().wait, times=2)
    await stuck.reached.wait()
    await settle()
    assert len(asyncio.all_tasks()) == 5
    await store.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task(), *running}
    assert len([timer for timer in loop._scheduled if not timer.cancelled()]) == 2  # the handlers'
    calls = store.counts.total()
    await asyncio.sleep(5)
    assert store.counts.total() == calls
    await asyncio.gather(*running)


@virtual
async def test_aclose_before_the_first_renewal() -> None:
    """Closing the store also ends a timer that has not fired."""
    store = FaultyStore.here()
    loop: Any = asyncio.get_running_loop()
    running = asyncio.create_task(Idempotency(store, lease=3).run("k", sleeper(5)))
    await settle()
    await store.aclose()
    assert [timer.when() for timer in loop._scheduled if not timer.cancelled()] == [5]  # the handler's
    await running
    assert times(store) == [5]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("fails", [True, False])
@virtual
async def test_the_end_waits_for_the_renewal_in_flight(fails: bool, when: str) -> None:
    """A renewal that hangs in the store, before or after its write, cannot bring a released or completed key back."""
    loop = asyncio.get_running_loop()
    store = FaultyStore.here()
    idem = Idempotency(store, lease=3)
    store.fault("swap", **{when: 1.0})

    async def handler() -> str:
        await asyncio.sleep(1.5)
        if fails:
            raise ValueError
        return "done"

    task = asyncio.create_task(idem.run("k", handler))
    await asyncio.wait([task])
    assert loop.time() == 2
    await asyncio.sleep(5)
    record = await store.get("k")
    if fails:
        assert isinstance(task.exception(), ValueError)
        assert record is None
    else:
        assert record is not None
        assert record.state is State.COMPLETED


@pytest.mark.parametrize("settle_by", ["complete", "release"])
@virtual
async def test_settling_a_claim_oneself_waits_for_its_renewal(settle_by: str) -> None:
    """The same holds for a worker that awaits the store itself, and a settled claim cannot be renewed."""
    store = FaultyStore.here()
    claim = await claimed(store)
    flying = store.fault("swap", before=1.0)
    renewal = asyncio.create_task(store.renew(claim))
    await flying.reached.wait()
    settling = asyncio.create_task(store.complete(claim, "1") if settle_by == "complete" else store.release(claim))
    second = asyncio.create_task(store.renew(claim))
    await settle()
    assert not settling.done()
    await settling
    assert renewal.done()
    with pytest.raises(LeaseLostError):
        await second
    with pytest.raises(LeaseLostError):
        await store.renew(claim)
    record = await store.get("k")
    assert (record is None) is (settle_by == "release")
    assert record is None or record.state is State.COMPLETED


@virtual
async def test_renewals_of_one_claim_follow_each_other() -> None:
    """Several at once are written one after the other, and each lets the lease begin anew."""
    store = FaultyStore.here()
    claim = await claimed(store, lease=10)
    store.fault("swap", before=1.0, times=3)
    await asyncio.gather(*(store.renew(claim) for _ in range(3)))
    assert times(store) == [0, 1, 2]
    record = await store.get("k")
    assert record is not None
    assert (record.lease_ms, record.expires_in) == (10_000, 86_400)


@virtual
async def test_a_renewal_writes_where_the_record_is_gone() -> None:
    """Flushed while its handler runs, the record is back with the next renewal."""
    store = FaultyStore.here()
    claim = await claimed(store)
    fence = store.format.fence(claim.owner)
    assert await store.remove("k", fence, exact=False)
    await store.renew(claim)
    record = await store.get("k")
    assert record is not None
    assert record.owner == claim.owner


@virtual
async def test_a_completion_does_not_wait_until_a_renewal_counts() -> None:
    """Only the write of a renewal is in the way of the completion: replicas may take longer than the lease has left."""
    written, go_on = asyncio.Event(), asyncio.Event()

    class Replicated(MemoryStore):
        async def confirm(self, key: str, value: bytes) -> None:
            written.set()
            await go_on.wait()

    store = asyncidem.testing.FaultyStore(Replicated())
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    before = claim._deadline
    renewal = asyncio.create_task(store.renew(claim))
    await written.wait()
    await store.complete(claim, "1")
    assert not renewal.done()
    assert claim._deadline == before, "it does not count yet"
    go_on.set()
    await renewal
    assert claim._deadline > before
    record = await store.get("k")
    assert record is not None
    assert record.data == "1"


async def test_renewals_always_change_the_bytes() -> None:
    """Even if the clock stands still, a takeover that saw the record before finds other bytes."""
    store = FaultyStore.here()
    claim = await claimed(store)
    seen: set[bytes] = set()
    for _ in range(5):
        stored = await store.read("k")
        assert stored is not None
        seen.add(stored.value)
        await store.renew(claim)
    assert len(seen) == 5


@virtual
async def test_a_forgotten_operation_is_not_renewed() -> None:
    """An operation that was entered, and dropped without an end, blocks its key for a lease only."""
    store = FaultyStore.here()
    idem = Idempotency(store, lease=3)

    async def forget() -> None:
        await idem.operation("k").__aenter__()

    await asyncio.create_task(forget())
    await settle()
    gc.collect()
    await asyncio.sleep(3)
    assert await idem.run("k", sleeper(0)) == 2
    assert times(store) == [3, 3]


@virtual
async def test_renewals_belong_to_no_operation() -> None:
    """The code that renews, and the hooks that hear of it, run in the context of no caller."""
    store = FaultyStore.here()
    seen: list[object] = []

    def hook(event: Event) -> None:
        if event.name == "renewed":
            seen.append(current_operation())

    idem = Idempotency(store, lease=3, hooks=[hook])
    async with idem.operation("outer", renew=False):
        running = [asyncio.create_task(idem.run(key, sleeper(4))) for key in ("a", "b")]
        await asyncio.sleep(0.5)
    await asyncio.gather(*running)
    assert seen == [None] * 6


@virtual
async def test_a_renewal_that_is_not_acknowledged_says_so() -> None:
    """`store.renew` raises what the store does; the claim stays one that can be renewed and completed."""
    store = FaultyStore.here()
    claim = await claimed(store)
    store.fault("swap", after=OSError("reset"))
    with pytest.raises(StoreUnavailableError):
        await store.renew(claim)
    await store.renew(claim)
    await store.complete(claim, "1")
    record = await store.get("k")
    assert record is not None
    assert record.state is State.COMPLETED


@virtual
async def test_many_leases_that_fall_due_together_are_renewed_in_slices() -> None:
    """All are renewed when they are due, and in one turn of the loop no more than a slice of them begins."""
    loop: Any = asyncio.get_running_loop()
    turns: Counter[int] = Counter()
    renewed: list[Claimed] = []

    class Quiet:
        def renewed(self) -> None: ...

        def lost(self, error: LeaseLostError) -> None: ...

    async def renew(claim: Claimed) -> None:
        turns[loop.ticks] += 1
        renewed.append(claim)

    renewer, holder = Renewer(renew, loop), Quiet()
    claims = [Claimed(str(number), "0" * 32, 1, 3000, 3000, 3000, None) for number in range(2 * SLICE + 1)]
    for claim in claims:
        renewer.hold(claim, holder)
    await asyncio.sleep(1.5)
    assert renewed == claims
    assert max(turns.values()) <= SLICE
    await asyncio.sleep(1)
    assert renewed == claims + claims
    await renewer.aclose()
