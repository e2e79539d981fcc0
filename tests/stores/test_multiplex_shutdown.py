"""The end of a store, of its loop and of its process: no task, timer, socket or warning is left, whoever ends first."""

import asyncio
import contextlib
import gc
import os
import subprocess
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from asyncidem import Claimed, Idempotency, RedisStore
from asyncidem.stores.multiplex import MultiplexedLink

from alone import run_alone
from conftest import ServerFactory, require
from servers import BINARIES, Server

DESCRIPTORS: Final = Path("/proc/self/fd")


@pytest.fixture(scope="module")
def url(subject_server: Callable[[str], Server]) -> str:
    """A server that all tests of this module share, each with keys of its own."""
    return subject_server(require(*BINARIES)).url


def open_sockets() -> int:
    """Return how many sockets this process has open."""
    count = 0
    for descriptor in DESCRIPTORS.iterdir():
        with contextlib.suppress(OSError):
            count += str(descriptor.readlink()).startswith("socket:")
    return count


def timers() -> int:
    """Return how many timers the running loop holds that were not cancelled."""
    scheduled: list[asyncio.TimerHandle] = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    return sum(not handle.cancelled() for handle in scheduled)


async def work(store: RedisStore, name: str) -> None:
    """Use the store with a crowd, and with a value that is large."""
    idem = Idempotency(store)
    await asyncio.gather(*(idem.run(f"{name}{number}", asyncio.sleep, 0, number) for number in range(20)))
    await idem.run(f"{name} large", asyncio.sleep, 0, "x" * 100_000)


# -- the store ends first --------------------------------------------------------------------------------------------------


async def test_close_leaves_nothing(url: str) -> None:
    """A store that is closed leaves no task, timer or socket; used again it makes new ones, and leaves none of those."""
    tasks, sockets = asyncio.all_tasks(), open_sockets()
    store = RedisStore.from_url(url)
    for turn in range(3):
        await work(store, f"leaves nothing {turn}")
        assert open_sockets() == sockets + 2
        await store.aclose()
        assert asyncio.all_tasks() == tasks
        assert open_sockets() == sockets
        assert timers() == 0
    await store.aclose()


async def test_close_of_a_brought_client(url: str) -> None:
    """A client may be closed before the store that was made with it."""
    sockets = open_sockets()
    client = Redis.from_url(url)
    store = RedisStore(client)
    await work(store, "brought")
    await client.aclose()
    await work(store, "brought again")
    await store.aclose()
    await client.aclose()
    assert open_sockets() == sockets


async def test_close_while_calls_are_in_flight(private_server: ServerFactory) -> None:
    """Calls that are in flight when their store is closed end with an answer or an error of ours, and leave nothing."""
    server = private_server()
    tasks, sockets = asyncio.all_tasks(), open_sockets()
    store = RedisStore.from_url(server.url, timeout=0.6)
    await store.get("nothing")
    server.pause()
    calls = [asyncio.ensure_future(store.get(f"k{number}")) for number in range(20)]
    await asyncio.sleep(0)
    await asyncio.wait_for(store.aclose(), 2)
    results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 2)
    server.resume()
    assert {type(result).__name__ for result in results} == {"StoreUnavailableError"}
    await store.aclose()
    assert asyncio.all_tasks() == tasks
    assert open_sockets() == sockets


async def test_close_while_connecting(private_server: ServerFactory) -> None:
    """A store that is closed while its connection is made leaves none."""
    server = private_server()
    server.pause()
    tasks, sockets = asyncio.all_tasks(), open_sockets()
    store = RedisStore.from_url(server.url, timeout=3)
    call = asyncio.ensure_future(store.get("k"))
    await asyncio.sleep(0.02)
    call.cancel()
    await asyncio.wait([call])
    await asyncio.wait_for(store.aclose(), 1)
    assert asyncio.all_tasks() == tasks
    assert open_sockets() == sockets
    server.resume()


async def test_store_that_nobody_holds(url: str) -> None:
    """A store that nobody holds any more is collected, and its connection with it."""
    sockets = open_sockets()
    store = RedisStore.from_url(url, timeout=0.6)
    claim = await store.claim("held by nobody", lease=1)
    assert isinstance(claim, Claimed)
    await store.complete(claim, "1", ttl=1)
    async with asyncio.timeout(5):
        while timers() > 1:  # its own sees after a third of the time that nothing is waited for, and is no more
            await asyncio.sleep(0.02)
    link = store._link
    assert isinstance(link, MultiplexedLink)
    gone = [weakref.ref(thing) for thing in (store, link, *link._channels.values())]
    client: Any = store._client
    del store, link, claim
    gc.collect()
    assert [thing() for thing in gone] == [None] * 3
    async with asyncio.timeout(1):
        while open_sockets() > sockets:
            await asyncio.sleep(0)
    await client.aclose()


# -- the loop ends first ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_garbage() -> Iterator[None]:
    """What earlier tests left to be collected is not taken for what this one leaves."""
    gc.collect()
    yield
    gc.collect()


