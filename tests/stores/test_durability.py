"""What `wait_replicas` promises, on masters with a replica that may be cut off, frozen or promoted."""

import asyncio
import contextlib
import functools
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from fakeredis import _commands
from fakeredis.aioredis import FakeRedis
from redis.asyncio import Redis

from asyncidem import (
    Claimed,
    CompletionError,
    ConfigurationError,
    Event,
    Idempotency,
    InProgress,
    RedisStore,
    Replay,
    State,
    StoreUnavailableError,
)

from conftest import ServerFactory, StoreFactory, require
from servers import BINARIES, HOST, Cluster, Server
from stores.stores_under_test import WANTED, PlainClient

pytestmark = pytest.mark.once

PREFIX = "asyncidem:"
TIMEOUT = 1.5
"""Seconds for a store call: a server may then wait 300 ms for its replicas, and be late by 100."""

AT_ONCE = ("--repl-diskless-sync-delay", "0")
"""A master that does not wait for more replicas before it brings the first into step."""

Pair = tuple[Server, Server]


async def in_step(master: Server, replicas: int = 1) -> None:
    """Return once so many replicas follow; their link is said to be up before the stream is."""
    async with Redis.from_url(master.url) as client:
        while True:
            await client.set("in-step", 1)
            if await client.wait(replicas, 1000) == replicas:
                return


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Pair]]:
    """Masters with a replica each, of the kind that is asked for."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(kind: str) -> Pair:
            directory = tmp_path_factory.mktemp(f"pair-{kind}")
            master = stack.enter_context(Server(kind, directory / "master", *AT_ONCE))
            following = ("--replicaof", HOST, str(master.port))
            return master, stack.enter_context(Server(kind, directory / "replica", *following))

        yield start


@pytest.fixture
async def pair(request: pytest.FixtureRequest, pair_of: Callable[[str], Pair]) -> AsyncIterator[Pair]:
    """A master and its replica, in step and with no data of other tests: freeze the replica, but do no other harm."""
    master, replica = pair_of(require(*getattr(request, "param", BINARIES)))
    master.reset()
    await in_step(master)
    assert master.command("CONFIG", "RESETSTAT") == "+OK"
    yield master, replica
    replica.resume()


EACH = [kind for kind in BINARIES if kind in WANTED]
each_pair = pytest.mark.parametrize("pair", [[kind] for kind in EACH], ids=EACH, indirect=True)
"""One test on every kind of server: they differ in what WAIT takes for a connection's own writes."""


@pytest.fixture
async def store(pair: Pair, store_at: StoreFactory) -> AsyncIterator[RedisStore]:
    """A store that wants the replica to have what it writes."""
    async with store_at(pair[0].url, wait_replicas=1, timeout=TIMEOUT) as store:
        yield store


async def get(server: Server, key: str = "k") -> Any:
    """Return what a server has under a key."""
    async with Redis.from_url(server.url) as client:
        return await client.get(PREFIX + key)


def waits(server: Server) -> int:
    """Return how often a server was told to wait since the last reset."""
    found = re.search(r"cmdstat_wait:calls=(\d+)", server.text("INFO", "commandstats"))
    return 0 if found is None else int(found[1])


async def until(condition: Any) -> None:
    """Return once an awaitable condition holds."""
    while not await condition():
        await asyncio.sleep(0.005)


async def test_two_winners(private_server: ServerFactory) -> None:
    """A failover that loses a claim gives it a second owner; with `wait_replicas` there never is a first.

    On both paths: 'risky' is claimed without, 'safe' with it.
    """
    master = private_server(*AT_ONCE)
    replica = private_server("--replicaof", HOST, str(master.port))
    await in_step(master)
    replica.command("REPLICAOF", "NO", "ONE")
    for multiplex in (True, False):
        options: dict[str, Any] = {"multiplex": multiplex, "timeout": TIMEOUT, "prefix": f"{multiplex}:"}
        async with RedisStore.from_url(master.url, **options) as store:
            assert isinstance(await store.claim("risky"), Claimed)
        async with RedisStore.from_url(master.url, wait_replicas=1, **options) as store:
            with pytest.raises(StoreUnavailableError, match="0 of 1 replicas"):
                await store.claim("safe")
            assert await store.get("safe") is None
    master.kill()
    for multiplex in (True, False):
        async with RedisStore.from_url(replica.url, multiplex=multiplex, prefix=f"{multiplex}:") as store:
            assert isinstance(await store.claim("risky"), Claimed), "the second winner"
            assert isinstance(await store.claim("safe"), Claimed), "the only one"


