"""SET NX and SET: idempotency as it is often written, for the proof that the chaos finds what is wrong with it."""

from typing import Any

from asyncidem import Claimed, InProgress, Mismatch, RedisStore, Replay, State
from asyncidem.model import Decision
from asyncidem.model import InProgress as Running
from asyncidem.stores.ownership import new_token


class Unchecked(RedisStore):
    """Lets a class replace what no store may replace."""

    def __init_subclass__(cls) -> None:
        """Accept it."""


class NaiveStore(Unchecked):
    """A key is claimed with SET NX, its lease is its expiry; it is completed with SET and released with DEL.

    Whoever lost its lease writes and deletes all the same, nobody knows of an attempt before, nothing is renewed.
    """

    async def acquire(
        self, key: str, lease_ms: int, ttl_ms: int, fingerprint: str | None, *, aged: bool = False
    ) -> Claimed | Replay | InProgress | Mismatch:
        """``SET key value NX GET PX lease``."""
        sent = self.clock()
        claim = Claimed(key, new_token(), 1, lease_ms, lease_ms, ttl_ms, fingerprint, 0, sent + lease_ms / 1000)
        found = await self._call(self.put_if_absent(self._stored(key), self._in_progress(claim), lease_ms))
        if found is None:
            return claim
        record = self.format.parse(key, found)
        assert record is not None
        return Replay(record) if record.state is State.COMPLETED else InProgress(lease_ms / 1000)

    async def look(self, key: str) -> Decision | None:
        """``GET key``."""
        record = await self.get(key)
        if record is None:
            return None
        return Replay(record) if record.state is State.COMPLETED else Running(record.expires_in or 0.01, record)

    async def renew(self, claim: Claimed) -> None:
        """Do nothing."""

    async def finish(self, claim: Claimed, data: str | None, ttl_ms: int | None, outcome: Any, error: Any) -> None:
        """``SET key result PX ttl``."""
        ttl_ms = ttl_ms or claim._ttl_ms
        value = self.format.completed(claim.owner, self._now_ms(), ttl_ms, data, None, 1, outcome, error)
        # What is there is replaced, whatever it is: each of these begins with nothing.
        await self._call(self.swap(self._stored(claim.key), b"", value, ttl_ms, exact=False, or_absent=True))

    async def release(self, claim: Claimed) -> None:
        """``DEL key``."""
        await self._call(self.remove(self._stored(claim.key), b"", exact=False))
