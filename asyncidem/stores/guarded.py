"""The four primitives over a client that offers only ``get``, ``set`` and ``delete``, guarded by a lock.

What a script does in one step here takes several, so every write holds ``<key>:lock``, the lock of the takeovers, whose
owner may pass. A value that is absent is written with NX; a read that shows another owner answers without the lock.
Cancellation is held off: a guarded write runs to its end in a task of its own. Two things remain that a server with
scripts does not have: a write that outlasts its lock, and a connection that breaks in the middle of one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, Final, Protocol, TypeVar

from ..errors import ConfigurationError, StoreError, StoreUnavailableError
from ..keys import is_lock, lock_of
from ..model import LEFT_UNKNOWN, LOCK_MS, Stored, Swap, lease_of, matches, owner_of
from .link import Link, Progress

__all__ = ["Guarded", "RedisClientProtocol"]

T = TypeVar("T")

LOCK_PAUSE: Final = 0.01


class RedisClientProtocol(Protocol):
    """Bring your own client: three coroutine methods, and ``pttl(name)`` if it has one.

    Without ``pttl`` the age of a lease is read from ``in_progress_expiration`` and this client's clock. Keys are text,
    values bytes; ``px`` is in milliseconds; ``set`` returns something true if it wrote. Any exception that a method
    raises is taken for an unknown outcome.
    """

    def get(self, name: str, /) -> Awaitable[bytes | str | None]:
        """Return the value, or None if there is none."""
        ...

    def set(self, name: str, value: bytes, /, *, px: int, nx: bool) -> Awaitable[object]:
        """Write the value for ``px`` milliseconds, with ``nx`` only if there is none."""
        ...

    def delete(self, name: str, /) -> Awaitable[object]:
        """Delete the key."""
        ...


class Guarded:
    """The primitives of :class:`~asyncidem.stores.primitives.Primitives` over a plain client.

    Args:
        client: a :class:`RedisClientProtocol`.
        link: what runs and repeats its commands.
    """

    def __init__(self, client: Any, link: Link) -> None:
        self._client = client
        self._link = link
        self.has_pttl = callable(getattr(client, "pttl", None))

    async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        """Write ``value`` if the key is absent, else return what is there and its time left."""
        return await self._detached(key, self._put, key, value, ttl_ms)

    async def read(self, key: str) -> Stored | None:
        """Return what is there and its time left."""
        return await self._detached(key, self._read, key)

    async def swap(
        self, key: str, expected: bytes, value: bytes, ttl_ms: int, *, exact: bool, or_absent: bool, left_ms: int | None
    ) -> Swap:
        """Compare and set under the lock."""
        swap = functools.partial(self._swap, exact=exact, or_absent=or_absent, left_ms=left_ms)
        return await self._detached(key, swap, key, expected, value, ttl_ms)

    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        """Compare and delete under the lock."""
        return await self._detached(key, functools.partial(self._remove, exact=exact), key, expected)

    async def _detached(self, key: str, work: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        return await self._link.detached(key, functools.partial(work, *args))

    async def _put(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        if (found := await self._read(key)) is not None:
            return found
        if is_lock(key):  # the lock itself needs no other
            return await self._write_absent(key, value, ttl_ms)
        async with self._locked(key, value, owner_of(value)):
            return await self._write_absent(key, value, ttl_ms)

    async def _write_absent(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        if await self._set(key, value, ttl_ms, nx=True):
            return None
        found = await self._read(key)
        # The reply of a SET NX that did write was lost, and its repetition found it: or the other one expired meanwhile.
        return Stored(value, ttl_ms) if found is None else found

    async def _swap(
        self, key: str, expected: bytes, value: bytes, ttl_ms: int, *, exact: bool, or_absent: bool, left_ms: int | None
    ) -> Swap:
        def fits(found: bytes | None) -> bool:
            return or_absent if found is None else matches(found, expected, exact=exact)

        if not fits(found := await self._get(key)):
            return Swap(False, found)
        # With the fence it is the owner who writes, in its own name or, when it gives a key back, in nobody's.
        async with self._locked(key, value, owner_of(value if exact else expected)):
            if not fits(found := await self._get(key)):
                return Swap(False, found)
            while found is None:
                if await self._set(key, value, ttl_ms, nx=True):
                    return Swap(True)
                # Ours, if the reply of a SET NX that did write was lost; if what refused it is gone, it is asked again.
                found = await self._get(key)
                if found is not None:
                    return Swap(found == value, found)
            if left_ms is not None and self.has_pttl and (await self._left(key) or 0) > left_ms:
                return Swap(False, found)
            await self._set(key, value, ttl_ms, nx=False)
            return Swap(True)

    async def _remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        if not matches(await self._get(key), expected, exact=exact):
            return False
        if is_lock(key):
            await self._delete(key)
            return True
        async with self._locked(key, expected, owner_of(expected)):
            if not matches(await self._get(key), expected, exact=exact):
                return False
            await self._delete(key)
            return True

    @contextlib.asynccontextmanager
    async def _locked(self, key: str, record: bytes, owner: str | None) -> AsyncGenerator[None]:
        """Hold the key's lock in the name of the owner that writes, who may have it already from its takeover."""
        token = (owner or os.urandom(16).hex()).encode()
        lock_ms = min(LOCK_MS, lease_of(record) or LOCK_MS)
        held: bytes | None = None
        while not await self._set(lock_of(key), token, lock_ms, nx=True):
            held = await self._get(lock_of(key))
            if held == token:
                break
            if held is not None:  # gone between the two, it was another's, and is asked for again
                await self._link.pause(LOCK_PAUSE, f"the lock {lock_of(key)!r} stays taken")
        try:
            yield
        except StoreUnavailableError as error:
            error.outcome_unknown = True  # a write whose reply was lost may have been answered by its repetition
            raise
        finally:
            if held != token:
                # What was written stands, whatever becomes of the lock, which expires by itself.
                with contextlib.suppress(StoreError):
                    if await self._get(lock_of(key)) == token:
                        await self._delete(lock_of(key))

    async def _read(self, key: str) -> Stored | None:
        value = await self._get(key)
        if value is None:
            return None
        return Stored(value, await self._left(key) if self.has_pttl else LEFT_UNKNOWN)

    async def _left(self, key: str) -> Any:
        left = await self._step("pttl", key)
        if left == -2:
            return 0
        return None if left == -1 else left

    async def _get(self, key: str) -> bytes | None:
        value = await self._step("get", key)
        return value.encode() if isinstance(value, str) else value

    async def _set(self, key: str, value: bytes, px: int, *, nx: bool) -> bool:
        return bool(await self._step("set", key, value, px=px, nx=nx))

    async def _delete(self, key: str) -> None:
        await self._step("delete", key)

    async def _step(self, method: str, *args: Any, **options: Any) -> Any:
        async def send(progress: Progress) -> Any:
            progress.sent = True
            reply = getattr(self._client, method)(*args, **options)
            if not inspect.isawaitable(reply):
                raise ConfigurationError(f"{type(self._client).__name__}.{method} must be a coroutine method")
            return await reply

        return await self._link.step(send)
