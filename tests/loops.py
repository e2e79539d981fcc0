"""An event loop whose clock jumps instead of waiting, and helpers that cancel a coroutine at an exact moment."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

DEADLOCK_AFTER: Final = 5.0
"""Real seconds without timer, ready callback or I/O after which a virtual loop says that it is stuck."""


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that moves the loop's clock on where it would have waited."""

    loop: "VirtualTimeLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # The loop selects exactly once per turn.
        if self.loop._turn(idle=timeout is None):
            timeout = 0
        # The loop's own wake-up pipe is always there; anything beyond it is I/O, which takes real time.
        waits_for_io = len(self.get_map()) > 1
        if timeout is None:
            events = super().select(None if waits_for_io else DEADLOCK_AFTER)
            if not events and not waits_for_io:
                message = "deadlock: no timer, no callback and no I/O is left that could wake anything"
                raise RuntimeError(message)
            return events
        events = super().select(timeout if waits_for_io else 0)
        if not events:
            self.loop._now += timeout
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop for deterministic tests: when nothing is ready, `time()` jumps to the next timer at once.

    `time()` begins at 0. With sockets open it waits for them in real time, up to the next timer. `tick` is how many
    seconds each turn of the loop takes: code that spins (anyio repeats a cancellation every turn) needs time to pass.
    """

    def __init__(self, *, tick: float = 0.0) -> None:
        """Create a loop whose clock stands at 0."""
        self._now = 0.0
        self._tick = tick
        self.ticks = 0
        self._at_tick: dict[int, list[Callable[[], object]]] = {}
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        """Return virtual seconds since the loop was made."""
        return self._now

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for threads as long as it takes: a timer for it would fire at once."""
        await super().shutdown_default_executor()

    def call_at_tick(self, tick: int, callback: Callable[[], object]) -> None:
        """Call back just before turn `tick` of the loop, counted from now; 1 is the next turn."""
        self._at_tick.setdefault(self.ticks + tick, []).append(callback)

    def _turn(self, *, idle: bool) -> bool:
        self.ticks += 1
        self._now += self._tick
        callbacks = self._at_tick.pop(self.ticks, [])
        for callback in callbacks:
            callback()
        # An idle loop goes on turning towards callbacks that are still to come.
        return bool(callbacks) or (idle and bool(self._at_tick))


def run_virtual(main: Coroutine[Any, Any, T], *, tick: float = 0.0, debug: bool | None = None) -> T:
    """Run `main` to its end on a new `VirtualTimeLoop`, as `asyncio.run` would."""
    with asyncio.Runner(debug=debug, loop_factory=lambda: VirtualTimeLoop(tick=tick)) as runner:
        return runner.run(main)


@dataclass(frozen=True, slots=True)
class CancelledRun(Generic[T]):
    """The end of a coroutine that was to be cancelled: `reached` says whether it lived long enough for it.

    `task` is done; ask it for `cancelled()`, `exception()` or `result()`.
    """

    reached: bool
    task: asyncio.Task[T]


async def cancel_at_tick(coro: Coroutine[Any, Any, T], tick: int) -> CancelledRun[T]:
    """Run `coro` as a task, cancel it at turn `tick` of the virtual loop (1 is before its first step), await its end.

    This also hits the moments between awaits: a result that has arrived and that the task has not seen yet.
    """
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop), "cancel_at_tick needs run_virtual"
    task = loop.create_task(coro)
    reached = False

    def cancel() -> None:
        nonlocal reached
        reached = task.cancel()

    loop.call_at_tick(tick, cancel)
    await asyncio.wait([task])
    return CancelledRun(reached, task)


class _Steps(Generic[T]):
    """An awaitable that drives a coroutine and cancels the current task where it suspends."""

    def __init__(self, coro: Coroutine[Any, Any, T], suspension: int, *, every: bool) -> None:
        self.coro = coro
        self.suspension = suspension
        self.every = every
        self.count = 0

    def __await__(self) -> Generator[Any, Any, T]:
        step: Callable[[], Any] = lambda: self.coro.send(None)
        try:
            while True:
                waiter = step()
                self.count += 1
                if self.count == self.suspension or (self.every and self.count > self.suspension):
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()
                try:
                    value = yield waiter
                except BaseException as error:
                    step = lambda error=error: self.coro.throw(error)
                else:
                    step = lambda value=value: self.coro.send(value)
        except StopIteration as stop:
            result: T = stop.value
            return result


async def cancel_at_await(coro: Coroutine[Any, Any, T], suspension: int, *, every: bool = False) -> CancelledRun[T]:
    """Run `coro` as a task, cancel it where it suspends for the nth time (1 is the first), and await its end.

    It works on every loop and over real servers. With `every` it is cancelled at each later suspension too, as anyio
    does it; on a virtual loop that needs a `tick`.
    """
    steps = _Steps(coro, suspension, every=every)

    async def run() -> T:
        return await steps

    task = asyncio.get_running_loop().create_task(run())
    await asyncio.wait([task])
    return CancelledRun(steps.count >= suspension, task)
