"""Many waiters of one process on one key: what they cost the store, when they learn, and what they do to the loop."""

import asyncio
import statistics
from collections import Counter
from typing import Any

import pytest

from asyncidem import Claimed, Idempotency, StoreError, WaitTimeoutError
from asyncidem.waiting import SLICE

from faulty import FaultyStore, settle, virtual

CROWD = 2 * SLICE + 1


async def nobody() -> None:
    """Fail: the owner is elsewhere."""
    message = "a waiter ran what its owner completed"
    raise AssertionError(message)


async def claimed(store: FaultyStore) -> Claimed:
    """Claim the key as an owner elsewhere."""
    claim = await store.claim("k", lease=600)
    assert isinstance(claim, Claimed)
    return claim


def crowd(idem: Idempotency, turns: Counter[int], count: int = CROWD, **options: Any) -> list[asyncio.Task[Any]]:
    """Start waiters that count in which turn of the loop each of them learns."""
    loop: Any = asyncio.get_running_loop()

    async def wait() -> Any:
        try:
            return await idem.run("k", nobody, **options)
        finally:
            turns[loop.ticks] += 1

    return [asyncio.create_task(wait()) for _ in range(count)]


@virtual
async def test_waiters_learn_within_a_tenth_of_the_time_that_they_waited() -> None:
    """Half of them within a tenth and 25 ms, all of them within little more: the pause has jitter."""
    ratios = []
    for step in range(40):
        store = FaultyStore.here()
        idem = Idempotency(store, wait=60)
        claim = await claimed(store)
        loop = asyncio.get_running_loop()
        began = loop.time()
        (task,) = crowd(idem, Counter(), 1)
        await asyncio.sleep(0.05 * (step + 1))
        completed = loop.time()
        await store.complete(claim, "1")
        await task
        ratios.append((loop.time() - completed) / ((completed - began) / 10 + 0.025))
    assert statistics.median(ratios) <= 1
    assert max(ratios) <= 1.3


@pytest.mark.parametrize("where", ["here", "elsewhere"])
@virtual
async def test_a_crowd_is_woken_in_slices(where: str) -> None:
    """In one turn of the loop at most a slice of the waiters learns, each gets a value of its own."""
    store = FaultyStore.here()
    idem = Idempotency(store, wait=60)
    turns: Counter[int] = Counter()
    ends = asyncio.Event()

    async def handler() -> list[int]:
        await ends.wait()
        return [1]

    owner = asyncio.create_task(idem.run("k", handler)) if where == "here" else None
    claim = None if owner else await claimed(store)
    await settle()
    tasks = crowd(idem, turns)
    await asyncio.sleep(1)
    ends.set()
    if claim is not None:
        await store.complete(claim, "[1]")
    learnt = await asyncio.gather(*tasks)
    assert learnt == CROWD * [[1]]
    assert len({id(one) for one in learnt}) == CROWD
    assert max(turns.values()) <= SLICE
    assert len(turns) == 3
    if owner is not None:
        await owner


@virtual
async def test_a_crowd_that_waited_too_long_is_told_so_in_slices() -> None:
    """Waiters that came together run out of time together."""
    store = FaultyStore.here()
    idem = Idempotency(store, wait=3)
    await claimed(store)
    turns: Counter[int] = Counter()
    tasks = crowd(idem, turns)
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ends} == {WaitTimeoutError}
    assert asyncio.get_running_loop().time() == pytest.approx(3)
    assert max(turns.values()) <= SLICE


@virtual
async def test_a_crowd_is_told_of_an_error_in_slices() -> None:
    """Each raises an error of its own."""
    store = FaultyStore.here()
    idem = Idempotency(store, wait=60)
    await claimed(store)
    store.fault("read", before=StoreError("not ours"), skip=1)  # the first to come sees that somebody is there
    turns: Counter[int] = Counter()
    ends = await asyncio.gather(*crowd(idem, turns), return_exceptions=True)
    assert {str(end) for end in ends} == {"not ours"}
    assert len({id(end) for end in ends}) == CROWD
    assert max(turns.values()) <= SLICE


@virtual
async def test_cancelling_some_of_a_crowd_leaves_the_others_their_answer() -> None:
    """Waiters that are cancelled between two slices are passed over."""
    store = FaultyStore.here()
    idem = Idempotency(store, wait=60)
    claim = await claimed(store)
    turns: Counter[int] = Counter()
    tasks = crowd(idem, turns)
    await asyncio.sleep(1)
    tasks[0].add_done_callback(lambda _: [task.cancel() for task in tasks[-10:]])
    await store.complete(claim, "1")
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert Counter(map(type, ends)) == {int: CROWD - 10, asyncio.CancelledError: 10}


@virtual
async def test_waiters_of_one_patience_share_a_timer() -> None:
    """A crowd needs no timer each, and each of its members still has its own time."""
    store = FaultyStore.here()
    idem = Idempotency(store, wait=5)
    await claimed(store)
    loop: Any = asyncio.get_running_loop()
    (first,) = crowd(idem, Counter(), 1)
    await asyncio.sleep(1)
    before = len(loop._scheduled)
    tasks = crowd(idem, Counter(), 100)
    await settle()
    assert len(loop._scheduled) <= before + 2
    later = crowd(idem, Counter(), 1, wait=2)
    for expected, waiting in ((3, later), (5, [first]), (6, tasks)):
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(end) for end in ends} == {WaitTimeoutError}
        assert loop.time() == pytest.approx(expected)
