"""Codecs: what comes back is what went in, or it is refused."""

import collections
import enum
import json
import math
import re
import sys
import types
import typing
from collections import OrderedDict, namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import (
    Annotated,
    Any,
    Literal,
    LiteralString,
    Never,
    NewType,
    NoReturn,
    NotRequired,
    Optional,
    TypeVar,
    Union,
)
from uuid import UUID

import pytest
import typing_extensions
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    BaseModel,
)

from asyncidem.codecs import UNRESOLVED, Codec, JSONCodec, MsgspecCodec, _make_chunks
from asyncidem.errors import CodecError, ConfigurationError

NOON = datetime(2024, 1, 2, 12, 0, 0, 5, tzinfo=UTC)
JSON = JSONCodec()
CODECS: list[JSONCodec] = [JSON, MsgspecCodec()]

any_text = st.text(st.characters(exclude_categories=())).filter(
    lambda text: not re.search("[\ud800-\udbff][\udc00-\udfff]", text)
)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=15,
)


near_json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers(-1, 2) | st.floats() | st.sampled_from(["a", "\ud83d", "\ud83d\ude00"]) | st.just(b""),
    lambda children: (
        st.lists(children, max_size=3)
        | st.tuples(children)
        | st.dictionaries(st.sampled_from(["a", "b", 1, None, 0.5, "\ud83d\ude00"]), children, max_size=3)
    ),
    max_leaves=6,
)


def exactly_json(value: Any) -> bool:
    """Tell the plain way whether JSON can give back a value."""
    if type(value) is list:
        return all(map(exactly_json, value))
    if type(value) is dict:
        return all(type(key) is str and exactly_json(key) and exactly_json(value[key]) for key in value)
    if type(value) is str:
        return "\ud83d\ude00" not in value
    return value is None or type(value) in (int, bool) or (type(value) is float and math.isfinite(value))


def comes_back(codec: JSONCodec, value: Any) -> bool:
    """Tell whether a codec stores a value and gives it back as it was; False if it refuses."""
    try:
        text = codec.encode(value)
    except CodecError:
        return False
    assert same(codec.decode(text, Any), value)
    return True


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are equal in value and type all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return repr(one) == repr(other)


class Level(enum.IntEnum):
    HIGH = 9


class Name(enum.StrEnum):
    ANN = "ann"


class Colour(enum.Enum):
    RED = "red"


class Text(str):
    __slots__ = ()


Pair = namedtuple("Pair", "a b")  # noqa: PYI024 (the point is that it is a tuple)


@dataclass
class Point:
    x: int
    when: datetime


class TestCodec:
    def test_every_annotation_is_accepted_unless_a_codec_says_no(self) -> None:
        """A codec of one's own needs only encode and decode."""

        class Repr(Codec):
            def encode(self, value: object) -> str:
                return repr(value)

            def decode(self, text: str, annotation: Any) -> Any:
                return text

        assert Repr().check(set[int]) is None  # type: ignore[func-returns-value]

    def test_a_codec_must_encode_and_decode(self) -> None:
        """A codec that lacks a direction cannot be made."""
        with pytest.raises(TypeError, match="abstract"):
            Codec()  # type: ignore[abstract]


@pytest.fixture(params=[JSONCodec, MsgspecCodec])
def codec(request: pytest.FixtureRequest) -> JSONCodec:
    """Return each of the codecs that store plain JSON."""
    made: JSONCodec = request.param()
    return made


