"""Codecs: a handler's result to text, and the text back to what the handler returned.

A duplicate must get what the first caller got. A codec therefore refuses what it could not give back, at decoration
where the annotation tells, else when it encodes; it never stores a look-alike. Errors name types and paths, never
values.
"""

from __future__ import annotations

import gc
import json
import math
import re
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any, cast

from .annotations import UNRESOLVED, label, not_json, return_annotation
from .errors import CodecError, ConfigurationError

__all__ = ["UNRESOLVED", "Codec", "JSONCodec", "MsgspecCodec", "PydanticCodec", "return_annotation"]


class Codec(ABC):
    """Turns results into text and back. Instances are shared by all operations: keep no state of one call.

    ``decode(encode(value), annotation)`` must be equal to ``value``, and of its type. Whatever a codec cannot give
    back like that, it refuses: a stored result cannot be corrected later.
    """

    needs_annotation = False
    """Whether a result cannot be rebuilt without the handler's return annotation."""

    @abstractmethod
    def encode(self, value: object) -> str:
        """Return ``value`` as text that UTF-8 can hold.

        Called on the event loop after the effect: it must be quick and must not block.

        Raises:
            CodecError: ``value`` would not come back as it is. The message must not contain it.
        """

    @abstractmethod
    def decode(self, text: str, annotation: Any) -> Any:
        """Return the value that ``text`` was encoded from.

        Args:
            text: what :meth:`encode` returned, perhaps in another process and an older version.
            annotation: the handler's return annotation, resolved; ``Any`` where nothing is known.

        Raises:
            CodecError: ``text`` cannot be decoded, or is no value of ``annotation``.
        """

    def check(self, annotation: Any) -> None:  # noqa: ARG002 (the contract's name)
        """Refuse a handler at decoration, before anything ran. Accepts every annotation unless overridden.

        Args:
            annotation: the handler's return annotation, resolved; ``Any`` if it has none, :data:`UNRESOLVED` if a
                name in it does not exist yet.

        Raises:
            ConfigurationError: no value of ``annotation`` could be stored and given back.
        """
        return


class JSONCodec(Codec):
    """Plain JSON, exactly: None, bool, int, finite float, text, lists, and dicts with text keys.

    Tuples, sets, bytes, models, Enum members and every subclass of those types are refused, because they would come
    back as something else. For them there is :class:`PydanticCodec`.
    """

    def encode(self, value: object) -> str:
        """Return ``value`` as JSON with ASCII escapes, so that any text survives, lone surrogates included.

        Raises:
            CodecError: something in ``value`` would not come back equal and of the same type, is an int over
                Python's digit limit, or is nested more than 200 levels deep.
        """
        try:
            text = "".join(_chunks(value, 0))
            if _is_exact(value) and _SURROGATE not in text:
                return text
        except Exception:  # noqa: BLE001, S110 - what it is about is said below
            pass
        return self._encode_carefully(value)

    @staticmethod
    def _encode_carefully(value: object) -> str:
        """Do what :meth:`encode` does, part by part, so that an error can say which part it is about."""
        try:
            _require_exact(value, 0)
            return _encode(value)
        except _InexactError as error:
            path = "$" + "".join(reversed(error.path))
            raise CodecError(
                f"{error.what} at {path} would not come back from JSON as it is; "
                "return plain JSON, or use codec=PydanticCodec()"
            ) from None
        except ValueError:  # sys.set_int_max_str_digits
            raise CodecError("an int over Python's digit limit cannot be JSON; return it as text") from None

    def decode(self, text: str, annotation: Any) -> Any:  # noqa: ARG002 (the contract's name)
        """Return the JSON value of ``text``; ``annotation`` was checked at decoration and is not looked at."""
        try:
            value, end = _scan(text, 0)
            return value if end == len(text) else json.loads(text)
        except (ValueError, RecursionError, StopIteration):
            return self._decode_carefully(text)

    @staticmethod
    def _decode_carefully(text: str) -> Any:
        """Do what :meth:`decode` does, whatever stands around the value."""
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            # "from None": the error that is cut off holds the whole text, which may be secret
            raise CodecError("the stored result is not JSON that can be read") from None

    def check(self, annotation: Any) -> None:
        """Refuse an annotation that promises what JSON cannot give back.

        Accepted: Any, object, None, bool, int, float, str, dict and Mapping with text keys, list and Sequence, unions
        and TypedDicts of these, Literal, NewType, Annotated, aliases, type variables, Never, and what is not resolved.

        Raises:
            ConfigurationError: anything else: tuple, set, datetime, Decimal, bytes, Enum, a dataclass, a model.
        """
        culprit = not_json(annotation)
        if culprit is not None:
            raise ConfigurationError(
                f"JSON cannot give back {label(culprit)} (in the return annotation {label(annotation)}); "
                "use codec=PydanticCodec(), or return plain JSON"
            )


