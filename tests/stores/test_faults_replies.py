"""Replies that are lost or late, and commands that the server runs late, change nothing: one owner, one execution."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from asyncidem import (
    Claimed,
    Idempotency,
    InProgress,
    LeaseLostError,
    RedisStore,
    Replay,
    State,
    StoreUnavailableError,
)

from conftest import StoreFactory
from proxy import Proxy
from servers import HOST, Server

KEY = "asyncidem:k"
SET, GET, EVALSHA = (b"\r\n%s\r\n" % name for name in (b"SET", b"GET", b"EVALSHA"))


class Clock:
    """A monotonic clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def proxy(redis_url: str, server: Server) -> AsyncIterator[Proxy]:
    """A proxy to the shared server."""
    async with Proxy(HOST, server.port) as proxy:
        yield proxy


@pytest.fixture
async def direct(redis_url: str) -> AsyncIterator[Redis]:
    """A client that sees what the server holds, whatever the proxy does."""
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def other(store_at: StoreFactory, redis_url: str) -> AsyncIterator[RedisStore]:
    """The store of another worker, whose replies all come."""
    async with store_at(redis_url) as store:
        yield store


@pytest.fixture
def clock() -> Clock:
    """The store's monotonic clock."""
    return Clock()


@pytest.fixture
async def store(store_at: StoreFactory, proxy: Proxy, clock: Clock) -> AsyncIterator[RedisStore]:
    """A store behind the proxy, in the middle of its life."""
    async with store_at(proxy.url, clock=clock) as store:
        await warm(store)
        proxy.reset_counters()
        yield store
        proxy.heal()


async def warm(store: RedisStore) -> None:
    """Let the store and the server learn each other's ways: connection, scripts, `SET NX GET`."""
    claim = await claimed(store, "warm")
    await store.renew(claim)
    await store.release(claim)


async def claimed(store: RedisStore, key: str = "k", *, attempt: int = 1) -> Claimed:
    """Claim the key, and be refused by no one."""
    claim = await store.claim(key, lease=30, ttl=3600)
    assert isinstance(claim, Claimed)
    assert claim.attempt == attempt
    return claim


async def age(direct: Redis) -> None:
    """Let the lease of the record run out: its age is what its time left says."""
    assert await direct.pexpire(KEY, 3_569_000)


async def background(store: RedisStore) -> None:
    """Wait for what the store repeats in the background."""
    while tasks := set(store._background):
        await asyncio.wait(tasks)


def lose(proxy: Proxy, how: str, match: bytes | None, n: int = 1) -> None:
    """Lose the next matching command, or its reply."""
    (proxy.drop_replies if how == "reply" else proxy.drop_requests)(n, match)


def sent(proxy: Proxy, *pieces: bytes) -> int:
    """Count the requests that held all these pieces."""
    return sum(all(piece in request for piece in pieces) for request in proxy.requests)


LOSSES = pytest.mark.parametrize("how", ["reply", "request"])
TIMES = pytest.mark.parametrize("n", [1, 2])


@LOSSES
@TIMES
async def test_claim(store: RedisStore, proxy: Proxy, other: RedisStore, how: str, n: int) -> None:
    """A claim whose reply or command is lost, once or twice, is won by its repetition."""
    lose(proxy, how, SET, n)
    claim = await claimed(store)
    assert sent(proxy, SET, b"asyncidem:k\r\n") == n + 1
    record = await other.get("k")
    assert record is not None
    assert (record.owner, record.state, record.attempt) == (claim.owner, State.INPROGRESS, 1)
    assert isinstance(await other.claim("k"), InProgress)
    await store.complete(claim, "1")
    assert isinstance(await other.claim("k"), Replay)


async def test_claim_found_to_be_ours_is_renewed(store: RedisStore, proxy: Proxy) -> None:
    """A claim that only its repetition saw is renewed before it is handed out: nobody knows how old it is."""
    proxy.drop_replies(match=SET)
    await claimed(store)
    assert sent(proxy, EVALSHA, b"asyncidem:k\r\n") == 1


