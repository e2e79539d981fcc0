"""How a `RedisStore` is made, what it refuses, whom a client belongs to, and which mode it says that it is in."""

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis
from redis import exceptions
from redis.asyncio import Redis, RedisCluster

import asyncidem
from asyncidem import Claimed, ConfigurationError, Idempotency, RedisStore, Replay

from conftest import ServerFactory, StoreFactory
from proxy import Proxy, _Link
from servers import HOST, Cluster, Server, free_port

NOWHERE = "redis://127.0.0.1:1/0"


class Bare:
    """The least that a client of the user's offers."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.closed = False

    async def get(self, name: str) -> bytes | str | None:
        return self.data.get(name)

    async def set(self, name: str, value: bytes, *, px: int, nx: bool) -> object:
        if nx and name in self.data:
            return None
        self.data[name] = value
        return "OK"

    async def delete(self, name: str) -> object:
        return self.data.pop(name, None)

    async def aclose(self) -> None:
        self.closed = True


class Aged(Bare):
    """A client with `pttl`."""

    async def pttl(self, name: str) -> int:
        return 1000 if name in self.data else -2


@pytest.fixture
def logs(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the library logs, from INFO on."""
    with caplog.at_level(logging.INFO, logger="asyncidem"):
        yield caplog


def modes(logs: pytest.LogCaptureFixture) -> list[tuple[int, str, str]]:
    """Return level, mode and what is missing of each line about it."""
    return [
        (line.levelno, line.mode, line.missing) for line in logs.records if line.message.startswith("fallback_mode")
    ]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RedisStore(Redis(), timeout_s=3), "unknown option 'timeout_s'"),
        (lambda: RedisStore(Redis(), host="localhost"), "unknown option 'host'.*RedisStore.from_url"),
        (lambda: RedisStore(NOWHERE), "not text; with a URL use RedisStore.from_url$"),  # type: ignore[arg-type]
        (lambda: RedisStore(redis.Redis()), "synchronous client; use redis.asyncio.Redis"),  # type: ignore[arg-type]
        (lambda: RedisStore(object()), "client object has no method 'get'"),  # type: ignore[arg-type]
        (lambda: RedisStore(None), "client NoneType has no method 'get'"),  # type: ignore[arg-type]
        (lambda: RedisStore({}), "client dict has no method 'set'"),  # type: ignore[arg-type]
        (lambda: RedisStore(Redis(), prefix=b"x"), "prefix must be text"),  # type: ignore[arg-type]
        (lambda: RedisStore(Redis(), timeout=0), "timeout"),
        (lambda: RedisStore(Redis(), status_attr="owner"), "taken"),
        (lambda: RedisStore.from_url(NOWHERE, client=Redis()), "a client has its address already"),
        (lambda: RedisStore.connect("localhost", client=Redis()), "a client has its address already"),
        (lambda: RedisStore.from_url(Redis()), "url must be text"),  # type: ignore[arg-type]
        (lambda: RedisStore.from_url("localhost:6379"), "redis-py does not take these options.*scheme"),
        (lambda: RedisStore.from_url(NOWHERE, no_such_option=1), "redis-py does not take these options.*no_such"),
        (lambda: RedisStore.from_url(NOWHERE, timeout=float("nan")), "timeout"),
        (lambda: RedisStore.from_url(NOWHERE, prefix=1), "prefix must be text"),
        (lambda: RedisStore.from_url(NOWHERE, protocol=7), "redis-py does not take these options.*protocol"),
        (lambda: RedisStore.from_url(NOWHERE, cluster=True, no_such_option=1), "redis-py does not take these options"),
        (lambda: RedisStore.connect("localhost", no_such_option=1), "redis-py does not take these options.*no_such"),
        (lambda: RedisStore.connect("localhost", cluster=True, db=1), "only the database 0, not 1"),
    ],
)
def test_refused(make: Any, text: str) -> None:
    """What cannot work is refused where the store is made, in words that say what to do."""
    with pytest.raises(ConfigurationError, match=text):
        make()


def test_cause_of_refused_options() -> None:
    """What redis-py said of an option is the cause."""
    with pytest.raises(ConfigurationError) as raised:
        RedisStore.from_url(NOWHERE, no_such_option=1)
    assert isinstance(raised.value.__cause__, TypeError)


def pool_of(store: RedisStore) -> dict[str, Any]:
    """Return the options of the store's connections."""
    assert isinstance(store._client, Redis)
    return dict(store._client.connection_pool.connection_kwargs)


