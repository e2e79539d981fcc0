"""Golden records, byte for byte: what is stored today is what the next version and every peer must read.

Nothing here may change without a migration. A new form gets a new line.
"""

from typing import Any

import pytest

from asyncidem import MemoryStore, Record, State
from asyncidem.model import Attributes, RecordFormat

OWNER = "0123456789abcdef0123456789abcdef"
NOW = 1_700_000_000_001
NAMES = Attributes("st", "ex", "ip", "da", "va")
QUOTED = Attributes('s"t', "é", "\\", "d\n", "\U0001f600")

IN_PROGRESS: list[tuple[Attributes, dict[str, Any], bytes]] = [
    (
        Attributes(),
        {"stamp": NOW + 30_000, "lease_ms": 30_000, "ttl_ms": 86_400_000, "attempt": 1, "fingerprint": None},
        (
            b'{"owner": "0123456789abcdef0123456789abcdef", "status": "INPROGRESS", "expiration": 1700086401, '
            b'"in_progress_expiration": 1700000030001, "lease": 30000, "ttl": 86400000, "attempt": 1}'
        ),
    ),
    (
        Attributes(),
        {"stamp": NOW + 30_000, "lease_ms": 30_000, "ttl_ms": 86_400_000, "attempt": 1, "fingerprint": "f"},
        (
            b'{"owner": "0123456789abcdef0123456789abcdef", "status": "INPROGRESS", "expiration": 1700086401, '
            b'"in_progress_expiration": 1700000030001, "validation": "f", "lease": 30000, "ttl": 86400000, "attempt": 1}'
        ),
    ),
    (
        Attributes(),
        {"stamp": NOW + 500, "lease_ms": 500, "ttl_ms": 1999, "attempt": 12, "fingerprint": 'f"\né'},
        (
            b'{"owner": "0123456789abcdef0123456789abcdef", "status": "INPROGRESS", "expiration": 1700000002, '
            b'"in_progress_expiration": 1700000000501, "validation": "f\\"\\n\\u00e9", "lease": 500, "ttl": 1999, '
            b'"attempt": 12}'
        ),
    ),
    (
        Attributes(),
        {"stamp": NOW - 1, "lease_ms": 0, "ttl_ms": 2000, "attempt": 1, "fingerprint": ""},
        (
            b'{"owner": "0123456789abcdef0123456789abcdef", "status": "INPROGRESS", "expiration": 1700000003, '
            b'"in_progress_expiration": 1700000000000, "validation": "", "lease": 0, "ttl": 2000, "attempt": 1}'
        ),
    ),
    (
        NAMES,
        {"stamp": NOW, "lease_ms": 1, "ttl_ms": 1000, "attempt": 2, "fingerprint": "f"},
        (
            b'{"owner": "0123456789abcdef0123456789abcdef", "st": "INPROGRESS", "ex": 1700000002, "ip": 1700000000001, '
            b'"va": "f", "lease": 1, "ttl": 1000, "attempt": 2}'
        ),
    ),
    (
        QUOTED,
        {"stamp": NOW, "lease_ms": 1, "ttl_ms": 1000, "attempt": 1, "fingerprint": "f"},
        (
            b'{"owner": "0123456789abcdef0123456789abcdef", "s\\"t": "INPROGRESS", "\\u00e9": 1700000002, '
            b'"\\\\": 1700000000001, "\\ud83d\\ude00": "f", "lease": 1, "ttl": 1000, "attempt": 1}'
        ),
    ),
]

