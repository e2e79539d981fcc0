"""Scenarios of tasks that wait for one key, whose owner is elsewhere: round trips, time to learn, memory and lag."""

import asyncio
import contextlib
import gc
import time
from typing import Any, Final, NamedTuple

from benchmarks.figures import OURS, Measured, Side, Spread, percentile, single
from benchmarks.harness import Effort, fresh_keys
from benchmarks.stage import Stage, control, in_a_process, resident, round_trips

from asyncidem import Idempotency, RedisStore

from servers import Server

WAITERS: Final = 100_000
"""The crowd that the goals are about."""

NUMBERS: Final = (1, 100, 500)
LEARNERS: Final = 5
"""Waiters of each key whose time to learn is taken."""

TURN: Final = 100
"""Tasks that are started in one turn of the loop: the lag must not be the benchmark's own."""

TICK: Final = 0.005


class _Trips(NamedTuple):
    first: int
    later: float


class Crowd(NamedTuple):
    """What a crowd of waiters took.

    Attributes:
        megabytes: by which the process grew.
        lag: of the event loop in seconds, the longest.
        collection: of the garbage collector in seconds, the longest.
    """

    megabytes: float
    lag: float
    collection: float


def waiters(stage: Stage) -> dict[str, Measured]:
    """Waiters of one process on one key."""
    numbers = NUMBERS if stage.effort.every_side else NUMBERS[-1:]
    trips = {number: asyncio.run(_trips(stage, number)) for number in numbers}
    learnt = asyncio.run(_learnt(stage.server, stage.effort))
    many = stage.effort.waiters
    crowd = in_a_process(gather_a_crowd, stage.server.url, many)
    note = "" if many == WAITERS else f"from {many:,} waiters"
    return {
        "waiters_first": _most({number: float(found.first) for number, found in trips.items()}),
        "waiters_later": _most({number: found.later for number, found in trips.items()}),
        "waiters_learn": single(learnt, "x allowed"),
        "waiters_memory": single([crowd.megabytes * WAITERS / many], "MB", note=note),
        "waiters_lag": single(
            [crowd.lag * 1e3],
            "ms",
            note=f"{note}; longest garbage collection {crowd.collection * 1e3:.0f} ms".lstrip("; "),
        ),
    }


def _most(found: dict[int, float]) -> Measured:
    most = max(found.values())
    note = "; ".join(f"{number:,} waiters: {count:.3g}" for number, count in found.items())
    return Measured(Spread.of([most]), {OURS: Side(Spread.of([most]))}, "round trips", note)


async def _pair(url: str) -> tuple[RedisStore, RedisStore]:
    """Return the owner's store and the waiters', both with their connections and scripts."""
    owner, store = RedisStore.from_url(url), RedisStore.from_url(url)
    for one in (owner, store):
        claim: Any = await one.claim(*fresh_keys(1))
        await one.complete(claim, "1")
    return owner, store


async def _handler() -> None:
    message = "a waiter ran what its owner completed"
    raise AssertionError(message)


async def _trips(stage: Stage, number: int) -> _Trips:
    owner, store = await _pair(stage.server.url)
    with contextlib.closing(control(stage.server)) as client:
        try:
            idem, (key,) = Idempotency(store, wait=60), fresh_keys(1)
            claim: Any = await owner.claim(key, lease=60)
            client.config_resetstat()
            tasks = [asyncio.create_task(idem.run(key, _handler)) for _ in range(number)]
            await asyncio.sleep(1)
            first = round_trips(client)
            began = time.monotonic()
            await asyncio.sleep(stage.effort.watched)
            later = (round_trips(client) - first) / (time.monotonic() - began)
            await owner.complete(claim, "1")
            assert set(await asyncio.gather(*tasks)) == {1}
        finally:
            await store.aclose()
            await owner.aclose()
    return _Trips(first, later)


async def _learnt(server: Server, effort: Effort) -> list[float]:
    """Return how long each waiter took to learn, over what it is allowed for the time that it had waited."""
    owner, store = await _pair(server.url)
    found: list[float] = []

    async def one(idem: Idempotency, key: str, waits: float) -> None:
        claim: Any = await owner.claim(key, lease=60)
        began = time.monotonic()
        learnt: list[float] = []

        async def wait() -> None:
            await idem.run(key, _handler)
            learnt.append(time.monotonic())

        async with asyncio.TaskGroup() as group:
            for _ in range(LEARNERS):
                group.create_task(wait())
            await asyncio.sleep(waits)
            completed = time.monotonic()
            await owner.complete(claim, "1")
        found.extend((at - completed) / ((completed - began) / 10 + 0.025) for at in learnt)

    try:
        idem, keys = Idempotency(store, wait=60), 8 * effort.rounds
        async with asyncio.TaskGroup() as group:
            for number, key in enumerate(fresh_keys(keys)):
                group.create_task(one(idem, key, 0.2 + 2.0 * number / keys))
    finally:
        await store.aclose()
        await owner.aclose()
    return found


def gather_a_crowd(url: str, number: int) -> Crowd:
    """Let many tasks wait for one key, and then learn; runs in a process of its own."""
    return asyncio.run(_crowd(url, number))


async def _crowd(url: str, number: int) -> Crowd:
    owner, store = await _pair(url)
    lags, collections = [0.0], [0.0]
    loop = asyncio.get_running_loop()

    async def watch() -> None:
        while True:
            due = loop.time() + TICK
            await asyncio.sleep(TICK)
            lags.append(loop.time() - due)

    def collected(phase: str, _: dict[str, int]) -> None:
        collections.append(-time.perf_counter() if phase == "start" else time.perf_counter() + collections.pop())

    try:
        idem, (key,) = Idempotency(store, wait=600), fresh_keys(1)
        claim: Any = await owner.claim(key, lease=600)
        gc.collect()
        before = resident()
        watching = loop.create_task(watch())
        gc.callbacks.append(collected)
        tasks: list[asyncio.Task[Any]] = []
        while len(tasks) < number:
            tasks += [loop.create_task(idem.run(key, _handler)) for _ in range(TURN)]
            await asyncio.sleep(0)
        await asyncio.sleep(1)
        grown = resident() - before
        await owner.complete(claim, "1")
        while not tasks[-1].done() or not all(task.done() for task in tasks[::TURN]):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        watching.cancel()
        gc.callbacks.remove(collected)
        assert all(task.result() == 1 for task in tasks)
    finally:
        await store.aclose()
        await owner.aclose()
    return Crowd(grown, max(lags), percentile(collections, 1.0))
