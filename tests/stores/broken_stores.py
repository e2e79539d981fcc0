"""Stores that each break the contract in one way: what they compare, what meets, and what time does.

Each comes with the words in which the conformance kit must report it.
"""

import asyncio
from typing import Any, Final

from asyncidem import MemoryStore
from asyncidem.model import Stored, Swap

BROKEN: Final[list[tuple[type[MemoryStore], str]]] = []


def reported(words: str) -> Any:
    """Register a broken store with a part of what must be reported of it."""

    def register(kind: type[MemoryStore]) -> type[MemoryStore]:
        BROKEN.append((kind, words))
        return kind

    return register


class Base(MemoryStore):
    """Everything goes through the four primitives below, so that breaking one breaks one."""

    async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        return await MemoryStore.put_or_read(self, key, value, ttl_ms)

    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        found = await MemoryStore.put_or_read(self, key, value, ttl_ms)
        return None if found is None else found.value

    async def write(self, key: str, value: bytes, ttl_ms: int) -> None:
        """Write whatever is there."""
        with self._lock:
            self._write_value(key, value, ttl_ms)

    async def value(self, key: str) -> bytes | None:
        """Return what is there."""
        stored = await MemoryStore.read(self, key)
        return None if stored is None else stored.value


# -- what is not atomic


@reported("put_if_absent is atomic: of 8 calls 8 wrote")
class PutReadsThenWrites(Base):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        found = await self.value(key)
        await asyncio.sleep(0)
        if found is None:
            await self.write(key, value, ttl_ms)
        return found


