"""What the owner of a claim writes: its record in progress, renewals, the completion, the way back."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable
from typing import TypedDict

from ..cancellation import linger
from ..durations import Duration, to_ms
from ..errors import ConfigurationError, LeaseLostError, StoreError, StoreUnavailableError
from ..keys import check_key, lock_of, stored_form
from ..model import LARGE, Attributes, Claimed, Outcome, RecordFormat, matches, owner_of
from .primitives import Primitives, Within, enter_call, leave_call

__all__ = ["Ownership", "RecordOptions", "StoreOptions", "lease_end", "new_token", "refuse_other"]


class RecordOptions(TypedDict, total=False):
    """The options of every store that have to do with its records."""

    status_attr: str
    expiry_attr: str
    in_progress_expiry_attr: str
    data_attr: str
    validation_key_attr: str
    clock: Callable[[], float]
    wall: Callable[[], float]


class StoreOptions(RecordOptions, total=False):
    """The options of every store."""

    prefix: str
    timeout: Duration


class Ownership(Primitives):
    """The fenced writes of an owner, over the primitives. The rules are in :mod:`asyncidem.stores.base`.

    Args:
        prefix: put before every key.
        timeout: seconds that one call may take.
        attributes: names of the record's attributes.
        clock: monotonic seconds.
        wall: unix seconds.
    """

    def __init__(
        self,
        *,
        prefix: str,
        timeout: Duration,
        attributes: Attributes,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        super().__init__()
        if not isinstance(prefix, str):  # pyright: ignore[reportUnnecessaryIsInstance] - callers without a type checker
            raise ConfigurationError(f"prefix must be text, not {prefix!r}")
        check_key(prefix + "a")
        self.prefix = prefix
        self.timeout = to_ms(timeout, "timeout") / 1000
        self.format = RecordFormat(attributes)
        self.clock = clock
        self.wall = wall
        self._renewals: dict[str, asyncio.Future[None]] = {}

    async def renew(self, claim: Claimed) -> None:
        """Begin the lease anew. Writes also where the record is gone.

        Raises:
            LeaseLostError: another owner holds the key, or the claim was completed or released.
            StoreUnavailableError: not acknowledged in time; the lease may or may not have been renewed.
        """
        refuse_other("renew", claim)
        await self._after_renewal(claim)
        if claim._settled:
            raise LeaseLostError(claim.key, f"it is {claim._settled}; a settled claim cannot be renewed")
        sent = self.clock()
        with Within(self.timeout):
            done = self._renewals[claim.owner] = asyncio.get_running_loop().create_future()
            try:
                value = await self._write_renewal(claim)
            finally:
                del self._renewals[claim.owner]
                done.set_result(None)
            await self._call(self.confirm(self._stored(claim.key), value))
        claim._deadline = max(claim._deadline, lease_end(sent, claim._lease_ms))

    async def _after_renewal(self, claim: Claimed) -> None:
        while (flying := self._renewals.get(claim.owner)) is not None:
            await asyncio.wait((flying,))

    async def _settle(
        self, claim: Claimed, write: Callable[[Claimed], Awaitable[None]], *, insist: bool = True
    ) -> None:
        """Do a write that settles a claim, behind the renewal in flight, in one store call.

        Once a claim settles nobody else speaks for it: with ``insist`` a write of unknown outcome is repeated in the
        background, and a cancelled caller waits for its end, it does not stop it.
        """
        call = enter_call(self.timeout)  # not `with`, on the way of every call
        try:
            if claim.owner in self._renewals:
                await self._after_renewal(claim)
            await write(claim)
        except asyncio.CancelledError:
            if insist:
                await linger(self._settle_on(claim, write))
            raise
        except StoreUnavailableError:
            if insist:
                self._settle_on(claim, write)  # and this claim completes with nothing else
            raise
        except StoreError:
            if insist:
                claim._completion = None  # refused, so nothing of it is there: another may be tried
            raise
        finally:
            leave_call(call)

    def _settle_on(self, claim: Claimed, write: Callable[[Claimed], Awaitable[None]]) -> asyncio.Task[None]:
        """Repeat a write in the background until it is answered, for at most a lease."""
        return self._spawn(functools.partial(self._settle, claim, write, insist=False), claim._lease_ms / 1000)

    async def _write_completion(
        self, data: str | None, ttl_ms: int, outcome: Outcome | None, error: str | None, claim: Claimed
    ) -> None:
        if claim._completion is None and data is not None and len(data) >= LARGE:
            await asyncio.sleep(0)  # it took long to encode, and takes long to wrap: others have a turn between
        key, owner = self._stored(claim.key), claim.owner
        if claim._completion is None:
            # Kept: what is repeated must be the same bytes, with the ttl that they tell.
            value = self.format.completed(
                owner, self._now_ms(), ttl_ms, data, claim._fingerprint, claim.attempt, outcome, error
            )
            claim._completion = value, ttl_ms
        value, ttl_ms = claim._completion
        try:
            swap = await self.swap(key, self.format.fence(owner), value, ttl_ms, exact=False, or_absent=True)
        except Exception as failed:  # noqa: BLE001 - as in _call
            raise self._known(failed)  # noqa: B904 - its cause is set
        if not swap.written and not matches(swap.found, self.format.own_completion(owner), exact=False):
            claim._settled = "lost"
            raise LeaseLostError(claim.key, _who(swap.found))
        if self.lock_blocks_writes:
            await self._call(self.remove(lock_of(key), owner.encode(), exact=True))

    async def _write_renewal(self, claim: Claimed) -> bytes:
        fence, value = self.format.fence(claim.owner), self._in_progress(claim)
        swap = await self._call(
            self.swap(self._stored(claim.key), fence, value, claim._lives_ms, exact=False, or_absent=True)
        )
        if not swap.written:
            claim._settled = claim._settled or "lost"
            raise LeaseLostError(claim.key, _who(swap.found))
        return value

    async def _give_back(self, claim: Claimed) -> None:
        key, fence = self._stored(claim.key), self.format.fence(claim.owner)
        if claim.attempt == 1:
            await self._call(self.remove(key, fence, exact=False))
            if self.lock_blocks_writes:  # one whose reply was lost is still there, and would hold off the next claim
                await self._call(self.remove(lock_of(key), claim.owner.encode(), exact=True))
            return
        # A token of nobody: whatever of this claim still runs late must find somebody else's record.
        orphan = self._orphan(claim.attempt - 1, claim._fingerprint, claim._lives_ms)
        await self._call(self.swap(key, fence, orphan, claim._lives_ms, exact=False, or_absent=False))
        await self._call(self.remove(lock_of(key), claim.owner.encode(), exact=True))

    def _stored(self, key: str) -> str:
        return self.prefix + stored_form(key)

    def _now_ms(self) -> int:
        return int(self.wall() * 1000)

    def _in_progress(self, claim: Claimed) -> bytes:
        now_ms = self._now_ms()
        claim._stamp = max(now_ms + claim._lease_ms, claim._stamp + 1)
        return self.format.in_progress(
            claim.owner,
            now_ms=now_ms,
            stamp=claim._stamp,
            lease_ms=claim._lease_ms,
            ttl_ms=claim._lives_ms,
            attempt=claim.attempt,
            fingerprint=claim._fingerprint,
        )

    def _orphan(self, attempt: int, fingerprint: str | None, lives_ms: int) -> bytes:
        now_ms = self._now_ms()
        return self.format.in_progress(
            new_token(),
            now_ms=now_ms,
            stamp=now_ms - 1,
            lease_ms=0,
            ttl_ms=lives_ms,
            attempt=attempt,
            fingerprint=fingerprint,
        )


def refuse_other(method: str, claim: object) -> None:
    """Refuse what is no claim, before anything is written."""
    if not isinstance(claim, Claimed):
        raise ConfigurationError(f"{method} takes the Claimed that claim returned, not {type(claim).__name__}")


def lease_end(sent: float, lease_ms: int) -> float:
    """Return when an owner counts its lease as over, on its monotonic clock.

    A millisecond early: servers count whole ones, cut off at both ends, and may find an orphan so much sooner.
    """
    return sent + (lease_ms - 1) / 1000


def new_token() -> str:
    """Return a new owner token: made per claim, never at import, for forked and restored processes share memory."""
    return os.urandom(16).hex()


def _who(found: bytes | None) -> str:
    return f"the record is now of owner {owner_of(found or b'') or 'unknown (no record of ours)'}"