@each_pair
async def test_what_counts_is_on_the_replica(store: RedisStore, pair: Pair) -> None:
    """When a claim, a renewal, a completion or a takeover returns, the replica has its bytes."""
    master, replica = pair
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    seen = [await get(replica)]
    await store.renew(claim)
    seen.append(await get(replica))
    await store.complete(claim, "1")
    seen.append(await get(replica))
    assert len({*seen, None}) == 4
    assert seen[-1] == await get(master)
    assert isinstance(await store.claim("k"), Replay)
    await store.claim("other", lease=30, ttl=3600)
    async with Redis.from_url(master.url) as client:
        await client.pexpire(PREFIX + "other", 3_569_000)
    assert waits(master) == 4
    taken = await store.claim("other")
    assert isinstance(taken, Claimed)
    assert taken.attempt == 2
    assert taken.owner.encode() in await get(replica, "other")
    assert waits(master) == 5, "its lock waits for nobody"


async def test_waiting_changes_nothing(store: RedisStore, pair: Pair) -> None:
    """The record is as it would be without replicas, its bytes and its time left."""
    await store.claim("k", ttl=60)
    async with Redis.from_url(pair[0].url) as client:
        assert 59_000 < await client.pttl(PREFIX + "k") <= 60_000


async def test_more_than_there_are(pair: Pair, store_at: StoreFactory) -> None:
    """With fewer replicas than asked for, a claim is undone, and its error says how many there were and what to do."""
    ran: list[int] = []

    async def effect() -> None:
        ran.append(1)

    async with store_at(pair[0].url, wait_replicas=3, timeout=TIMEOUT) as store:
        idem = Idempotency(store)
        for call in (lambda: store.claim("k"), lambda: idem.run("k", effect)):  # by a script, and without one
            with pytest.raises(
                StoreUnavailableError,
                match=r"^1 of 3 replicas .* within (29\d|300) ms; connect as many, or lower wait_replicas$",
            ):
                await call()
            assert await get(pair[0]) is None  # already, so that a caller may try again at once
            assert not store._background
    assert not ran


async def test_a_record_that_is_there_is_answered_without_replicas(store: RedisStore, pair: Pair) -> None:
    """While the replica is away, replays, conflicts and reads are as quick as ever; only what writes is refused."""
    claim = await store.claim("done")
    assert isinstance(claim, Claimed)
    await store.complete(claim, "1")
    await store.claim("running")
    pair[1].pause()
    writing = asyncio.create_task(store.claim("k"))
    await until(lambda: store.get("k"))  # the master has it, and the replicas are waited for
    for _ in range(5):
        assert isinstance(await store.claim("done"), Replay)
        assert isinstance(await store.claim("running"), InProgress)
        assert isinstance(await store.claim("k"), InProgress)
    assert not writing.done(), "the connection of all others was blocked as long as this one"
    with pytest.raises(StoreUnavailableError, match="0 of 1"):
        await writing


async def test_cancelled_while_replicas_are_waited_for(pair: Pair, store_at: StoreFactory) -> None:
    """A caller who is cancelled there leaves no key behind, and neither it nor its undo waits for the replicas."""
    pair[1].pause()
    async with store_at(pair[0].url, wait_replicas=1) as store, RedisStore.from_url(pair[0].url) as other:
        claiming = asyncio.create_task(store.claim("k"))
        await until(lambda: other.get("k"))
        claiming.cancel()
        await asyncio.wait((claiming,))  # within 0.5 s, where the replicas are waited for twice as long
        assert claiming.cancelled()
        assert await other.get("k") is None
        pair[1].resume()
        assert isinstance(await store.claim("k"), Claimed)