COMPLETED: list[tuple[Attributes, dict[str, Any], bytes]] = [
    (
        Attributes(),
        {"data": '{"a": "é"}', "fingerprint": None, "attempt": 1},
        (
            b'{"owner": "0123456789abcdef0123456789abcdef", "status": "COMPLETED", "data": "{\\"a\\": \\"\\u00e9\\"}", '
            b'"expiration": 1700000061}'
        ),
    ),
    (
        Attributes(),
        {"data": "", "fingerprint": "f", "attempt": 1},
        (
            b'{"owner": "0123456789abcdef0123456789abcdef", "status": "COMPLETED", "data": "", '
            b'"expiration": 1700000061, "validation": "f"}'
        ),
    ),
    (
        Attributes(),
        {"data": "!", "fingerprint": "f", "attempt": 2},
        (
            b'{"owner": "0123456789abcdef0123456789abcdef", "status": "COMPLETED", "data": "!", '
            b'"expiration": 1700000061, "validation": "f", "attempt": 2}'
        ),
    ),
    (
        Attributes(),
        {"data": None, "fingerprint": None, "attempt": 1, "outcome": "unavailable"},
        (
            b'{"owner": "0123456789abcdef0123456789abcdef", "status": "COMPLETED", "data": "!", '
            b'"expiration": 1700000061, "outcome": "unavailable"}'
        ),
    ),
    (
        Attributes(),
        {"data": None, "fingerprint": None, "attempt": 1, "outcome": "too_large"},
        (
            b'{"owner": "0123456789abcdef0123456789abcdef", "status": "COMPLETED", "data": "!", '
            b'"expiration": 1700000061, "outcome": "too_large"}'
        ),
    ),
    (
        Attributes(),
        {"data": None, "fingerprint": "f", "attempt": 3, "outcome": "exception", "error": '{"type": "m.E"}'},
        (
            b'{"owner": "0123456789abcdef0123456789abcdef", "status": "COMPLETED", "data": "!", '
            b'"expiration": 1700000061, "validation": "f", "attempt": 3, "outcome": "exception", '
            b'"error": "{\\"type\\": \\"m.E\\"}"}'
        ),
    ),
    (
        NAMES,
        {"data": "1", "fingerprint": "f", "attempt": 1},
        b'{"owner": "0123456789abcdef0123456789abcdef", "st": "COMPLETED", "da": "1", "ex": 1700000061, "va": "f"}',
    ),
    (
        QUOTED,
        {"data": "1", "fingerprint": "f", "attempt": 1},
        (
            b'{"owner": "0123456789abcdef0123456789abcdef", "s\\"t": "COMPLETED", "d\\n": "1", "\\u00e9": 1700000061, '
            b'"\\ud83d\\ude00": "f"}'
        ),
    ),
]


@pytest.mark.parametrize(("attributes", "fields", "golden"), IN_PROGRESS)
def test_in_progress(attributes: Attributes, fields: dict[str, Any], golden: bytes) -> None:
    """A record in progress has these bytes, begins with its owner's fence, and reads as what it was made of."""
    record_format = RecordFormat(attributes)
    assert record_format.in_progress(OWNER, now_ms=NOW, **fields) == golden
    assert golden.startswith(record_format.fence(OWNER))
    assert not golden.startswith(record_format.own_completion(OWNER))
    record = record_format.parse("k", golden, 1500)
    assert record is not None
    assert (record.key, record.state, record.owner, record.data) == ("k", State.INPROGRESS, OWNER, None)
    assert (record.lease_ms, record.ttl_ms) == (fields["lease_ms"], fields["ttl_ms"])
    assert (record.attempt, record.fingerprint) == (fields["attempt"], fields["fingerprint"])
    assert (record.in_progress_expiration, record.outcome, record.error) == (fields["stamp"], None, None)
    assert record.expiration is not None
    assert 0 <= record.expiration * 1000 - NOW - fields["ttl_ms"] < 1000, "rounded up"
    assert record.expires_in == 1.5


@pytest.mark.parametrize(("attributes", "fields", "golden"), COMPLETED)
def test_completed(attributes: Attributes, fields: dict[str, Any], golden: bytes) -> None:
    """A completed record has these bytes, no fence of an owner in progress, and reads as what it was made of."""
    record_format = RecordFormat(attributes)
    assert record_format.completed(OWNER, now_ms=NOW, ttl_ms=60_000, **fields) == golden
    assert golden.startswith(record_format.own_completion(OWNER))
    assert not golden.startswith(record_format.fence(OWNER))
    record = record_format.parse("k", golden, None)
    assert record == Record(
        key="k",
        state=State.COMPLETED,
        owner=OWNER,
        attempt=fields["attempt"],
        data=fields["data"],
        fingerprint=fields["fingerprint"],
        outcome=fields.get("outcome"),
        expires_in=None,
        error=fields.get("error"),
        expiration=1700000061,
    )


