"""Takeovers on every store: orphans, their lock, zombies, records of peers, and clocks that are wrong."""

import asyncio
import json
import re
import time

import pytest

from asyncidem import (
    Claimed,
    InProgress,
    LeaseLostError,
    Mismatch,
    Replay,
    StoreError,
    StoreUnavailableError,
)
from asyncidem.model import Swap

from stores.stores_under_test import (
    FAKES,
    GUARDED,
    HOUR,
    KINDS,
    SERVERS,
    Subject,
    before,
    bumped,
    twice,
    unsettled_copy,
)

WITH_PERSIST = [kind for kind in KINDS if kind not in ("memory", "client-without-pttl")]
AGING = [kind for kind in KINDS if kind != "client-without-pttl"]


def about(left_ms: int | None, ttl_ms: int, slack: int = 5_000) -> bool:
    """Whether so much is left of a time that began a moment ago."""
    return left_ms is not None and ttl_ms - slack < left_ms <= ttl_ms


async def test_attempts_count_up(subject: Subject) -> None:
    """Each owner that takes over from one whose lease is over is one attempt more, up to the result."""
    tokens = set()
    for attempt in (1, 2, 3):
        claim = await subject.orphan(lease=30)
        assert claim.attempt == attempt
        assert json.loads(await subject.record())["attempt"] == attempt
        tokens.add(claim.owner)
        await subject.drop("k:lock")
    assert len(tokens) == 3
    last = await subject.claimed()
    await subject.store.complete(last, "1")
    replay = await subject.store.claim("k")
    assert isinstance(replay, Replay)
    assert (replay.record.attempt, replay.record.owner) == (4, last.owner)


@pytest.mark.parametrize(("age", "free"), [(25_000, False), (30_500, True)])
async def test_an_orphan_is_what_its_lease_says(subject: Subject, age: int, free: bool) -> None:
    """A record is taken over when its own lease is over, whatever lease the next claim asks for."""
    await subject.claimed(lease=30)
    await subject.age("k", age)
    for lease in (1, 300):
        outcome = await subject.store.claim("k", lease=lease)
        assert isinstance(outcome, Claimed if free and lease == 1 else InProgress)


async def test_a_taken_over_record_lives_anew(subject: Subject) -> None:
    """A takeover writes a record of the new claim's own lease and ttl."""
    await subject.orphan(lease=30, ttl=600)
    await subject.claimed(lease=60, ttl=1200)
    record = json.loads(await subject.record())
    assert (record["lease"], record["ttl"], record["attempt"]) == (60_000, 1_200_000, 2)
    assert about(await subject.left("k"), 1_200_000)


@pytest.mark.parametrize("stored", ["orphan", "garbage"])
async def test_one_of_twenty_racers_wins(subject: Subject, stored: str) -> None:
    """Of twenty racers on one orphan one takes over, and all others see it in progress."""
    if stored == "orphan":
        await subject.orphan(lease=30)
    else:
        await subject.write("k", b"garbage")
    stores = [subject.store, subject.another()]
    outcomes = await asyncio.gather(*(stores[n % 2].claim("k") for n in range(20)))
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Claimed)]
    assert winner.attempt == 2
    assert sum(isinstance(outcome, InProgress) for outcome in outcomes) == 19
    assert json.loads(await subject.record())["owner"] == winner.owner
    await subject.store.complete(winner, "1")
    assert isinstance(await subject.store.claim("k"), Replay)


@pytest.mark.parametrize("where", ["read", "swap"])
async def test_a_takeover_replaces_what_it_saw(subject: Subject, where: str) -> None:
    """A renewal between a takeover's reads, or just before its swap, keeps the key, and the lock is given back."""
    owner = await subject.orphan(lease=30)
    renewed = bumped(await subject.record(), 31_000)
    thief = subject.another()
    before(thief, where, 2 if where == "read" else 1, lambda: subject.write("k", renewed, 86_400_000))
    outcome = await thief.claim("k")
    assert isinstance(outcome, InProgress)
    assert outcome.record is not None
    assert outcome.record.owner == owner.owner
    assert await subject.record() == renewed
    assert await subject.raw("k:lock") is None
    await subject.store.complete(owner, "1")


