"""Records shared with Powertools for AWS Lambda (Python): its keys, and its hashes of payloads.

A service with asyncidem and functions under Powertools' idempotency utility (``CachePersistenceLayer``) can share
their records in one Redis. Each replays what the other completed, refuses what the other runs, refuses another
payload, and takes over what the other left behind::

    store = RedisStore.from_url("redis://localhost:6379", prefix="")
    idem = Idempotency(store, ttl=3_600)

    key = powertools_key(order, key_prefix="charge", jmespath="order_id")
    mark = powertools_fingerprint(order, jmespath="amount")
    await idem.run(key, charge, order, payload=mark)

Neither prefix nor namespace stands before the key, and ``run`` or ``operation`` uses it as it is (the key of a
decorated function holds its name). Attributes that have other names there have them in ``RedisStore`` too.

The record is a superset of theirs (:mod:`asyncidem.model`), the lock of a takeover is the same
(:mod:`asyncidem.stores.base`). Once a lease has run out, a Powertools peer writes blindly: its late owner may overwrite
or delete a successor's record, a completed one too. An owner of ours whose record that was gets ``LeaseLostError``;
nobody can prevent it.

The rules here are those of Powertools 3.37.0, and the tests compare them with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from datetime import date, time
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any, Final, cast
from uuid import UUID

from ..errors import ConfigurationError, InvalidKeyError, MissingKeyError
from ..keys import MAX_KEY_BYTES, Fingerprint, _name, check_key, stored_form
from .expressions import evaluator

__all__ = ["powertools_fingerprint", "powertools_key"]

HASHES: Final = frozenset(name for name in hashlib.algorithms_guaranteed if not name.startswith("shake_"))
"""Those of SHAKE have no length of their own."""


def powertools_key(value: object, *, key_prefix: str, hash_function: str = "md5", jmespath: str | None = None) -> str:
    """Return the key that Powertools gives a call with this payload: ``<key_prefix>#<hex digest>``.

    The digest is that of the JSON text with sorted keys, default separators and ASCII escapes. What is not JSON:

    ==============================================  ===================================================
    value                                           stands for
    ==============================================  ===================================================
    dataclass; object with ``model_dump()``         ``asdict()``; ``model_dump(mode="json")``
    Decimal                                         its text (NaN: the number)
    Enum                                            its value
    date, datetime, time                            ``isoformat()``
    UUID, path                                      its text
    the payload itself, if it has one of these      what ``dict()`` returns, or else ``raw_event``
    ==============================================  ===================================================

    Args:
        value: the payload: the event, or the argument that ``data_keyword_argument`` names.
        key_prefix: that of the Powertools decorator. Without one it is
            ``<AWS_LAMBDA_FUNCTION_NAME>.<module>.<qualified name>`` of the function there (``test-func`` outside of
            Lambda), and must be written out here.
        hash_function: name of a hash in :mod:`hashlib`, as in ``IdempotencyConfig``.
        jmespath: ``event_key_jmespath``: chooses the part of the payload that is the key.

    Raises:
        MissingKeyError: the payload, or what the expression chooses, is None, empty, or a list or object of nothing but
            None; 0 and False are keys. Powertools then runs unprotected, unless ``raise_on_no_idempotency_key``; so
            does ``missing_key="run"`` with the key None.
        InvalidKeyError: no JSON (a set, bytes, a timedelta), or an expression that cannot be evaluated; or a key of
            more than 512 bytes, which stores keep as its digest, and Powertools does not.
        ConfigurationError: the prefix is empty, no such hash, no expression, or jmespath is missing.
    """
    if not isinstance(key_prefix, str) or not key_prefix:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(
            f"key_prefix must be that of the Powertools function, not {key_prefix!r}; by default it is "
            f"'<AWS_LAMBDA_FUNCTION_NAME>.<module>.<qualified name>' of the function"
        )
    part = _part(value, jmespath)
    if _is_missing(part):
        of = "the payload" if jmespath is None else f"what {jmespath!r} chooses"
        raise MissingKeyError(f"there is no idempotency key: {of} is None or empty")
    key = check_key(f"{key_prefix}#{_digest(part, hash_function)}")
    if stored_form(key) != key:
        raise InvalidKeyError(
            f"the key has more than {MAX_KEY_BYTES} bytes: stores keep its digest, and Powertools does not; "
            f"give both sides a shorter key_prefix"
        )
    return key


def powertools_fingerprint(value: object, *, hash_function: str = "md5", jmespath: str | None = None) -> Fingerprint:
    """Return the hash by which Powertools validates a payload, to be given as ``payload=`` or to ``store.claim``.

    It is taken as it is: ``fingerprint_secret`` has no part in it. Where one side validates, let the other do so too:
    Powertools refuses a record without a hash, and the results that it stores itself have none, so that nobody can
    compare them.

    Args:
        value: the payload.
        hash_function: name of a hash in :mod:`hashlib`, as in ``IdempotencyConfig``.
        jmespath: ``payload_validation_jmespath``: chooses the part that must be the same. None is a part as any other.

    Raises:
        InvalidKeyError: as in :func:`powertools_key`.
        ConfigurationError: no such hash, no expression, or jmespath is missing.
    """
    return Fingerprint(_digest(_part(value, jmespath), hash_function))


class _NotJSONError(Exception):
    """A value that Powertools has no JSON for; its message is the name of the type."""


def _part(value: Any, jmespath: str | None) -> Any:
    """Return the payload as Powertools prepares it, or the part of it that ``jmespath`` chooses."""
    evaluate = None if jmespath is None else evaluator(jmespath)
    try:
        if dataclasses.is_dataclass(value):
            value = dataclasses.asdict(cast("Any", value))
        elif (dump := _method(value, "model_dump")) is not None:
            value = dump(mode="json")
        elif (dump := _method(value, "dict")) is not None:
            value = dump()
        else:
            value = getattr(value, "raw_event", value)
    except Exception as error:  # what takes a payload apart is the user's code: it raises anything
        raise InvalidKeyError(f"a payload of type {_name(value)} cannot be taken apart; give its parts") from error
    return value if evaluate is None else evaluate(value)


def _method(value: object, name: str) -> Callable[..., Any] | None:
    method = getattr(value, name, None)
    return method if callable(method) else None


def _is_missing(part: Any) -> bool:
    if isinstance(part, dict):
        return all(value is None for value in cast("Any", part).values())
    if isinstance(part, (list, tuple)):
        return all(value is None for value in cast("Any", part))
    return not isinstance(part, (int, float)) and not part


def _digest(part: object, hash_function: str) -> str:
    if not isinstance(hash_function, str) or hash_function not in HASHES:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(f"hash_function must be one of {', '.join(sorted(HASHES))}, not {hash_function!r}")
    try:
        text = json.dumps(part, default=_json, sort_keys=True)
    except _NotJSONError as error:
        raise InvalidKeyError(
            f"a value of type {error} has no JSON in Powertools; convert it on both sides"
        ) from error.__cause__
    except (TypeError, ValueError, RecursionError):
        # "from None": the error that is cut off may hold keys of the payload
        raise InvalidKeyError(
            f"a value of type {_name(part)} has no JSON: keys that are no text or cannot be sorted, an int over Python's "
            f"digit limit, or nesting that is too deep or endless; convert it on both sides"
        ) from None
    return hashlib.new(hash_function, text.encode(), usedforsecurity=False).hexdigest()


def _json(value: Any) -> Any:
    """Return what stands for a value that JSON does not know, asking in Powertools' order."""
    if isinstance(value, Decimal):
        return math.nan if value.is_nan() else str(value)
    try:
        if (dump := _method(value, "model_dump")) is not None:
            return dump(mode="json")
        if dataclasses.is_dataclass(value):
            return dataclasses.asdict(cast("Any", value))
    except RecursionError:
        raise
    except Exception as error:  # as in _part
        raise _NotJSONError(_name(value)) from error
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, (UUID, PurePath)):
        return str(value)
    raise _NotJSONError(_name(value))
