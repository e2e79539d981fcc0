"""Functions under Powertools for AWS Lambda, as a peer of asyncidem on one server: the real thing, from PyPI."""

import datetime as dt
import json
import time
import warnings
from collections.abc import Callable
from typing import Any, Final

import pytest

# Whoever imports this module is skipped where it is missing: its names are imported from here.
pytest.importorskip("aws_lambda_powertools", reason="Powertools for AWS Lambda is not installed")

import aws_lambda_powertools.utilities.idempotency as utility
import redis
from aws_lambda_powertools.utilities.idempotency import base, exceptions
from aws_lambda_powertools.utilities.idempotency.persistence import base as base_layer
from aws_lambda_powertools.utilities.idempotency.persistence import cache, datarecord
from aws_lambda_powertools.utilities.idempotency.persistence import redis as redis_layer
from aws_lambda_powertools.utilities.idempotency.serialization.dataclass import DataclassSerializer
from aws_lambda_powertools.utilities.idempotency.serialization.pydantic import PydanticSerializer

from asyncidem.integrations.powertools import powertools_fingerprint, powertools_key

__all__ = [
    "ATTRIBUTES",
    "KEY",
    "ORDER",
    "PREFIX",
    "TAMPERED",
    "DataclassSerializer",
    "Died",
    "Peer",
    "PydanticSerializer",
    "async_handler_of",
    "before",
    "cache",
    "connect",
    "exceptions",
    "handler_of",
    "key_of",
    "mark_of",
    "set_clock",
    "utility",
]

PREFIX: Final = "charge"

ORDER: Final = {"order_id": "42", "amount": 1_999}
TAMPERED: Final = {"order_id": "42", "amount": 1}

ATTRIBUTES: Final = {
    "status_attr": "s",
    "expiry_attr": "e",
    "in_progress_expiry_attr": "i",
    "data_attr": "d",
    "validation_key_attr": "v",
}
"""Other names of a record's attributes, as both sides take them."""

Handler = Callable[[Any], Any]


def key_of(order: Any, **options: Any) -> str:
    """Return the key of an order, as both sides have it."""
    return powertools_key(order, key_prefix=PREFIX, jmespath="order_id", **options)


def mark_of(order: Any, **options: Any) -> str:
    """Return the hash of what both sides validate."""
    return powertools_fingerprint(order, jmespath="amount", **options)


KEY: Final = key_of(ORDER)


def handler_of(result: Any) -> tuple[list[Any], Handler]:
    """Return a handler for Powertools, and the list of the orders that it ran for."""
    ran: list[Any] = []

    def handler(order: Any) -> Any:
        ran.append(order)
        return result

    return ran, handler


def async_handler_of(result: Any) -> tuple[list[Any], Handler]:
    """Return a handler for asyncidem, and the list of the orders that it ran for."""
    ran: list[Any] = []

    async def handler(order: Any) -> Any:
        ran.append(order)
        return result

    return ran, handler


class Died(BaseException):
    """The end of a Lambda at its time-out, as far as Powertools can see it: nothing of its own runs any more."""


class Context:
    """As much of a Lambda context as Powertools asks for."""

    def __init__(self, remaining_ms: int) -> None:
        self.remaining_ms = remaining_ms

    def get_remaining_time_in_millis(self) -> int:
        return self.remaining_ms


class Peer:
    """Functions under Powertools on one server; `client` is the synchronous one that all of them use."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def layer(self, **attributes: str) -> Any:
        """Return a persistence layer; one that two functions share writes the records of one under the other's key."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its own, of its old name
            return cache.CachePersistenceLayer(client=self.client, **attributes)

    def function(
        self,
        handler: Handler,
        *,
        prefix: str | None = PREFIX,
        remaining_ms: int | None = 30_000,
        layer: Any = None,
        serializer: Any = None,
        **config: Any,
    ) -> Handler:
        """Return `handler` under `idempotent_function`; a negative `remaining_ms` is a lease that is over at once."""
        options = utility.IdempotencyConfig(event_key_jmespath="order_id", **config)
        if remaining_ms is not None:
            options.register_lambda_context(Context(remaining_ms))  # type: ignore[arg-type]

        def order(*, order: Any) -> Any:
            return handler(order)

        order.__annotations__["return"] = getattr(handler, "__annotations__", {}).get("return")
        protected = utility.idempotent_function(
            order,
            data_keyword_argument="order",
            persistence_store=self.layer() if layer is None else layer,
            config=options,
            key_prefix=prefix,
            output_serializer=serializer,
        )

        def call(order: Any) -> Any:
            with warnings.catch_warnings():
                if remaining_ms is None:
                    warnings.simplefilter("ignore", UserWarning)  # that it cannot know the remaining time
                return protected(order=order)

        return call

    def die(self, order: Any, **options: Any) -> None:
        """Leave an orphan of this order behind."""

        def handler(order: Any) -> None:
            raise Died

        with pytest.raises(Died):
            self.function(handler, **{"remaining_ms": -2_000} | options)(order)

    def record(self, key: str) -> dict[str, Any]:
        """Return what is stored."""
        record: dict[str, Any] = json.loads(self.client.get(key))
        return record


def set_clock(monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    """Put the wall clock of every peer `ahead` seconds ahead of the server's."""

    class Ahead(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Any:
            return dt.datetime.fromtimestamp(time.time() + ahead, tz)

    class Module:
        datetime = Ahead
        timedelta, date, time = dt.timedelta, dt.date, dt.time

    for module in (base, base_layer, redis_layer, datarecord):
        monkeypatch.setattr(module, "dt", Module)


def connect(url: str, *, cluster: bool = False) -> Any:
    """Return a synchronous client, decoding as Powertools makes its own."""
    return (redis.RedisCluster if cluster else redis.Redis).from_url(url, decode_responses=True)


def before(client: Any, method: str, act: Callable[[], object], *, lock: bool = False) -> None:
    """Let `act` happen before the client's next call of a method, or (`lock`) before its next SET of a lock."""
    real = getattr(client, method)

    def wrapped(*args: Any, **options: Any) -> Any:
        if lock and not str(options.get("name", "")).endswith(":lock"):
            return real(*args, **options)
        setattr(client, method, real)
        act()
        return real(*args, **options)

    setattr(client, method, wrapped)
