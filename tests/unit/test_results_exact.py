"""Results: what a duplicate gets is what the first caller got, in value and type, or an error that says so."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from typing_extensions import TypedDict

from asyncidem import (
    Codec,
    CodecError,
    Idempotency,
    JSONCodec,
    MemoryStore,
    PydanticCodec,
    Record,
    ResultUnavailableError,
    State,
)

NOON = datetime(2024, 1, 2, 12, 0, 0, 5, tzinfo=UTC)

Form = Callable[[Idempotency, Callable[[], Awaitable[Any]]], Callable[[], Awaitable[Any]]]


def decorated(idem: Idempotency, fn: Callable[[], Any]) -> Callable[[], Awaitable[Any]]:
    """Return the decorated form."""
    return idem.idempotent(key=lambda: "k", name="f")(fn)


def called(idem: Idempotency, fn: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    """Return the call form."""
    return lambda: idem.run("f:k", fn)


def entered(idem: Idempotency, fn: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    """Return the context manager's form."""

    async def use() -> Any:
        async with idem.operation("f:k") as op:
            return op.result if op.replayed else op.set_result(await fn())

    return use


FORMS: list[Form] = [decorated, called, entered]


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are equal in value and type all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return repr(one) == repr(other)


async def replays(form: Form, idem: Idempotency, value: Any) -> list[Any]:
    """Return what three calls of a handler of `value` got; it ran once."""
    calls: list[int] = []

    async def handler() -> Any:
        calls.append(1)
        return value

    use = form(idem, handler)
    got = [await use() for _ in range(3)]
    assert calls == [1]
    return got


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


@pytest.mark.parametrize("cache", [0, 5])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "value",
    [{}, [], 0, False, "", 0.0, -0.0, None, True, 1, 1.0, "!", "null", {"a": {"b": [None, {}, [], 0.5, "ü\x00"]}}],
    ids=repr,
)
async def test_values_that_are_easily_confused_replay_exactly(form: Form, value: Any, cache: int) -> None:
    """Empty, false and missing are kept apart, from the store and from the local cache."""
    got = await replays(form, Idempotency(MemoryStore(), local_cache=cache), value)
    assert all(same(one, value) for one in got)


@given(json_values, st.sampled_from(FORMS))
async def test_json_values_replay_exactly(value: Any, form: Form) -> None:
    """Whatever JSON holds comes back in value and type, through all three forms."""
    got = await replays(form, Idempotency(MemoryStore()), value)
    assert all(same(one, value) for one in got)


@pytest.mark.parametrize("value", [{}, [], 0, False, "", 0.0, None, {"a": [1]}], ids=repr)
async def test_the_forms_replay_each_others_results(value: Any) -> None:
    """A result has one encoding, whichever form stored it."""
    store = MemoryStore()
    idem = Idempotency(store)
    got = [(await replays(form, Idempotency(MemoryStore()), value))[0] for form in FORMS]

    async def handler() -> Any:
        return value

    for form in FORMS:
        got.append(await form(idem, handler)())
    record = await store.get("f:k")
    assert record is not None
    assert record.data == json.dumps(value)
    assert all(same(one, value) for one in got)


async def test_replays_do_not_share_their_result() -> None:
    """A caller that changes what it got changes nothing for the next one, local cache or not."""
    for idem in (Idempotency(MemoryStore()), Idempotency(MemoryStore(), local_cache=1)):
        first, second, third = await replays(called, idem, {"items": [1]})
        second["items"].append(2)
        assert first == third == {"items": [1]}


def test_json_is_the_default() -> None:
    """Without a codec results are plain JSON."""
    assert type(Idempotency(MemoryStore())._options.codec) is JSONCodec


class Receipt(BaseModel):
    """A model."""

    order_id: str
    at: datetime
    items: list[int] = []


@dataclass
class Point:
    """A dataclass."""

    x: int
    y: float = 0.5
    tags: list[str] = field(default_factory=list)


class Row(TypedDict):
    """A TypedDict with a datetime, which JSON alone could not hold."""

    at: datetime


RECEIPT = Receipt(order_id="o1", at=NOON, items=[1, 2])


async def model() -> Receipt:
    """Return a model."""
    return RECEIPT


async def text_annotation() -> "Receipt":
    """Return a model under a string annotation."""
    return RECEIPT


async def models() -> list[Receipt]:
    """Return models in a list."""
    return [RECEIPT, Receipt(order_id="", at=NOON)]


async def maybe() -> Receipt | None:
    """Return nothing of an optional."""
    return None


async def indeed() -> "Receipt | None":
    """Return something of an optional."""
    return RECEIPT


async def point() -> Point:
    """Return a dataclass."""
    return Point(1, 2.0, ["a"])


async def row() -> Row:
    """Return a TypedDict."""
    return {"at": NOON}


async def moment() -> datetime:
    """Return a datetime."""
    return NOON


async def nested() -> dict[str, tuple[date, set[int], timedelta]]:
    """Return what plain JSON has no types for."""
    return {"a": (NOON.date(), {1, 2}, timedelta(seconds=1.5))}


async def unannotated():  # type: ignore[no-untyped-def]  # noqa: ANN201 - that is the case
    """Return plain JSON without saying so."""
    return {"a": [1, None]}


HANDLERS = [model, text_annotation, models, maybe, indeed, point, row, moment, nested, unannotated]


