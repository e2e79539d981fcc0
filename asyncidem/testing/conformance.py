"""Whether a store keeps the contract that the protocol builds on."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from ..durations import Duration, to_ms
from ..errors import ConfigurationError
from ..stores.base import Store
from .bench import Bench, BreachError
from .checks import CHECKS
from .races import RACES

__all__ = ["ConformanceError", "StoreConformance"]

RUN_WITHIN: Final = 60.0
CHECK_WITHIN: Final = 10.0
"""Seconds that the whole run and one check may take, where that many primitives do not take longer:"""

RUN_PACES: Final = 1500
CHECK_PACES: Final = 100
"""Of a store that does one after the other the whole run needs 1134, and the longest check 62."""


class ConformanceError(AssertionError):
    """A store breaks its contract.

    It is the verdict of a test, so test runners count it as a failure; and no ``except IdempotencyError`` of an application
    takes it for something that happens in operation.

    Attributes:
        breaches: each one in a sentence: what was checked, and what was found.
    """

    def __init__(self, store: str, breaches: tuple[str, ...]) -> None:
        number = "one way" if len(breaches) == 1 else f"{len(breaches)} ways"
        super().__init__("\n  - ".join((f"{store} breaks the contract of a store in {number}:", *breaches)))
        self.store = store
        self.breaches = breaches

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by what it is made of: a parallel test run sends it between processes."""
        return type(self), (self.store, self.breaches)


class StoreConformance:
    """Holds a store to the contract of the four primitives, and reports every breach.

    ::

        async def test_my_store() -> None:
            await StoreConformance(lambda: MyStore("records.db")).run()

    The primitives' comparisons, ttls and answers, values and keys that a store may mangle, races, cancelled calls, and the
    life of a key on top of them. It takes about a second of real time for expiries, or none with a clock of yours, and
    needs no empty data: it writes under keys of its own, and removes them.

    Args:
        make_store: returns a new store each time, or an awaitable of one. It is called twice, for two workers: where they
            see the same data, the races run between them, else among tasks on the first. The kit closes both.
        advance: lets that many seconds pass for the store, such as ``ManualClock.advance``; by default they are waited for.
            The store's ``clock`` must move with them.
        timeout: seconds that the whole run may take; by default a minute, and more for a store whose primitives take
            more than 40 ms.

    Raises:
        ConfigurationError: an argument that cannot work.
    """

    def __init__(
        self,
        make_store: Callable[[], Store | Awaitable[Store]],
        *,
        advance: Callable[[float], object] = asyncio.sleep,
        timeout: Duration | None = None,
    ) -> None:
        if not callable(make_store):
            raise ConfigurationError(f"make_store must be a function that returns a new store, not {make_store!r}")
        self._make_store = make_store
        self._advance = advance
        self._timeout = None if timeout is None else to_ms(timeout, "timeout") / 1000
        self._breaches: list[str] = []

    async def run(self) -> None:
        """Check everything.

        Raises:
            ConformanceError: the store breaks its contract; the error lists all breaches.
            ConfigurationError: what ``make_store`` returned is no store.
        """
        self._breaches = []
        stores: list[Store] = []
        try:
            stores.append(await self._make())
            stores.append(await self._make())
            await self._check(stores)
        finally:
            for store in stores:
                await self._attempt("aclose", store.aclose())
        if self._breaches:
            raise ConformanceError(type(stores[0]).__name__, tuple(self._breaches))

    async def _make(self) -> Store:
        made = self._make_store()
        store = await made if inspect.isawaitable(made) else made
        if not isinstance(store, Store):  # pyright: ignore[reportUnnecessaryIsInstance] - callers without a type checker
            raise ConfigurationError(f"make_store must return a Store, not {type(store).__name__}")
        return store

    async def _check(self, stores: list[Store]) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        first, second = stores
        bench = Bench(first, first, self._advance)
        # What fails while nothing is known of the store fails again below, and is reported there.
        if await self._attempt("", _share(bench, second)):
            bench.second = second
        self._breaches.clear()
        timeout = max(RUN_WITHIN, RUN_PACES * bench.pace) if self._timeout is None else self._timeout
        within = max(CHECK_WITHIN, CHECK_PACES * bench.pace)
        for number, (title, check) in enumerate(checks := (*CHECKS, *RACES)):
            left = began + timeout - clock()
            if left <= 0:
                self._breaches.append(
                    f"{len(checks) - number} checks were not made within {timeout:g} s; a store that is slow needs a "
                    f"greater timeout"
                )
                break
            await self._attempt(title, check(bench), min(within, left))
        breaches = list(self._breaches)
        await self._attempt("", _clean(bench), max(CHECK_WITHIN, RUN_PACES * bench.pace))
        self._breaches = breaches

    async def _attempt(self, title: str, work: Coroutine[Any, Any, Any], within: float = CHECK_WITHIN) -> Any:
        """Do ``work``, and report what is wrong with it; return its result, None without one."""
        task = asyncio.ensure_future(work)
        try:
            # Not with a time-out around it: a store that swallows cancellation must not hold up the run.
            await asyncio.wait((task,), timeout=within)
        finally:
            if late := not task.done():
                task.cancel()
                await asyncio.wait((task,), timeout=1)
        if not task.done():
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody else will ask for it
            self._breaches.append(f"{title}: no answer within {within:g} s, nor an end when it was cancelled")
        elif late:
            self._breaches.append(f"{title}: no answer within {within:g} s")
        elif task.cancelled():
            self._breaches.append(f"{title}: raised CancelledError, and nobody had cancelled it")
        elif isinstance(error := task.exception(), BreachError):
            self._breaches.append(f"{title}: {error}")
        elif isinstance(error, Exception):
            self._breaches.append(f"{title}: raised {error!r}")
        elif error is not None:
            raise error  # what interrupts a process
        else:
            return task.result()
        return None


async def _share(bench: Bench, other: Store) -> bool:
    """Say whether another store sees the same data, and see how long a primitive takes."""
    key, clock = bench.key(), asyncio.get_running_loop().time
    await bench.first.put_if_absent(key, b"probe", 10_000)  # it may have to connect first
    shared = await other.read(key) is not None
    began = clock()
    await bench.first.put_if_absent(key, b"probe", 10_000)
    wrote = clock()
    await bench.first.read(key)
    bench.pace = max(wrote - began, clock() - wrote)
    return shared


async def _clean(bench: Bench) -> None:
    for start in range(0, len(bench.names), 20):
        keys = [bench.first.prefix + name for name in bench.names[start : start + 20]]
        await asyncio.gather(*(bench.first.remove(key, b"", exact=False) for key in keys), return_exceptions=True)
