"""Sentinel: a master that dies under a crowd, sentinels that are gone or hang, and what a wrong address is told."""

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.sentinel import MasterNotFoundError

from asyncidem import Claimed, RedisStore, StoreUnavailableError

from conftest import require
from crowd import Call, Crowd
from proxy import Proxy
from sentinels import Watch
from servers import BINARIES, HOST, free_port

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    """A master with a replica and a sentinel; the last test of the module kills the master."""
    with Watch(require(*BINARIES), tmp_path_factory.mktemp("sentinel"), down_after=500) as watch:
        yield watch


async def claims(store: RedisStore) -> None:
    """Claim a key and give it back."""
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    await store.release(claim)


async def test_sentinels_that_do_not_answer(watch: Watch, multiplex: bool) -> None:
    """Of several sentinels one that answers is enough: one that is gone, one that hangs and one that lies cost nothing."""
    async with Proxy(HOST, watch.port) as hung:
        hung.black_hole(requests=True)
        gone = free_port()
        sentinels = [f"{HOST}:{gone}", (HOST, hung.port), (HOST, watch.replica.port), f"{HOST}:{watch.port}"]
        began = time.monotonic()
        async with RedisStore.from_sentinel(sentinels, service="payments", multiplex=multiplex) as store:
            await claims(store)
        assert time.monotonic() - began < 1
        await hung.until_open(0)


async def test_connections_end_with_the_store(watch: Watch, multiplex: bool) -> None:
    """Closing a store closes what it opened to the sentinels and to the master, and nothing of it is left."""
    tasks = asyncio.all_tasks()
    async with Proxy(HOST, watch.port) as sentinel:
        store = RedisStore.from_sentinel([(HOST, sentinel.port)], service="payments", multiplex=multiplex)
        await claims(store)
        assert sentinel.open_connections == 1
        await store.aclose()
        await sentinel.until_open(0)
        assert asyncio.all_tasks() == tasks


@pytest.mark.parametrize("same_loop", [False, True], ids=["next loop", "same loop"])
def test_fork(watch: Watch, multiplex: bool, same_loop: bool) -> None:
    """A child asks the sentinels over a connection of its own, and takes nothing from that of its parent."""
    store = RedisStore.from_sentinel([(HOST, watch.port)], service="payments", multiplex=multiplex)
    (sentinel,) = store._owned[1].sentinels

    def way() -> Any:
        (connection,) = sentinel.connection_pool._available_connections
        return connection._writer.get_extra_info("sockname")

    loop = asyncio.new_event_loop()
    loop.run_until_complete(claims(store))
    parents = way()
    child = os.fork()
    if child == 0:
        try:
            with contextlib.closing(loop if same_loop else asyncio.new_event_loop()) as own:
                own.run_until_complete(claims(store))
                assert way() != parents
                gc.collect()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    loop.run_until_complete(asyncio.wait_for(sentinel.sentinel_masters(), 5))
    assert way() == parents, "and the parent still has its own"
    loop.run_until_complete(claims(store))
    loop.run_until_complete(store.aclose())
    loop.close()


async def test_options(watch: Watch, multiplex: bool) -> None:
    """Options go to the master's connections, and those for the sentinels to theirs."""
    watch.ask("ACL", "SETUSER", "asker", "on", ">secret", "~*", "&*", "+@all")
    store = RedisStore.from_sentinel(
        [(HOST, watch.port)],
        service="payments",
        sentinel_kwargs={"username": "asker", "password": "secret"},
        db=3,
        prefix="x:",
        timeout=3,
        multiplex=multiplex,
    )
    async with store, Redis(host=HOST, port=watch.master.port, db=3) as client:
        claim = await store.claim("k")
        assert isinstance(claim, Claimed)
        assert await client.exists("x:k") == 1
        await store.release(claim)
    assert store.timeout == 3


@pytest.mark.parametrize(
    ("addresses", "service", "text"),
    [
        (["gone", "gone"], "payments", r"no sentinel answers; check their addresses: ConnectionError: .*"),
        (["hung"], "payments", r"no sentinel answers; check their addresses: TimeoutError: .*"),
        (["master"], "payments", r"no sentinel answers; check their addresses: ResponseError: unknown command"),
        (["sentinel"], "paymentz", r"the sentinels watch no 'paymentz', but 'payments': correct service="),
    ],
)
async def test_no_master(watch: Watch, multiplex: bool, addresses: list[str], service: str, text: str) -> None:
    """Sentinels that cannot be reached or do not know the name are an error in time that says which, nothing was sent."""
    async with Proxy(HOST, watch.port) as hung:
        hung.black_hole(requests=True)
        ports = {"gone": free_port(), "hung": hung.port, "master": watch.master.port, "sentinel": watch.port}
        sentinels = [(HOST, ports[address]) for address in addresses]
        async with RedisStore.from_sentinel(sentinels, service=service, timeout=0.6, multiplex=multiplex) as store:
            with pytest.raises(StoreUnavailableError, match=text) as raised:
                await store.claim("k")
            assert not raised.value.outcome_unknown
            assert isinstance(raised.value.__cause__, MasterNotFoundError)


async def test_wrong_password_of_a_sentinel(watch: Watch, multiplex: bool) -> None:
    """A password that the sentinels do not take is named as theirs."""
    options: dict[str, Any] = {"sentinel_kwargs": {"username": "nobody", "password": "wrong"}, "timeout": 0.6}
    async with RedisStore.from_sentinel(
        [(HOST, watch.port)], service="payments", multiplex=multiplex, **options
    ) as store:
        with pytest.raises(StoreUnavailableError, match=r"no sentinel answers.*AuthenticationError"):
            await store.claim("k")


async def test_killed_master(watch: Watch) -> None:
    """A master that dies is waited for within the time of a call on both paths, and what its replica had holds."""
    address = [f"{HOST}:{watch.port}"]
    async with contextlib.AsyncExitStack() as stack:
        stores = [
            await stack.enter_async_context(
                RedisStore.from_sentinel(address, service="payments", multiplex=multiplex, timeout=15)
            )
            for multiplex in (True, False, True, False)
        ]
        async with Crowd(stores) as crowd:
            safe = await crowd.copied(watch.master, watch.replica)
            killed = time.monotonic()
            watch.master.kill()
            async with asyncio.timeout(20):
                while not watch.promoted():
                    await asyncio.sleep(0.05)
            await crowd.go_on(64)

        def lost(call: Call) -> bool:
            return call.began < killed and call not in safe

        await crowd.check(lost=lost)
