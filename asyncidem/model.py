"""The law: what a record says, and what a worker may do about it. No await, no clock, no Redis.

The record
----------
One string per key, JSON, readable with ``redis-cli`` and by Powertools for AWS Lambda (Python), whose format it
extends::

    {"owner": "<32 hex>", "status": "INPROGRESS", "expiration": <unix s>, "in_progress_expiration": <unix ms>,
     "validation": "<fingerprint>", "lease": <ms>, "ttl": <ms>, "attempt": 1}
    {"owner": "<32 hex>", "status": "COMPLETED", "data": "<the encoded result>", "expiration": <unix s>,
     "validation": "<fingerprint>"}

The owner token comes first and the status second, always: the bytes up to there are the *fence* that stores compare.
``validation`` is there only with a fingerprint; ``attempt`` on a completed record only above 1. Completed without a
replayable result: ``"outcome"`` is ``"exception"`` (the exception is in ``"error"``), ``"unavailable"`` or
``"too_large"``, and ``"data"`` is ``"!"``, which a Powertools reader fails on instead of taking it for a success.

A record in progress lives ``ttl`` = max(ttl, lease, 1 s), so that an orphan stays visible. The two timestamps are for
Powertools peers. Our own decisions use ``lease``, ``ttl`` and the milliseconds that the store says the record has
left: ``ttl - left`` have passed since the record was written, and no client's clock is asked.

A record without our attributes is a peer's. Without ``in_progress_expiration`` it is in progress until it expires; with
one it is over when ``expiration * 1000 - left``, which is the server's now on the writer's clock, has passed it.

A value that is no record (not JSON, no object, ``{}``, empty) is an orphan. An object whose status is not known is a
:class:`~asyncidem.errors.StoreError`: an older worker must not run again what a newer one recorded.
"""

# Annotations are not postponed here: a NamedTuple would compile the text of each of its fields at import.

import json
import json.decoder
import re
from collections.abc import Callable
from enum import StrEnum
from json.encoder import encode_basestring_ascii as quote
from typing import Any, Final, Literal, NamedTuple, TypeAlias, cast

from .errors import ConfigurationError, StoreError

__all__ = [
    "LARGE",
    "LEFT_UNKNOWN",
    "LOCK_MS",
    "MAX_NAME",
    "MIN_TTL_MS",
    "Attributes",
    "Claimed",
    "Decision",
    "InProgress",
    "Mismatch",
    "Orphan",
    "Outcome",
    "Own",
    "Record",
    "RecordFormat",
    "Replay",
    "State",
    "Stored",
    "Swap",
    "Unaged",
    "decide",
    "lease_of",
    "matches",
    "owner_of",
]

LEFT_UNKNOWN: Final = -1
"""``left_ms`` of a store that cannot tell how long a value has left."""

MIN_TTL_MS: Final = 1000
"""Powertools' expiries are whole seconds, and 0 is an error to Redis: no record lives for less."""

LOCK_MS: Final = 10_000
"""How long a lock lives at the most."""

LARGE: Final = 64 * 1024
"""Bytes from which a result is large: it goes its own way to the server, and lets others in between the steps to it."""

SCAN: Final[Callable[[str, int], tuple[str, int]]] = cast("Any", json.decoder).scanstring
"""Reads a JSON string behind its opening quote; typeshed does not know it."""

MAX_NAME: Final = 64
"""Bytes that the name of an attribute may have as UTF-8: a record is recognised by how it begins."""

MAX_TIME: Final = 2**63

NO_DATA: Final = "!"

Outcome: TypeAlias = Literal["exception", "unavailable", "too_large"]


class State(StrEnum):
    """The two states of a record."""

    INPROGRESS = "INPROGRESS"
    COMPLETED = "COMPLETED"


class Record(NamedTuple):
    """What a store holds under an idempotency key.

    Attributes:
        key: the idempotency key, as it was given.
        state: in progress or completed.
        owner: the token of the claim that wrote it; None on a record of Powertools.
        attempt: 1, or more where an earlier attempt's outcome is unknown.
        data: the encoded result; None while in progress and where it was not stored.
        fingerprint: of the payload; None where none was given.
        outcome: None, or why a completed record has no result to replay.
        expires_in: seconds until the record expires; None if it never does or the store was not asked.
        error: JSON text that describes the exception of the outcome ``"exception"``.
    """

    key: str
    state: State
    owner: str | None
    attempt: int
    data: str | None
    fingerprint: str | None
    outcome: str | None
    expires_in: float | None
    error: str | None = None
    lease_ms: int | None = None
    ttl_ms: int | None = None
    expiration: float | None = None
    in_progress_expiration: float | None = None

    def __repr__(self) -> str:
        """Show what may be in a log: not the result, and not what the exception says."""
        shown = ("key", "state", "owner", "attempt", "fingerprint", "outcome", "expires_in")
        return f"Record({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


