"""`wait_replicas` while the master changes: what was written is confirmed by whoever is the master now, or not at all."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from asyncidem import Claimed, RedisStore, StoreUnavailableError

from conftest import StoreFactory, require
from proxy import Proxy
from servers import BINARIES, HOST, Server
from stores.stores_under_test import WANTED

pytestmark = pytest.mark.once

EACH: Final = [kind for kind in BINARIES if kind in WANTED]
"""They differ in what they answer to a WAIT whose master is demoted."""

TIMEOUT: Final = 6
"""Seconds for a store call: replicas are waited for 1.2 s at a time."""

NOBODY: Final = ("REPLICAOF", HOST, "1")
"""Makes a replica of a server, whose master it never reaches."""

ServerMaker = Callable[[], Server]


@pytest.fixture(params=EACH)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerMaker]:
    """Servers of each kind that end with the test."""
    kind, servers = require(request.param), []

    def start() -> Server:
        servers.append(Server(kind, tmp_path / str(len(servers)), "--repl-diskless-sync-delay", "0").start())
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def pair(make: ServerMaker) -> tuple[Server, Server]:
    """A master and a replica that is in step."""
    master, replica = make(), make()
    follow(replica, master)
    while master.command("WAIT", "1", "1000") != ":1":
        time.sleep(0.01)
    return master, replica


@pytest.fixture
async def proxy(pair: tuple[Server, Server]) -> AsyncIterator[Proxy]:
    """The name of the master: new connections go where it is said to be."""
    async with Proxy(HOST, pair[0].port) as proxy:
        yield proxy


def follow(replica: Server, master: Server) -> None:
    """Make one server the replica of another."""
    assert replica.command("REPLICAOF", HOST, str(master.port)) == "+OK"


def number(server: Server, section: str, pattern: str) -> int:
    """Return the sum of the numbers that a pattern finds in INFO."""
    return sum(map(int, re.findall(pattern, server.text("INFO", section))))


async def until(condition: Callable[[], bool]) -> None:
    """Return once something is so."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def blocked(server: Server) -> None:
    """Return once a WAIT blocks its connection."""
    await until(lambda: number(server, "clients", r"blocked_clients:(\d+)") == 1)


async def confirming(store: RedisStore, master: Server) -> asyncio.Task[Any]:
    """Return a claim that waits for replicas, which blocks it."""
    await store.get("nothing")
    claim = asyncio.create_task(store.claim("k"))
    await blocked(master)
    return claim


async def test_a_master_that_is_demoted_for_a_moment(pair: tuple[Server, Server], store_at: StoreFactory) -> None:
    """A claim whose WAIT was ended by it is confirmed when the server is a master again and its replica is back."""
    master, replica = pair
    replica.pause()
    async with store_at(master.url, wait_replicas=1, timeout=TIMEOUT) as store:
        claim = await confirming(store, master)
        assert master.command(*NOBODY) == "+OK"
        await until(lambda: number(master, "clients", r"blocked_clients:(\d+)") == 0)
        # Redis 6.2 counts what a script meets as another error.
        await until(lambda: number(master, "errorstats", r"errorstat_(?:READONLY|ERR):count=(\d+)") > 1)
        assert not claim.done(), "a server that is no master refuses nothing for good"
        assert master.command("REPLICAOF", "NO", "ONE") == "+OK"
        replica.resume()
        assert isinstance(await claim, Claimed)
        assert replica.text("GET", "asyncidem:k") == master.text("GET", "asyncidem:k")


async def test_a_master_that_stays_demoted(pair: tuple[Server, Server], store_at: StoreFactory) -> None:
    """Where nobody else is the master, the claim fails at its deadline, and says what became of the server."""
    master, replica = pair
    replica.pause()
    async with store_at(master.url, wait_replicas=1, timeout=0.9) as store:
        claim = await confirming(store, master)
        began = time.monotonic()
        assert master.command(*NOBODY) == "+OK"
        with pytest.raises(StoreUnavailableError, match=r"written, but not confirmed by replicas: .*; it is a replica"):
            await claim
        assert 0.5 < time.monotonic() - began < 2
        assert master.command("REPLICAOF", "NO", "ONE") == "+OK"


async def test_a_replica_that_does_not_come_back(pair: tuple[Server, Server], store_at: StoreFactory) -> None:
    """Where the master is one again, and has no replica by the deadline, the claim fails, and says so."""
    master, replica = pair
    replica.pause()
    async with store_at(master.url, wait_replicas=1, timeout=1.5) as store:
        claim = await confirming(store, master)
        began = time.monotonic()
        assert master.command(*NOBODY) == "+OK"
        assert master.command("REPLICAOF", "NO", "ONE") == "+OK"
        with pytest.raises(StoreUnavailableError, match=r"^0 of 1 replicas acknowledged the write within \d+ ms;"):
            await claim
        assert time.monotonic() - began > 0.8, "longer than the fifth of the time that is given to replicas as a rule"


async def test_a_failover_under_a_blocked_wait(
    make: ServerMaker, pair: tuple[Server, Server], proxy: Proxy, store_at: StoreFactory
) -> None:
    """The new master is asked, and while replicas have yet to find it, again and again, until there are enough."""
    master, replica = pair
    async with store_at(proxy.url, wait_replicas=2, timeout=TIMEOUT) as store:
        claim = await confirming(store, master)  # the one replica that there is has it
        await until(lambda: replica.command("EXISTS", "asyncidem:k") == ":1")
        proxy.target = (HOST, replica.port)
        assert replica.command("REPLICAOF", "NO", "ONE") == "+OK"
        follow(master, replica)
        await until(lambda: number(replica, "commandstats", r"cmdstat_wait:calls=(\d+)") > 0)
        await blocked(replica)
        follow(make(), replica)
        assert isinstance(await claim, Claimed)


async def test_what_a_replica_does_not_have_is_no_answer(pair: tuple[Server, Server], store_at: StoreFactory) -> None:
    """A record that is not there, at a server that is a replica for now, is lost only when a master says so."""
    master, _ = pair
    assert master.command(*NOBODY) == "+OK"
    async with store_at(master.url, wait_replicas=1, timeout=TIMEOUT) as store:
        assert store._replicas is not None
        confirming = asyncio.create_task(store._replicas.confirm("asyncidem:k", b"what was written"))
        await until(lambda: number(master, "commandstats", r"cmdstat_wait:calls=\d+.*,failed_calls=(\d+)") > 1)
        assert not confirming.done()
        assert master.command("REPLICAOF", "NO", "ONE") == "+OK"
        with pytest.raises(StoreUnavailableError, match="replaced, or lost with its master"):
            await confirming
