"""The life of a key on every store: claim, replay, conflict, completion, release, renewal, deletion."""

import asyncio
import itertools
import json
from datetime import timedelta
from typing import Any

import pytest

from asyncidem import (
    Claimed,
    ConfigurationError,
    InProgress,
    InvalidKeyError,
    LeaseLostError,
    Mismatch,
    MissingKeyError,
    Replay,
    State,
    StoreError,
    StoreUnavailableError,
)

from stores.stores_under_test import FAKES, HOUR, SERVERS, Subject

DAY = 86_400_000
NO_RECORDS = [b"", b"not JSON", b"{}", b"[]", b"null", b"1", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"foo": 1}']
UNKNOWN = [b'{"owner": "a", "status": "ARCHIVED"}', b'{"status": 1}', b'{"owner": "a"}', b'{"status": ["INPROGRESS"]}']


def about(left_ms: int | None, ttl_ms: int, slack: int = 5_000) -> bool:
    """Whether so much is left of a time that began a moment ago."""
    return left_ms is not None and ttl_ms - slack < left_ms <= ttl_ms


async def test_first_call(subject: Subject) -> None:
    """The first claim of a key wins: attempt 1, a token of 32 hex digits, a record in progress that lives its ttl."""
    claim = await subject.store.claim("k", lease=30, ttl=86_400, fingerprint="f")
    assert isinstance(claim, Claimed)
    assert (claim.key, claim.attempt) == ("k", 1)
    assert len(bytes.fromhex(claim.owner)) == 16
    record = json.loads(await subject.record())
    assert list(record)[:2] == ["owner", "status"]
    assert record.pop("in_progress_expiration") / 1000 == pytest.approx(
        record.pop("expiration") - DAY / 1000 + 30, abs=2
    )
    assert record == {
        "owner": claim.owner,
        "status": "INPROGRESS",
        "validation": "f",
        "lease": 30_000,
        "ttl": DAY,
        "attempt": 1,
    }
    assert about(await subject.left("k"), DAY)


async def test_keys_and_tokens_are_apart(subject: Subject) -> None:
    """Claims of different keys do not meet, and no two claims share a token."""
    claims = [await subject.claimed(key) for key in ("a", "b", "A", "a b", "ä")]
    assert len({claim.owner for claim in claims}) == len(claims)


async def test_replay(subject: Subject) -> None:
    """After a completion every claim is a replay, that of its owner included, with what was stored."""
    claim = await subject.claimed(fingerprint="f")
    await subject.store.complete(claim, '{"n":1}')
    for _ in range(2):
        outcome = await subject.store.claim("k", fingerprint="f")
        assert isinstance(outcome, Replay)
        record = outcome.record
        assert (record.key, record.state, record.owner) == ("k", State.COMPLETED, claim.owner)
        assert (record.data, record.attempt, record.fingerprint, record.outcome) == ('{"n":1}', 1, "f", None)


@pytest.mark.parametrize("data", ["", "null", '"é\u2028\U0001f600"', '"\\"quoted\\" \\\\ \\n"', "x" * 50_000])
async def test_results_are_exact(subject: Subject, data: str) -> None:
    """What was completed comes back character for character."""
    await subject.store.complete(await subject.claimed(), data)
    outcome = await subject.store.claim("k")
    assert isinstance(outcome, Replay)
    assert outcome.record.data == data


async def test_in_progress(subject: Subject) -> None:
    """A duplicate of a running call is told so, and when its lease is over at the latest."""
    claim = await subject.claimed(lease=30)
    before = await subject.record()
    outcome = await subject.store.claim("k", lease=1)
    assert isinstance(outcome, InProgress)
    assert 25 < outcome.retry_after <= 30
    assert outcome.record is not None
    assert outcome.record.owner == claim.owner
    await subject.age("k", 20_000)
    outcome = await subject.store.claim("k")
    assert isinstance(outcome, InProgress)
    assert 5 < outcome.retry_after <= 10
    if subject.ages:
        assert await subject.record() == before