class Stored(NamedTuple):
    """A value and the milliseconds it has left: None without expiry, ``LEFT_UNKNOWN`` if the store cannot tell."""

    value: bytes
    left_ms: int | None


class Swap(NamedTuple):
    """Whether a compare-and-set wrote; if not, the bytes that are there (None: nothing is)."""

    written: bool
    found: bytes | None = None


class Claimed:
    """The key is yours: run, then ``complete`` or ``release``.

    Attributes:
        key: the idempotency key, as it was given.
        owner: this claim's token. It is never used again once the claim is released.
        attempt: 1, or more if an earlier attempt's outcome is unknown.
    """

    __match_args__ = ("key", "owner", "attempt")
    __slots__ = (
        "_completion",
        "_deadline",
        "_fingerprint",
        "_lease_ms",
        "_lives_ms",
        "_settled",
        "_stamp",
        "_ttl_ms",
        "attempt",
        "key",
        "owner",
    )

    # What the store needs for its next writes; a claim belongs to the store that made it.
    _lives_ms: int  # how long its record in progress lives
    _ttl_ms: int  # how long its result lives
    _stamp: int  # in_progress_expiration as last written: the next one is greater
    _deadline: float  # the end of the lease on this process' monotonic clock
    _settled: Literal["", "completed", "released", "lost"]
    _completion: tuple[bytes, int] | None  # a repeated completion writes the same bytes for the same milliseconds

    def __init__(
        self,
        key: str,
        owner: str,
        attempt: int,
        lease_ms: int,
        lives_ms: int,
        ttl_ms: int,
        fingerprint: str | None,
        stamp: int = 0,
        deadline: float = 0.0,
    ) -> None:
        self.key = key
        self.owner = owner
        self.attempt = attempt
        self._lease_ms = lease_ms
        self._lives_ms = lives_ms
        self._ttl_ms = ttl_ms
        self._fingerprint = fingerprint
        self._stamp = stamp
        self._deadline = deadline
        self._settled = ""
        self._completion = None

    def __repr__(self) -> str:
        return f"Claimed(key={self.key!r}, owner={self.owner!r}, attempt={self.attempt!r})"


class Replay(NamedTuple):
    """The operation completed: here is its record."""

    record: Record


class InProgress(NamedTuple):
    """Another call with this key is running.

    Attributes:
        retry_after: seconds after which its lease is over if it is not renewed.
        record: what is stored, where it was seen.
    """

    retry_after: float
    record: Record | None = None


class Mismatch(NamedTuple):
    """The key was used with another payload.

    Attributes:
        record: the record of the first use.
    """

    record: Record


class Orphan(NamedTuple):
    """What is there may be taken over. ``attempt`` is the one that was left behind, 1 where nothing says."""

    attempt: int
    fingerprint: str | None


class Own:
    """What is there was written by the claim that asks: its reply had been lost."""


class Unaged:
    """In progress; whether it is an orphan cannot be said before its time left is known."""


Decision: TypeAlias = Own | Replay | Mismatch | InProgress | Orphan | Unaged


class Attributes:
    """Names of the record's attributes, for peers whose Powertools layer was given others.

    Raises:
        ConfigurationError: a name is none, is longer than 64 bytes as UTF-8, or would overwrite another attribute.
    """

    __slots__ = ("data_attr", "expiry_attr", "in_progress_expiry_attr", "status_attr", "validation_key_attr")

    def __init__(
        self,
        status_attr: str = "status",
        expiry_attr: str = "expiration",
        in_progress_expiry_attr: str = "in_progress_expiration",
        data_attr: str = "data",
        validation_key_attr: str = "validation",
    ) -> None:
        self.status_attr = status_attr
        self.expiry_attr = expiry_attr
        self.in_progress_expiry_attr = in_progress_expiry_attr
        self.data_attr = data_attr
        self.validation_key_attr = validation_key_attr
        names: list[Any] = [getattr(self, option) for option in self.__slots__]
        for option, name in zip(self.__slots__, names, strict=True):
            if not isinstance(name, str) or not name:
                raise ConfigurationError(f"{option} must be a name, not {name!r}")
            if (size := len(name.encode(errors="surrogatepass"))) > MAX_NAME:
                raise ConfigurationError(
                    f"{option} must have at most {MAX_NAME} bytes as UTF-8, and {name!r} has {size}: use a shorter name, "
                    f"with every worker and peer that shares the records"
                )
        for name in names:
            if names.count(name) > 1 or name in {"owner", "lease", "ttl", "attempt", "outcome", "error"}:
                raise ConfigurationError(f"the attribute name {name!r} is taken; every attribute needs its own")


