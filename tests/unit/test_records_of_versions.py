"""What earlier versions stored, this one reads: files in `tests/golden`, one for each version that changed the format.

A line of them is never changed and never removed: such records lie in somebody's Redis. It says what was stored (under which
attribute names, with which ttl), how many seconds have passed, what `get` returns, and what a claim of fingerprint "f" says.
Version N reads the records of N - 1; a version that drops older ones says so here, by its list of files.
"""

import json
from pathlib import Path
from typing import Any, Final

import pytest

from asyncidem import Claimed, InProgress, MemoryStore, Mismatch, Record, Replay
from asyncidem.model import Swap
from asyncidem.testing import ManualClock

FILES: Final = sorted((Path(__file__).parent.parent / "golden").glob("*.jsonl"))
LINES: Final[list[tuple[str, dict[str, Any]]]] = [
    (file.stem, json.loads(line)) for file in FILES for line in file.read_text(encoding="utf-8").splitlines()
]
NAMES: Final = ("status_attr", "expiry_attr", "in_progress_expiry_attr", "data_attr", "validation_key_attr")


def test_the_versions_are_these() -> None:
    """Every version whose records this one reads has its file."""
    assert [file.stem for file in FILES] == ["0.1"]
    assert len(LINES) > 20


@pytest.mark.parametrize(("version", "line"), LINES, ids=[f"{version}-{n}" for n, (version, _) in enumerate(LINES)])
async def test_a_record_of_a_version_is_read(version: str, line: dict[str, Any]) -> None:
    """It says what it said when it was written, and a claim finds in it what it found then."""
    clock = ManualClock()
    options: dict[str, Any] = dict(zip(NAMES, line["names"], strict=True)) if "names" in line else {}
    store = MemoryStore(clock=clock.monotonic, wall=clock.wall, **options)
    await store.put_if_absent("k", line["record"].encode(), round(line["ttl"] * 1000))
    if line["passed"]:
        clock.advance(line["passed"])
    record = await store.get("k")
    if line["get"] is None:
        assert record is None
    else:
        expected = {"owner": None, "data": None, "fingerprint": None, "outcome": None, "error": None, **line["get"]}
        assert record is not None
        assert {name: getattr(record, name) for name in expected} == expected
        assert record.expires_in == pytest.approx(line["ttl"] - line["passed"], abs=0.001)
    claim = await store.claim("k", lease=30, fingerprint="f")
    match claim, line["claim"]:
        case Claimed(), ["claimed", attempt]:
            assert claim.attempt == attempt
            await store.complete(claim, "1")
            assert isinstance(await store.claim("k"), Replay)
        case InProgress(), ["in progress", seconds]:
            assert claim.retry_after == pytest.approx(seconds, abs=0.001)
        case (Replay(), ["replay"]) | (Mismatch(), ["mismatch"]):
            assert isinstance(claim.record, Record)
            assert record is not None
            assert claim.record == record._replace(expires_in=None)  # a replay does not ask for the time left
        case _:
            pytest.fail(f"{claim} is not {line['claim']}")


def form(value: bytes) -> tuple[tuple[str, str], ...]:
    """Return the attributes of a record, in their order, with the types of their values."""
    return tuple((name, type(part).__name__) for name, part in json.loads(value).items())


async def test_every_form_that_is_written_has_a_golden_record() -> None:
    """A store writes nothing in all the ends of an operation that later versions would not be held to read."""
    golden = {form(line["record"].encode()) for _, line in LINES if line["record"].startswith('{"owner"')}
    written: set[bytes] = set()
    clock = ManualClock()

    class Noting(MemoryStore):
        async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
            written.add(value)
            return await super().put_if_absent(key, value, ttl_ms)

        async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
            written.add(value)
            return await super().swap(key, expected, value, ttl_ms, **how)

    ends: tuple[tuple[str | None, dict[str, Any]], ...] = (
        ("1", {}),
        (None, {"outcome": "unavailable"}),
        (None, {"outcome": "too_large"}),
        (None, {"outcome": "exception", "error": "{}"}),
    )
    for fingerprint in (None, "f"):
        for takeover in (False, True):
            for data, how in ends:
                store = Noting(clock=clock.monotonic, wall=clock.wall)
                claim = await store.claim("k", lease=30, fingerprint=fingerprint)
                if takeover:
                    clock.advance(31)
                    claim = await store.claim("k", lease=30, fingerprint=fingerprint)
                assert isinstance(claim, Claimed)
                await store.renew(claim)
                await store.complete(claim, data, **how)
                await store.claim("deleted", lease=30, fingerprint=fingerprint)
                await store.delete("deleted")
                again = await store.claim("deleted", lease=30, fingerprint=fingerprint)
                assert isinstance(again, Claimed)
                await store.release(again)
    missing = {form(value) for value in written if value.startswith(b"{")} - golden
    assert not missing, "; ".join(map(str, sorted(missing)))
