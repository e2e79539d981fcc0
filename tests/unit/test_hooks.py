"""Hooks: told what happens, and unable to change it."""

import asyncio
import logging

import pytest

from asyncidem.hooks import Event, emit, warn
from asyncidem.keys import digest

EVENT = Event(name="taken_over", key="card:of-ann", operation="pay", attempt=2, elapsed=0.5, error=OSError("gone"))


def test_every_hook_gets_the_event() -> None:
    """Hooks are called in their order with the same event."""
    seen: list[tuple[str, Event]] = []
    emit([lambda event: seen.append(("a", event)), lambda event: seen.append(("b", event))], EVENT)
    assert seen == [("a", EVENT), ("b", EVENT)]


@pytest.mark.parametrize("error", [RuntimeError("telemetry is down"), asyncio.CancelledError()], ids=repr)
def test_a_hook_that_raises_is_logged_and_the_next_one_called(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """A broken hook breaks neither the operation nor the other hooks, and its log record has no raw key."""
    seen: list[Event] = []

    def broken(event: Event) -> None:
        raise error

    emit([broken, seen.append], EVENT)
    assert seen == [EVENT]
    (record,) = caplog.records
    assert (record.name, record.levelno, record.getMessage()) == ("asyncidem", logging.ERROR, "hook_failed")
    assert (vars(record)["event"], vars(record)["key_digest"]) == ("taken_over", digest("card:of-ann"))
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert "of-ann" not in str(vars(record))


def test_a_hook_may_end_the_process() -> None:
    """KeyboardInterrupt and its like pass through a hook."""

    def interrupted(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        emit([interrupted], EVENT)


def test_a_warning_is_the_events_name_and_a_digest(caplog: pytest.LogCaptureFixture) -> None:
    """A warning's message is the event's name; the key appears as a digest, the error as its class, no more of it."""
    warn(EVENT)
    (record,) = caplog.records
    assert (record.name, record.levelno, record.getMessage()) == ("asyncidem", logging.WARNING, "taken_over")
    fields = vars(record)
    assert (fields["operation"], fields["key_digest"], fields["attempt"]) == ("pay", digest("card:of-ann"), 2)
    assert (fields["error"], fields["cause"], record.exc_info) == ("OSError", None, None)
    assert "of-ann" not in str(fields)
    assert "gone" not in str(fields)


def test_a_warning_names_the_class_of_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    """What made a store fail is named by its class; its message, which may hold anything, is not logged."""
    error = RuntimeError("the card of Ann is down")
    error.__cause__ = ConnectionError("the card of Ann is refused")
    warn(EVENT._replace(error=error))
    warn(EVENT._replace(error=None))
    assert [(vars(one)["error"], vars(one)["cause"]) for one in caplog.records] == [
        ("RuntimeError", "ConnectionError"),
        (None, None),
    ]
    assert "Ann" not in str([vars(one) for one in caplog.records])


def test_events_are_frozen_and_minimal_ones_have_defaults() -> None:
    """An event needs a name and a key, and cannot be changed by a hook for those after it."""
    event = Event(name="claimed", key="k")
    assert (event.operation, event.attempt, event.elapsed, event.error, event.source) == (None, None, 0.0, None, None)
    with pytest.raises(AttributeError):
        event.key = "other"  # type: ignore[misc]