@pytest.mark.parametrize("state", ["running", "completed", "orphan"])
async def test_mismatch(subject: Subject, state: str) -> None:
    """Another payload is a mismatch on a running, a completed and an orphaned record, which it leaves alone."""
    claim = await subject.claimed(lease=30, fingerprint="one")
    if state == "completed":
        await subject.store.complete(claim, "1")
    if state == "orphan":
        await subject.age("k", 31_000)
    before = await subject.record()
    outcome = await subject.store.claim("k", fingerprint="two")
    assert isinstance(outcome, Mismatch)
    assert outcome.record.fingerprint == "one"
    assert await subject.record() == before
    assert await subject.raw("k:lock") is None


@pytest.mark.parametrize(("first", "second"), [("one", None), (None, "one")])
async def test_a_fingerprint_of_one_side_is_no_mismatch(
    subject: Subject, first: str | None, second: str | None
) -> None:
    """Payloads are compared only where both sides named one."""
    claim = await subject.claimed(fingerprint=first)
    assert isinstance(await subject.store.claim("k", fingerprint=second), InProgress)
    await subject.store.complete(claim, "1")
    assert isinstance(await subject.store.claim("k", fingerprint=second), Replay)


async def test_first_completion_stands(subject: Subject) -> None:
    """Completing again is success and changes nothing, whatever it brings."""
    claim = await subject.claimed()
    await subject.store.complete(claim, "1")
    before = await subject.record()
    await subject.store.complete(claim, "1")
    await subject.store.complete(claim, "2")
    await subject.store.complete(claim, None, outcome="unavailable")
    assert await subject.record() == before


async def test_completion_counts_its_ttl_anew(subject: Subject) -> None:
    """A result lives the claim's ttl from its completion on, or the ttl that the completion names."""
    claim = await subject.claimed("k", ttl=600)
    await subject.age("k", 10_000)
    await subject.store.complete(claim, "1")
    assert about(await subject.left("k"), 600_000)
    await subject.store.complete(await subject.claimed("l", ttl=600), "1", ttl=timedelta(hours=1))
    assert about(await subject.left("l"), HOUR)


@pytest.mark.parametrize("outcome", ["exception", "unavailable", "too_large"])
async def test_completion_without_a_result(subject: Subject, outcome: Any) -> None:
    """Completed without a result is a replay that says why, and that a Powertools reader fails on."""
    claim = await subject.claimed()
    await subject.store.complete(claim, None, outcome=outcome, error='{"type":"x"}')
    replay = await subject.store.claim("k")
    assert isinstance(replay, Replay)
    assert (replay.record.data, replay.record.outcome, replay.record.error) == (None, outcome, '{"type":"x"}')
    assert json.loads(await subject.record())["data"] == "!"


@pytest.mark.parametrize("data", [None, 1, b"1", {"a": 1}])
async def test_what_is_no_text_is_not_completed(subject: Subject, data: Any) -> None:
    """A completion takes encoded text, or None with an outcome; anything else is refused before it is written."""
    claim = await subject.claimed()
    before = await subject.record()
    with pytest.raises(ConfigurationError):
        await subject.store.complete(claim, data)
    assert await subject.record() == before
    await subject.store.complete(claim, "1")


async def test_complete_writes_where_the_record_is_gone(subject: Subject) -> None:
    """A completion after a flush or the record's expiry stores its result."""
    claim = await subject.claimed()
    await subject.drop("k")
    await subject.store.complete(claim, "1")
    assert isinstance(await subject.store.claim("k"), Replay)


async def test_renew_writes_where_the_record_is_gone(subject: Subject) -> None:
    """A renewal after a flush holds the key again."""
    claim = await subject.claimed()
    await subject.drop("k")
    await subject.store.renew(claim)
    assert isinstance(await subject.store.claim("k"), InProgress)
    await subject.store.complete(claim, "1")


async def test_release_never_writes(subject: Subject) -> None:
    """A release of what is gone leaves it gone."""
    claim = await subject.claimed()
    await subject.drop("k")
    await subject.store.release(claim)
    assert await subject.raw("k") is None
    assert await subject.raw("k:lock") is None


async def test_release_frees_the_key(subject: Subject) -> None:
    """A released key is claimed at once, as attempt 1 and with a token of its own."""
    claim = await subject.claimed()
    await subject.store.release(claim)
    assert await subject.raw("k") is None
    assert await subject.raw("k:lock") is None
    again = await subject.claimed()
    assert again.attempt == 1
    assert again.owner != claim.owner


