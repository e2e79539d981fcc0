"""What is explored: a scenario, who calls in it, and what may happen next at each moment."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import anyio

from schedules.law import Effect
from schedules.network import Command, NetworkStore
from schedules.processes import Process

MAX_STEPS: Final = 400
"""Choices after which a run is stuck in something that never ends."""

MAX_TURNS: Final = 4000
"""Moments at which timers are due, while time passes once, after which that never ends."""

FREE: Final = frozenset({"do", "answer", "return", "tick", "call", "late"})
"""What happens without anything going wrong, and in any order."""

ALL_FAULTS: Final = frozenset(
    {"time", "leap", "doze", "lost", "unknown", "refuse", "slow", "crash", "cancel", "cut", "raise"}
)


class Option(NamedTuple):
    """Something that may happen next.

    `do`: the server carries a command out, and its reply arrives. `slow`: only the former; `answer`: the reply arrives.
    `lost`: carried out, and its caller meets an error instead of the reply. `unknown`: that error comes first, and
    `late` the server carries it out, perhaps. `refuse`: the caller learns that nothing was written. `return`, `raise`:
    the handler ends. `call`: a caller comes. `crash`, `cancel`: of a process, of a caller; `cut`: cancelled in the
    moment in which the reply, or the handler's end, arrives. `time`: to the next timer or deadline; `leap`: to the next
    deadline on the server; `doze`: likewise, while one process misses its timers, which it has later, at a `tick`.
    """

    kind: str
    process: Process | None = None
    what: Any = None

    def __str__(self) -> str:
        where = "" if self.process is None or isinstance(self.what, Command) else f" P{self.process.number}"
        return f"{self.kind} {self.what}" if isinstance(self.what, Command) else f"{self.kind}{where}"


class Call:
    """A caller of the operation."""

    def __init__(self, process: Process, number: int) -> None:
        self.process = process
        self.label = f"P{process.number}.{number}"
        self.events: list[str] = []
        self.gate: asyncio.Future[None] | None = None
        self.effect: Effect | None = None
        self.task: asyncio.Task[None] | None = None
        self.scope: anyio.CancelScope | None = None
        self.cancelled_at: int | None = None


@dataclass(frozen=True)
class Scenario:
    """What is explored.

    Attributes:
        processes: how many workers, each with a store of its own on the one server.
        calls: how many calls each of them makes, one after the other.
        at_once: how many calls of a process may be under way at the same time.
        lease: seconds; a result lives three times as long.
        options: further options of `Idempotency`.
        orphan: how the run begins: None with no record; seconds, with the record of a dead owner that has so much lease
            left.
        faults: what may go wrong.
        skews: seconds by which the wall clocks of the processes are ahead.
        anyio: cancellations come at every await.
        store: makes the store of a process.
        run: what a caller does; by default it runs the operation on its process' `Idempotency`.
    """

    name: str
    processes: int = 2
    calls: int = 1
    at_once: int = 1
    lease: int = 30
    options: dict[str, Any] = field(default_factory=dict)
    orphan: float | None = None
    faults: frozenset[str] = ALL_FAULTS
    skews: tuple[float, ...] = (0, 300, -300)
    anyio: bool = False
    store: Callable[[Process, Any], Any] = NetworkStore
    run: Callable[[Any, Call], Awaitable[Any]] | None = None
