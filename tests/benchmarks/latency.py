"""Scenarios of one call after the other: first calls and replays, large results, the local cache, many records."""

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Sequence
from typing import Any, Final

from benchmarks.figures import BARE, OURS, TIMES, Measured, Series, Side, Spread, single
from benchmarks.harness import fresh_keys, interleaved
from benchmarks.sides import SMALL, TTL, Bare, Decorated, Msgspec, Run, Target, bare_for, large, opened, templates
from benchmarks.stage import Stage, control, round_trips

from servers import HOST, Server

LARGE: Final = large(100_000)


def small(stage: Stage) -> dict[str, Measured]:
    """First calls and replays of a small result, all sides and peers."""
    series = asyncio.run(_first_and_replay(stage, SMALL, stage.effort.sequential))
    return {
        "first_p50": series.row("first_p50", unit="µs", scale=1e6),
        "first_cpu": series.row("first_cpu", unit="µs", scale=1e6),
        "replay_p50": series.row("replay_p50", unit="µs", scale=1e6),
        "replay_cpu": series.row("replay_cpu", unit="µs", scale=1e6),
    }


def large_result(stage: Stage) -> dict[str, Measured]:
    """First calls and replays of a result of 100 KB."""
    series = asyncio.run(_first_and_replay(stage, LARGE, stage.effort.large, Msgspec()))
    rows: dict[str, Measured] = {}
    for kind in ("first", "replay"):
        cpu = series.ratios(OURS, f"{kind}_cpu")
        note = f"CPU: {Spread.of(cpu).median:.2f} {TIMES}" if cpu else ""
        rows[f"large_{kind}"] = series.row(f"{kind}_p50", unit="ms", scale=1e3, note=note)
    return rows


async def _first_and_replay(stage: Stage, result: Any, count: int, *more: Decorated) -> Series:
    bare = await bare_for(stage.target, result)
    sides = [bare, *stage.ours(), *more, *stage.peers()]
    async with opened(sides, stage.target, 1) as states:
        calls = {side.name: side.calls(result) for side, failure in states if failure is None}

        async def sample(side: Any) -> dict[str, float]:
            keys = fresh_keys(count)
            first = await side.sequential(calls[side.name].first, keys)
            replay = await side.sequential(calls[side.name].replay, keys)
            return {f"first_{name}": value for name, value in first.items()} | {
                f"replay_{name}": value for name, value in replay.items()
            }

        series = await interleaved([side for side, why in states if why is None], stage.effort, sample, stage.flush)
    for side, failure in states:
        if failure is not None:
            series.fail(side.name, failure)
    return series


def cached(stage: Stage) -> dict[str, Measured]:
    """Replays that never leave the process."""
    return asyncio.run(_cached(stage))


async def _cached(stage: Stage) -> dict[str, Measured]:
    side, loops = Decorated(), stage.effort.sequential * 10
    await side.open(stage.target, 1)
    times: list[float] = []
    with contextlib.closing(control(stage.server)) as client:
        try:

            async def charge(order: str) -> dict[str, Any]:
                return SMALL

            call = side.idempotency(local_cache=100).idempotent(key="order", name="cached")(charge)
            (key,) = fresh_keys(1)
            await call(key)
            await call(key)  # a replay from the store at most: what follows is from the cache
            client.config_resetstat()
            for _ in range(stage.effort.rounds):
                began = time.process_time()
                for _ in range(loops):
                    await call(key)
                times.append((time.process_time() - began) / loops * 1e6)
            commands = round_trips(client)
        finally:
            await side.close()
    return {"cache_commands": single([float(commands)], "commands"), "cache_cpu": single(times, "µs")}


def growth(stage: Stage) -> dict[str, Measured]:
    """Replays on a server with few records, and on one with many."""
    return asyncio.run(_growth(stage))


async def _growth(stage: Stage) -> dict[str, Measured]:
    counts = {stage.server: 1_000, stage.other: stage.effort.records}
    record = (await templates(stage.target, SMALL)).completed
    sides: list[_Among] = []
    async with contextlib.AsyncExitStack() as stack:
        for server, count in counts.items():
            server.command("FLUSHALL")
            _fill(server, count, record)
            for side in (Run(), await bare_for(Target(server.url), SMALL)):
                await side.open(Target(server.url), 1)
                stack.push_async_callback(side.close)
                sides.append(_Among(side, count))

        async def sample(among: _Among) -> dict[str, float]:
            return await among.side.sequential(among.replay, among.some(stage.effort.sequential))

        series = await interleaved(sides, stage.effort, sample)
    for server, count in counts.items():
        with contextlib.closing(control(server)) as client:
            assert client.dbsize() == count  # all of them were replays
    stage.other.command("FLUSHALL")
    names = {side: [f"{side}:{count}" for count in counts.values()] for side in (OURS, BARE)}
    figures = {side: Spread.of(series.ratios(many, "p50", few)) for side, (few, many) in names.items()}
    note = "" if stage.effort.records == 1_000_000 else f"{stage.effort.records:,} records instead of 1,000,000"
    return {"replay_growth": Measured(figures[OURS], {s: Side(value) for s, value in figures.items()}, TIMES, note)}


class _Among:
    """A side on the server with so many records."""

    def __init__(self, side: Run | Bare, count: int) -> None:
        self.name = f"{BARE if isinstance(side, Bare) else OURS}:{count}"
        self.side = side
        self.replay = side.calls(SMALL).replay
        self._count = count
        self._prefix = "asyncidem:" if isinstance(side, Bare) else ""

    def some(self, count: int) -> Sequence[str]:
        """Return keys of records that are there."""
        return [f"{self._prefix}{_key(random.randrange(self._count))}" for _ in range(count)]


def _key(number: int) -> str:
    return f"record-{number:07d}"


def _fill(server: Server, count: int, record: bytes) -> None:
    """Write many records over one connection, a batch at a time."""
    batch = 10_000
    with socket.create_connection((HOST, server.port), timeout=60) as connection:
        replies = connection.makefile("rb")
        tail = b"\r\n$%d\r\n%s\r\n$2\r\nPX\r\n$%d\r\n%d\r\n" % (len(record), record, len(str(TTL * 1000)), TTL * 1000)
        for start in range(0, count, batch):
            keys = [f"asyncidem:{_key(number)}".encode() for number in range(start, min(start + batch, count))]
            connection.sendall(b"".join(b"*5\r\n$3\r\nSET\r\n$%d\r\n%s%s" % (len(key), key, tail) for key in keys))
            for _ in keys:
                assert replies.readline() == b"+OK\r\n"
