"""PydanticCodec: what comes back is what went in, as the annotated type, or it is refused."""

import enum
import json
import math
import re
import sys
import typing
from collections import namedtuple
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypeVar,
    Union,
)
from uuid import UUID
from zoneinfo import ZoneInfo

import pydantic
import pytest
import typing_extensions
from pydantic import (
    AliasChoices,
    AliasGenerator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    RootModel,
    SecretStr,
    computed_field,
    field_validator,
)
from pydantic.alias_generators import to_camel

from asyncidem.codecs import UNRESOLVED, PydanticCodec
from asyncidem.errors import CodecError, ConfigurationError

NOON = datetime(2024, 1, 2, 12, 0, 0, 5, tzinfo=UTC)
T = TypeVar("T")


class Name(enum.StrEnum):
    ANN = "ann"


class Colour(enum.Enum):
    RED = "red"


Pair = namedtuple("Pair", "a b")  # noqa: PYI024 (the point is that it is a tuple)


@dataclass
class Point:
    x: int
    when: datetime


class Row(typing_extensions.TypedDict):
    id: int
    tags: NotRequired[list[str]]
    parent: "Row | None"


class Aliased(BaseModel):
    a: int = Field(alias="A")
    b: str = Field(default="x", serialization_alias="B", validation_alias=AliasChoices("bee", "be"))


class Camel(BaseModel):
    model_config = ConfigDict(alias_generator=AliasGenerator(alias=to_camel), extra="forbid")
    foo_bar: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return 2 * self.foo_bar


class CamelChild(Camel):
    extra_x: int = 3


class ByAliasOnly(BaseModel):
    model_config = ConfigDict(serialize_by_alias=True, validate_by_alias=True, validate_by_name=False)
    a: int = Field(alias="A")


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)
    when: datetime
    pair: tuple[int, str]
    colour: Colour
    id: UUID
    price: Decimal
    names: frozenset[str]


class Open(BaseModel):
    x: int = 1


class OpenChild(Open):
    y: int = 2


class Private(BaseModel):
    x: int
    _cache: int = PrivateAttr(0)


class Extra(BaseModel):
    model_config = ConfigDict(extra="allow")
    x: int
    _cache: int = PrivateAttr(0)


class Cat(BaseModel):
    kind: Literal["cat"] = Field(alias="Kind")


class Dog(BaseModel):
    kind: Literal["dog"] = Field(alias="Kind")


