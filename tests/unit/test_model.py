"""The law: what bytes say, and what a worker may do about them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncidem import InProgress, Mismatch, Record, Replay, State, StoreError
from asyncidem.model import (
    LEFT_UNKNOWN,
    Attributes,
    Decision,
    Orphan,
    Own,
    RecordFormat,
    Unaged,
    decide,
    matches,
    owner_of,
)

FORMAT = RecordFormat(Attributes())
OWNER, OTHER = "a" * 32, "b" * 32
NOW = 1_700_000_000_000


def running(**fields: Any) -> Record:
    """Return a record in progress of attempt 2, with a lease of 30 s and a ttl of 100 s."""
    defaults: dict[str, Any] = {
        "key": "k",
        "state": State.INPROGRESS,
        "owner": OWNER,
        "attempt": 2,
        "data": None,
        "fingerprint": "f",
        "outcome": None,
        "expires_in": None,
        "lease_ms": 30_000,
        "ttl_ms": 100_000,
        "expiration": (NOW + 100_000) / 1000,
        "in_progress_expiration": NOW + 30_000,
    }
    return Record(**{**defaults, **fields})


def completed(**fields: Any) -> Record:
    """Return a completed record."""
    return running(state=State.COMPLETED, data="1", lease_ms=None, ttl_ms=None, in_progress_expiration=None, **fields)


def peers(**fields: Any) -> Record:
    """Return a record in progress of Powertools, whose writer's clock is an hour ahead."""
    return running(
        owner=None,
        attempt=1,
        lease_ms=None,
        ttl_ms=None,
        **{
            "expiration": (NOW + 3_700_000) / 1000,
            "in_progress_expiration": NOW + 3_630_000,
            **fields,
        },
    )


def judge(record: Record | None, left_ms: int | None, **options: Any) -> Decision:
    """Decide as a stranger without a payload, ten minutes off, unless told otherwise."""
    defaults: dict[str, Any] = {"owner": OTHER, "fingerprint": None, "now_ms": NOW + 600_000, "aged": True}
    return decide(record, left_ms, **{**defaults, **options})


# -- decide ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aged", [False, True])
@pytest.mark.parametrize("left_ms", [None, LEFT_UNKNOWN, 0, 99_000])
@pytest.mark.parametrize("fingerprint", [None, "f", "other"])
def test_own(aged: bool, left_ms: int | None, fingerprint: str | None) -> None:
    """A record in progress with one's own token is one's own, however old it looks."""
    assert isinstance(judge(running(), left_ms, owner=OWNER, aged=aged, fingerprint=fingerprint), Own)


def test_nobody_owns_a_record_without_owner() -> None:
    """Who asks without a token, as a waiter does, owns no record, not even one that has none."""
    assert isinstance(judge(peers(), 3_700_000, owner=None), InProgress)
    assert isinstance(judge(running(), 99_000, owner=None), InProgress)


def test_own_result_is_a_replay() -> None:
    """A completed record with one's own token is a result."""
    record = completed()
    assert judge(record, 5, owner=OWNER) == Replay(record)


@pytest.mark.parametrize("aged", [False, True])
@pytest.mark.parametrize("left_ms", [None, LEFT_UNKNOWN, 0, 99_000])
@pytest.mark.parametrize("fingerprint", [None, "f"])
def test_replay(aged: bool, left_ms: int | None, fingerprint: str | None) -> None:
    """A completed record is replayed whatever it has left."""
    record = completed()
    assert judge(record, left_ms, aged=aged, fingerprint=fingerprint) == Replay(record)


@pytest.mark.parametrize("aged", [False, True])
@pytest.mark.parametrize("record", [running(), completed(), peers(), running(lease_ms=0)])
@pytest.mark.parametrize("left_ms", [None, LEFT_UNKNOWN, 0, 50_000, 99_000])
def test_mismatch(record: Record, left_ms: int | None, aged: bool) -> None:
    """Another payload is a mismatch, whether the first use runs, completed or was left behind."""
    assert judge(record, left_ms, fingerprint="other", aged=aged) == Mismatch(record)
    assert judge(record, left_ms, fingerprint="", aged=aged) == Mismatch(record)


@pytest.mark.parametrize("make", [running, completed])
def test_no_mismatch_without_two_payloads(make: Any) -> None:
    """A payload is compared only where both sides have one."""
    assert not isinstance(judge(make(fingerprint=None), 99_000, fingerprint="other"), Mismatch)
    assert not isinstance(judge(make(), 99_000, fingerprint=None), Mismatch)


@pytest.mark.parametrize("record", [None, running(), running(lease_ms=0), peers()])
def test_unaged(record: Record | None) -> None:
    """Whether a record is an orphan is not said before its time left is known."""
    assert isinstance(judge(record, LEFT_UNKNOWN, aged=False), Unaged)


