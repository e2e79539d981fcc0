"""Figures and how they are summed up: medians, quartiles, and ratios of what was measured in the same round."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

BARE = "bare"
"""The side that ratios are taken over: a ``redis.asyncio`` client that issues the same commands one at a time."""

OURS = "asyncidem"
"""The side that goals are judged on: the whole engine, through the decorator."""


TIMES = "\N{MULTIPLICATION SIGN}"
"""How a ratio is written."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its quartiles, over ``count`` values."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Sum up some values.

        Raises:
            ValueError: there are none.
        """
        if not values:
            message = "no values to sum up"
            raise ValueError(message)
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least value that at least ``share`` (0 to 1) of all values do not exceed."""
    ordered = sorted(values)
    rank = -(-len(ordered) * share // 1)
    return ordered[min(len(ordered) - 1, max(0, int(rank) - 1))]


@dataclass(frozen=True, slots=True)
class Side:
    """What one side achieved in one row: in the row's own unit, as a ratio over bare, or why not at all."""

    absolute: Spread | None = None
    ratio: Spread | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of the table as measured: the judged value, and all sides beside it.

    Attributes:
        value: what the goal is compared with; None if it could not be measured.
        sides: by name, in the order of the table.
        unit: of the absolute figures of the sides.
        note: what a reader must know about this figure.
        failure: why there is no value.
    """

    value: Spread | None
    sides: dict[str, Side] = field(default_factory=dict)
    unit: str = ""
    note: str = ""
    failure: str | None = None


class Series:
    """The figures of an interleaved run, by side and metric, one for each round."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[float]]] = {}
        self.failures: dict[str, str] = {}

    def add(self, side: str, figures: dict[str, float]) -> None:
        """Keep what ``side`` achieved in the round that is under way."""
        for metric, value in figures.items():
            self._values.setdefault(side, {}).setdefault(metric, []).append(value)

    def fail(self, side: str, reason: str) -> None:
        """Drop a side: what it achieved in earlier rounds has no pair in the later ones."""
        self._values.pop(side, None)
        self.failures[side] = reason

    def values(self, side: str, metric: str) -> list[float]:
        """Return a side's figures, round by round; none if it failed."""
        return self._values.get(side, {}).get(metric, [])

    def ratios(self, side: str, metric: str, base: str = BARE) -> list[float]:
        """Return a side's figures over those of ``base`` in the same round."""
        pairs = zip(self.values(side, metric), self.values(base, metric), strict=False)
        return [value / other for value, other in pairs]

    def row(self, metric: str, *, unit: str, scale: float = 1.0, note: str = "") -> Measured:
        """Return a metric as a row whose judged value is the ratio of ``OURS`` over ``BARE``.

        Args:
            metric: its name in ``add``.
            unit: of the absolute figures.
            scale: what absolute figures are multiplied with to be in that unit.
            note: for the reader.
        """
        sides: dict[str, Side] = {}
        for name in self._values:
            values = self.values(name, metric)
            if values:
                ratios = self.ratios(name, metric)
                sides[name] = Side(
                    Spread.of([value * scale for value in values]), Spread.of(ratios) if ratios else None
                )
        sides |= {name: Side(failure=reason) for name, reason in self.failures.items()}
        ratios = self.ratios(OURS, metric)
        failure = None if ratios else self.failures.get(OURS) or self.failures.get(BARE) or "not measured"
        return Measured(Spread.of(ratios) if ratios else None, sides, unit, note, failure)


def single(values: Sequence[float], unit: str, *, note: str = "", bare: Sequence[float] = ()) -> Measured:
    """Return a row whose judged value is an absolute figure of ours."""
    sides = {OURS: Side(Spread.of(values))}
    if bare:
        sides[BARE] = Side(Spread.of(bare))
    return Measured(Spread.of(values), sides, unit, note)
