"""What a stored value is to an operator, and what the command line would do about it: the law, without a server."""

import json
from typing import Any

import pytest

from asyncidem.cli.entries import Entry, Filter, Seen, Status, classify, release_of, shortened
from asyncidem.cli.figures import Figures, Ranking
from asyncidem.model import Attributes, RecordFormat

LAYOUT = RecordFormat(Attributes())
OWNER = "0" * 32
NOW = 1_800_000_000_000


def seen(value: bytes | None, left_ms: int | None = 60_000, key: str = "p:k", **more: Any) -> Seen:
    """Return a value that was read whole."""
    return Seen(key, value, left_ms, len(value or b""), **more)


def entry_of(value: bytes | None, left_ms: int | None = 60_000, ttl_ms: int | None = None, **more: Any) -> Entry:
    """Classify a value."""
    entry = classify(seen(value, left_ms, **more), "p:", LAYOUT, now_ms=NOW, ttl_ms=ttl_ms)
    assert entry is not None
    return entry


def in_progress(*, lease_ms: int = 30_000, attempt: int = 1) -> bytes:
    """Return a record in progress that lives for a minute."""
    return LAYOUT.in_progress(OWNER, NOW, NOW + lease_ms, lease_ms, 60_000, attempt, "f")


def completed(data: str | None = '"r"', **more: Any) -> bytes:
    """Return a completed record."""
    return LAYOUT.completed(OWNER, NOW, 60_000, data, None, 1, **more)