@LOSSES
async def test_first_claim_of_a_store(store_at: StoreFactory, proxy: Proxy, other: RedisStore, how: str) -> None:
    """The claim of a new store, which goes through a script, survives the same losses."""
    await claimed(other, "warm")
    lose(proxy, how, b"asyncidem:k\r\n")
    async with store_at(proxy.url) as store:
        claim = await claimed(store)
        record = await other.get("k")
        assert record is not None
        assert record.owner == claim.owner
        await store.complete(claim, "1")


@LOSSES
@TIMES
async def test_complete(store: RedisStore, proxy: Proxy, other: RedisStore, how: str, n: int) -> None:
    """A completion whose reply or command is lost is acknowledged by its repetition, with the same bytes."""
    claim = await claimed(store)
    lose(proxy, how, EVALSHA, n)
    await store.complete(claim, '"done"', ttl=60)
    written = [request for request in proxy.requests if b"COMPLETED" in request]
    assert len(written) == n + 1
    assert len(set(written)) == 1
    replay = await other.claim("k")
    assert isinstance(replay, Replay)
    assert replay.record.data == '"done"'


@LOSSES
@TIMES
async def test_renew(store: RedisStore, proxy: Proxy, direct: Redis, other: RedisStore, how: str, n: int) -> None:
    """A renewal whose reply or command is lost begins the lease anew."""
    claim = await claimed(store)
    await age(direct)
    lose(proxy, how, EVALSHA, n)
    await store.renew(claim)
    assert await direct.pttl(KEY) > 3_590_000
    assert isinstance(await other.claim("k"), InProgress)
    await store.complete(claim, "1")


@LOSSES
@TIMES
async def test_release(store: RedisStore, proxy: Proxy, direct: Redis, other: RedisStore, how: str, n: int) -> None:
    """A release whose reply or command is lost frees the key, and its repetition harms nobody."""
    claim = await claimed(store)
    lose(proxy, how, EVALSHA, n)
    await store.release(claim)
    assert sent(proxy, EVALSHA, b"asyncidem:k\r\n") == n + 1
    assert await direct.exists(KEY) == 0
    await claimed(other)


@LOSSES
@pytest.mark.parametrize("piece", [EVALSHA, b"asyncidem:k:lock"], ids=["orphan", "lock"])
async def test_release_after_a_takeover(
    store: RedisStore, proxy: Proxy, direct: Redis, other: RedisStore, how: str, piece: bytes
) -> None:
    """Giving back a claim of a higher attempt survives the loss of each of its two commands."""
    await claimed(other)
    await age(direct)
    claim = await claimed(store, attempt=2)
    lose(proxy, how, piece)
    await store.release(claim)
    assert await direct.exists(f"{KEY}:lock") == 0
    await claimed(other, attempt=2)


@LOSSES
@TIMES
@pytest.mark.parametrize(
    "match", [SET, GET, b"asyncidem:k:lock", EVALSHA, None], ids=["put", "read", "lock", "swap", "any"]
)
async def test_takeover(
    store: RedisStore, proxy: Proxy, direct: Redis, other: RedisStore, how: str, match: bytes | None, n: int
) -> None:
    """A takeover survives the loss of each of its commands: one new owner, of attempt 2, and the lock stays with it."""
    zombie = await claimed(other)
    await age(direct)
    lose(proxy, how, match, n)
    claim = await claimed(store, attempt=2)
    record = await other.get("k")
    assert record is not None
    assert (record.owner, record.attempt) == (claim.owner, 2)
    assert await direct.get(f"{KEY}:lock") == claim.owner.encode()
    assert isinstance(await other.claim("k"), InProgress)
    with pytest.raises(LeaseLostError):
        await other.complete(zombie, "1")
    await store.complete(claim, "2")
    replay = await other.claim("k")
    assert isinstance(replay, Replay)
    assert replay.record.data == "2"


async def test_every_reply_of_an_operation(store: RedisStore, proxy: Proxy) -> None:
    """An operation that loses each kind of reply once runs its handler once, and so do its duplicates."""
    runs = 0

    async def handler() -> int:
        nonlocal runs
        runs += 1
        proxy.drop_replies(match=EVALSHA)
        return runs

    proxy.drop_replies(match=SET)
    idem = Idempotency(store)
    results = await asyncio.gather(*(Idempotency(store, wait=5).run("k", handler) for _ in range(20)))
    assert await idem.run("k", handler) == 1
    assert (set(results), runs) == ({1}, 1)


