"""What happens to data, scripts, connections, pools, loops and processes while a handler runs, or between two calls."""

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis

from asyncidem import (
    Claimed,
    ConfigurationError,
    Idempotency,
    RedisStore,
    Replay,
    State,
    StoreUnavailableError,
)

from conftest import ServerFactory, StoreFactory
from proxy import Proxy
from servers import HOST, Server

KEY = "asyncidem:k"


@pytest.fixture
async def proxy(redis_url: str, server: Server) -> AsyncIterator[Proxy]:
    """A proxy to the shared server."""
    async with Proxy(HOST, server.port) as proxy:
        yield proxy


async def must_not_run() -> int:
    """Stand for an effect that happened already."""
    pytest.fail("the handler ran")


async def protocol(store: RedisStore, key: str = "k") -> None:
    """Go through claim, renewal, completion, replay and release on the store."""
    claim = await store.claim(key, ttl=60)
    assert isinstance(claim, Claimed)
    await store.renew(claim)
    await store.complete(claim, '"ä"')
    replay = await store.claim(key)
    assert isinstance(replay, Replay)
    assert replay.record.data == '"ä"'
    record = await store.get(key)
    assert record is not None
    assert record.state is State.COMPLETED
    assert await store.delete(key)
    other = await store.claim(key)
    assert isinstance(other, Claimed)
    await store.release(other)
    assert await store.get(key) is None


# -- data and scripts that vanish ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("FLUSHALL",), ("SCRIPT", "FLUSH")], ids=" ".join)
@pytest.mark.parametrize("renew", [False, True])
async def test_flush_in_mid_handler(
    store_at: StoreFactory, redis_url: str, server: Server, words: tuple[str, ...], renew: bool
) -> None:
    """What is flushed while the handler runs is written again by the renewal and the completion."""
    async with store_at(redis_url) as store:
        claim = await store.claim("k")
        assert isinstance(claim, Claimed)
        await store.renew(claim)
        assert server.command(*words) == "+OK"
        if renew:
            await store.renew(claim)
            record = await store.get("k")
            assert record is not None
            assert (record.owner, record.state) == (claim.owner, State.INPROGRESS)
        await store.complete(claim, "42")
        assert await Idempotency(store).run("k", must_not_run) == 42


async def test_flush_before_a_release(store_at: StoreFactory, redis_url: str, server: Server) -> None:
    """A release writes nothing where the record is gone."""
    async with store_at(redis_url) as store:
        claim = await store.claim("k")
        assert isinstance(claim, Claimed)
        server.command("FLUSHALL")
        server.command("SCRIPT", "FLUSH")
        await store.release(claim)
        assert server.command("DBSIZE") == ":0"


@pytest.mark.parametrize("again", ["renew", "complete"])
async def test_restart_in_mid_handler(store_at: StoreFactory, private_server: ServerFactory, again: str) -> None:
    """A server that comes back with neither data, scripts nor connections gets all of it anew."""
    server = private_server()

    async def handler() -> int:
        server.restart()
        if again == "renew":
            await store.renew(claims[0])
        return 42

    claims: list[Claimed] = []
    async with store_at(server.url) as store:
        idem = Idempotency(store)
        async with idem.operation("k") as op:
            assert op._claim is not None
            claims.append(op._claim)
            op.set_result(await handler())
        assert await idem.run("k", must_not_run) == 42


async def test_restart_between_two_calls(store_at: StoreFactory, private_server: ServerFactory) -> None:
    """A connection that died between two calls fails none of them."""
    server = private_server()
    async with store_at(server.url) as store:
        await protocol(store)
        server.restart()
        await protocol(store)


async def test_killed_connections(store_at: StoreFactory, redis_url: str, server: Server) -> None:
    """Connections that the server closes fail no call."""
    async with store_at(redis_url) as store:
        for _ in range(5):
            server.command("CLIENT", "KILL", "TYPE", "normal")
            await protocol(store)


# -- clients as users have them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol_version", [2, 3])
@pytest.mark.parametrize("decode_responses", [False, True])
async def test_brought_client(redis_url: str, multiplex: bool, protocol_version: int, decode_responses: bool) -> None:
    """A client of the user's works with either protocol, decoding or not, with redis-py's own retries, and stays open."""
    async with Redis.from_url(redis_url, protocol=protocol_version, decode_responses=decode_responses) as client:
        async with RedisStore(client, multiplex=multiplex) as store:
            await protocol(store)
        assert await client.ping()
        assert await client.set("theirs", "1")
        assert await client.get("theirs") == ("1" if decode_responses else b"1")


@pytest.mark.parametrize("protocol_version", [2, 3])
async def test_own_client(store_at: StoreFactory, redis_url: str, protocol_version: int) -> None:
    """A client of the store's own works with either protocol."""
    async with store_at(redis_url, protocol=protocol_version) as store:
        await protocol(store)


async def test_connect(server: Server, redis_url: str, multiplex: bool) -> None:
    """The parts of an address lead to the database that they name."""
    async with RedisStore.connect(HOST, server.port, db=3, ssl=False, multiplex=multiplex) as store:
        assert isinstance(await store.claim("k"), Claimed)
    async with Redis(host=HOST, port=server.port, db=3) as client:
        assert await client.exists(KEY) == 1


