"""The sides of a comparison: bare commands, and ours on three levels. The peers are in ``peers``."""

import asyncio
import contextlib
import importlib.resources
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, ClassVar, Final, NamedTuple

import redis
import redis.asyncio
from benchmarks.figures import BARE, OURS
from benchmarks.harness import Call, blocking_concurrent, blocking_sequential, concurrent, fresh_keys, sequential

from asyncidem import ConfigurationError, Idempotency, MsgspecCodec, RedisStore, Replay, Store

LEASE: Final = 30
TTL: Final = 86_400

SMALL: Final[dict[str, Any]] = {"status": "charged", "order": "0000000042", "amount": 1250}
"""The result of a small operation."""


def large(size: int) -> dict[str, Any]:
    """Return a result of about ``size`` bytes of JSON: what an API returns as a list of items."""
    item = {"id": 1_000_001, "name": "An item of some length", "price": 1299, "stock": True, "tags": ["new", "sale"]}
    return {"items": [{**item, "id": 1_000_001 + n} for n in range(size // (len(json.dumps(item)) + 2))]}


class Target(NamedTuple):
    """Where the server is."""

    url: str
    cluster: bool = False

    def client(self, connections: int | None = None) -> Any:
        """Return a ``redis.asyncio`` client as redis-py makes it, with room for so many connections."""
        options: dict[str, Any] = {} if connections is None else {"max_connections": max(connections, 1)}
        if self.cluster:
            return redis.asyncio.RedisCluster.from_url(self.url, **options)
        return redis.asyncio.Redis.from_url(self.url, **options)


class Calls(NamedTuple):
    """What is timed: a first call and a replay of a key, with everything that belongs to them."""

    first: Call
    replay: Call


class Templates(NamedTuple):
    """The bytes of our own records of a result: what bare commands carry, so that they carry the same."""

    running: bytes
    completed: bytes
    fence: bytes
    text: str


class Side(ABC):
    """Something that makes operations safe to retry, or sends the commands that this takes."""

    name: str

    @abstractmethod
    async def open(self, target: Target, tasks: int) -> None:
        """Connect for so many tasks at once."""

    @abstractmethod
    def calls(self, result: dict[str, Any]) -> Calls:
        """Return the calls whose operation does nothing but return ``result``."""

    @abstractmethod
    async def close(self) -> None:
        """Close what ``open`` opened."""

    async def sequential(self, call: Call, keys: Sequence[str]) -> dict[str, float]:
        """Time calls one after the other."""
        return await sequential(call, keys)

    async def concurrent(self, call: Call, keys: Sequence[str], tasks: int) -> dict[str, float]:
        """Time calls in many tasks."""
        return await concurrent(call, keys, tasks)


class BlockingSide(Side):
    """A side whose calls block; threads stand in for tasks."""

    async def sequential(self, call: Any, keys: Sequence[str]) -> dict[str, float]:
        """Time calls one after the other."""
        return blocking_sequential(call, keys)

    async def concurrent(self, call: Any, keys: Sequence[str], tasks: int) -> dict[str, float]:
        """Time calls in many threads."""
        return blocking_concurrent(call, keys, tasks)


async def templates(target: Target, result: Any) -> Templates:
    """Let an operation of ours run, and return the bytes of its record while it ran and after it."""
    client = target.client()
    store = RedisStore.from_url(target.url, prefix="", cluster=target.cluster)
    (key,) = fresh_keys(1, "template")

    try:
        idem = Idempotency(store, lease=LEASE, ttl=TTL)
        async with idem.operation(key) as op:
            running = await client.get(key)
            op.set_result(result)
        completed = await client.get(key)
        await client.delete(key)
    finally:
        await store.aclose()
        await client.aclose()
    fence = running[: running.index(b'"INPROGRESS"') + len(b'"INPROGRESS"')]
    return Templates(running, completed, fence, json.loads(completed)["data"])


class Bare(Side):
    """The two commands of a first call and the one of a replay, one at a time, over a client as redis-py makes it.

    Its records have the bytes of ours, made beforehand. With a large result it also encodes or decodes the JSON once,
    as any client must.
    """

    name = BARE

    def __init__(self, records: Callable[[Any], Templates]) -> None:
        """Take where the records of a result come from."""
        self._records = records
        self._script = (importlib.resources.files("asyncidem") / "stores" / "lua" / "swap.lua").read_text()

    async def open(self, target: Target, tasks: int) -> None:
        """Open as many connections as there are tasks, and load the script."""
        self._client = target.client(tasks)
        await self._client.get("warm")  # a cluster client learns where everything is
        # All are under way before the first is answered, so each opens a connection of its own.
        await asyncio.gather(*(self._client.get("warm") for _ in range(tasks)))
        self._sha = await self._client.script_load(self._script)

    def calls(self, result: dict[str, Any]) -> Calls:
        """Return the commands with records of the bytes that ours have for ``result``."""
        client, sha, ttl_ms = self._client, self._sha, TTL * 1000
        running, completed, fence, text = self._records(result)
        command, coded = client.execute_command, len(text) > 1024

        async def first(key: str) -> None:
            found = await command("SET", key, running, "NX", "GET", "PX", ttl_ms, get=True)
            assert found is None
            if coded:
                json.dumps(result)
            reply = await command("EVALSHA", sha, 1, key, fence, completed, ttl_ms, "0", "1", "")
            assert reply == [1]

        async def replay(key: str) -> Any:
            found = await command("SET", key, running, "NX", "GET", "PX", ttl_ms, get=True)
            assert found is not None
            return json.loads(text) if coded else None

        return Calls(first, replay)

    async def close(self) -> None:
        """Close the client."""
        await self._client.aclose()


class Ours(Side):
    """What our levels share: a store with a client of its own, made from the URL."""

    options: ClassVar[dict[str, Any]] = {}

    async def open(self, target: Target, tasks: int) -> None:
        """Make the store."""
        self.store: Store = RedisStore.from_url(target.url, cluster=target.cluster, **self.options)

    async def close(self) -> None:
        """Close the store."""
        await self.store.aclose()

    def idempotency(self, **options: Any) -> Idempotency:
        """Return an ``Idempotency`` over the store."""
        return Idempotency(self.store, lease=LEASE, ttl=TTL, **options)


class Decorated(Ours):
    """The complete engine, through the decorator: the goals are judged on it."""

    name = OURS

    def calls(self, result: dict[str, Any]) -> Calls:
        """Return the decorated function, for the first call and the replay alike."""

        async def charge(order: str) -> dict[str, Any]:
            return result

        # A name of its own for each: a second function of one name is warned about.
        decorated = self.idempotency().idempotent(key="order", name=f"bench{id(charge):x}")(charge)
        return Calls(decorated, decorated)


class Msgspec(Decorated):
    """The same with the faster codec, which is an extra: for large results."""

    name = "asyncidem, MsgspecCodec"

    def idempotency(self, **options: Any) -> Idempotency:
        """Return an ``Idempotency`` with that codec."""
        return super().idempotency(codec=MsgspecCodec(), **options)


class Plain(Decorated):
    """The same without the multiplexed connection."""

    name = "asyncidem, multiplex=False"
    options: ClassVar[dict[str, Any]] = {"multiplex": False}


class Run(Ours):
    """The complete engine, through ``idem.run``."""

    name = "asyncidem, run"

    def calls(self, result: dict[str, Any]) -> Calls:
        """Return the call form."""
        run = self.idempotency().run

        async def charge() -> dict[str, Any]:
            return result

        def call(key: str) -> Any:
            return run(key, charge)

        return Calls(call, call)


class Direct(Ours):
    """The store awaited directly, without the engine: ``claim`` and ``complete``."""

    name = "asyncidem, store"

    def calls(self, result: dict[str, Any]) -> Calls:
        """Return the calls; a large result is encoded and decoded once, as the engine does."""
        store, text = self.store, json.dumps(result)
        coded = len(text) > 1024

        async def first(key: str) -> None:
            claim: Any = await store.claim(key, lease=LEASE, ttl=TTL)
            await store.complete(claim, json.dumps(result) if coded else text, ttl=TTL)

        async def replay(key: str) -> Any:
            outcome = await store.claim(key, lease=LEASE, ttl=TTL)
            assert isinstance(outcome, Replay)
            return json.loads(outcome.record.data or "") if coded else None

        return Calls(first, replay)


def takes_plain_path(target: Target) -> bool:
    """Say whether ``RedisStore`` has a plain path that can be asked for."""
    try:
        RedisStore.from_url(target.url, multiplex=False)
    except ConfigurationError:
        return False
    return True


async def bare_for(target: Target, *results: Any) -> Bare:
    """Return a bare side that knows the records of these results."""
    known = [(result, await templates(target, result)) for result in results]
    return Bare(lambda result: next(records for other, records in known if other is result))


@contextlib.asynccontextmanager
async def opened(sides: Sequence[Side], target: Target, tasks: int) -> AsyncIterator[list[tuple[Side, str | None]]]:
    """Open all sides; a peer that cannot be opened comes with the reason."""
    states: list[tuple[Side, str | None]] = []
    async with contextlib.AsyncExitStack() as stack:
        for side in sides:
            try:
                await side.open(target, tasks)
            except Exception as error:
                if isinstance(side, Bare | Decorated):
                    raise
                states.append((side, f"{type(error).__name__}: {error}"[:200]))
            else:
                stack.push_async_callback(side.close)
                states.append((side, None))
        yield states