@pytest.mark.parametrize("absent", [False, True])
async def test_released_tokens_are_not_used_again(subject: Subject, absent: bool) -> None:
    """A released claim neither completes nor renews, nor is it released twice, over a successor or over nothing."""
    claim = await subject.claimed()
    await subject.store.release(claim)
    if not absent:
        await subject.claimed()
    before = await subject.raw("k")
    with pytest.raises(LeaseLostError, match="released"):
        await subject.store.complete(claim, "1")
    with pytest.raises(LeaseLostError, match="released"):
        await subject.store.renew(claim)
    await subject.store.release(claim)
    assert await subject.raw("k") == before


async def test_completed_claims_are_settled(subject: Subject) -> None:
    """A completed claim can be neither renewed nor released, even where the record is gone."""
    claim = await subject.claimed()
    await subject.store.complete(claim, "1")
    before = await subject.record()
    with pytest.raises(LeaseLostError, match="completed"):
        await subject.store.renew(claim)
    await subject.store.release(claim)
    assert await subject.record() == before
    await subject.drop("k")
    with pytest.raises(LeaseLostError):
        await subject.store.renew(claim)
    assert await subject.raw("k") is None


async def test_renewal_begins_the_lease_anew(subject: Subject) -> None:
    """A renewal makes the record as young as a new claim's, and keeps what it says."""
    claim = await subject.claimed(lease=30, fingerprint="f")
    await subject.age("k", 29_000)
    await subject.store.renew(claim)
    outcome = await subject.store.claim("k")
    assert isinstance(outcome, InProgress)
    # Within the millisecond of its claim a renewal ends one later, for its bytes must be others.
    assert 25 < outcome.retry_after <= 30.001
    assert about(await subject.left("k"), DAY)
    record = json.loads(await subject.record())
    assert (record["owner"], record["attempt"], record["validation"]) == (claim.owner, 1, "f")


async def test_renewal_changes_the_bytes(subject: Subject) -> None:
    """Each renewal writes other bytes, with a clock that stands still and one that was set back."""
    now = 1_700_000_000.0
    store = subject.another(wall=lambda: now)
    claim = await store.claim("k", lease=30)
    assert isinstance(claim, Claimed)
    stamps = [json.loads(await subject.record())["in_progress_expiration"]]
    assert stamps == [1_700_000_030_000]
    for back in (0, 0, 600):
        now -= back
        await store.renew(claim)
        stamps.append(json.loads(await subject.record())["in_progress_expiration"])
    assert stamps == [stamps[0] + n for n in range(4)]
    now += 10_000
    await store.renew(claim)
    assert json.loads(await subject.record())["in_progress_expiration"] == int(now * 1000) + 30_000


async def test_ttl_floor(subject: Subject) -> None:
    """No record lives for less than a second, whether in progress or completed."""
    claim = await subject.claimed(lease=0.2, ttl=0.001)
    assert json.loads(await subject.record())["ttl"] == 1000
    assert about(await subject.left("k"), 1000, 900)
    await subject.store.complete(claim, "1", ttl=0.001)
    assert about(await subject.left("k"), 1000, 900)
    claim = await subject.claimed("l", lease=0.2, ttl=0.001)
    await subject.store.complete(claim, "1")
    assert about(await subject.left("l"), 1000, 900)


async def test_a_record_outlives_its_lease(subject: Subject) -> None:
    """A record in progress lives as long as its lease at least, its result as long as the ttl."""
    claim = await subject.claimed(lease=60, ttl=20)
    assert json.loads(await subject.record())["ttl"] == 60_000
    assert about(await subject.left("k"), 60_000)
    await subject.store.complete(claim, "1")
    assert about(await subject.left("k"), 20_000)


async def test_durations_are_checked(subject: Subject) -> None:
    """What is no duration is refused before anything is written."""
    values: list[Any] = [0, -1, True, float("nan"), "30", timedelta(0)]
    for option, value in itertools.product(("lease", "ttl"), values):
        with pytest.raises(ConfigurationError, match=option):
            await subject.store.claim("k", **{option: value})
    assert await subject.raw("k") is None