class RecordFormat:
    """Builds records and reads them. The skeletons are made once: a record costs one formatting.

    Args:
        attributes: the names of the attributes.
    """

    def __init__(self, attributes: Attributes) -> None:
        self.attributes = attributes
        status, expiry, progress, data, validation = (
            quote(name)
            for name in (
                attributes.status_attr,
                attributes.expiry_attr,
                attributes.in_progress_expiry_attr,
                attributes.data_attr,
                attributes.validation_key_attr,
            )
        )
        self._fence = f'", {status}: "INPROGRESS"'
        self._done = f'", {status}: "COMPLETED"'
        self._expiry = f", {expiry}: "
        self._progress = f", {progress}: "
        self._data = f", {data}: "
        self._validation = f", {validation}: "
        # A completed record as it is written here: what stands between owner and data, and behind the data.
        self._middle = f'{self._done}{self._data}"'.encode()
        self._rest = re.compile(
            f'{re.escape(self._expiry)}([0-9]{{1,12}})(?:{re.escape(self._validation)}"([0-9a-f]{{1,128}})")?}}'
        ).fullmatch

    def fence(self, owner: str) -> bytes:
        """Return the bytes that a record of ``owner`` in progress begins with."""
        return f'{{"owner": "{owner}{self._fence}'.encode()

    def own_completion(self, owner: str) -> bytes:
        """Return the bytes that a record which ``owner`` completed begins with."""
        return f'{{"owner": "{owner}{self._done}'.encode()

    def in_progress(
        self, owner: str, now_ms: int, stamp: int, lease_ms: int, ttl_ms: int, attempt: int, fingerprint: str | None
    ) -> bytes:
        """Return a record in progress; ``stamp`` is its ``in_progress_expiration`` (unix ms), ``lease_ms`` 0 an orphan.

        ``expiration`` is rounded up: rounded down, a peer would believe the record a second older than it is.
        """
        validation = f"{self._validation}{quote(fingerprint)}" if fingerprint is not None else ""
        return (
            f'{{"owner": "{owner}{self._fence}{self._expiry}{-(-(now_ms + ttl_ms) // 1000)}{self._progress}{stamp}'
            f'{validation}, "lease": {lease_ms}, "ttl": {ttl_ms}, "attempt": {attempt}}}'
        ).encode()

    def completed(
        self,
        owner: str,
        now_ms: int,
        ttl_ms: int,
        data: str | None,
        fingerprint: str | None,
        attempt: int,
        outcome: Outcome | None = None,
        error: str | None = None,
    ) -> bytes:
        """Return a completed record; ``data`` None goes with an ``outcome`` that says why there is no result."""
        validation = f"{self._validation}{quote(fingerprint)}" if fingerprint is not None else ""
        tries = f', "attempt": {attempt}' if attempt > 1 else ""
        why = f', "outcome": {quote(outcome)}' if outcome is not None else ""
        what = f', "error": {quote(error)}' if error is not None else ""
        return (
            f'{{"owner": "{owner}{self._done}{self._data}{quote(NO_DATA if data is None else data)}'
            f"{self._expiry}{-(-(now_ms + ttl_ms) // 1000)}{validation}{tries}{why}{what}}}"
        ).encode()

    def parse(self, key: str, value: bytes, left_ms: int | None = LEFT_UNKNOWN) -> Record | None:
        """Return the record in ``value``, or None if it is none.

        Args:
            key: the idempotency key.
            value: the stored bytes.
            left_ms: milliseconds that they have left; None without expiry.

        Raises:
            StoreError: an object whose status is not known, or that has an owner and no status: another version wrote
                it, or a worker with other attribute names.
        """
        if (record := self.parse_completed(key, value, left_ms)) is not None:
            return record
        try:
            parsed: Any = json.loads(value.decode())
        except (ValueError, RecursionError):
            return None
        if not isinstance(parsed, dict) or not parsed:
            return None
        item = cast("dict[str, Any]", parsed)
        names = self.attributes
        if names.status_attr not in item and "owner" not in item:
            return None
        status: Any = item.get(names.status_attr)
        if status not in ("INPROGRESS", "COMPLETED"):
            raise StoreError(
                f"the record of {key!r} has the status {status!r}, which this version does not know; it is left alone. "
                f"Upgrade this worker, or give every worker the same attribute names"
            )
        state = State(status)
        data = _text(item.get(names.data_attr))
        outcome = _text(item.get("outcome"))
        if state is State.COMPLETED and data is None and outcome is None:
            outcome = "unavailable"
        attempt = _number(item.get("attempt"))
        return Record(
            key=key,
            state=state,
            owner=_text(item.get("owner")),
            attempt=int(attempt) if attempt is not None and attempt >= 1 else 1,
            data=data if outcome is None else None,
            fingerprint=_text(item.get(names.validation_key_attr)),
            outcome=outcome,
            expires_in=left_ms / 1000 if left_ms is not None and left_ms >= 0 else None,
            error=_text(item.get("error")),
            lease_ms=_whole(item.get("lease")),
            ttl_ms=_whole(item.get("ttl")),
            expiration=_number(item.get(names.expiry_attr)),
            in_progress_expiration=_number(item.get(names.in_progress_expiry_attr)),
        )

    def parse_completed(self, key: str, value: bytes, left_ms: int | None) -> Record | None:
        """Do what ``parse`` does, without its detour, for what every replay finds; None for anything else."""
        if value[43 : 43 + len(self._middle)] != self._middle or value[:11] != b'{"owner": "':
            return None
        try:
            text = value.decode("ascii")
            data, end = SCAN(text, 43 + len(self._middle))
        except ValueError:
            return None
        owner, rest = text[11:43], self._rest(text, end)
        if rest is None or not owner.isalnum():
            return None
        expiration, fingerprint = rest.groups()
        left = left_ms / 1000 if left_ms is not None and left_ms >= 0 else None
        return Record(
            key, State.COMPLETED, owner, 1, data, fingerprint, None, left, None, None, None, int(expiration), None
        )


