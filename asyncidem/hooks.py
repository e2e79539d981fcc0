"""Events: what happened to an operation, told to hooks as it happens.

A hook is called synchronously, on the event loop, between the steps of an operation: it must be quick and must not
block. Whatever it raises is logged and goes no further: telemetry never breaks a payment.
"""

# Annotations are not postponed here: a NamedTuple would compile the text of each of its fields at import.

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol

from .keys import digest

__all__ = ["Event", "EventName", "Hook", "emit", "logger", "warn"]

logger = logging.getLogger("asyncidem")

EventName = Literal[
    "claimed",
    "replayed",
    "in_progress",
    "waited",
    "mismatch",
    "completed",
    "released",
    "taken_over",
    "renewed",
    "lease_lost",
    "ran_unprotected",
    "completion_failed",
    "release_failed",
    "result_unavailable",
    "store_error",
]


class Event(NamedTuple):
    """One thing that happened to one operation. Those with a star are warnings in the log too.

    ==================== ======================================================================================
    claimed, taken_over  the handler is about to run, for the first time or after somebody's unknown outcome
    completed            its result is stored
    released             it failed, and the key is free (unless another owner has it by now)
    release_failed *     it failed, and the store did not answer: the key stays taken until the lease is over
    completion_failed *  the effect ran, its result is not stored yet; that is repeated for at most a lease
    result_unavailable   its result cannot be encoded or is refused (*), or a duplicate found that there is none
    replayed             a duplicate got the stored result
    in_progress, waited  a duplicate found a running call: it was refused, or it waited
    mismatch             the key was used with another payload
    renewed              the lease began anew
    lease_lost *         another owner holds the key: this handler is cancelled, or its result is not stored
    store_error          the store refused, or did not answer, before the effect
    ran_unprotected *    the handler runs without a key, or without the store
    ==================== ======================================================================================

    Attributes:
        name: what happened.
        key: the idempotency key, as ``store.get`` accepts it. It may name a person: mind where you send it.
        operation: the label of the operation (the decorated function's name, or ``name=``); None if it has none.
        attempt: 1, or more after a takeover; None where no record was seen.
        elapsed: seconds since the operation began.
        error: the exception that goes with the event, if there is one.
        source: for ``replayed``, where the result came from: ``"store"`` or ``"local_cache"``.
    """

    name: EventName
    key: str
    operation: str | None = None
    attempt: int | None = None
    elapsed: float = 0.0
    error: BaseException | None = None
    source: Literal["store", "local_cache"] | None = None


class Hook(Protocol):
    """Anything that can be called with one :class:`Event`."""

    def __call__(self, event: Event, /) -> object:
        """Take note of ``event``."""
        ...


def emit(hooks: Iterable[Hook], event: Event) -> None:
    """Give ``event`` to each hook; one that raises is logged and does not keep it from the others."""
    for hook in hooks:
        try:
            hook(event)
        # A hook is the user's telemetry: its failure must not change what the operation does. Nothing is awaited here, so
        # a cancellation is no request to this task: the hook asked for the result of something that was cancelled.
        except (Exception, asyncio.CancelledError) as error:
            error.__context__ = None  # the operation's own error, whose text names the key
            with contextlib.suppress(Exception):
                logger.exception("hook_failed", extra={"event": event.name, "key_digest": digest(event.key)})


def warn(event: Event) -> None:
    """Log ``event`` as a warning: its name is the message, the key appears only as a digest, payloads never."""
    error, cause = event.error, event.error.__cause__ if event.error is not None else None
    extra = {
        "operation": event.operation,
        "key_digest": digest(event.key),
        "attempt": event.attempt,
        # Only the classes: messages name keys, and a traceback's may hold anything.
        "error": type(error).__name__ if error is not None else None,
        "cause": type(cause).__name__ if cause is not None else None,
    }
    with contextlib.suppress(Exception):  # a filter of the user's that raises is telemetry too
        logger.warning(event.name, extra=extra)
