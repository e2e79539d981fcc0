"""The test helpers do what the tests built on them believe."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from conftest import ServerFactory
from loops import VirtualTimeLoop, cancel_at_await, cancel_at_tick, run_virtual
from proxy import Proxy, frame_end
from servers import HOST, Server


def client_of(url: str, **options: object) -> Redis:
    """A client that never retries by itself."""
    return Redis.from_url(url, retry=Retry(NoBackoff(), 0), **options)  # type: ignore[no-any-return, arg-type]


@pytest.fixture
async def proxy(redis_url: str, server: Server) -> AsyncIterator[Proxy]:
    """A proxy to the shared server, which leaves nothing behind."""
    before = asyncio.all_tasks()
    async with Proxy(HOST, server.port) as proxy:
        yield proxy
    assert asyncio.all_tasks() - {asyncio.current_task()} <= before
    assert proxy.open_connections == 0


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
async def client(proxy: Proxy, request: pytest.FixtureRequest) -> AsyncIterator[Redis]:
    """A connected client on the other side of the proxy, its handshake done and not counted."""
    async with client_of(proxy.url, protocol=request.param, socket_timeout=1) as client:
        await client.ping()
        proxy.reset_counters()
        yield client


@pytest.mark.parametrize(
    "frame",
    [
        b"+OK\r\n",
        b":1\r\n",
        b"_\r\n",
        b"$-1\r\n",
        b"$0\r\n\r\n",
        b"$4\r\na\r\nb\r\n",
        b"*-1\r\n",
        b"*0\r\n",
        b"*2\r\n$1\r\na\r\n*1\r\n:1\r\n",
        b"%1\r\n+a\r\n:1\r\n",
        b"|1\r\n+a\r\n:1\r\n+OK\r\n",
        b">2\r\n+a\r\n+b\r\n",
    ],
)
def test_frame_end(frame: bytes) -> None:
    """A frame ends where it ends, wherever the stream was cut."""
    assert frame_end(frame + b"+more\r\n") == len(frame)
    assert all(frame_end(frame[:end]) == -1 for end in range(len(frame)))


async def test_round_trips(client: Redis, proxy: Proxy) -> None:
    """A burst of requests is one round trip."""
    await client.set("a", "1")
    assert proxy.round_trips == 1
    async with client.pipeline(transaction=False) as pipeline:
        for _ in range(5):
            pipeline.get("a")
        assert await pipeline.execute() == [b"1"] * 5
    assert (proxy.round_trips, len(proxy.requests), proxy.connections) == (2, 6, 0)


async def test_dropped_reply(client: Redis, proxy: Proxy) -> None:
    """The server runs a command whose reply is lost, and the next one is answered."""
    proxy.drop_replies(match=b"\r\nSET\r\n")
    assert await client.get("a") is None
    with pytest.raises(RedisConnectionError):
        await client.set("a", "1")
    assert await client.get("a") == b"1"
    assert proxy.connections == 1


async def test_dropped_request(client: Redis, proxy: Proxy) -> None:
    """The server never sees a request that is lost."""
    proxy.drop_requests(match=b"\r\nSET\r\n")
    with pytest.raises(RedisConnectionError):
        await client.set("a", "1")
    assert await client.get("a") is None


async def test_black_hole(client: Redis, proxy: Proxy) -> None:
    """A black hole takes requests and answers none, until it heals."""
    proxy.black_hole()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(client.set("a", "1"), 0.05)
    proxy.black_hole(requests=True)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(client.set("a", "2"), 0.05)
    proxy.heal()
    assert await client.get("a") == b"1"


async def test_held_reply(client: Redis, proxy: Proxy) -> None:
    """A held reply comes when it is released, its command having been executed long before."""
    proxy.hold_replies(b"\r\nSET\r\n")
    task = asyncio.ensure_future(client.set("a", "1"))
    await asyncio.wait_for(proxy.reply_held.wait(), 1)
    assert await client.get("a") == b"1"
    assert not task.done()
    proxy.release_replies()
    assert await task
    assert not proxy.reply_held.is_set()
    assert await client.set("a", "2")


async def test_held_request_outlives_its_client(client: Redis, proxy: Proxy) -> None:
    """A command of a connection that is gone is executed late."""
    proxy.hold_requests(b"\r\nSET\r\n")
    task = asyncio.ensure_future(client.set("a", "1"))
    await asyncio.wait_for(proxy.request_held.wait(), 1)
    task.cancel()
    await asyncio.wait([task])
    assert await client.get("a") is None
    proxy.release_requests()
    async with asyncio.timeout(1):
        while await client.get("a") is None:
            await asyncio.sleep(0.001)


async def test_refused(client: Redis, proxy: Proxy) -> None:
    """A proxy that refuses has cut what was open, and comes back on its port."""
    proxy.refuse()
    for _ in range(2):
        with pytest.raises(RedisConnectionError):
            await client.ping()
    await proxy.start()
    assert await client.ping()


async def test_dead_target(private_server: ServerFactory) -> None:
    """A proxy to a dead server cuts its connections."""
    server = private_server()
    server.kill()
    async with Proxy(HOST, server.port) as proxy, client_of(proxy.url) as client:
        with pytest.raises(RedisConnectionError):
            await client.ping()


def test_server_keeps_its_port_and_data(private_server: ServerFactory) -> None:
    """A restarted server has its port, and its data if it has an append-only file."""
    server = private_server("--appendonly", "yes", "--appendfsync", "always")
    port, pid = server.port, server.pid
    assert server.command("SET", "a", "1") == "+OK"
    server.restart()
    assert server.port == port
    assert server.pid != pid
    assert server.command("GET", "a") == "$1"
    server.stop()
    assert not server.alive


def test_server_pauses(private_server: ServerFactory) -> None:
    """A paused server answers once it goes on, and can be stopped while it is paused."""
    server = private_server()
    server.pause()
    server.resume()
    assert server.command("PING") == "+PONG"
    server.pause()
    server.stop()
    assert not server.alive


def test_reset(server: Server, redis_url: str) -> None:
    """The shared server comes back empty from a pause."""
    server.command("SET", "a", "1")
    server.pause()
    server.reset()
    assert server.command("EXISTS", "a") == ":0"
    assert redis_url == server.url


def test_virtual_time() -> None:
    """An hour's sleep takes no time, and timers fire in order at their exact times."""

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        fired: list[float] = []
        for delay in (7200.0, 60.0, 0.25):
            loop.call_later(delay, lambda: fired.append(loop.time()))
        await asyncio.sleep(3600)
        return [*fired, loop.time()]

    began = time.monotonic()
    assert run_virtual(main()) == [0.25, 60.0, 3600.0]
    assert time.monotonic() - began < 1


