"""Keys: the same text in every process, different text for different keys."""

import hashlib
import hmac
import json
import os
import subprocess
import sys
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from ipaddress import IPv4Address
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, HttpUrl, SecretStr

from asyncidem.errors import InvalidKeyError, MissingKeyError
from asyncidem.keys import canonical, check_key, digest, fingerprint, key_text, qualify, stored_form

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=15,
)


class Colour(Enum):
    RED = "red"
    NUMBER = 3


class Level(IntEnum):
    HIGH = 9


class Name(StrEnum):
    ANN = "ann"


class LegacyName(str, Enum):  # noqa: UP042 (what a StrEnum was before Python 3.11)
    BOB = "bob"


class Whole(int):
    def __repr__(self) -> str:
        return "Whole!"


class Word(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "Word!"


class Part(float):
    def __repr__(self) -> str:
        return "Part!"


Pair = namedtuple("Pair", "a b")  # noqa: PYI024 (the point is that it is a tuple)


@dataclass
class Line:
    sku: str
    amount: Decimal


@dataclass
class Order:
    lines: list[Line]
    note: str | None = None
    unset: int = field(init=False)


class Customer(BaseModel):
    name: str
    tags: set[str]
    when: datetime
    site: HttpUrl


class Secretive(BaseModel):
    secret: SecretStr


class Dumper:
    def __init__(self, dump: Callable[[], object]) -> None:
        self.model_dump = dump


NOON = datetime(2024, 1, 2, 12, 0, 0, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (0, "0"),
        (-7, "-7"),
        (1.5, "1.5"),
        (1.0, "1.0"),
        (1e100, "1e+100"),
        ('é\n"', '"é\\n\\""'),
        ("", '""'),
        ([1, "a", None], '[1,"a",null]'),
        ((1, 2), "[1,2]"),
        (Pair(1, 2), "[1,2]"),
        ([], "[]"),
        ({"b": 1, "a": {"d": 2, "c": 3}}, '{"a":{"c":3,"d":2},"b":1}'),
        ({}, "{}"),
        (OrderedDict(b=1, a=2), '{"a":2,"b":1}'),
        (UserDict({"a": 1}), '{"a":1}'),
        ({1: "x", None: 2, 2.5: 3, False: 4}, '{"1":"x","2.5":3,"false":4,"null":2}'),
        ({Colour.RED: 1, Colour.NUMBER: 2, Name.ANN: 3}, '{"3":2,"ann":3,"red":1}'),
        ({UUID(int=1): 1}, '{"00000000-0000-0000-0000-000000000001":1}'),
        ({PurePosixPath('a"b'): 1}, '{"a\\"b":1}'),
        ({"b", "a"}, '["a","b"]'),
        (frozenset({10, 9, "9"}), '["9",10,9]'),
        ({(1, 2), (1, 1)}, "[[1,1],[1,2]]"),
        (Colour.RED, '"red"'),
        (Level.HIGH, "9"),
        (Name.ANN, '"ann"'),
        (LegacyName.BOB, '"bob"'),
        (Whole(4), "4"),
        (Part(0.5), "0.5"),
        (Word("w"), '"w"'),
        ({Word("w"): 1}, '{"w":1}'),
        (Decimal("1.10"), '"1.10"'),
        (UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (PurePosixPath("/a/b"), '"/a/b"'),
        (IPv4Address("10.0.0.1"), '"10.0.0.1"'),
        (NOON, '"2024-01-02T12:00:00.000005+00:00"'),
        (date(2024, 1, 2), '"2024-01-02"'),
        (time(12, 30), '"12:30:00"'),
        (timedelta(days=1, milliseconds=1), "86400.001"),
        (b"\x00\xff", '"hex:00ff"'),
        (bytearray(b"a"), '"hex:61"'),
        (memoryview(b"a"), '"hex:61"'),
        (Line("s", Decimal(2)), '{"amount":"2","sku":"s"}'),
        ([Line("s", Decimal(2))], '[{"amount":"2","sku":"s"}]'),
        (Dumper(lambda: {"b": {2, 1}}), '{"b":[1,2]}'),
        (
            Customer(name="A", tags={"y", "x"}, when=NOON, site=HttpUrl("http://h/p")),
            '{"name":"A","site":"http://h/p","tags":["x","y"],"when":"2024-01-02T12:00:00.000005+00:00"}',
        ),
    ],
)
def test_values_have_one_canonical_text(value: object, text: str) -> None:
    """Each supported type has the text that the documentation's table says."""
    assert canonical(value) == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "a value of type object at $ "),
        ({"items": [1, {"x": {3 + 1j}}]}, "a value of type complex at $.items[1].x{*} "),
        ([deque([1])], "a value of type collections.deque at $[0] "),
        (int, "a class (int) at $ "),
        (Customer, "a class (Customer) at $ "),
        (lambda: None, "a value of type function at $ "),
        ([1.5, float("nan")], "a float that is NaN or infinite at $[1] "),
        ({"a": float("-inf")}, "a float that is NaN or infinite at $.a "),
        (Decimal("NaN"), "a decimal.Decimal that is NaN or infinite at $ "),
        ([10**5000], "an int over Python's digit limit at $[0] "),
        ({"a": {1: 1, "1": 2}}, "a mapping with two keys of the same text at $.a "),
        ({(1, 2): 3}, "a mapping's key of type tuple at $ "),
        ({Line: 3}, "a class (Line) at $ "),
        (Secretive(secret=SecretStr("s3cret")), "a value of type pydantic.types.SecretStr at $.secret "),
        (Order([]), f"a value of type {Order.__module__}.Order that cannot be taken apart at $ "),
        (Dumper(lambda: 1 / 0), f"a value of type {__name__}.Dumper that cannot be taken apart at $ "),
        ({"4111 1111 1111 1111": object()}, "a value of type object at $[*] "),
        ({"k" * 41: object()}, "a value of type object at $[*] "),
    ],
)
def test_what_has_no_canonical_text_is_refused(value: object, message: str) -> None:
    """The error names the type and the place, never a value, and says what to do."""
    with pytest.raises(InvalidKeyError) as caught:
        canonical(value)
    assert str(caught.value).startswith(message)
    assert "convert it to text yourself" in str(caught.value)
    for secret in ("s3cret", "4111", "kkk"):
        assert secret not in str(caught.value)