def decide(
    record: Record | None, left_ms: int | None, *, owner: str | None, fingerprint: str | None, now_ms: int, aged: bool
) -> Decision:
    """Say what a caller may do about a value that is there.

    Args:
        record: what the value says; None if it is no record.
        left_ms: the milliseconds that it has left (None: no expiry; ``LEFT_UNKNOWN``: the store cannot tell).
        owner: the token of the claim that asks.
        fingerprint: of its payload.
        now_ms: this client's wall clock, used only where a store cannot tell ``left_ms``.
        aged: whether ``left_ms`` was asked for at all; if not, a record in progress is ``Unaged``.
    """
    if record is None:
        return Orphan(1, None) if aged else Unaged()
    if record.state is State.INPROGRESS and owner is not None and record.owner == owner:
        return Own()
    if fingerprint is not None and record.fingerprint is not None and record.fingerprint != fingerprint:
        return Mismatch(record)
    if record.state is State.COMPLETED:
        return Replay(record)
    if not aged:
        return Unaged()
    lease_left = _lease_left(record, left_ms, now_ms)
    if lease_left <= 0:
        return Orphan(record.attempt, record.fingerprint)
    return InProgress(lease_left / 1000, record)


def _lease_left(record: Record, left_ms: int | None, now_ms: int) -> float:
    """Return the milliseconds that the lease of a record in progress still has."""
    ours = record.owner is not None and record.lease_ms is not None and record.ttl_ms is not None
    if left_ms is not None and left_ms >= 0:
        if ours:
            assert record.lease_ms is not None
            assert record.ttl_ms is not None
            return record.lease_ms - (record.ttl_ms - left_ms)
        if record.in_progress_expiration is None or record.expiration is None:
            return left_ms
        return record.in_progress_expiration - (record.expiration * 1000 - left_ms)
    if ours and left_ms is None:
        # Whoever removed the expiry removed the age: were it not an orphan, it would block the key for ever.
        return 0
    if ours and record.lease_ms == 0:
        return 0
    if record.in_progress_expiration is not None:
        return record.in_progress_expiration - now_ms
    if left_ms is not None and record.expiration is not None:
        return record.expiration * 1000 - now_ms
    return MIN_TTL_MS  # a peer's record that never ends: in progress until somebody deletes it


def matches(value: bytes | None, expected: bytes, *, exact: bool) -> bool:
    """Say whether stored bytes are what a compare-and-set expects: equal with ``exact``, else beginning with it."""
    if value is None:
        return False
    return value == expected if exact else value.startswith(expected)


def owner_of(value: bytes) -> str | None:
    """Return the owner token that a record or a fence begins with, or None for other bytes."""
    prefix = b'{"owner": "'
    if not value.startswith(prefix):
        return None
    end = value.find(b'"', len(prefix))
    return value[len(prefix) : end].decode("ascii", "replace") if end > 0 else None


def lease_of(value: bytes) -> int | None:
    """Return the lease in milliseconds that a record of ours in progress names, or None for other bytes."""
    _, found, rest = value.rpartition(b', "lease": ')
    digits = rest.partition(b",")[0]
    return int(digits) if found and digits.isdigit() else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> float | None:
    """Return a number that can be a time; other writers' mistakes (text, bool, NaN, 10**400) are no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -MAX_TIME < value < MAX_TIME:
        return None
    return value


def _whole(value: object) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number >= 0 else None
