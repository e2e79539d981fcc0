"""A memory store whose primitives suspend, are late, fail or lose their reply, and tests that run on virtual time."""

import asyncio
import functools
import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, ParamSpec, Self, TypeAlias, TypeVar

from asyncidem import MemoryStore, StoreUnavailableError
from asyncidem.model import Stored, Swap

from loops import run_virtual

P = ParamSpec("P")
T = TypeVar("T")

Step: TypeAlias = BaseException | float | asyncio.Event | Callable[[], object] | None
"""What happens at a primitive: an exception is raised, seconds pass, an event is awaited, a function is called."""

WALL: Final = 1_700_000_000
"""Unix time at the beginning of a virtual loop."""


def down() -> StoreUnavailableError:
    """Return what a store raises that does not answer."""
    return StoreUnavailableError("the store is down")


@dataclass
class Fault:
    """What goes wrong at a primitive, and how often.

    Attributes:
        primitive: `put_if_absent`, `read`, `swap` or `remove`; None for each of them.
        before: the step that comes before the primitive: an exception there means that nothing was written.
        after: the step that comes after it: an exception there is a lost reply.
        skip: how many calls go well first.
        times: how many calls it concerns; None for all.
        when: further conditions on the call's key and the value written.
    """

    primitive: str | None = None
    before: Step = None
    after: Step = None
    skip: int = 0
    times: int | None = 1
    when: Callable[[str, bytes], bool] = lambda _key, _value: True
    reached: asyncio.Event = field(default_factory=asyncio.Event)

    def concerns(self, primitive: str, key: str, value: bytes) -> bool:
        """Say whether it happens at this call, and count."""
        if self.times == 0 or self.primitive not in (None, primitive) or not self.when(key, value):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times = None if self.times is None else self.times - 1
        self.reached.set()
        return True


class FaultyStore(MemoryStore):
    """A `MemoryStore` with faults.

    Attributes:
        turns: how many turns of the loop each primitive takes before it acts, and again after it.
        calls: each primitive called so far: its name, its key and the loop's time.
        faults: what goes wrong; the first that concerns a call happens.
    """

    def __init__(self, *, turns: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.turns = turns
        self.calls: list[tuple[str, str, float]] = []
        self.faults: list[Fault] = []

    @classmethod
    def here(cls, *, turns: int = 0, **options: Any) -> Self:
        """Return a store on the running loop's clock."""
        clock = asyncio.get_running_loop().time
        return cls(turns=turns, clock=clock, wall=lambda: WALL + clock(), **options)

    @property
    def counts(self) -> Counter[str]:
        """How often each primitive was called."""
        return Counter(name for name, _, _ in self.calls)

    def fault(self, primitive: str | None = None, **options: Any) -> Fault:
        """Add a fault."""
        self.faults.append(Fault(primitive, **options))
        return self.faults[-1]

    async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        return await self._at(
            "put_if_absent", key, value, lambda: super(FaultyStore, self).put_or_read(key, value, ttl_ms)
        )

    async def read(self, key: str) -> Stored | None:
        return await self._at("read", key, b"", lambda: super(FaultyStore, self).read(key))

    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return await self._at(
            "swap", key, value, lambda: super(FaultyStore, self).swap(key, expected, value, ttl_ms, **how)
        )

    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        return await self._at("remove", key, b"", lambda: super(FaultyStore, self).remove(key, expected, exact=exact))

    async def _at(self, primitive: str, key: str, value: bytes, act: Callable[[], Awaitable[T]]) -> T:
        self.calls.append((primitive, key, asyncio.get_running_loop().time()))
        fault = next((one for one in self.faults if one.concerns(primitive, key, value)), Fault())
        for _ in range(self.turns):
            await asyncio.sleep(0)
        await _take(fault.before)
        result = await act()
        await _take(fault.after)
        for _ in range(self.turns):
            await asyncio.sleep(0)
        return result


async def _take(step: Step) -> None:
    if isinstance(step, BaseException):
        raise step
    if isinstance(step, asyncio.Event):
        await step.wait()
    elif isinstance(step, int | float):
        await asyncio.sleep(step)
    elif step is not None:
        step()


async def quiet(main: Awaitable[T], noise: list[dict[str, Any]] | None = None) -> T:
    """Await `main`; every task that is left, and what the loop complains about, is a failure.

    With `noise` the complaints are collected there instead, for a caller that runs many loops and looks once.
    """
    loop = asyncio.get_running_loop()
    heard = [] if noise is None else noise
    loop.set_exception_handler(lambda _, context: heard.append(context))
    result = await main
    await asyncio.sleep(0)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks were left behind: {left}"
    if noise is None:
        gc.collect()  # a task or future whose exception nobody took complains when it goes
        assert not heard, f"the loop complained: {heard}"
    return result


def virtual(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Make a test of a coroutine function: it runs on virtual time, and may leave no task and no noise behind."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        run_virtual(quiet(test(*args, **kwargs)))

    return run


async def settle(turns: int = 20) -> None:
    """Let whatever is ready run, without time passing."""
    for _ in range(turns):
        await asyncio.sleep(0)
