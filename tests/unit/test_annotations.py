"""Return annotations: resolved as late as needed, judged by what JSON can hold."""
# ruff: noqa: D103 (the functions at the top are examples)

import functools
import sys
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from typing_extensions import TypeAliasType

import asyncidem.annotations as annotations_module
from asyncidem.annotations import UNRESOLVED, label, not_json, return_annotation
from asyncidem.errors import ConfigurationError

Here = list[int]


async def plain(value: "NoSuchParameter") -> "dict[str, Here]":  # type: ignore[name-defined]  # noqa: F821
    return {}


async def metadata() -> Annotated["int", "unit"]:
    return 1


async def unannotated(value: int):  # type: ignore[no-untyped-def]  # noqa: ANN201
    return value


async def nothing() -> None: ...


async def unresolved() -> "dict[str, NotYet]":  # type: ignore[name-defined]  # noqa: F821
    return {}


async def nonsense() -> "1 +":  # type: ignore[syntax]  # noqa: F722
    return 1


class Service:
    async def method(self) -> "Here":
        return []

    async def __call__(self) -> "Here":
        return []


def wrapping(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    async def wrapper(*args: Any) -> Any:
        return await fn(*args)

    return wrapper


@pytest.mark.parametrize(
    ("fn", "annotation"),
    [
        (plain, dict[str, list[int]]),
        (metadata, Annotated[int, "unit"]),
        (unannotated, Any),
        (nothing, type(None)),
        (functools.partial(functools.partial(plain, 1), 2), dict[str, list[int]]),
        (Service().method, list[int]),
        (Service.method, list[int]),
        (Service(), list[int]),
        (functools.partial(Service()), list[int]),
        (wrapping(wrapping(plain)), dict[str, list[int]]),
        (len, Any),
        (int, Any),
        (Service, Any),
        (unresolved, UNRESOLVED),
    ],
)
def test_the_return_annotation_is_found_and_resolved(fn: Callable[..., Any], annotation: object) -> None:
    """Strings are resolved, wrappers looked through, and parameters that cannot be resolved do not matter."""
    assert return_annotation(fn) == annotation


def test_an_annotation_that_cannot_be_evaluated_is_refused() -> None:
    """What is no annotation at all is an error that names the function."""
    with pytest.raises(ConfigurationError, match="return annotation of nonsense cannot be evaluated"):
        return_annotation(nonsense)


def test_a_circle_of_wrappers_ends() -> None:
    """A function that wraps itself has no annotation, instead of hanging."""

    def circle() -> int:
        return 1

    circle.__wrapped__ = circle  # type: ignore[attr-defined]
    assert return_annotation(circle) is Any


def test_a_name_may_come_later() -> None:
    """An annotation whose name does not exist yet resolves as soon as it does."""
    names: dict[str, Any] = {}
    exec('def fn() -> "Later": ...', names)  # noqa: S102
    assert return_annotation(names["fn"]) is UNRESOLVED
    names["Later"] = int
    assert return_annotation(names["fn"]) is int


def test_local_classes_that_the_body_uses_are_found() -> None:
    """The names of the enclosing function are known as far as the body uses them; one not assigned yet is missing."""

    class Local: ...

    def make() -> "Local":
        return Local()

    def early() -> "Unset":
        return Unset()

    assert return_annotation(make) is Local
    assert return_annotation(early) is UNRESOLVED

    class Unset: ...

    assert return_annotation(early) is Unset


@pytest.mark.skipif(sys.version_info < (3, 12), reason="type parameters are of Python 3.12")
def test_type_parameters_are_known() -> None:
    """A string may name the function's own type parameters."""
    names: dict[str, Any] = {}
    exec('def fn[T](value: T) -> "list[T]": ...', names)  # noqa: S102
    (parameter,) = names["fn"].__type_params__
    assert return_annotation(names["fn"]) == list[parameter]  # type: ignore[valid-type]


@pytest.mark.skipif(sys.version_info < (3, 14), reason="annotations are lazy since Python 3.14")
def test_lazy_annotations_are_asked_for_the_return_only() -> None:
    """A lazy annotation of a parameter that fails does not matter; one of the result is tried again."""
    names: dict[str, Any] = {}
    exec("def fn(value: NoSuch) -> dict[str, int]: ...\ndef late() -> list[Later]: ...", names)  # noqa: S102
    assert return_annotation(names["fn"]) == dict[str, int]
    assert return_annotation(names["late"]) is UNRESOLVED
    names["Later"] = int
    assert return_annotation(names["late"]) == list[int]


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="the real thing is tested there")
def test_annotations_that_fail_together_are_asked_for_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading all annotations fails for a missing name, those that exist are still found, as on Python 3.14."""

    class Lazy:
        __globals__: typing.ClassVar[dict[str, object]] = {}

        @property
        def __annotations__(self) -> dict[str, object]:  # type: ignore[override]
            raise NameError

    def get_annotations(function: object, *, format: str) -> dict[str, object]:  # noqa: A002 - the real name
        assert (type(function), format) == (Lazy, "forwardref")
        return {"return": int}

    module: Any = types.ModuleType("annotationlib")
    module.get_annotations = get_annotations
    module.Format = types.SimpleNamespace(FORWARDREF="forwardref")
    monkeypatch.setitem(sys.modules, "annotationlib", module)
    lazy = Lazy()
    monkeypatch.setattr(annotations_module, "_function", lambda _: lazy)
    monkeypatch.setattr(annotations_module, "_local_names", lambda _: {})
    assert return_annotation(len) is int


def test_lazy_names_inside_types_are_accepted() -> None:
    """Types whose fields or values name what does not exist are accepted until they are used."""

    class Missing(typing.TypedDict):
        field: "NoSuch"  # type: ignore[name-defined]  # noqa: F821

    assert not_json(Missing) is None


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the type statement is of Python 3.12")
def test_aliases_of_the_type_statement_are_looked_through() -> None:
    """An alias is what it stands for, recursive and generic ones too; a value that cannot be evaluated is accepted."""
    names: dict[str, Any] = {}
    source = """