def test_connect() -> None:
    """The parts of an address go where they belong; TLS is the default."""
    store = RedisStore.connect(
        "example.org", 7000, username="u", password="p", db=2, timeout=3, prefix="x:", client_name="me"
    )
    options = pool_of(store)
    assert {name: options[name] for name in ("host", "port", "username", "password", "db", "client_name")} == {
        "host": "example.org",
        "port": 7000,
        "username": "u",
        "password": "p",
        "db": 2,
        "client_name": "me",
    }
    assert isinstance(store._client, Redis)
    assert store._client.connection_pool.connection_class is redis.asyncio.SSLConnection
    assert (store.prefix, store.timeout) == ("x:", 3)
    plain = RedisStore.connect("example.org", ssl=False)
    assert isinstance(plain._client, Redis)
    assert plain._client.connection_pool.connection_class is redis.asyncio.Connection


def test_time_outs_and_retries() -> None:
    """An own client never retries by itself, and is silent for a third of the store's time, unless it is told to."""
    options = pool_of(RedisStore.from_url(NOWHERE, timeout=3))
    assert (options["socket_timeout"], options["socket_connect_timeout"]) == (1, 1)
    assert options["retry"]._retries == 0
    assert pool_of(RedisStore.from_url(NOWHERE))["socket_timeout"] == pytest.approx(5 / 3)
    assert pool_of(RedisStore.from_url(NOWHERE, socket_timeout=9))["socket_timeout"] == 9


@pytest.mark.parametrize("made", ["url", "address"])
async def test_cluster(cluster: Cluster, logs: pytest.LogCaptureFixture, multiplex: bool, made: str) -> None:
    """A cluster's client is made from a URL or an address; commands go to the masters of their keys, and need no lock."""
    cluster.reset()
    if made == "url":
        store = RedisStore.from_url(cluster.url, cluster=True, multiplex=multiplex)
    else:
        port = cluster.nodes[0].port
        store = RedisStore.connect(HOST, port, cluster=True, ssl=False, multiplex=multiplex)
    async with store:
        assert isinstance(store._client, RedisCluster)
        assert store._client.get_nodes() == []
        idem = Idempotency(store)
        runs = [idem.run(f"k{number}", asyncio.sleep, 0, number) for number in range(30)]
        assert await asyncio.gather(*runs) == list(range(30))
        assert await idem.run("k0", must_not_run) == 0
    assert not any("MOVED" in master.text("INFO", "errorstats") for master in cluster.masters)
    held = [int(master.command("DBSIZE")[1:]) for master in cluster.masters]
    assert all(held)
    assert sum(held) == 30
    assert modes(logs) == []


async def test_ownership(redis_url: str, server: Server, multiplex: bool) -> None:
    """A store closes the client that it made, and leaves open the one that was brought, but for a connection of its own."""
    async with Proxy(HOST, server.port) as proxy:
        store = RedisStore.from_url(proxy.url, multiplex=multiplex)
        assert isinstance(await store.claim("k"), Claimed)
        await proxy.until_open(1)
        await store.aclose()
        await proxy.until_open(0)
        async with Redis.from_url(proxy.url) as client:
            assert await client.ping()
            brought = RedisStore(client, multiplex=multiplex)
            assert isinstance(await brought.claim("l"), Claimed)
            await proxy.until_open(2 if multiplex else 1)
            await brought.aclose()
            await proxy.until_open(1)
            assert [connection.is_connected for connection in client.connection_pool._available_connections] == [True]
            proxy.reset_counters()
            assert await client.ping()
            assert proxy.connections == 0
    bare = Bare()
    await RedisStore(bare).aclose()
    assert not bare.closed