class MsgspecCodec(JSONCodec):
    """What :class:`JSONCodec` does, by msgspec: several times faster for large results.

    It stores, gives back and refuses the same values. The two read what the other one stored: they may be exchanged,
    one worker after the other.

    Raises:
        ConfigurationError: msgspec is missing.
    """

    def __init__(self) -> None:
        try:
            import msgspec  # noqa: PLC0415 (an extra: whoever does not use it need not have it)
        except ImportError as error:
            raise ConfigurationError('MsgspecCodec needs msgspec: pip install "asyncidem[msgspec]"') from error
        self._write: Callable[[object], bytes] = msgspec.json.Encoder().encode
        self._read: Callable[[str], Any] = msgspec.json.Decoder().decode

    def encode(self, value: object) -> str:
        """Return ``value`` as JSON without spaces, in UTF-8 where :class:`JSONCodec` has ASCII escapes.

        Raises:
            CodecError: as in :class:`JSONCodec`.
        """
        try:
            text = self._write(value).decode()
            # it writes NaN and infinity as null
            if _is_exact(value, finite="null" in text):
                return text
        except Exception:  # noqa: BLE001, S110 - what it is about is said below
            pass
        return self._encode_carefully(value)

    def decode(self, text: str, annotation: Any) -> Any:
        """Return the JSON value of ``text``; ``annotation`` was checked at decoration and is not looked at."""
        try:
            return self._read(text)
        except Exception:  # noqa: BLE001 - a lone surrogate, or no JSON: the other one knows
            return super().decode(text, annotation)


class PydanticCodec(Codec):
    """Whatever pydantic can write as JSON and read back: models, dataclasses, TypedDicts, datetimes, Enums, unions.

    Fields are stored by their names: aliases may change without making stored results unreadable. Computed fields
    are not stored. What holds, and what does not:

    - A value comes back as the annotated class: of a subclass, only the fields of the annotated class return, and
      not even these if that class forbids extra fields.
    - Models and dataclasses, and every value of a named type, are read back once when they are encoded, and refused
      if they differ: ``SecretStr`` (stored as asterisks), a field with ``exclude=True`` that is not at its default, a
      datetime in a field that is ``Any``, NaN in a model that writes it as null, a validator that does not accept
      what it returned. Inside other containers that is found out at replay, if at all: name the type.
    - Private attributes are neither stored nor compared. Datetimes keep their offset from UTC, not their ``ZoneInfo``.
    - Bytes are UTF-8 text, unless the model sets ``ser_json_bytes`` and ``val_json_bytes`` to ``"base64"``.
    - In a union such as ``str | datetime`` pydantic decides by the text: a datetime comes back as ``str``, and in
      ``datetime | str`` text that is a date as datetime. Use a model that says which.
    - Without an annotation and without a named type, a value comes back as plain JSON: a model as a dict.

    Args:
        model: the type of the results, where the annotation does not tell it. Any type that pydantic takes.

    Raises:
        ConfigurationError: pydantic is missing or older than 2.11, or cannot handle ``model``.
    """

    def __init__(self, model: Any = Any) -> None:
        try:
            import pydantic  # noqa: PLC0415 (an extra: whoever does not use it need not have it)
            import pydantic_core  # noqa: PLC0415
        except ImportError as error:
            raise ConfigurationError('PydanticCodec needs pydantic: pip install "asyncidem[pydantic]"') from error
        version = pydantic.VERSION
        if tuple(int(part) for part in version.split(".")[:2]) < (2, 11):
            raise ConfigurationError(f"PydanticCodec needs pydantic 2.11, not {version}: pip install -U pydantic")
        self._pydantic = pydantic
        self._to_json = pydantic_core.to_json
        self._model = model
        self.needs_annotation = model is Any
        # by identity: int | str and str | int are equal, but pydantic tries them in their order
        self._adapters: dict[int, tuple[Any, Any]] = {}
        self.check(model)

    def encode(self, value: object) -> str:
        """Return ``value`` as JSON.

        Raises:
            CodecError: pydantic cannot write ``value``, or what it wrote would not come back the same.
        """
        kind: Any = type(value)
        known = self._model
        if known is Any and (is_dataclass(value) or isinstance(value, self._pydantic.BaseModel)):
            # a generic class without its arguments knows less about its fields than the annotation may
            open_generic = getattr(kind, "__pydantic_generic_metadata__", {}).get("parameters")
            known = Any if open_generic else kind
        try:
            if known is Any:
                return self._to_json(value, by_alias=False, round_trip=True).decode()
            adapter = self._adapter(known)
            text: bytes = adapter.dump_json(value, by_alias=False, round_trip=True, warnings="none")
            back = adapter.validate_json(text, by_alias=False, by_name=True)
            same = _alike(back, value)
        except Exception as error:  # serializers and validators are the user's code: they raise anything
            raise CodecError(f"a result of type {label(kind)} cannot be stored as JSON and read back") from error
        if not same:
            raise CodecError(
                f"a result of type {label(kind)} would come back from JSON as another value; "
                "replace what is written one way, such as SecretStr or a model in a field that is Any"
            )
        return text.decode()

    def decode(self, text: str, annotation: Any) -> Any:
        """Return the value of the named type, or else of ``annotation``, that ``text`` stands for.

        Raises:
            CodecError: the text does not validate (the pydantic error is the cause), or ``annotation`` is
                :data:`UNRESOLVED`: a dict in a model's place would go unnoticed.
        """
        known = annotation if self._model is Any else self._model
        if known is UNRESOLVED:
            raise CodecError("the return annotation cannot be resolved; name the type: PydanticCodec(Model)")
        try:
            return self._adapter(known).validate_json(text, by_alias=False, by_name=True)
        except Exception as error:  # validators are the user's code: they raise anything
            raise CodecError(f"the stored result is not a value of {label(known)}") from error

    def check(self, annotation: Any) -> None:
        """Refuse an annotation that pydantic cannot handle; one that names what does not exist yet is accepted.

        Raises:
            ConfigurationError: pydantic cannot build a ``TypeAdapter`` for the type.
        """
        known = annotation if self._model is Any else self._model
        if known is UNRESOLVED:
            return
        try:
            self._adapter(known)
        except Exception as error:  # __get_pydantic_core_schema__ is the user's code
            raise ConfigurationError(f"pydantic cannot handle the return type {label(known)}: {error}") from error

    def _adapter(self, annotation: Any) -> Any:
        entry = self._adapters.get(id(annotation))
        if entry is None:
            # the annotation is kept with its adapter: an id is unique only among what lives
            entry = (annotation, self._pydantic.TypeAdapter(annotation))
            if len(self._adapters) >= 256:
                self._adapters.clear()
            self._adapters[id(annotation)] = entry
        return entry[1]


