"""Keys and fingerprints: text that is the same in every process, and different for different values.

A key decides whether money moves twice. So nothing here falls back on ``repr`` or ``hash``, which change from one
process to the next: a value without a canonical text is refused. Errors name types and paths, never values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from enum import Enum
from json.encoder import encode_basestring
from pathlib import PurePath
from typing import Any, cast
from uuid import UUID

from .errors import InvalidKeyError, MissingKeyError

__all__ = [
    "Fingerprint",
    "canonical",
    "check_key",
    "digest",
    "fingerprint",
    "is_lock",
    "key_text",
    "lock_of",
    "qualify",
    "stored_form",
]

LOCK_SUFFIX = ":lock"

MAX_KEY_BYTES = 512
"""Longer keys are stored as their digest: Redis takes them, but pays for each byte in every command."""

MAX_SHORT = 1 << 64

_CONTAINERS = (list, tuple, set, frozenset, bytes, bytearray, memoryview, Mapping)
_TEXT_IS_IDENTITY = frozenset({"ipaddress", "pydantic.networks"})
_REMEDY = "use text, numbers, lists, dicts, dataclasses or models, or convert it to text yourself"


class Fingerprint(str):
    """A fingerprint that is one already, made elsewhere by other rules: as a payload it is taken as it is."""

    __slots__ = ()


class _UnsupportedError(Exception):
    """A value without canonical text; the containers around it add their part of the path as it passes."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what
        self.path: list[str] = []


