"""The protocol: a lifecycle over four atomic primitives, written once for every store.

A store is four primitives over opaque bytes: ``put_if_absent``, ``read``, ``swap``, ``remove``. Whatever knows about
idempotency is here, above them. These rules keep one owner per lease, and one result per key:

**Fence.** A record begins with its owner's token, then its status (see :mod:`asyncidem.model`). ``renew``, ``release``
and ``complete`` write only where the stored bytes begin with the owner's fence, in progress; so none of them touches a
successor's record or a completed one, its own included. ``complete`` and ``renew`` also write where the key is absent
(flushed, expired), ``release`` never. Finding one's own completed record is success: the first completion stands.

**Own.** One's own token in any reply means owned: the reply to the write was lost, not the write. The lease counts from
the first send of the claim, on the monotonic clock. A claim that was found to be ours, or of whose lease a third has
passed, is renewed before it is handed out; if that finds another owner, the key is claimed again. A token whose claim
was undone or released is never used again.

**Renewal.** It always changes the bytes: ``in_progress_expiration`` grows by at least 1, so that a takeover that
observed the record before the renewal finds other bytes. ``complete`` and ``release`` first settle the claim, after
which no renewal begins, and wait for the one in flight: one that came after them would bring a released key back.

**Takeover.** Read; find the lease over by the time that the record has left; take ``<key>:lock`` (its value is the new
owner's token, min(10 s, lease)); read again under the lock; swap exactly the observed bytes, and only while the key's
time left is not greater than observed. The swap alone is safe among asyncidem workers. The lock is for Powertools peers,
which take the same one and then write blindly. After a swap it is left to expire: deleted at once, it would let in a
peer with an older snapshot. If nothing was swapped it is deleted, token compared. No lock means in progress. Another
payload on an orphan is a mismatch, not a takeover.

**Release.** Of attempt 1 the record is deleted. Of a higher one it is written back as an orphan whose lease is over
(``"lease": 0``), for the next owner must still see that somebody was there before whose outcome is unknown; then the
takeover's lock is deleted, token compared, or the next call would have to wait for it.

**Unknown outcomes.** Any exception from a primitive, but a :class:`StoreError` that knows better, means that the write
may have happened, or may yet happen. A claim then is undone, a completion or release repeated, in the background until
the store answers, for at most a lease; all of them are idempotent for their token. A cancelled caller waits for that at
most 0.5 s (:mod:`asyncidem.cancellation`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Final, Protocol, Self, get_args

from ..cancellation import linger
from ..durations import MAX_MS, Duration, to_ms
from ..errors import ConfigurationError, LeaseLostError, StoreError, StoreUnavailableError
from ..keys import check_key, lock_of
from ..model import (
    MIN_TTL_MS,
    Attributes,
    Claimed,
    InProgress,
    Mismatch,
    Outcome,
    Record,
    Replay,
    State,
    Stored,
)
from .claiming import MAX_ROUNDS, Claiming
from .ownership import refuse_other
from .primitives import Within

__all__ = ["Companion", "Store"]


ENGINES: Final = frozenset({"acquire", "finish", "look", "release_cancelled", "release_soon"})
"""Methods that the engine calls."""


class Companion(Protocol):
    """Something that lives as long as the store: it is closed first."""

    async def aclose(self) -> None:
        """Stop; leave no task behind."""
        ...


class Store(Claiming):
    """An idempotency store. Subclass it with the four primitives; await its methods in worker coroutines.

    ::

        match await store.claim("msg:7", lease=30, ttl=3600):
            case Claimed() as claim:
                await store.complete(claim, '"done"', ttl=3600)  # or release(claim), renew(claim)
            case Replay(record=record):
                record.data
            case InProgress(retry_after=seconds):
                ...
            case Mismatch():
                ...

    A subclass calls ``super().__init__``. ``acquire``, ``finish``, ``look``, ``release_soon``, ``release_cancelled``,
    ``companions``, ``format``, ``clock`` and ``wall`` are the engine's; their names are taken, and so are those of the
    private methods.

    Args:
        prefix: put before every key.
        timeout: seconds (or a ``timedelta``) that one call may take; a store with I/O keeps it.
        status_attr: name of the record's status, as in Powertools' layer; likewise the others.
        expiry_attr: name of the record's expiry (unix seconds).
        in_progress_expiry_attr: name of the lease's expiry (unix milliseconds).
        data_attr: name of the result.
        validation_key_attr: name of the fingerprint.
        clock: monotonic seconds, for tests.
        wall: unix seconds, for tests.

    Raises:
        ConfigurationError: an argument that cannot work.
    """

    def __init__(
        self,
        *,
        prefix: str = "",
        timeout: Duration = 5,
        status_attr: str = "status",
        expiry_attr: str = "expiration",
        in_progress_expiry_attr: str = "in_progress_expiration",
        data_attr: str = "data",
        validation_key_attr: str = "validation",
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(
            prefix=prefix,
            timeout=timeout,
            attributes=Attributes(status_attr, expiry_attr, in_progress_expiry_attr, data_attr, validation_key_attr),
            clock=clock,
            wall=wall,
        )
        self.companions: dict[Any, Companion] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a class that would replace a part of the lifecycle, perhaps one that only a takeover or an undo needs.

        Raises:
            ConfigurationError: it defines a method under a name that is taken.
        """
        super().__init_subclass__(**options)
        for name in vars(cls):
            private = name.startswith("_") and not name.startswith("__") and name != "_abc_impl"
            if (private and hasattr(Store, name)) or name in ENGINES:
                raise ConfigurationError(
                    f"{cls.__name__}.{name} would replace a method that every store needs; give it another name"
                )

    async def claim(
        self, key: str, *, lease: Duration = 30, ttl: Duration = 86_400, fingerprint: str | None = None
    ) -> Claimed | Replay | InProgress | Mismatch:
        """Claim ``key``, or say why not. A record in progress lives as long as the longer of ttl and lease.

        Args:
            key: the idempotency key.
            lease: seconds that the owner may be silent before others may take over.
            ttl: seconds that the record lives.
            fingerprint: of the payload; compared only if both sides have one.

        Raises:
            StoreUnavailableError: the store did not answer in time; nothing is claimed.
            StoreError: the store refused, or holds what is not ours to touch.
            InvalidKeyError: the key is not text.
            MissingKeyError: it is empty.
            ConfigurationError: lease or ttl is no duration.
        """
        if not (fingerprint is None or isinstance(fingerprint, str)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"fingerprint must be text, not {type(fingerprint).__name__}")
        return await self.acquire(check_key(key), to_ms(lease, "lease"), to_ms(ttl, "ttl"), fingerprint)

    async def complete(
        self,
        claim: Claimed,
        data: str | None,
        *,
        ttl: Duration | None = None,
        outcome: Outcome | None = None,
        error: str | None = None,
    ) -> None:
        """Store the result. Idempotent: the first completion stands. Writes also where the record is gone.

        Args:
            claim: what ``claim`` returned.
            data: the encoded result; None together with ``outcome``.
            ttl: seconds that the result lives; by default the claim's.
            outcome: why there is no result to replay.
            error: JSON text for the outcome ``"exception"``.

        Raises:
            LeaseLostError: another owner holds the key, or the claim was released.
            StoreUnavailableError: not acknowledged in time; it is repeated in the background for at most a lease.
        """
        refuse_other("complete", claim)
        if outcome is not None and (outcome not in get_args(Outcome) or data is not None):
            raise ConfigurationError(f"outcome must be one of {get_args(Outcome)}, with data None, not {outcome!r}")
        if outcome is None and not isinstance(data, str):
            raise ConfigurationError(f"data must be the encoded result as text, not {type(data).__name__}")
        if not (error is None or isinstance(error, str)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"error must be JSON text, not {type(error).__name__}")
        await self.finish(claim, data, None if ttl is None else to_ms(ttl, "ttl"), outcome, error)

    async def release(self, claim: Claimed) -> None:
        """Give the key back: the next claim may have it at once. A zombie's release does nothing.

        Raises:
            StoreUnavailableError: not acknowledged in time; it is repeated in the background for at most a lease.
        """
        refuse_other("release", claim)
        if claim._settled:
            return  # nothing releases a key whose result is on its way
        claim._settled = "released"
        await self._settle(claim, self._give_back)

    async def release_cancelled(self, claim: Claimed) -> bool:
        """Release for a caller that is being cancelled: after ``LINGER`` seconds that goes on in the background.

        Returns:
            Whether the store has acknowledged it.
        """
        acknowledged = False

        async def give_back(claim: Claimed) -> None:
            nonlocal acknowledged
            await self._give_back(claim)
            acknowledged = True

        claim._settled = "released"
        await linger(self._settle_on(claim, give_back))
        return acknowledged

    def release_soon(self, claim: Claimed) -> None:
        """Release without waiting, for callers that cannot await; without a running loop the lease ends the claim."""
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            claim._settled = "released"
            self._settle_on(claim, self._give_back)

    async def get(self, key: str) -> Record | None:
        """Return the record under ``key``; None if there is none, or a value that is no record.

        Raises:
            StoreError: a record of a version that this one does not know, or a key of another type.
            StoreUnavailableError: the store did not answer in time.
        """
        stored_key = self._stored(check_key(key))
        with Within(self.timeout):
            stored = await self._call(self.read(stored_key))
        return None if stored is None else self.format.parse(key, stored.value, stored.left_ms)

    async def delete(self, key: str) -> bool:
        """Delete the record under ``key``, completed or not; say whether there was one.

        A claim that is in progress is fenced off: an orphan of nobody stays in its place, which the next claim takes
        over with a higher ``attempt``, while the old owner gets ``LeaseLostError``. Deleted outright, the old owner's
        completion would find nothing there, and write.

        Raises:
            StoreError: the store refused, or the key is of another type.
            StoreUnavailableError: the store did not answer in time; the record may or may not be deleted.
        """
        stored_key = self._stored(check_key(key))
        with Within(self.timeout):
            for _ in range(MAX_ROUNDS):
                stored = await self._call(self.read(stored_key))
                if stored is None:
                    return False
                if await self._fence_off(key, stored_key, stored):
                    return True
        raise StoreUnavailableError(
            f"the record of {key!r} changes faster than it can be deleted; try again", outcome_unknown=False
        )

    async def aclose(self) -> None:
        """Close the store: give what it still repeats in the background ``timeout`` seconds, then stop it."""
        for companion in list(self.companions.values()):
            await companion.aclose()
        self.companions.clear()
        await self._end_background(self.timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- settling ---------------------------------------------------------------------------------------------------

    def finish(
        self, claim: Claimed, data: str | None, ttl_ms: int | None, outcome: Outcome | None, error: str | None
    ) -> Awaitable[None]:
        """Do what ``complete`` does, in milliseconds; what is returned must be awaited at once."""
        if claim._settled in ("released", "lost"):
            raise LeaseLostError(claim.key, f"it is {claim._settled}, and its token is never used again")
        claim._settled = "completed"
        ttl_ms = claim._ttl_ms if ttl_ms is None else max(ttl_ms, MIN_TTL_MS)
        return self._settle(claim, functools.partial(self._write_completion, data, ttl_ms, outcome, error))

    async def _fence_off(self, key: str, stored_key: str, stored: Stored) -> bool:
        """Delete exactly what was read, or put an orphan of nobody in its place; say whether it was still there."""
        try:
            record = self.format.parse(key, stored.value)
        except StoreError:
            record = None  # an operator may delete what this version cannot read
        if record is None or record.state is State.COMPLETED:
            return await self._call(self.remove(stored_key, stored.value, exact=True))
        lives_ms = min(max(record.ttl_ms or 0, MIN_TTL_MS), MAX_MS)
        lock_key, token = lock_of(stored_key), (record.owner or "").encode()
        if self.lock_blocks_writes:  # that of its takeover would hold off this write too
            await self._call(self.remove(lock_key, token, exact=True))
        orphan = self._orphan(record.attempt, record.fingerprint, lives_ms)
        swap = self.swap(stored_key, stored.value, orphan, lives_ms, exact=True, or_absent=False)
        if not (await self._call(swap)).written:
            return False
        await self._call(self.remove(lock_key, token, exact=True))  # or it would hold off the next takeover
        return True
