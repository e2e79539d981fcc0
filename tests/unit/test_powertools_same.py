"""Keys and hashes of payloads are those that Powertools itself makes, for every payload."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from asyncidem import InvalidKeyError, MissingKeyError
from asyncidem.integrations.powertools import powertools_fingerprint, powertools_key

pytest.importorskip("aws_lambda_powertools", reason="Powertools for AWS Lambda is not installed")

from aws_lambda_powertools.utilities.data_classes import APIGatewayProxyEvent
from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig
from aws_lambda_powertools.utilities.idempotency.base import _prepare_data
from aws_lambda_powertools.utilities.idempotency.exceptions import IdempotencyKeyError
from aws_lambda_powertools.utilities.idempotency.persistence.base import BasePersistenceLayer


@dataclass
class D:
    a: int
    b: Decimal


@dataclass
class Nested:
    lines: list[D]


class Model(BaseModel):
    at: datetime = datetime(2024, 1, 2, tzinfo=UTC)
    amount: Decimal = Field(default=Decimal("1.10"), alias="Amount")
    lines: list[D] = [D(1, Decimal(2))]


class Colour(Enum):
    RED = "red"
    DEEP = Decimal("1.5")


class Level(IntEnum):
    HIGH = 9


class Name(StrEnum):
    ANN = "ann"


class Price(Decimal, Enum):
    LOW = Decimal("1.5")


scalars: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.decimals()
    | st.dates()
    | st.datetimes(timezones=st.none() | st.just(UTC) | st.just(timezone(timedelta(hours=-3, minutes=-30))))
    | st.times()
    | st.uuids()
    | st.sampled_from(
        [
            Colour.RED,
            Colour.DEEP,
            Level.HIGH,
            Name.ANN,
            Price.LOW,
            PurePosixPath("/a"),
            Model(),
            Nested([D(1, Decimal(2))]),
        ]
    )
    | st.builds(D, st.integers(), st.decimals())
)
unknown: st.SearchStrategy[Any] = st.binary() | st.frozensets(st.integers()) | st.timedeltas() | st.just(D)


def values(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return payloads of these parts."""
    keys = st.text() | st.integers() | st.floats() | st.booleans() | st.none()
    return st.recursive(
        leaves,
        lambda parts: (
            st.lists(parts) | st.tuples(parts, parts) | st.dictionaries(st.text(), parts) | st.dictionaries(keys, parts)
        ),
        max_leaves=12,
    )


class Layer(BasePersistenceLayer):  # type: ignore[misc]
    """Stores nothing."""

    _get_record = _put_record = _update_record = _delete_record = None


@functools.cache
def their_layer(hash_function: str = "md5", **config: Any) -> Any:
    """Return a layer of Powertools that stores nothing."""
    layer = Layer()
    options = IdempotencyConfig(raise_on_no_idempotency_key=True, hash_function=hash_function, **config)
    layer.configure(options, key_prefix="p")
    return layer


def outcome(make: Callable[[], str]) -> str | None:
    """Return a key; None if there is none, whatever the error."""
    try:
        return make()
    except Exception:
        return None


def theirs(value: Any, method: str, **config: Any) -> Any:
    """Return what Powertools makes of a payload, prepared as it does."""
    return getattr(their_layer(**config), method)(_prepare_data(value))


@settings(deadline=None)  # the first payload of a kind imports what takes it apart
@given(value=values(scalars) | values(scalars | unknown), hash_function=st.sampled_from(["md5", "sha256", "blake2s"]))
def test_keys_are_theirs(value: Any, hash_function: str) -> None:
    """For every payload both make the same key, or neither makes one."""
    ours = outcome(lambda: powertools_key(value, key_prefix="p", hash_function=hash_function))
    assert ours == outcome(lambda: theirs(value, "_get_hashed_idempotency_key", hash_function=hash_function))


@settings(deadline=None)  # the first payload of a kind imports what takes it apart
@given(value=values(scalars))
def test_missing_keys_are_theirs(value: Any) -> None:
    """What is no key here is none there."""
    try:
        theirs(value, "_get_hashed_idempotency_key")
    except IdempotencyKeyError:
        with pytest.raises(MissingKeyError):
            powertools_key(value, key_prefix="p")
    except Exception:
        with pytest.raises(InvalidKeyError):
            powertools_key(value, key_prefix="p")
    else:
        assert powertools_key(value, key_prefix="p")


EXPRESSIONS = [
    "body",
    "[a, b]",
    "{a: a, b: b}",
    "powertools_json(body).id",
    "body || a",
    "keys(@)",
    "nosuch(@)",
    "a[0]",
]


@settings(deadline=None)  # the first payload of a kind imports what takes it apart
@given(
    value=st.dictionaries(st.sampled_from(["a", "b", "body"]), values(scalars) | st.just('{"id": [1, "é"]}')),
    expression=st.sampled_from(EXPRESSIONS),
)
def test_expressions_are_theirs(value: Any, expression: str) -> None:
    """An expression chooses the same part, of keys and of validated payloads."""
    ours = outcome(lambda: powertools_key(value, key_prefix="p", jmespath=expression))
    assert ours == outcome(lambda: theirs(value, "_get_hashed_idempotency_key", event_key_jmespath=expression))
    mark = outcome(lambda: powertools_fingerprint(value, jmespath=expression))
    assert mark == outcome(lambda: theirs(value, "_get_hashed_payload", payload_validation_jmespath=expression))


def test_events_of_data_classes() -> None:
    """An event source data class of Powertools is the event that it wraps."""
    raw = {"body": '{"order_id": "42"}', "headers": {"a": "b"}}
    event = APIGatewayProxyEvent(raw)
    key = powertools_key(event, key_prefix="p", jmespath="powertools_json(body).order_id")
    assert key == powertools_key("42", key_prefix="p")
    assert powertools_key(event, key_prefix="p") == powertools_key(raw, key_prefix="p")
    assert powertools_key(event, key_prefix="p") == theirs(event, "_get_hashed_idempotency_key")