async def hold_claim(
    store: RedisStore, proxy: Proxy, clock: Clock, seconds: float
) -> asyncio.Task[Claimed | InProgress | Replay]:
    """Claim, and let so many seconds pass between what the server did and its reply, which is still held."""
    proxy.hold_replies(SET)
    task = asyncio.get_running_loop().create_task(store.claim("k", lease=30, ttl=3600))
    await proxy.reply_held.wait()
    clock.now += seconds
    return task  # type: ignore[return-value]  # no fingerprint, no mismatch


@pytest.mark.parametrize(("seconds", "renewals"), [(9.9, 0), (10.0, 1)])
async def test_late_reply_renews(
    store: RedisStore, proxy: Proxy, clock: Clock, direct: Redis, seconds: float, renewals: int
) -> None:
    """A claim whose reply comes after a third of its lease is renewed before it is handed out."""
    task = await hold_claim(store, proxy, clock, seconds)
    await direct.pexpire(KEY, 3_590_000)
    proxy.release_replies()
    claim = await task
    assert isinstance(claim, Claimed)
    assert sent(proxy, EVALSHA) == renewals
    assert (await direct.pttl(KEY) > 3_591_000) == bool(renewals)
    assert claim._deadline == pytest.approx(clock.now + (30 if renewals else 30 - seconds), abs=0.002)
    await store.release(claim)


async def test_reply_after_the_lease(
    store: RedisStore, proxy: Proxy, clock: Clock, direct: Redis, other: RedisStore
) -> None:
    """A claim whose reply comes after its whole lease, while another took over, leaves the key to the other."""
    task = await hold_claim(store, proxy, clock, 31)
    await age(direct)
    winner = await claimed(other, attempt=2)
    proxy.release_replies()
    assert isinstance(await task, InProgress)
    await background(store)
    record = await other.get("k")
    assert record is not None
    assert record.owner == winner.owner
    await other.complete(winner, "1")


async def test_reply_after_the_lease_and_a_completion(
    store: RedisStore, proxy: Proxy, clock: Clock, direct: Redis, other: RedisStore
) -> None:
    """A claim whose reply comes after another took over and completed replays what the other stored."""
    task = await hold_claim(store, proxy, clock, 31)
    await age(direct)
    await other.complete(await claimed(other, attempt=2), '"theirs"')
    proxy.release_replies()
    replay = await task
    assert isinstance(replay, Replay)
    assert replay.record.data == '"theirs"'


async def test_reply_after_the_lease_and_a_release(
    store: RedisStore, proxy: Proxy, clock: Clock, direct: Redis, other: RedisStore
) -> None:
    """A claim whose reply comes after another took over and gave back claims again, with a token of its own."""
    task = await hold_claim(store, proxy, clock, 31)
    stale = (await other.get("k")).owner  # type: ignore[union-attr]  # the server has run the claim
    await age(direct)
    await other.release(await claimed(other, attempt=2))
    proxy.release_replies()
    claim = await task
    assert isinstance(claim, Claimed)
    assert claim.attempt == 2
    assert claim.owner != stale
    await store.complete(claim, "1")


async def test_claim_that_the_server_runs_late(
    store_at: StoreFactory, proxy: Proxy, direct: Redis, other: RedisStore
) -> None:
    """A claim that runs after its caller gave up, and after its undo, blocks the key for one lease, and no longer."""
    async with store_at(proxy.url, timeout=0.3) as store:
        await warm(store)
        proxy.hold_requests(SET)
        call = asyncio.get_running_loop().create_task(store.claim("k", lease=30, ttl=3600))
        await proxy.request_held.wait()
        proxy.drop_requests(10_000, SET)  # its repetitions, each with the connection that its undo would follow on
        with pytest.raises(StoreUnavailableError) as raised:
            await call
        assert raised.value.outcome_unknown
        await background(store)  # the undo finds nothing
        assert sent(proxy, EVALSHA, b"asyncidem:k\r\n") == 1
        assert not await direct.exists(KEY)
        proxy.release_requests()
        while not await direct.exists(KEY):
            await direct.ping()
        assert isinstance(await other.claim("k"), InProgress)
        await age(direct)
        claim = await claimed(other, attempt=2)
        await other.complete(claim, "1")