def peer(**fields: Any) -> bytes:
    """Return a record of Powertools."""
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("value", "left_ms", "status", "age", "lease_left"),
    [
        (in_progress(), 60_000, Status.LIVE, 0, 30),
        (in_progress(), 40_000, Status.LIVE, 20, 10),
        (in_progress(), 29_000, Status.ORPHAN, 31, None),
        (in_progress(lease_ms=0), 60_000, Status.ORPHAN, 0, None),
        (in_progress(), 61_000, Status.LIVE, None, 31),  # more is left than it was written for: another's doing
        (in_progress(), None, Status.ORPHAN, None, None),
        (completed(), 60_000, Status.COMPLETED, None, None),
        (completed(), None, Status.COMPLETED, None, None),
        (peer(status="INPROGRESS", expiration=1), 5_000, Status.LIVE, None, 5),
        (peer(status="INPROGRESS", expiration=NOW // 1000, in_progress_expiration=1), 5, Status.ORPHAN, None, None),
        (peer(status="COMPLETED", expiration=1, data="1"), 5_000, Status.COMPLETED, None, None),
        (peer(status="STARTED", owner="x"), 5_000, Status.UNKNOWN, None, None),
        (peer(owner="x"), 5_000, Status.UNKNOWN, None, None),
        (b"", 5_000, Status.NO_RECORD, None, None),
        (b"\xff", None, Status.NO_RECORD, None, None),
        (b"{}", None, Status.NO_RECORD, None, None),
        (None, 5_000, Status.OTHER_TYPE, None, None),
    ],
)
def test_status(
    value: bytes | None, left_ms: int | None, status: Status, age: float | None, lease_left: float | None
) -> None:
    """Every value has a status; its age is the server's, where the record says for how long it was written."""
    entry = entry_of(value, left_ms)
    assert (entry.status, entry.age, entry.lease_left) == (status, age, lease_left)
    assert entry.key == "k"


def test_age_of_completed_records_follows_from_the_ttl_of_the_workers() -> None:
    """They do not say it; one that has more left was written with another ttl."""
    assert entry_of(completed(), 60_000, ttl_ms=100_000).age == 40
    assert entry_of(completed(), 60_000, ttl_ms=50_000).age is None


@pytest.mark.parametrize(("left_ms", "overdue"), [(50_000, False), (46_000, False), (44_000, True), (31_000, True)])
def test_a_renewal_that_is_overdue_is_noted(left_ms: int, overdue: bool) -> None:
    """An owner renews at a third of its lease: a live record that is older than half of it may be stuck."""
    entry = entry_of(in_progress(), left_ms)
    assert entry.status is Status.LIVE
    assert entry.note.startswith("a renewal is overdue") == overdue


def test_locks() -> None:
    """A lock is known by its key; a record under such a key is a record all the same."""
    assert entry_of(OWNER.encode(), key="p:k:lock").status is Status.LOCK
    assert entry_of(OWNER.encode(), key="p:k:lock").owner == OWNER
    assert entry_of(completed(), key="p:k:lock").status is Status.COMPLETED


def test_large_values_are_known_by_their_beginning_if_they_are_ours() -> None:
    """A completed record of ours is; of any other large value the whole is needed."""
    value = completed('"' + "x" * 9000 + '"')
    ours = classify(Seen("p:k", value[:4096], 60_000, len(value)), "p:", LAYOUT, now_ms=NOW, ttl_ms=100_000)
    assert ours is not None
    assert (ours.status, ours.owner, ours.age) == (Status.COMPLETED, OWNER, 40)
    assert ours.known_by_beginning
    for other in (in_progress(), peer(data="x" * 9000, status="COMPLETED"), b'{"owner": "'):
        assert classify(Seen("p:k", other[:100], 60_000, 9000), "p:", LAYOUT, now_ms=NOW) is None


def test_a_shortened_entry_holds_no_payload() -> None:
    """It is still known for what it is, but not by its bytes."""
    short = shortened(entry_of(peer(status="COMPLETED", data="x" * 9000)), 10)
    assert short.status is Status.COMPLETED
    assert short.record is not None
    assert short.record.data is None
    assert len(short.seen.value or b"") == 10
    assert not short.seen.whole
    assert not short.known_by_beginning
    assert "inspect" in short.note
    assert shortened(entry_of(peer(owner="x")), 3).note.startswith("the record of 'k' has the status")


def test_documents_hold_payloads_only_when_asked() -> None:
    """Neither results, nor what exceptions say, nor values that are no records."""
    result = entry_of(completed('"s3cret"'))
    failed = entry_of(completed(None, outcome="exception", error='{"message": "s3cret"}'))
    foreign = entry_of(b"s3cret \xff")
    for entry in (result, failed, foreign):
        assert "s3cret" not in json.dumps(entry.document())
        assert "s3cret" in json.dumps(entry.document(data=True))
    assert result.document(data=True)["data"] == '"s3cret"'
    assert foreign.document(data=True)["value"] == "s3cret \\xff"
    assert entry_of(None).document(data=True)["data"] is None


def test_filters() -> None:
    """By status, and by an age that is known; what is unknown is told apart."""
    old, new, unaged = entry_of(in_progress(), 1_000), entry_of(in_progress(), 59_000), entry_of(completed())
    assert all(map(Filter().meets, (old, new, unaged)))
    assert not any(map(Filter().undecided, (old, new, unaged)))
    older = Filter(older_than=30)
    assert [older.meets(entry) for entry in (old, new, unaged)] == [True, False, False]
    assert [older.undecided(entry) for entry in (old, new, unaged)] == [False, False, True]
    orphans = Filter(frozenset({Status.ORPHAN}), 30)
    assert [orphans.meets(entry) for entry in (old, new, unaged)] == [True, False, False]
    assert not orphans.undecided(unaged)


@pytest.mark.parametrize(
    ("entry", "free", "risky", "does"),
    [
        (entry_of(in_progress(attempt=2)), False, True, "as attempt 3"),
        (entry_of(in_progress(attempt=2), 1_000), True, False, "as attempt 3"),
        (entry_of(completed()), False, True, "deletes the record"),
        (entry_of(peer(owner="x")), False, True, "deletes the record"),
        (entry_of(b"token", key="p:k:lock"), False, True, "deletes the lock"),
        (entry_of(b"odd"), True, False, "nothing"),
    ],
)
def test_releases(entry: Entry, free: bool, risky: bool, does: str) -> None:
    """What is free needs nothing, everything else says what it risks."""
    release = release_of(entry)
    assert release is not None
    assert (release.free, bool(release.risk)) == (free, risky)
    assert does in release.does


def test_other_types_cannot_be_released() -> None:
    """The primitives compare strings."""
    assert release_of(entry_of(None, kind="list")) is None


def test_figures() -> None:
    """Counts and bytes by status, ages and sizes in bands, and the few at the top."""
    figures = Figures(2)
    for number, size in enumerate((10, 2_000, 20_000, 5 << 20)):
        figures.add(Entry(Seen(f"p:{number}", b"", None if number else 5, size), str(number), Status.NO_RECORD))
    for left_ms in (1_000, 50_000):
        figures.add(entry_of(in_progress(), left_ms))
    found = figures.document()
    assert found["keys"] == 6
    assert found["without_expiry"] == 3
    assert {name: counts["keys"] for name, counts in found["status"].items()} == {
        "live": 1,
        "orphan": 1,
        "no-record": 4,
    }
    assert found["bytes"] == sum(counts["bytes"] for counts in found["status"].values())
    assert found["age"] == {"< 1m": 2, "< 10m": 0, "< 1h": 0, "< 1d": 0, ">= 1d": 0, "unknown": 4}
    assert found["size"] == {"< 1 KiB": 3, "< 16 KiB": 1, "< 1 MiB": 1, ">= 1 MiB": 1}
    assert [entry["key"] for entry in found["biggest"]] == ["3", "2"]
    assert [entry["age"] for entry in found["oldest"]] == [59, 10]


def test_rankings_keep_the_first_of_equals_and_no_more_than_their_places() -> None:
    """None at all, with no place."""
    ranking, none = Ranking(2), Ranking(0)
    for number, measure in enumerate((5, 7, 5, 9, 7)):
        entry = Entry(seen(b""), str(number), Status.NO_RECORD)
        ranking.add(measure, entry)
        none.add(measure, entry)
    assert [document["key"] for document in ranking.documents()] == ["3", "1"]
    assert none.documents() == []
