"""Scenarios of many calls at once: throughput, on a cluster too, and small calls beside large results."""

import asyncio
import time
from collections.abc import Sequence
from operator import truediv
from typing import Any, Final

from benchmarks.figures import BARE, OURS, Measured, Series, Spread, percentile
from benchmarks.figures import Side as Figures
from benchmarks.harness import fresh_keys, interleaved
from benchmarks.sides import SMALL, Decorated, Msgspec, Side, Target, bare_for, large, opened
from benchmarks.stage import Stage

from servers import Cluster

LEVELS: Final = (8, 64, 256, 1024)
COMPARED: Final = 64
"""The number of tasks at which the peers and our other levels are measured too."""

EACH: Final = 4
"""Calls of each task at least: with fewer, a sample is all beginning and end."""

HUGE: Final = large(5_000_000)
NEIGHBOURS: Final = 8
"""Tasks of small calls beside the large results."""


def throughput(stage: Stage) -> dict[str, Measured]:
    """First calls in 8 to 1,024 tasks."""
    series = asyncio.run(_throughput(stage))
    rows = {f"throughput_{tasks}": series.row(f"rate_{tasks}", unit="ops/s") for tasks in LEVELS}
    ours = [series.values(OURS, f"rate_{tasks}") for tasks in LEVELS]
    kept = [rates[-1] / max(rates) for rates in zip(*ours, strict=True)]
    rows["throughput_kept"] = Measured(Spread.of(kept), {OURS: Figures(Spread.of(kept))}, "x of best")
    tails = {
        side: [*map(truediv, series.values(side, "p99_64"), series.values(side, "p50_64"))] for side in (OURS, BARE)
    }
    figures = {side: Figures(Spread.of(values)) for side, values in tails.items()}
    p50 = Spread.of(series.values(OURS, "p50_64")).median * 1e3
    rows["tail_64"] = Measured(figures[OURS].absolute, figures, "x p50", f"p50: {p50:.2f} ms")
    return rows


async def _throughput(stage: Stage) -> Series:
    bare = await bare_for(stage.target, SMALL)
    async with opened([bare, *stage.ours(), *stage.peers()], stage.target, LEVELS[-1]) as states:
        return await _at_levels(states, LEVELS, stage, stage.flush)


async def _at_levels(
    states: Sequence[tuple[Side, str | None]], levels: Sequence[int], stage: Stage, flush: Any
) -> Series:
    calls = {side.name: side.calls(SMALL).first for side, failure in states if failure is None}
    warm: set[str] = set()  # the round that does not count opens connections, and is short

    async def sample(side: Any) -> dict[str, float]:
        figures: dict[str, float] = {}
        for tasks in levels:
            if tasks == COMPARED or side.name in {BARE, OURS}:
                await flush()
                count = max(stage.effort.concurrent, EACH * tasks) if side.name in warm else tasks
                keys = fresh_keys(count)
                sampled = await side.concurrent(calls[side.name], keys, tasks)
                figures |= {f"{name}_{tasks}": value for name, value in sampled.items()}
        warm.add(side.name)
        return figures

    series = await interleaved([side for side, why in states if why is None], stage.effort, sample)
    for side, failure in states:
        if failure is not None:
            series.fail(side.name, failure)
    return series


def on_a_cluster(stage: Stage) -> dict[str, Measured]:
    """First calls on three primaries with a replica each; bare is redis-py's cluster client."""
    # A busy machine must not fail over in the middle of a sample.
    options = ("--cluster-replica-no-failover", "yes")
    with Cluster(stage.kind, stage.directory / "cluster", *options) as cluster:

        async def flush() -> None:
            for node in cluster.masters:
                node.command("FLUSHALL")

        async def run() -> Series:
            target = Target(cluster.url, cluster=True)
            bare = await bare_for(target, SMALL)
            async with opened([bare, Decorated()], target, COMPARED) as states:
                return await _at_levels(states, (8, COMPARED), stage, flush)

        series = asyncio.run(run())
    return {f"cluster_{tasks}": series.row(f"rate_{tasks}", unit="ops/s") for tasks in (8, COMPARED)}


def beside_large(stage: Stage) -> dict[str, Measured]:
    """Small first calls while a task of the same process stores and replays 5 MB, again and again."""
    series = asyncio.run(_beside_large(stage))
    rounds = {side: Spread.of(series.values(side, "huge")).median for side in (OURS, BARE)}
    note = f"large results beside, stored and replayed: {rounds[OURS]:.1f}/s, bare {rounds[BARE]:.1f}/s"
    return {"beside_large": series.row("p99", unit="ms", scale=1e3, note=note)}


async def _beside_large(stage: Stage) -> Series:
    target = stage.target
    bare = await bare_for(target, SMALL, HUGE)
    async with opened([bare, Decorated(), Msgspec()], target, NEIGHBOURS + 1) as states:
        sides = [side for side, _ in states]
        calls = {side.name: (side.calls(SMALL).first, side.calls(HUGE)) for side in sides}

        async def sample(side: Side) -> dict[str, float]:
            small, (first, replay) = calls[side.name]
            clock, times, huge = time.perf_counter, [], 0
            began = clock()
            end = began + stage.effort.seconds

            async def neighbour() -> None:
                nonlocal huge
                while clock() < end:
                    (key,) = fresh_keys(1, "large")
                    await first(key)
                    await replay(key)
                    huge += 1

            async def work() -> None:
                while clock() < end:
                    (key,) = fresh_keys(1)
                    start = clock()
                    await small(key)
                    times.append(clock() - start)

            await asyncio.gather(neighbour(), *(work() for _ in range(NEIGHBOURS)))
            return {"p99": percentile(times, 0.99), "huge": huge / (clock() - began)}

        return await interleaved(sides, stage.effort, sample, stage.flush)
