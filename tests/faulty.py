"""A memory store with faults on the loop's clock, and tests that run on virtual time."""

import asyncio
import functools
import gc
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, ParamSpec, Self, TypeVar

import asyncidem.testing
from asyncidem import MemoryStore, StoreUnavailableError

from loops import run_virtual

P = ParamSpec("P")
T = TypeVar("T")

WALL: Final = 1_700_000_000
"""Unix time at the beginning of a virtual loop."""


def down() -> StoreUnavailableError:
    """Return what a store raises that does not answer."""
    return StoreUnavailableError("the store is down")


class FaultyStore(asyncidem.testing.FaultyStore):
    """The package's, over a `MemoryStore` with these options."""

    def __init__(self, *, turns: int = 0, **options: Any) -> None:
        super().__init__(MemoryStore(**options), turns=turns)

    @classmethod
    def here(cls, *, turns: int = 0, **options: Any) -> Self:
        """Return a store on the running loop's clock."""
        clock = asyncio.get_running_loop().time
        return cls(turns=turns, clock=clock, wall=lambda: WALL + clock(), **options)


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