def digest(text: str) -> str:
    """Return 32 lower-case hex digits: SHA-256 of ``text`` in UTF-8, cut to 128 bits. Any text has one."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def canonical(value: object) -> str:
    """Return the canonical JSON text of a key or payload: sorted keys, no spaces, no ASCII escapes.

    ========================================  =========================================================
    value                                     text
    ========================================  =========================================================
    None, bool, int, finite float, text       as in JSON (``1`` and ``1.0`` differ)
    list, tuple; mapping                      array; object
    set, frozenset                            array, in the order of its members' texts
    dataclass; object with ``model_dump()``   object of its fields; what ``model_dump()`` returns
    Enum                                      that of its value
    Decimal, UUID, path, IP address, URL      string: ``str(value)``
    datetime, date, time                      string: ``isoformat()``
    timedelta                                 number: total seconds
    bytes, bytearray, memoryview              string: ``hex:`` and lower-case hex digits
    ========================================  =========================================================

    Keys of mappings: text as it is, other scalars the text that they would have as a value. A model is dumped in
    Python mode and then follows this table: in JSON mode its sets would come out in an order that changes from
    process to process, and its secrets as asterisks, alike for all.

    Raises:
        InvalidKeyError: another type, NaN, infinity, an int over Python's digit limit, a lone surrogate, two keys
            of one mapping with the same text, nesting that is too deep or endless, or a ``model_dump`` that raised.
    """
    try:
        text = _text(value)
        if not text.isascii():
            text.encode()
    except _UnsupportedError as error:
        path = "$" + "".join(reversed(error.path))
        raise InvalidKeyError(f"{error.what} at {path} has no canonical text; {_REMEDY}") from error.__cause__
    except RecursionError:
        raise InvalidKeyError(
            f"a value of type {_name(value)} is nested too deeply or contains itself; choose the parts that matter"
        ) from None
    except UnicodeEncodeError:
        # "from None": the error that is cut off holds the whole text, which may be secret
        raise InvalidKeyError(
            f"a value of type {_name(value)} contains text with a lone surrogate, which is not UTF-8; repair the text"
        ) from None
    return text


def key_text(value: object) -> str | None:
    """Return the text of a key: text as it is, of other values the canonical JSON, None for a missing key.

    ``1`` and ``"1"`` are one key. An Enum member is the key that its value is. Values whose JSON is a string keep
    its quotes: a UUID and its ``str()`` are two keys.

    Returns:
        None for None, ``""`` and empty containers, bytes included. 0, 0.0 and False are keys.

    Raises:
        InvalidKeyError: ``value`` has no canonical text (see :func:`canonical`).
    """
    if type(value) is str:
        return value or None
    if type(value) is int and -MAX_SHORT < value < MAX_SHORT:
        return int.__repr__(value)
    while isinstance(value, Enum):
        value = value.value
    if isinstance(value, str):
        return str.__str__(value) or None
    if value is None or _is_empty(value):
        return None
    return canonical(value)


def qualify(scope: str, key: str) -> str:
    """Join a scope (a namespace, a function's name) and a key to ``scope:key``, without ambiguity.

    ``%`` and ``:`` in the scope become ``%25`` and ``%3A``, so its end is always the first colon and two different
    pairs never give the same text. An empty scope returns ``key`` unchanged, so that records can be shared.
    """
    return f"{scope.replace('%', '%25').replace(':', '%3A')}:{key}" if scope else key


def check_key(key: object) -> str:
    """Return ``key`` if it is text that a store can use.

    Raises:
        MissingKeyError: None or ``""``.
        InvalidKeyError: not text, or text with a lone surrogate, which is not UTF-8.
    """
    if type(key) is str and key and key.isascii():
        return key
    if key is None or key == "":
        raise MissingKeyError("the idempotency key is None or empty; give every operation its own key")
    if not isinstance(key, str):
        raise InvalidKeyError(f"an idempotency key must be text, not {_name(key)}; convert it with str()")
    key = str.__str__(key)
    if not key.isascii():
        try:
            key.encode()
        except UnicodeEncodeError:
            raise InvalidKeyError("the idempotency key has a lone surrogate, which is not UTF-8; repair it") from None
    return key


def stored_form(key: str) -> str:
    """Return the text under which a store keeps ``key``, before its prefix.

    That is the key itself, or ``sha256:`` and 64 hex digits if it is longer than 512 bytes in UTF-8 or ends in
    ``:lock``: it would be taken for the lock of the key before that.
    """
    # no character takes more than four bytes: short keys need not be encoded to be measured
    short = len(key) <= MAX_KEY_BYTES // 4 or len(key.encode("utf-8", "surrogatepass")) <= MAX_KEY_BYTES
    if short and not is_lock(key):
        return key
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def lock_of(stored_key: str) -> str:
    """Return the key of the lock that guards a stored key."""
    return stored_key + LOCK_SUFFIX


def is_lock(stored_key: str) -> bool:
    """Say whether a stored key is that of a lock."""
    return stored_key.endswith(LOCK_SUFFIX)


def fingerprint(payload: object, secret: bytes | None = None) -> str:
    """Return 32 hex digits that stand for ``payload``: SHA-256 of its canonical JSON, cut to 128 bits.

    Text is hashed with its quotes, so ``"1"`` and ``1`` differ. A :class:`Fingerprint` is returned as it is.

    Args:
        payload: what must be the same when a key is used again.
        secret: makes it an HMAC. Without one, a payload of few possible values, such as a card number, can be
            guessed from its fingerprint.

    Raises:
        InvalidKeyError: ``payload`` has no canonical text (see :func:`canonical`).
    """
    if isinstance(payload, Fingerprint):
        return str.__str__(payload)
    text = canonical(payload).encode()
    if secret is None:
        return hashlib.sha256(text).hexdigest()[:32]
    import hmac  # noqa: PLC0415 - few need it, and all would pay

    return hmac.digest(secret, text, "sha256").hex()[:32]


def _is_empty(value: object) -> bool:
    return isinstance(value, _CONTAINERS) and len(cast("list[Any]", value)) == 0


def _name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _text(value: object) -> str:
    kind = type(value)
    if kind is str:
        return encode_basestring(cast("str", value))
    if value is None:
        return "null"
    if kind is bool:
        return "true" if value else "false"
    if kind is int:
        return _int(cast("int", value))
    if kind is dict:
        return _object(cast("dict[Any, Any]", value))
    if kind is list or kind is tuple:
        return _array(cast("list[Any]", value))
    if isinstance(value, Enum):
        return _text(value.value)
    if isinstance(value, (str, int, float)):
        return _scalar(value)
    if isinstance(value, (list, tuple)):
        return _array(cast("list[Any]", value))
    if isinstance(value, Mapping):
        return _object(cast("dict[Any, Any]", value))
    if isinstance(value, (set, frozenset)):
        return f"[{','.join(sorted(_texts(cast('set[Any]', value), '{*}')))}]"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f'"hex:{value.hex()}"'
    if isinstance(value, (datetime, date, time)):
        return f'"{value.isoformat()}"'
    if isinstance(value, timedelta):
        return float.__repr__(value.total_seconds())
    if isinstance(value, (UUID, PurePath)):
        return encode_basestring(str(value))
    return _other(value)


def _int(value: int) -> str:
    try:
        return int.__repr__(value)
    except ValueError:  # sys.set_int_max_str_digits
        raise _UnsupportedError("an int over Python's digit limit") from None


def _scalar(value: str | float) -> str:
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, int):
        return _int(value)
    if not math.isfinite(value):
        raise _UnsupportedError(f"a {_name(value)} that is NaN or infinite")
    return float.__repr__(value)


def _array(values: list[Any]) -> str:
    return f"[{','.join(_texts(values))}]"


def _texts(values: Iterable[Any], part: str | None = None) -> list[str]:
    texts: list[str] = []
    try:
        for value in values:
            texts.append(_text(value))  # noqa: PERF401 (how many there are says which one failed)
    except _UnsupportedError as error:
        error.path.append(part or f"[{len(texts)}]")
        raise
    return texts


def _object(mapping: Mapping[Any, Any]) -> str:
    members: dict[str, Any] = {}
    for key, value in mapping.items():
        text = key if type(key) is str else _key(key)
        if text in members:
            raise _UnsupportedError("a mapping with two keys of the same text")
        members[text] = value
    parts: list[str] = []
    text = ""
    try:
        for text in sorted(members):
            parts.append(f"{encode_basestring(text)}:{_text(members[text])}")
    except _UnsupportedError as error:
        # a key may itself be a secret, a name of a field is not
        error.path.append(f".{text}" if text.isidentifier() and len(text) <= 40 else "[*]")
        raise
    return f"{{{','.join(parts)}}}"


def _key(key: object) -> str:
    while isinstance(key, Enum):
        key = key.value
    if isinstance(key, str):
        return str.__str__(key)
    text = _text(key)
    if text[0] in "[{":
        raise _UnsupportedError(f"a mapping's key of type {_name(key)}")
    return cast("str", json.loads(text)) if text[0] == '"' else text


def _other(value: object) -> str:
    if isinstance(value, type):
        raise _UnsupportedError(f"a class ({value.__qualname__})")
    decimal: Any = sys.modules.get("decimal")  # whoever has one has imported it
    if decimal is not None and isinstance(value, decimal.Decimal):
        if not decimal.Decimal.is_finite(value):
            raise _UnsupportedError(f"a {_name(value)} that is NaN or infinite")
        return encode_basestring(str(value))
    dump = getattr(value, "model_dump", None)
    if dataclasses.is_dataclass(value) or callable(dump):
        try:
            if dataclasses.is_dataclass(value):
                fields: object = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            else:
                fields = cast("Callable[[], object]", dump)()
        except RecursionError:
            raise
        except Exception as error:
            raise _UnsupportedError(f"a value of type {_name(value)} that cannot be taken apart") from error
        return _text(fields)
    # by the name of the module: importing either for an isinstance would cost everybody for the sake of few
    if any(base.__module__ in _TEXT_IS_IDENTITY for base in type(value).__mro__):
        return encode_basestring(str(value))
    raise _UnsupportedError(f"a value of type {_name(value)}")
