"""A store of one's own, on SQLite: for several processes of one machine that have a file in common, and no server.

::

    python examples/custom_store/sqlite_store.py    # checks it with the conformance kit, and runs an operation on it
"""

import asyncio
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from asyncidem import Idempotency, Store, StoreUnavailableError
from asyncidem.model import Stored, Swap, matches
from asyncidem.testing import StoreConformance

T = TypeVar("T")

# Keys are bytes: text would be compared by a collation, and might end at a zero byte.
SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS records (key BLOB PRIMARY KEY, value BLOB NOT NULL, expires INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS expiries ON records (expires);
"""


class SQLiteStore(Store):
    """Keeps records in a file of SQLite's.

    Args:
        path: the file; it is made if it is not there.
        **options: those of every store: ``prefix``, ``timeout`` and so on.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        super().__init__(**options)
        self._path = path
        # One thread: SQLite blocks, and its connection is used by one call at a time.
        self._thread = ThreadPoolExecutor(1)
        self._connection: sqlite3.Connection | None = None

    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        """Write if absent."""

        def step(db: sqlite3.Connection, now_ms: int) -> bytes | None:
            found = self._find(db, key)
            if found is None:
                self._insert(db, key, value, now_ms + ttl_ms)
                return None
            return found[0]

        return await self._transaction(step)

    async def read(self, key: str) -> Stored | None:
        """Read."""

        def step(db: sqlite3.Connection, now_ms: int) -> Stored | None:
            found = self._find(db, key)
            return None if found is None else Stored(found[0], found[1] - now_ms)

        return await self._transaction(step)

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
        """Compare and set."""

        def step(db: sqlite3.Connection, now_ms: int) -> Swap:
            found = self._find(db, key)
            if found is None:
                if not or_absent:
                    return Swap(False)
            elif not matches(found[0], expected, exact=exact) or (left_ms is not None and found[1] - now_ms > left_ms):
                return Swap(False, found[0])
            self._insert(db, key, value, now_ms + ttl_ms)
            return Swap(True)

        return await self._transaction(step)

    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        """Compare and delete."""

        def step(db: sqlite3.Connection, _: int) -> bool:
            found = self._find(db, key)
            if found is None or not matches(found[0], expected, exact=exact):
                return False
            db.execute("DELETE FROM records WHERE key = ?", (key.encode(),))
            return True

        return await self._transaction(step)

    async def aclose(self) -> None:
        """Close the store, and then the file."""
        await super().aclose()  # first what it still repeats in the background
        connection, self._connection = self._connection, None
        if connection is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, connection.close)

    async def _transaction(self, step: Callable[[sqlite3.Connection, int], T]) -> T:
        # A caller that is cancelled leaves; the thread goes on, and what it writes is an outcome that nobody knows: the
        # lifecycle above undoes or repeats it. An exception of SQLite's that comes out here means the same to it.
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, step)

    def _run(self, step: Callable[[sqlite3.Connection, int], T]) -> T:
        try:
            db = self._open()
            db.execute("BEGIN IMMEDIATE")  # alone from here on: nobody writes between the comparison and the write
        except sqlite3.OperationalError as error:
            # Known: nothing was written. A caller need not undo what never happened.
            raise StoreUnavailableError(f"{self._path}: {error}", outcome_unknown=False) from error
        with db:  # commits, or rolls back
            # SQLite has no expiry, and the processes of one machine have a clock in common: it is the wall's, so that
            # a clock that is set moves expiries. A server that serves several machines must use its own.
            now_ms = int(self.wall() * 1000)
            db.execute("DELETE FROM records WHERE expires <= ?", (now_ms,))
            return step(db, now_ms)

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            db = sqlite3.connect(self._path, timeout=self.timeout, isolation_level=None, check_same_thread=False)
            db.executescript(SCHEMA)
            self._connection = db
        return self._connection

    @staticmethod
    def _find(db: sqlite3.Connection, key: str) -> tuple[bytes, int] | None:
        row: tuple[bytes, int] | None = db.execute(
            "SELECT value, expires FROM records WHERE key = ?", (key.encode(),)
        ).fetchone()
        return row

    @staticmethod
    def _insert(db: sqlite3.Connection, key: str, value: bytes, expires: int) -> None:
        db.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", (key.encode(), value, expires))


async def main() -> None:
    """Check the store, and let twenty duplicates meet on it, half of them in what could be another process."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "records.db"
        await StoreConformance(lambda: SQLiteStore(path)).run()
        print("the store keeps the contract")

        charges: list[str] = []

        async def charge(order_id: str) -> dict[str, str]:
            charges.append(order_id)
            await asyncio.sleep(0.05)
            return {"receipt": f"r-{order_id}"}

        async with SQLiteStore(path) as one, SQLiteStore(path) as other:
            workers = [Idempotency(store, wait=5) for store in (one, other)]
            receipts = await asyncio.gather(*(workers[n % 2].run("42", charge, "42") for n in range(20)))
        print(f"{len(receipts)} calls, {len(charges)} charge, receipt {receipts[0]['receipt']}")
        if charges != ["42"] or receipts != [{"receipt": "r-42"}] * 20:
            sys.exit("NOT MET: one charge, and its receipt for all")


if __name__ == "__main__":
    asyncio.run(main())