def test_exported_lazily() -> None:
    """`import asyncidem` does not import redis-py; asking for what needs it does."""
    code = (
        "import sys, asyncidem; assert 'redis' not in sys.modules; "
        "from asyncidem import RedisStore, RedisClientProtocol; assert 'redis' in sys.modules; "
        "assert RedisStore.__name__ in dir(asyncidem) and RedisClientProtocol.__name__ in dir(asyncidem)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert asyncidem.RedisStore is RedisStore
    with pytest.raises(AttributeError, match="NoSuchStore"):
        _ = asyncidem.NoSuchStore


async def must_not_run() -> None:
    """Stand for an effect that nobody may have."""
    pytest.fail("the handler ran")


@pytest.mark.parametrize("method", ["get", "set", "delete", "pttl"])
async def test_synchronous_methods(method: str) -> None:
    """A method that is no coroutine method is a mistake that is named, not an outcome that is unknown."""
    client = Aged()
    setattr(client, method, lambda *_, **__: None)
    store = RedisStore(client, timeout=0.2)
    if method in ("get", "set"):
        with pytest.raises(ConfigurationError, match=f"Aged.{method} must be a coroutine method"):
            await Idempotency(store).run("k", must_not_run)
    elif method == "pttl":
        client.data["asyncidem:k"] = b"x"
        with pytest.raises(ConfigurationError, match=r"Aged.pttl must be a coroutine method"):
            await store.get("k")
    else:
        client.data["asyncidem:k"] = b"x"
        with pytest.raises(ConfigurationError, match=r"Aged.delete must be a coroutine method"):
            await store.delete("k")


@pytest.mark.parametrize(
    ("client", "missing"), [(Bare(), "atomic compare-and-set, pttl"), (Aged(), "atomic compare-and-set")]
)
async def test_plain_client_says_so_once(client: Bare, missing: str, logs: pytest.LogCaptureFixture) -> None:
    """A plain client's mode, and what is missing, is logged once, when the store is made."""
    store = RedisStore(client)
    assert modes(logs) == [(logging.WARNING, "lock", missing)]
    assert await Idempotency(store).run("k", asyncio.sleep, 0, 1) == 1
    assert await Idempotency(store).run("k", must_not_run) == 1
    assert len(modes(logs)) == 1


async def test_text_for_bytes() -> None:
    """A plain client may answer with text."""

    class Text(Bare):
        async def get(self, name: str) -> bytes | str | None:
            value = self.data.get(name)
            return None if value is None else value.decode()

    store = RedisStore(Text())
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    await store.complete(claim, '"ä"')
    replay = await store.claim("k")
    assert isinstance(replay, Replay)
    assert replay.record.data == '"ä"'


async def test_capable_server_says_nothing(
    store_at: StoreFactory, redis_url: str, logs: pytest.LogCaptureFixture
) -> None:
    """On a server that has everything there is nothing to say."""
    async with store_at(redis_url) as store:
        assert await Idempotency(store).run("k", asyncio.sleep, 0, 1) == 1
    assert modes(logs) == []


@pytest.mark.parametrize("decode_responses", [False, True])
async def test_server_without_scripts(
    store_at: StoreFactory, private_server: ServerFactory, logs: pytest.LogCaptureFixture, decode_responses: bool
) -> None:
    """A server without scripts is noticed before the first effect, used under a lock, and said so of once."""
    server = private_server("--rename-command", "EVAL", "", "--rename-command", "EVALSHA", "")
    async with store_at(server.url, decode_responses=decode_responses) as store:
        idem = Idempotency(store)
        runs = [idem.run(f"k{number}", asyncio.sleep, 0, number) for number in range(5)]
        assert await asyncio.gather(*runs) == list(range(5))
        assert await idem.run("k1", must_not_run) == 1
        claim = await store.claim("other")
        assert isinstance(claim, Claimed)
        await store.release(claim)
        assert await store.get("other") is None
    assert server.command("EXISTS", "asyncidem:k1:lock") == ":0"
    assert modes(logs) == [(logging.WARNING, "lock", "atomic compare-and-set")]


@pytest.fixture
async def old_server(redis_url: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Proxy]:
    """A server that takes no `GET` with `SET … NX`, as those before Redis 7.0: its own parser says so."""
    forward = _Link.forward

    def garble(link: _Link, frame: bytes) -> None:
        forward(link, frame.replace(b"\r\nNX\r\n$3\r\nGET\r\n", b"\r\nNX\r\n$3\r\nGOT\r\n"))

    monkeypatch.setattr(_Link, "forward", garble)
    async with Proxy(HOST, server.port) as proxy:
        yield proxy


async def test_server_before_7(store_at: StoreFactory, old_server: Proxy, logs: pytest.LogCaptureFixture) -> None:
    """A server without `SET NX GET` is served by a script, and the mode is said once, however many calls meet it."""
    async with store_at(old_server.url) as store:
        idem = Idempotency(store)
        assert await idem.run("first", asyncio.sleep, 0, 1) == 1
        assert modes(logs) == []
        runs = [idem.run(f"k{number}", asyncio.sleep, 0, number) for number in range(5)]
        assert await asyncio.gather(*runs) == list(range(5))
        assert modes(logs) == [(logging.INFO, "scripts", "SET with NX and GET (Redis 7.0)")]
        old_server.reset_counters()
        assert await idem.run("k", asyncio.sleep, 0, 1) == 1
        assert old_server.round_trips == 2
        assert await Idempotency(store, local_cache=4).run("k", must_not_run) == 1
    assert len(modes(logs)) == 1


async def test_nothing_is_sent_at_construction(store_at: StoreFactory) -> None:
    """Making a store opens no connection: a server that is down is met at the first call."""
    async with store_at(f"redis://{HOST}:{free_port()}", timeout=0.1) as store:
        with pytest.raises(asyncidem.StoreUnavailableError) as raised:
            await store.get("k")
        assert isinstance(raised.value.__cause__, exceptions.ConnectionError | TimeoutError)