def test_the_error_of_a_dump_is_the_cause() -> None:
    """A model_dump that raises is found through the cause."""
    with pytest.raises(InvalidKeyError) as caught:
        canonical([Dumper(lambda: 1 / 0)])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def _endless() -> list[Any]:
    value: list[Any] = []
    value.append({"again": value})
    return value


def _endless_dump() -> object:
    return Dumper(_endless_dump)


def _recursion() -> object:
    return _recursion()


@pytest.mark.parametrize("value", [_endless(), Dumper(_endless_dump), Dumper(_recursion)])
def test_endless_values_are_refused(value: object) -> None:
    """A value that contains itself is an error, not a crash."""
    with pytest.raises(InvalidKeyError, match="nested too deeply or contains itself"):
        canonical(value)


@pytest.mark.parametrize("value", ["\ud800", {"\udfff": 1}, [1, "a\ud800"]])
def test_lone_surrogates_are_refused(value: object) -> None:
    """Text that UTF-8 cannot hold has no canonical text, and the error does not carry it."""
    with pytest.raises(InvalidKeyError, match="lone surrogate") as caught:
        canonical(value)
    assert caught.value.__suppress_context__


@given(json_values)
def test_canonical_text_is_the_value_again(value: object) -> None:
    """Canonical text is JSON, and reading it gives the value back."""
    assert json.loads(canonical(value)) == value


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=5), st.randoms())
def test_the_order_of_a_dict_does_not_matter(value: dict[str, object], random: Any) -> None:
    """Dicts that are equal have one text."""
    items = list(value.items())
    random.shuffle(items)
    assert canonical(dict(items)) == canonical(value)


