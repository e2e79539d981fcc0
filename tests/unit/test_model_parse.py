"""What the bytes of a record say, whoever wrote them, and whose they are."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncidem import ConfigurationError, Record, Replay, State, StoreError, StoreUnavailableError
from asyncidem.model import LEFT_UNKNOWN, Attributes, RecordFormat, matches, owner_of
from asyncidem.stores.durable import BEGINNING

FORMAT = RecordFormat(Attributes())
OWNER = "a" * 32


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b" ",
        b"text",
        b"{",
        b"{}",
        b"[]",
        b"null",
        b"true",
        b"1",
        b"NaN",
        b'"INPROGRESS"',
        b'[{"status": "INPROGRESS"}]',
        b"\xff\xfe\x00",
        b'{"status": "INPROGRESS"\xff}',
        b'\xef\xbb\xbf{"status": "INPROGRESS"}',
        b'{"status": "INPROGRESS"} x',
        b'{"n": ' + b"9" * 5000 + b"}",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"foo": "bar"}',
        b'{"data": "1", "expiration": 5}',
    ],
    ids=lambda value: repr(value[:24]),
)
def test_values_that_are_no_record(value: bytes) -> None:
    """What is not JSON, no object, empty, or has neither owner nor status is no record."""
    assert FORMAT.parse("k", value) is None


@pytest.mark.parametrize(
    "value",
    [
        b'{"status": "EXPIRED"}',
        b'{"status": "inprogress"}',
        b'{"status": ""}',
        b'{"status": null}',
        b'{"status": 1}',
        b'{"status": ["INPROGRESS"]}',
        b'{"status": {"a": 1}}',
        b'{"owner": "a"}',
        b'{"owner": null, "st": "INPROGRESS"}',
        b'{"status": ' + b"[" * 500 + b"]" * 500 + b"}",
    ],
    ids=lambda value: repr(value[:40]),
)
def test_records_of_other_versions(value: bytes) -> None:
    """A status that is not known, or an owner without one, is an error that names the key: never an orphan."""
    with pytest.raises(StoreError, match="'the-key'") as caught:
        FORMAT.parse("the-key", value)
    assert not isinstance(caught.value, StoreUnavailableError)


@pytest.mark.parametrize(
    "time",
    [
        "true",
        "false",
        "null",
        '"1700000000"',
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        "1" + "0" * 400,
        str(2**63),
        str(-(2**63)),
        "[1]",
        "{}",
    ],
)
def test_times_that_are_none(time: str) -> None:
    """What cannot be a time, or a count, is as if it were not there."""
    value = (
        f'{{"owner": "a", "status": "INPROGRESS", "expiration": {time}, "in_progress_expiration": {time}, '
        f'"lease": {time}, "ttl": {time}, "attempt": {time}}}'
    )
    assert FORMAT.parse("k", value.encode()) == Record("k", State.INPROGRESS, "a", 1, None, None, None, None)


@pytest.mark.parametrize(
    ("attempt", "expected"), [("1", 1), ("7", 7), ("2.9", 2), ("0", 1), ("0.9", 1), ("-3", 1), (str(2**62), 2**62)]
)
def test_attempts(attempt: str, expected: int) -> None:
    """An attempt is a whole number from 1 on."""
    record = FORMAT.parse("k", f'{{"status": "INPROGRESS", "attempt": {attempt}}}'.encode())
    assert record is not None
    assert record.attempt == expected
    assert type(record.attempt) is int


@pytest.mark.parametrize(("lease", "expected"), [("0", 0), ("30000", 30_000), ("1.7", 1), ("-1", None)])
def test_leases(lease: str, expected: int | None) -> None:
    """A lease and a ttl are whole milliseconds, never negative."""
    record = FORMAT.parse("k", f'{{"status": "INPROGRESS", "lease": {lease}, "ttl": {lease}}}'.encode())
    assert record is not None
    assert (record.lease_ms, record.ttl_ms) == (expected, expected)


@pytest.mark.parametrize("text", ["1", "null", "{}", "[]", "true"])
def test_texts_that_are_none(text: str) -> None:
    """What should be text and is not, is as if it were not there."""
    value = f'{{"owner": {text}, "status": "COMPLETED", "data": {text}, "validation": {text}, "error": {text}}}'
    assert FORMAT.parse("k", value.encode()) == Record("k", State.COMPLETED, None, 1, None, None, "unavailable", None)


def test_an_outcome_that_is_not_known_has_no_data() -> None:
    """A newer outcome of a completed record is kept, and its data are no result."""
    record = FORMAT.parse("k", b'{"status": "COMPLETED", "data": "1", "outcome": "compressed"}')
    assert record is not None
    assert (record.data, record.outcome) == (None, "compressed")


@pytest.mark.parametrize(
    ("left_ms", "expires_in"), [(None, None), (LEFT_UNKNOWN, None), (0, 0.0), (1, 0.001), (90_500, 90.5)]
)
def test_expires_in(left_ms: int | None, expires_in: float | None) -> None:
    """A record says in seconds what it has left, if that is known."""
    record = FORMAT.parse("k", b'{"status": "COMPLETED", "data": "1"}', left_ms)
    assert record is not None
    assert record.expires_in == expires_in


SECRET = Record("k", State.COMPLETED, "a", 1, "secret", "f", None, None, error="secret")


def test_secrets_are_not_shown() -> None:
    """Results and exceptions are not in a record's repr, which ends up in logs."""
    assert "secret" not in repr(Replay(SECRET))


