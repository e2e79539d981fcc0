"""Scenarios of what is kept: bytes of a record in the server, growth of the process, and the import."""

import asyncio
import contextlib
import gc
import itertools
import time
from typing import Any, Final

from benchmarks import bench_import
from benchmarks.figures import Measured, single
from benchmarks.harness import LEAST_ROUNDS
from benchmarks.sides import SMALL, Decorated, Target
from benchmarks.stage import Stage, control, in_a_process, resident

from asyncidem import Idempotency, RedisStore

TASKS: Final = 64


def records(stage: Stage) -> dict[str, Measured]:
    """``MEMORY USAGE`` of a small record: in progress, completed, and with a fingerprint."""
    return asyncio.run(_records(stage))


async def _records(stage: Stage) -> dict[str, Measured]:
    store = RedisStore.from_url(stage.server.url)
    idem, key = Idempotency(store), "order-0000000042"
    rows: dict[str, Measured] = {}
    with contextlib.closing(control(stage.server)) as client:

        def usage() -> int:
            found: Any = client.memory_usage(store.prefix + key)
            return int(found)

        running: list[int] = []

        async def charge() -> dict[str, Any]:
            running.append(usage())
            return SMALL

        try:
            for row, payload in (("record_bytes", None), ("record_bytes_fingerprint", {"amount": 1250})):
                await stage.flush()
                await idem.run(key, charge, payload=payload)
                note = f"in progress {running[-1]} bytes; {stage.kind}, key {store.prefix}{key}"
                rows[row] = single([float(usage())], "bytes", note=note)
        finally:
            await store.aclose()
    return rows


def process_growth(stage: Stage) -> dict[str, Measured]:
    """What the process grows by over very many operations, half of them first calls, half replays."""
    effort = stage.effort
    grown, done = in_a_process(grow, stage.other.url, effort.operations, effort.operations_within)
    stage.other.command("FLUSHALL")
    return {"process_growth": single([grown], "MB", note=f"over {done:,} operations in {TASKS} tasks")}


def grow(url: str, operations: int, within: float) -> tuple[float, int]:
    """Return the megabytes and the operations; runs in a process of its own."""
    return asyncio.run(_grow(url, operations, within))


async def _grow(url: str, operations: int, within: float) -> tuple[float, int]:
    side = Decorated()
    await side.open(Target(url), TASKS)
    numbers = itertools.count()
    try:
        call = side.calls(SMALL).first

        async def work(until: int, deadline: float) -> None:
            while (number := next(numbers)) < until and time.monotonic() < deadline:
                key = f"order-{number:08d}"
                await call(key)
                await call(key)

        async def run(until: int, seconds: float) -> None:
            deadline = time.monotonic() + seconds
            await asyncio.gather(*(work(until, deadline) for _ in range(TASKS)))
            gc.collect()

        warm = max(2_000, operations // 200)
        await run(warm, within)
        before, began = resident(), next(numbers)
        await run(began + operations // 2, within)
        return resident() - before, 2 * (next(numbers) - began - TASKS)
    finally:
        await side.close()


def imports(stage: Stage) -> dict[str, Measured]:
    """What ``import asyncidem`` adds to ``import redis.asyncio``."""
    bench_import.one_round()  # writes the byte code
    pairs: list[tuple[float, float]] = []
    end = time.monotonic() + stage.effort.within
    while len(pairs) < stage.effort.rounds and (len(pairs) < LEAST_ROUNDS or time.monotonic() < end):
        pairs.append(bench_import.one_round())
    base, added = zip(*pairs, strict=True)
    return {"import_ms": single(added, "ms", bare=base, note="beside it: redis.asyncio itself")}
