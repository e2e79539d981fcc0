"""Stores that each break the contract in one way: what they answer, what they raise, and how they are cancelled."""

import asyncio
import contextlib
from typing import Any

from asyncidem import StoreUnavailableError
from asyncidem.model import Stored, Swap

from stores.broken_stores import BROKEN, Base, reported

__all__ = ["BROKEN"]

# -- answers


@reported("put_if_absent changes nothing that is there: it returned None over b'theirs'")
class PutSaysNothing(Base):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        await super().put_if_absent(key, value, ttl_ms)
        return None


@reported("put_if_absent changes nothing that is there: it returned b'other' over b'theirs'")
class PutReturnsItsOwn(Base):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        found = await super().put_if_absent(key, value, ttl_ms)
        return None if found is None else value


@reported("put_if_absent writes where nothing is, for its ttl: put_if_absent of a new key returned b'mine', not None")
class PutReturnsWhatItWrote(Base):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        return await super().put_if_absent(key, value, ttl_ms) or value


@reported("put_if_absent changes nothing that is there: it returned 'theirs' over b'theirs'")
class PutDecodes(Base):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> Any:
        found = await super().put_if_absent(key, value, ttl_ms)
        return None if found is None else found.decode(errors="replace")


@reported("put_if_absent changes nothing that is there, be it empty: it returned None over b''")
class EmptyIsAbsent(Base):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        return await super().put_if_absent(key, value, ttl_ms) or None


@reported("put_or_read does what put_if_absent does: it returned b'mine' over b'mine', not a Stored")
class PutOrReadReturnsBytes(Base):
    async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Any:
        return await self.put_if_absent(key, value, ttl_ms)


@reported("put_or_read does what put_if_absent does: it returned b'other' over b'mine'")
class PutOrReadReturnsItsOwn(Base):
    async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        found = await super().put_or_read(key, value, ttl_ms)
        return None if found is None else Stored(value, ttl_ms)


@reported("read returned (b'mine', 60000), not a Stored or None")
class ReadReturnsATuple(Base):
    async def read(self, key: str) -> Any:
        stored = await super().read(key)
        return None if stored is None else tuple(stored)


@reported("swap where b'abc' is, of b'b', exact=False, or_absent=True: it found None, where b'abc' is")
class SwapFindsNothing(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return Swap((await super().swap(key, expected, value, ttl_ms, **how)).written)


@reported("swap where b'abc' is, of b'abc', exact=False, or_absent=False: it returned True, not a Swap")
class SwapReturnsBool(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Any:
        return (await super().swap(key, expected, value, ttl_ms, **how)).written


@reported("swap where b'abc' is, of b'abc', exact=False, or_absent=False: it returned Swap(written=False")
class SwapDeniesIt(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return Swap(False, (await super().swap(key, expected, value, ttl_ms, **how)).found)


@reported("remove where b'abc' is, of b'abc', exact=True: it returned 1, not True")
class RemoveCounts(Base):
    async def remove(self, key: str, expected: bytes, *, exact: bool) -> Any:
        return int(await super().remove(key, expected, exact=exact))


@reported("remove where None is, of b'', exact=False: it returned True, not False")
class RemoveAlwaysSaysYes(Base):
    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        await super().remove(key, expected, exact=exact)
        return True


@reported("a value stays what it is: no UTF-8")
class ValuesAreText(Base):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        return await super().put_if_absent(key, value.decode(errors="replace").encode(), ttl_ms)


@reported("a value stays what it is: ends of lines")
class ValuesAreStripped(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return await super().swap(key, expected.strip(), value.strip(), ttl_ms, **how)


@reported("a value stays what it is: 200 kB")
class ValuesAreCut(Base):
    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        return await super().put_if_absent(key, value[:65_535], ttl_ms)


# -- errors, cancellation, the whole


@reported("read finds nothing where nothing is: raised KeyError(")
class ReadRaises(Base):
    async def read(self, key: str) -> Stored | None:
        stored = await super().read(key)
        if stored is None:
            raise KeyError(key)
        return stored


@reported("remove where None is, of b'', exact=False: raised KeyError(")
class RemoveRaises(Base):
    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        if await self.value(key) is None:
            raise KeyError(key)
        return await super().remove(key, expected, exact=exact)


@reported("read can be cancelled: cancelled after 1 turns of the loop it returned Stored(value=b'old'")
class ReadSwallowsCancellation(Base):
    async def read(self, key: str) -> Stored | None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return await super().read(key)


@reported("swap can be cancelled: cancelled after 1 turns of the loop it raised StoreUnavailableError('cancelled')")
class SwapTranslatesCancellation(Base):
    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            raise StoreUnavailableError("cancelled") from None
        return await super().swap(key, expected, value, ttl_ms, **how)


@reported("put_if_absent can be cancelled: no answer within 0.05 s")
class CancellationKeepsTheLock(Base):
    busy = False

    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        while self.busy:
            await asyncio.sleep(0.001)
        self.busy = True
        await asyncio.sleep(0)
        self.busy = False
        return await super().put_if_absent(key, value, ttl_ms)


@reported("remove is atomic: raised CancelledError, and nobody had cancelled it")
class RemoveCancelsItself(Base):
    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        raise asyncio.CancelledError


@reported("read finds nothing where nothing is: no answer within 0.05 s")
class ReadHangs(Base):
    async def read(self, key: str) -> Stored | None:
        await asyncio.Event().wait()
        raise AssertionError


@reported("read finds nothing where nothing is: no answer within 0.05 s, nor an end when it was cancelled")
class ReadCannotBeEnded(Base):
    over: asyncio.Event

    async def read(self, key: str) -> Stored | None:
        while not self.over.is_set():
            try:
                await self.over.wait()
            except asyncio.CancelledError:
                continue
        return None


@reported("a key is claimed, completed, replayed, deleted and released: claim returned Claimed(")
class ClaimsOnlyOrphans(Base):
    async def claim(self, *args: Any, **options: Any) -> Any:
        claim = await super().claim(*args, **options)
        claim.attempt = 2  # type: ignore[union-attr]
        return claim


@reported("a key is claimed, completed, replayed, deleted and released: raised AttributeError(")
class TakesANameOfTheEngines(Base):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.format = "json"  # type: ignore[assignment]


@reported("one of many claims wins: of 8 claims 8 won")
class ForgetsKeys(Base):
    async def claim(self, key: str, **options: Any) -> Any:
        await asyncio.sleep(0)
        return await super().claim(key if len(options) > 2 else f"{key}:{id(options)}", **options)


@reported("an orphan is taken over, and its old owner fenced off: the owner that was replaced could complete")
class NoFence(Base):
    async def complete(self, *args: Any, **options: Any) -> None:
        try:
            await super().complete(*args, **options)
        except Exception:
            return


@reported("aclose: raised OSError('closed already')")
class CloseRaises(Base):
    async def aclose(self) -> None:
        await super().aclose()
        raise OSError("closed already")
