"""Return annotations: what a handler promises, and whether JSON can hold it."""

from __future__ import annotations

import collections.abc
import functools
import importlib
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Final

from .errors import ConfigurationError

__all__ = ["UNRESOLVED", "label", "not_json", "return_annotation"]


class _Unresolved:
    def __repr__(self) -> str:
        return "UNRESOLVED"


UNRESOLVED: Final = _Unresolved()
"""What :func:`return_annotation` returns while a name in the annotation does not exist: ask again at the first call."""


def return_annotation(fn: Callable[..., Any]) -> Any:
    """Return the return annotation of ``fn``, resolved: ``Any`` if it has none.

    Partials, bound methods, wrappers and objects with ``__call__`` are looked through. Only the return annotation is
    resolved: the parameters' may name what only the type checker imports.

    Returns:
        The annotation as ``typing.get_type_hints`` gives it, or :data:`UNRESOLVED` if a name in it does not exist.

    Raises:
        ConfigurationError: evaluating the annotation fails for another reason than a missing name.
    """
    function = _function(fn)
    if function is None:
        return Any
    try:
        annotations: dict[str, Any] = function.__annotations__
    except NameError:  # Python 3.14 evaluates all annotations together, on access
        annotationlib: Any = importlib.import_module("annotationlib")
        annotations = annotationlib.get_annotations(function, format=annotationlib.Format.FORWARDREF)
    if "return" not in annotations:
        return Any

    def probe() -> None: ...

    probe.__annotations__ = {"return": annotations["return"]}
    try:
        return typing.get_type_hints(probe, function.__globals__, _local_names(function), include_extras=True)["return"]
    except NameError:
        return UNRESOLVED
    except Exception as error:
        name = getattr(function, "__qualname__", "the function")
        raise ConfigurationError(f"the return annotation of {name} cannot be evaluated: {error}") from error


def _function(fn: Any) -> Any:
    for _ in range(100):  # __wrapped__ may lead in a circle
        if isinstance(fn, functools.partial):
            fn = fn.func
        elif isinstance(fn, types.MethodType):
            fn = fn.__func__
        elif hasattr(fn, "__wrapped__"):
            fn = fn.__wrapped__
        elif hasattr(fn, "__globals__"):
            return fn
        elif isinstance(fn, type) or not hasattr(type(fn).__call__, "__globals__"):
            return None
        else:
            fn = type(fn).__call__
    return None


def _local_names(function: Any) -> dict[str, Any]:
    names: dict[str, Any] = {parameter.__name__: parameter for parameter in getattr(function, "__type_params__", ())}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            names[name] = cell.cell_contents
        except ValueError:  # not assigned yet: the name is missing, as it would be among the globals
            continue
    return names


_OBJECTS = frozenset({dict, collections.abc.Mapping, collections.abc.MutableMapping})
_NOT_TEXT = frozenset({None, types.NoneType, bool, int, float, list, *_OBJECTS})
_JSON_TYPES = _NOT_TEXT | {
    str,
    object,
    collections.abc.Sequence,
    collections.abc.MutableSequence,
    collections.abc.Collection,
    collections.abc.Iterable,
}
_LITERALS = frozenset({types.NoneType, bool, int, str})
_OPEN = ("Any", "LiteralString", "Never", "NoReturn")
_QUALIFIERS = ("Annotated", "Final", "NotRequired", "ReadOnly", "Required")


def not_json(annotation: Any) -> Any:
    """Return the first part of ``annotation`` that promises what JSON cannot give back, or None."""
    return _not_json(annotation, frozenset())


def _not_json(annotation: Any, seen: frozenset[int]) -> Any:
    """Do the work of :func:`not_json`; ``seen`` holds the ids of the recursive types that lead here."""
    if annotation is UNRESOLVED or isinstance(annotation, (str, typing.ForwardRef)):
        return None
    form: Any = typing.get_origin(annotation) or annotation
    arguments = typing.get_args(annotation)
    # by name: typing_extensions has forms of its own where typing lacks them
    if getattr(form, "__module__", None) in ("typing", "typing_extensions"):
        name = getattr(form, "__name__", None) or getattr(form, "_name", None)
        if name in _OPEN:
            return None
        if name in _QUALIFIERS and arguments:
            return _not_json(arguments[0], seen)
        if name == "Literal":
            exact = all(type(argument) in _LITERALS for argument in arguments)
            return None if exact else annotation
    if form is typing.Union or form is types.UnionType:
        return _first_not_json(arguments, seen)
    if _is_one_of(form, _OBJECTS) and arguments and not _is_text(arguments[0]):
        return annotation
    if _is_one_of(form, _JSON_TYPES):
        return _first_not_json(arguments, seen)
    parts = () if id(form) in seen else _parts(form)
    return annotation if parts is None else _first_not_json((*parts, *arguments), seen | {id(form)})


def _parts(form: Any) -> tuple[Any, ...] | None:
    """Return what a TypedDict, a NewType, an alias or a type variable is made of; None for anything else."""
    if isinstance(form, typing.TypeVar):
        return form.__constraints__ if form.__bound__ is None else (form.__bound__,)
    if isinstance(form, type) and hasattr(form, "__total__"):  # a TypedDict, of typing or typing_extensions
        try:
            return tuple(typing.get_type_hints(form, include_extras=True).values())
        except NameError:
            return ()
    return _inner(form)


def _inner(annotation: Any) -> tuple[Any] | None:
    """Return what a NewType or an alias stands for, in a tuple; None for anything else."""
    if isinstance(annotation, typing.NewType):
        return (annotation.__supertype__,)
    if type(annotation).__name__ != "TypeAliasType":
        return None
    try:
        return (annotation.__value__,)
    except NameError:  # evaluated on access
        return (UNRESOLVED,)


def _is_text(annotation: Any) -> bool:
    """Tell whether an annotation that JSON can hold may stand for a dict's keys."""
    inner = _inner(annotation)
    if inner is not None:
        return _is_text(inner[0])
    if isinstance(annotation, typing.TypeVar):
        bound = () if annotation.__bound__ is None else (annotation.__bound__,)
        return all(_is_text(part) for part in (*bound, *annotation.__constraints__))
    arguments = typing.get_args(annotation)
    if not arguments:
        return not _is_one_of(annotation, _NOT_TEXT)
    if typing.get_origin(annotation) is typing.Literal:
        return all(type(argument) is str for argument in arguments)
    return all(_is_text(argument) for argument in (arguments[:1] if hasattr(annotation, "__metadata__") else arguments))


def _first_not_json(annotations: Iterable[Any], seen: frozenset[int]) -> Any:
    return next((found for part in annotations if (found := _not_json(part, seen)) is not None), None)


def _is_one_of(annotation: Any, kinds: frozenset[Any]) -> bool:
    try:
        return annotation in kinds
    except TypeError:  # unhashable
        return False


def label(annotation: Any) -> str:
    """Return what to call a type or an annotation in an error: ``tuple[int, str]``, ``decimal.Decimal``."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        name = annotation.__qualname__
        return name if annotation.__module__ == "builtins" else f"{annotation.__module__}.{name}"
    return str(annotation)