def test_no_record() -> None:
    """A value that is no record is an orphan of an attempt, without a payload."""
    assert judge(None, 5) == Orphan(1, None)
    assert judge(None, None, fingerprint="f") == Orphan(1, None)


IN_PROGRESS: list[tuple[str, Record, int | None, float]] = [
    ("just written", running(), 100_000, 30),
    ("a second old", running(), 99_000, 29),
    ("a millisecond before its end", running(), 70_001, 0.001),
    ("with more than its ttl", running(), 101_000, 31),
    ("whose stamp says that it is over", running(in_progress_expiration=NOW - 1), 99_000, 29),
    ("without pttl", running(in_progress_expiration=NOW + 600_100), LEFT_UNKNOWN, 0.1),
    (
        "without pttl and stamp",
        running(in_progress_expiration=None, expiration=(NOW + 600_100) / 1000),
        LEFT_UNKNOWN,
        0.1,
    ),
    ("of a peer", peers(), 3_700_000, 3_630),
    ("of a peer that is aged", peers(), 3_700_000 - 3_629_999, 0.001),
    ("of a peer, no stamp", peers(in_progress_expiration=None), 5_000, 5),
    ("of a peer, no expiration", peers(expiration=None), 5_000, 5),
    ("of a peer, no expiry, stamp ahead", peers(in_progress_expiration=NOW + 600_500), None, 0.5),
    ("of a peer, no expiry, no stamp", peers(in_progress_expiration=None), None, 1),
    ("of a peer, no expiry, nothing", peers(in_progress_expiration=None, expiration=None), None, 1),
    ("of a peer without pttl", peers(in_progress_expiration=NOW + 600_500), LEFT_UNKNOWN, 0.5),
    ("of a peer without pttl, no stamp", peers(in_progress_expiration=None), LEFT_UNKNOWN, 3_100),
    ("of a peer without pttl, nothing", peers(in_progress_expiration=None, expiration=None), LEFT_UNKNOWN, 1),
    ("of ours without ttl", running(ttl_ms=None), 100_000, 30),
    ("of ours without lease", running(lease_ms=None), 100_000, 30),
]


@pytest.mark.parametrize(
    ("record", "left_ms", "retry_after"), [case[1:] for case in IN_PROGRESS], ids=[case[0] for case in IN_PROGRESS]
)
def test_in_progress(record: Record, left_ms: int | None, retry_after: float) -> None:
    """A record whose lease is not over is in progress, for as long as the lease has left."""
    decision = judge(record, left_ms)
    assert isinstance(decision, InProgress)
    assert decision.retry_after == pytest.approx(retry_after, abs=1e-9)
    assert decision.record is record


ORPHANS: list[tuple[str, Record, int | None]] = [
    ("at its end", running(), 70_000),
    ("long ago", running(), 0),
    ("whose stamp says that it is not over", running(in_progress_expiration=NOW + 10**9), 70_000),
    ("released", running(lease_ms=0), 100_000),
    ("released, without pttl", running(lease_ms=0, in_progress_expiration=NOW + 10**9), LEFT_UNKNOWN),
    ("of ours without expiry", running(in_progress_expiration=NOW + 10**9), None),
    ("without pttl", running(in_progress_expiration=NOW + 600_000), LEFT_UNKNOWN),
    ("of a peer at its end", peers(), 3_700_000 - 3_630_000),
    ("of a peer, no expiry", peers(in_progress_expiration=NOW + 600_000), None),
    ("of a peer without pttl", peers(in_progress_expiration=NOW + 599_999), LEFT_UNKNOWN),
    ("of a peer without pttl, no stamp", peers(in_progress_expiration=None, expiration=NOW / 1000), LEFT_UNKNOWN),
    ("of a peer, expiring now", peers(in_progress_expiration=None), 0),
]


@pytest.mark.parametrize(("record", "left_ms"), [case[1:] for case in ORPHANS], ids=[case[0] for case in ORPHANS])
def test_orphans(record: Record, left_ms: int | None) -> None:
    """A record whose lease is over is an orphan, of the attempt and the payload that it names."""
    assert judge(record, left_ms) == Orphan(record.attempt, "f")


@pytest.mark.parametrize("now_ms", [0, NOW - 600_000, NOW, NOW + 10**12])
@pytest.mark.parametrize("record", [running(), peers()])
def test_no_client_clock_decides(record: Record, now_ms: int) -> None:
    """Where the store knows what a record has left, the client's clock changes nothing."""
    for left_ms in (0, 50_000, 70_000, 70_001, 99_000, 3_700_000):
        assert judge(record, left_ms, now_ms=now_ms) == judge(record, left_ms, now_ms=NOW)


# -- whatever may be there ---------------------------------------------------------------------------------------------

