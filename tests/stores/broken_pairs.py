"""Stores that each break the contract in one way: what two primitives do to each other, and what a refusal leaves behind.

Each of their primitives keeps it when it meets but its like, or when no time has passed.
"""

import asyncio
from collections import defaultdict
from typing import Any, ClassVar

from asyncidem.model import Stored, Swap

from stores.broken_stores import BROKEN, Base, reported

__all__ = ["BROKEN"]

# -- what is not atomic together


class Locked(Base):
    """A base for puts and swaps that read and then write, each kind under a lock of its own for each key."""

    locks: ClassVar[defaultdict[tuple[str, str], asyncio.Lock]] = defaultdict(asyncio.Lock)

    async def locked_put(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        async with self.locks["put", key]:
            found = await self.value(key)
            await asyncio.sleep(0)
            if found is None:
                await self.write(key, value, ttl_ms)
            return found

    async def locked_swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        async with self.locks["swap", key]:
            if how["or_absent"] and await self.value(key) is None:
                await asyncio.sleep(0)
                await self.write(key, value, ttl_ms)
                return Swap(True)
            return await Base.swap(self, key, expected, value, ttl_ms, **how)


BOTH = "put_if_absent returned None, and swap with or_absent Swap(written=True, found=None): one of them writes"


@reported(f"put_if_absent and swap are atomic together: {BOTH}")
class PutAndSwapHaveLocksOfTheirOwn(Locked):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        return await self.locked_put(key, value, ttl_ms)

    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return await self.locked_swap(key, expected, value, ttl_ms, **how)


@reported(f"put_if_absent and swap are atomic together: {BOTH}")
class PutWritesOverWhatWasSwappedMeanwhile(Locked):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        return await self.locked_put(key, value, ttl_ms)


@reported(f"put_if_absent and swap are atomic together: {BOTH}")
class SwapWritesOverWhatWasPutMeanwhile(Locked):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return await self.locked_swap(key, expected, value, ttl_ms, **how)


@reported(f"put_if_absent and swap of a beginning are atomic together: {BOTH}")
class SwapOfABeginningWritesOverWhatWasPutMeanwhile(Locked):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        swap = Base.swap if how["exact"] else Locked.locked_swap
        return await swap(self, key, expected, value, ttl_ms, **how)


@reported(
    "put_if_absent and swap are atomic together: put_if_absent returned b'swapped', and swap with or_absent "
    "Swap(written=False, found=b'put'): one of them writes"
)
class PutAndSwapGiveWayToEachOther(Base):
    coming: ClassVar[defaultdict[str, dict[str, bytes]]] = defaultdict(dict)

    async def meets(self, kind: str, key: str, value: bytes) -> bytes | None:
        coming = self.coming[key]
        coming[kind] = value
        await asyncio.sleep(0)
        others = [other for name, other in coming.items() if name != kind]
        await asyncio.sleep(0)
        coming.pop(kind, None)
        return others[0] if others and await self.value(key) is None else None

    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        return await self.meets("put", key, value) or await super().put_if_absent(key, value, ttl_ms)

    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        if how["or_absent"] and (other := await self.meets("swap", key, value)) is not None:
            return Swap(False, other)
        return await super().swap(key, expected, value, ttl_ms, **how)


# -- what a refusal or a read leaves behind


class Prolonging(Base):
    """A base for stores that give a value its ttl again when somebody asks for it."""

    async def begin_anew(self, key: str) -> None:
        """Begin the minute anew of which some has passed."""
        stored = await Base.read(self, key)
        if stored is not None and 30_000 < (stored.left_ms or 0) < 60_000:
            await self.write(key, stored.value, 60_000)


def prolonged(name: str) -> str:
    """Return what must be reported."""
    return (
        f"what is refused or read lives no longer for it: {name} changed nothing, and began the ttl anew: 60000 ms are "
        f"left of 60000 after 100 ms"
    )


@reported(prolonged("put_if_absent"))
class RefusedPutBeginsTheTtlAnew(Prolonging):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        await self.begin_anew(key)
        return await super().put_if_absent(key, value, ttl_ms)


@reported(prolonged("put_or_read"))
class RefusedPutOrReadBeginsTheTtlAnew(Prolonging):
    async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        stored = await super().put_or_read(key, value, ttl_ms)
        await self.begin_anew(key)
        return stored


@reported(prolonged("read"))
class ReadBeginsTheTtlAnew(Prolonging):
    async def read(self, key: str) -> Stored | None:
        stored = await super().read(key)
        await self.begin_anew(key)
        return stored


class PickyProlonging(Prolonging):
    """A base for stores that do so where one kind of swap was refused."""

    left: bool
    exact: bool

    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        swap = await super().swap(key, expected, value, ttl_ms, **how)
        if not swap.written and how["exact"] is self.exact and (how.get("left_ms") is not None) is self.left:
            await self.begin_anew(key)
        return swap


@reported(prolonged("swap of another value"))
class RefusedSwapBeginsTheTtlAnew(PickyProlonging):
    exact, left = True, False


@reported(prolonged("swap of another beginning"))
class RefusedSwapOfABeginningBeginsTheTtlAnew(PickyProlonging):
    exact, left = False, False


@reported(prolonged("swap with left_ms"))
class RefusedSwapByTimeLeftBeginsTheTtlAnew(PickyProlonging):
    exact, left = True, True


@reported(prolonged("swap of a beginning with left_ms"))
class RefusedSwapOfABeginningByTimeLeftBeginsTheTtlAnew(PickyProlonging):
    exact, left = False, True


@reported(prolonged("remove of another value"))
class RefusedRemoveBeginsTheTtlAnew(Prolonging):
    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        removed = await super().remove(key, expected, exact=exact)
        if exact:
            await self.begin_anew(key)
        return removed


@reported(prolonged("remove of another beginning"))
class RefusedRemoveOfABeginningBeginsTheTtlAnew(Prolonging):
    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        removed = await super().remove(key, expected, exact=exact)
        if not exact:
            await self.begin_anew(key)
        return removed