@reported("swap is atomic: of 8 calls 8 wrote")
class SwapReadsThenWrites(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        found = await self.value(key)
        fits = how["or_absent"] if found is None else found == expected if how["exact"] else found.startswith(expected)
        await asyncio.sleep(0)
        if not fits:
            return Swap(False, found)
        await self.write(key, value, ttl_ms)
        return Swap(True)


@reported("swap is atomic where nothing is: of 8 calls 8 wrote")
class SwapWritesOverAbsenceThatIsOver(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        if how["or_absent"] and await self.value(key) is None:
            await asyncio.sleep(0)
            await self.write(key, value, ttl_ms)
            return Swap(True)
        return await super().swap(key, expected, value, ttl_ms, **how)


@reported("remove is atomic: of 8 calls 8 said that they deleted")
class RemoveReadsThenDeletes(Base):
    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        found = await self.value(key)
        await asyncio.sleep(0)
        if found is None or not (found == expected if exact else found.startswith(expected)):
            return False
        self._values.pop(key, None)
        return True


@reported("remove and swap are atomic together")
class RemoveDeletesWhatWasSwapped(Base):
    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        found = await self.value(key)
        if found is None or not (found == expected if exact else found.startswith(expected)):
            return False
        await asyncio.sleep(0)
        return self._values.pop(key, None) is not None


# -- what is not compared


@reported("swap where b'abc' is, of b'b', exact=False, or_absent=True")
class SwapIgnoresExpected(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        if await self.value(key) is None and not how["or_absent"]:
            return Swap(False)
        await self.write(key, value, ttl_ms)
        return Swap(True)


@reported("swap where None is, of b'abc', exact=False, or_absent=False: it returned Swap(written=True, found=None)")
class SwapAlwaysWritesOverNothing(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return await super().swap(key, expected, value, ttl_ms, **{**how, "or_absent": True})


@reported("swap where None is, of b'abc', exact=True, or_absent=True: it returned Swap(written=False, found=None)")
class SwapNeverWritesOverNothing(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return await super().swap(key, expected, value, ttl_ms, **{**how, "or_absent": False})


@reported("swap where b'abc' is, of b'ab', exact=True, or_absent=True: it returned Swap(written=True, found=None)")
class SwapIsNeverExact(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return await super().swap(key, expected, value, ttl_ms, **{**how, "exact": False})


@reported("swap where b'abc' is, of b'ab', exact=False, or_absent=False: it returned Swap(written=False, found=b'abc')")
class SwapIsAlwaysExact(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return await super().swap(key, expected, value, ttl_ms, **{**how, "exact": True})


@reported("swap where b'abc' is, of b'a%', exact=False, or_absent=False")
class SwapComparesByPattern(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return await super().swap(key, expected.partition(b"%")[0], value, ttl_ms, **how)


@reported("swap where b'abc' is, of b'aBc', exact=False, or_absent=True")
class SwapIgnoresCase(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return await super().swap(key, expected.lower(), value, ttl_ms, **how)


@reported("swap with left_ms does not write over more time left")
class SwapIgnoresTimeLeft(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return await super().swap(key, expected, value, ttl_ms, **{**how, "left_ms": None})


@reported("swap with left_ms writes over as much time left as was read")
class SwapWantsLessTimeLeft(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        left = how.pop("left_ms", None)
        return await super().swap(key, expected, value, ttl_ms, left_ms=left and left - 1, **how)


@reported("swap with left_ms writes over less time left")
class SwapWantsTheSameTimeLeft(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        stored = await self.read(key)
        if stored is not None and how.get("left_ms") not in (None, stored.left_ms):
            return Swap(False, stored.value)
        return await super().swap(key, expected, value, ttl_ms, **how)


@reported("swap with left_ms still compares")
class SwapLooksAtTimeLeftAlone(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        if how.get("left_ms") is not None:
            how["exact"], expected = False, b""
        return await super().swap(key, expected, value, ttl_ms, **how)


@reported("remove where b'abc' is, of b'xyz', exact=True: it returned True, not False")
class RemoveDeletesWhatItDoesNotOwn(Base):
    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        return await super().remove(key, b"", exact=False)


@reported("remove where b'abc' is, of b'xyz', exact=True: then None is there, not b'abc'")
class RemoveDeletesAndDeniesIt(Base):
    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        removed = await super().remove(key, expected, exact=exact)
        self._values.pop(key, None)
        return removed


@reported("remove where b'abc' is, of b'ab', exact=True: it returned True, not False")
class RemoveIsNeverExact(Base):
    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        return await super().remove(key, expected, exact=False)


@reported("remove where b'abc' is, of b'ab', exact=False: it returned False, not True")
class RemoveIsAlwaysExact(Base):
    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        return await super().remove(key, expected, exact=True)


@reported("remove where b'abc' is, of b'abc', exact=True (a lock): it returned False, not True")
class RemoveLeavesLocks(Base):
    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        return not key.endswith(":lock") and await super().remove(key, expected, exact=exact)


@reported("keys are kept apart: another case")
class KeysWithoutCase(Base):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        return await super().put_if_absent(key.lower(), value, ttl_ms)

    async def read(self, key: str) -> Stored | None:
        return await super().read(key.lower())

    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        return await super().remove(key.lower(), expected, exact=exact)


@reported("keys are kept apart: patterns")
class RemoveTakesPatterns(Base):
    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        if key.endswith("*"):
            for other in [one for one in self._values if one.startswith(key[:-1].rpartition(":")[0][:24])]:
                self._values.pop(other)
            return True
        return await super().remove(key, expected, exact=exact)


# -- time


@reported("what put_if_absent wrote expires, and can be put again")
class PutNeverExpires(Base):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        return await super().put_if_absent(key, value, 3_600_000)


@reported("what swap wrote expires")
class SwapNeverExpires(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return await super().swap(key, expected, value, 3_600_000, **how)


@reported("swap gives a shorter ttl too")
class SwapKeepsTheTtl(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        expiry = self._values.get(key, (b"", None))[1]
        swap = await super().swap(key, expected, value, ttl_ms, **how)
        if swap.written and expiry is not None:
            self._values[key] = value, expiry
        return swap


@reported("what swap wrote lives on where the old value would have expired")
class SwapKeepsTheTtlAndHidesIt(SwapKeepsTheTtl):
    async def read(self, key: str) -> Stored | None:
        stored = await super().read(key)
        return None if stored is None else Stored(stored.value, -1)


@reported("put_if_absent changes nothing that is there: it is said to have 120000 ms left of a ttl of 60000 ms")
class PutProlongs(Base):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        found = await super().put_if_absent(key, value, ttl_ms)
        if found is not None:
            await self.write(key, found, ttl_ms)
        return found


@reported(
    "swap where b'abc' is, of b'b', exact=False, or_absent=True: it is said to have 120000 ms left of a ttl of 60000"
)
class RefusedSwapProlongs(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        swap = await super().swap(key, expected, value, ttl_ms, **how)
        if swap.found is not None:
            await self.write(key, swap.found, ttl_ms)
        return swap


@reported("the time left grows less: it is said to have 60000 ms left of 60000 after 100 ms")
class ReadProlongs(Base):
    async def read(self, key: str) -> Stored | None:
        stored = await super().read(key)
        return None if stored is None else Stored(stored.value, 60_000)


@reported("for its ttl: it is said to have 60 ms left of a ttl of 60000 ms")
class TimeLeftInSeconds(Base):
    async def read(self, key: str) -> Stored | None:
        stored = await super().read(key)
        return None if stored is None else Stored(stored.value, (stored.left_ms or 0) // 1000)


@reported("for its ttl: it has no expiry, and was given a ttl of 60000 ms")
class TimeLeftIsNotTold(Base):
    async def read(self, key: str) -> Stored | None:
        stored = await super().read(key)
        return None if stored is None else Stored(stored.value, None)


@reported("a ttl of a millisecond: raised ValueError('0 seconds')")
class TtlInWholeSeconds(Base):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        if ttl_ms < 1000:
            raise ValueError("0 seconds")
        return await super().put_if_absent(key, value, ttl_ms // 1000 * 1000)


@reported("a ttl of a century")
class TtlIn32Bits(Base):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        return await super().put_if_absent(key, value, ttl_ms & 0x7FFFFFFF)


@reported(
    "what put_if_absent wrote expires, and can be put again: put_if_absent of a new key returned b'old', not None"
)
class ExpiredStillBlocks(Base):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        expired = key in self._values and await self.value(key) is None
        return b"old" if expired else await super().put_if_absent(key, value, ttl_ms)


@reported("what has expired is absent to swap and remove: swap returned Swap(written=False, found=b'old')")
class ExpiredIsFound(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        there = self._values.get(key)
        swap = await super().swap(key, expected, value, ttl_ms, **how)
        return swap if swap.written or there is None else Swap(False, there[0])