def test_virtual_time_with_threads() -> None:
    """A thread can wake the virtual loop."""
    assert run_virtual(asyncio.to_thread(lambda: 1)) == 1


def test_virtual_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that nothing can wake says so instead of hanging."""
    monkeypatch.setattr("loops.DEADLOCK_AFTER", 0.01)

    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="deadlock"):
        run_virtual(main())


def test_virtual_tick() -> None:
    """With a tick, time passes for code that spins."""

    async def main() -> int:
        loop = asyncio.get_running_loop()
        turns = 0
        while loop.time() < 1:
            await asyncio.sleep(0)
            turns += 1
        return turns

    assert run_virtual(main(), tick=0.125) in {7, 8}


def test_cancel_at_each_await() -> None:
    """A coroutine is cancelled at each suspension in turn, and left alone when it has fewer."""

    async def work(seen: list[int]) -> str:
        for step in range(3):
            await asyncio.sleep(step)
            seen.append(step)
        return "done"

    async def main() -> None:
        for suspension in (1, 2, 3):
            seen: list[int] = []
            run = await cancel_at_await(work(seen), suspension)
            assert run.reached
            assert run.task.cancelled()
            assert seen == list(range(suspension - 1))
        run = await cancel_at_await(work([]), 4)
        assert not run.reached
        assert run.task.result() == "done"

    run_virtual(main())


def test_cancel_at_every_await() -> None:
    """A coroutine that withstands its cancellation is cancelled again wherever it waits."""
    cancelled = 0

    async def work() -> str:
        nonlocal cancelled
        for _ in range(3):
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                cancelled += 1
        return "done"

    run = run_virtual(cancel_at_await(work(), 2, every=True), tick=0.001)
    assert (cancelled, run.task.result()) == (2, "done")


def test_cancel_at_each_tick() -> None:
    """Cancellation at a tick also meets a result that has arrived and was not seen yet."""

    async def work(future: asyncio.Future[str], seen: list[str]) -> None:
        seen.append("started")
        await future
        seen.append("answered")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        ends: list[list[str]] = []
        for tick in (1, 2, 3, 4):
            future: asyncio.Future[str] = loop.create_future()
            seen: list[str] = []
            # The task takes its first step in turn 1; the result arrives before turn 3, in which the task sees it.
            loop.call_at_tick(3, lambda future=future: future.done() or future.set_result("x"))
            run = await cancel_at_tick(work(future, seen), tick)
            assert run.reached is (tick < 4)
            ends.append(seen)
        assert ends == [[], ["started"], ["started"], ["started", "answered"]]

    run_virtual(main())