class TestPlainJSON:
    @given(json_values, st.permutations(CODECS))
    def test_json_values_come_back_exactly(self, value: object, codecs: list[JSONCodec]) -> None:
        """Whatever is plain JSON comes back equal in value, type and order, whichever of the codecs reads it."""
        for writes, reads in zip(CODECS, codecs, strict=True):
            assert same(reads.decode(writes.encode(value), Any), value)

    @given(json_values)
    def test_the_text_of_one_is_that_of_the_standard_library(self, value: object) -> None:
        """JSONCodec writes what ``json.dumps`` does."""
        assert JSON.encode(value) == json.dumps(value)

    @given(near_json_values)
    def test_both_refuse_the_same(self, value: object) -> None:
        """Values with parts that are nearly JSON are stored by both codecs or by none, and come back as they were."""
        assert [comes_back(codec, value) for codec in CODECS] == 2 * [exactly_json(value)]

    @given(any_text)
    def test_lone_surrogates_come_back(self, text: str) -> None:
        """Text that is not even UTF-8 comes back, as a value and as a key."""
        for codec in CODECS:
            assert codec.decode(codec.encode({text: text}), Any) == {text: text}

    @pytest.mark.parametrize("value", [-0.0, 0.1 + 0.2, 1e308, 5e-324, 10**400, "\udc00\ud800", {}, [[]], {"a": {}}])
    def test_edges_come_back(self, codec: JSONCodec, value: object) -> None:
        """Signed zero, the last bit of a float and big ints are kept."""
        assert same(codec.decode(codec.encode(value), Any), value)

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ((1, 2), "a value of type tuple at $ "),
            ({"items": [1, 2, {"x": {3}}]}, "a value of type set at $.items[2].x "),
            (b"x", "a value of type bytes at $ "),
            ([datetime.now(UTC)], "a value of type datetime.datetime at $[0] "),
            (Decimal(1), "a value of type decimal.Decimal at $ "),
            (Point(1, NOON), f"a value of type {__name__}.Point at $ "),
            (Level.HIGH, f"a value of type {__name__}.Level at $ "),
            (Name.ANN, f"a value of type {__name__}.Name at $ "),
            (Text("x"), f"a value of type {__name__}.Text at $ "),
            (Pair(1, 2), f"a value of type {__name__}.Pair at $ "),
            ([OrderedDict()], "a value of type collections.OrderedDict at $[0] "),
            (collections.defaultdict(int), "a value of type collections.defaultdict at $ "),
            ({"a": {1: 2}}, "a dict's key of type int at $.a "),
            ({Text("k"): 2}, f"a dict's key of type {__name__}.Text at $ "),
            ({None: 2}, "a dict's key of type NoneType at $ "),
            ([0.5, float("nan")], "a float that is NaN or infinite at $[1] "),
            (float("-inf"), "a float that is NaN or infinite at $ "),
            ({"x": float("nan")}, "a float that is NaN or infinite at $.x "),
            (["\ud83d\ude00"], "text with a surrogate pair at $[0] "),
            ({"\ud83d\ude00": 1}, "text with a surrogate pair at $ "),
            ({"4111 1111": object()}, "a value of type object at $[*] "),
            ({"k" * 41: object()}, "a value of type object at $[*] "),
        ],
    )
    def test_what_would_come_back_changed_is_refused(self, codec: JSONCodec, value: object, message: str) -> None:
        """The error names the type and the place, never a value, and says what to do."""
        with pytest.raises(CodecError) as caught:
            codec.encode(value)
        assert str(caught.value).startswith(message)
        assert "PydanticCodec()" in str(caught.value)
        for secret in ("4111", "kkk"):
            assert secret not in str(caught.value)

    def test_endless_values_are_refused(self, codec: JSONCodec) -> None:
        """A value that contains itself is an error with a path that ends."""
        value: list[Any] = []
        value.append(value)
        with pytest.raises(CodecError, match="nested more than 200 levels deep") as caught:
            codec.encode(value)
        assert len(str(caught.value)) < 300

    @pytest.mark.parametrize(("depth", "fits"), [(200, True), (201, False)])
    def test_depth_has_a_limit(self, codec: JSONCodec, depth: int, fits: bool) -> None:
        """What is encoded can be decoded from a deep stack too: 200 levels are, more are not."""
        value: list[Any] = []
        for _ in range(depth - 1):
            value = [value]
        if fits:
            assert codec.decode(codec.encode(value), Any) == value
        else:
            with pytest.raises(CodecError, match="levels deep"):
                codec.encode(value)

    def test_ints_over_the_digit_limit_are_refused(self, codec: JSONCodec) -> None:
        """An int that Python would not read back is not written."""
        with pytest.raises(CodecError, match="digit limit"):
            codec.encode({"n": 10**5000})
        with pytest.raises(CodecError, match="digit limit"):
            codec.encode(10**5000)

    @pytest.mark.parametrize("text", ["", "{", "'a'", "1 2", "{}x", "[" * 100_000, "9" * 5000, "!"])
    def test_text_that_is_not_json_is_an_error(self, codec: JSONCodec, text: str) -> None:
        """Stored text that cannot be read is a CodecError, and the text is not in it."""
        with pytest.raises(CodecError, match=r"^the stored result is not JSON that can be read$") as caught:
            codec.decode(text, Any)
        assert caught.value.__suppress_context__

    def test_a_namespace_that_is_an_object_s_own_is_looked_through(self, codec: JSONCodec) -> None:
        """The dict of an object's attributes is a dict like another: what is in it counts."""
        owner = types.SimpleNamespace()
        holder = type("Holder", (), {})()
        holder.items = owner.items = [(1, 2)]
        for value in (vars(holder), [vars(holder)], vars(owner)):
            with pytest.raises(CodecError, match=r"a value of type tuple"):
                codec.encode(value)
        holder.items = [1]
        assert codec.decode(codec.encode(vars(holder)), Any) == {"items": [1]}

    def test_a_large_value_is_looked_at_part_by_part(self, codec: JSONCodec) -> None:
        """One part among many thousand that would come back changed is found, and named."""
        rows: list[dict[str, Any]] = [{"id": number, "tags": ["a", None], "sum": 0.5} for number in range(3000)]
        assert same(codec.decode(codec.encode(rows), Any), rows)
        for row, part, message in (
            (2999, {"tags": ("a",)}, "a value of type tuple at $[2999].tags "),
            (1500, {"sum": math.inf}, "a float that is NaN or infinite at $[1500].sum "),
            (1500, {Text("id"): 1}, "a dict's key of type"),
            (0, {"tags": [{Level.HIGH: 1}]}, "a dict's key of type"),
            (7, {"tags": ["\ud83d\ude00"]}, "text with a surrogate pair at $[7].tags[0] "),
        ):
            changed = [*rows]
            changed[row] = {"id": 0, **part} if "id" not in part else part
            with pytest.raises(CodecError, match=re.escape(message)):
                codec.encode(changed)

    @pytest.mark.parametrize("text", [" 1", "1 ", "[1]\n"])
    def test_space_around_stored_text_is_allowed(self, codec: JSONCodec, text: str) -> None:
        """Another writer of the record may have put it there."""
        assert codec.decode(text, Any) == json.loads(text)

    def test_two_decoded_values_share_nothing(self, codec: JSONCodec) -> None:
        """Who changes a replayed result changes nobody else's."""
        text = codec.encode({"a": [1]})
        codec.decode(text, Any)["a"].append(2)
        assert codec.decode(text, Any) == {"a": [1]}

    def test_msgspec_is_an_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without msgspec the error says what to install."""
        monkeypatch.setitem(sys.modules, "msgspec", None)
        with pytest.raises(ConfigurationError, match=r'pip install "asyncidem\[msgspec\]"'):
            MsgspecCodec()

    def test_without_the_interpreters_accelerator_the_text_is_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An interpreter may have no encoder in C."""
        monkeypatch.setattr(json.encoder, "c_make_encoder", None)
        assert "".join(_make_chunks()({"a": [1.5, "é"]}, 0)) == json.dumps({"a": [1.5, "é"]})


