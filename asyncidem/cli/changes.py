"""What the command line writes: releases and deletions, each fenced by the bytes that the operator was shown.

Every write is one of the store's compare-and-set primitives on what was read. A record that was renewed, taken over or
completed since then holds other bytes, and stays. A reply that is lost leaves the outcome unknown, and doing it again is
harmless: what is gone is gone, what is new is not touched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from ..stores.primitives import Within
from .entries import Entry, Filter, Status
from .keyspace import Keyspace

__all__ = ["PURGED", "Purge", "release"]

PURGED: Final = frozenset({Status.COMPLETED, Status.ORPHAN, Status.NO_RECORD, Status.UNKNOWN})
"""What ``purge`` can delete. Live operations are released one by one; locks go by themselves; other types are no values
that the store's primitives can compare.
"""

TRIES: Final = 3
"""How often a release follows renewals of the owner whose key was to be released."""

EXAMPLES: Final = 5
"""How many of the keys that would be purged are shown."""


async def release(keyspace: Keyspace, entry: Entry) -> bool:
    """Release what was seen; say whether it was still there, with the same owner.

    A live record is fenced off: an orphan of nobody takes its place, as ``Store.delete`` does. That its owner has only
    renewed its lease since then changes nothing: it is the same claim that the operator decided about.

    Raises:
        StoreError: the server refused.
        StoreUnavailableError: it did not answer in time; the key may or may not be released.
    """
    store, found = keyspace.store, entry
    for _ in range(TRIES):
        with Within(store.timeout):
            # What was live is fenced off also if its lease is over by now: its owner may still complete.
            step = _fence_off if entry.status is Status.LIVE else _remove
            if await step(keyspace, found):
                return True
        if (
            entry.status is not Status.LIVE or entry.owner is None
        ):  # without a token nothing tells one claim from the next
            return False
        again = await keyspace.read(entry.seen.stored_key)
        if again is None or again.record is None or again.record.state != "INPROGRESS" or again.owner != entry.owner:
            return False
        found = again
    return False


async def _fence_off(keyspace: Keyspace, entry: Entry) -> bool:
    """Put an orphan in the place of exactly what was seen."""
    return await keyspace.store._fence_off(entry.key, entry.seen.stored_key, keyspace.stored(entry))


async def _remove(keyspace: Keyspace, entry: Entry) -> bool:
    """Delete exactly what was seen."""
    stored_key, store = entry.seen.stored_key, keyspace.store
    value = entry.seen.value
    assert value is not None
    return await store._call(store.remove(stored_key, value, exact=not entry.known_by_beginning))


class Purge:
    """A deletion of many keys, and how far it has come.

    Args:
        keyspace: where.
        wanted: what; of its statuses those in :data:`PURGED`.
        apply: False only counts.

    Attributes:
        matched: keys that were meant.
        matched_bytes: their values' size.
        removed: keys that were deleted.
        changed: keys that had changed since they were read, and were left alone.
        unreadable: keys that are not UTF-8 and were left alone.
        unknown_age: keys that may be old enough or not.
        examples: the first few that were meant.
    """

    def __init__(self, keyspace: Keyspace, wanted: Filter, *, apply: bool) -> None:
        self._keyspace = keyspace
        self._wanted = wanted
        self._apply = apply
        self.matched = self.matched_bytes = self.removed = self.changed = self.unreadable = self.unknown_age = 0
        self.examples: list[Entry] = []

    async def run(self, beginning: str, advance: Callable[[int], None]) -> None:
        """Go through all keys with this beginning, a page at a time; ``advance`` is told how many of them matched.

        Raises:
            StoreError: the server refused; what was deleted until then is counted.
            StoreUnavailableError: it did not answer in time; likewise.
        """
        async for page in self._keyspace.entries(beginning):
            meant = [entry for entry in page if self._means(entry)]
            self.matched += len(meant)
            self.matched_bytes += sum(entry.seen.size for entry in meant)
            self.examples += meant[: EXAMPLES - len(self.examples)]
            if self._apply and meant:
                await self._delete(meant)
            advance(len(meant))

    def _means(self, entry: Entry) -> bool:
        if entry.status not in PURGED:
            return False
        self.unknown_age += self._wanted.undecided(entry)
        if not self._wanted.meets(entry):
            return False
        self.unreadable += not entry.seen.exact
        return entry.seen.exact

    async def _delete(self, entries: list[Entry]) -> None:
        # All of a page at once: on the store's connection they are one write. Of several that fail the first is told,
        # when all are answered. What is large, and known only by the whole of it, is read again, one by one.
        at_once = [entry for entry in entries if entry.seen.whole or entry.known_by_beginning]
        with Within(self._keyspace.store.timeout):
            outcomes = await asyncio.gather(
                *(_remove(self._keyspace, entry) for entry in at_once), return_exceptions=True
            )
        for entry in entries:
            if not (entry.seen.whole or entry.known_by_beginning):
                outcomes.append(await self._delete_large(entry))
        failure: BaseException | None = None
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                failure = failure or outcome
            elif outcome:
                self.removed += 1
            else:
                self.changed += 1
        if failure is not None:
            raise failure

    async def _delete_large(self, entry: Entry) -> bool:
        again = await self._keyspace.read(entry.seen.stored_key)
        if again is None or again.status not in PURGED or not self._wanted.meets(again):
            return False
        with Within(self._keyspace.store.timeout):
            return await _remove(self._keyspace, again)
