"""A clock that moves when it is told."""

from __future__ import annotations

from typing import Final

from ..durations import Duration, to_ms
from ..errors import ConfigurationError

__all__ = ["ManualClock"]

START: Final = 1_700_000_000
"""Unix time at which a clock begins."""


class ManualClock:
    """Time for a store that stands still until ``advance`` is called.

    ::

        clock = ManualClock()
        store = MemoryStore(clock=clock.monotonic, wall=clock.wall)
        claim = await store.claim("k", lease=30)
        clock.advance(31)  # the lease is over, and the next claim takes over

    It is the store's time: how old records are, when they expire, when an owner's lease is over. What the event loop
    times (the pauses of a waiting duplicate, the moment of a renewal) goes on by the loop's own clock.

    A server has a clock of its own: a ``RedisStore`` gets none of these, but for tests of clocks that go wrong.
    """

    def __init__(self) -> None:
        self._passed_ms = 0
        self._wall_ms = START * 1000

    def monotonic(self) -> float:
        """Return the seconds that have passed; never less than before."""
        # Not from 0: that a moment is set must not depend on whether it is true.
        return 1000 + self._passed_ms / 1000

    def wall(self) -> float:
        """Return unix seconds."""
        return self._wall_ms / 1000

    def advance(self, seconds: Duration) -> None:
        """Let time pass, on both clocks.

        Args:
            seconds: seconds or a ``timedelta``, more than zero.

        Raises:
            ConfigurationError: not a duration. Time does not go back; the wall clock may, see ``set_wall``.
        """
        passed = to_ms(seconds, "seconds")
        self._passed_ms += passed
        self._wall_ms += passed

    def set_wall(self, seconds: float) -> None:
        """Set the wall clock alone, back too, as an operator or NTP does.

        Args:
            seconds: unix seconds.

        Raises:
            ConfigurationError: not a number of seconds since 1970.
        """
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1 << 40:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"seconds must be unix time such as {START}, not {seconds!r}")
        self._wall_ms = round(seconds * 1000)
