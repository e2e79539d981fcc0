"""Every kind of store, each with a back door to its bytes, so that one suite can hold them all to one contract."""

import asyncio
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

import redis.asyncio
from fakeredis.aioredis import FakeRedis

from asyncidem import Claimed, MemoryStore, RedisStore, Store

PREFIX: Final = "t:"
"""The prefix of all stores here; back doors take keys without it."""

HOUR: Final = 3_600_000

Client: TypeAlias = redis.asyncio.Redis | redis.asyncio.RedisCluster

CLUSTERS: Final = ("cluster", "cluster-plain")
SERVERS: Final = ("valkey", "redis", "redis-8", "redis-6", "valkey-plain", *CLUSTERS)
FAKES: Final = ("decoded", "fake", "fake-without-lua", "fake-6.2")
CLIENTS: Final = ("client", "client-without-pttl")
GUARDED: Final = ("fake-without-lua", *CLIENTS)
PATIENT: Final[dict[str, Any]] = {"timeout": 30}
"""A lock serves one after the other: fifty at once may need longer than 5 s where the machine is busy."""
OLD: Final = ("redis-6", "fake-6.2")
KINDS: Final = ("memory", *SERVERS, *FAKES, *CLIENTS)
"""
redis: 7.0, where it is Debian's; redis-8: 8.2; redis-6: 6.2, which refuses SET with NX and GET (script mode);
valkey-plain, cluster-plain: with `multiplex=False`; decoded: over a client with `decode_responses=True`; fake: fakeredis;
fake-without-lua: it knows no scripts (lock mode); fake-6.2: it is as old as redis-6; client: a user's own with only
`get`, `set`, `delete` and `pttl`.
"""

TWINS: Final = ("valkey-plain", "cluster-plain", "decoded", "fake-6.2")
"""Their commands go another way than those of a kind that is beside them, valkey, cluster and redis-6: they are held to
the contract of the primitives. What stands on the primitives never learns the difference.
"""

WANTED: Final = frozenset(os.environ.get("ASYNCIDEM_TEST_KINDS", ",".join(KINDS)).split(","))
"""The kinds of this run: one interpreter runs them all, and the others need not repeat what only servers differ in."""


class Subject(ABC):
    """A store under test, and what others may do to its data.

    `ages` tells whether the store knows how old a record is; without, it goes by the client's wall clock.
    """

    ages = True

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.stores: list[Store] = []
        self.store = self.another()

    @property
    def guarded(self) -> bool:
        """Whether its writes are guarded by the lock of the takeovers."""
        return self.kind in GUARDED

    def another(self, **options: Any) -> Store:
        """Return one more store over the same data, as another worker would have it."""
        options.setdefault("prefix", PREFIX)
        store = self.make(**options)
        self.stores.append(store)
        return store

    async def aclose(self) -> None:
        """Close all stores."""
        for store in self.stores:
            await store.aclose()

    async def claimed(self, key: str = "k", **options: Any) -> Claimed:
        """Claim a key that must be free for it."""
        claim = await self.store.claim(key, **options)
        assert isinstance(claim, Claimed), claim
        return claim

    async def orphan(self, key: str = "k", **options: Any) -> Claimed:
        """Claim a key for 30 seconds (or `lease`), and let the lease go by."""
        claim = await self.claimed(key, **options)
        await self.age(key, claim._lease_ms + 1000)
        return claim

    async def record(self, key: str = "k") -> bytes:
        """Return the bytes of a record that must be there."""
        value = await self.raw(key)
        assert value is not None
        return value

    async def age(self, key: str, ms: int) -> None:
        """Make what is under the key so many milliseconds older."""
        left = await self.left(key)
        assert left is not None
        await self.expire(key, left - ms)

    @abstractmethod
    def make(self, **options: Any) -> Store:
        """Make a store."""

    @abstractmethod
    async def raw(self, key: str) -> bytes | None:
        """Return the stored bytes."""

    @abstractmethod
    async def left(self, key: str) -> int | None:
        """Return the milliseconds that they have left; None if there are none, or without expiry."""

    @abstractmethod
    async def write(self, key: str, value: bytes, px: int | None = HOUR) -> None:
        """Write bytes as somebody who asks nobody; `px` None: without expiry."""

    @abstractmethod
    async def expire(self, key: str, px: int) -> None:
        """Set what the key has left."""

    @abstractmethod
    async def drop(self, key: str) -> None:
        """Delete the key as a flush does."""


