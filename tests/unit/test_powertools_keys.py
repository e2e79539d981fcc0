"""Keys and hashes of Powertools: golden ones, and as Powertools itself makes them."""

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel, Field

from asyncidem import ConfigurationError, Idempotency, InvalidKeyError, MemoryStore, MissingKeyError
from asyncidem.integrations.powertools import powertools_fingerprint, powertools_key
from asyncidem.keys import Fingerprint, fingerprint


@dataclass
class D:
    a: int
    b: Decimal


@dataclass
class Nested:
    lines: list[D] = field(default_factory=lambda: [D(1, Decimal(2))])


class Model(BaseModel):
    at: datetime = datetime(2024, 1, 2, tzinfo=UTC)
    amount: Decimal = Field(default=Decimal("1.10"), alias="Amount")
    lines: list[D] = [D(1, Decimal(2))]


class Colour(Enum):
    RED = "red"
    DEEP = Decimal("1.5")


class Level(IntEnum):
    HIGH = 9


class Name(StrEnum):
    ANN = "ann"


class Price(Decimal, Enum):
    LOW = Decimal("1.5")


class HasDict:
    def dict(self) -> dict[str, int]:
        return {"a": 1}


class Event:
    def __init__(self) -> None:
        self.raw_event = {"body": "b"}


def md5(text: str) -> str:
    """Return what a digest is of."""
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


# -- golden digests ----------------------------------------------------------------------------------------------------

GOLDEN = [
    ("abc", "ebd9f4c7b06cb0aaf5d13d80e49d8b90"),
    (1, "c4ca4238a0b923820dcc509a6f75849b"),
    (True, "b326b5062b2f0e69046810717534cb09"),
    (1.5, "6008647277c4454cecd97d33c069f0ca"),
    ({"b": 1, "a": [1, {"z": 0, "y": "é"}]}, "ef1e23210bbadbb1f6e8503652c12667"),
    ([1, "a"], "236c4e452659b818b49463f47cae759a"),
    (Decimal("1.10"), "3c895c4290954425fb9da91ac229696f"),
    (datetime(2024, 1, 2, 3, 4, 5, 6), "f31cbc4e0345af526f00cdcc1d79822f"),  # noqa: DTZ001 - naive, as the vector is
    (UUID(int=1), "410e9b253e1b6f6acc1d0e16a730a178"),
    (D(1, Decimal(2)), "f23c28ae5121a44c9da98c8b30e2ce6c"),
]


@pytest.mark.parametrize(("value", "digest"), GOLDEN, ids=repr)
def test_golden(value: Any, digest: str) -> None:
    """Each value has the digest that was written down, as key and as hash of a payload."""
    assert powertools_key(value, key_prefix="fn.charge") == f"fn.charge#{digest}"
    assert powertools_fingerprint(value) == digest


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Decimal("NaN"), "NaN"),
        ([Decimal("-Infinity"), Decimal("sNaN")], '["-Infinity", NaN]'),
        (float("inf"), "Infinity"),
        ([Colour.RED, Level.HIGH, Name.ANN], '["red", 9, "ann"]'),
        (Price.LOW, '"Price.LOW"'),  # asked first whether it is a Decimal
        ([date(2024, 1, 2), time(3, 4)], '["2024-01-02", "03:04:00"]'),
        ([PurePosixPath("/a/b"), PureWindowsPath("a/b")], '["/a/b", "a\\\\b"]'),
        (Nested(), '{"lines": [{"a": 1, "b": "2"}]}'),
        (Model(), '{"amount": "1.10", "at": "2024-01-02T00:00:00Z", "lines": [{"a": 1, "b": "2"}]}'),
        (
            {"order": Model()},
            '{"order": {"amount": "1.10", "at": "2024-01-02T00:00:00Z", "lines": [{"a": 1, "b": "2"}]}}',
        ),
        (HasDict(), '{"a": 1}'),
        (Event(), '{"body": "b"}'),
        ((1, 2), "[1, 2]"),
        ({2: "b", 1: "a"}, '{"1": "a", "2": "b"}'),
        ("\ud800é", '"\\ud800\\u00e9"'),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_json(value: Any, text: str) -> None:
    """Values that JSON does not know have the texts that Powertools gives them."""
    assert powertools_key(value, key_prefix="p") == f"p#{md5(text)}"


@pytest.mark.parametrize("name", ["sha256", "sha1", "blake2b", "sha3_512"])
def test_other_hashes(name: str) -> None:
    """The digest is that of the hash that is named."""
    digest = hashlib.new(name, b'"abc"').hexdigest()
    assert powertools_key("abc", key_prefix="p", hash_function=name) == f"p#{digest}"


# -- missing keys ------------------------------------------------------------------------------------------------------

MISSING: list[Any] = [None, "", [], (), {}, [None], (None, None), {"a": None}, Decimal(0), {"a": None, "b": None}]
PRESENT: list[Any] = [0, 0.0, False, [0], {"a": None, "b": 0}, [None, ""], " ", Decimal(1), [[]], {"a": {}}]


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_missing_keys(value: Any) -> None:
    """None, what is empty, and what holds nothing but None is no key; as a payload it is one as any other."""
    with pytest.raises(MissingKeyError, match="the payload is None or empty"):
        powertools_key(value, key_prefix="p")
    with pytest.raises(MissingKeyError, match=r"what 'key\.part' chooses is None or empty"):
        powertools_key({"key": {"part": value}}, key_prefix="p", jmespath="key.part")
    assert powertools_fingerprint(value)