class Owner(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    anything: Any = None


class Secretive(BaseModel):
    secret: SecretStr


class Base64(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
    data: bytes


class Utf8(BaseModel):
    data: bytes


class Excluding(BaseModel):
    kept: int
    left_out: int = Field(default=1, exclude=True)


class Shortening(BaseModel):
    items: list[int] = []
    names: dict[str, int] = {}

    @field_validator("items", mode="after")
    @classmethod
    def two_items(cls, value: list[int]) -> list[int]:
        return value[:2]

    @field_validator("names", mode="after")
    @classmethod
    def no_secrets(cls, value: dict[str, int]) -> dict[str, int]:
        return {name: number for name, number in value.items() if name != "secret"}


class Box(BaseModel, typing.Generic[T]):
    value: T


class Measured(BaseModel):
    value: float


class Constants(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="constants")
    value: float


class Moments(BaseModel):
    when: list[datetime]
    pair: tuple[int, datetime]
    note: dict[str, datetime]
    _cache: int = PrivateAttr(0)


class Hashing(BaseModel):
    digest: str

    @field_validator("digest", mode="before")
    @classmethod
    def hashed(cls, value: str) -> str:
        return f"#{value}"


@dataclass
class Basket:
    items: list[Aliased]
    seen: set[int]


PD = PydanticCodec()


class TestPydanticCodec:
    @pytest.mark.parametrize(
        ("annotation", "value"),
        [
            (Aliased, Aliased(A=1, bee="q")),
            (Camel, Camel(fooBar=1)),
            (ByAliasOnly, ByAliasOnly(A=1)),
            (
                Strict,
                Strict(
                    when=NOON,
                    pair=(1, "a"),
                    colour=Colour.RED,
                    id=UUID(int=1),
                    price=Decimal("1.10"),
                    names=frozenset("ab"),
                ),
            ),
            (Owner, Owner(pet=Dog(Kind="dog"))),
            (RootModel[list[int]], RootModel[list[int]]([1])),
            (Box[int], Box[int](value=1)),
            (Base64, Base64(data=b"\xff\x00")),
            (list[Base64], [Base64(data=b"\xff\x00")]),
            (Utf8, Utf8(data="é".encode())),
            (Constants, Constants(value=float("inf"))),
            (Point, Point(1, NOON)),
            (Basket, Basket([Aliased(A=1)], {1, 2})),
            (Pair, Pair(1, "a")),
            (Row, {"id": 1, "parent": {"id": 2, "parent": None}}),
            (list[Aliased], [Aliased(A=1), Aliased(A=2)]),
            (dict[str, Aliased], {"k": Aliased(A=1)}),
            (dict[int, datetime], {1: NOON}),
            (Aliased | None, None),
            (Aliased | None, Aliased(A=1)),
            (Cat | Dog, Dog(Kind="dog")),
            (Union[datetime, str], NOON),  # noqa: UP007
            (int | str, "1"),
            (int | str, 1),
            (None, None),
            (datetime, NOON),
            (date, date(2024, 1, 2)),
            (timedelta, timedelta(days=1, microseconds=3)),
            (Decimal, Decimal("1.10")),
            (UUID, UUID(int=1)),
            (Colour, Colour.RED),
            (Name, Name.ANN),
            (tuple[int, ...], (1, 2)),
            (set[tuple[int, int]], {(1, 2)}),
            (bytes, b"text"),
            (float, 1.5),
            (float, float("inf")),
            (int, 10**400),
            (Annotated[int, []], 3),
            (Any, {"a": [1, "x", None, True, 1.0]}),
        ],
    )
    def test_values_come_back_as_annotated(self, annotation: object, value: object) -> None:
        """Models, dataclasses, containers and scalars come back equal and of the same type, whatever their aliases."""
        PD.check(annotation)
        text = PD.encode(value)
        for codec in (PD, PydanticCodec()):
            back = codec.decode(text, annotation)
            assert (back, type(back)) == (value, type(value))

    @pytest.mark.parametrize(
        ("model", "value"),
        [
            (list[Aliased], [Aliased(A=1)]),
            (Aliased, Aliased(A=1)),
            (tuple[int, str], (1, "a")),
            (Camel, Camel(fooBar=1)),
        ],
        ids=str,
    )
    def test_a_named_type_needs_no_annotation(self, model: object, value: object) -> None:
        """The named type counts, whatever the annotation says."""
        codec = PydanticCodec(model)
        codec.check(bytes)
        back = codec.decode(codec.encode(value), bytes)
        assert (back, type(back)) == (value, type(value))

    def test_nan_comes_back_where_it_is_written(self) -> None:
        """A bare NaN is kept, and one in a model that writes it as a constant."""
        assert math.isnan(PD.decode(PD.encode(float("nan")), float))
        assert math.isnan(PD.decode(PD.encode(Constants(value=float("nan"))), Constants).value)

    def test_fields_are_stored_by_name(self) -> None:
        """Renaming an alias does not make stored results unreadable."""
        assert json.loads(PD.encode(Aliased(A=1))) == {"a": 1, "b": "x"}

    @pytest.mark.parametrize(
        "value",
        [
            object(),
            {"a": object()},
            b"\xff",
            "\ud800",
            Utf8(data=b"\xff"),
            Secretive(secret=SecretStr("s3cret")),
            Measured(value=float("nan")),
            Owner(pet=Dog(Kind="dog"), anything=NOON),
            Owner(pet=Dog(Kind="dog"), anything=[Aliased(A=1)]),
            Owner(pet=Dog(Kind="dog"), anything=(1, 2)),
            Owner(pet=Dog(Kind="dog"), anything={"a": {"b": NOON}}),
            Basket([Aliased(A=1)], {NOON}),  # type: ignore[arg-type]
            Point(1.5, NOON),  # type: ignore[arg-type]
            Hashing(digest="s3cret"),
            Shortening.model_construct(items=[1, 2, 3]),
            Shortening.model_construct(names={"a": 1, "secret": 2}),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_what_would_come_back_changed_is_refused(self, value: object) -> None:
        """What pydantic cannot write, or a model that it would read back differently, is refused without its value."""
        with pytest.raises(CodecError, match="a result of type") as caught:
            PD.encode(value)
        assert "s3cret" not in str(caught.value)

    @pytest.mark.parametrize(
        ("model", "value"),
        [
            (list[Secretive], [Secretive(secret=SecretStr("s"))]),
            (Aliased, {"a": 1}),
            (int, "s3cret"),
            (float, float("nan")),
            (list[int], (1, 2)),
        ],
        ids=str,
    )
    def test_a_value_that_is_not_of_the_named_type_is_refused(self, model: object, value: object) -> None:
        """A named type is enforced when the result is stored, in containers too."""
        with pytest.raises(CodecError) as caught:
            PydanticCodec(model).encode(value)
        assert "s3cret" not in str(caught.value)

    def test_a_value_that_cannot_be_written_has_its_cause(self) -> None:
        """The pydantic error is the cause."""
        with pytest.raises(CodecError) as caught:
            PD.encode({"a": object()})
        assert "Unable to serialize unknown type" in str(caught.value.__cause__)

    @pytest.mark.parametrize("text", ['{"a": "s3cret"}', "[]", "{", ""])
    def test_text_that_does_not_validate_is_an_error(self, text: str) -> None:
        """Stored text that is no value of the type is a CodecError; the pydantic error is its cause."""
        with pytest.raises(
            CodecError, match=rf"^the stored result is not a value of {re.escape(__name__)}\.Aliased$"
        ) as caught:
            PD.decode(text, Aliased)
        assert isinstance(caught.value.__cause__, pydantic.ValidationError)

    def test_a_subclass_comes_back_as_the_annotated_class(self) -> None:
        """Of a subclass's fields, those of the annotated class return."""
        back = PD.decode(PD.encode(OpenChild(x=5, y=6)), Open)
        assert (back, type(back)) == (Open(x=5), Open)

    def test_a_subclass_of_a_class_that_forbids_extra_fields(self) -> None:
        """Where the annotated class forbids extra fields, a subclass fails at replay: the documented limit."""
        with pytest.raises(CodecError):
            PD.decode(PD.encode(CamelChild(fooBar=1)), Camel)

    def test_a_subclass_of_a_named_class_is_refused(self) -> None:
        """Where the class is named, a value of another class is found out when it is stored."""
        for codec, value in ((PydanticCodec(Open), OpenChild()), (PydanticCodec(list[Open]), [Open(), OpenChild()])):
            with pytest.raises(CodecError, match="another value"):
                codec.encode(value)

    def test_unions_decide_by_the_text(self) -> None:
        """In ``str | datetime`` a datetime comes back as text: the documented limit."""
        assert PD.decode(PD.encode(NOON), str | datetime) == "2024-01-02T12:00:00.000005Z"

    def test_unions_of_one_set_of_types_keep_their_order(self) -> None:
        """Two unions that compare equal do not share an adapter."""
        assert (str | datetime) == (datetime | str)
        text = PD.encode(NOON)
        assert PD.decode(text, str | datetime) != NOON
        assert PD.decode(text, datetime | str) == NOON

    def test_models_without_an_annotation_come_back_as_dicts(self) -> None:
        """Without a type, plain JSON comes back: the documented limit."""
        PD.check(Any)
        assert PD.decode(PD.encode(Aliased(A=1)), Any) == {"a": 1, "b": "x"}

    def test_private_attributes_are_not_stored(self) -> None:
        """They neither return nor get in the way."""
        value = Private(x=1)
        value._cache = 5
        assert PD.decode(PD.encode(value), Private)._cache == 0

    def test_excluded_fields_must_be_at_their_default(self) -> None:
        """A field with exclude=True is not stored, so it may only hold what its default brings back."""
        assert PD.decode(PD.encode(Excluding(kept=2)), Excluding) == Excluding(kept=2)
        with pytest.raises(CodecError, match="another value"):
            PD.encode(Excluding(kept=2, left_out=7))

    def test_extra_fields_come_back(self) -> None:
        """What a model with extra="allow" holds besides its fields is stored and compared."""
        value = Extra(x=1, more="text")  # type: ignore[call-arg]
        value._cache = 1
        assert PD.decode(PD.encode(value), Extra).model_extra == {"more": "text"}
        with pytest.raises(CodecError, match="another value"):
            PD.encode(Extra(x=1, more=NOON))  # type: ignore[call-arg]

    def test_the_hour_that_the_clocks_repeat_is_stored(self) -> None:
        """A datetime that equals none of another zone is compared by its offset; the zone becomes an offset."""
        folded = datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))
        value = Moments(when=[folded], pair=(1, folded), note={"a": folded})
        value._cache = 1
        back = PD.decode(PD.encode(value), Moments)
        assert [moment.isoformat() for moment in (*back.when, back.pair[1], back.note["a"])] == [folded.isoformat()] * 3

    def test_an_open_generic_model_is_left_to_the_annotation(self) -> None:
        """A generic model without its arguments comes back by an annotation that has them."""
        assert PD.decode(PD.encode(Box(value=NOON)), Box[datetime]) == Box[datetime](value=NOON)

    def test_adapters_are_kept_and_bounded(self) -> None:
        """An annotation's adapter is built once, unhashable ones too, and the cache does not grow for ever."""
        codec = PydanticCodec()
        annotation = Annotated[int, []]
        codec.check(annotation)
        first = codec._adapter(annotation)
        assert codec._adapter(annotation) is first
        for length in range(300):
            codec.check(Annotated[int, length])
        assert len(codec._adapters) <= 256
        assert codec.decode("3", annotation) == 3

    def test_a_type_that_pydantic_cannot_handle_is_refused(self) -> None:
        """The error comes at decoration, or when the codec is made, and names the type."""
        with pytest.raises(ConfigurationError, match=f"return type {__name__}.TestPydanticCodec"):
            PD.check(TestPydanticCodec)
        with pytest.raises(ConfigurationError, match=f"return type {__name__}.TestPydanticCodec"):
            PydanticCodec(TestPydanticCodec)

    def test_what_is_not_resolved_is_accepted_and_not_decoded(self) -> None:
        """Without a type a model would silently come back as a dict, so decoding asks for one."""
        PD.check(UNRESOLVED)
        with pytest.raises(CodecError, match=r"name the type: PydanticCodec\(Model\)"):
            PD.decode("{}", UNRESOLVED)
        assert PydanticCodec(int).decode("1", UNRESOLVED) == 1

    def test_a_model_may_be_completed_later(self) -> None:
        """A model with a field whose class comes later is accepted, and works when it is complete."""
        names: dict[str, Any] = {"BaseModel": BaseModel, "__name__": __name__}
        exec("class Early(BaseModel):\n    field: 'Late'", names)  # noqa: S102
        codec = PydanticCodec()
        codec.check(names["Early"])
        exec("class Late(BaseModel):\n    x: int\nEarly.model_rebuild()", names)  # noqa: S102
        value = names["Early"](field={"x": 1})
        assert codec.decode(codec.encode(value), names["Early"]) == value

    def test_pydantic_is_an_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without pydantic the error says what to install."""
        monkeypatch.setitem(sys.modules, "pydantic", None)
        with pytest.raises(ConfigurationError, match=r'pip install "asyncidem\[pydantic\]"'):
            PydanticCodec()

    @pytest.mark.parametrize("version", ["1.10.13", "2.10.6", "2.9.0"])
    def test_an_old_pydantic_is_refused(self, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
        """A pydantic that cannot dump and validate by name is refused."""
        monkeypatch.setattr(pydantic, "VERSION", version)
        with pytest.raises(ConfigurationError, match=rf"needs pydantic 2\.11, not {version}"):
            PydanticCodec()
