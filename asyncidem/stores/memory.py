"""A store in this process' memory, for development and unit tests."""

from __future__ import annotations

import heapq
import threading
from typing import Unpack

from ..model import Stored, Swap, matches
from .base import Store
from .ownership import StoreOptions

__all__ = ["MemoryStore"]


class MemoryStore(Store):
    """Keeps records in this process: they are gone when it ends, and other processes do not see them.

    Several workers (``uvicorn --workers 2``) are several processes: a duplicate that another one gets runs again.

    It is atomic among tasks, event loops and threads of the process. Its size is bounded by what lives: expired
    records are dropped as others are written.

    Args:
        **options: the options of :class:`~asyncidem.stores.base.Store`.
    """

    def __init__(self, **options: Unpack[StoreOptions]) -> None:
        super().__init__(**options)
        self._lock = threading.Lock()
        self._values: dict[str, tuple[bytes, float]] = {}
        self._expiries: list[tuple[float, str]] = []

    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        """Write if absent; see :meth:`Store.put_if_absent`."""
        found = await self.put_or_read(key, value, ttl_ms)
        return None if found is None else found.value

    async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        """Write if absent, else read; see :meth:`Store.put_or_read`."""
        with self._lock:
            found = self._find(key)
            if found is None:
                self._write_value(key, value, ttl_ms)
                return None
            return Stored(found[0], self._left_ms(found[1]))

    async def read(self, key: str) -> Stored | None:
        """Read; see :meth:`Store.read`."""
        with self._lock:
            found = self._find(key)
            return None if found is None else Stored(found[0], self._left_ms(found[1]))

    async def swap(
        self,
        key: str,
        expected: bytes,
        value: bytes,
        ttl_ms: int,
        *,
        exact: bool,
        or_absent: bool,
        left_ms: int | None = None,
    ) -> Swap:
        """Compare and set; see :meth:`Store.swap`."""
        with self._lock:
            found = self._find(key)
            if found is None:
                if not or_absent:
                    return Swap(False)
            elif not matches(found[0], expected, exact=exact) or (
                left_ms is not None and self._left_ms(found[1]) > left_ms
            ):
                return Swap(False, found[0])
            self._write_value(key, value, ttl_ms)
            return Swap(True)

    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        """Compare and delete; see :meth:`Store.remove`."""
        with self._lock:
            found = self._find(key)
            if found is None or not matches(found[0], expected, exact=exact):
                return False
            del self._values[key]
            return True

    def _left_ms(self, expiry: float) -> int:
        return int((expiry - self.clock()) * 1000)

    def _find(self, key: str) -> tuple[bytes, float] | None:
        found = self._values.get(key)
        if found is not None and found[1] <= self.clock():
            del self._values[key]
            return None
        return found

    def _write_value(self, key: str, value: bytes, ttl_ms: int) -> None:
        expiry = self.clock() + ttl_ms / 1000
        self._values[key] = (value, expiry)
        heapq.heappush(self._expiries, (expiry, key))
        # Two are looked at for each one that is added, so the heap cannot outgrow what was written within a ttl.
        for _ in range(2):
            if not self._expiries or self._expiries[0][0] > self.clock():
                break
            expiry, key = heapq.heappop(self._expiries)
            if (old := self._values.get(key)) is not None and old[1] <= expiry:
                del self._values[key]