@pytest.mark.parametrize("subject", AGING, indirect=True)
async def test_a_takeover_sees_that_the_same_bytes_were_written_again(subject: Subject) -> None:
    """Equal bytes with more time left are another write: the swap leaves them alone."""
    await subject.orphan(lease=30)
    same = await subject.record()
    thief = subject.another()
    before(thief, "swap", 1, lambda: subject.write("k", same, 86_400_000))
    assert isinstance(await thief.claim("k"), InProgress)
    assert await subject.record() == same
    assert await subject.raw("k:lock") is None


@pytest.mark.parametrize(("where", "nth"), [("read", 1), ("read", 2), ("swap", 1)])
async def test_an_orphan_may_vanish(subject: Subject, where: str, nth: int) -> None:
    """An orphan that expires in the middle of a takeover leaves a free key, claimed as a first attempt."""
    await subject.orphan(lease=30)
    thief = subject.another()
    before(thief, where, nth, lambda: subject.drop("k"))
    outcome = await thief.claim("k")
    assert isinstance(outcome, Claimed)
    assert outcome.attempt == 1
    assert await subject.raw("k:lock") is None


async def test_an_orphan_may_complete(subject: Subject) -> None:
    """An owner that completes in the middle of a takeover is replayed."""
    owner = await subject.orphan(lease=30)
    done = subject.store.format.completed(owner.owner, now_ms=0, ttl_ms=HOUR, data="1", fingerprint=None, attempt=1)
    for where, nth in (("read", 2), ("swap", 1)):
        await subject.write("k", bumped(subject.store._in_progress(owner), -61_000), HOUR)
        thief = subject.another()
        before(thief, where, nth, lambda: subject.write("k", done))
        outcome = await thief.claim("k")
        assert isinstance(outcome, Replay)
        assert outcome.record.data == "1"
        assert await subject.raw("k:lock") is None


@pytest.mark.parametrize(("lease", "lock_ms"), [(3, 3_000), (30, 10_000)])
async def test_the_lock_outlives_the_takeover(subject: Subject, lease: float, lock_ms: int) -> None:
    """After a takeover its lock stays, with the owner's token, for ten seconds or a shorter lease."""
    await subject.orphan(lease=30)
    claim = await subject.claimed(lease=lease)
    assert await subject.raw("k:lock") == claim.owner.encode()
    assert about(await subject.left("k:lock"), lock_ms, 2_000)
    await subject.store.renew(claim)
    assert await subject.raw("k:lock") == claim.owner.encode()
    await subject.store.complete(claim, "1")
    # where the lock holds off all writers it goes with the claim
    assert await subject.raw("k:lock") == (None if subject.guarded else claim.owner.encode())


async def test_a_lock_of_another_means_in_progress(subject: Subject) -> None:
    """While somebody else holds the lock, an orphan is in progress; neither it nor the lock is touched."""
    await subject.orphan(lease=30)
    record = await subject.record()
    await subject.write("k:lock", b"peer", 5_000)
    for lease, limit in ((2, 2), (30, 10)):
        outcome = await subject.store.claim("k", lease=lease)
        assert isinstance(outcome, InProgress)
        assert 0 < outcome.retry_after <= limit
    assert await subject.record() == record
    assert await subject.raw("k:lock") == b"peer"
    assert about(await subject.left("k:lock"), 5_000)


async def test_release_of_a_later_attempt(subject: Subject) -> None:
    """A released takeover leaves an orphan of nobody and no lock: the next claim, at once, sees attempt 2 again."""
    one = await subject.orphan(lease=30, fingerprint="f")
    two = await subject.claimed(lease=30)
    await subject.store.release(two)
    record = json.loads(await subject.record())
    assert record.pop("owner") not in (one.owner, two.owner)
    assert record.pop("in_progress_expiration") <= time.time() * 1000
    assert record.pop("expiration") == pytest.approx(time.time() + 86_400, abs=5)
    assert record == {"status": "INPROGRESS", "validation": "f", "lease": 0, "ttl": 86_400_000, "attempt": 1}
    assert about(await subject.left("k"), 86_400_000)
    assert await subject.raw("k:lock") is None
    assert isinstance(await subject.store.claim("k", fingerprint="g"), Mismatch)
    for zombie in (one, two):
        with pytest.raises(LeaseLostError):
            await subject.store.complete(zombie, "1")
        with pytest.raises(LeaseLostError):
            await subject.store.renew(zombie)
        await subject.store.release(zombie)
    three = await subject.claimed(fingerprint="f")
    assert three.attempt == 2
    assert three.owner != two.owner


