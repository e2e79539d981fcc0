"""Waiting for a running call: who polls, who learns what and when, and who takes over."""

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from asyncidem import (
    Claimed,
    FingerprintMismatchError,
    Idempotency,
    InProgressError,
    StoreUnavailableError,
    WaitTimeoutError,
    current_operation,
)
from asyncidem.keys import fingerprint

from faulty import FaultyStore, down, settle, virtual


async def remote(store: FaultyStore, key: str = "k", *, lease: float = 30, payload: object = None) -> Claimed:
    """Claim a key as another process would: without a word to anybody here."""
    mark = None if payload is None else fingerprint(payload, None)
    claim = await store.claim(key, lease=lease, fingerprint=mark)
    assert isinstance(claim, Claimed)
    return claim


def handler(seconds: float = 0.0, runs: list[int] | None = None) -> Callable[[], Coroutine[Any, Any, str]]:
    """Return a handler that takes its time, and notes and returns its attempt."""

    async def handle() -> str:
        op = current_operation()
        assert op is not None
        if runs is not None:
            runs.append(op.attempt)
        await asyncio.sleep(seconds)
        return f"attempt {op.attempt}"

    return handle


def start(
    idem: Idempotency, count: int, fn: Callable[[], Coroutine[Any, Any, Any]], **options: Any
) -> list[asyncio.Task[Any]]:
    """Start callers of one key."""
    return [asyncio.create_task(idem.run("k", fn, **options)) for _ in range(count)]


@pytest.mark.parametrize("turns", [0, 2])
@pytest.mark.parametrize("count", [1, 100, 500])
@virtual
async def test_one_poller_serves_all_who_wait(count: int, turns: int) -> None:
    """The store sees at most 50 reads in the first second and 12 in each later one, however many tasks wait."""
    loop = asyncio.get_running_loop()
    store = FaultyStore.here(turns=turns)
    claim = await remote(store, lease=60)
    store.calls.clear()
    waiters = start(Idempotency(store, wait=100), count, handler())
    await asyncio.sleep(30)
    seconds = [int(at) for _, _, at in store.calls]
    assert 20 <= seconds.count(0) <= 50
    assert all(seconds.count(second) + seconds.count(second + 1) >= 1 for second in range(1, 29))
    assert all(seconds.count(second) <= 12 for second in range(1, 30))
    assert store.counts["put_if_absent"] == 1
    await store.complete(claim, '"theirs"')
    done = loop.time()
    assert await asyncio.gather(*waiters) == ["theirs"] * count
    assert loop.time() - done <= 1.2


@virtual
async def test_the_pause_grows_with_the_time_waited() -> None:
    """It is a tenth of the time waited, with up to a fifth of jitter, from 5 ms to 1 s."""
    store = FaultyStore.here()
    await remote(store, lease=60)
    store.calls.clear()
    waiters = start(Idempotency(store, wait=40), 3, handler())
    await asyncio.wait(waiters)
    assert all(isinstance(waiter.exception(), WaitTimeoutError) for waiter in waiters)
    reads = [0.0, *(at for name, _, at in store.calls[2:] if name == "read")]
    assert reads[-1] > 38
    pauses: set[float] = set()
    for before, after in itertools.pairwise(reads):
        pause = min(1.0, max(0.005, before / 10))
        assert pause <= after - before + 1e-9
        assert after - before <= pause * 1.2 + 1e-9
        pauses.add(round((after - before) / pause, 6))
    assert len(pauses) > 10  # processes that began together do not stay together


@virtual
async def test_tasks_of_the_owners_process_learn_at_once() -> None:
    """While a waiting caller of this process owns the key nobody polls, and its end is known in the same moment."""
    loop = asyncio.get_running_loop()
    store = FaultyStore.here(turns=1)
    runs: list[int] = []
    tasks = start(Idempotency(store, wait=100, renew=False), 100, handler(20, runs))
    assert await asyncio.gather(*tasks) == ["attempt 1"] * 100
    assert (loop.time(), runs) == (20, [1])
    assert store.counts == {"put_if_absent": 1, "swap": 1}


@virtual
async def test_the_end_of_an_owner_that_did_not_wait_is_known_at_once() -> None:
    """An owner without `wait` tells the waiters of its process as well."""
    loop = asyncio.get_running_loop()
    store = FaultyStore.here(turns=1)
    idem = Idempotency(store)
    (owner,) = start(idem, 1, handler(25))
    await settle()
    waiters = start(idem, 10, handler(), wait=100)
    assert await asyncio.gather(*waiters) == ["attempt 1"] * 10
    assert loop.time() == 25
    await owner


