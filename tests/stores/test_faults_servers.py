"""Servers that refuse, hang or cannot write: an error in time, nothing run, nothing left; after the effect its result."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest
from redis import exceptions
from redis.asyncio import Redis

from asyncidem import (
    Claimed,
    CompletionError,
    Event,
    Idempotency,
    RedisStore,
    Replay,
    State,
    StoreError,
    StoreUnavailableError,
)
from asyncidem.stores.multiplex import MultiplexedLink

from conftest import ServerFactory, StoreFactory
from proxy import Proxy
from servers import HOST, Server, free_port

KEY = "asyncidem:k"
TIMEOUT = 0.3
SLACK = 0.7
"""For a busy machine; retries of redis-py's own would take many seconds."""

CUT_OFF = TimeoutError
"""The last try of several may have been cut off by the deadline."""


@dataclass
class Trouble:
    """What is wrong with a server, and what the caller is told."""

    words: tuple[tuple[str, ...], ...]
    error: type[StoreError]
    cause: type[Exception] | tuple[type[Exception], ...]
    text: str
    user: str = ""


TROUBLES = {
    "oom": Trouble(
        (("CONFIG", "SET", "maxmemory", "1"),), StoreUnavailableError, exceptions.ResponseError, "maxmemory"
    ),
    "readonly": Trouble(
        (("REPLICAOF", HOST, "1"),),
        StoreUnavailableError,
        (exceptions.ReadOnlyError, CUT_OFF),
        "no answer from the server",
    ),
    "noreplicas": Trouble(
        (("CONFIG", "SET", "min-replicas-to-write", "1"),),
        StoreUnavailableError,
        exceptions.ResponseError,
        "NOREPLICAS",
    ),
    "no eval": Trouble(
        (("ACL", "SETUSER", "u", "on", ">p", "~*", "+@all", "-eval", "-evalsha"),),
        StoreError,
        exceptions.NoPermissionError,
        "EVALSHA",
        "u:p@",
    ),
    "no set": Trouble(
        (("ACL", "SETUSER", "u", "on", ">p", "~*", "+@all", "-set"),),
        StoreError,
        exceptions.ResponseError,
        "permission|can't run this command",
        "u:p@",
    ),
    "no key": Trouble(
        (("ACL", "SETUSER", "u", "on", ">p", "resetkeys", "~other:*", "+@all"),),
        StoreError,
        exceptions.NoPermissionError,
        "the prefix",
        "u:p@",
    ),
    "wrong password": Trouble(
        (("ACL", "SETUSER", "u", "on", ">p", "~*", "+@all"),),
        StoreError,
        exceptions.AuthenticationError,
        "password",
        "u:wrong@",
    ),
    "no password": Trouble(
        (("CONFIG", "SET", "requirepass", "p"),), StoreError, exceptions.AuthenticationError, "password"
    ),
    "wrong type": Trouble((("RPUSH", KEY, "x"),), StoreError, exceptions.ResponseError, "another Redis type"),
}


@pytest.fixture
async def proxy(redis_url: str, server: Server) -> AsyncIterator[Proxy]:
    """A proxy to the shared server."""
    async with Proxy(HOST, server.port) as proxy:
        yield proxy


async def must_not_run() -> int:
    """Stand for an effect that nobody may have."""
    pytest.fail("the handler ran")


async def background(store: RedisStore) -> None:
    """Wait for what the store repeats in the background."""
    while tasks := set(store._background):
        await asyncio.wait(tasks)


async def refused_call(store: RedisStore) -> StoreError:
    """Return what a call is told, within the store's time; its handler does not run."""
    events: list[Event] = []
    began = time.monotonic()
    with pytest.raises(StoreError) as raised:
        await Idempotency(store, hooks=(events.append,)).run("k", must_not_run)
    assert time.monotonic() - began < store.timeout + SLACK
    assert [event.name for event in events] == ["store_error"]
    assert events[0].error is raised.value
    return raised.value


def connected(store: RedisStore) -> bool:
    """Tell whether a multiplexed store has a connection."""
    assert isinstance(store._link, MultiplexedLink)
    return any(channel._wire is not None for channel in store._link._channels.values())


