"""On every store: records of Powertools, and clocks that are wrong."""

import json
import time
from typing import Any

import pytest

from asyncidem import Claimed, InProgress, LeaseLostError, Mismatch, Replay

from stores.stores_under_test import HOUR, KINDS, Subject, unsettled_copy

AGING = [kind for kind in KINDS if kind != "client-without-pttl"]


# -- records of Powertools ---------------------------------------------------------------------------------------------


def peer(progress_ms: int | None = None, *, clock: float = 0, lives: int = 3600, **more: Any) -> bytes:
    """Return a Powertools record in progress; the peer's clock is `clock` seconds ahead of ours."""
    now = time.time() + clock
    record: dict[str, Any] = {"status": "INPROGRESS", "expiration": int(now) + lives}
    if progress_ms is not None:
        record["in_progress_expiration"] = int(now * 1000) + progress_ms
    return json.dumps({**record, **more}).encode()


async def test_a_peer_without_a_lease_is_in_progress_until_it_expires(subject: Subject) -> None:
    """A Powertools record without `in_progress_expiration` blocks its key for as long as it lives."""
    await subject.write("k", peer(validation="f"), HOUR)
    outcome = await subject.store.claim("k")
    assert isinstance(outcome, InProgress)
    assert 3590 < outcome.retry_after <= 3601
    assert outcome.record is not None
    assert outcome.record.owner is None
    assert isinstance(await subject.store.claim("k", fingerprint="g"), Mismatch)
    assert isinstance(await subject.store.claim("k", fingerprint="f"), InProgress)
    await subject.drop("k")
    assert (await subject.claimed()).attempt == 1


@pytest.mark.parametrize("subject", [kind for kind in KINDS if kind != "memory"], indirect=True)
async def test_a_peer_that_never_expires(subject: Subject) -> None:
    """A Powertools record with neither lease nor expiry is in progress until somebody deletes it."""
    await subject.write("k", b'{"status": "INPROGRESS"}', None)
    outcome = await subject.store.claim("k")
    assert isinstance(outcome, InProgress)
    assert 0 < outcome.retry_after <= 1
    assert await subject.store.delete("k")
    assert (await subject.claimed()).attempt == 2


@pytest.mark.parametrize("subject", AGING, indirect=True)
@pytest.mark.parametrize("clock", [0, 600, -600])
async def test_a_peer_with_a_lease(subject: Subject, clock: int) -> None:
    """A Powertools record's lease is judged on its writer's clock, however wrong that is."""
    await subject.write("k", peer(20_000, clock=clock), HOUR)
    outcome = await subject.store.claim("k")
    assert isinstance(outcome, InProgress)
    assert 15 < outcome.retry_after <= 21.5
    await subject.age("k", 23_000)
    claim = await subject.claimed()
    assert claim.attempt == 2
    assert await subject.raw("k:lock") == claim.owner.encode()


@pytest.mark.parametrize(("progress_ms", "free"), [(20_000, False), (-10, True)])
async def test_a_peer_with_a_lease_without_pttl(subject: Subject, progress_ms: int, free: bool) -> None:
    """Where all clocks agree every store judges a Powertools lease alike."""
    await subject.write("k", peer(progress_ms if not free else progress_ms - 2_000), HOUR)
    assert isinstance(await subject.store.claim("k"), Claimed if free else InProgress)


async def test_a_peers_result(subject: Subject) -> None:
    """A result of Powertools is replayed; one without data is a completion without a result."""
    await subject.write("k", b'{"status": "COMPLETED", "expiration": 1, "data": "{\\"a\\": 1}", "validation": "f"}')
    replay = await subject.store.claim("k", fingerprint="f")
    assert isinstance(replay, Replay)
    assert (replay.record.owner, replay.record.data, replay.record.attempt) == (None, '{"a": 1}', 1)
    assert isinstance(await subject.store.claim("k", fingerprint="g"), Mismatch)
    await subject.write("k", b'{"status": "COMPLETED", "expiration": 1}')
    replay = await subject.store.claim("k")
    assert isinstance(replay, Replay)
    assert (replay.record.data, replay.record.outcome) == (None, "unavailable")


async def test_a_peer_that_wrote_blindly(subject: Subject) -> None:
    """An owner whose record a Powertools peer overwrote is told so, and leaves it alone."""
    claim = await subject.claimed()
    theirs = peer(20_000)
    await subject.write("k", theirs)
    await subject.store.release(unsettled_copy(claim))
    with pytest.raises(LeaseLostError, match="no record of ours"):
        await subject.store.renew(claim)
    assert await subject.record() == theirs


# -- clocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", AGING, indirect=True)
@pytest.mark.parametrize("skew", [600, -600])
@pytest.mark.parametrize("wrong", ["first", "second"])
async def test_wall_clocks_decide_nothing(subject: Subject, skew: int, wrong: str) -> None:
    """A worker whose clock is ten minutes ahead or behind decides, and is treated, as any other."""
    skewed = subject.another(wall=lambda: time.time() + skew)
    first, second = (skewed, subject.store) if wrong == "first" else (subject.store, skewed)
    claim = await first.claim("k", lease=30)
    assert isinstance(claim, Claimed)
    outcome = await second.claim("k")
    assert isinstance(outcome, InProgress)
    assert 25 < outcome.retry_after <= 30
    await subject.age("k", 26_000)
    await first.renew(claim)
    await subject.age("k", 26_000)
    assert isinstance(await second.claim("k"), InProgress)
    await subject.age("k", 5_000)
    successor = await second.claim("k")
    assert isinstance(successor, Claimed)
    assert successor.attempt == 2
    with pytest.raises(LeaseLostError):
        await first.complete(claim, "1")
    await second.release(successor)
    third = await first.claim("k")
    assert isinstance(third, Claimed)
    assert third.attempt == 2
    await first.complete(third, "1")
    assert isinstance(await second.claim("k"), Replay)


@pytest.mark.parametrize("subject", ["client-without-pttl"], indirect=True)
async def test_without_pttl_the_wall_clock_decides(subject: Subject) -> None:
    """Without `pttl` a lease is over when the client's clock has passed `in_progress_expiration`, to the millisecond."""
    now = [1_700_000_000.0]
    store = subject.another(wall=lambda: now[0])
    await store.claim("k", lease=30)
    now[0] += 29.75
    outcome = await store.claim("k", lease=30)
    assert isinstance(outcome, InProgress)
    assert outcome.retry_after == pytest.approx(0.25)
    now[0] += 0.25
    claim = await store.claim("k", lease=30)
    assert isinstance(claim, Claimed)
    await store.release(claim)
    now[0] -= 60
    again = await store.claim("k", lease=30)
    assert isinstance(again, Claimed), "an orphan whose lease is 0 needs no clock"
