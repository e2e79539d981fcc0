"""A scenario of several processes on one server, ours against as many of bare commands."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

from benchmarks.figures import BARE, OURS, TIMES, Measured, Series, Spread
from benchmarks.harness import concurrent, fresh_keys, interleaved
from benchmarks.sides import SMALL, Bare, Decorated, Side, Target, Templates, templates
from benchmarks.stage import Stage

NUMBERS: Final = (1, 2, 4)
TASKS: Final = 64
HEAD_START: Final = 0.02
"""Seconds between the order and the common start."""


class Order(NamedTuple):
    """What a process is told to do."""

    side: str
    calls: int
    start: float


class Done(NamedTuple):
    """When it did that, on the clock that all processes of a machine share, and seconds of CPU."""

    began: float
    ended: float
    cpu: float


class _Several(NamedTuple):
    name: str


def several_processes(stage: Stage) -> dict[str, Measured]:
    """First calls in 1, 2 and 4 processes of 64 tasks each; the throughput is that of all together."""
    series = asyncio.run(_several(stage))
    rows: dict[str, Measured] = {}
    for number in NUMBERS:
        cpu = Spread.of(series.ratios(OURS, f"cpu_{number}")).median
        note = f"CPU of all processes for a call: {cpu:.2f} {TIMES}"
        rows[f"processes_{number}"] = series.row(f"rate_{number}", unit="ops/s", note=note)
    return rows


async def _several(stage: Stage) -> Series:
    records = await templates(stage.target, SMALL)
    with _workers(stage.target, records) as pipes:

        async def sample(side: _Several) -> dict[str, float]:
            figures: dict[str, float] = {}
            for number in NUMBERS:
                await stage.flush()
                count = max(512, stage.effort.concurrent // 2)
                order = Order(side.name, count, time.monotonic() + HEAD_START)
                for pipe in pipes[:number]:
                    pipe.send(order)
                done: list[Done] = [pipe.recv() for pipe in pipes[:number]]
                elapsed = max(one.ended for one in done) - min(one.began for one in done)
                figures[f"rate_{number}"] = number * count / elapsed
                figures[f"cpu_{number}"] = sum(one.cpu for one in done) / (number * count)
            return figures

        return await interleaved([_Several(BARE), _Several(OURS)], stage.effort, sample, warm=True)


@contextlib.contextmanager
def _workers(target: Target, records: Templates) -> Iterator[list[Any]]:
    context = get_context("spawn")
    with contextlib.ExitStack() as stack:
        pipes: list[Any] = []
        for number in range(max(NUMBERS)):
            mine, theirs = context.Pipe()
            worker = context.Process(target=work, args=(theirs, target, records, number), daemon=True)
            worker.start()
            theirs.close()
            stack.callback(worker.join)
            stack.callback(mine.close)  # its end is the end of the worker
            pipes.append(mine)
        for pipe in pipes:
            pipe.recv()  # ready
        yield pipes


def work(pipe: Connection, target: Target, records: Templates, number: int) -> None:
    """Be one of the processes, until the other end of the pipe closes."""
    asyncio.run(_work(pipe, target, records, number))


async def _work(pipe: Connection, target: Target, records: Templates, number: int) -> None:
    sides: tuple[Side, ...] = (Bare(lambda _: records), Decorated())
    for side in sides:
        await side.open(target, TASKS)
    calls = {side.name: side.calls(SMALL).first for side in sides}
    for call in calls.values():
        await concurrent(call, fresh_keys(2 * TASKS, f"warm{number}"), TASKS)
    pipe.send("ready")
    # Nothing else runs on the loop between two orders, so that it may block.
    with contextlib.suppress(EOFError):
        while True:
            order: Order = pipe.recv()
            keys = fresh_keys(order.calls, f"order{number}")
            time.sleep(max(0.0, order.start - time.monotonic()))
            cpu, began = time.process_time(), time.monotonic()
            await concurrent(calls[order.side], keys, TASKS)
            pipe.send(Done(began, time.monotonic(), time.process_time() - cpu))
    for side in sides:
        await side.close()
