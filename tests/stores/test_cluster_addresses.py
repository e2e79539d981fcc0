"""Where a cluster's nodes are: all of those known are gone, one hangs, one is cut off from the others."""

import asyncio
import random
from collections.abc import Iterator

import pytest
from redis.asyncio import RedisCluster
from redis.asyncio.cluster import ClusterNode

from asyncidem import Claimed, Idempotency, RedisStore

from conftest import require
from proxy import Proxy
from servers import BINARIES, HOST, Cluster, Server


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A cluster of one node."""
    kind = require(*BINARIES)
    with Server(kind, tmp_path_factory.mktemp(f"lone-{kind}"), "--cluster-enabled", "yes") as server:
        assert server.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383") == "+OK"
        while "cluster_state:ok" not in server.text("CLUSTER", "INFO"):
            pass
        yield server


@pytest.mark.parametrize("brought", [False, True], ids=["own", "brought"])
async def test_all_known_nodes_are_gone(lone: Server, multiplex: bool, brought: bool) -> None:
    """Where all nodes that were found have other addresses by now, the one that the client was given leads there."""
    lone.reset()
    async with Proxy(HOST, lone.port) as given, Proxy(HOST, lone.port) as old, Proxy(HOST, lone.port) as new:
        assert lone.command("CONFIG", "SET", "cluster-announce-ip", HOST) == "+OK"
        assert lone.command("CONFIG", "SET", "cluster-announce-port", str(old.port)) == "+OK"
        client = RedisCluster.from_url(given.url)
        async with (
            RedisStore(client, multiplex=multiplex)
            if brought
            else RedisStore.from_url(given.url, cluster=True, multiplex=multiplex)
        ) as store:
            claim = await store.claim("k")
            assert isinstance(claim, Claimed)
            assert old.open_connections
            assert lone.command("CONFIG", "SET", "cluster-announce-port", str(new.port)) == "+OK"
            old.refuse()
            await store.complete(claim, "1")
            assert new.open_connections
        await client.aclose()


async def test_node_that_hangs_as_the_topology_is_read(
    cluster: Cluster, multiplex: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that hangs is given up in time, whatever patience the client that was brought has, and another is asked."""
    monkeypatch.setattr(random, "shuffle", lambda _: None)  # newer versions of redis-py ask in any order
    cluster.reset()
    async with Proxy(HOST, cluster.nodes[0].port) as hung:
        hung.black_hole(requests=True)
        nodes = [ClusterNode(HOST, port) for port in (hung.port, cluster.nodes[1].port)]
        client = RedisCluster(startup_nodes=nodes, socket_timeout=None, socket_connect_timeout=None)
        async with RedisStore(client, timeout=1.5, multiplex=multiplex) as store:
            assert isinstance(await store.claim("k"), Claimed)
        await client.aclose()


async def test_broken_node_holds_up_no_other(cluster: Cluster, multiplex: bool) -> None:
    """While one node's commands wait for the topology, which nobody tells, those for the other nodes go on."""
    cluster.reset()
    async with RedisStore.from_url(cluster.url, cluster=True, multiplex=multiplex) as store:
        idem = Idempotency(store)
        await idem.run("k", asyncio.sleep, 0, 1)
        routes = store._link._routes  # type: ignore[attr-defined]
        names = {number: routes.find(f"asyncidem:{number}").name for number in range(20)}
        gate = asyncio.Event()
        read = routes._manager.initialize

        async def slow() -> None:
            await gate.wait()
            await read()

        routes._manager = _Slow(routes._manager, slow)
        broken = names[0]
        routes._doubted.add(broken)
        waiting = asyncio.ensure_future(idem.run("0", asyncio.sleep, 0, 0))
        for number in (number for number, name in names.items() if name != broken):
            assert await idem.run(str(number), asyncio.sleep, 0, number) == number
        assert not waiting.done()
        gate.set()
        assert await waiting == 0


class _Slow:
    """A client's topology whose reading takes as long as it is told to."""

    def __init__(self, manager: object, initialize: object) -> None:
        self._manager = manager
        self.initialize = initialize

    def __getattr__(self, name: str) -> object:
        return getattr(self._manager, name)