@pytest.mark.parametrize("fn", HANDLERS, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("form", [decorated, called])
async def test_pydantic_rebuilds_what_the_annotation_says(form: Form, fn: Callable[[], Awaitable[Any]]) -> None:
    """Decorator and call form rebuild results from the return annotation, string annotations included."""
    use = form(Idempotency(MemoryStore(), codec=PydanticCodec()), fn)
    first, again, third = [await use() for _ in range(3)]
    assert first == again == third
    assert type(first) is type(again) is type(third)
    if isinstance(first, list):
        assert [type(one) for one in first] == [type(one) for one in again]


@pytest.mark.parametrize(
    ("named", "value"),
    [
        (Receipt, RECEIPT),
        (list[Receipt], [RECEIPT]),
        (Receipt | None, None),
        (Receipt | None, RECEIPT),
        (Point, Point(1)),
        (Row, {"at": NOON}),
        (datetime, NOON),
    ],
)
@pytest.mark.parametrize("form", FORMS)
async def test_a_named_type_needs_no_annotation(form: Form, named: Any, value: Any) -> None:
    """`PydanticCodec(Model)` serves all forms, as the object's codec."""
    got = await replays(form, Idempotency(MemoryStore(), codec=PydanticCodec(named)), value)
    assert got == [value] * 3
    assert [type(one) for one in got] == [type(value)] * 3


async def test_a_codec_may_be_named_where_it_is_used() -> None:
    """An override gives one operation or run another codec than the rest."""
    idem = Idempotency(MemoryStore())
    for _ in range(2):
        assert await idem.run("run", model, codec=PydanticCodec()) == RECEIPT
        async with idem.operation("operation", codec=PydanticCodec(Receipt)) as op:
            result = op.result if op.replayed else op.set_result(RECEIPT)
        assert result == RECEIPT
        assert await idem.idempotent(codec=PydanticCodec(Receipt))(unannotated_receipt)() == RECEIPT


async def unannotated_receipt():  # type: ignore[no-untyped-def]  # noqa: ANN201 - that is the case
    """Return a model without saying so."""
    return RECEIPT


async def test_a_model_that_changed_since_is_a_codec_error() -> None:
    """A stored result that the new type does not take is an error with its cause; nothing runs again."""
    store = MemoryStore()
    await Idempotency(store).run("k", unannotated)
    with pytest.raises(CodecError, match=r"not a value of .*Receipt") as found:
        await Idempotency(store, codec=PydanticCodec()).run("k", model)
    assert isinstance(found.value.__cause__, ValidationError)
    assert found.value.result is None


UNENCODABLE = [object(), {1, 2}, (1, 2), float("nan"), b"x", {"a": [NOON]}, {1: 2}]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", UNENCODABLE)
async def test_a_result_that_cannot_be_encoded_is_not_lost(form: Form, value: Any) -> None:
    """Its caller gets it on the CodecError, duplicates get ResultUnavailableError, and nothing runs again."""
    store, calls = MemoryStore(), list[int]()

    async def handler() -> Any:
        calls.append(1)
        return value

    use = form(Idempotency(store), handler)
    with pytest.raises(CodecError) as found:
        await use()
    assert found.value.result is value
    record = await store.get("f:k")
    assert record is not None
    assert (record.state, record.outcome, record.data) == (State.COMPLETED, "unavailable", None)
    for _ in range(2):
        with pytest.raises(ResultUnavailableError, match="completed, but its result was not stored") as unavailable:
            await use()
        assert (unavailable.value.key, unavailable.value.outcome) == ("f:k", "unavailable")
    assert calls == [1]


class BrokenCodec(Codec):
    """Raises what it should not, where it is told to."""

    def __init__(self, where: str) -> None:
        self.where = where

    def encode(self, value: object) -> str:
        if self.where == "encode":
            raise ZeroDivisionError("secret?")
        return str(value)

    def decode(self, text: str, annotation: Any) -> Any:
        raise ZeroDivisionError(text)


@pytest.mark.parametrize("form", FORMS)
async def test_whatever_a_codec_raises_is_a_codec_error(form: Form) -> None:
    """A codec of the user's may fail in any way: the result is on the error, and the operation completed."""
    idem = Idempotency(MemoryStore(), codec=BrokenCodec("encode"))

    async def handler() -> int:
        return 7

    with pytest.raises(CodecError, match="failed to encode") as found:
        await form(idem, handler)()
    assert found.value.result == 7
    assert isinstance(found.value.__cause__, ZeroDivisionError)
    with pytest.raises(ResultUnavailableError):
        await form(idem, handler)()


@pytest.mark.parametrize("form", FORMS)
async def test_a_codec_that_cannot_decode_is_a_codec_error(form: Form) -> None:
    """The stored result stays; the caller is told why it cannot have it, and nothing runs again."""
    calls: list[int] = []

    async def handler() -> int:
        calls.append(1)
        return 7

    use = form(Idempotency(MemoryStore(), codec=BrokenCodec("decode")), handler)
    assert await use() == 7
    with pytest.raises(CodecError, match="failed to decode") as found:
        await use()
    assert isinstance(found.value.__cause__, ZeroDivisionError)
    assert calls == [1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cache", [0, 1])
async def test_a_replay_may_be_mapped(form: Form, cache: int) -> None:
    """`map_replay` gets result and record of every replay, and what it returns is what the caller gets."""
    seen: list[tuple[Any, Record]] = []

    def mark(result: Any, record: Record) -> Any:
        seen.append((result, record))
        return {"replayed": result}

    first, *again = await replays(form, Idempotency(MemoryStore(), map_replay=mark, local_cache=cache), [1])
    assert (first, again) == ([1], [{"replayed": [1]}] * 2)
    assert [result for result, _ in seen] == [[1], [1]]
    assert {(record.key, record.state, record.data) for _, record in seen} == {("f:k", State.COMPLETED, "[1]")}