async def test_release_where_a_successor_is(subject: Subject) -> None:
    """The release of a replaced takeover neither writes an orphan over its successor nor drops the other's lock."""
    await subject.orphan(lease=30)
    two = await subject.orphan(lease=30)
    await subject.drop("k:lock")
    three = await subject.claimed()
    record = await subject.record()
    await subject.store.release(two)
    assert await subject.record() == record
    assert await subject.raw("k:lock") == three.owner.encode()
    await subject.store.complete(three, "1")


async def test_release_of_a_later_attempt_never_writes_over_nothing(subject: Subject) -> None:
    """The release of a takeover whose record is gone leaves it gone, and drops its lock."""
    await subject.orphan(lease=30)
    claim = await subject.claimed()
    await subject.drop("k")
    await subject.store.release(claim)
    assert await subject.raw("k") is None
    assert await subject.raw("k:lock") is None


@pytest.mark.parametrize("action", ["complete", "renew", "release"])
@pytest.mark.parametrize("state", ["running", "completed", "released", "deleted"])
async def test_zombies_change_nothing(subject: Subject, action: str, state: str) -> None:
    """A zombie's completion, renewal and release leave its successor's record alone, and the first two say so."""
    zombie = await subject.orphan(lease=30)
    successor = await subject.claimed()
    if state == "completed":
        await subject.store.complete(successor, "1")
    elif state == "released":
        await subject.store.release(successor)
    elif state == "deleted":
        await subject.drop("k:lock")
        await subject.store.delete("k")
    record, lock = await subject.record(), await subject.raw("k:lock")
    if action == "release":
        await subject.store.release(zombie)
    else:
        with pytest.raises(LeaseLostError) as caught:
            await (subject.store.complete(zombie, "2") if action == "complete" else subject.store.renew(zombie))
        assert caught.value.key == "k"
        # what is lost stays lost, where the record is gone too
        for again in (subject.store.complete(zombie, "2"), subject.store.renew(zombie)):
            with pytest.raises(LeaseLostError):
                await again
    assert await subject.record() == record
    assert await subject.raw("k:lock") == lock


@pytest.mark.parametrize("action", ["complete", "renew"])
async def test_a_lost_claim_stays_lost(subject: Subject, action: str) -> None:
    """A zombie that was told so writes nothing any more, even after its successor's record is gone."""
    zombie = await subject.orphan(lease=30)
    await subject.claimed()
    with pytest.raises(LeaseLostError):
        await (subject.store.complete(zombie, "1") if action == "complete" else subject.store.renew(zombie))
    await subject.drop("k")
    for again in (subject.store.complete(zombie, "1"), subject.store.renew(zombie)):
        with pytest.raises(LeaseLostError):
            await again
    await subject.store.release(zombie)
    assert await subject.raw("k") is None


@pytest.mark.parametrize("action", ["complete", "renew"])
async def test_a_zombie_writes_where_nobody_is(subject: Subject, action: str) -> None:
    """A zombie whose first-attempt successor released, and left nothing, writes."""
    zombie = await subject.claimed()
    await subject.drop("k")
    await subject.store.release(await subject.claimed())
    assert await subject.raw("k") is None
    if action == "complete":
        await subject.store.complete(zombie, "1")
        assert isinstance(await subject.store.claim("k"), Replay)
    else:
        await subject.store.renew(zombie)
        assert isinstance(await subject.store.claim("k"), InProgress)
    assert json.loads(await subject.record())["owner"] == zombie.owner