@given(json_values, json_values)
def test_different_values_have_different_texts(one: object, other: object) -> None:
    """Two values with one text are equal."""
    if canonical(one) == canonical(other):
        assert one == other


def test_keys_are_the_same_in_every_process() -> None:
    """A set's text does not follow the hash seed, in a model neither."""
    code = (
        "from pydantic import BaseModel\n"
        "from asyncidem.keys import canonical\n"
        "class M(BaseModel):\n    tags: set[str]\n"
        "names = {f'n{i}' for i in range(20)}\n"
        "print(canonical([names, M(tags=names)]))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    "value",
    [None, "", [], (), {}, set(), frozenset(), b"", bytearray(), memoryview(b""), UserDict(), Pair._make([1, 2])[:0]],
)
def test_none_and_empty_values_are_no_keys(value: object) -> None:
    """None, empty text and empty containers are missing keys."""
    assert key_text(value) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("order:42", "order:42"),
        (" ", " "),
        (0, "0"),
        (0.0, "0.0"),
        (False, "false"),
        (1, "1"),
        ([None], "[null]"),
        ({"a": None}, '{"a":null}'),
        (b"a", '"hex:61"'),
        (UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (Colour.RED, "red"),
        (Colour.NUMBER, "3"),
        (Name.ANN, "ann"),
        (LegacyName.BOB, "bob"),
        (Word("w"), "w"),
    ],
)
def test_text_is_a_key_as_it_is_and_other_values_their_json(value: object, text: str) -> None:
    """Text stands for itself, an Enum for its value, anything else for its canonical JSON."""
    result = key_text(value)
    assert result == text
    assert type(result) is str


@given(json_values)
def test_the_text_of_a_key_is_a_key_too(value: object) -> None:
    """A value and its text are one key, as 1 and "1" are."""
    text = key_text(value)
    assert key_text(text) == text


