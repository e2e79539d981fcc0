"""What a stored value is to an operator: its status, age, size, and what may be done about it. No I/O.

**Age** is the time since a value was last written: by the claim, a renewal or the completion. A record in progress says
for how long it was written, so its age is ``ttl - time left``, on the server's clock. A completed record does not say
it: its age is known only to who knows the ``ttl`` that the workers use.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, NamedTuple

from ..errors import StoreError
from ..keys import is_lock
from ..model import InProgress, Record, RecordFormat, State, decide, owner_of

__all__ = ["Entry", "Filter", "Release", "Seen", "Status", "classify", "release_of", "shortened"]


LARGE_NOTE: Final = "large: inspect shows the whole"

MISSED: Final = 0.5
"""The share of a lease after which a renewal, due at a third of it, was missed."""

NOT_RENEWED: Final = "a renewal is overdue: its worker is dead, blocked or cut off, or renews nothing (renew=False)"


class Status(StrEnum):
    """What a stored value is.

    A completed record, a record in progress whose lease lasts (live) or is over (an orphan), a takeover's lock, a
    string that is no record, a record of a version that this one does not know, and a value of another Redis type.
    """

    COMPLETED = "completed"
    LIVE = "live"
    ORPHAN = "orphan"
    LOCK = "lock"
    NO_RECORD = "no-record"
    UNKNOWN = "unknown"
    OTHER_TYPE = "other-type"


class Seen(NamedTuple):
    """What was read of a stored value.

    Attributes:
        stored_key: the whole key, prefix included.
        value: the bytes, or the first of them; None of another type than a string.
        left_ms: milliseconds until it expires; None without expiry.
        size: bytes of the whole value; 0 where it was not asked for.
        exact: whether the text of the key is the key: a key that is not UTF-8 cannot be given as an argument.
        kind: the Redis type.
    """

    stored_key: str
    value: bytes | None
    left_ms: int | None
    size: int
    exact: bool = True
    kind: str = "string"

    @property
    def whole(self) -> bool:
        """Whether ``value`` is all that is stored."""
        return self.value is not None and len(self.value) == self.size


class Entry(NamedTuple):
    """A stored value, classified.

    Attributes:
        seen: what was read.
        key: what ``store.get`` and the commands take.
        status: what it is.
        age: seconds since it was last written; None where that is not known.
        lease_left: seconds that the lease of a live record still lasts if it is not renewed.
        record: what it says; None if it is no record, and of a large one that was not read whole.
        owner: the token of the claim that wrote it.
        note: why it could not be read as a record.
    """

    seen: Seen
    key: str
    status: Status
    age: float | None = None
    lease_left: float | None = None
    record: Record | None = None
    owner: str | None = None
    note: str = ""

    @property
    def known_by_beginning(self) -> bool:
        """Whether the bytes that were read can be no other record's: a completed one begins with its owner's token."""
        return self.status is Status.COMPLETED and self.record is None

    @property
    def expires_in(self) -> float | None:
        """Seconds until it expires; None if it never does."""
        return None if self.seen.left_ms is None else self.seen.left_ms / 1000

    def document(self, *, data: bool = False) -> dict[str, Any]:
        """Return what ``--json`` prints: payloads, and what an exception says, only with ``data``."""
        record = self.record
        found: dict[str, Any] = {
            "key": self.key,
            "stored_key": self.seen.stored_key,
            "status": self.status.value,
            "attempt": record.attempt if record is not None else None,
            "owner": self.owner,
            "outcome": record.outcome if record is not None else None,
            "fingerprint": record.fingerprint if record is not None else None,
            "age": self.age,
            "lease_left": self.lease_left,
            "expires_in": self.expires_in,
            "size": self.seen.size,
            "note": self.note or None,
        }
        if data:
            found["data"] = record.data if record is not None else None
            found["error"] = record.error if record is not None else None
            if record is None and self.seen.value is not None:
                found["value"] = self.seen.value.decode(errors="backslashreplace")
        return found


def classify(seen: Seen, prefix: str, layout: RecordFormat, *, now_ms: int, ttl_ms: int | None = None) -> Entry | None:
    """Say what a value is; None if only the whole of it can tell, and not the whole was read.

    Args:
        seen: what was read.
        prefix: the store's.
        layout: the format of the records.
        now_ms: this machine's wall clock, which decides only about records of Powertools without expiry.
        ttl_ms: how long completed records are written for, if that is known.
    """
    key = seen.stored_key.removeprefix(prefix)
    if seen.value is None:
        return Entry(seen, key, Status.OTHER_TYPE, note=f"a {seen.kind}, which no claim can take: delete it yourself")
    owner = owner_of(seen.value)
    if not seen.whole:
        # Only completed records of ours are large and tell by their beginning; of a large value of others nothing does.
        if owner is None or not seen.value.startswith(layout.own_completion(owner)):
            return None
        return Entry(seen, key, Status.COMPLETED, _age(ttl_ms, seen.left_ms), owner=owner, note=LARGE_NOTE)
    try:
        record = layout.parse(key, seen.value, seen.left_ms)
    except StoreError as error:
        return Entry(seen, key, Status.UNKNOWN, owner=owner, note=str(error))
    if record is None:
        if is_lock(seen.stored_key):
            return Entry(seen, key, Status.LOCK, owner=seen.value.decode(errors="replace"))
        return Entry(seen, key, Status.NO_RECORD, note="no record: the next claim takes it over")
    if record.state is State.COMPLETED:
        return Entry(seen, key, Status.COMPLETED, _age(ttl_ms, seen.left_ms), None, record, record.owner)
    written = _age(record.ttl_ms if record.owner is not None else None, seen.left_ms)
    decision = decide(record, seen.left_ms, owner=None, fingerprint=None, now_ms=now_ms, aged=True)
    if isinstance(decision, InProgress):
        lease = (record.lease_ms or 0) / 1000
        late = written is not None and written > lease * MISSED
        return Entry(
            seen, key, Status.LIVE, written, decision.retry_after, record, record.owner, NOT_RENEWED if late else ""
        )
    return Entry(seen, key, Status.ORPHAN, written, None, record, record.owner)


def _age(ttl_ms: int | None, left_ms: int | None) -> float | None:
    if ttl_ms is None or left_ms is None or left_ms > ttl_ms:
        return None
    return (ttl_ms - left_ms) / 1000


def shortened(entry: Entry, length: int) -> Entry:
    """Return an entry of a large value without its payload: a page of them must not hold what they hold."""
    assert entry.seen.value is not None
    record = None if entry.record is None else entry.record._replace(data=None, error=None)
    seen = entry.seen._replace(value=entry.seen.value[:length])
    return entry._replace(seen=seen, record=record, note=entry.note or LARGE_NOTE)


class Filter(NamedTuple):
    """Which entries are meant.

    Attributes:
        statuses: of one of these; empty: of any.
        older_than: last written more seconds ago than this. An entry of unknown age is not older than anything.
    """

    statuses: frozenset[Status] = frozenset()
    older_than: float | None = None

    def meets(self, entry: Entry) -> bool:
        """Say whether an entry is meant."""
        return self.right_status(entry) and (
            self.older_than is None or (entry.age is not None and entry.age > self.older_than)
        )

    def undecided(self, entry: Entry) -> bool:
        """Say whether an entry would be meant if its age were known and high enough."""
        return self.right_status(entry) and self.older_than is not None and entry.age is None

    def right_status(self, entry: Entry) -> bool:
        """Say whether an entry is of a status that is meant."""
        return not self.statuses or entry.status in self.statuses


class Release(NamedTuple):
    """What ``release`` would do about an entry.

    Attributes:
        does: what is written.
        free: there is nothing to do; the next claim has the key anyhow.
        risk: what ``--force`` takes upon itself; "" where it is not needed.
    """

    does: str
    free: bool = False
    risk: str = ""


RELEASES: Final = {
    Status.COMPLETED: Release(
        "deletes the record",
        risk="the operation has completed: without its record the next call runs it again, effect and all",
    ),
    Status.LOCK: Release(
        "deletes the lock",
        risk="a takeover, or a write of a plain client, may be going on under it; it expires by itself within 10 s",
    ),
    Status.NO_RECORD: Release("nothing: the next claim takes the key, for no record is there", free=True),
    Status.UNKNOWN: Release(
        "deletes the record",
        risk="another version, or a worker with other attribute names, wrote it: whether its operation runs or has "
        "completed cannot be read here, and the next call runs it again",
    ),
}


def release_of(entry: Entry) -> Release | None:
    """Say what ``release`` would do about an entry; None if it can do nothing about it."""
    attempt = entry.record.attempt if entry.record is not None else 1
    if entry.status is Status.LIVE:
        return Release(
            f"puts an orphan in its place: the next call takes over at once, as attempt {attempt + 1}",
            risk="if its worker still lives, the effect may happen twice, at the same time; that worker gets "
            "LeaseLostError and stores nothing. Make sure that it is dead, or wait for the end of its lease",
        )
    if entry.status is Status.ORPHAN:
        return Release(f"nothing: the next call takes the key over at once, as attempt {attempt + 1}", free=True)
    return RELEASES.get(entry.status)
