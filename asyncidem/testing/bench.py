"""What the checks of a store share: the stores, keys of their own, and the words for what is not as it must be."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TypeVar

from ..model import LEFT_UNKNOWN, Stored
from ..stores.base import Store

__all__ = ["MINUTE", "Bench", "BreachError", "expect", "shown"]

T = TypeVar("T")

MINUTE: Final = 60_000

SLACK_MS: Final = 50
"""How much the time that a value has left may be off: roundings, and the steps of two clocks. A store that reports less
than there is lets others take over too early."""


class BreachError(Exception):
    """What a check found."""


def expect(met: bool, what: str) -> None:  # noqa: FBT001 - read like an assertion, which -O would take away
    """Raise ``what`` as a breach unless ``met``."""
    if not met:
        raise BreachError(what)


def shown(value: object) -> str:
    """Return the text of a value for a report, not more than a line of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


class Bench:
    """The stores under test, and how values are put there and looked at.

    Attributes:
        names: the keys that were used, without the prefix.
        pace: seconds that a primitive takes about, once it is known.

    Args:
        first: a store.
        second: another one over the same data, or the same.
        advance: lets seconds pass.
    """

    def __init__(self, first: Store, second: Store, advance: Callable[[float], object]) -> None:
        self.first = first
        self.second = second
        self._advance = advance
        self._run = os.urandom(4).hex()
        self.names: list[str] = []
        self.pace = 0.0

    def name(self) -> str:
        """Return an idempotency key that nobody has used."""
        self.names.append(f"conformance:{self._run}:{len(self.names)}")
        return self.names[-1]

    def key(self) -> str:
        """Return a stored key that nobody has used."""
        return self.first.prefix + self.name()

    def now_ms(self) -> float:
        """Return the time by the store's own clock."""
        return self.first.clock() * 1000

    async def pass_time(self, seconds: float) -> None:
        """Let time pass."""
        result = self._advance(seconds)
        if inspect.isawaitable(result):
            await result

    async def seeded(self, value: bytes, ttl_ms: int = MINUTE, key: str | None = None) -> str:
        """Write a value under a new key, and return the key."""
        key = self.key() if key is None else key
        found = await self.first.put_if_absent(key, value, ttl_ms)
        expect(found is None, f"put_if_absent of a new key returned {shown(found)}, not None")
        return key

    async def stored(self, key: str, value: bytes | None) -> Stored | None:
        """Read what must be there, through the other store."""
        stored = await self.second.read(key)
        expect(stored is None or isinstance(stored, Stored), f"read returned {shown(stored)}, not a Stored or None")
        found = None if stored is None else stored.value
        expect(found == value, f"then {shown(found)} is there, not {shown(value)}")
        return stored

    async def lives(self, key: str, value: bytes, ttl_ms: int, began_ms: float) -> None:
        """Read what must be there, and have left what is left of a ttl that was given after ``began_ms``."""
        stored = await self.stored(key, value)
        assert stored is not None
        self.left_of(stored, ttl_ms, began_ms)

    def left_of(self, stored: Stored, ttl_ms: int, began_ms: float) -> None:
        """Hold the time left against a ttl that was given after ``began_ms``."""
        passed = self.now_ms() - began_ms
        left = stored.left_ms
        if left == LEFT_UNKNOWN:
            return
        expect(left is not None, f"it has no expiry, and was given a ttl of {ttl_ms} ms")
        assert left is not None
        expect(
            ttl_ms - passed - SLACK_MS <= left <= ttl_ms,
            f"it is said to have {left} ms left of a ttl of {ttl_ms} ms, at most {passed:.0f} ms after it was written",
        )

    async def race(self, calls: Iterable[Callable[[Store], Awaitable[T]]]) -> list[T]:
        """Make calls at the same time, every other one on the other store."""
        stores = (self.first, self.second)
        running = (call(stores[number % 2]) for number, call in enumerate(calls))
        results = await asyncio.gather(*running, return_exceptions=True)
        answers: list[T] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            answers.append(result)
        return answers