@pytest.mark.parametrize(("key", "error"), [("", MissingKeyError), (1, InvalidKeyError), (b"k", InvalidKeyError)])
async def test_keys_are_checked(subject: Subject, key: Any, error: type[Exception]) -> None:
    """What is no key is refused by claim, get and delete."""
    for call in (subject.store.claim, subject.store.get, subject.store.delete):
        with pytest.raises(error):
            await call(key)


async def test_get(subject: Subject) -> None:
    """Get shows the record and the seconds it has left, without touching it."""
    assert await subject.store.get("k") is None
    claim = await subject.claimed(lease=30, ttl=600, fingerprint="f")
    before = await subject.record()
    record = await subject.store.get("k")
    assert record is not None
    assert (record.key, record.state, record.owner, record.attempt) == ("k", State.INPROGRESS, claim.owner, 1)
    assert (record.data, record.fingerprint, record.outcome) == (None, "f", None)
    assert await subject.record() == before
    await subject.store.complete(claim, '"secret"')
    record = await subject.store.get("k")
    assert record is not None
    assert (record.state, record.data) == (State.COMPLETED, '"secret"')
    assert "secret" not in repr(record)
    if subject.ages:
        assert record.expires_in == pytest.approx(600, abs=5)
    else:
        assert record.expires_in is None


@pytest.mark.parametrize("value", NO_RECORDS)
async def test_values_that_are_no_record(subject: Subject, value: bytes) -> None:
    """A value that is no record is None to get, and an orphan to claim: somebody was there, so attempt is 2."""
    await subject.write("k", value)
    assert await subject.store.get("k") is None
    claim = await subject.claimed()
    assert claim.attempt == 2
    assert await subject.raw("k:lock") == claim.owner.encode()
    await subject.store.complete(claim, "1")
    assert isinstance(await subject.store.claim("k"), Replay)


@pytest.mark.parametrize("value", UNKNOWN)
async def test_unknown_statuses_are_left_alone(subject: Subject, value: bytes) -> None:
    """A record that another version wrote is a StoreError to claim and get, and is not touched."""
    await subject.write("k", value)
    for call in (subject.store.claim, subject.store.get):
        with pytest.raises(StoreError, match="status") as caught:
            await call("k")
        assert not isinstance(caught.value, StoreUnavailableError)
    assert await subject.record() == value
    assert await subject.raw("k:lock") is None


async def test_delete_of_nothing(subject: Subject) -> None:
    """Delete says that there was nothing, and leaves nothing."""
    assert await subject.store.delete("k") is False
    assert await subject.raw("k") is None


@pytest.mark.parametrize("value", [*NO_RECORDS, *UNKNOWN, b'{"status": "COMPLETED", "data": "1"}'])
async def test_delete(subject: Subject, value: bytes) -> None:
    """Delete removes what is no live record: completed, of another version, or no record at all."""
    await subject.write("k", value)
    assert await subject.store.delete("k") is True
    assert await subject.raw("k") is None
    assert (await subject.claimed()).attempt == 1


async def test_delete_of_a_result(subject: Subject) -> None:
    """A deleted result is run again as a first attempt, and its old owner cannot bring it back."""
    claim = await subject.claimed()
    await subject.store.complete(claim, "1")
    assert await subject.store.delete("k") is True
    assert await subject.store.delete("k") is False
    assert (await subject.claimed()).attempt == 1
    with pytest.raises(LeaseLostError):
        await subject.store.complete(claim, "1")


@pytest.mark.parametrize("successor", [False, True])
async def test_delete_fences_off_a_live_owner(subject: Subject, successor: bool) -> None:
    """A live claim that is deleted is lost to its owner, and the next claim sees that somebody was there."""
    one, two = await subject.claimed(fingerprint="f"), await subject.claimed("other")
    assert await subject.store.delete("k") is True
    if successor:
        claim = await subject.claimed(fingerprint="f")
        assert claim.attempt == 2
    before = await subject.record()
    with pytest.raises(LeaseLostError):
        await subject.store.renew(one)
    await subject.store.release(one)
    assert await subject.store.delete("other") is True
    with pytest.raises(LeaseLostError):
        await subject.store.complete(two, "1")
    assert await subject.record() == before


