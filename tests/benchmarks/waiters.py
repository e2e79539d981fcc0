"""Scenarios of tasks that wait for one key, whose owner is elsewhere: round trips, time to learn, memory and lag."""

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, NamedTuple

from benchmarks.figures import OURS, Measured, Side, Spread, single
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
    crowd, bare = in_a_process(gather_a_crowd, stage.server.url, many), in_a_process(gather_bare_tasks, many)
    scale = WAITERS / many
    note = "" if many == WAITERS else f"from {many:,} waiters; "
    floor = f"as many bare tasks, three coroutines deep: {bare.megabytes * scale:.0f} MB, {bare.lag * 1e3:.0f} ms"
    return {
        "waiters_first": _most({number: float(found.first) for number, found in trips.items()}),
        "waiters_later": _most({number: found.later for number, found in trips.items()}),
        "waiters_learn": single(learnt, "x allowed"),
        "waiters_memory": single([crowd.megabytes * scale], "MB", note=note + floor),
        "waiters_lag": single(
            [crowd.lag * 1e3],
            "ms",
            note=f"{note}longest garbage collection {crowd.collection * 1e3:.0f} ms, of the bare tasks "
            f"{bare.collection * 1e3:.0f} ms",
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


def gather_bare_tasks(number: int) -> Crowd:
    """Let as many tasks await a future each, as deep in coroutines as a waiter does; in a process of its own."""
    return asyncio.run(_bare_crowd(number))


class _Watched:
    """The longest lag of the loop and the longest garbage collection, while it is entered."""

    def __init__(self) -> None:
        self.lag = self.collection = 0.0
        self._begun = 0.0

    async def __aenter__(self) -> "_Watched":
        gc.collect()
        self._task = asyncio.create_task(self._watch())
        gc.callbacks.append(self._collected)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0.1)
        self._task.cancel()
        gc.callbacks.remove(self._collected)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK
            await asyncio.sleep(TICK)
            self.lag = max(self.lag, loop.time() - due)

    def _collected(self, phase: str, _: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._begun = now
        else:
            self.collection = max(self.collection, now - self._begun)


async def _started(number: int, start: Callable[[], Coroutine[Any, Any, Any]]) -> list[asyncio.Task[Any]]:
    tasks: list[asyncio.Task[Any]] = []
    while len(tasks) < number:
        tasks += [asyncio.create_task(start()) for _ in range(TURN)]
        await asyncio.sleep(0)
    await asyncio.sleep(1)
    return tasks


async def _all_done(tasks: list[asyncio.Task[Any]]) -> None:
    while not tasks[-1].done() or not all(task.done() for task in tasks[::TURN]):
        await asyncio.sleep(0.01)
    assert all(task.result() == 1 for task in tasks)


async def _crowd(url: str, number: int) -> Crowd:
    owner, store = await _pair(url)
    try:
        idem, (key,) = Idempotency(store, wait=600), fresh_keys(1)
        claim: Any = await owner.claim(key, lease=600)
        async with _Watched() as watched:
            before = resident()
            tasks = await _started(number, lambda: idem.run(key, _handler))
            grown = resident() - before
            await owner.complete(claim, "1")
            await _all_done(tasks)
    finally:
        await store.aclose()
        await owner.aclose()
    return Crowd(grown, watched.lag, watched.collection)


async def _bare_crowd(number: int) -> Crowd:
    futures: list[asyncio.Future[int]] = []

    async def wait(deeper: int) -> int:
        if deeper:
            return await wait(deeper - 1)
        future = asyncio.get_running_loop().create_future()
        futures.append(future)
        return await future

    async with _Watched() as watched:
        before = resident()
        tasks = await _started(number, lambda: wait(2))
        grown = resident() - before
        for index, future in enumerate(futures):
            future.set_result(1)
            if index % TURN == 0:
                await asyncio.sleep(0)
        await _all_done(tasks)
    return Crowd(grown, watched.lag, watched.collection)
