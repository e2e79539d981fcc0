"""Counts over a keyspace in bounded memory: by status, age, size, and the few biggest and oldest. No I/O."""

from __future__ import annotations

import heapq
from typing import Any, Final

from .entries import Entry, Status

__all__ = ["AGES", "SIZES", "Figures", "Ranking"]

AGES: Final = ((60, "< 1m"), (600, "< 10m"), (3600, "< 1h"), (86_400, "< 1d"), (float("inf"), ">= 1d"))
"""Upper bounds of ages in seconds, and their names."""

SIZES: Final = ((1 << 10, "< 1 KiB"), (1 << 14, "< 16 KiB"), (1 << 20, "< 1 MiB"), (float("inf"), ">= 1 MiB"))
"""Upper bounds of sizes in bytes, and their names."""


class Ranking:
    """The entries with the highest measures; of equal ones those that came first.

    Args:
        places: how many are kept.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._heap: list[tuple[float, int, dict[str, Any]]] = []
        self._count = 0

    def add(self, measure: float, entry: Entry) -> None:
        """Keep an entry if it is among the highest; of what it holds only its description is kept."""
        self._count += 1
        if len(self._heap) < self._places:
            heapq.heappush(self._heap, (measure, -self._count, entry.document()))
        elif self._heap and measure > self._heap[0][0]:
            heapq.heapreplace(self._heap, (measure, -self._count, entry.document()))

    def documents(self) -> list[dict[str, Any]]:
        """Return what ``--json`` prints of them, the highest first."""
        return [document for _, _, document in sorted(self._heap, key=lambda place: place[:2], reverse=True)]


class Figures:
    """What ``stats`` counts.

    Args:
        places: how many of the biggest and of the oldest are kept.
    """

    def __init__(self, places: int) -> None:
        self.counts = dict.fromkeys(Status, 0)
        self.bytes = dict.fromkeys(Status, 0)
        self.ages = dict.fromkeys([*(name for _, name in AGES), "unknown"], 0)
        self.sizes = dict.fromkeys((name for _, name in SIZES), 0)
        self.without_expiry = 0
        self.biggest = Ranking(places)
        self.oldest = Ranking(places)

    def add(self, entry: Entry) -> None:
        """Count an entry."""
        size = entry.seen.size
        self.counts[entry.status] += 1
        self.bytes[entry.status] += size
        self.sizes[_band(SIZES, size)] += 1
        self.ages["unknown" if entry.age is None else _band(AGES, entry.age)] += 1
        if entry.seen.left_ms is None:
            self.without_expiry += 1
        self.biggest.add(size, entry)
        if entry.age is not None:
            self.oldest.add(entry.age, entry)

    def document(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "keys": sum(self.counts.values()),
            "bytes": sum(self.bytes.values()),
            "without_expiry": self.without_expiry,
            "status": {
                status.value: {"keys": self.counts[status], "bytes": self.bytes[status]}
                for status in Status
                if self.counts[status]
            },
            "age": self.ages,
            "size": self.sizes,
            "biggest": self.biggest.documents(),
            "oldest": self.oldest.documents(),
        }


def _band(bands: tuple[tuple[float, str], ...], measure: float) -> str:
    return next(name for bound, name in bands if measure < bound)
