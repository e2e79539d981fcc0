"""Completed results kept in this process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from .model import Record

__all__ = ["Cache"]


class Cache:
    """Completed records of this process, the least recently used out first, none past its ttl.

    Args:
        size: how many.
        clock: monotonic seconds.
    """

    def __init__(self, size: int, clock: Callable[[], float]) -> None:
        self.size = size
        self._clock = clock
        self._records: OrderedDict[str, tuple[float, Record]] = OrderedDict()

    def get(self, key: str) -> Record | None:
        """Return the record of ``key``, if it is kept and lives."""
        entry = self._records.get(key)
        if entry is None:
            return None
        if entry[0] <= self._clock():
            del self._records[key]
            return None
        self._records.move_to_end(key)
        return entry[1]

    def put(self, record: Record, age: float = 0.0) -> None:
        """Keep ``record`` for the time that it says it has left; not at all if it does not say.

        Args:
            record: what was read or written.
            age: seconds that may have passed since.
        """
        if record.expires_in is None:
            return
        self._records[record.key] = (self._clock() + record.expires_in - age, record)
        self._records.move_to_end(record.key)
        if len(self._records) > self.size:
            self._records.popitem(last=False)