async def test_completion_that_the_server_runs_late(
    store_at: StoreFactory, proxy: Proxy, direct: Redis, other: RedisStore
) -> None:
    """A completion that runs after another took over changes nothing."""
    async with store_at(proxy.url, timeout=0.3) as store:
        await warm(store)
        zombie = await claimed(store)
        proxy.hold_requests(b"COMPLETED")
        with pytest.raises(StoreUnavailableError) as raised:
            await store.complete(zombie, '"late"')
        assert raised.value.outcome_unknown
        await age(direct)
        claim = await claimed(other, attempt=2)
        proxy.release_requests()
        await background(store)
        record = await other.get("k")
        assert record is not None
        assert (record.owner, record.state) == (claim.owner, State.INPROGRESS)
        await other.complete(claim, '"theirs"')
        with pytest.raises(LeaseLostError):
            await store.complete(zombie, '"late"')


async def test_release_that_the_server_runs_late(
    store_at: StoreFactory, proxy: Proxy, direct: Redis, other: RedisStore
) -> None:
    """A release that runs after another claimed leaves the other's record alone."""
    async with store_at(proxy.url, timeout=0.3) as store:
        await warm(store)
        zombie = await claimed(store)
        proxy.hold_requests(EVALSHA)
        with pytest.raises(StoreUnavailableError):
            await store.release(zombie)
        await age(direct)
        claim = await claimed(other, attempt=2)
        proxy.release_requests()
        await background(store)
        record = await other.get("k")
        assert record is not None
        assert record.owner == claim.owner


async def test_outcome_of_lost_replies(store_at: StoreFactory, proxy: Proxy, direct: Redis) -> None:
    """Replies that never come leave the outcome unknown; the claim is undone when the server answers again."""
    async with store_at(proxy.url, timeout=0.3) as store:
        await warm(store)
        proxy.drop_replies(10_000, SET)
        with pytest.raises(StoreUnavailableError) as raised:
            await store.claim("k", lease=30, ttl=3600)
        assert raised.value.outcome_unknown
        assert raised.value.__cause__ is not None
        proxy.heal()
        await background(store)
        assert await direct.exists(KEY) == 0


async def test_undo_waits_for_the_server(store_at: StoreFactory, proxy: Proxy, direct: Redis) -> None:
    """A claim of which nothing is known is taken back as soon as the server answers, long before its lease is over."""
    async with store_at(proxy.url, timeout=0.3) as store:
        await warm(store)
        proxy.black_hole()
        with pytest.raises(StoreUnavailableError) as raised:
            await store.claim("k", lease=30, ttl=3600)
        assert raised.value.outcome_unknown
        assert await direct.exists(KEY) == 1
        proxy.heal()
        await background(store)
        assert await direct.exists(KEY) == 0


async def test_conflict_leaves_nothing_to_undo(store_at: StoreFactory, proxy: Proxy, other: RedisStore) -> None:
    """A claim that another's record refused, and whose look at it then fails, wrote nothing and undoes nothing."""
    await claimed(other)
    async with store_at(proxy.url, timeout=0.3) as store:
        await warm(store)
        proxy.drop_replies(10_000, b"PTTL")
        with pytest.raises(StoreUnavailableError):
            await store.claim("k")
        assert not store._background


async def test_undo_of_a_takeover(store_at: StoreFactory, proxy: Proxy, direct: Redis, other: RedisStore) -> None:
    """A takeover of which nothing is known is undone to the orphan that it found, and its lock goes."""
    async with store_at(proxy.url, timeout=0.3) as store:
        await warm(store)
        await claimed(other)
        await age(direct)
        proxy.drop_replies(10_000, EVALSHA)
        with pytest.raises(StoreUnavailableError) as raised:
            await store.claim("k", lease=30, ttl=3600)
        assert raised.value.outcome_unknown
        proxy.heal()
        await background(store)
        assert await direct.exists(f"{KEY}:lock") == 0
        await claimed(other, attempt=2)