class MemorySubject(Subject):
    """`MemoryStore`; another one shares its data."""

    def make(self, **options: Any) -> MemoryStore:
        store = MemoryStore(**options)
        if self.stores:
            first = self.stores[0]
            assert isinstance(first, MemoryStore)
            store._lock, store._values, store._expiries = first._lock, first._values, first._expiries
        return store

    @property
    def values(self) -> dict[str, tuple[bytes, float]]:
        assert isinstance(self.store, MemoryStore)
        return self.store._values

    async def raw(self, key: str) -> bytes | None:
        found = self.values.get(PREFIX + key)
        return None if found is None else found[0]

    async def left(self, key: str) -> int | None:
        found = self.values.get(PREFIX + key)
        return None if found is None else int((found[1] - time.monotonic()) * 1000)

    async def write(self, key: str, value: bytes, px: int | None = HOUR) -> None:
        assert px is not None, "nothing lives for ever in memory"
        self.values[PREFIX + key] = (value, time.monotonic() + px / 1000)

    async def expire(self, key: str, px: int) -> None:
        self.values[PREFIX + key] = (await self.record(key), time.monotonic() + px / 1000)

    async def drop(self, key: str) -> None:
        self.values.pop(PREFIX + key, None)


class RedisSubject(Subject):
    """`RedisStore`, over clients that `make_client` makes of the same data; `url` makes it own them."""

    def __init__(self, kind: str, make_client: Callable[..., Client], url: str | None = None, **options: Any) -> None:
        self.client = make_client()
        self.owned: list[Client] = [self.client]
        self.make_client, self.options, self.url = make_client, options, url
        super().__init__(kind)

    def make(self, **options: Any) -> RedisStore:
        if self.url is not None:
            options.setdefault("multiplex", not self.kind.endswith("-plain"))
            return RedisStore.from_url(self.url, cluster=self.kind in CLUSTERS, **options)
        client = self.make_client(**self.options)
        self.owned.append(client)
        return RedisStore(client, **(PATIENT if self.kind in GUARDED else {}) | options)

    async def aclose(self) -> None:
        await super().aclose()
        for client in self.owned:
            await client.aclose()

    async def raw(self, key: str) -> bytes | None:
        value = await self.client.get(PREFIX + key)
        assert not isinstance(value, str)
        return value

    async def left(self, key: str) -> int | None:
        left: int = await self.client.pttl(PREFIX + key)
        return None if left < 0 else left

    async def write(self, key: str, value: bytes, px: int | None = HOUR) -> None:
        await self.client.set(PREFIX + key, value, px=px)

    async def expire(self, key: str, px: int) -> None:
        await self.client.pexpire(PREFIX + key, px)

    async def drop(self, key: str) -> None:
        await self.client.delete(PREFIX + key)