def _alike(one: Any, other: Any) -> bool:
    """Compare a result with what came back, leniently where ``==`` is not: private attributes, repeated hours."""
    if isinstance(one, datetime) and isinstance(other, datetime):
        return one.isoformat() == other.isoformat()  # two of the hour that the clocks repeat are never equal
    if type(one) is not type(other):
        return bool(one == other)
    if isinstance(one, dict):
        left, right = cast("dict[str, Any]", one), cast("dict[str, Any]", other)
        return left.keys() == right.keys() and all(_alike(left[key], right[key]) for key in left)
    if isinstance(one, (list, tuple)):
        items = cast("list[Any]", one), cast("list[Any]", other)
        return len(items[0]) == len(items[1]) and all(map(_alike, *items))
    names = _field_names(one)
    if names:
        return all(_alike(getattr(one, name), getattr(other, name)) for name in names)
    return bool(one == other) or bool(one != one and other != other)  # noqa: PLR0124 (NaN came back as NaN)


def _field_names(value: Any) -> list[str]:
    if is_dataclass(value):
        return [field.name for field in fields(value)]
    model_fields: dict[str, Any] | None = getattr(value, "__pydantic_fields__", None)
    return [] if model_fields is None else [*model_fields, "model_extra"]


_encoder = json.JSONEncoder(check_circular=False, allow_nan=False)
_encode = _encoder.encode
# What `encode` wrote has no space around it.
_scan: Callable[[str, int], tuple[Any, int]] = cast("Any", json.JSONDecoder()).scan_once
_MAX_DEPTH = 200  # what could be encoded must be decodable from a deeper stack in another process
_SURROGATE_PAIR = "[\ud800-\udbff][\udc00-\udfff]"
_SURROGATE = "\\ud"  # how every surrogate begins in JSON with ASCII escapes
_PLAIN = frozenset({int, bool, types.NoneType})
_SCALARS = frozenset({*_PLAIN, float, str})
_CONTAINERS = frozenset({list, dict})


