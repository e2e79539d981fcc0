"""How things are timed: samples of calls one after the other or in many tasks, interleaved over rounds."""

import asyncio
import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Protocol

from benchmarks.figures import BARE, OURS, Series, percentile

Call = Callable[[str], Awaitable[Any]]
BlockingCall = Callable[[str], Any]

serial: Final = itertools.count()
"""Makes every key of a run a new one."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: in which every side is measured once, at most.
        sequential: calls one after the other in a sample.
        concurrent: calls in a sample of many tasks, or more where there are very many tasks.
        large: calls with a large result in a sample.
        seconds: of a sample that lasts a fixed time.
        records: in the larger of two servers whose replays are compared.
        operations: over which the growth of a process is taken.
        operations_within: seconds after which it is taken over as many as there were until then.
        waiters: on one key, for memory and lag.
        watched: seconds over which the round trips of waiters are counted after the first one.
        every_side: whether the further levels of ours are measured where they are not judged.
        within: seconds after which a scenario begins no further round, once it has ``LEAST_ROUNDS``.
    """

    rounds: int = 9
    sequential: int = 500
    concurrent: int = 4_096
    large: int = 100
    seconds: float = 3.0
    records: int = 1_000_000
    operations: int = 1_000_000
    operations_within: float = 900.0
    waiters: int = 100_000
    watched: float = 2.0
    every_side: bool = True
    within: float = math.inf

    def more(self) -> "Effort":
        """Return that of the one repetition which a quick run allows a scenario: more rounds of the same samples."""
        return dataclasses.replace(self, rounds=self.rounds + 4, within=self.within * 2.5)


FULL: Final = Effort()
QUICK: Final = Effort(
    sequential=250,
    concurrent=512,
    large=20,
    seconds=0.4,
    records=100_000,
    operations=100_000,
    operations_within=3.0,
    waiters=25_000,
    watched=1.0,
    every_side=False,
    within=2.5,
)

LEAST_ROUNDS: Final = 2


class Named(Protocol):
    """Whatever is compared."""

    @property
    def name(self) -> str:
        """Return what it is called in the results."""
        ...


def fresh_keys(count: int, prefix: str = "order") -> list[str]:
    """Return keys that were never used before, all of the same length; not every peer takes a colon."""
    return [f"{prefix}-{next(serial):010d}" for _ in range(count)]


def rotated(sides: Sequence[Any], by: int) -> list[Any]:
    """Return the sides beginning with another one each round: none is always measured behind the same one."""
    start = by % len(sides)
    return [*sides[start:], *sides[:start]]


async def interleaved(
    sides: Sequence[Named],
    effort: Effort,
    sample: Callable[[Any], Awaitable[dict[str, float]]],
    before: Callable[[], Awaitable[None]] | None = None,
    *,
    warm: bool = False,
) -> Series:
    """Measure all sides in each round, one after the other, in rotating order.

    A round before the first warms up and does not count. A peer that fails is left out from then on, with its reason.

    Args:
        sides: what is compared.
        effort: says how many rounds count.
        sample: measures one side once.
        before: runs untimed before every sample, such as to empty the server.
        warm: whether the sides have warmed up already.
    """
    series, left, began = Series(), list(sides), time.monotonic()
    for number in range(0 if warm else -1, effort.rounds):
        if number >= LEAST_ROUNDS and time.monotonic() - began > effort.within:
            break
        for side in rotated(left, number):
            if before is not None:
                await before()
            gc.collect()
            try:
                figures = await sample(side)
            except Exception as error:
                if side.name in {BARE, OURS}:
                    raise
                series.fail(side.name, f"{type(error).__name__}: {error}"[:200])
                left.remove(side)
            else:
                if number >= 0:
                    series.add(side.name, figures)
    return series


async def sequential(call: Call, keys: Iterable[str]) -> dict[str, float]:
    """Await calls one after the other; return seconds of ``p50``, ``p99`` and ``cpu`` for a call."""
    clock, times = time.perf_counter, []
    cpu = time.process_time()
    for key in keys:
        began = clock()
        await call(key)
        times.append(clock() - began)
    cpu = time.process_time() - cpu
    return _summary(times, cpu)


async def concurrent(call: Call, keys: Sequence[str], tasks: int) -> dict[str, float]:
    """Await calls in many tasks; return calls a second as ``rate``, and what ``sequential`` returns."""
    clock, times = time.perf_counter, []
    left = iter(keys)

    async def work(mine: Iterator[str]) -> None:
        for key in mine:
            began = clock()
            await call(key)
            times.append(clock() - began)

    cpu, began = time.process_time(), clock()
    await asyncio.gather(*(work(left) for _ in range(tasks)))
    elapsed, cpu = clock() - began, time.process_time() - cpu
    return {"rate": len(keys) / elapsed, **_summary(times, cpu)}


def blocking_sequential(call: BlockingCall, keys: Iterable[str]) -> dict[str, float]:
    """Do what ``sequential`` does with a call that blocks."""
    clock, times = time.perf_counter, []
    cpu = time.process_time()
    for key in keys:
        began = clock()
        call(key)
        times.append(clock() - began)
    cpu = time.process_time() - cpu
    return _summary(times, cpu)


def blocking_concurrent(call: BlockingCall, keys: Sequence[str], threads: int) -> dict[str, float]:
    """Do what ``concurrent`` does with a call that blocks, in threads."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: time.sleep(0.001), range(threads)))  # the threads are there before the clock starts
        cpu, began = time.process_time(), time.perf_counter()
        list(pool.map(call, keys))
        elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"rate": len(keys) / elapsed, "cpu": cpu / len(keys)}


def _summary(times: list[float], cpu: float) -> dict[str, float]:
    return {"p50": percentile(times, 0.5), "p99": percentile(times, 0.99), "cpu": cpu / len(times)}