class PlainClient:
    """A user's own client: three methods over a dict, each with turns of the loop around it for others to come in."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[bytes, float | None]] = {}
        self.calls = 0

    def find(self, name: str) -> tuple[bytes, float | None] | None:
        found = self.values.get(name)
        return None if found is None or (found[1] is not None and found[1] <= time.monotonic()) else found

    async def turn(self, step: Callable[[], Any]) -> Any:
        self.calls += 1
        await asyncio.sleep(0)
        result = step()
        await asyncio.sleep(0)
        return result

    async def get(self, name: str) -> bytes | None:
        found = await self.turn(lambda: self.find(name))
        return None if found is None else found[0]

    async def set(self, name: str, value: bytes, *, px: int, nx: bool) -> bool:
        assert isinstance(name, str)
        assert isinstance(value, bytes)
        assert isinstance(px, int)

        def step() -> bool:
            if nx and self.find(name) is not None:
                return False
            self.values[name] = (value, time.monotonic() + px / 1000)
            return True

        wrote: bool = await self.turn(step)
        return wrote

    async def delete(self, name: str) -> None:
        await self.turn(lambda: self.values.pop(name, None))


class PlainClientWithPttl(PlainClient):
    """The same with `pttl`, which says -2 and -1 as Redis does."""

    async def pttl(self, name: str) -> int:
        def step() -> int:
            found = self.find(name)
            if found is None:
                return -2
            return -1 if found[1] is None else int((found[1] - time.monotonic()) * 1000)

        left: int = await self.turn(step)
        return left


class TextClient(PlainClient):
    """The same without `pttl`, whose `get` returns text where it can, as clients that decode do."""

    async def get(self, name: str) -> Any:
        value = await super().get(name)
        try:
            return None if value is None else value.decode()
        except UnicodeDecodeError:
            return value


class PlainSubject(Subject):
    """`RedisStore` over a client that is no redis-py."""

    def __init__(self, kind: str, client: PlainClient) -> None:
        self.client = client
        self.ages = hasattr(client, "pttl")
        super().__init__(kind)

    def make(self, **options: Any) -> RedisStore:
        return RedisStore(self.client, **PATIENT | options)

    async def raw(self, key: str) -> bytes | None:
        found = self.client.find(PREFIX + key)
        return None if found is None else found[0]

    async def left(self, key: str) -> int | None:
        found = self.client.find(PREFIX + key)
        return None if found is None or found[1] is None else int((found[1] - time.monotonic()) * 1000)

    async def write(self, key: str, value: bytes, px: int | None = HOUR) -> None:
        self.client.values[PREFIX + key] = (value, None if px is None else time.monotonic() + px / 1000)

    async def expire(self, key: str, px: int) -> None:
        self.client.values[PREFIX + key] = (await self.record(key), time.monotonic() + px / 1000)

    async def drop(self, key: str) -> None:
        self.client.values.pop(PREFIX + key, None)

    async def age(self, key: str, ms: int) -> None:
        await super().age(key, ms)
        if not self.ages:  # its age is what the record says, on the wall clock
            value, expiry = self.client.values[PREFIX + key]
            self.client.values[PREFIX + key] = (bumped(value, -ms), expiry)


def bumped(value: bytes, ms: int) -> bytes:
    """Return a record in progress as its owner would renew it `ms` milliseconds later."""
    changed, count = re.subn(
        rb'"in_progress_expiration": (\d+)', lambda m: b'"in_progress_expiration": %d' % (int(m[1]) + ms), value
    )
    assert count == 1
    return changed


def unsettled_copy(claim: Claimed) -> Claimed:
    """Return a claim of the same token that is not settled with it: what a command of it that runs late would do."""
    return Claimed(claim.key, claim.owner, claim.attempt, claim._lease_ms, claim._lives_ms, claim._ttl_ms, None)


def before(store: Any, method: str, nth: int, act: Callable[[], Awaitable[object]]) -> list[Any]:
    """Let `act` happen just before the nth call of a primitive; the list that is returned has one entry per call."""
    real, calls = getattr(store, method), []

    async def wrapped(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == nth:
            await act()
        return await real(*args, **options)

    setattr(store, method, wrapped)
    return calls


def twice(store: Any, method: str, nth: int = 1) -> None:
    """Let the nth call of a primitive run twice, and only its second reply be seen: the first was lost."""
    real, calls = getattr(store, method), []

    async def wrapped(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == nth:
            await real(*args, **options)
        return await real(*args, **options)

    setattr(store, method, wrapped)


def make_subject(kind: str, url: str | None) -> Subject:
    """Make the subject of a kind; `url` is that of a server with no data where the kind needs one."""
    if kind == "memory":
        return MemorySubject(kind)
    if kind == "client":
        return PlainSubject(kind, PlainClientWithPttl())
    if kind == "client-without-pttl":
        return PlainSubject(kind, TextClient())
    if kind.startswith("fake"):
        from fakeredis import FakeServer

        server = FakeServer(version=(6, 2) if kind == "fake-6.2" else (7,))
        return RedisSubject(kind, lambda: FakeRedis(server=server))
    assert url is not None
    if kind in CLUSTERS:
        return RedisSubject(kind, lambda: redis.asyncio.RedisCluster.from_url(url), url=url)
    if kind == "decoded":
        return RedisSubject(kind, lambda **options: redis.asyncio.Redis.from_url(url, **options), decode_responses=True)
    return RedisSubject(kind, lambda: redis.asyncio.Redis.from_url(url), url=url)