async def test_an_owner_whose_lease_is_over_still_owns_what_nobody_took(subject: Subject) -> None:
    """A late renewal and a late completion write as long as nobody took over."""
    claim = await subject.orphan(lease=30)
    await subject.store.renew(claim)
    assert isinstance(await subject.store.claim("k"), InProgress)
    await subject.age("k", 31_000)
    await subject.store.complete(claim, "1")
    assert isinstance(await subject.store.claim("k"), Replay)


@pytest.mark.parametrize("where", ["put_if_absent", "swap"])
async def test_a_lost_reply_is_still_owned(subject: Subject, where: str) -> None:
    """A write whose first reply was lost finds its own token, and the key is claimed; its lease begins anew."""
    now = time.time()
    if where == "swap":
        await subject.orphan(lease=30)
    store = subject.another(wall=lambda: now)
    twice(store, where)
    claim = await store.claim("k", lease=30)
    assert isinstance(claim, Claimed)
    attempt = 2 if where == "swap" else 1
    assert claim.attempt == attempt
    record = json.loads(await subject.record())
    assert (record["owner"], record["attempt"]) == (claim.owner, attempt)
    assert record["in_progress_expiration"] == int(now * 1000) + 30_000 + attempt, "renewed: it was written once more"
    await store.complete(claim, "1")
    assert isinstance(await store.claim("k"), Replay)


async def test_a_lock_whose_reply_was_lost_is_still_held(subject: Subject) -> None:
    """A takeover that finds its own token in the lock goes on."""
    await subject.orphan(lease=30)
    store = subject.another()
    twice(store, "put_if_absent", 2)
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    assert claim.attempt == 2


@pytest.mark.parametrize("attempt", [1, 2])
async def test_no_late_command_of_its_own_touches_a_result(subject: Subject, attempt: int) -> None:
    """A completion, renewal or release of one's own token that runs late finds the result, and lets it stand."""
    if attempt == 2:
        await subject.orphan(lease=30)
    claim = await subject.claimed()
    await subject.store.complete(claim, "1")
    await subject.drop("k:lock")
    before = await subject.record()
    await subject.store.complete(unsettled_copy(claim), "2")
    await subject.store.release(unsettled_copy(claim))
    with pytest.raises(LeaseLostError):
        await subject.store.renew(unsettled_copy(claim))
    assert await subject.record() == before


async def test_a_payload_once_named_stays_named(subject: Subject) -> None:
    """A takeover without a fingerprint keeps the orphan's, in progress and completed."""
    await subject.orphan(lease=30, fingerprint="f")
    claim = await subject.claimed()
    assert isinstance(await subject.store.claim("k", fingerprint="g"), Mismatch)
    await subject.store.complete(claim, "1")
    assert isinstance(await subject.store.claim("k", fingerprint="g"), Mismatch)
    assert isinstance(await subject.store.claim("k", fingerprint="f"), Replay)


@pytest.mark.parametrize("subject", WITH_PERSIST, indirect=True)
async def test_a_record_of_ours_without_expiry(subject: Subject) -> None:
    """A record of ours whose expiry somebody removed is an orphan; a completed one is replayed."""
    claim = await subject.claimed(lease=30)
    await subject.write("k", await subject.record(), None)
    successor = await subject.claimed()
    assert successor.attempt == 2
    assert about(await subject.left("k"), 86_400_000)
    with pytest.raises(LeaseLostError):
        await subject.store.complete(claim, "1")
    await subject.store.complete(successor, "1")
    await subject.write("k", await subject.record(), None)
    assert isinstance(await subject.store.claim("k"), Replay)
    record = await subject.store.get("k")
    assert record is not None
    assert record.expires_in is None


@pytest.mark.parametrize("subject", WITH_PERSIST, indirect=True)
async def test_no_record_without_expiry(subject: Subject) -> None:
    """A value that is no record and never expires is taken over too."""
    await subject.write("k", b"garbage", None)
    assert (await subject.claimed()).attempt == 2
    assert about(await subject.left("k"), 86_400_000)