CASES = {
    f"{name}-{'later' if warm else 'first'}": (trouble, warm)
    for name, trouble in TROUBLES.items()
    for warm in (False, True)
    # Only the first claim can show that scripts are forbidden: see `test_refused_completion`.
    if not (warm and name == "no eval")
}


@pytest.mark.parametrize(("trouble", "warm"), CASES.values(), ids=list(CASES))
async def test_refusals(
    store_at: StoreFactory, private_server: ServerFactory, multiplex: bool, trouble: Trouble, warm: bool
) -> None:
    """What the server refuses is an error before the handler runs, its cause redis-py's, and nothing was written."""
    server = private_server()
    url = server.url.replace("//", f"//{trouble.user}")
    if warm and trouble.user:
        assert server.command("ACL", "SETUSER", "u", "on", ">p", "~*", "+@all") == "+OK"
        url = server.url.replace("//", "//u:p@")
    async with store_at(url, timeout=TIMEOUT) as store:
        if warm:
            assert await Idempotency(store).run("before", asyncio.sleep, 0, 1) == 1
            # Authentication belongs to a connection: a later one meets it.
            if multiplex:
                server.command("CLIENT", "KILL", "TYPE", "normal")
                async with asyncio.timeout(1):
                    while connected(store):
                        await asyncio.sleep(0)
            else:
                await store._client.connection_pool.disconnect()  # type: ignore[union-attr]
        for words in trouble.words:
            assert server.command(*words)[0] in "+:"
        if "wrong" in trouble.user and warm:
            assert server.command("ACL", "SETUSER", "u", "<p", ">q") == "+OK"
        error = await refused_call(store)
    assert type(error) is trouble.error
    assert isinstance(error.__cause__, trouble.cause)
    assert not error.outcome_unknown
    with pytest.raises(StoreError, match=trouble.text):
        raise error
    assert not store._background


async def test_refused_connection(store_at: StoreFactory) -> None:
    """A port that nobody listens on: nothing was sent, and the caller knows it."""
    async with store_at(f"redis://{HOST}:{free_port()}", timeout=TIMEOUT) as store:
        error = await refused_call(store)
        assert type(error) is StoreUnavailableError
        assert isinstance(error.__cause__, exceptions.ConnectionError | CUT_OFF)
        assert not error.outcome_unknown
        assert not store._background


@pytest.mark.parametrize("connected", [False, True])
async def test_hung_server(store_at: StoreFactory, private_server: ServerFactory, connected: bool) -> None:
    """A frozen server: an error in time, and when it goes on nothing of the claim is left."""
    server = private_server()
    async with store_at(server.url, timeout=TIMEOUT) as store:
        if connected:
            assert isinstance(await store.claim("before"), Claimed)
        server.pause()
        error = await refused_call(store)
        assert type(error) is StoreUnavailableError
        assert isinstance(error.__cause__, exceptions.RedisError | CUT_OFF)
        assert error.outcome_unknown == connected
        server.resume()
        await background(store)
        async with Redis.from_url(server.url) as direct:
            assert await direct.exists(KEY) == 0


@pytest.mark.parametrize("requests", [False, True])
async def test_black_hole(store_at: StoreFactory, proxy: Proxy, redis_url: str, requests: bool) -> None:
    """A network that swallows: an error in time, and the key is free as soon as there are answers again."""
    async with store_at(proxy.url, timeout=TIMEOUT) as store:
        assert isinstance(await store.claim("before"), Claimed)
        proxy.black_hole(requests=requests)
        error = await refused_call(store)
        assert type(error) is StoreUnavailableError
        assert error.outcome_unknown
        proxy.heal()
        await background(store)
        async with Redis.from_url(redis_url) as direct:
            assert await direct.exists(KEY) == 0


async def test_silence_costs_a_third(store_at: StoreFactory, proxy: Proxy) -> None:
    """A connection that went silent is dropped after a third of the time, and the command repeated on another."""
    async with store_at(proxy.url, timeout=TIMEOUT) as store:
        assert isinstance(await store.claim("before"), Claimed)
        proxy.hold_replies(b"asyncidem:k")
        call = asyncio.get_running_loop().create_task(store.claim("k"))
        await proxy.reply_held.wait()
        proxy._hold_replies.left = 0  # held for the first connection alone
        assert isinstance(await call, Claimed)