@pytest.mark.parametrize(
    ("attributes", "fence", "completion"),
    [
        (
            Attributes(),
            b'{"owner": "0123456789abcdef0123456789abcdef", "status": "INPROGRESS"',
            b'{"owner": "0123456789abcdef0123456789abcdef", "status": "COMPLETED"',
        ),
        (
            NAMES,
            b'{"owner": "0123456789abcdef0123456789abcdef", "st": "INPROGRESS"',
            b'{"owner": "0123456789abcdef0123456789abcdef", "st": "COMPLETED"',
        ),
    ],
)
def test_fence(attributes: Attributes, fence: bytes, completion: bytes) -> None:
    """The bytes that stores compare are the owner and the status, and end before anything that may change."""
    assert RecordFormat(attributes).fence(OWNER) == fence
    assert RecordFormat(attributes).own_completion(OWNER) == completion


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            b'{"status": "INPROGRESS", "expiration": 1700003600}',
            Record("k", State.INPROGRESS, None, 1, None, None, None, 9.0, expiration=1700003600),
        ),
        (
            (
                b'{"status": "INPROGRESS", "expiration": 1700003600, "in_progress_expiration": 1700000030000, '
                b'"validation": "f"}'
            ),
            Record(
                "k",
                State.INPROGRESS,
                None,
                1,
                None,
                "f",
                None,
                9.0,
                expiration=1700003600,
                in_progress_expiration=1700000030000,
            ),
        ),
        (
            b'{"status":"COMPLETED","data":"{\\"a\\": 1}","expiration":1700003600,"validation":"f"}',
            Record("k", State.COMPLETED, None, 1, '{"a": 1}', "f", None, 9.0, expiration=1700003600),
        ),
        (
            (
                b'{"data": "null", "status": "COMPLETED", "expiration": 1700003600.5, '
                b'"in_progress_expiration": 1700000030000.25}'
            ),
            Record(
                "k",
                State.COMPLETED,
                None,
                1,
                "null",
                None,
                None,
                9.0,
                expiration=1700003600.5,
                in_progress_expiration=1700000030000.25,
            ),
        ),
        (
            b'{"status": "COMPLETED", "expiration": 1700003600}',
            Record("k", State.COMPLETED, None, 1, None, None, "unavailable", 9.0, expiration=1700003600),
        ),
    ],
)
def test_records_of_peers(value: bytes, expected: Record) -> None:
    """Powertools' records are read, whatever their order and their spaces."""
    assert RecordFormat(Attributes()).parse("k", value, 9000) == expected


async def test_the_store_writes_these() -> None:
    """What a store writes over a key's life are the golden forms: claim, completion, and the orphan of a release."""
    now = [1_700_000_000.001]
    store = MemoryStore(clock=lambda: now[0], wall=lambda: now[0])

    async def stored() -> bytes:
        found = await store.read("k")
        assert found is not None
        return found.value

    claim = await store.claim("k", lease=30, ttl=86_400, fingerprint="f")
    owner = (await stored())[11:43].decode()
    golden = IN_PROGRESS[1][2].replace(OWNER.encode(), owner.encode())
    assert await stored() == golden
    now[0] += 40
    claim = await store.claim("k", lease=30, ttl=60)
    await store.release(claim)  # type: ignore[arg-type]
    owner = (await stored())[11:43].decode()
    assert await stored() == (
        b'{"owner": "%s", "status": "INPROGRESS", "expiration": 1700000101, "in_progress_expiration": 1700000040000, '
        b'"validation": "f", "lease": 0, "ttl": 60000, "attempt": 1}' % owner.encode()
    )
    now[0] += 20
    claim = await store.claim("k", lease=30, ttl=60)
    await store.complete(claim, None, outcome="too_large")  # type: ignore[arg-type]
    owner = (await stored())[11:43].decode()
    assert await stored() == (
        b'{"owner": "%s", "status": "COMPLETED", "data": "!", "expiration": 1700000121, "validation": "f", '
        b'"attempt": 2, "outcome": "too_large"}' % owner.encode()
    )
