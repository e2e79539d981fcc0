"""Idempotency for asyncio: one idempotency key, one effect, one stored result that every duplicate gets back.

::

    store = RedisStore.from_url("redis://localhost:6379")
    idem = Idempotency(store, namespace="payments", lease=30, ttl=86_400)

    @idem.idempotent(key="order_id", payload="amount")
    async def charge(order_id: str, amount: int) -> dict[str, str]: ...

Among asyncidem workers, on a Redis that keeps what it acknowledged:

1.  One owner at a time within its lease: of any number of concurrent callers with one key, exactly one runs.
2.  A crash never blocks a key for longer than its lease.
3.  An owner that was replaced can neither overwrite nor delete its successor's record, and is told so.
4.  A completed result is never replaced, and its operation not run again, before its ttl. The first one stands.
5.  No decision trusts a client's wall clock, except about records of Powertools, and with plain
    clients that have no ``pttl``.
6.  A lost reply or a repeated command changes nothing.
7.  A caller that is cancelled, at any await, leaves no key stuck while Redis answers. A handler that was already running
    has an unknown outcome: ``on_cancel`` decides. Once it has returned, nothing releases the key any more.
8.  Once the effect has run, its caller gets its value or an error that carries it; once the completion has reached the
    store, no duplicate runs within the ttl.
9.  A call that raised ``StoreUnavailableError`` before its effect ran nothing, and leaves nothing.
10. Whoever runs after an attempt whose outcome is unknown sees ``attempt > 1``.

What it cannot promise: exactly-once for effects outside of Redis (a crash between an effect and its completion makes
the next owner run again; it sees ``attempt > 1``, and ``downstream_key`` is the same), claims that Redis itself loses
(asynchronous replication at failover, eviction, flush), rows 1, 3, 4 and 8 against a Powertools peer once a lease has
run out (it writes blindly), and among plain clients while a write outlasts its lock or a connection breaks within one.

The record is described in :mod:`asyncidem.model`, the protocol in :mod:`asyncidem.stores.base`, the errors in
:mod:`asyncidem.errors`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from .codecs import Codec, JSONCodec, MsgspecCodec, PydanticCodec
from .errors import (
    CodecError,
    CompletionError,
    ConfigurationError,
    FingerprintMismatchError,
    IdempotencyError,
    InProgressError,
    InvalidKeyError,
    LeaseLostError,
    MissingKeyError,
    ReplayedError,
    ResultUnavailableError,
    StoreError,
    StoreUnavailableError,
    WaitTimeoutError,
)
from .hooks import Event, Hook
from .idempotency import Idempotency
from .model import Claimed, InProgress, Mismatch, Record, Replay, State
from .operation import Operation, current_operation
from .stores.base import Store

if TYPE_CHECKING:
    from .stores.guarded import RedisClientProtocol
    from .stores.memory import MemoryStore
    from .stores.redis import RedisStore

__all__ = [
    "Claimed",
    "Codec",
    "CodecError",
    "CompletionError",
    "ConfigurationError",
    "Event",
    "FingerprintMismatchError",
    "Hook",
    "Idempotency",
    "IdempotencyError",
    "InProgress",
    "InProgressError",
    "InvalidKeyError",
    "JSONCodec",
    "LeaseLostError",
    "MemoryStore",
    "Mismatch",
    "MissingKeyError",
    "MsgspecCodec",
    "Operation",
    "PydanticCodec",
    "Record",
    "RedisClientProtocol",
    "RedisStore",
    "Replay",
    "ReplayedError",
    "ResultUnavailableError",
    "State",
    "Store",
    "StoreError",
    "StoreUnavailableError",
    "WaitTimeoutError",
    "current_operation",
]


LATE: Final = {"MemoryStore": "memory", "RedisClientProtocol": "guarded", "RedisStore": "redis"}


def __getattr__(name: str) -> Any:
    """Import a store when it is first asked for: nobody waits for redis-py, or for a store, that is not used."""
    if name not in LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".stores.{LATE[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