async def test_other_calls_are_errors_of_ours(store_at: StoreFactory, private_server: ServerFactory) -> None:
    """No call of the store lets an exception of redis-py out bare, nor takes longer than its time."""
    server = private_server()
    async with store_at(server.url, timeout=TIMEOUT) as store:
        claim = await store.claim("k")
        other = await store.claim("other")
        third = await store.claim("third")
        assert isinstance(claim, Claimed)
        assert isinstance(other, Claimed)
        assert isinstance(third, Claimed)
        server.kill()
        began = time.monotonic()
        calls = (
            store.get("k"),
            store.delete("k"),
            store.renew(third),
            store.complete(claim, "1"),
            store.release(other),
        )
        for raised in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(raised, StoreUnavailableError)
            assert isinstance(raised.__cause__, exceptions.ConnectionError | CUT_OFF)
        assert time.monotonic() - began < TIMEOUT + SLACK
        server.start()


@pytest.mark.parametrize("call", ["get", "delete"])
async def test_wrong_type_elsewhere(store_at: StoreFactory, redis_url: str, server: Server, call: str) -> None:
    """A key of another Redis type is an error that says so, and stays what it is."""
    server.command("RPUSH", KEY, "x")
    async with store_at(redis_url) as store:
        with pytest.raises(StoreError, match="another Redis type"):
            await getattr(store, call)("k")
        assert await store.get("other") is None
    assert server.command("LLEN", KEY) == ":1"


async def test_store_error_run(store_at: StoreFactory, caplog: pytest.LogCaptureFixture) -> None:
    """With `on_store_error="run"` a call whose store is down runs unprotected, and says so."""
    events: list[str] = []
    async with store_at(f"redis://{HOST}:{free_port()}", timeout=TIMEOUT) as store:
        idem = Idempotency(store, on_store_error="run", hooks=(lambda event: events.append(event.name),))
        assert await idem.run("k", asyncio.sleep, 0, 7) == 7
    assert events == ["store_error", "ran_unprotected"]
    assert [(record.levelno, record.message) for record in caplog.records] == [(logging.WARNING, "ran_unprotected")]


async def test_store_error_run_and_a_refusal(store_at: StoreFactory, redis_url: str, server: Server) -> None:
    """With `on_store_error="run"` what is wrong, and not down, is an error nevertheless."""
    server.command("RPUSH", KEY, "x")
    async with store_at(redis_url) as store:
        with pytest.raises(StoreError, match="another Redis type"):
            await Idempotency(store, on_store_error="run").run("k", must_not_run)


AFTER: dict[str, tuple[Callable[[Server], object], Callable[[Server], object]]] = {
    "killed": (Server.kill, Server.start),
    "frozen": (Server.pause, Server.resume),
    "oom": (
        lambda server: server.command("CONFIG", "SET", "maxmemory", "1"),
        lambda server: server.command("CONFIG", "SET", "maxmemory", "0"),
    ),
    "readonly": (
        lambda server: server.command("REPLICAOF", HOST, "1"),
        lambda server: server.command("REPLICAOF", "NO", "ONE"),
    ),
    "noreplicas": (
        lambda server: server.command("CONFIG", "SET", "min-replicas-to-write", "1"),
        lambda server: server.command("CONFIG", "SET", "min-replicas-to-write", "0"),
    ),
}


@pytest.mark.parametrize(
    ("hurt", "heal", "choice"),
    [*((*steps, "return") for steps in AFTER.values()), (*AFTER["killed"], "raise")],
    ids=[*AFTER, "killed, raise"],
)
async def test_after_the_effect(
    store_at: StoreFactory,
    private_server: ServerFactory,
    caplog: pytest.LogCaptureFixture,
    hurt: Callable[[Server], object],
    heal: Callable[[Server], object],
    choice: str,
) -> None:
    """A server that fails after the effect: the caller has its value, and the completion lands when there are answers."""
    server = private_server()
    events: list[Event] = []

    async def handler() -> str:
        hurt(server)
        return "charged"

    async with store_at(server.url, timeout=TIMEOUT) as store:
        idem = Idempotency(store, hooks=(events.append,), on_completion_error=choice)  # type: ignore[arg-type]
        if choice == "return":
            assert await idem.run("k", handler) == "charged"
        else:
            with pytest.raises(CompletionError) as raised:
                await idem.run("k", handler)
            assert raised.value.result == "charged"
            assert isinstance(raised.value.__cause__, StoreUnavailableError)
            assert raised.value.__cause__.__cause__ is not None
        assert [event.name for event in events] == ["claimed", "completion_failed"]
        assert isinstance(events[1].error, StoreUnavailableError)
        assert [(record.levelno, record.message) for record in caplog.records] == [
            (logging.WARNING, "completion_failed")
        ]
        heal(server)
        await background(store)
        assert await idem.run("k", must_not_run) == "charged"