@pytest.mark.parametrize("turns", [0, 1])
@pytest.mark.parametrize("where", ["here", "remote"])
@virtual
async def test_after_a_failure_one_waiter_takes_over(where: str, turns: int) -> None:
    """When the owner fails or releases, exactly one waiter runs, and all the others get its result."""
    store = FaultyStore.here(turns=turns)
    idem, runs = Idempotency(store, wait=100), list[int]()
    if where == "here":
        (owner,) = start(idem, 1, fail_at(2))
        await settle()
    else:
        claim = await remote(store)
    waiters = start(idem, 20, handler(3, runs))
    await asyncio.sleep(1.9)
    assert runs == []
    if where == "here":
        with pytest.raises(ValueError):
            await owner
    else:
        await store.release(claim)
    assert await asyncio.gather(*waiters) == ["attempt 1"] * 20
    assert runs == [1]


@virtual
async def test_each_of_many_failures_is_followed_by_one_waiter() -> None:
    """Waiters that fail in turn each run once, one at a time."""
    running: list[int] = []
    most = 0

    async def fail() -> None:
        nonlocal most
        running.append(1)
        most = max(most, len(running))
        await asyncio.sleep(0.5)
        running.pop()
        raise ValueError

    tasks = start(Idempotency(FaultyStore.here(turns=1), wait=100), 10, fail)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ValueError] * 10
    assert most == 1


@pytest.mark.parametrize("turns", [0, 1])
@virtual
async def test_a_dead_owner_is_followed_when_its_lease_is_over(turns: int) -> None:
    """A waiter takes over promptly at the end of the lease, as attempt 2, and the others get its result."""
    loop = asyncio.get_running_loop()
    store, runs = FaultyStore.here(turns=turns), list[int]()
    await remote(store, lease=20)
    waiters = start(Idempotency(store, wait=100), 20, handler(0, runs))
    assert await asyncio.gather(*waiters) == ["attempt 2"] * 20
    assert runs == [2]
    assert 20 <= loop.time() < 20.1


@virtual
async def test_a_renewed_lease_is_waited_for_again() -> None:
    """A waiter that finds the lease renewed goes on waiting until that one is over."""
    loop = asyncio.get_running_loop()
    store = FaultyStore.here()
    claim = await remote(store, lease=10)
    (waiter,) = start(Idempotency(store, wait=100), 1, handler())
    await asyncio.sleep(9)
    await store.renew(claim)
    assert await waiter == "attempt 2"
    assert 19 <= loop.time() < 19.1


@virtual
async def test_a_waiter_that_was_cancelled_never_takes_over() -> None:
    """The owner's end after it runs nothing of a cancelled waiter, and its poller ends with it."""
    store, runs = FaultyStore.here(), list[int]()
    claim = await remote(store)
    (waiter,) = start(Idempotency(store, wait=100), 1, handler(0, runs))
    await asyncio.sleep(1)
    waiter.cancel()
    await asyncio.wait([waiter])
    await settle()
    assert len(asyncio.all_tasks()) == 1
    await store.release(claim)
    calls = store.counts.total()
    await asyncio.sleep(10)
    assert waiter.cancelled()
    assert (runs, store.counts.total()) == ([], calls)
    assert await store.get("k") is None


@pytest.mark.parametrize("where", ["here", "remote"])
@pytest.mark.parametrize("others", [0, 3])
@virtual
async def test_an_election_in_the_moment_of_a_cancellation_is_handed_on(others: int, where: str) -> None:
    """A waiter that is cancelled in the very turn in which it was elected runs nothing; the next one does, at once."""
    loop = asyncio.get_running_loop()
    store, runs, unlucky = FaultyStore.here(), list[int](), list[int]()
    first: list[asyncio.Task[Any]] = []

    def cancel(*_: object) -> None:
        if first:
            first[0].cancel()

    idem = Idempotency(store, wait=100, hooks=[lambda event: cancel() if event.name == "released" else None])
    if where == "here":
        owner = asyncio.create_task(idem.run("k", fail_at(7)))
        await settle()
    else:
        claim = await remote(store)
    first += start(idem, 1, handler(0, unlucky))
    await settle()
    rest = start(idem, others, handler(0, runs))
    await asyncio.sleep(7)
    if where == "here":
        with pytest.raises(ValueError):
            await owner
    else:
        # The poller elects in this turn, and the cancellation is the next thing that the loop does.
        store.fault("read", after=lambda: loop.call_soon(cancel))
        await store.release(claim)
        await asyncio.sleep(2)
    await asyncio.wait(first)
    assert first[0].cancelled()
    assert await asyncio.gather(*rest) == ["attempt 1"] * others
    assert (unlucky, runs) == ([], [1] * (others > 0))
    assert loop.time() < 9.1
    assert await idem.run("k", handler()) == "attempt 1"
    assert loop.time() < 9.1


def fail_at(seconds: float) -> Callable[[], Coroutine[Any, Any, None]]:
    """Return a handler that fails after a while."""

    async def fail() -> None:
        await asyncio.sleep(seconds)
        raise ValueError

    return fail