times = st.one_of(st.none(), st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.text(max_size=3))
jsons = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
recordlike = st.fixed_dictionaries(
    {},
    optional={
        "owner": st.one_of(st.sampled_from([OWNER, OTHER]), jsons),
        "status": st.one_of(st.sampled_from(["INPROGRESS", "COMPLETED"]), jsons),
        "expiration": times,
        "in_progress_expiration": times,
        "lease": times,
        "ttl": times,
        "attempt": times,
        "data": jsons,
        "validation": st.one_of(st.sampled_from(["f", "g"]), jsons),
        "outcome": jsons,
        "error": jsons,
    },
)
values = st.one_of(
    st.binary(max_size=40),
    jsons.map(lambda item: json.dumps(item).encode()),
    recordlike.map(lambda item: json.dumps(item).encode()),
    recordlike.map(lambda item: json.dumps(item, ensure_ascii=False).encode(errors="surrogatepass")),
)
lefts = st.one_of(st.none(), st.just(LEFT_UNKNOWN), st.integers(0, 2**53))


@given(values, lefts)
def test_parse_and_decide_are_total(value: bytes, left_ms: int | None) -> None:
    """Whatever is stored is a record, none, or a StoreError; and about each record and its age there is a decision."""
    try:
        record = FORMAT.parse("k", value, left_ms)
    except StoreError:
        return
    for owner in (None, OWNER):
        for fingerprint in (None, "f"):
            for aged in (False, True):
                decision = decide(record, left_ms, owner=owner, fingerprint=fingerprint, now_ms=NOW, aged=aged)
                assert isinstance(decision, Own | Replay | Mismatch | InProgress | Orphan | Unaged)
                assert aged or not isinstance(decision, InProgress | Orphan)
                assert not (aged and isinstance(decision, Unaged))
                if isinstance(decision, InProgress):
                    assert decision.retry_after > 0
                if isinstance(decision, Orphan):
                    assert record is None or record.state is State.INPROGRESS
                    assert decision.attempt >= 1
    if record is not None and record.state is State.COMPLETED:
        assert (record.data is None) != (record.outcome is None), "a result, or why there is none"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
durations = st.integers(0, 100 * 366 * 86_400_000)
names = st.lists(texts.filter(bool), min_size=5, max_size=5, unique=True).filter(
    lambda five: not set(five) & {"owner", "lease", "ttl", "attempt", "outcome", "error"}
)


@given(names, durations, durations, durations, st.integers(1, 10**6), st.one_of(st.none(), texts))
def test_in_progress_round_trip(
    five: list[str], now_ms: int, lease_ms: int, ttl_ms: int, attempt: int, fingerprint: str | None
) -> None:
    """A record in progress reads as what it was built of, and carries its owner's fence and nobody else's."""
    record_format = RecordFormat(Attributes(*five))
    stamp = now_ms + lease_ms
    value = record_format.in_progress(
        OWNER, now_ms=now_ms, stamp=stamp, lease_ms=lease_ms, ttl_ms=ttl_ms, attempt=attempt, fingerprint=fingerprint
    )
    record = record_format.parse("k", value, ttl_ms)
    assert record == Record(
        key="k",
        state=State.INPROGRESS,
        owner=OWNER,
        attempt=attempt,
        data=None,
        fingerprint=fingerprint,
        outcome=None,
        expires_in=ttl_ms / 1000,
        lease_ms=lease_ms,
        ttl_ms=ttl_ms,
        expiration=-(-(now_ms + ttl_ms) // 1000),
        in_progress_expiration=stamp,
    )
    assert owner_of(value) == OWNER
    assert matches(value, record_format.fence(OWNER), exact=False)
    assert not matches(value, record_format.fence(OTHER), exact=False)
    assert not matches(value, record_format.own_completion(OWNER), exact=False)
    fresh = decide(record, ttl_ms, owner=OTHER, fingerprint=None, now_ms=0, aged=True)
    assert fresh == (InProgress(lease_ms / 1000, record) if lease_ms else Orphan(attempt, fingerprint))


@given(
    texts, durations, st.one_of(st.none(), texts), st.integers(1, 9), st.one_of(st.none(), st.just("exception")), texts
)
def test_completed_round_trip(
    data: str, now_ms: int, fingerprint: str | None, attempt: int, outcome: Any, error: str
) -> None:
    """A completed record reads as what it was built of, and none that is in progress matches it."""
    value = FORMAT.completed(
        OWNER,
        now_ms=now_ms,
        ttl_ms=1000,
        data=None if outcome else data,
        fingerprint=fingerprint,
        attempt=attempt,
        outcome=outcome,
        error=error if outcome else None,
    )
    record = FORMAT.parse("k", value)
    assert record is not None
    assert (record.state, record.owner, record.attempt) == (State.COMPLETED, OWNER, attempt)
    assert (record.data, record.outcome) == ((None, outcome) if outcome else (data, None))
    assert (record.fingerprint, record.error) == (fingerprint, error if outcome else None)
    assert owner_of(value) == OWNER
    assert matches(value, FORMAT.own_completion(OWNER), exact=False)
    assert not matches(value, FORMAT.fence(OWNER), exact=False)