Id = NewType("Id", str)
Number = NewType("Number", int)
Moment = NewType("Moment", datetime)
T = TypeVar("T")
TextLike = TypeVar("TextLike", bound=str)
IntLike = TypeVar("IntLike", bound=int)
Times = TypeVar("Times", bound=datetime)
Either = TypeVar("Either", int, bytes)


class Row(typing_extensions.TypedDict):
    id: int
    tags: NotRequired[list[str]]
    parent: "Row | None"


class Partial(typing.TypedDict, total=False):
    id: typing.Required[int]
    kind: Literal["a"]


class Extended(typing_extensions.TypedDict, total=False):
    frozen: typing_extensions.ReadOnly[typing_extensions.Required[int]]


class Wrong(typing.TypedDict):
    when: datetime


class WrongToo(typing_extensions.TypedDict):
    pair: typing_extensions.NotRequired[tuple[int, int]]


class Generic(typing.TypedDict, typing.Generic[T]):
    value: T


class Model(BaseModel):
    x: int


@pytest.mark.parametrize(
    "annotation",
    [
        Any,
        object,
        None,
        type(None),
        bool,
        int,
        float,
        str,
        dict,
        dict[str, Any],
        dict[str, list[dict[str, int | None]]],
        dict[Any, int],
        dict[object, int],
        typing.Dict[str, int],  # noqa: UP006
        Mapping[str, object],
        Mapping,
        typing.Mapping[str, int],
        list,
        list[int],
        typing.List[int],  # noqa: UP006
        Sequence[str],
        Optional[int],  # noqa: UP045
        Union[int, str],  # noqa: UP007
        int | None,
        Literal["a", 1, True, None],  # noqa: PYI061 (None is one of its values)
        dict[Literal["a", "b"], int],
        dict[Annotated[str, int], int],
        dict[Id, int],
        dict[TextLike, int],
        dict[T, int],
        dict[LiteralString, int],
        LiteralString,
        Annotated[int, []],
        Annotated[list[int], "unit"],
        Id,
        T,
        IntLike,
        Never,
        NoReturn,
        typing_extensions.Never,
        Row,
        list[Row],
        Partial,
        Extended,
        Generic[int],
        UNRESOLVED,
        "Unknown",
        list["Unknown"],  # type: ignore[name-defined]  # noqa: F821
        typing.ForwardRef("Unknown"),
    ],
    ids=str,
)
def test_annotations_that_json_can_hold_are_accepted(annotation: object) -> None:
    """JSONCodec accepts a return annotation of plain JSON, and what is not known yet."""
    JSON.check(annotation)


