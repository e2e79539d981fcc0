"""A process of the simulation: an event loop that is stepped from outside, with clocks of its own.

Each worker has one, as it has in production: what one process does takes no turn of another's loop, a process that
sleeps misses its timers, and one that crashed never runs again, without a `finally` of its coroutines.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import Any, Final

WALL: Final = 1_700_000_000
"""Unix time when a simulation begins, on a clock without skew."""

SPIN: Final = 24
"""Turns after which a loop that never comes to rest is left for now: anyio repeats a cancellation at every turn."""

GRAIN: Final = 1e-6


class Process(asyncio.BaseEventLoop):
    """An event loop without a selector.

    Args:
        number: which process it is.
        now: microseconds since the simulation began.
        skew: seconds that its wall clock is ahead.

    Attributes:
        crashed: it never runs again.
        history: a digest of all that has happened to it. What it does next depends on nothing else.
        noise: what its loop complained about.
    """

    def __init__(self, number: int, now: Callable[[], int], skew: float) -> None:
        super().__init__()
        self._selector = self  # a loop asks it for I/O, of which there is none
        self._clock_resolution = GRAIN
        self._now = now
        self._turns = 0
        self._tokens = 0
        self._tasks: list[asyncio.Task[Any]] = []
        self.number = number
        self.skew = skew
        self.origin = 1000.0 * number  # monotonic clocks count from wherever they like
        self.crashed = False
        self.history = number
        self.noise: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.noise.append(context))
        self.set_task_factory(self._make_task)

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **options)
        self._tasks.append(task)
        return task

    def time(self) -> float:
        """Return monotonic seconds, which pass at the same rate in all processes."""
        return self.origin + self._now() / 1e6

    def wall(self) -> float:
        """Return unix seconds as this process believes them to be."""
        return WALL + self.skew + self._now() / 1e6

    def token(self) -> str:
        """Return a new owner token: the same one in every run of the same schedule."""
        self._tokens += 1
        return f"{self.number:x}{self._tokens:031x}"

    def note(self, *what: object) -> None:
        """Remember that something happened to this process."""
        self.history = hash((self.history, what))

    def turn(self) -> None:
        """Run whatever is ready, until nothing is."""
        self._turns = 0
        self.run_forever()

    def next_timer(self) -> int | None:
        """Return when, in the simulation's microseconds, the next timer is due.

        It is the first one behind that moment: clocks move on between a timer and what it calls.
        """
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        whens = [handle.when() for handle in scheduled if not handle.cancelled()]
        return math.floor((min(whens) - self.origin) * 1e6 + 1e-2) + 1 if whens else None

    def end(self) -> None:
        """Close what is left of it."""
        for task in self._tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                with contextlib.suppress(BaseException):
                    task.get_coro().close()
        self._ready.clear()  # type: ignore[attr-defined]
        self._scheduled.clear()  # type: ignore[attr-defined]
        self.close()

    # -- what a loop asks of its selector -------------------------------------------------------------------------------

    def select(self, timeout: float | None) -> list[Any]:
        """Let the loop run on as long as something is ready."""
        self._turns += 1
        if timeout is None or timeout > GRAIN or self._turns > SPIN:
            self._stopping = True
        return []

    def _process_events(self, events: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass
