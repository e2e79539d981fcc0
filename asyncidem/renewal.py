"""Keeps leases alive: one renewer for all the claims of a store on one event loop, one timer for all of them."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable
from contextvars import Context
from itertools import islice, takewhile
from typing import Final, Protocol

from .errors import LeaseLostError, StoreError
from .model import Claimed

__all__ = ["Holder", "Renewer"]

SLICE: Final = 500
"""How many renewals of one queue begin in one turn of the loop."""


class Holder(Protocol):
    """Who hears of a claim's renewals."""

    def renewed(self) -> None:
        """The lease began anew."""
        ...

    def lost(self, error: LeaseLostError) -> None:
        """Another owner holds the key."""
        ...


class Renewer:
    """Renews the claims that it holds at a third of their lease, and sooner again where the store did not answer.

    Claims that fall due after the same delay stand in one queue, in the order of their arrival, which is the order in
    which they fall due. So holding and dropping a claim costs a dictionary entry, and no task or timer of its own.

    Args:
        renew: ``store.renew``.
        loop: the event loop that the claims' operations run on.
    """

    def __init__(self, renew: Callable[[Claimed], Awaitable[None]], loop: asyncio.AbstractEventLoop) -> None:
        self._renew = renew
        self._loop = loop
        self._queues: dict[int, dict[Claimed, tuple[float, weakref.ref[Holder]]]] = {}
        self._delays: dict[Claimed, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    def hold(self, claim: Claimed, holder: Holder) -> None:
        """Renew ``claim`` from now on, as long as ``holder`` lives: who was forgotten without an end blocks nobody."""
        self._queue(claim, weakref.ref(holder), claim._lease_ms // 3 or 1)

    def drop(self, claim: Claimed) -> None:
        """Renew ``claim`` no more. A renewal in flight is the store's to wait for."""
        delay = self._delays.pop(claim, None)
        if delay is not None and (queue := self._queues.get(delay)) is not None:
            queue.pop(claim, None)

    async def aclose(self) -> None:
        """Stop; leave no task and no timer behind."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._queues.clear()
        self._delays.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _queue(self, claim: Claimed, holder: weakref.ref[Holder], delay_ms: int) -> None:
        due = self._loop.time() + delay_ms / 1000
        self._delays[claim] = delay_ms
        queue = self._queues.get(delay_ms)
        if queue is None:
            queue = self._queues[delay_ms] = {}
        queue[claim] = (due, holder)
        if self._timer is None or due < self._due:
            self._arm(due)

    def _arm(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = self._loop.call_at(due, self._tick, context=Context())

    def _tick(self) -> None:
        self._timer = None
        now = self._loop.time()
        for delay_ms, queue in list(self._queues.items()):
            due = list(islice(takewhile(lambda held: held[1][0] <= now, queue.items()), SLICE))
            for claim, (_, holder) in due:
                queue.pop(claim, None)
                task = self._loop.create_task(self._one(claim, holder))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            if not queue:
                del self._queues[delay_ms]
        if self._queues:
            self._arm(min(next(iter(queue.values()))[0] for queue in self._queues.values()))

    async def _one(self, claim: Claimed, reference: weakref.ref[Holder]) -> None:
        if reference() is None:
            self._delays.pop(claim, None)
            return
        delay_ms = max(1, claim._lease_ms // 3)
        renewed = False
        try:
            await self._renew(claim)
            renewed = True
        except LeaseLostError as error:
            held = self._delays.pop(claim, None) is not None  # else its operation has ended, and will see for itself
            if held and (holder := reference()) is not None:
                holder.lost(error)
            return
        except StoreError:
            delay_ms = max(1, delay_ms // 4)  # the lease still runs, and may outlive the trouble
        if claim in self._delays:
            if renewed and (holder := reference()) is not None:
                holder.renewed()
            self._queue(claim, reference, delay_ms)
