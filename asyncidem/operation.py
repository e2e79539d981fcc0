"""One call of a protected operation, as its body and the code below it see it."""

from __future__ import annotations

import asyncio
import os
from contextvars import ContextVar
from enum import Enum
from typing import Any, Final, Protocol, Self

from .errors import IdempotencyError, LeaseLostError
from .hooks import EventName
from .keys import digest
from .model import Claimed, Record
from .options import Options
from .renewal import Renewer
from .stores.base import Store
from .waiting import Watches

__all__ = ["Operation", "Phase", "current", "current_operation"]


class Phase(Enum):
    """Where an operation stands."""

    NEW = "not begun"
    RUNNING = "running"
    REPLAYED = "replayed"
    UNPROTECTED = "unprotected"
    ENDED = "over"


class Shared(Protocol):
    """What the operations of a store on one event loop share."""

    @property
    def renewer(self) -> Renewer:
        """What keeps leases alive."""
        ...

    @property
    def watches(self) -> Watches:
        """Who waits."""
        ...


class Runner(Protocol):
    """What an operation needs of the engine that runs it."""

    @property
    def store(self) -> Store:
        """Where its record is."""
        ...

    async def begin(self, op: Operation) -> None:
        """Claim or replay."""
        ...

    async def finish(self, op: Operation, result: Any) -> None:
        """Complete."""
        ...

    async def fail(self, op: Operation, error: BaseException) -> None:
        """Settle a failure."""
        ...

    def tell(
        self, name: EventName, op: Operation, error: BaseException | None = None, *, warning: bool = False
    ) -> None:
        """Tell the hooks."""
        ...


current: ContextVar[Operation | None] = ContextVar("asyncidem_operation", default=None)
_UNSET: Final = object()


def current_operation() -> Operation | None:
    """Return the operation that the running code is part of; None outside of one."""
    return current.get()


class Operation:
    """One call of a protected operation.

    The block of ``async with`` is entered on a replay too: look at ``replayed`` first, and do nothing then.

    Attributes:
        key: the idempotency key with its namespace, as ``store.get`` accepts it. Empty if it runs without one.
        name: its label in events; no part of the key.
    """

    __slots__ = (
        "__weakref__",
        "_annotation",
        "_asked",
        "_cancelling",
        "_claim",
        "_downstream",
        "_engine",
        "_fingerprint",
        "_local",
        "_looked",
        "_lost",
        "_options",
        "_outer",
        "_phase",
        "_record",
        "_result",
        "_started",
        "_task",
        "key",
        "name",
    )

    def __init__(
        self, engine: Runner, key: str, name: str | None, fingerprint: str | None, annotation: Any, options: Options
    ) -> None:
        self.key = key
        self.name = name
        self._engine = engine
        self._fingerprint = fingerprint
        self._annotation = annotation
        self._options = options
        self._phase = Phase.NEW
        self._claim: Claimed | None = None
        self._local: Shared | None = None
        self._downstream: str | None = None
        self._record: Record | None = None
        self._result: Any = _UNSET
        self._looked = False
        self._lost: LeaseLostError | None = None
        self._outer: Operation | None = None
        self._task: asyncio.Task[Any] | None = None
        self._cancelling = 0
        self._started = 0.0
        self._asked = 0.0

    @property
    def downstream_key(self) -> str:
        """32 hex digits of the key, the same at every attempt: hand them on as a provider's idempotency key.

        An operation that runs without a key has some of its own: they must not merge it with others.
        """
        if self._downstream is None:
            self._downstream = digest(self.key) if self.key else os.urandom(16).hex()
        return self._downstream

    @property
    def attempt(self) -> int:
        """1, or more if an earlier attempt's outcome is unknown: look up what it did before you do it again."""
        if self._record is not None:
            return self._record.attempt
        return 1 if self._claim is None else self._claim.attempt

    @property
    def replayed(self) -> bool:
        """Whether the operation completed before; its stored result is in ``result``."""
        self._looked = True
        return self._record is not None and self._result is not _UNSET

    @property
    def result(self) -> Any:
        """The stored result of a replay, or what ``set_result`` was given.

        Raises:
            IdempotencyError: there is none yet.
        """
        self._looked = True
        if self._result is _UNSET:
            raise IdempotencyError(f"the operation {self.key!r} has no result yet; give it one with set_result(value)")
        return self._result

    def set_result(self, value: Any) -> Any:
        """Set the result that is stored when the block ends, and return it.

        Raises:
            IdempotencyError: the operation is a replay, or is not running.
        """
        if self._phase is Phase.REPLAYED:
            raise IdempotencyError(
                f"the operation {self.key!r} is a replay: its result stands; look at op.replayed first"
            )
        if self._phase not in (Phase.RUNNING, Phase.UNPROTECTED):
            raise IdempotencyError(
                f"the operation {self.key!r} is {self._phase.value}; set the result inside its block"
            )
        self._result = value
        return value

    async def __aenter__(self) -> Self:
        """Claim the key, or find the result of the call that had it.

        Raises:
            InProgressError: another call with this key is running.
            WaitTimeoutError: it still ran when ``wait`` ran out.
            FingerprintMismatchError: the key was used with another payload.
            ResultUnavailableError: completed, but the result was not stored.
            ReplayedError: completed with an exception whose class cannot be rebuilt; else that exception.
            StoreError: the store refused, or (``StoreUnavailableError``) did not answer; nothing ran.
        """
        await self._engine.begin(self)
        if self._phase is Phase.REPLAYED:
            current.set(self)  # a body that runs is entered where it begins, between the claim and the first hook
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Complete with the result that was set, or settle the failure as ``on_failure`` and ``on_cancel`` say.

        Raises:
            LeaseLostError: another owner holds the key; ``.result`` is what was set.
            CodecError: the result cannot be encoded; the operation is completed without one.
            CompletionError: not acknowledged, with ``on_completion_error="raise"``.
        """
        if error is not None:
            await self._engine.fail(self, error)
        else:
            await self._engine.finish(self, self._given)

    @property
    def _given(self) -> Any:
        return None if self._result is _UNSET else self._result

    # -- what the renewer tells ---------------------------------------------------------------------------------------

    def renewed(self) -> None:
        """The lease began anew."""
        self._engine.tell("renewed", self)

    def lost(self, error: LeaseLostError) -> None:
        """Another owner holds the key: the handler must not go on.

        It runs in the operation's own task, which is suspended in it while this runs: the cancellation arrives there.
        """
        self._lost = error
        self._engine.tell("lease_lost", self, error, warning=True)
        if self._task is not None:
            self._task.cancel()