type Tree = dict[str, Tree] | list[Tree] | int
type Bad = list[Bad] | tuple[Bad, ...]
type Box[T] = list[Box[T]] | T
type Lazy = NoSuch
type Name = str
type Number = int
"""
    exec(source, names)  # noqa: S102
    assert not_json(names["Tree"]) is None
    assert not_json(names["Bad"]) is not None
    assert not_json(names["Box"][int]) is None
    assert not_json(names["Box"][bytes]) is bytes
    assert not_json(names["Lazy"]) is None
    text, number = names["Name"], names["Number"]
    assert not_json(dict[text, int]) is None
    assert not_json(dict[number, int]) == dict[number, int]


def test_aliases_of_older_pythons_are_looked_through() -> None:
    """An alias made by calling TypeAliasType is looked through."""
    assert not_json(TypeAliasType("Good", dict[str, int])) is None
    assert not_json(TypeAliasType("Bad", "set[int]")) is None
    assert not_json(TypeAliasType("Bad", set[int])) is not None


def test_aliases_of_what_does_not_exist_yet_are_taken() -> None:
    """An alias that is evaluated late, by a statement of Python 3.12, may name what does not exist: it is not refused."""

    def value(_: object) -> object:
        raise NameError("NoSuch")

    assert not_json(type("TypeAliasType", (), {"__value__": property(value)})()) is None


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "int"),
        (Service, f"{__name__}.Service"),
        (tuple[int, str], "tuple[int, str]"),
        (Any, "typing.Any"),
        (UNRESOLVED, "UNRESOLVED"),
    ],
)
def test_labels_name_types(annotation: object, text: str) -> None:
    """An error calls a type by its module and name, and an annotation as it is written."""
    assert label(annotation) == text
