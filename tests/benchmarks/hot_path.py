"""Where the time of a call goes, and how many calls a core of a client and of a server carries.

Run it with ``python tests/benchmarks/hot_path.py`` where asyncidem and the dependency group ``test`` are installed; with
``REDIS_URL`` set, against that server, whose data it leaves alone but for keys of its own prefix.

Times are medians in microseconds. A lone call's are by the wall: from its beginning to the write, the write itself
(packing and the system call), the wait for the server and the loop, the reading of the reply, and from there to the end.
A crowd's are processor time, the client's and, by ``INFO``, the server's. The parts of a large result are what a codec and
the record take of it, each a stretch in which the event loop does nothing else.
"""

import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from asyncidem import Idempotency, JSONCodec, MsgspecCodec, RedisStore
from asyncidem.model import SCAN, quote
from asyncidem.stores.channel import Channel, MultiplexedWire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sides import large

from servers import BINARIES, Server, find_binary

CALLS = 2_000
CROWD = 12_800
PREFIX = "asyncidem-hot-path:"
PHASES = ("before", "write", "wait", "read", "after")


@contextlib.contextmanager
def server_url() -> Iterator[str]:
    """A server of our own, or the one that the environment names."""
    if url := os.environ.get("REDIS_URL"):
        yield url
        return
    kind = next(kind for kind in BINARIES if find_binary(kind))
    with tempfile.TemporaryDirectory() as directory, Server(kind, Path(directory)) as server:
        yield server.url


@contextlib.contextmanager
def stamped(stamps: dict[str, list[float]]) -> Iterator[None]:
    """Note when commands are written and replies read."""

    def wrap(owner: Any, name: str, begun: str, ended: str) -> Callable[[], None]:
        real = getattr(owner, name)

        def wrapped(*args: Any) -> Any:
            stamps[begun].append(time.perf_counter())
            try:
                return real(*args)
            finally:
                stamps[ended].append(time.perf_counter())

        setattr(owner, name, wrapped)
        return lambda: setattr(owner, name, real)

    undo = [wrap(Channel, "send", "write", "written"), wrap(MultiplexedWire, "data_received", "reply", "read")]
    try:
        yield
    finally:
        for restore in undo:
            restore()


async def lone(call: Callable[[str], Awaitable[Any]], keys: list[str], commands: int) -> dict[str, float]:
    """Return the median of each phase of a call that is alone, over all its commands."""
    stamps: dict[str, list[float]] = {name: [] for name in ("write", "written", "reply", "read")}
    rows: list[dict[str, float]] = []
    with stamped(stamps):
        for key in keys:
            for times in stamps.values():
                times.clear()
            began = time.perf_counter()
            await call(key)
            ended = time.perf_counter()
            assert all(len(times) == commands for times in stamps.values())
            write, written, reply, read = (stamps[name] for name in ("write", "written", "reply", "read"))
            before = write[0] - began + sum(write[n] - read[n - 1] for n in range(1, commands))
            rows.append(
                {
                    "before": before,
                    "write": sum(done - start for start, done in zip(write, written, strict=True)),
                    "wait": sum(start - done for done, start in zip(written, reply, strict=True)),
                    "read": sum(done - start for start, done in zip(reply, read, strict=True)),
                    "after": ended - read[-1],
                    "total": ended - began,
                }
            )
    return {name: statistics.median(row[name] for row in rows) * 1e6 for name in (*PHASES, "total")}


async def crowd(
    call: Callable[[str], Awaitable[Any]], name: str, tasks: int, server: redis.Redis
) -> tuple[float, float]:
    """Return the microseconds of processor time of a call among many, the client's and the server's."""

    async def work(worker: int) -> None:
        for number in range(CROWD // tasks):
            await call(f"{name}-{worker}-{number}")

    before, began = used(server), time.process_time()
    await asyncio.gather(*(work(worker) for worker in range(tasks)))
    client, served = time.process_time() - began, used(server) - before
    calls = CROWD // tasks * tasks
    return client / calls * 1e6, served / calls * 1e6


def parts(size: int) -> dict[str, float]:
    """Return the median of each part of the work on a result of about so many bytes."""
    result = large(size)
    text = json.dumps(result)
    quoted = quote(text)
    ours, fast = JSONCodec(), MsgspecCodec()
    works: dict[str, Callable[[], Any]] = {
        "json.dumps": lambda: json.dumps(result),
        "encode": lambda: ours.encode(result),
        "msgspec": lambda: fast.encode(result),
        "quote": lambda: quote(text),
        "unquote": lambda: SCAN(quoted, 1),
        "json.loads": lambda: json.loads(text),
        "decode": lambda: ours.decode(text, Any),
        "by msgspec": lambda: fast.decode(text, Any),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(9):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def used(server: redis.Redis) -> float:
    """Return the seconds of processor time that the server has used."""
    cpu: Any = server.info("cpu")
    return float(cpu["used_cpu_sys"] + cpu["used_cpu_user"])


async def measure(url: str) -> None:
    """Measure and print."""
    async with RedisStore.from_url(url, prefix=PREFIX) as store:
        idem = Idempotency(store, ttl=60)

        @idem.idempotent(key="key", name="hot-path")
        async def call(key: str) -> dict[str, Any]:
            return {"id": 42, "paid": True}

        run = f"{time.time_ns():x}"
        keys = [f"{run}-{number}" for number in range(CALLS)]
        await call(f"{run}-warm")
        print(f"{'A call on its own, µs':28}" + "".join(f"{phase:>8}" for phase in (*PHASES, "total")))
        for label, commands in (("first call, two commands", 2), ("replay, one command", 1)):
            phases = await lone(call, keys, commands)
            print(f"{label:28}" + "".join(f"{phases[phase]:8.0f}" for phase in (*PHASES, "total")))
        with contextlib.closing(redis.Redis.from_url(url)) as server:
            print(f"\n{'Calls of a crowd, CPU in µs':28}{'client':>8}{'server':>8}   per core of client, of server")
            for tasks in (1, 8, 64, 256):
                for label in ("first call", "replay"):
                    client, served = await crowd(call, f"{run}-{tasks}", tasks, server)
                    row = f"{label}, {tasks} tasks"
                    print(f"{row:28}{client:8.1f}{served:8.1f}   {1e6 / client:,.0f}/s, {1e6 / served:,.0f}/s")
        for size in (100_000, 5_000_000):
            of = parts(size)
            print(f"\n{f'Of a result of {size:,} bytes':28}" + "".join(f"{name:>12}" for name in of))
            print(f"{'µs':28}" + "".join(f"{value:12,.0f}" for value in of.values()))
            for key in server.scan_iter(f"{PREFIX}*", count=1000):
                server.unlink(key)


if __name__ == "__main__":
    with server_url() as where:
        asyncio.run(measure(where))
