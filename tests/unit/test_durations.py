"""Durations: one conversion, at the surface."""

from datetime import timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncidem.durations import MAX_MS, to_ms
from asyncidem.errors import ConfigurationError


@pytest.mark.parametrize(
    ("value", "milliseconds"),
    [
        (1, 1000),
        (30.0, 30_000),
        (0.001, 1),
        (0.0006, 1),
        (0.0015, 2),
        (1.2345, 1234),
        (timedelta(days=1), 86_400_000),
        (timedelta(microseconds=600), 1),
        (timedelta(days=2, milliseconds=5), 172_800_005),
        (MAX_MS / 1000, MAX_MS),
    ],
)
def test_seconds_and_timedeltas_become_whole_milliseconds(value: float | timedelta, milliseconds: int) -> None:
    """Seconds and timedeltas are rounded to whole milliseconds; the days of a timedelta count."""
    result = to_ms(value, "lease")
    assert (result, type(result)) == (milliseconds, int)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (True, "must be seconds or a timedelta"),
        ("30", "must be seconds or a timedelta"),
        (None, "must be seconds or a timedelta"),
        (Decimal(1), "must be seconds or a timedelta"),
        (0, "greater than zero"),
        (-0.0, "greater than zero"),
        (-1, "greater than zero"),
        (float("nan"), "greater than zero"),
        (timedelta(0), "greater than zero"),
        (timedelta(seconds=-1), "greater than zero"),
        (0.0004, "at least one millisecond"),
        (timedelta(microseconds=500), "at least one millisecond"),
        (float("inf"), "at most a century"),
        (MAX_MS / 1000 + 1, "at most a century"),
        pytest.param(10**400, "at most a century", id="huge"),
        (timedelta.max, "at most a century"),
    ],
)
def test_what_is_no_duration_is_refused_by_name(value: object, reason: str) -> None:
    """What is no usable duration is refused, and the error says which option it was."""
    with pytest.raises(ConfigurationError, match=f"^lease must be {reason}|^lease {reason}"):
        to_ms(value, "lease")  # type: ignore[arg-type]


@given(st.integers(min_value=1, max_value=MAX_MS))
def test_every_whole_millisecond_is_kept(milliseconds: int) -> None:
    """A timedelta of n milliseconds is n milliseconds."""
    assert to_ms(timedelta(milliseconds=milliseconds), "ttl") == milliseconds
