"""Waiting for a running call's result: one watch per key, however many tasks of this process wait there.

The invariants:

- One task at a time claims on behalf of a watch, the *elected* one; the others wait on futures. A task that is
  cancelled after it was elected hands the election on, and never claims.
- While a task of this process owns the key, the store is not asked: the owner tells the watch when it ends. If its lease
  runs out without a word, it was forgotten. Otherwise one poller reads the record, its pause a tenth of the time that the
  watch has waited, from 5 ms to 1 s, with jitter.
- A completed record goes to all waiters at once, each of which judges it by its own fingerprint. A key that is free
  goes to one waiter, which claims it; the others wait on.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextvars import Context
from copy import copy
from enum import Enum
from itertools import takewhile
from operator import itemgetter
from typing import Final, Literal, NamedTuple, TypeAlias

from .cutoffs import bounded
from .errors import StoreError, StoreUnavailableError, WaitTimeoutError
from .model import Claimed, InProgress, Mismatch, Orphan, Record, Replay, State
from .options import Options
from .stores.base import Store

__all__ = ["StillRunningError", "Waited", "Watches", "differs"]

MIN_PAUSE: Final = 0.005
MAX_PAUSE: Final = 1.0

SLICE: Final = 500
"""How many waiters are woken in one turn of the loop."""


class Word(Enum):
    """What a waiter is told when it is not a record."""

    FREE = "free"
    LATE = "late"


Signal: TypeAlias = Record | StoreError | Literal[Word.FREE, Word.LATE]
Settled: TypeAlias = Claimed | Replay | Mismatch
Outcome: TypeAlias = Settled | InProgress


class Waited(NamedTuple):
    """What came out of a claim after a wait."""

    outcome: Settled


class StillRunningError(StoreUnavailableError):
    """The store does not answer, and the key was in progress when it last did: nobody may run it unprotected."""


class Group:
    """Waiters with the same payload and the same patience: they run out of it in the order in which they came."""

    __slots__ = ("fingerprint", "patience", "timer", "waiters")

    def __init__(self, fingerprint: str | None, patience: float) -> None:
        self.fingerprint = fingerprint
        self.patience = patience
        self.waiters: dict[asyncio.Future[Signal], float] = {}  # and since when each of them waits
        self.timer: asyncio.TimerHandle | None = None


class Watch:
    """What is known of one key that tasks of this process wait for."""

    __slots__ = (
        "claiming",
        "failure",
        "groups",
        "interested",
        "key",
        "lease_end",
        "loop",
        "owner",
        "poller",
        "seen",
    )

    def __init__(self, key: str, loop: asyncio.AbstractEventLoop) -> None:
        self.key = key
        self.loop = loop
        self.interested = 0
        self.claiming = False
        self.owner: Claimed | None = None
        self.seen: Record | None = None
        self.lease_end = 0.0
        self.failure: StoreError | None = None
        self.groups: dict[tuple[str | None, float], Group] = {}
        self.poller: asyncio.Task[None] | None = None

    def join(self, waiter: asyncio.Future[Signal], fingerprint: str | None, since: float, patience: float) -> Group:
        """Let ``waiter`` wait, at most ``patience`` seconds from ``since``, which is now."""
        group = self.groups.get((fingerprint, patience))
        if group is None:
            group = self.groups[fingerprint, patience] = Group(fingerprint, patience)
            self._arm(group, since + patience)
        group.waiters[waiter] = since
        return group

    def leave(self, waiter: asyncio.Future[Signal], group: Group) -> None:
        """Take note that ``waiter`` waits no more, whether it was told something or not."""
        group.waiters.pop(waiter, None)
        if not group.waiters:
            self._drop(group)

    def elect(self) -> None:
        """The key may be free: let one waiter claim, unless one does already."""
        self.seen = None
        if self.claiming or self.owner is not None:
            return
        firsts = [
            next(((since, waiter) for waiter, since in group.waiters.items() if not waiter.done()), None)
            for group in self.groups.values()
        ]
        first = min(filter(None, firsts), key=itemgetter(0), default=None)
        if first is not None:
            self.claiming = True
            first[1].set_result(Word.FREE)

    def learn(self, record: Record) -> None:
        """Tell the record to those whom it concerns: to all when completed, else to those with another payload."""
        self.seen = record
        for group in list(self.groups.values()):
            if record.state is State.COMPLETED or differs(record, group.fingerprint):
                waiters, group.waiters = group.waiters, {}
                self._drop(group)
                self._tell(iter(waiters), record)

    def fail(self, error: StoreError, before: float) -> None:
        """Give an error of the store to those who wait since ``before``."""
        for group in list(self.groups.values()):
            self._tell_first(group, error, before)

    def _tell_first(self, group: Group, signal: Signal, before: float) -> None:
        waiters = [waiter for waiter, _ in takewhile(lambda one: one[1] <= before, group.waiters.items())]
        for waiter in waiters:
            del group.waiters[waiter]
        if not group.waiters:
            self._drop(group)
        self._tell(iter(waiters), signal)

    def _tell(self, waiters: Iterator[asyncio.Future[Signal]], signal: Signal) -> None:
        """Wake waiters, a slice in each turn of the loop: all at once, they would hold it up."""
        told = 0
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(signal)
                told += 1
                if told == SLICE:
                    self.loop.call_soon(self._tell, waiters, signal, context=Context())
                    return

    def _arm(self, group: Group, due: float) -> None:
        group.timer = self.loop.call_at(due, self._late, group, due, context=Context())

    def _late(self, group: Group, due: float) -> None:
        group.timer = None
        # A loop may be early by the resolution of its clock.
        self._tell_first(group, Word.LATE, max(due, self.loop.time()) - group.patience)
        if group.waiters:
            self._arm(group, next(iter(group.waiters.values())) + group.patience)

    def _drop(self, group: Group) -> None:
        if group.timer is not None:
            group.timer.cancel()
            group.timer = None
        if self.groups.get((group.fingerprint, group.patience)) is group:
            del self.groups[group.fingerprint, group.patience]


class Watches:
    """The watches of a store on one event loop.

    Args:
        store: what to poll.
        loop: the event loop that the waiting tasks run on.
    """

    def __init__(self, store: Store, loop: asyncio.AbstractEventLoop) -> None:
        self._store = store
        self._loop = loop
        self._watches: dict[str, Watch] = {}
        self._pollers: set[asyncio.Task[None]] = set()

    async def acquire(self, key: str, fingerprint: str | None, options: Options, *, aged: bool) -> Settled | Waited:
        """Claim ``key``, or wait at most ``options.wait`` seconds for the result of the call that runs.

        Of many thousand callers each has a frame of this: a local more is a megabyte more.

        Returns:
            What ended the wait, wrapped if there was one.

        Raises:
            WaitTimeoutError: it still ran.
            StoreUnavailableError: it still ran when last seen, and the store did not answer in the end.
        """
        assert options.wait is not None
        since, patience = self._loop.time(), bounded(options.wait)
        watch = self._watches.get(key)
        if watch is None:
            watch = self._watches[key] = Watch(key, self._loop)
        watch.interested += 1
        told: Outcome | Signal | None
        try:
            if not watch.claiming and watch.owner is None and watch.poller is None:
                watch.claiming = True
                told = await self._claim(watch, fingerprint, options, aged=aged)
                if not isinstance(told, InProgress):
                    return told
                since, patience = self._again(since, patience)
            while True:
                told = None
                if watch.seen is not None and differs(watch.seen, fingerprint):
                    told = await self._still(watch, fingerprint)
                    since, patience = self._again(since, patience)
                if told is None:
                    waiter: asyncio.Future[Signal] = self._loop.create_future()
                    group = watch.join(waiter, fingerprint, since, patience)
                    self._poll(watch)
                    try:
                        told = await waiter
                    except BaseException:  # cancelled, or closed
                        if waiter.done() and not waiter.cancelled() and waiter.result() is Word.FREE:
                            watch.claiming = False
                            watch.leave(waiter, group)
                            watch.elect()
                        raise
                    finally:
                        watch.leave(waiter, group)
                if isinstance(told, Record):
                    return Waited(Mismatch(told) if differs(told, fingerprint) else Replay(told))
                if isinstance(told, StoreError):
                    raise copy(told) from (told.__cause__ or told)  # each waiter raises one of its own
                if told is Word.LATE:
                    raise self._late(watch)
                told = await self._claim(watch, fingerprint, options, aged=aged)
                if not isinstance(told, InProgress):
                    return Waited(told)
                since, patience = self._again(since, patience)
        finally:
            watch.interested -= 1
            self._tidy(watch)

    def waits(self, key: str) -> bool:
        """Say whether a task of this process waits for ``key``, or claims it and would wait."""
        return key in self._watches

    def ended(self, key: str, record: Record | None, *, free: bool) -> None:
        """Take note that a task of this process ended as owner of ``key``.

        Args:
            key: the idempotency key.
            record: the completed record, if there is one.
            free: whether the key was released, and may be claimed at once.
        """
        watch = self._watches.get(key)
        if watch is None:
            return
        watch.owner = None
        if record is not None:
            self._learn(watch, record)
        elif free:
            watch.elect()
        if watch.poller is not None:  # it sleeps at the pace of an owner that is here
            watch.poller.cancel()
            watch.poller = None
        self._poll(watch)
        self._tidy(watch)

    async def aclose(self) -> None:
        """Stop polling, and tell those who wait; leave no task behind."""
        closed = StillRunningError("the store was closed meanwhile", outcome_unknown=False)
        for watch in list(self._watches.values()):
            watch.fail(closed, self._loop.time())
        pollers = list(self._pollers)
        for poller in pollers:
            poller.cancel()
        await asyncio.gather(*pollers, return_exceptions=True)

    async def _claim(self, watch: Watch, fingerprint: str | None, options: Options, *, aged: bool) -> Outcome:
        try:
            outcome = await self._store.acquire(watch.key, options.lease_now(), options.ttl_ms, fingerprint, aged=aged)
        except BaseException as error:
            watch.claiming = False
            if isinstance(error, StoreError):
                # Who has waited through a whole store call would only find the same, one after the other.
                watch.fail(error, self._loop.time() - self._store.timeout)
            watch.elect()  # what failed or was cancelled here need not fail for the next
            raise
        watch.claiming = False
        watch.failure = None  # the store has answered
        if isinstance(outcome, Claimed):
            watch.owner = outcome
            watch.learn(
                Record(
                    watch.key, State.INPROGRESS, outcome.owner, outcome.attempt, None, outcome._fingerprint, None, None
                )
            )
        elif isinstance(outcome, Replay | Mismatch):
            self._learn(watch, outcome.record)
        else:
            watch.lease_end = self._loop.time() + outcome.retry_after
            if outcome.record is not None:
                watch.learn(outcome.record)
        self._poll(watch)
        return outcome

    def _again(self, since: float, patience: float) -> tuple[float, float]:
        """Return since when one waits who has asked the store meanwhile, and how long it still may."""
        now = self._loop.time()
        return now, since + patience - now

    async def _still(self, watch: Watch, fingerprint: str | None) -> Record | None:
        """Return the record that was seen, if it still is of another payload."""
        if watch.owner is None:
            await self._look_once(watch)  # what was seen there may be gone
        if watch.seen is not None and differs(watch.seen, fingerprint):
            return watch.seen
        return None

    def _late(self, watch: Watch) -> Exception:
        retry_after = max(0.0, watch.lease_end - self._loop.time())
        if watch.owner is not None:
            retry_after = max(0.0, watch.owner._deadline - self._store.clock())
        if watch.failure is not None:
            error = StillRunningError(
                f"{watch.key!r} was in progress when last seen, and the store does not answer", outcome_unknown=False
            )
            error.__cause__ = watch.failure
            return error
        return WaitTimeoutError(
            watch.key, retry_after, f"the operation {watch.key!r} was still in progress after the wait"
        )

    def _tidy(self, watch: Watch) -> None:
        if watch.interested == 0 and watch.owner is None:
            if watch.poller is not None:
                watch.poller.cancel()
            self._forget(watch)

    def _forget(self, watch: Watch) -> None:
        if self._watches.get(watch.key) is watch:
            del self._watches[watch.key]

    def _learn(self, watch: Watch, record: Record) -> None:
        watch.learn(record)
        if record.state is State.COMPLETED:
            self._forget(watch)  # its waiters have their answer; who comes now asks the store, at once

    def _poll(self, watch: Watch) -> None:
        """Poll while somebody waits and nobody of this process owns the key."""
        if watch.poller is None and watch.groups and not watch.claiming and not self._loop.is_closed():
            watch.poller = self._loop.create_task(self._look(watch), context=Context())
            self._pollers.add(watch.poller)
            watch.poller.add_done_callback(self._pollers.discard)

    async def _look(self, watch: Watch) -> None:
        began = self._loop.time()
        try:
            while watch.groups:
                if watch.owner is not None:
                    left = watch.owner._deadline - self._store.clock()
                    if left > 0:  # it ends here, or is renewed
                        await asyncio.sleep(min(left + 0.001, MAX_PAUSE))
                        continue
                    watch.owner = None  # forgotten without an end, or not renewed: others may have taken over
                    began = self._loop.time()
                now = self._loop.time()
                pause = min(MAX_PAUSE, max(MIN_PAUSE, (now - began) / 10)) * random.uniform(1.0, 1.2)  # noqa: S311 - no secret
                if watch.lease_end > now:
                    pause = min(pause, watch.lease_end - now + 0.001)  # an orphan is taken over when it becomes one
                await asyncio.sleep(pause)
                if not watch.claiming and watch.owner is None:
                    await self._look_once(watch)
        finally:
            # Unless another one has its place by now.
            watch.poller = None if watch.poller is asyncio.current_task() else watch.poller

    async def _look_once(self, watch: Watch) -> None:
        try:
            decision = await self._store.look(watch.key)
        except StoreUnavailableError as error:
            watch.failure = error  # the waiters have time left, and the store may come back within it
            return
        except StoreError as error:
            watch.fail(error, self._loop.time())  # it is not ours to touch, and that does not pass
            return
        watch.failure = None
        if decision is None or isinstance(decision, Orphan):
            watch.elect()
        elif isinstance(decision, Replay):
            self._learn(watch, decision.record)
        else:
            assert isinstance(decision, InProgress)
            assert decision.record is not None
            watch.lease_end = self._loop.time() + decision.retry_after
            watch.learn(decision.record)


def differs(record: Record, fingerprint: str | None) -> bool:
    """Say whether ``record`` is of another payload; only if both have a fingerprint can that be said."""
    return fingerprint is not None and record.fingerprint is not None and record.fingerprint != fingerprint