# -- ends of what a call does ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["memory"], indirect=True)
async def test_nothing_releases_a_key_whose_result_is_on_its_way(subject: Subject) -> None:
    """A release after a completion that is still being repeated leaves the record to it."""

    async def broken(*args: object, **options: object) -> Swap:
        raise OSError("broken")

    store = subject.another()
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    real, store.swap = store.swap, broken  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailableError):
        await store.complete(claim, "1")
    await store.release(claim)
    assert json.loads(await subject.record())["owner"] == claim.owner
    store.swap = real  # type: ignore[method-assign]
    await store.aclose()
    assert isinstance(await subject.store.claim("k"), Replay)


@pytest.mark.parametrize("subject", ["memory"], indirect=True)
async def test_a_claim_gives_up_on_a_key_that_keeps_changing(subject: Subject) -> None:
    """A claim that finds another state at every look calls the key in progress after ten rounds."""

    async def gone(key: str) -> None:
        return None

    await subject.orphan(lease=30)
    store = subject.another()
    store.read = gone  # type: ignore[method-assign]
    puts = before(store, "put_if_absent", 0, lambda: asyncio.sleep(0))
    outcome = await store.claim("k", lease=7)
    assert isinstance(outcome, InProgress)
    assert outcome.retry_after == 7
    assert len(puts) == 10
    assert len({re.findall(rb'"owner": "(\w+)"', put[1])[0] for put in puts}) == 10, "a token for each round"


@pytest.mark.parametrize("subject", ["memory"], indirect=True)
async def test_a_delete_gives_up_on_a_key_that_keeps_changing(subject: Subject) -> None:
    """A delete that finds other bytes each time it compares raises StoreUnavailableError after ten rounds."""

    async def changed(*args: object, exact: bool) -> bool:
        return False

    await subject.write("k", b"garbage")
    store = subject.another()
    store.remove = changed  # type: ignore[assignment, method-assign]
    reads = before(store, "read", 0, lambda: asyncio.sleep(0))
    with pytest.raises(StoreUnavailableError, match="changes"):
        await store.delete("k")
    assert len(reads) == 10


@pytest.mark.parametrize("method", ["remove", "swap"])
async def test_a_delete_deletes_what_it_saw(subject: Subject, method: str) -> None:
    """A record that changes between a delete's read and its write is read again, and deleted as what it then is."""
    claim = await subject.claimed()
    running = await subject.record()
    await subject.store.complete(claim, "1")
    completed = await subject.record()
    first, then = (running, completed) if method == "swap" else (completed, running)
    await subject.write("k", first)
    store = subject.another()
    before(store, method, 1, lambda: subject.write("k", then))
    assert await store.delete("k") is True
    if method == "swap":
        assert await subject.raw("k") is None
    else:
        record = json.loads(await subject.record())
        assert (record["lease"], record["attempt"]) == (0, 1)


@pytest.mark.parametrize("subject", [*SERVERS, *FAKES], indirect=True)
async def test_a_lock_of_another_type_is_refused(subject: Subject) -> None:
    """A lock key of another Redis type is a StoreError to a takeover, which leaves the orphan alone."""
    await subject.orphan(lease=30)
    record = await subject.record()
    await subject.client.rpush("t:k:lock", "x")  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="another Redis type"):
        await subject.store.claim("k")
    assert await subject.record() == record


async def test_a_deleted_takeover_leaves_no_lock(subject: Subject) -> None:
    """A live claim that was taken over is deleted at once, its lock too, and the next claim need not wait for it."""
    await subject.orphan(lease=30)
    await subject.claimed()
    assert await subject.store.delete("k")
    assert await subject.raw("k:lock") is None
    assert (await subject.claimed()).attempt == 3


@pytest.mark.parametrize("subject", GUARDED, indirect=True)
async def test_a_guarded_write_waits_for_the_takeovers_lock(subject: Subject) -> None:
    """Where the lock guards all writes, a delete waits while a peer holds it, and fails in time."""
    await subject.orphan(lease=30)
    claim = await subject.claimed()
    await subject.write("k:lock", b"peer", 5_000)
    store = subject.another(timeout=1)  # a busy machine answers the last of the attempts within it
    assert await store.claim("warm") is not None
    with pytest.raises(StoreUnavailableError) as caught:
        await store.delete("k")
    assert not caught.value.outcome_unknown
    assert "None" not in str(caught.value), "it says what it waited for"
    assert json.loads(await subject.record())["owner"] == claim.owner