def _make_chunks() -> Callable[[object, int], Iterable[str]]:
    """Return what ``JSONEncoder.encode`` makes anew for each value."""
    make: Callable[..., Callable[[object, int], Iterable[str]]] | None = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # an interpreter without the accelerator
        return lambda value, _: (_encode(value),)
    key_separator, item_separator = _encoder.key_separator, _encoder.item_separator
    text = json.encoder.encode_basestring_ascii
    # no markers, no indentation; then whether to sort keys, to skip keys that are no scalars, to write NaN
    return make(None, _encoder.default, text, None, key_separator, item_separator, *3 * (False,))


_chunks = _make_chunks()


def _referents_tell() -> bool:
    """Say whether ``gc.get_referents`` gives the values of a dict, and with them all its keys if one is no ``str`` itself.

    So does CPython: where all keys are text a dict keeps them apart, and the collector need not see them.
    """
    referents: Callable[..., list[Any]] | None = getattr(gc, "get_referents", None)
    if referents is None:
        return False
    likewise = type("", (str,), {})("a")
    return (
        sorted(map(str, referents({"a": 1, "b": 2}, [3, 3]))) == ["1", "2", "3", "3"]
        and all(len(referents({key: 0})) == 2 for key in (1, likewise))
        and all(len(referents({"b": 0, key: 0})) == 4 for key in (1, likewise))
    )


def _some_hide() -> bool:
    """Say whether the ``__dict__`` of an object hides its values from the collector, as since Python 3.13."""
    instance: Any = type("", (), {})()
    instance.a = 1
    return not gc.get_referents(vars(instance))


_REFERENTS_TELL = _referents_tell()
_SOME_HIDE = _REFERENTS_TELL and _some_hide()


def _is_exact(value: object, *, finite: bool = False) -> bool:
    """Say whether ``value``, which could be encoded, is of JSON's own types throughout, by a look at each level of it.

    All that is in a level comes from one call of the collector's: as many as there are items, or a dict has a key that
    is no text, or hides its values. That it could be encoded bounds the levels: a value that contains itself never gets
    here. Surrogates are left to the encoder, and NaN and infinity without ``finite``. False is no answer:
    :func:`_require_exact` gives it.
    """
    kind = type(value)
    if kind in _SCALARS:
        return not finite or kind is not float or math.isfinite(cast("float", value))
    if not _REFERENTS_TELL or kind not in _CONTAINERS:
        return False
    inside = gc.get_referents(value)
    size = len(cast("dict[str, Any] | list[Any]", value))
    for _ in range(_MAX_DEPTH):
        if len(inside) != size or (finite and not all(math.isfinite(one) for one in inside if type(one) is float)):
            return False
        if _SCALARS.issuperset(map(type, inside)):
            return True
        level = [one for one in inside if type(one) not in _SCALARS]
        if not _CONTAINERS.issuperset(map(type, level)):
            return False
        size = sum(map(len, level))
        # What one dict hides another, with keys that are no text, could make up for: a copy hides nothing.
        inside = gc.get_referents(
            *([one.copy() if type(one) is dict else one for one in level] if _SOME_HIDE else level)
        )
    return False


class _InexactError(Exception):
    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what
        self.path: list[str] = []


def _require_exact(value: object, depth: int) -> None:
    kind = type(value)
    if kind in _PLAIN:
        return
    if kind is str:
        _require_text(cast("str", value))
    elif kind is float:
        if not math.isfinite(cast("float", value)):
            raise _InexactError("a float that is NaN or infinite")
    elif depth == _MAX_DEPTH:
        raise _InexactError(f"a value nested more than {_MAX_DEPTH} levels deep")
    elif kind is list:
        _require_exact_items(enumerate(cast("list[Any]", value)), depth)
    elif kind is dict:
        members = cast("dict[Any, Any]", value)
        for key in members:
            if type(key) is not str:
                raise _InexactError(f"a dict's key of type {label(cast('Any', type(key)))}")
            _require_text(key)
        _require_exact_items(members.items(), depth)
    else:
        raise _InexactError(f"a value of type {label(kind)}")


def _require_exact_items(items: Iterable[tuple[Any, Any]], depth: int) -> None:
    key: Any = None
    try:
        for key, item in items:  # noqa: B007 (the handler below needs it)
            if type(item) not in _PLAIN:
                _require_exact(item, depth + 1)
    except _InexactError as error:
        # beyond a few levels a path says nothing more, and a key may itself be a secret: a name of a field is not
        if len(error.path) < 20:
            name = isinstance(key, str) and key.isidentifier() and len(key) <= 40
            error.path.append(f".{key}" if name else "[*]" if isinstance(key, str) else f"[{key}]")
        raise


def _require_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            if re.search(_SURROGATE_PAIR, text):  # JSON has no way to tell it from the one character that it encodes
                raise _InexactError("text with a surrogate pair") from None
