"""A store that fails where a test says so."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, TypeVar, get_args

from ..errors import ConfigurationError
from ..model import Stored, Swap
from ..stores.base import Store

__all__ = ["Call", "Fault", "FaultyStore"]

T = TypeVar("T")

Primitive: TypeAlias = Literal["put_if_absent", "read", "swap", "remove"]

Step: TypeAlias = BaseException | float | Callable[[], object] | None
"""An exception is raised, seconds pass, a function is called and what it returns awaited if it can be."""


class Call(NamedTuple):
    """A call of a primitive.

    Attributes:
        primitive: its name; ``put_or_read`` counts as ``put_if_absent``.
        key: the stored key, prefix included.
        at: the event loop's time.
    """

    primitive: Primitive
    key: str
    at: float


@dataclass(eq=False)
class Fault:
    """What goes wrong, where and how often; see :meth:`FaultyStore.fault`.

    Attributes:
        primitive: the primitive; None for each of them.
        before: the step before it acts.
        after: the step after it has acted, before its caller knows.
        skip: how many calls still go well first.
        times: how many calls it still concerns; None for all.
        when: further conditions on the stored key and the value to be written (empty where nothing is).
        reached: set when it happens for the first time.
    """

    primitive: Primitive | None = None
    before: Step = None
    after: Step = None
    skip: int = 0
    times: int | None = 1
    when: Callable[[str, bytes], bool] | None = None
    reached: asyncio.Event = field(default_factory=asyncio.Event)

    def _happens(self, primitive: Primitive, key: str, value: bytes) -> bool:
        """Say whether it happens at this call, and count."""
        if self.times == 0 or self.primitive not in (None, primitive):
            return False
        if self.when is not None and not self.when(key, value):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times = None if self.times is None else self.times - 1
        self.reached.set()
        return True


class FaultyStore(Store):
    """Another store, with faults at its primitives.

    ::

        store = FaultyStore(MemoryStore())
        down = StoreUnavailableError("down")
        store.fault("put_if_absent", before=down)            # the next claim fails, and nothing was written
        store.fault("swap", after=down)                      # the next completion is written, and its reply is lost
        store.fault("swap", before=down, times=None)         # no completion arrives any more
        store.fault("read", before=0.2, skip=1)              # the second read is late
        store.fault("remove", before=lambda: other.claim("k"))  # somebody comes in between

    What calls which primitive: a claim ``put_if_absent``; one that finds a record in progress ``read`` too, and a takeover
    ``put_if_absent`` of ``<key>:lock``, ``read`` and ``swap``; a completion and a renewal ``swap``; a release ``remove``,
    after a takeover ``swap`` and ``remove`` of the lock; ``get`` and a duplicate that waits ``read``; ``delete`` ``read``,
    then ``remove``, or ``swap`` of a record in progress.

    After an outcome that is not known the store repeats or undoes it in the background, as any store does: those calls
    meet the faults that are left.

    Args:
        store: the store that keeps the records. It is closed with this one.
        turns: how many turns of the event loop a primitive takes before it acts, and again before its caller knows. A
            ``MemoryStore`` alone takes none, so that nobody ever comes in between.

    Attributes:
        store: the store that keeps the records.
        turns: as above.
        calls: every call so far.
        faults: what is still to go wrong; of those that concern a call the first happens. Remove what should end.
    """

    def __init__(self, store: Store, *, turns: int = 0) -> None:
        if not isinstance(store, Store):  # pyright: ignore[reportUnnecessaryIsInstance] - callers without a type checker
            raise ConfigurationError(f"store must be a Store such as MemoryStore(), not {type(store).__name__}")
        names = store.format.attributes
        super().__init__(
            prefix=store.prefix,
            timeout=store.timeout,
            status_attr=names.status_attr,
            expiry_attr=names.expiry_attr,
            in_progress_expiry_attr=names.in_progress_expiry_attr,
            data_attr=names.data_attr,
            validation_key_attr=names.validation_key_attr,
            clock=store.clock,
            wall=store.wall,
        )
        self.store = store
        self.turns = turns
        self.calls: list[Call] = []
        self.faults: list[Fault] = []

    @property
    def lock_blocks_writes(self) -> bool:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the store that keeps the records guards its writes by locks, which may show late."""
        return self.store.lock_blocks_writes

    @property
    def counts(self) -> Counter[str]:
        """How often each primitive was called so far."""
        return Counter(call.primitive for call in self.calls)

    def fault(
        self,
        primitive: Primitive | None = None,
        *,
        before: Step = None,
        after: Step = None,
        skip: int = 0,
        times: int | None = 1,
        when: Callable[[str, bytes], bool] | None = None,
    ) -> Fault:
        """Let something go wrong.

        A step is an exception, or a class of them, which is raised; seconds, which pass; or a function, which is called, and what it returns
        awaited if it can be (``event.wait`` holds the call there).

        Args:
            primitive: the primitive; None for each of them.
            before: the step before the primitive acts. An exception there means that nothing was written.
            after: the step after it. An exception there is a lost reply: what was to be written is.
            skip: how many calls go well first.
            times: how many calls it concerns; None for all.
            when: only where this function of the stored key and the value to be written (empty where nothing is) says so.

        Returns:
            The fault: await its ``reached`` to know that it happened.

        Raises:
            ConfigurationError: there is no such primitive.
        """
        if primitive is not None and primitive not in get_args(Primitive):
            raise ConfigurationError(f"primitive must be one of {get_args(Primitive)}, or None, not {primitive!r}")
        fault = Fault(primitive, before, after, skip, times, when)
        self.faults.append(fault)
        return fault

    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        """Do it, with faults."""
        return await self._at("put_if_absent", key, value, lambda: self.store.put_if_absent(key, value, ttl_ms))

    async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        """Do it, with the faults of ``put_if_absent``."""
        return await self._at("put_if_absent", key, value, lambda: self.store.put_or_read(key, value, ttl_ms))

    async def read(self, key: str) -> Stored | None:
        """Do it, with faults."""
        return await self._at("read", key, b"", lambda: self.store.read(key))

    async def swap(
        self,
        key: str,
        expected: bytes,
        value: bytes,
        ttl_ms: int,
        *,
        exact: bool,
        or_absent: bool,
        left_ms: int | None = None,
    ) -> Swap:
        """Do it, with faults."""
        return await self._at(
            "swap",
            key,
            value,
            lambda: self.store.swap(key, expected, value, ttl_ms, exact=exact, or_absent=or_absent, left_ms=left_ms),
        )

    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        """Do it, with faults."""
        return await self._at("remove", key, b"", lambda: self.store.remove(key, expected, exact=exact))

    async def confirm(self, key: str, value: bytes) -> None:
        """Let the store that keeps the records confirm a renewal."""
        await self.store.confirm(key, value)

    async def aclose(self) -> None:
        """Close this store, and the one that keeps the records."""
        await super().aclose()
        await self.store.aclose()

    async def _at(self, primitive: Primitive, key: str, value: bytes, act: Callable[[], Awaitable[T]]) -> T:
        self.calls.append(Call(primitive, key, asyncio.get_running_loop().time()))
        fault = next((fault for fault in self.faults if fault._happens(primitive, key, value)), None)
        for _ in range(self.turns):
            await asyncio.sleep(0)
        if fault is not None:
            await _take(fault.before)
        result = await act()
        if fault is not None:
            await _take(fault.after)
        for _ in range(self.turns):
            await asyncio.sleep(0)
        return result


async def _take(step: Step) -> None:
    if isinstance(step, BaseException) or (isinstance(step, type) and issubclass(step, BaseException)):
        raise step
    if isinstance(step, int | float):
        await asyncio.sleep(step)
    elif step is not None:
        result = step()
        if inspect.isawaitable(result):
            await result
