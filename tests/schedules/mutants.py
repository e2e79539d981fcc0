"""Stores and engines that break one rule each: the checker must find every one of them."""

from typing import Any

from asyncidem.model import LEFT_UNKNOWN, Claimed, Swap

from schedules.network import NetworkStore
from schedules.server import Request


class LooseTakeover(NetworkStore):
    """Takes over whatever is there by now, not the orphan that it saw."""

    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        if how["exact"]:
            how.update(exact=False, left_ms=None)
            expected = b'{"owner"'
        return await super().swap(key, expected, value, ttl_ms, **how)


class UnfencedCompletion(NetworkStore):
    """Completes without a look at whose record is there."""

    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        if b'"COMPLETED"' in value:
            await self.send(Request("set", key, value, ttl_ms))
            return Swap(True)
        return await super().swap(key, expected, value, ttl_ms, **how)


class UnfencedRelease(NetworkStore):
    """Deletes without a look at whose record is there."""

    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        return await super().remove(key, expected if exact else b"", exact=exact)


class SameBytes(NetworkStore):
    """Renews with the bytes that are there already, on a server that does not tell the time left to a swap."""

    def _in_progress(self, claim: Claimed) -> bytes:
        return self.format.in_progress(
            claim.owner,
            now_ms=claim._stamp - claim._lease_ms,
            stamp=claim._stamp,
            lease_ms=claim._lease_ms,
            ttl_ms=claim._lives_ms,
            attempt=claim.attempt,
            fingerprint=claim._fingerprint,
        )

    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return await super().swap(key, expected, value, ttl_ms, **{**how, "left_ms": None})


class NoOrphan(NetworkStore):
    """Deletes a claim of a second attempt that is released, as if nobody had been there before."""

    async def _give_back(self, claim: Claimed) -> None:
        await self._call(self.remove(self._stored(claim.key), self.format.fence(claim.owner), exact=False))


class NoUndo(NetworkStore):
    """Leaves a claim behind whose outcome is not known, or whose caller was cancelled."""

    async def _abandon(self, key: str, trail: Any, error: BaseException) -> None:
        trail.claim._settled = "released"


class LateClaim(NetworkStore):
    """Hands out a claim however late its reply came."""

    async def _weigh(self, key: str, trail: Any, stored: Any, sent: float) -> Any:
        return trail.claim if stored is None else await super()._weigh(key, trail, stored, sent)


class StrayRenewal(NetworkStore):
    """Releases without waiting for the renewal in flight."""

    async def _after_renewal(self, claim: Claimed) -> None:
        pass


class DeafZombie(NetworkStore):
    """Takes a completion that was fenced off for one that was written."""

    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        swap = await super().swap(key, expected, value, ttl_ms, **how)
        return Swap(True) if b'"COMPLETED"' in value else swap


class ClientClock(NetworkStore):
    """Tells a lease's age by its own wall clock."""

    async def read(self, key: str) -> Any:
        stored = await super().read(key)
        return stored and stored._replace(left_ms=LEFT_UNKNOWN)
