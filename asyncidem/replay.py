"""Exceptions as results: described as JSON, rebuilt without running what the store says.

No class is looked up by a stored name: the name only chooses among the classes that the caller's ``replay_exceptions``
and their subclasses are. Nothing of the user's runs on the way back either, ``__init__`` included.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from typing import Any

from .codecs import JSONCodec
from .errors import ReplayedError

__all__ = ["describe", "rebuild"]

_codec = JSONCodec()
HEAP_TYPE = 1 << 9


def describe(error: Exception) -> str:
    """Return JSON text of an exception's class, message and, if JSON can hold them exactly, arguments and attributes."""
    described: dict[str, Any] = {"type": _name(type(error)), "message": _message(error)}
    # A class with state outside of its arguments and __dict__ (slots) would come back without it.
    if not any("__slots__" in vars(kind) and vars(kind)["__slots__"] for kind in type(error).__mro__):
        # Where the user's class, or JSON, does not give them, it is replayed as a ReplayedError with its message.
        with contextlib.suppress(Exception):
            contents = {
                "args": list(error.args),
                "make": _arguments(error),
                "state": {k: v for k, v in vars(error).items() if k != "__notes__"},
            }
            described |= json.loads(_codec.encode(contents))
    return json.dumps(described)


def rebuild(text: str | None, classes: Iterable[type[Exception]], key: str) -> Exception:
    """Return the exception that ``describe`` described, its cause a ``ReplayedError``; that error if it cannot be.

    Args:
        text: what ``describe`` returned, as it was stored.
        classes: the caller's ``replay_exceptions``.
        key: the idempotency key.
    """
    try:
        described: Any = json.loads(text or "")
        name, message = str(described["type"]), str(described["message"])
        arguments: Any = described.get("args")
        making: Any = described.get("make", arguments)
        attributes: Any = described.get("state")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ReplayedError(key, "an exception", "its description cannot be read")
    replayed = ReplayedError(key, name, message)
    kind = _find(name, classes)
    if kind is None or not _is(arguments, list) or not _is(making, list) or not _is(attributes, dict):
        return replayed
    try:
        # The interpreter's own, which fill errno, filename and the like.
        error: Exception = _native(kind, "__new__")(kind, *making)
        _native(kind, "__init__")(error, *making)
        error.args = tuple(arguments)
        error.__dict__.update(attributes)
    except Exception:  # noqa: BLE001 - a class that changed since must not hide that the operation has failed before
        return replayed
    error.__cause__ = replayed
    return error


def _native(kind: type[Exception], name: str) -> Any:
    """Return a method of the nearest class of the interpreter's own, past whatever the user's classes define."""
    base = next(base for base in kind.__mro__ if not base.__flags__ & HEAP_TYPE)
    return getattr(base, name)


def _arguments(error: Exception) -> list[Any]:
    """Return the arguments that make it: an ``OSError`` with a file name has more than its ``args``."""
    return list(_native(type(error), "__reduce__")(error)[1])


def _find(name: str, classes: Iterable[type[Exception]]) -> type[Exception] | None:
    pending, seen = list(classes), set[type[Exception]]()
    while pending:
        kind = pending.pop()
        if _name(kind) == name:
            return kind
        if kind not in seen:
            seen.add(kind)
            pending.extend(type.__subclasses__(kind))
    return None


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _message(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a __str__ of the user's that fails must not cost the record of the failure
        return "(its message cannot be read)"


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind)