@pytest.mark.parametrize("count", [1, 3])
@virtual
async def test_waiters_with_another_payload_are_refused_at_once(count: int) -> None:
    """A waiter whose payload differs from the running call's, wherever that runs, does not wait for its end."""
    loop = asyncio.get_running_loop()
    store = FaultyStore.here(turns=1)
    idem = Idempotency(store, wait=100)
    await remote(store, payload=1)
    same = start(idem, count, handler(), payload=1)
    await asyncio.sleep(5)
    for late in (start(idem, 2, handler(), payload=2), start(idem, 2, handler(), payload=3)):
        outcomes = await asyncio.gather(*late, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [FingerprintMismatchError] * 2
    assert loop.time() == 5
    assert await asyncio.gather(*same) == ["attempt 2"] * count


@virtual
async def test_waiters_with_another_payload_than_the_owner_here_are_refused_at_once() -> None:
    """The owner runs in this process, where nobody polls: another payload is refused at once all the same."""
    loop = asyncio.get_running_loop()
    idem = Idempotency(FaultyStore.here(turns=1), wait=100)
    owner = asyncio.create_task(idem.run("k", handler(20), payload=1))
    early = start(idem, 2, handler(), payload=2)  # they wait before the claim is answered
    same = start(idem, 2, handler(), payload=1)
    await asyncio.sleep(5)
    late = start(idem, 2, handler(), payload=2)
    outcomes = await asyncio.gather(*early, *late, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [FingerprintMismatchError] * 4
    assert loop.time() == 5
    assert await asyncio.gather(owner, *same) == ["attempt 1"] * 3


@virtual
async def test_waiters_of_a_takeover_with_another_payload_are_refused() -> None:
    """Once one waiter took over, those with another payload are told, and do not wait for its end."""
    loop = asyncio.get_running_loop()
    store = FaultyStore.here(turns=1)
    claim = await remote(store)
    idem = Idempotency(store, wait=100)
    first = asyncio.create_task(idem.run("k", handler(20), payload=1))
    await asyncio.sleep(1)
    other = asyncio.create_task(idem.run("k", handler(), payload=2))
    await asyncio.sleep(1)
    await store.release(claim)
    with pytest.raises(FingerprintMismatchError):
        await other
    assert loop.time() < 3
    assert await first == "attempt 1"


@virtual
async def test_what_a_released_call_was_for_refuses_nobody() -> None:
    """While the next owner's claim is under way, a caller is not judged by the payload of the one that released."""
    store = FaultyStore.here()
    claim = await remote(store, payload=1)
    idem = Idempotency(store, wait=100)
    first = asyncio.create_task(idem.run("k", handler(20)))
    await asyncio.sleep(1)
    slow = store.fault("put_if_absent", before=3.0)
    await store.release(claim)
    await slow.reached.wait()
    assert await idem.run("k", handler(), payload=2) == "attempt 1"
    assert await first == "attempt 1"


@virtual
async def test_completion_is_judged_by_each_payload() -> None:
    """A waiter without a payload gets the result; one whose payload differs from a late-known one, the mismatch."""
    store = FaultyStore.here()
    claim = await remote(store)
    idem = Idempotency(store, wait=100)
    plain, other = start(idem, 1, handler()) + start(idem, 1, handler(), payload=2)
    await asyncio.sleep(1)
    await store.release(claim)
    successor = await remote(store, payload=1)
    await store.complete(successor, '"done"')
    assert await plain == "done"
    with pytest.raises(FingerprintMismatchError):
        await other


@virtual
async def test_a_wait_that_runs_out() -> None:
    """After `wait` seconds the caller gets an error that is a time-out and says when to come back."""
    loop = asyncio.get_running_loop()
    store, runs = FaultyStore.here(turns=1), list[int]()
    await remote(store, lease=60)
    (waiter,) = start(Idempotency(store), 1, handler(0, runs), wait=5)
    with pytest.raises(WaitTimeoutError) as caught:
        await waiter
    assert isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value, InProgressError)
    assert (caught.value.key, caught.value.retry_after) == ("k", pytest.approx(55, abs=0.1))
    assert loop.time() == 5
    await settle()
    assert len(asyncio.all_tasks()) == 1
    assert runs == []


@virtual
async def test_each_waiter_has_its_own_time() -> None:
    """Waiters leave when their own time is over, and those who stay are still served."""
    loop = asyncio.get_running_loop()
    store = FaultyStore.here()
    claim = await remote(store, lease=60)
    idem = Idempotency(store)
    ends: list[float] = []

    async def wait(seconds: float) -> str:
        try:
            return await idem.run("k", handler(), wait=seconds)
        except WaitTimeoutError:
            ends.append(loop.time())
            return "late"

    waiters = [asyncio.create_task(wait(seconds)) for seconds in (3, 1, 2, 50)]
    await asyncio.sleep(10)
    await store.complete(claim, '"done"')
    assert await asyncio.gather(*waiters) == ["late", "late", "late", "done"]
    assert ends == [1, 2, 3]


@virtual
async def test_a_store_that_fails_meanwhile_is_waited_for() -> None:
    """An outage while polling ends no wait: the store may come back within it."""
    store = FaultyStore.here()
    claim = await remote(store, lease=60)
    waiters = start(Idempotency(store, wait=50), 5, handler())
    await settle()
    fault = store.fault("read", before=down(), times=None)
    await asyncio.sleep(20)
    assert not any(waiter.done() for waiter in waiters)
    store.faults.remove(fault)
    await store.complete(claim, '"done"')
    assert await asyncio.gather(*waiters) == ["done"] * 5


@pytest.mark.parametrize("back", [False, True])
@virtual
async def test_a_store_that_never_comes_back_is_the_error(back: bool) -> None:
    """At the end of the wait the error says which it was: in progress when last asked, or no answer."""
    loop = asyncio.get_running_loop()
    store = FaultyStore.here()
    await remote(store, lease=60)
    (waiter,) = start(Idempotency(store, wait=20), 1, handler())
    await settle()
    fault = store.fault("read", before=down(), times=None)
    await asyncio.sleep(10)
    if back:
        store.faults.remove(fault)
    with pytest.raises(WaitTimeoutError if back else StoreUnavailableError) as caught:
        await waiter
    if isinstance(caught.value, StoreUnavailableError):
        assert isinstance(caught.value.__cause__, StoreUnavailableError)
        assert not caught.value.outcome_unknown
    assert loop.time() == 20


@virtual
async def test_a_claim_that_fails_is_tried_by_the_next() -> None:
    """The elected waiter's store error is its own; the next one claims for itself."""
    store, runs = FaultyStore.here(turns=1), list[int]()
    store.fault("put_if_absent", before=down(), times=2)
    tasks = start(Idempotency(store, wait=100), 5, handler(1, runs))
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes[:2]] == [StoreUnavailableError] * 2
    assert outcomes[2:] == ["attempt 1"] * 3
    assert runs == [1]