async def test_completion_is_reported_and_repeated(store: RedisStore, pair: Pair) -> None:
    """A completion that the replica does not get is reported, and repeated until it has it."""
    events: list[Event] = []
    idem = Idempotency(store, hooks=[events.append])

    async def effect() -> str:
        pair[1].pause()
        return "paid"

    assert await idem.run("k", effect) == "paid"
    assert [event.name for event in events] == ["claimed", "completion_failed"]
    record = await store.get("k")
    assert record is not None
    assert record.state is State.COMPLETED, "duplicates see what the replica does not have yet"
    assert store._background
    pair[1].resume()
    await asyncio.wait_for(asyncio.gather(*store._background), 10)
    assert await get(pair[1]) == await get(pair[0])


async def test_completion_error(store: RedisStore, pair: Pair) -> None:
    """With `on_completion_error="raise"` the caller is told, and has its value."""

    async def effect() -> str:
        pair[1].pause()
        return "paid"

    with pytest.raises(CompletionError) as raised:
        await Idempotency(store, on_completion_error="raise").run("k", effect)
    assert raised.value.result == "paid"
    assert "0 of 1 replicas" in str(raised.value.__cause__)
    pair[1].resume()


@each_pair
async def test_repeated_completion_counts_no_sooner(store: RedisStore, pair: Pair) -> None:
    """A completion that finds itself there has written nothing, and still waits for the replica."""
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    pair[1].pause()
    for _ in range(2):
        with pytest.raises(StoreUnavailableError, match="0 of 1 replicas"):
            await store.complete(claim, "1")
    pair[1].resume()
    await store.complete(claim, "1")
    assert await get(pair[1]) == await get(pair[0])


async def test_renewal_counts_when_the_replica_has_it(store: RedisStore, pair: Pair) -> None:
    """A renewal that the replica does not get has not prolonged the lease that its owner counts on."""
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    deadline = claim._deadline
    pair[1].pause()
    with pytest.raises(StoreUnavailableError, match="0 of 1 replicas"):
        await store.renew(claim)
    assert claim._deadline == deadline
    pair[1].resume()
    await store.renew(claim)
    assert claim._deadline > deadline


async def test_takeover_is_undone(store: RedisStore, pair: Pair) -> None:
    """A takeover that the replica does not get is put back as the orphan it was, free for the next at once."""
    await store.claim("k", lease=30, ttl=3600)
    async with Redis.from_url(pair[0].url) as client:
        await client.pexpire(PREFIX + "k", 3_569_000)
        pair[1].pause()
        with pytest.raises(StoreUnavailableError, match="0 of 1 replicas"):
            await store.claim("k")
        assert await client.get(PREFIX + "k:lock") is None
    pair[1].resume()
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    assert claim.attempt == 2


async def test_release_waits_for_nobody(store: RedisStore, pair: Pair) -> None:
    """A release does not wait: lost, it costs a lease."""
    claims = [await store.claim("first")]
    await store.claim("k", lease=30, ttl=3600)
    async with Redis.from_url(pair[0].url) as client:
        await client.pexpire(PREFIX + "k", 3_569_000)
    claims.append(await store.claim("k"))
    pair[1].pause()
    for attempt, claim in enumerate(claims, 1):
        assert isinstance(claim, Claimed)
        assert claim.attempt == attempt
        await store.release(claim)
    assert await get(pair[0], "first") is None
    assert b'"lease": 0' in await get(pair[0])


async def test_cluster(cluster: Cluster, store_at: StoreFactory) -> None:
    """On a cluster it is the master of the key's slot whose replicas are asked."""
    cluster.reset()
    async with store_at(cluster.url, cluster=True, wait_replicas=1) as store:
        for number in range(12):
            claim = await store.claim(f"k{number}")
            assert isinstance(claim, Claimed)
            await store.complete(claim, str(number))
    async with store_at(cluster.url, cluster=True, wait_replicas=2, timeout=TIMEOUT) as store:
        for number in range(3):
            with pytest.raises(StoreUnavailableError, match="1 of 2 replicas"):
                await store.claim(f"n{number}")
            assert await store.get(f"n{number}") is None


async def test_without_wait() -> None:
    """A server that knows no WAIT is a mistake of configuration; the claim that shows it is undone."""
    async with FakeRedis() as client, RedisStore(client, wait_replicas=1) as store:
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="needs a server that knows WAIT"):
                await store.claim("k")
            assert await client.get(PREFIX + "k") is None