async def test_refused_completion(store_at: StoreFactory, private_server: ServerFactory) -> None:
    """A completion that the server refuses for good is not repeated; the caller has its value."""
    server = private_server()
    server.command("ACL", "SETUSER", "u", "on", ">p", "~*", "+@all")

    async def handler() -> str:
        server.command("ACL", "SETUSER", "u", "-set", "-eval", "-evalsha")
        return "charged"

    async with store_at(server.url.replace("//", "//u:p@"), timeout=TIMEOUT) as store:
        with pytest.raises(CompletionError) as raised:
            await Idempotency(store, on_completion_error="raise").run("k", handler)
        assert raised.value.result == "charged"
        assert type(raised.value.__cause__) is StoreError
        assert not store._background


async def test_completion_by_aclose(store_at: StoreFactory, proxy: Proxy, redis_url: str) -> None:
    """A completion that was not acknowledged is repeated by `aclose` before the store is gone."""
    store = store_at(proxy.url, timeout=TIMEOUT)

    async def handler() -> str:
        proxy.refuse()
        return "charged"

    assert await Idempotency(store).run("k", handler) == "charged"
    await proxy.start()
    await store.aclose()
    async with store_at(redis_url) as other:
        replay = await other.claim("k")
        assert isinstance(replay, Replay)
        assert replay.record.data == '"charged"'


async def test_release_failed(
    store_at: StoreFactory, proxy: Proxy, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A release that fails hides nothing of what the handler raised, and is repeated until it lands."""
    async with store_at(proxy.url, timeout=TIMEOUT) as store:

        async def handler() -> None:
            proxy.refuse()
            raise KeyError("declined")

        with pytest.raises(KeyError, match="declined"):
            await Idempotency(store).run("k", handler)
        assert [record.message for record in caplog.records] == ["release_failed"]
        await proxy.start()
        await background(store)
    async with Redis.from_url(redis_url) as direct:
        assert await direct.exists(KEY) == 0


async def test_readonly_drops_the_connection(store_at: StoreFactory, private_server: ServerFactory) -> None:
    """Each connection to what has become a replica is dropped: its name may lead to another node by now."""
    server = private_server()
    async with Proxy(HOST, server.port) as proxy, store_at(proxy.url) as store:

        def tries() -> int:
            return sum(KEY.encode() in request for request in proxy.requests)

        assert isinstance(await store.claim("before"), Claimed)
        proxy.reset_counters()
        server.command("REPLICAOF", HOST, "1")
        call = asyncio.get_running_loop().create_task(store.claim("k"))
        while tries() < 3:
            await asyncio.sleep(0)
        server.command("REPLICAOF", "NO", "ONE")
        assert isinstance(await call, Claimed)
        assert proxy.connections == tries() - 1
        await proxy.until_open(1)


async def test_passing_refusal(store_at: StoreFactory, private_server: ServerFactory) -> None:
    """A replica that becomes the master within the time of the call is waited for."""
    server = private_server()
    async with store_at(server.url, timeout=5) as store:
        assert isinstance(await store.claim("before"), Claimed)
        server.command("REPLICAOF", HOST, "1")
        call = asyncio.get_running_loop().create_task(store.claim("k"))
        await asyncio.wait([call], timeout=0.02)
        assert not call.done()
        server.command("REPLICAOF", "NO", "ONE")
        assert isinstance(await call, Claimed)
        record = await store.get("k")
        assert record is not None
        assert record.state is State.INPROGRESS
