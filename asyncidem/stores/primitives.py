"""What every store gives: four atomic primitives over opaque bytes, and what may be said of one that failed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextvars import ContextVar, Token
from typing import TypeVar

from ..cancellation import LINGER, within_loop
from ..cutoffs import bounded, cutoff
from ..errors import IdempotencyError, StoreUnavailableError
from ..model import LEFT_UNKNOWN, Stored, Swap

__all__ = ["NotReplicatedError", "Primitives", "Within", "call_deadline", "enter_call", "leave_call"]

T = TypeVar("T")

call_deadline: ContextVar[float | None] = ContextVar("asyncidem_call_deadline", default=None)
"""When the store call that is running must have its answer, on ``time.monotonic``; primitives may look at it."""


def enter_call(seconds: float) -> Token[float | None]:
    """Begin a store call: its primitives share a deadline. A call inside a call keeps the outer one's."""
    if cutoff.get() is not None:
        seconds = bounded(seconds)
    return call_deadline.set(call_deadline.get() or time.monotonic() + seconds)


def leave_call(token: Token[float | None]) -> None:
    """End what ``enter_call`` began."""
    try:  # noqa: SIM105 - this is on the way of every call, and costs nothing there
        call_deadline.reset(token)
    except ValueError:  # closed as garbage in another context, whose deadline is not ours to end
        pass


class NotReplicatedError(StoreUnavailableError):
    """A write was answered, but too few replicas have it to count."""


class Within:
    """Bounds one store call, from ``enter_call`` to ``leave_call``."""

    __slots__ = ("_seconds", "_token")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._token = enter_call(self._seconds)

    def __exit__(self, *_: object) -> None:
        leave_call(self._token)


class Primitives(ABC):
    """Four atomic primitives, which a store implements, and how the lifecycle calls and repeats them.

    A primitive must be atomic; it is repeated after an unknown outcome, which one that is cancelled has too. It raises
    :class:`StoreError` for a refusal, after which nothing was written, and :class:`StoreUnavailableError` for what may
    pass. Any other exception is taken for an unknown outcome.
    """

    lock_blocks_writes = False
    """Whether a takeover's lock keeps others from writing (plain clients): it then goes when the claim is settled."""

    def __init__(self) -> None:
        self._background: set[asyncio.Task[None]] = set()

    @abstractmethod
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        """Write ``value`` for ``ttl_ms`` milliseconds if the key is absent.

        Returns:
            None if it was written, else the bytes that are there.
        """

    @abstractmethod
    async def read(self, key: str) -> Stored | None:
        """Return what is there and the milliseconds that it has left, or None if nothing is."""

    @abstractmethod
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
        """Write ``value`` for ``ttl_ms`` milliseconds if what is there is what is expected.

        Args:
            key: the stored key.
            expected: with ``exact`` the stored bytes, else what they begin with.
            value: the new bytes.
            ttl_ms: how long they live.
            exact: compare whole.
            or_absent: also write where the key is absent.
            left_ms: write only if the key's time left is not greater: greater, it was written again.
        """

    @abstractmethod
    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        """Delete the key if what is there is what is expected; say whether it was deleted."""

    async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        """Like ``put_if_absent``, with the time left of what is there, where the store can tell in one round trip."""
        return await self._put(key, value, ttl_ms)

    async def confirm(self, key: str, value: bytes) -> None:  # noqa: B027 - most stores have nothing more to wait for
        """Return once a renewal, which was written, counts: where a store waits for more than its own word.

        Every other write counts when its primitive returns. A renewal is in the way of what settles its claim, which
        must not wait for replicas while the lease runs out.
        """

    async def _put(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        found = await self.put_if_absent(key, value, ttl_ms)
        return None if found is None else Stored(found, LEFT_UNKNOWN)

    async def _call(self, primitive: Awaitable[T]) -> T:
        try:
            return await primitive
        except Exception as error:  # noqa: BLE001 - whatever a client throws in the middle of a command
            raise self._known(error)  # noqa: B904 - its cause is set

    def _known(self, error: Exception) -> IdempotencyError:
        """Return ``error`` if it is ours; any other means that the outcome is not known."""
        if isinstance(error, IdempotencyError):
            return error
        unknown = StoreUnavailableError(f"{type(self).__name__} failed: {type(error).__name__}: {error}")
        unknown.__cause__ = error
        return unknown

    def _spawn(self, step: Callable[[], Awaitable[None]], seconds: float) -> asyncio.Task[None]:
        """Repeat an idempotent step in the background until it is answered, at most for ``seconds``."""
        task = asyncio.get_running_loop().create_task(within_loop(functools.partial(self._repeat, step, seconds)))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _repeat(self, step: Callable[[], Awaitable[None]], seconds: float) -> None:
        """Repeat an idempotent step until it is answered, at most for ``seconds``.

        Cancelled, it goes on for ``LINGER`` seconds: ``asyncio.run`` cancels every task at its end, and this one may
        be what its cancelled caller waits for.
        """
        call_deadline.set(None)  # in this task's own context: what is repeated is a new call
        cutoff.set(None)  # and may outlast the work that began it: a frozen process goes on with the next
        clock = asyncio.get_running_loop().time
        end, pause, ending = clock() + seconds, 0.05, False
        while True:
            try:
                async with asyncio.timeout_at(end):
                    with contextlib.suppress(StoreUnavailableError):
                        await step()
                        return
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, 1.0)
            except asyncio.CancelledError:
                if ending:
                    raise
                end, ending = min(end, clock() + LINGER), True
                # The end of the loop cancels again in every turn: a command that was begun after it would have no end.
                await asyncio.sleep(0)
            except TimeoutError:
                return  # the lease is over: others may take over now, and nothing more is owed
            except IdempotencyError:
                return  # answered: fenced off, or refused

    async def _end_background(self, seconds: float) -> None:
        """Give what is still repeated ``seconds``, then stop it. Tasks of other loops died with them."""
        loop = asyncio.get_running_loop()
        mine = {task for task in self._background if task.get_loop() is loop}
        if mine:
            _, late = await asyncio.wait(mine, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