@given(
    st.tuples(st.text(min_size=1), st.text()),
    st.tuples(st.text(min_size=1), st.text()),
)
def test_joined_keys_are_unambiguous(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Different pairs of a scope and a key never give one text."""
    assert (qualify(*one) == qualify(*other)) == (one == other)


@given(st.text(alphabet="%:25A3ab", min_size=1, max_size=6), st.text(alphabet="%:25A3ab", max_size=6))
def test_joined_keys_can_be_taken_apart(scope: str, key: str) -> None:
    """The scope ends at the first colon, whatever it holds, and unescapes to what it was."""
    head, _, tail = qualify(scope, key).partition(":")
    assert (head.replace("%3A", ":").replace("%25", "%"), tail) == (scope, key)


@pytest.mark.parametrize(
    ("scope", "key", "text"),
    [
        ("", "a:b", "a:b"),
        ("pay", "a:b", "pay:a:b"),
        ("a:b", "c", "a%3Ab:c"),
        ("50%", "", "50%25:"),
        ("%3A", "k", "%253A:k"),
    ],
)
def test_scopes_are_escaped_and_keys_are_not(scope: str, key: str, text: str) -> None:
    """Only the scope is escaped; without one the key is kept byte for byte."""
    assert qualify(scope, key) == text


@pytest.mark.parametrize("key", ["k", " ", "é", "🎈", "a:lock", "x" * 5000])
def test_text_is_a_usable_key(key: str) -> None:
    """Any text that UTF-8 can hold is returned as it is."""
    assert check_key(key) == key


def test_a_subclass_of_text_becomes_text() -> None:
    """A StrEnum member is its value, so that no formatting of it can differ."""
    assert type(check_key(Name.ANN)) is str
    assert check_key(LegacyName.BOB) == "bob"


@pytest.mark.parametrize("key", [None, ""])
def test_a_missing_key_is_refused(key: object) -> None:
    """None and empty text are missing keys."""
    with pytest.raises(MissingKeyError, match="own key"):
        check_key(key)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (1, "not int; convert it with str"),
        (b"k", "not bytes"),
        (UUID(int=1), "not uuid.UUID"),
        ([], "not list"),
        ("secret\ud800", "lone surrogate"),
    ],
)
def test_keys_that_are_not_text_are_refused(key: object, message: str) -> None:
    """What is not text, or not UTF-8, is refused with its type and a remedy, and without its value."""
    with pytest.raises(InvalidKeyError, match=message) as caught:
        check_key(key)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "as_it_is"),
    [
        ("k", True),
        ("é" * 128, True),
        ("x" * 512, True),
        ("é" * 256, True),
        ("🎈" * 128, True),
        ("x" * 513, False),
        ("é" * 257, False),
        ("🎈" * 129, False),
        ("k:lock", False),
        (":lock", False),
        ("k:lock:", True),
        ("lock", True),
        ("x" * 508 + ":lock", False),
    ],
)
def test_long_keys_and_names_of_locks_are_stored_as_their_digest(key: str, as_it_is: bool) -> None:
    """A key of more than 512 bytes, or one that could be taken for a lock, is stored as its full SHA-256."""
    expected = key if as_it_is else "sha256:" + hashlib.sha256(key.encode()).hexdigest()
    assert stored_form(key) == expected


@given(st.text())
def test_stored_keys_are_short_and_no_locks(key: str) -> None:
    """What is stored fits the limit, is no lock, and stays as it is when it is stored again."""
    stored = stored_form(key)
    assert len(stored.encode()) <= 512
    assert not stored.endswith(":lock")
    assert stored_form(stored) == stored


@given(st.text(st.characters()))
def test_digests_are_128_bits_of_sha256(text: str) -> None:
    """A digest is 32 lower-case hex digits of the SHA-256 of any text, surrogates included."""
    assert digest(text) == hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def test_a_digest_takes_surrogates() -> None:
    """Whatever was refused as a key can still be named in a log."""
    assert len(digest("\ud800")) == 32


@pytest.mark.parametrize("secret", [None, b"pepper", b""])
def test_fingerprints_hash_the_canonical_json(secret: bytes | None) -> None:
    """A fingerprint is 128 bits of SHA-256, or of HMAC-SHA-256, over the canonical JSON."""
    payload = {"b": "é", "a": 1}
    text = '{"a":1,"b":"é"}'.encode()
    full = hashlib.sha256(text).hexdigest() if secret is None else hmac.new(secret, text, "sha256").hexdigest()
    assert fingerprint(payload, secret) == full[:32]


@given(json_values, json_values)
def test_fingerprints_differ_where_payloads_do(one: object, other: object) -> None:
    """Two payloads share a fingerprint exactly if they share their canonical text."""
    assert (fingerprint(one) == fingerprint(other)) == (canonical(one) == canonical(other))


@given(st.text(), st.integers())
def test_text_and_json_are_not_confused_in_fingerprints(text: str, number: int) -> None:
    """The payload "1" is not the payload 1, nor is any text another value."""
    assert fingerprint(str(number)) != fingerprint(number)
    assert fingerprint(canonical(text)) != fingerprint(text)


def test_a_secret_changes_every_fingerprint() -> None:
    """With different secrets nobody can compare fingerprints."""
    assert len({fingerprint("4111"), fingerprint("4111", b"a"), fingerprint("4111", b"b")}) == 3


def test_offsets_are_part_of_a_datetime() -> None:
    """The same instant in two offsets is two texts: a payload is compared as it was given."""
    assert canonical(NOON) != canonical(NOON.astimezone(timezone(timedelta(hours=1))))


@pytest.mark.parametrize("value", [2**64 - 1, 2**64, -(2**64), 10**100])
def test_ints_of_any_size_are_keys(value: int) -> None:
    """A number is the key that its digits are."""
    assert key_text(value) == str(value) == canonical(value)


def test_an_int_over_the_digit_limit_is_no_key() -> None:
    """Python cannot write it, and so it has no text."""
    with pytest.raises(InvalidKeyError, match="digit limit"):
        key_text(10**5000)