@pytest.mark.parametrize("value", PRESENT, ids=repr)
def test_keys_that_are_there(value: Any) -> None:
    """0 and False are keys, and so is whatever holds more than None."""
    assert powertools_key(value, key_prefix="p")


# -- errors ------------------------------------------------------------------------------------------------------------


class Raises:
    def model_dump(self, mode: str) -> Any:
        raise RuntimeError(mode)


class Endless:
    def model_dump(self, mode: str) -> Any:
        return Endless()


class RawEventRaises:
    @property
    def raw_event(self) -> Any:
        raise RuntimeError("raw")


@dataclass
class Uncopyable:
    what: Any = field(default_factory=lambda: (number for number in range(3)))


@dataclass
class Loop:
    me: Any = None


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)
LOOP = Loop()
LOOP.me = LOOP


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({1, 2}, "type set has no JSON in Powertools; convert it on both sides"),
        ({"a": [b"secret"]}, "type bytes has"),
        ([timedelta(1)], r"type datetime\.timedelta has"),
        (object(), "type object has"),
        ([D], "type type has"),
        ([Raises()], "Raises has no JSON"),
        ([Uncopyable()], "Uncopyable has no JSON"),
        (Raises(), "Raises cannot be taken apart; give its parts"),
        (RawEventRaises(), "RawEventRaises cannot be taken apart"),
        (Uncopyable(), "Uncopyable cannot be taken apart"),
        (D, "type type cannot be taken apart"),
        ({(1, "secret"): 1}, "keys that are no text"),
        ({"secret": 1, 2: 2}, "cannot be sorted"),
        (ENDLESS, "too deep or endless"),
        ([Endless()], "too deep or endless"),
        ([LOOP], "too deep or endless"),
        (LOOP, "Loop cannot be taken apart"),
        ([10**5000], "digit limit"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "value",
)
def test_values_without_json(value: Any, reason: str) -> None:
    """What has no JSON there is an error that names types and the remedy, and nothing of the value."""
    for make in (powertools_key, powertools_fingerprint):
        options: dict[str, Any] = {"key_prefix": "p"} if make is powertools_key else {}
        with pytest.raises(InvalidKeyError, match=reason) as refused:
            make(value, **options)
        error: BaseException | None = refused.value
        while error is not None:
            assert "secret" not in repr(error) + "".join(getattr(error, "__notes__", ()))
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"key_prefix": ""},
            "key_prefix must be that of the Powertools function, not ''; by default it is '<AWS_LAMBDA",
        ),
        ({"key_prefix": None}, "not None"),
        ({"key_prefix": "p", "hash_function": "md6"}, r"one of blake2b, .*sha512, not 'md6'"),
        ({"key_prefix": "p", "hash_function": "shake_128"}, "not 'shake_128'"),
        ({"key_prefix": "p", "hash_function": [hashlib.md5]}, "not "),
        ({"key_prefix": "p", "jmespath": "a["}, "no JMESPath expression"),
        ({"key_prefix": "p", "jmespath": ""}, "no JMESPath expression"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], reason: str) -> None:
    """An option that cannot work is named, with what could."""
    with pytest.raises(ConfigurationError, match=reason):
        powertools_key({"a": 1}, **options)


def test_long_keys() -> None:
    """A key that a store would keep as its digest is refused: the two sides would not meet."""
    assert len(powertools_key("abc", key_prefix="p" * 479)) == 512
    with pytest.raises(InvalidKeyError, match=r"more than 512 bytes.*give both sides a shorter key_prefix"):
        powertools_key("abc", key_prefix="p" * 480)
    with pytest.raises(InvalidKeyError, match="more than 512 bytes"):
        powertools_key("abc", key_prefix="é" * 240)
    with pytest.raises(InvalidKeyError, match="lone surrogate"):
        powertools_key("abc", key_prefix="\ud800")


# -- fingerprints ------------------------------------------------------------------------------------------------------


async def test_a_hash_is_taken_as_it_is() -> None:
    """As a payload it is not hashed again, by each of the three forms, and whatever the secret; other text is."""
    mark = powertools_fingerprint({"amount": 1}, jmespath="amount")
    assert (type(mark), str(mark)) == (Fingerprint, md5("1"))
    assert type(fingerprint(mark)) is str
    assert fingerprint(str(mark)) != mark
    store = MemoryStore()
    idem = Idempotency(store, fingerprint_secret="secret")

    @idem.idempotent(
        key="order_id", payload=lambda order_id, amount: powertools_fingerprint([order_id, amount][1]), name="charge"
    )
    async def charge(order_id: str, amount: int) -> str:
        return order_id

    await charge("42", 1)
    await idem.run("run", charge, "43", 1, payload=mark)
    async with idem.operation("operation", payload=mark):
        pass
    for key in (idem.key_for(charge, "42", 1), "run", "operation"):
        record = await store.get(key)
        assert record is not None
        assert record.fingerprint == mark
