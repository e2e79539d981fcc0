"""Durations: seconds or ``timedelta`` at the surface, whole milliseconds below it, converted once."""

from __future__ import annotations

from datetime import timedelta

from .errors import ConfigurationError

__all__ = ["Duration", "to_ms"]


Duration = float | timedelta
"""Seconds (int or float) or a ``timedelta``."""

MAX_MS = 100 * 366 * 86_400_000
"""A century. Redis refuses expiries that overflow 64 bits; anything near that is a unit mistaken for another."""


def to_ms(value: Duration, name: str) -> int:
    """Return ``value`` in whole milliseconds, rounded, at least 1.

    Args:
        value: seconds or a ``timedelta``.
        name: what to call the value in the error.

    Raises:
        ConfigurationError: not a number of seconds or a ``timedelta``, a bool, NaN, zero, negative, less than half
            a millisecond, or more than a century.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, timedelta)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(f"{name} must be seconds or a timedelta, not {value!r}")
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if not seconds > 0:  # NaN compares as false; math.isnan would overflow on a huge int
        raise ConfigurationError(f"{name} must be greater than zero, not {value!r}")
    if seconds > MAX_MS / 1000:
        raise ConfigurationError(f"{name} must be at most a century ({MAX_MS // 1000} seconds), not {value!r}")
    milliseconds = round(seconds * 1000)
    if milliseconds == 0:
        raise ConfigurationError(f"{name} must be at least one millisecond (0.001), not {value!r}")
    return milliseconds