def test_other_names() -> None:
    """With names of its own a format reads those, and not the usual ones."""
    named = RecordFormat(Attributes("st", "ex", "ip", "da", "va"))
    value = b'{"owner": "a", "st": "COMPLETED", "status": "X", "ex": 1, "ip": 2, "da": "d", "data": "x", "va": "v"}'
    assert named.parse("k", value) == Record(
        "k", State.COMPLETED, "a", 1, "d", "v", None, None, expiration=1, in_progress_expiration=2
    )
    assert named.parse("k", b'{"status": "INPROGRESS"}') is None


# -- attribute names ---------------------------------------------------------------------------------------------------

OPTIONS = ["status_attr", "expiry_attr", "in_progress_expiry_attr", "data_attr", "validation_key_attr"]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["", None, 1, b"status", ["a"]])
def test_attributes_are_names(option: str, name: Any) -> None:
    """An attribute's name is text that is not empty; the error names the option."""
    with pytest.raises(ConfigurationError, match=option):
        Attributes(**{option: name})


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["owner", "lease", "ttl", "attempt", "outcome", "error"])
def test_attributes_keep_off_ours(option: str, name: str) -> None:
    """No attribute takes the name of one that is fixed."""
    with pytest.raises(ConfigurationError, match=repr(name)):
        Attributes(**{option: name})


@pytest.mark.parametrize("option", OPTIONS)
def test_attributes_have_short_names(option: str) -> None:
    """A name may have 64 bytes as UTF-8; the error of a longer one names it, its size and what to do."""
    for name in ("n" * 64, "é" * 32, "\ud800" * 21):
        assert getattr(Attributes(**{option: name}), option) == name
    for name, size in (("n" * 65, 65), ("é" * 33, 66), ("\ud800" * 22, 66)):
        with pytest.raises(
            ConfigurationError, match=f"{option} must have at most 64 bytes as UTF-8, and .* has {size}: use a shorter"
        ):
            Attributes(**{option: name})