@pytest.mark.usefixtures("no_garbage")
def test_many_loops(url: str) -> None:
    """A store of a module that each loop uses and none closes leaks no descriptor, and warns of nothing."""
    store = RedisStore.from_url(url)
    counts = []
    for turn in range(6):
        asyncio.run(work(store, f"many loops {turn}"))
        gc.collect()
        counts.append(len(list(DESCRIPTORS.iterdir())))
    assert len(set(counts)) == 1
    asyncio.run(store.aclose())


@pytest.mark.usefixtures("no_garbage")
def test_two_loops_in_turn(url: str) -> None:
    """Two loops that run in turn, each a piece at a time, each get their answers."""
    store = RedisStore.from_url(url)
    loops = [asyncio.new_event_loop() for _ in range(2)]
    for turn in range(6):
        loops[turn % 2].run_until_complete(work(store, f"in turn {turn}"))
    for loop in loops:
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def test_without_closing(url: str) -> None:
    """A program that ends without closing its store is not told off for it."""
    code = """
async def main():
    store = RedisStore.from_url(url)
    idem = Idempotency(store)
    assert await asyncio.gather(*(idem.run(f"ends {n}", asyncio.sleep, 0, n) for n in range(20))) == list(range(20))
    await idem.run("ends large", asyncio.sleep, 0, "x" * 100_000)
    ending()
"""
    assert run_alone(code, url) < 1


def test_without_closing_a_store_of_the_module(url: str) -> None:
    """The same for a store that lives longer than several loops, and for one whose client is the program's own."""
    code = """
client = Redis.from_url(url)
stores = RedisStore.from_url(url), RedisStore(client)
async def main(turn="last"):
    for store in stores:
        await Idempotency(store).run(f"module {turn}", asyncio.sleep, 0, turn)
    ending()
for turn in range(3):
    asyncio.run(main(turn))
"""
    assert run_alone(code, url) < 1


def test_with_handlers_that_still_run(url: str) -> None:
    """A loop that ends while handlers run, and are renewed, leaves no task and no warning."""
    code = """
async def main():
    store = RedisStore.from_url(url)
    idem = Idempotency(store, lease=0.1)
    tasks = [asyncio.create_task(idem.run(f"runs {n}", asyncio.sleep, 60)) for n in range(10)]
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in tasks)
    ending()
"""
    assert run_alone(code, url) < 1


def test_store_closed_by_the_end_of_the_loop(url: str) -> None:
    """A store in an asynchronous generator that only the end of the loop closes is closed without an error."""
    code = """
async def stores():
    async with RedisStore.from_url(url) as store:
        await store.get("nothing")
        yield store
async def main():
    global generator
    generator = stores()
    await Idempotency(await anext(generator)).run("generator", asyncio.sleep, 0, 1)
    ending()
"""
    assert run_alone(code, url) < 1


SILENT = """
async def main():
    store = RedisStore.from_url(url)
    claim = await store.claim("before")
    open(sys.argv[2], "w").close()  # the server may fall silent
    while True:
        try:
            await asyncio.wait_for(store.get("nothing"), 0.05)
        except TimeoutError:
            break
    task = asyncio.create_task({under_way})
    await asyncio.sleep(0.05)
    assert not task.done()
    ending()
"""


@pytest.mark.parametrize(
    "under_way",
    [
        "store.claim('k')",
        "asyncio.wait([asyncio.create_task(store.claim(f'k{n}')) for n in range(50)])",
        "store.complete(claim, '1')",
        "store.complete(claim, '\"' + 'x' * 5_000_000 + '\"')",
        "store.release(claim)",
        "store.get('k')",
        "RedisStore.from_url(url).claim('k')",
        "store.aclose()",
        "Idempotency(store, wait=30).run('before', asyncio.sleep, 0)",
    ],
    ids=["claim", "claims", "completion", "large completion", "release", "read", "connecting", "closing", "waiting"],
)
def test_on_a_silent_server(tmp_path_factory: pytest.TempPathFactory, under_way: str) -> None:
    """A loop that ends on a server that is silent, with a call under way, ends in good time and leaves nothing."""
    if under_way == "store.aclose()":  # with something under way, or it is done at once
        under_way = "asyncio.wait([asyncio.create_task(store.claim('k')), asyncio.create_task(store.aclose())])"
    directory = tmp_path_factory.mktemp("silent")
    with Server(require(*BINARIES), directory) as server:

        def freeze(process: subprocess.Popen[str]) -> None:
            while not (directory / "ready").exists():
                assert process.poll() is None
                time.sleep(0.005)
            server.pause()

        assert run_alone(SILENT.format(under_way=under_way), server.url, str(directory / "ready"), during=freeze) < 2


# -- another process -------------------------------------------------------------------------------------------------------


def test_child_that_ends_the_loop_of_its_parent(url: str) -> None:
    """A child that goes on with its parent's loop, and ends it, does not take its parent's connection with it."""
    loop = asyncio.new_event_loop()
    store = RedisStore.from_url(url, timeout=6)
    loop.run_until_complete(work(store, "parent"))
    child = os.fork()
    if child == 0:
        try:
            loop.run_until_complete(work(store, "child"))
            loop.run_until_complete(store.aclose())
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(asyncio.sleep(0))
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    began = time.monotonic()
    loop.run_until_complete(work(store, "parent again"))
    assert time.monotonic() - began < 1.5, "its connection was lost, and it noticed by the silence"
    loop.run_until_complete(store.aclose())
    loop.close()