@pytest.mark.parametrize(
    ("annotation", "culprit"),
    [
        (tuple, "tuple"),
        (tuple[int, str], "tuple[int, str]"),
        (set[int], "set[int]"),
        (frozenset, "frozenset"),
        (bytes, "bytes"),
        (datetime, "datetime.datetime"),
        (date, "datetime.date"),
        (Decimal, "decimal.Decimal"),
        (UUID, "uuid.UUID"),
        (complex, "complex"),
        (Name, f"{__name__}.Name"),
        (Level, f"{__name__}.Level"),
        (Point, f"{__name__}.Point"),
        (Pair, f"{__name__}.Pair"),
        (Model, f"{__name__}.Model"),
        (list[Model], f"{__name__}.Model"),
        (Model | None, f"{__name__}.Model"),
        (dict[str, Decimal], "decimal.Decimal"),
        (dict[int, str], "dict[int, str]"),
        (dict[str | int, str], "dict[str | int, str]"),
        (dict[None, str], "dict[None, str]"),
        (dict[Decimal, str], "decimal.Decimal (in the return annotation dict[decimal.Decimal, str])"),
        (dict[Number, int], f"dict[{__name__}.Number, int]"),
        (dict[IntLike, int], "dict[~IntLike, int]"),
        (dict[Either, int], "dict[~Either, int]"),
        (dict[Literal["a", 1], int], "dict[typing.Literal['a', 1], int]"),
        (Mapping[int, str], "collections.abc.Mapping[int, str]"),
        (OrderedDict[str, int], "collections.OrderedDict[str, int]"),
        (Literal[b"a"], "typing.Literal[b'a']"),
        (Literal[Name.ANN], "typing.Literal["),
        (Annotated[tuple[int], 1], "tuple[int]"),
        (Moment, "datetime.datetime"),
        (Times, "datetime.datetime"),
        (Either, "bytes"),
        (Wrong, "datetime.datetime"),
        (WrongToo, "tuple[int, int]"),
        (Generic[bytes], "bytes"),
        (list[Annotated[bytes, []]], "bytes"),
        (typing.Self, "typing.Self"),
        ({"not": "a type"}, "{'not': 'a type'}"),
    ],
    ids=str,
)
def test_annotations_that_json_cannot_hold_are_refused(annotation: object, culprit: str) -> None:
    """JSONCodec refuses anything else at decoration, names the part that is in the way, and the codec for it."""
    with pytest.raises(ConfigurationError) as caught:
        JSON.check(annotation)
    assert str(caught.value).startswith(f"JSON cannot give back {culprit}")
    assert "codec=PydanticCodec()" in str(caught.value)