@pytest.mark.parametrize("character", ["n", "é", "😀", '"', "\x01"], ids=ascii)
def test_a_record_is_recognised_by_its_beginning(character: str) -> None:
    """Whatever the names: who wrote it, what it says, and which renewal it is, with times of as many digits as are read."""
    longest = 63 // len(character.encode())
    names = [chr(ord("a") + number) + character * longest for number in range(5)]
    records = RecordFormat(Attributes(*names))
    long_ago, late = 10**17, 2**63 - 2
    running = [
        records.in_progress(owner * 32, late * 1000, stamp, lease_ms=1, ttl_ms=1, attempt=1, fingerprint="f")
        for owner in "ab"
        for stamp in (long_ago, late, late + 1)
    ]
    done = [records.completed(owner * 32, late, 1, "1", None, 1) for owner in "ab"]
    assert len({value[:BEGINNING] for value in (*running, *done)}) == len(running) + len(done)


def test_attributes_are_apart() -> None:
    """No two attributes share a name; two may change places."""
    with pytest.raises(ConfigurationError, match="'data'"):
        Attributes(status_attr="data")
    assert Attributes(status_attr="data", data_attr="status").data_attr == "status"


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected", "exact", "result"),
    [
        (None, b"", False, False),
        (None, b"", True, False),
        (b"abc", b"abc", True, True),
        (b"abc", b"ab", True, False),
        (b"abc", b"ab", False, True),
        (b"abc", b"bc", False, False),
        (b"ab", b"abc", False, False),
    ],
)
def test_matches(value: bytes | None, expected: bytes, exact: bool, result: bool) -> None:
    """Bytes match when they are equal, or begin with what is expected; absence matches nothing."""
    assert matches(value, expected, exact=exact) is result


@pytest.mark.parametrize(
    ("value", "owner"),
    [
        (FORMAT.fence(OWNER), OWNER),
        (FORMAT.own_completion(OWNER), OWNER),
        (b'{"owner": "a"', "a"),
        (b'{"owner": "\xff"', "\ufffd"),
        (b'{"owner": ""', ""),
        (b'{"owner": "', None),
        (b'{"owner": "a', None),
        (b'{"owner":"a"}', None),
        (b'{"status": "INPROGRESS", "owner": "a"}', None),
        (b"", None),
    ],
)
def test_owner_of(value: bytes, owner: str | None) -> None:
    """The owner is read off the first bytes of a record of ours, and of nothing else."""
    assert owner_of(value) == owner


COMPLETED = FORMAT.completed(OWNER, 1_700_000_000_000, 60_000, '{"receipt": "r-1"}', "ab" * 16, 1)


@given(
    data=st.text(), fingerprint=st.none() | st.text("0123456789abcdef", min_size=32, max_size=32), left=st.integers(0)
)
def test_short_way_of_a_replay(data: str, fingerprint: str | None, left: int) -> None:
    """A completed record as it is written here is read the short way, and says what the long way says."""
    value = FORMAT.completed(OWNER, 1_700_000_000_000, 60_000, data, fingerprint, 1)
    record = FORMAT.parse_completed("k", value, left)
    assert record == Record(
        "k", State.COMPLETED, OWNER, 1, data, fingerprint, None, left / 1000, expiration=1_700_000_060
    )
    assert FORMAT.parse("k", value.replace(b'", "status"', b'" , "status"'), left) == record


@pytest.mark.parametrize(
    "value",
    [
        COMPLETED[:70],
        COMPLETED[:-1],
        COMPLETED + b" ",
        COMPLETED.replace(b"r-1", "r-\u00e9".encode()),
        COMPLETED.replace(b"r-1", b"r-\n"),
        COMPLETED[:-1] + b', "attempt": 2}',
        COMPLETED[:-1] + b', "status": "INPROGRESS"}',
        COMPLETED.replace(OWNER.encode(), b"0" * 20 + b'", "x": "012'),
        COMPLETED.replace(b'"owner"', b'"OWNER"'),
        FORMAT.completed(OWNER, 1, 60_000, None, None, 1, "too_large"),
        FORMAT.in_progress(OWNER, 1, 2, 3, 4, 1, None),
        b"",
    ],
    ids=range(12),
)
def test_long_way_of_all_else(value: bytes) -> None:
    """Whatever else begins like a completed record is left to the parser."""
    assert FORMAT.parse_completed("k", value, None) is None
