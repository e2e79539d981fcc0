"""Every error that asyncidem raises on purpose.

::

    IdempotencyError
    ├── ConfigurationError (also ValueError)   an option, a signature or an annotation that cannot work
    ├── MissingKeyError                        the idempotency key is None or empty
    ├── InvalidKeyError                        the idempotency key cannot be turned into text
    ├── InProgressError                        another call with this key is running
    │   └── WaitTimeoutError (also TimeoutError)   ... and still was when ``wait`` ran out
    ├── FingerprintMismatchError               the key was used with another payload
    ├── LeaseLostError                         another owner holds the key now
    ├── ResultUnavailableError                 completed, but its result was not stored
    ├── CompletionError                        the effect ran, its completion was not acknowledged
    ├── CodecError                             a result cannot be encoded, or a stored one decoded
    ├── ReplayedError                          the stored exception of an earlier call
    └── StoreError                             the store refused, or holds something that is not ours to touch
        └── StoreUnavailableError              the store did not answer in time

A redis-py exception never leaves the library bare: it is the ``__cause__`` of a :class:`StoreError`.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CodecError",
    "CompletionError",
    "ConfigurationError",
    "FingerprintMismatchError",
    "IdempotencyError",
    "InProgressError",
    "InvalidKeyError",
    "LeaseLostError",
    "MissingKeyError",
    "ReplayedError",
    "ResultUnavailableError",
    "StoreError",
    "StoreUnavailableError",
    "WaitTimeoutError",
]


class IdempotencyError(Exception):
    """Base of every error of this library; raised itself when an operation object is misused."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by attributes: exceptions are otherwise rebuilt by calling the class with its message."""
        return _rebuild, (type(self), self.args), self.__dict__


class ConfigurationError(IdempotencyError, ValueError):
    """An option, a signature or an annotation cannot work. Raised before anything is written."""


class MissingKeyError(IdempotencyError):
    """The idempotency key is None, empty text or an empty container (``0`` and ``False`` are keys)."""


class InvalidKeyError(IdempotencyError):
    """The idempotency key, or a payload to fingerprint, has no canonical text."""


class InProgressError(IdempotencyError):
    """Another call with this key is running.

    Attributes:
        key: the idempotency key, as ``store.get`` accepts it.
        retry_after: seconds after which the running owner's lease is over if it is not renewed.
    """

    def __init__(self, key: str, retry_after: float, message: str | None = None) -> None:
        super().__init__(
            message
            or f"the operation {key!r} is in progress; its lease lasts {retry_after:.3f} s more, and may be renewed"
        )
        self.key = key
        self.retry_after = retry_after


class WaitTimeoutError(InProgressError, TimeoutError):
    """The running call had no result when ``wait`` ran out."""


class FingerprintMismatchError(IdempotencyError):
    """The key was used before with another payload, whether that call is running or completed."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} was used with another payload; use a new key for a new operation")
        self.key = key


class LeaseLostError(IdempotencyError):
    """Another owner holds the key, or the claim was settled before.

    Attributes:
        key: the idempotency key.
        result: what the handler returned, where its effect ran; else None.
    """

    def __init__(self, key: str, reason: str, result: object = None) -> None:
        super().__init__(f"the claim on {key!r} is lost: {reason}")
        self.key = key
        self.result = result


class ResultUnavailableError(IdempotencyError):
    """The operation completed and does not run again, but its result was not stored.

    Attributes:
        key: the idempotency key.
        outcome: ``"unavailable"`` (it could not be encoded) or ``"too_large"``.
    """

    def __init__(self, key: str, outcome: str) -> None:
        super().__init__(
            f"the operation {key!r} completed, but its result was not stored ({outcome}); it does not run again"
        )
        self.key = key
        self.outcome = outcome


class CompletionError(IdempotencyError):
    """The effect ran, but the store did not acknowledge its completion.

    Attributes:
        key: the idempotency key.
        result: what the handler returned (None where it raised one of ``replay_exceptions``).
    """

    def __init__(self, key: str, result: object = None) -> None:
        super().__init__(
            f"the operation {key!r} ran, but the store did not acknowledge its completion; .result holds its value"
        )
        self.key = key
        self.result = result


class CodecError(IdempotencyError):
    """A result cannot be encoded, or stored text cannot be decoded.

    Attributes:
        result: what the handler returned, where its effect ran; else None.
    """

    def __init__(self, message: str, result: object = None) -> None:
        super().__init__(message)
        self.result = result


class ReplayedError(IdempotencyError):
    """An earlier call with this key raised, and its exception is the stored result.

    It is the ``__cause__`` of the rebuilt exception, and is raised itself when the class cannot be rebuilt.

    Attributes:
        key: the idempotency key.
        type_name: module and qualified name of the exception's class.
    """

    def __init__(self, key: str, type_name: str, message: str) -> None:
        super().__init__(f"the operation {key!r} ended with {type_name}: {message}")
        self.key = key
        self.type_name = type_name


class StoreError(IdempotencyError):
    """The store refused a command, or holds a value that is neither a record nor free to be replaced."""

    outcome_unknown = False
    """Whether what was asked for may have happened, or may yet happen. A refusal is known: nothing was written."""


class StoreUnavailableError(StoreError):
    """The store did not answer in time, or cannot take writes now. Raised before an effect, nothing ran.

    Attributes:
        outcome_unknown: False if nothing was sent, or the server refused all that was.
    """

    def __init__(self, message: str, *, outcome_unknown: bool = True) -> None:
        super().__init__(message)
        self.outcome_unknown = outcome_unknown


def _rebuild(kind: type[IdempotencyError], args: tuple[Any, ...]) -> IdempotencyError:
    error = kind.__new__(kind)
    error.args = args
    return error
