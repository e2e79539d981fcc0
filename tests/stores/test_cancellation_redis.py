"""A caller that is cancelled, at any await, leaves no key stuck on a real server, and no task or connection behind."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import anyio
import pytest
from redis.asyncio import Redis

from asyncidem import Claimed, Idempotency, RedisStore, Replay, State

from conftest import StoreFactory
from loops import cancel_at_await
from proxy import Proxy
from servers import HOST, Server

KEY = "asyncidem:k"
SET, EVALSHA = b"\r\nSET\r\n", b"\r\nEVALSHA\r\n"


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
async def store(store_at: StoreFactory, proxy: Proxy) -> AsyncIterator[RedisStore]:
    """A store behind the proxy that knows its server already; it leaves neither task nor connection behind."""
    before = asyncio.all_tasks()
    async with store_at(proxy.url) as store:
        for _ in range(2):
            claim = await claimed(store, "warm")
            await store.renew(claim)
            await store.release(claim)
        yield store
        proxy.heal()
    assert asyncio.all_tasks() <= before | {asyncio.current_task()}
    await proxy.until_open(0)


async def claimed(store: RedisStore, key: str = "k", *, attempt: int = 1) -> Claimed:
    """Claim the key, and be refused by no one."""
    claim = await store.claim(key, lease=30, ttl=3600)
    assert isinstance(claim, Claimed)
    assert claim.attempt == attempt
    return claim


async def background(store: RedisStore) -> None:
    """Wait for what the store repeats in the background."""
    while tasks := set(store._background):
        await asyncio.wait(tasks)


async def cancelled_at_reply(
    proxy: Proxy, call: Coroutine[Any, Any, Any], match: bytes, answer: Callable[[], object]
) -> float:
    """Cancel the call when the server has run the command, before its reply is read; return how long that took."""
    proxy.hold_replies(match)
    task = asyncio.get_running_loop().create_task(call)
    await proxy.reply_held.wait()
    task.cancel()
    asyncio.get_running_loop().call_soon(answer)
    began = time.monotonic()
    await asyncio.wait([task])
    assert task.cancelled()
    return time.monotonic() - began


async def test_claims_cancelled_before_their_reply(store: RedisStore, proxy: Proxy, direct: Redis) -> None:
    """Twenty of twenty claims that are cancelled between what the server did and its reply are undone at their end."""
    for number in range(20):
        await cancelled_at_reply(proxy, store.claim(f"k{number}"), SET, proxy.release_replies)
        assert await direct.exists(f"asyncidem:k{number}") == 0
        assert not store._background


async def test_operations_cancelled_before_their_reply(store: RedisStore, proxy: Proxy, direct: Redis) -> None:
    """A call that is cancelled while it claims runs nothing, and leaves the key free."""
    runs = 0

    async def handler() -> int:
        nonlocal runs
        runs += 1
        return runs

    await cancelled_at_reply(proxy, Idempotency(store).run("k", handler), SET, proxy.release_replies)
    assert (await direct.exists(KEY), runs) == (0, 0)
    assert await Idempotency(store).run("k", handler) == 1


async def test_takeover_cancelled_before_its_reply(store: RedisStore, proxy: Proxy, direct: Redis) -> None:
    """A takeover that is cancelled before the reply to its swap puts the orphan back, and drops its lock."""
    await claimed(store)
    await direct.pexpire(KEY, 3_569_000)
    await cancelled_at_reply(proxy, store.claim("k"), EVALSHA, proxy.release_replies)
    assert await direct.exists(f"{KEY}:lock") == 0
    await claimed(store, attempt=2)


async def test_takeover_cancelled_at_its_lock(store: RedisStore, proxy: Proxy, direct: Redis) -> None:
    """A takeover that is cancelled before the reply to its lock leaves the orphan alone, and drops its lock."""
    zombie = await claimed(store)
    await direct.pexpire(KEY, 3_569_000)
    await cancelled_at_reply(proxy, store.claim("k"), b"asyncidem:k:lock", proxy.release_replies)
    assert await direct.exists(f"{KEY}:lock") == 0
    record = await store.get("k")
    assert record is not None
    assert record.owner == zombie.owner
    await claimed(store, attempt=2)


async def test_cancelled_read(store: RedisStore, proxy: Proxy, multiplex: bool) -> None:
    """A read that is cancelled ends at once; what is under way for it ends with the store, which waits for a task."""

    def under_way() -> list[asyncio.Task[Any]]:
        return [task for task in asyncio.all_tasks() if "within_loop" in repr(task)]

    took = await cancelled_at_reply(proxy, store.get("k"), b"PTTL", lambda: None)
    assert took < 0.3
    assert len(under_way()) == (0 if multiplex else 1)
    if not multiplex:
        asyncio.get_running_loop().call_later(0.02, proxy.heal)
    await store.aclose()
    assert proxy.reply_held.is_set() == multiplex
    assert not under_way()


async def test_slow_server(store: RedisStore, proxy: Proxy, direct: Redis, multiplex: bool) -> None:
    """A cancelled claim on a slow server waits half a second; its undoing follows the reply in the background.

    Over one connection it follows the claim itself: the key is free while no reply has come yet.
    """
    took = await cancelled_at_reply(proxy, store.claim("k"), SET, lambda: None)
    assert 0.45 < took < 1.5
    assert await direct.exists(KEY) == (0 if multiplex else 1)
    assert store._background
    proxy.release_replies()
    await background(store)
    assert await direct.exists(KEY) == 0


@pytest.mark.parametrize("answers", [True, False])
async def test_anyio_scope(store: RedisStore, proxy: Proxy, direct: Redis, multiplex: bool, answers: bool) -> None:
    """A scope of anyio, which cancels again and again, is outlasted too: for the undoing, or for half a second.

    Over one connection the undoing needs no reply.
    """
    proxy.hold_replies(SET)
    began = 0.0

    async def stop() -> None:
        nonlocal began
        await proxy.reply_held.wait()
        began = time.monotonic()
        scope.cancel()
        if answers:
            proxy.release_replies()

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(stop)
            await store.claim("k")
    assert scope.cancelled_caught
    assert time.monotonic() - began < 1.5
    assert await direct.exists(KEY) == (0 if answers or multiplex else 1)
    assert bool(store._background) == (not answers)
    proxy.release_replies()
    await background(store)
    assert await direct.exists(KEY) == 0


async def test_repeated_cancellation(store: RedisStore, proxy: Proxy, direct: Redis) -> None:
    """A task that is cancelled in every turn of the loop still undoes its claim before it ends."""
    proxy.hold_replies(SET)
    task = asyncio.get_running_loop().create_task(store.claim("k"))
    await proxy.reply_held.wait()
    proxy.release_replies()
    turns = 0
    while not task.done():
        turns += 1
        task.cancel()
        await asyncio.sleep(0)
    assert turns > 3
    assert task.cancelled()
    assert await direct.exists(KEY) == 0


@pytest.mark.parametrize("every", [False, True])
async def test_cancelled_at_each_await(store: RedisStore, direct: Redis, every: bool) -> None:
    """A claim that is cancelled where it suspends, wherever that is, leaves the key free."""
    for suspension in range(1, 50):
        run = await cancel_at_await(store.claim(f"k{suspension}"), suspension, every=every)
        if not run.reached:
            assert isinstance(run.task.result(), Claimed)
            break
        assert run.task.cancelled()
        assert await direct.exists(f"asyncidem:k{suspension}") == 0
    assert 1 < suspension < 49


@pytest.mark.parametrize("every", [False, True])
async def test_takeover_cancelled_at_each_await(store: RedisStore, direct: Redis, every: bool) -> None:
    """A takeover that is cancelled where it suspends leaves an orphan that the next call takes over at once."""
    for suspension in range(1, 50):
        key = f"k{suspension}"
        await claimed(store, key)
        await direct.pexpire(f"asyncidem:{key}", 3_569_000)
        run = await cancel_at_await(store.claim(key), suspension, every=every)
        if not run.reached:
            break
        assert run.task.cancelled()
        await claimed(store, key, attempt=2)
    assert 4 < suspension < 49


async def test_operation_cancelled_at_each_await(store: RedisStore, direct: Redis) -> None:
    """An operation that is cancelled at any await has run nothing and left nothing, or has stored its result."""
    ran: list[str] = []
    for suspension in range(1, 50):
        key = f"k{suspension}"

        async def handler() -> str:
            ran.append(key)
            return key

        run = await cancel_at_await(Idempotency(store).run(key, handler), suspension)
        if not run.reached:
            break
        await background(store)
        record = await store.get(key)
        assert (record is not None) == (key in ran)
        assert record is None or record.state is State.COMPLETED
        assert await Idempotency(store).run(key, handler) == key
        assert ran.count(key) == 1
    assert 2 < suspension < 49


async def test_two_claims_of_one_key_cancelled_together(store: RedisStore, proxy: Proxy, direct: Redis) -> None:
    """Of two claims that are cancelled together each is undone after its own end, whichever comes first."""
    proxy.hold_requests(b"late payload")
    loop = asyncio.get_running_loop()
    late = loop.create_task(store.claim("k", fingerprint="late payload"))
    await proxy.request_held.wait()
    early = loop.create_task(store.claim("k", fingerprint="early payload"))
    while not any(b"early payload" in request for request in proxy.requests):
        await asyncio.sleep(0)
    late.cancel()
    early.cancel()
    await asyncio.wait([late, early])
    proxy.release_requests()
    await background(store)
    await store.aclose()
    # Nothing of the store is under way any more: what is there now stays there for a lease.
    assert await direct.exists(KEY) == 0


@pytest.mark.parametrize("call", ["complete", "release", "renew"])
async def test_settling_cancelled_before_its_reply(store: RedisStore, proxy: Proxy, direct: Redis, call: str) -> None:
    """A completion or release that is cancelled before its reply has happened nevertheless; so has a renewal."""
    claim = await claimed(store)
    work = store.complete(claim, "1") if call == "complete" else getattr(store, call)(claim)
    await cancelled_at_reply(proxy, work, EVALSHA, proxy.release_replies)
    if call == "complete":
        assert isinstance(await store.claim("k"), Replay)
    elif call == "release":
        assert await direct.exists(KEY) == 0
    else:
        await store.complete(claim, "1")


@pytest.mark.parametrize("call", ["complete", "release"])
async def test_settling_cancelled_before_it_arrives(store: RedisStore, proxy: Proxy, direct: Redis, call: str) -> None:
    """A completion or release that is cancelled before the server has it waits half a second, and lands after that."""
    claim = await claimed(store)
    proxy.hold_requests(EVALSHA)
    work = store.complete(claim, "1") if call == "complete" else store.release(claim)
    task = asyncio.get_running_loop().create_task(work)
    await proxy.request_held.wait()
    began = time.monotonic()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert 0.45 < time.monotonic() - began < 1.5
    assert b"INPROGRESS" in await direct.get(KEY)
    proxy.release_requests()
    await background(store)
    if call == "complete":
        assert isinstance(await store.claim("k"), Replay)
    else:
        assert await direct.exists(KEY) == 0


@pytest.mark.parametrize("call", ["complete", "release"])
async def test_cancelled_settling_survives_a_lost_reply(
    store: RedisStore, proxy: Proxy, direct: Redis, call: str
) -> None:
    """A completion or release that is cancelled, and whose connection then breaks, is repeated in the background."""
    claim = await claimed(store)
    work = store.complete(claim, "1") if call == "complete" else store.release(claim)
    proxy.hold_requests(EVALSHA)
    task = asyncio.get_running_loop().create_task(work)
    await proxy.request_held.wait()
    task.cancel()
    proxy.heal()
    proxy.drop_requests(3, EVALSHA)
    proxy.cut()
    await asyncio.wait([task])
    assert task.cancelled()
    await background(store)
    if call == "complete":
        assert isinstance(await store.claim("k"), Replay)
    else:
        assert await direct.exists(KEY) == 0


@pytest.fixture
def far_proxy(redis_url: str, server: Server) -> Iterator[tuple[Proxy, asyncio.AbstractEventLoop]]:
    """A proxy that outlives the test's own loops, and the loop that it runs on, in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    proxy = Proxy(HOST, server.port)
    asyncio.run_coroutine_threadsafe(proxy.start(), loop).result(10)
    yield proxy, loop
    asyncio.run_coroutine_threadsafe(proxy.close(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.usefixtures("dead_loops")
@pytest.mark.parametrize("match", [SET, EVALSHA], ids=["claim", "complete"])
def test_end_of_asyncio_run(
    store_at: StoreFactory, far_proxy: tuple[Proxy, asyncio.AbstractEventLoop], server: Server, match: bytes
) -> None:
    """A loop that ends while a claim or completion is in flight leaves neither stuck while the server answers."""
    proxy, loop = far_proxy

    async def main(key: str) -> asyncio.Task[Any]:
        store = store_at(proxy.url)
        await store.release(await claimed(store, "warm"))
        await store.complete(await claimed(store, key + " warm"), "1")
        proxy.hold_replies(match)
        task = asyncio.get_running_loop().create_task(Idempotency(store).run(key, asyncio.sleep, 0, 1))
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(proxy.reply_held.wait(), loop))
        loop.call_soon_threadsafe(proxy.heal)
        return task

    for number in range(5):
        task = asyncio.run(main(f"k{number}"))
        assert task.cancelled()
        value = server.command("EXISTS", f"asyncidem:k{number}")
        assert value == (":0" if match == SET else ":1")
    if match == EVALSHA:
        assert asyncio.run(replayed(store_at, proxy.url, "k0")) == "1"


async def replayed(store_at: StoreFactory, url: str, key: str) -> str | None:
    """Return the stored result."""
    async with store_at(url) as store:
        replay = await store.claim(key)
        assert isinstance(replay, Replay)
        return replay.record.data


async def test_nothing_is_left_behind(store_at: StoreFactory, redis_url: str, server: Server) -> None:
    """A store that is closed while calls are cancelled leaves neither task nor connection, here nor on the server."""
    before = asyncio.all_tasks()
    async with Redis.from_url(redis_url) as direct:
        clients = {client["id"] for client in await direct.client_list()}
        async with store_at(redis_url) as store:
            idem = Idempotency(store)
            loop = asyncio.get_running_loop()
            tasks = [loop.create_task(idem.run(f"k{number}", asyncio.sleep, 0)) for number in range(40)]
            for number, task in enumerate(tasks):
                if number % 2:
                    task.cancel()
                await asyncio.sleep(0)
            await asyncio.wait(tasks)
        assert asyncio.all_tasks() == before
        for _ in range(1000):
            if {client["id"] for client in await direct.client_list()} == clients:
                break
        assert {client["id"] for client in await direct.client_list()} == clients
