"""Errors: the tree in their module's docstring, and what each of them carries."""

import copy
import pickle

import pytest

from asyncidem import errors
from asyncidem.errors import (
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

EXAMPLES: list[tuple[IdempotencyError, dict[str, object]]] = [
    (IdempotencyError("misused"), {}),
    (ConfigurationError("no"), {}),
    (MissingKeyError("no key"), {}),
    (InvalidKeyError("no text"), {}),
    (InProgressError("k", 1.5), {"key": "k", "retry_after": 1.5}),
    (WaitTimeoutError("k", 0.25), {"key": "k", "retry_after": 0.25}),
    (FingerprintMismatchError("k"), {"key": "k"}),
    (LeaseLostError("k", "taken over", 7), {"key": "k", "result": 7}),
    (ResultUnavailableError("k", "too_large"), {"key": "k", "outcome": "too_large"}),
    (CompletionError("k", 7), {"key": "k", "result": 7}),
    (CodecError("no", 7), {"result": 7}),
    (ReplayedError("k", "m.Declined", "no funds"), {"key": "k", "type_name": "m.Declined"}),
    (StoreError("refused"), {"outcome_unknown": False}),
    (StoreUnavailableError("silent"), {"outcome_unknown": True}),
    (StoreUnavailableError("read only", outcome_unknown=False), {"outcome_unknown": False}),
]


@pytest.mark.parametrize(("error", "attributes"), EXAMPLES)
def test_errors_carry_what_a_caller_needs(error: IdempotencyError, attributes: dict[str, object]) -> None:
    """Each error has its attributes and a message."""
    assert {name: getattr(error, name) for name in attributes} == attributes
    assert str(error)


def test_the_examples_are_all_errors_there_are() -> None:
    """Every name that the module exports is among the examples, so no error goes untested."""
    assert {type(error).__name__ for error, _ in EXAMPLES} == set(errors.__all__)


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (ConfigurationError, (IdempotencyError, ValueError)),
        (WaitTimeoutError, (InProgressError, TimeoutError)),
        (StoreUnavailableError, (StoreError,)),
        (InProgressError, (IdempotencyError,)),
        (LeaseLostError, (IdempotencyError,)),
    ],
)
def test_errors_are_caught_by_their_families(error: type[Exception], bases: tuple[type[Exception], ...]) -> None:
    """The tree is the one that the documentation draws, with the standard errors beside it."""
    assert error.__bases__ == bases


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_an_idempotency_error(name: str) -> None:
    """One except clause catches whatever the library raises on purpose."""
    assert issubclass(getattr(errors, name), IdempotencyError)


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (InProgressError("k", 1.5), ("'k'", "1.500 s")),
        (InProgressError("k", 1.5, "busy"), ("busy",)),
        (FingerprintMismatchError("k"), ("'k'", "another payload", "use a new key")),
        (LeaseLostError("k", "taken over"), ("'k'", "taken over")),
        (ResultUnavailableError("k", "too_large"), ("'k'", "too_large")),
        (CompletionError("k"), ("'k'", "ran")),
        (ReplayedError("k", "m.Declined", "no funds"), ("'k'", "m.Declined", "no funds")),
    ],
)
def test_messages_say_which_operation_and_why(error: IdempotencyError, parts: tuple[str, ...]) -> None:
    """A message names the key and the reason."""
    assert all(part in str(error) for part in parts)


@pytest.mark.parametrize("error", [LeaseLostError("k", "r", "secret"), CompletionError("k", "secret")])
def test_messages_never_hold_the_result(error: IdempotencyError) -> None:
    """A result is on the error for the code that catches it, and not in the text that is logged."""
    assert "secret" not in str(error)


@pytest.mark.parametrize("error", [error for error, _ in EXAMPLES], ids=lambda error: type(error).__name__)
def test_errors_survive_another_process(error: IdempotencyError) -> None:
    """An error that is copied or pickled, as pools and task queues do, is the same error."""
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301 (our own bytes)
        assert (type(twin), str(twin), vars(twin)) == (type(error), str(error), vars(error))
