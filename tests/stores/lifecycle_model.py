"""What a store does, as a model: a few dictionaries and a number for the time, no bytes, no awaits, no races.

It is written from the protocol's text and shares nothing with the stores, so that both can be held against it.
"""

from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

LOCK: Final = 10
MIN_TTL: Final = 1

Outcome: TypeAlias = tuple[Any, ...]
"""A word for what came out, and what goes with it; floats are seconds that may be off by what a run takes."""


@dataclass
class ModelClaim:
    """A claim: what its owner knows."""

    key: str
    attempt: int
    fingerprint: str | None
    lease: float
    lives: float
    ttl: float
    settled: Literal["", "completed", "released", "lost"] = ""
    completion: tuple[str, float] | None = None


@dataclass
class Entry:
    """What is stored under a key; `owner` None is nobody, `attempt` 0 something that is no record."""

    owner: ModelClaim | None
    attempt: int
    fingerprint: str | None
    ends: float
    lease_ends: float = 0
    ttl: float = 0
    data: str | None = None

    def record(self, now: float) -> Outcome:
        """Return what `get` says."""
        state = "COMPLETED" if self.data is not None else "INPROGRESS"
        return ("record", state, self.attempt, self.data, self.fingerprint, float(self.ends - now))


@dataclass
class Model:
    """A store."""

    now: float = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    locks: dict[str, tuple[ModelClaim, float]] = field(default_factory=dict)

    def find(self, key: str) -> Entry | None:
        """Return what lives."""
        entry = self.entries.get(key)
        return None if entry is None or entry.ends <= self.now else entry

    def claim(self, key: str, lease: float, ttl: float, fingerprint: str | None) -> tuple[Outcome, ModelClaim | None]:
        """Claim."""
        claim = ModelClaim(key, 1, fingerprint, lease, max(lease, ttl, MIN_TTL), max(ttl, MIN_TTL))
        found = self.find(key)
        if found is not None:
            if fingerprint is not None and found.fingerprint is not None and fingerprint != found.fingerprint:
                return ("mismatch", found.fingerprint), None
            if found.data is not None:
                return ("replay", found.data, found.attempt), None
            if found.lease_ends > self.now:
                return ("in progress", float(found.lease_ends - self.now)), None
            lock = self.locks.get(key)
            if lock is not None and lock[1] > self.now:
                return ("in progress", float(min(LOCK, lease))), None
            self.locks[key] = (claim, self.now + min(LOCK, lease))
            claim.attempt = max(found.attempt, 1) + 1
            claim.fingerprint = fingerprint if fingerprint is not None else found.fingerprint
        self.hold(claim)
        return ("claimed", claim.attempt), claim

    def hold(self, claim: ModelClaim) -> None:
        """Write a record in progress."""
        ends, lease_ends = self.now + claim.lives, self.now + claim.lease
        self.entries[claim.key] = Entry(claim, claim.attempt, claim.fingerprint, ends, lease_ends, claim.lives)

    def orphan(self, key: str, attempt: int, fingerprint: str | None, lives: float) -> None:
        """Write a record in progress of nobody, whose lease is over."""
        self.entries[key] = Entry(None, attempt, fingerprint, self.now + lives, self.now, lives)

    def unlock(self, key: str, owner: ModelClaim | None) -> None:
        """Delete the lock that a takeover left, if it is this owner's."""
        if owner is not None and key in self.locks and self.locks[key][0] is owner:
            del self.locks[key]

    def renew(self, claim: ModelClaim) -> Outcome:
        """Renew."""
        if claim.settled:
            return ("lost",)
        found = self.find(claim.key)
        if found is None or (found.owner is claim and found.data is None):
            self.hold(claim)
            return ("done",)
        claim.settled = "lost"
        return ("lost",)

    def complete(self, claim: ModelClaim, data: str, ttl: float | None) -> Outcome:
        """Complete. The first completion of a claim is its only one, whatever the next one says."""
        if claim.settled in ("released", "lost"):
            return ("lost",)
        claim.settled = "completed"
        claim.completion = claim.completion or (data, claim.ttl if ttl is None else max(ttl, MIN_TTL))
        data, ttl = claim.completion
        found = self.find(claim.key)
        if found is None or (found.owner is claim and found.data is None):
            self.entries[claim.key] = Entry(claim, claim.attempt, claim.fingerprint, self.now + ttl, data=data)
            return ("done",)
        if found.owner is claim:
            return ("done",)
        claim.settled = "lost"
        return ("lost",)

    def release(self, claim: ModelClaim) -> Outcome:
        """Release."""
        if not claim.settled:
            claim.settled = "released"
            found = self.find(claim.key)
            if found is not None and found.owner is claim:
                if claim.attempt == 1:
                    del self.entries[claim.key]
                else:
                    self.orphan(claim.key, claim.attempt - 1, claim.fingerprint, claim.lives)
            if claim.attempt > 1:
                self.unlock(claim.key, claim)
        return ("done",)

    def delete(self, key: str) -> Outcome:
        """Delete."""
        found = self.find(key)
        if found is None:
            return ("deleted", False)
        if found.data is not None or found.attempt == 0:
            del self.entries[key]
        else:
            self.orphan(key, found.attempt, found.fingerprint, max(found.ttl, MIN_TTL))
            self.unlock(key, found.owner)
        return ("deleted", True)

    def get(self, key: str) -> Outcome:
        """Get."""
        found = self.find(key)
        return ("record", None) if found is None or found.attempt == 0 else found.record(self.now)

    def drop(self, key: str) -> Outcome:
        """Lose a record, as a flush does."""
        self.entries.pop(key, None)
        return ("done",)

    def garble(self, key: str, ttl: float) -> Outcome:
        """Put something there that is no record."""
        self.entries[key] = Entry(None, 0, None, self.now + ttl, self.now, ttl)
        return ("done",)