async def test_without_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that runs no scripts is refused before anything is written."""
    for name in ("eval", "evalsha"):
        monkeypatch.delitem(_commands.SUPPORTED_COMMANDS, name)
    async with FakeRedis() as client, RedisStore(client, wait_replicas=1) as store:
        with pytest.raises(ConfigurationError, match="needs Redis or Valkey with scripts: the server runs no scripts"):
            await store.claim("k")
        assert await client.keys() == []


def test_client_that_cannot_wait() -> None:
    """A client with no more than `get`, `set` and `delete` is refused at construction."""
    RedisStore(PlainClient())
    with pytest.raises(ConfigurationError, match=r"needs Redis or Valkey with scripts: PlainClient is no client of"):
        RedisStore(PlainClient(), wait_replicas=1)


@pytest.mark.parametrize("count", [-1, True, 1.0, "1", None])
def test_no_number_of_replicas(count: Any) -> None:
    """What is no number of replicas is refused, and named."""
    with pytest.raises(ConfigurationError, match=f"wait_replicas must be .*, not {count!r}"):
        RedisStore.from_url("redis://localhost", wait_replicas=count)


async def test_a_user_who_may_not_wait(pair: Pair, store_at: StoreFactory) -> None:
    """A user who may not WAIT gets an error that says so, on a claim that is undone."""
    pair[0].command("ACL", "SETUSER", "worker", "reset", "on", ">secret", "~*", "+@all", "-wait")
    async with store_at(pair[0].url, username="worker", password="secret", wait_replicas=1) as store:
        with pytest.raises(StoreUnavailableError, match=r"not confirmed by replicas: .* with wait_replicas WAIT and"):
            await store.claim("k")
        assert await get(pair[0]) is None


@pytest.mark.parametrize("left", [None, b"another value"])
async def test_what_the_master_lost_is_not_confirmed(store: RedisStore, pair: Pair, left: bytes | None) -> None:
    """A write that is gone when the replicas are to confirm it, as after a failover, does not count."""
    await store.claim("before")
    assert store._replicas is not None
    async with Redis.from_url(pair[0].url) as client:
        if left is not None:
            await client.set(PREFIX + "k", left, px=60_000)
        with pytest.raises(StoreUnavailableError, match="replaced, or lost with its master"):
            await store._replicas.confirm(PREFIX + "k", b"what was written")
        assert await client.get(PREFIX + "k") == left


async def test_what_never_expires_is_left_alone(store: RedisStore, pair: Pair) -> None:
    """A key whose expiry somebody took away is not confirmed, and not deleted by writing its time left."""
    assert store._replicas is not None
    async with Redis.from_url(pair[0].url) as client:
        await client.set(PREFIX + "k", b"value")
        with pytest.raises(StoreUnavailableError):
            await store._replicas.confirm(PREFIX + "k", b"value")
        assert await client.get(PREFIX + "k") == b"value"


async def test_large_result(store: RedisStore, pair: Pair) -> None:
    """A large result, which has a connection of its own, counts when the replica has it."""
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    await store.complete(claim, "x" * 200_000)
    assert await get(pair[1]) == await get(pair[0])


async def test_local_cache(store: RedisStore, pair: Pair) -> None:
    """A claim that also asks for a replay's time left counts when the replica has it, too."""
    idem = Idempotency(store, local_cache=8)
    await idem.run("before", asyncio.sleep, 0)

    pair[1].pause()
    with pytest.raises(StoreUnavailableError, match="0 of 1 replicas"):
        await idem.run("k", asyncio.sleep, 0)
    assert await get(pair[0]) is None


def test_next_loop(pair_of: Callable[[str], Pair], multiplex: bool) -> None:
    """A store waits for replicas on its second event loop as on its first."""
    master, _ = pair_of(require(*BINARIES))
    master.reset()
    asyncio.run(in_step(master))
    store = RedisStore.from_url(master.url, wait_replicas=1, multiplex=multiplex)

    async def call(key: str) -> None:
        assert isinstance(await store.claim(key), Claimed)
        await store.aclose()

    for key in ("first", "second"):
        asyncio.run(call(key))
