"""How a key is claimed: put, judge what is there, take an orphan over, and undo what ended without an answer.

The rules are in :mod:`asyncidem.stores.base`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal, TypeVar

from ..cancellation import linger
from ..errors import ConfigurationError, LeaseLostError, StoreError, StoreUnavailableError
from ..keys import lock_of
from ..model import (
    LARGE,
    LEFT_UNKNOWN,
    LOCK_MS,
    MIN_TTL_MS,
    Claimed,
    Decision,
    InProgress,
    Mismatch,
    Orphan,
    Own,
    Replay,
    Stored,
    Unaged,
    decide,
    matches,
)
from .ownership import Ownership, lease_end, new_token
from .primitives import NotReplicatedError, Within, enter_call, leave_call

__all__ = ["MAX_ROUNDS", "Claiming"]

T = TypeVar("T")

MAX_ROUNDS: Final = 10
"""Rounds of one call on a key that changes under it; then somebody else is at work there."""


class Trail:
    """What one claim may have written so far: what an undo has to take back."""

    __slots__ = ("claim", "lock", "record")

    def __init__(self, claim: Claimed) -> None:
        self.claim = claim
        self.record = False
        self.lock = False


class Claiming(Ownership):
    """The claim, over the primitives and what an owner writes."""

    async def acquire(
        self, key: str, lease_ms: int, ttl_ms: int, fingerprint: str | None, *, aged: bool = False
    ) -> Claimed | Replay | InProgress | Mismatch:
        """Do what ``claim`` does, in milliseconds; ``aged`` asks for a replay's time left in the same round trip."""
        stored_key = self._stored(key)
        lives_ms, keeps_ms = max(ttl_ms, lease_ms, MIN_TTL_MS), max(ttl_ms, MIN_TTL_MS)
        put: Callable[[str, bytes, int], Awaitable[Any]] = self.put_or_read if aged else self.put_if_absent
        call = enter_call(self.timeout)  # not `with`, on the way of every call
        try:
            for _ in range(MAX_ROUNDS):
                owner, now_ms = new_token(), self._now_ms()
                stamp = now_ms + lease_ms
                value = self.format.in_progress(owner, now_ms, stamp, lease_ms, lives_ms, 1, fingerprint)
                sent = self.clock()
                deadline = lease_end(sent, lease_ms)
                try:
                    found: Any = await put(stored_key, value, lives_ms)
                except BaseException as error:  # noqa: BLE001 - it is raised again, or what it means
                    failure = self._known(error) if isinstance(error, Exception) else error
                    trail = Trail(Claimed(key, owner, 1, lease_ms, lives_ms, keeps_ms, fingerprint, stamp, deadline))
                    trail.record = not isinstance(failure, StoreError) or failure.outcome_unknown
                    await self._abandon(stored_key, trail, failure)
                    raise failure  # noqa: B904 - its cause is set
                # Most calls have won now, or found what was completed; all others are weighed.
                if found is None:
                    if self.clock() - sent < lease_ms / 3000:
                        return Claimed(key, owner, 1, lease_ms, lives_ms, keeps_ms, fingerprint, stamp, deadline)
                    stored: Stored | None = None
                else:
                    stored = found if aged else Stored(found, LEFT_UNKNOWN)
                    assert stored is not None
                    record = self.format.parse_completed(key, *stored)
                    if record is not None:
                        if len(stored.value) >= LARGE:
                            await asyncio.sleep(0)  # parsed; before it is decoded others have a turn
                        decision = decide(
                            record, stored.left_ms, owner=owner, fingerprint=fingerprint, now_ms=now_ms, aged=aged
                        )
                        assert isinstance(decision, Replay | Mismatch)
                        return decision
                trail = Trail(Claimed(key, owner, 1, lease_ms, lives_ms, keeps_ms, fingerprint, stamp, deadline))
                trail.record = stored is None
                try:
                    outcome = await self._weigh(stored_key, trail, stored, sent)
                except LeaseLostError:
                    continue
                except BaseException as error:
                    await self._abandon(stored_key, trail, error)
                    raise
                if outcome is not None:
                    return outcome
        finally:
            leave_call(call)
        return InProgress(lease_ms / 1000)

    async def _weigh(
        self, key: str, trail: Trail, stored: Stored | None, sent: float
    ) -> Claimed | Replay | InProgress | Mismatch | None:
        """Say what a claim found, or make sure of one that came late; None if the key changed meanwhile.

        Before each write ``trail`` says that it may happen; after a reply that knows, whether it did.
        """
        claim = trail.claim
        won = stored is None
        if stored is not None:
            decision: Decision | Claimed | None = self._judge(trail, stored, aged=False)
            if isinstance(decision, Unaged):
                decision = await self._look(key, trail)
            if isinstance(decision, Orphan):
                decision = await self._take_over(key, trail)
            if decision is None or isinstance(decision, Replay | InProgress | Mismatch):
                return decision
            won = isinstance(decision, Claimed)
        if not won or self.clock() - sent >= claim._lease_ms / 3000:
            # A reply was lost, or late: the lease may be over already, and another may have taken the key. The
            # renewal's own reply may be late too: what is handed out has a lease that still runs.
            for _ in range(MAX_ROUNDS):
                await self.renew(claim)
                if self.clock() < claim._deadline:
                    return claim
            raise StoreUnavailableError(f"the store answers later than a lease of {claim._lease_ms} ms lasts")
        return claim

    async def _write(self, trail: Trail, what: Literal["record", "lock"], write: Awaitable[T]) -> T:
        """Do one write of a claim, and keep book of whether it may have happened."""
        before = getattr(trail, what)
        setattr(trail, what, True)
        try:
            return await self._call(write)
        except StoreError as error:
            if not error.outcome_unknown:
                setattr(trail, what, before)
            raise

    def _judge(self, trail: Trail, stored: Stored, *, aged: bool) -> Decision:
        claim = trail.claim
        record = self.format.parse(claim.key, stored.value, stored.left_ms)
        decision = decide(
            record,
            stored.left_ms,
            owner=claim.owner,
            fingerprint=claim._fingerprint,
            now_ms=self._now_ms(),
            aged=aged,
        )
        if isinstance(decision, Own):
            assert record is not None
            trail.record = True
            claim.attempt = record.attempt
        return decision

    async def look(self, key: str) -> Decision | None:
        """Read and judge without claiming anything, as a waiter does; None if the key is free."""
        with Within(self.timeout):
            stored = await self._call(self.read(self._stored(key)))
        if stored is None:
            return None
        record = self.format.parse(key, stored.value, stored.left_ms)
        return decide(record, stored.left_ms, owner=None, fingerprint=None, now_ms=self._now_ms(), aged=True)

    async def _look(self, key: str, trail: Trail) -> Decision | None:
        """Read and judge; None if the key is gone, and may be put again."""
        stored = await self._call(self.read(key))
        return None if stored is None else self._judge(trail, stored, aged=True)

    async def _take_over(self, key: str, trail: Trail) -> Claimed | Decision | None:
        """Replace an orphan under the lock; None if the key is gone, or is no longer what it was."""
        claim = trail.claim
        lock_key, lock_ms = lock_of(key), min(LOCK_MS, claim._lease_ms)
        token = claim.owner.encode()
        held = await self._write(trail, "lock", self.put_if_absent(lock_key, token, lock_ms))
        if held is not None and held != token:
            trail.lock = False
            return InProgress(lock_ms / 1000)
        stored = await self._call(self.read(key))
        decision = None if stored is None else self._judge(trail, stored, aged=True)
        if stored is None or not isinstance(decision, Orphan):
            await self._unlock(lock_key, trail)
            return decision
        claim.attempt = decision.attempt + 1
        if claim._fingerprint is None:
            claim._fingerprint = decision.fingerprint  # a payload once named stays named, released or completed
        left_ms = stored.left_ms if stored.left_ms is not None and stored.left_ms >= 0 else None
        value = self._in_progress(claim)
        swap = await self._write(
            trail,
            "record",
            self.swap(key, stored.value, value, claim._lives_ms, exact=True, or_absent=False, left_ms=left_ms),
        )
        if swap.written:
            return claim
        if matches(swap.found, self.format.fence(claim.owner), exact=False):
            return Own()
        trail.record = False
        await self._unlock(lock_key, trail)
        return None

    async def _unlock(self, lock_key: str, trail: Trail) -> None:
        await self._call(self.remove(lock_key, trail.claim.owner.encode(), exact=True))
        trail.lock = False

    async def _abandon(self, key: str, trail: Trail, error: BaseException) -> None:
        """Undo a claim that ended in ``error``: whatever it wrote, or may yet write, is taken back.

        What runs late, from a connection that broke, costs at most one lease.
        """
        claim = trail.claim
        claim._settled = "released"
        # A closed coroutine (GeneratorExit) cannot await, and has no loop to leave work to: the lease ends it.
        if isinstance(error, GeneratorExit) or not (trail.record or trail.lock):
            return
        task = self._spawn(lambda: self._undo(key, trail), claim._lease_ms / 1000)
        # What a server that answers has written is taken back at once, or a caller who tries again would meet it.
        if not isinstance(error, Exception) or isinstance(error, NotReplicatedError | ConfigurationError):
            await linger(task)

    async def _undo(self, key: str, trail: Trail) -> None:
        with Within(self.timeout):
            if trail.record:
                await self._give_back(trail.claim)
            if trail.lock:
                await self._call(self.remove(lock_of(key), trail.claim.owner.encode(), exact=True))