@virtual
async def test_late_joiners_share_the_poller() -> None:
    """Callers that come while others wait, or after all of them left, get the result too."""
    loop = asyncio.get_running_loop()
    store = FaultyStore.here()
    claim = await remote(store, lease=60)
    idem = Idempotency(store)
    early = start(idem, 3, handler(), wait=5)
    await asyncio.sleep(4)
    calls = len(store.calls)
    joined = start(idem, 3, handler(), wait=50)
    await settle()
    assert len(store.calls) == calls
    await asyncio.sleep(4)
    assert [type(one.exception()) for one in early] == [WaitTimeoutError] * 3
    for one in joined[:2]:
        one.cancel()
    await settle()
    last = start(idem, 1, handler(), wait=50)
    await store.complete(claim, '"done"')
    assert await asyncio.gather(joined[2], *last) == ["done"] * 2
    assert loop.time() < 10
    assert await idem.run("k", handler(), wait=1) == "done"


@virtual
async def test_completions_that_are_repeated_reach_the_waiters() -> None:
    """An owner whose completion is not acknowledged lets its waiters poll until it has landed."""
    store, runs = FaultyStore.here(turns=1), list[int]()
    idem = Idempotency(store, wait=100)
    store.fault("swap", before=down(), times=5)
    tasks = start(idem, 10, handler(1, runs))
    assert await asyncio.gather(*tasks) == ["attempt 1"] * 10
    assert runs == [1]


@virtual
async def test_aclose_leaves_no_poller() -> None:
    """Closing the store ends the pollers, and those who wait are told at once."""
    loop = asyncio.get_running_loop()
    store = FaultyStore.here()
    await remote(store, lease=60)
    (waiter,) = start(Idempotency(store, wait=5), 1, handler())
    await asyncio.sleep(1)
    await store.aclose()
    with pytest.raises(StoreUnavailableError):
        await waiter
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert loop.time() == 1


def test_a_watch_of_a_dead_loop_does_no_harm() -> None:
    """A process that waited on one loop waits as well on the next, whatever the first left behind."""
    store = FaultyStore()
    idem = Idempotency(store, wait=100)

    async def abandon() -> None:
        await remote(store)
        start(idem, 3, handler())
        await settle()

    async def again() -> str:
        task = asyncio.create_task(idem.run("k", handler()))
        await asyncio.sleep(0.02)
        assert not task.done()
        await store.delete("k")  # an orphan is left
        return await task

    asyncio.run(abandon())
    assert asyncio.run(again()) == "attempt 2"
    assert len(store.companions) == 1
