"""Where the scenarios play: the servers of a run, and what may be asked of them beside the measurement."""

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, TypeVar

import redis
from benchmarks.harness import Effort
from benchmarks.peers import PEERS
from benchmarks.sides import Decorated, Direct, Plain, Run, Side, Target, takes_plain_path

from servers import Server

T = TypeVar("T")

KEEP_NOTHING: Final = ("--appendonly", "no")

UNCOUNTED: Final = ("info", "config", "client", "hello", "auth", "select", "command", "flushall", "pttl", "script")
"""Commands that are no round trips of a store's work: the benchmark's own, a connection's first, and PTTL, which goes out
with the command before it."""


@dataclass(slots=True)
class Stage:
    """The servers, and how much is to be measured.

    Attributes:
        kind: of the servers, ``valkey`` or ``redis``.
        directory: for the files of further servers.
        server: the one that most scenarios use.
        other: one that is idle otherwise.
        effort: how much is measured.
        with_peers: whether the peers take part.
    """

    kind: str
    directory: Path
    server: Server
    other: Server
    effort: Effort
    with_peers: bool

    @property
    def target(self) -> Target:
        """Return where the first server is."""
        return Target(self.server.url)

    async def flush(self) -> None:
        """Empty the first server; connections and scripts stay."""
        self.server.command("FLUSHALL")

    def ours(self) -> list[Side]:
        """Return our levels: the judged one, and the others where there is time for them."""
        sides: list[Side] = [Decorated()]
        if self.effort.every_side:
            sides += [Run(), Direct()]
            if takes_plain_path(self.target):
                sides.append(Plain())
        return sides

    def peers(self) -> list[Side]:
        """Return the peers, if they take part."""
        return [make() for make in PEERS] if self.with_peers else []


@contextlib.contextmanager
def stage(kind: str, directory: Path, effort: Effort, *, with_peers: bool) -> Iterator[Stage]:
    """Start two servers, and end them."""
    with (
        Server(kind, directory / "one", *KEEP_NOTHING) as server,
        Server(kind, directory / "other", *KEEP_NOTHING) as other,
    ):
        yield Stage(kind, directory, server, other, effort, with_peers)


def control(server: Server) -> redis.Redis:
    """Return a synchronous client for what is not measured."""
    return redis.Redis.from_url(server.url)


def round_trips(client: redis.Redis) -> int:
    """Return how many round trips of work the server has had since ``CONFIG RESETSTAT``.

    What a script calls inside counts as well: the figure may be too high, never too low.
    """
    stats: Any = client.info("commandstats")
    names = {name: name.removeprefix("cmdstat_").partition("|")[0] for name in stats}
    return sum(stats[full]["calls"] for full, name in names.items() if name not in UNCOUNTED)


def resident() -> float:
    """Return the megabytes (10^6 bytes) of memory that this process has now; where it cannot tell, had at most."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS, the only one without /proc
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def in_a_process(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a new process, whose memory holds nothing of this one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