async def test_unix_socket(
    store_at: StoreFactory, private_server: ServerFactory, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A server on a unix socket is reached by its URL."""
    path = Path(tmp_path_factory.mktemp("s")) / "redis.sock"
    private_server("--unixsocket", str(path))
    async with store_at(f"unix://{path}") as store:
        await protocol(store)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", [ConnectionPool, BlockingConnectionPool])
async def test_small_pool(
    redis_url: str, server: Server, multiplex: bool, kind: type[ConnectionPool], size: int
) -> None:
    """Fifty calls at once over a pool of one or two connections wait for each other instead of failing."""
    client = Redis(connection_pool=kind.from_url(redis_url, max_connections=size))
    async with RedisStore(client, multiplex=multiplex) as store:
        idem = Idempotency(store)
        runs = [idem.run(f"k{number}", asyncio.sleep, 0, number) for number in range(50)]
        assert await asyncio.gather(*runs) == list(range(50))
    await client.connection_pool.disconnect()
    assert server.command("DBSIZE") == ":50"


@pytest.mark.parametrize("kind", [ConnectionPool, BlockingConnectionPool])
async def test_pool_exhausted_by_others(redis_url: str, kind: type[ConnectionPool]) -> None:
    """On the plain path a pool that the user's own commands have used up is waited for within the time of the call."""
    pool = kind.from_url(redis_url, max_connections=1)
    async with RedisStore(Redis(connection_pool=pool), timeout=5, multiplex=False) as store:
        taken = await pool.get_connection()
        call = asyncio.get_running_loop().create_task(store.claim("k"))
        await asyncio.wait([call], timeout=0.05)
        assert not call.done()
        await pool.release(taken)
        assert isinstance(await call, Claimed)
    await pool.disconnect()


@pytest.mark.parametrize("kind", [ConnectionPool, BlockingConnectionPool])
async def test_pool_exhausted_for_too_long(redis_url: str, kind: type[ConnectionPool]) -> None:
    """On the plain path a pool that stays used up is an error of ours, and nothing was sent."""
    pool = kind.from_url(redis_url, max_connections=1)
    async with RedisStore(Redis(connection_pool=pool), timeout=0.2, multiplex=False) as store:
        taken = await pool.get_connection()
        with pytest.raises(StoreUnavailableError) as raised:
            await Idempotency(store).run("k", must_not_run)
        assert not raised.value.outcome_unknown
        assert raised.value.__cause__ is not None
        await pool.release(taken)
    await pool.disconnect()


@pytest.mark.parametrize("kind", [ConnectionPool, BlockingConnectionPool])
async def test_pool_exhausted_beside_a_multiplexed_store(redis_url: str, kind: type[ConnectionPool]) -> None:
    """A store with a connection of its own needs none of the pool, and gives it none."""
    pool = kind.from_url(redis_url, max_connections=1)
    taken = await pool.get_connection()
    async with RedisStore(Redis(connection_pool=pool), timeout=0.2) as store:
        await protocol(store)
        assert pool._in_use_connections == {taken}
        assert not pool._available_connections
    assert taken.is_connected
    await pool.release(taken)
    await pool.disconnect()


async def test_waiting_for_a_connection_ends(proxy: Proxy, multiplex: bool) -> None:
    """A call that waits for a connection behind another that gets no reply ends with its time, nothing sent.

    Over one connection for both it waits for nothing: both were sent.
    """
    pool = ConnectionPool.from_url(proxy.url, max_connections=1)
    async with RedisStore(Redis(connection_pool=pool), timeout=0.3, multiplex=multiplex) as store:
        assert isinstance(await store.claim("before"), Claimed)
        proxy.black_hole()
        errors = await asyncio.gather(store.get("k"), store.get("l"), return_exceptions=True)
        assert [type(error) for error in errors] == [StoreUnavailableError] * 2
        assert [error.outcome_unknown for error in errors] == [True, multiplex]  # type: ignore[union-attr]
        why = "no answer from the server" if multiplex else "no connection of the pool of 1 was free"
        assert why in str(errors[1])
        proxy.heal()
    await pool.disconnect()


# -- other loops, other processes ------------------------------------------------------------------------------------------


def serve_proxy(server: Server, talk: Callable[[Proxy], None]) -> None:
    """Run a proxy on a loop of another thread while `talk` uses loops of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def there(work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(10)

    proxy = Proxy(HOST, server.port)
    try:
        there(proxy.start())
        talk(proxy)
    finally:
        there(proxy.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.usefixtures("dead_loops")
@pytest.mark.parametrize("brought", [False, True])
def test_second_loop(redis_url: str, server: Server, multiplex: bool, brought: bool) -> None:
    """A store of a module heals on the next loop before it sends anything: no call fails, and no command goes twice."""

    def talk(proxy: Proxy) -> None:
        client = Redis.from_url(proxy.url)
        store = (
            RedisStore(client, multiplex=multiplex) if brought else RedisStore.from_url(proxy.url, multiplex=multiplex)
        )
        idem = Idempotency(store, local_cache=0)
        for number in range(3):
            assert asyncio.run(idem.run(f"k{number}", asyncio.sleep, 0, number)) == number
            assert asyncio.run(idem.run(f"k{number}", must_not_run)) == number
        for number in range(3):
            assert sum(b"asyncidem:k%d\r\n" % number in request for request in proxy.requests) <= 5
        puts = [request for request in proxy.requests if b"\r\nNX\r\n" in request]
        assert len(puts) == len(set(puts))
        assert proxy.connections == 6

    serve_proxy(server, talk)


@pytest.mark.usefixtures("dead_loops")
@pytest.mark.parametrize("kind", [ConnectionPool, BlockingConnectionPool])
def test_second_loop_after_a_crowd(redis_url: str, multiplex: bool, kind: type[ConnectionPool]) -> None:
    """Locks over which a crowd waited on the first loop keep nobody out on the second."""
    store = RedisStore(Redis(connection_pool=kind.from_url(redis_url, max_connections=2)), multiplex=multiplex)

    async def crowd(name: str) -> None:
        idem = Idempotency(store)
        runs = [idem.run(f"{name}{number}", asyncio.sleep, 0, number) for number in range(20)]
        assert await asyncio.gather(*runs) == list(range(20))

    for name in ("a", "b", "c"):
        asyncio.run(crowd(name))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # nobody can close what the client left on its first loop
def test_client_of_a_dead_loop(redis_url: str, multiplex: bool) -> None:
    """A client that was used on a loop that is gone, before the store got it, fails no call."""
    client = Redis.from_url(redis_url)

    async def ping(client: Redis) -> None:
        await asyncio.gather(*(client.ping() for _ in range(5)))

    asyncio.run(ping(client))
    store = RedisStore(client, multiplex=multiplex)
    asyncio.run(protocol(store))
    asyncio.run(protocol(store))
    del store, client
    gc.collect()


def test_two_running_loops(store_at: StoreFactory, redis_url: str) -> None:
    """A store that is in use on one running loop refuses another one, and goes on with the first."""

    async def first() -> None:
        async with store_at(redis_url) as store:
            await protocol(store)
            with pytest.raises(ConfigurationError, match="another event loop"):
                await asyncio.to_thread(asyncio.run, Idempotency(store).run("k", must_not_run))
            await protocol(store)

    asyncio.run(first())


def in_child(work: Callable[[], None]) -> bytes:
    """Run `work` in a fork of this process, and return what went wrong there: nothing, if all is well."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            os.write(writer, repr(error).encode())
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as report:
        said = report.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == bool(said)
    return said


def records(server: Server, key: str) -> str:
    """Return whether the server holds the key."""
    return server.command("EXISTS", f"asyncidem:{key}")


@pytest.mark.usefixtures("dead_loops")
def test_fork_between_loops(store_at: StoreFactory, redis_url: str, server: Server) -> None:
    """A store that was inherited works in the child and, after it, in the parent."""
    store = store_at(redis_url)
    asyncio.run(protocol(store, "parent"))

    def child() -> None:
        assert asyncio.run(Idempotency(store).run("child", asyncio.sleep, 0, 1)) == 1
        asyncio.run(protocol(store, "other"))

    assert in_child(child) == b""
    assert records(server, "child") == ":1"
    assert asyncio.run(Idempotency(store).run("child", must_not_run)) == 1


@pytest.mark.usefixtures("dead_loops")
def test_fork_with_its_loop(store_at: StoreFactory, redis_url: str, server: Server) -> None:
    """A child that goes on with its parent's loop does not go on with its parent's connection."""
    store = store_at(redis_url)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(protocol(store, "parent"))
    connections = int(server.command("CLIENT", "ID")[1:])
    assert in_child(lambda: loop.run_until_complete(protocol(store, "child"))) == b""
    # One more of the child, and one that asks.
    assert int(server.command("CLIENT", "ID")[1:]) == connections + 2
    loop.run_until_complete(protocol(store, "parent"))
    loop.run_until_complete(store.aclose())
    loop.close()


@pytest.mark.usefixtures("dead_loops")
def test_fork_inside_a_running_loop(store_at: StoreFactory, redis_url: str, server: Server) -> None:
    """A child of a running loop opens connections of its own, and takes neither bytes nor sockets from its parent."""

    async def parent() -> None:
        async with store_at(redis_url) as store:
            claim = await store.claim("parent")
            assert isinstance(claim, Claimed)

            async def work() -> None:
                assert await Idempotency(store).run("child", asyncio.sleep, 0, 1) == 1
                # What the child has of its parent's connections shares the parent's epoll: it must not be closed here.
                gc.collect()

            def child() -> None:
                asyncio.run(work())

            assert in_child(child) == b""
            await asyncio.wait_for(store.complete(claim, "2"), 1)
            assert await Idempotency(store).run("child", must_not_run) == 1
            assert await Idempotency(store).run("parent", must_not_run) == 2

    asyncio.run(parent())
    assert records(server, "parent") == ":1"