async def test_delete_of_an_orphan(subject: Subject) -> None:
    """An orphan that is deleted still counts as an attempt, for its owner may yet wake up."""
    claim = await subject.orphan(lease=30)
    assert await subject.store.delete("k") is True
    with pytest.raises(LeaseLostError):
        await subject.store.complete(claim, "1")
    assert (await subject.claimed()).attempt == 2


@pytest.mark.parametrize("subject", [*SERVERS, *FAKES], indirect=True)
async def test_another_type_is_refused(subject: Subject) -> None:
    """A key of another Redis type is a StoreError with a hint to claim, get, delete, complete, renew and release."""
    store = subject.store
    claims: list[Claimed] = []
    for _ in range(3):
        claims.append(await subject.claimed())
        await subject.drop("k")
    await subject.client.rpush("t:k", "x")  # type: ignore[attr-defined]
    for call in (
        lambda: store.claim("k"),
        lambda: store.get("k"),
        lambda: store.delete("k"),
        lambda: store.complete(claims[0], "1"),
        lambda: store.renew(claims[1]),
        lambda: store.release(claims[2]),
    ):
        with pytest.raises(StoreError, match=r"WRONGTYPE.*another Redis type") as caught:
            await call()
        assert not isinstance(caught.value, StoreUnavailableError)


async def test_prefix_and_long_keys(subject: Subject) -> None:
    """Keys are stored behind the prefix as they are, up to 512 bytes; longer ones and `:lock` as a digest."""
    kept = ["a", "b" * 512, "ä" * 256, "lock", "a:locked"]
    hashed = ["c" * 513, "ö" * 257, "a:lock", ":lock"]
    for key in kept:
        await subject.claimed(key)
        assert await subject.raw(key) is not None
    for key in hashed:
        claim = await subject.claimed(key)
        assert await subject.raw(key) is None
        assert isinstance(await subject.store.claim(key), InProgress)
        await subject.store.complete(claim, "1")
        assert isinstance(await subject.store.claim(key), Replay)
        assert await subject.store.delete(key)


async def test_prefixes_are_apart(subject: Subject) -> None:
    """Stores of different prefixes do not see each other's keys; one without writes keys byte for byte."""
    await subject.claimed("k")
    assert isinstance(await subject.another(prefix="t:other:").claim("k"), Claimed)
    assert isinstance(await subject.another(prefix="").claim("t:plain"), Claimed)
    assert await subject.raw("plain") is not None
    assert isinstance(await subject.another(prefix="").claim("t:k"), InProgress)


async def test_attribute_names(subject: Subject) -> None:
    """A record is written and read with the attribute names that the store was given."""
    names = {
        "status_attr": "st",
        "expiry_attr": "ex",
        "in_progress_expiry_attr": "ip",
        "data_attr": "da",
        "validation_key_attr": "va",
    }
    store = subject.another(**names)
    claim = await store.claim("k", fingerprint="f")
    assert isinstance(claim, Claimed)
    assert set(json.loads(await subject.record())) == {"owner", "st", "ex", "ip", "va", "lease", "ttl", "attempt"}
    await store.renew(claim)
    assert isinstance(await store.claim("k", fingerprint="f"), InProgress)
    assert isinstance(await store.claim("k", fingerprint="g"), Mismatch)
    await store.complete(claim, "1")
    assert set(json.loads(await subject.record())) == {"owner", "st", "da", "ex", "va"}
    replay = await store.claim("k", fingerprint="f")
    assert isinstance(replay, Replay)
    assert replay.record.data == "1"
    with pytest.raises(StoreError, match="attribute names"):
        await subject.store.claim("k")


async def test_one_of_fifty_claims_wins(subject: Subject) -> None:
    """Of fifty concurrent claims of one key one wins, and all others see it in progress."""
    stores = [subject.store, subject.another()]
    outcomes = await asyncio.gather(*(stores[n % 2].claim("k", fingerprint="f") for n in range(50)))
    assert sum(isinstance(outcome, Claimed) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, InProgress) for outcome in outcomes) == 49


async def test_stores_close(subject: Subject) -> None:
    """A store is its own context manager; what it wrote stays."""
    async with subject.another() as store:
        assert isinstance(await store.claim("k"), Claimed)
    assert isinstance(await subject.store.claim("k"), InProgress)
