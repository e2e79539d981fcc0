"""Commands over multiplexed connections to the nodes of a cluster: routes, redirections, nodes that come and go."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from asyncidem import StoreUnavailableError
from asyncidem.stores import channel as channel_module
from asyncidem.stores import link as link_module
from asyncidem.stores import primitives
from asyncidem.stores.multiplex import MultiplexedLink
from asyncidem.stores.routes import ClusterRoutes

from loops import run_virtual
from wires import OK, FakeNode, FakeRoutes, LoopClock, answer_with, bulk, script, turns, words

GET = ("GET", "k")
SCRIPT = script("return 1")


@pytest.fixture
def node() -> FakeNode:
    """A server in memory that says OK."""
    node = FakeNode()
    node.answer = lambda _: OK
    return node


async def test_routes_are_read_first() -> None:
    """Where the routes do not know, they are asked before anything is sent."""
    a, b = FakeNode("a:1"), FakeNode("b:1")
    b.answer = lambda _: bulk(b"v")
    routes = FakeRoutes(a, b)
    routes.first, routes.after_refresh = None, b
    link = MultiplexedLink(routes, 3)
    assert await link.exchange("k", GET) == [b"v"]
    assert routes.refreshed == 1
    assert a.connections == []
    await link.aclose()


def test_routes_that_never_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that nobody serves within the time of the call is an error, and nothing was sent."""
    for module in (channel_module, link_module, primitives):
        monkeypatch.setattr(module, "time", LoopClock)

    async def main() -> None:
        node = FakeNode()
        routes = FakeRoutes(node)
        routes.first = None
        link = MultiplexedLink(routes, 3)
        with pytest.raises(StoreUnavailableError, match="no node of the cluster serves") as raised:
            await link.exchange("k", GET)
        assert not raised.value.outcome_unknown
        assert 5 < routes.refreshed < 100
        await link.aclose()

    run_virtual(main())


async def test_ask_is_asked_once() -> None:
    """A node that is to be asked gets ASKING before each command, this once, in one write; the next call begins anew."""
    a, b = FakeNode("a:1"), FakeNode("b:1")
    replies = [b"-ASK 5 b:1\r\n"] * 2
    a.answer = lambda _: replies.pop() if replies else bulk(b"a")
    b.answer = answer_with({b"GET": bulk(b"b"), b"PTTL": b":7\r\n"})
    routes = FakeRoutes(a, b)
    routes.asks = ["b:1"]
    link = MultiplexedLink(routes, 3)
    assert await link.exchange("k", GET, ("PTTL", "k")) == [b"b", 7]
    assert [command[0] for command in words(b)] == [b"ASKING", b"GET", b"ASKING", b"PTTL"]
    assert len(b.transport.writes) == 1
    assert await link.exchange("k", GET) == [b"a"]
    assert len(words(b)) == 4
    await link.aclose()


async def test_ask_a_node_that_is_not_known() -> None:
    """A node that is to be asked and is not known makes the routes be read."""
    a = FakeNode("a:1")
    replies = [b"-ASK 5 b:1\r\n"]
    a.answer = lambda command: OK if command[0] == b"ASKING" else replies.pop() if replies else bulk(b"a")
    routes = FakeRoutes(a)
    routes.after_refresh = a
    routes.asks = ["b:1"]
    link = MultiplexedLink(routes, 3)
    assert await link.exchange("k", GET) == [b"a"]
    assert routes.refreshed == 1
    await link.aclose()


async def test_moved() -> None:
    """A command that was moved goes to the other node; scripts go with their source where it does not know them."""
    a, b = FakeNode("a:1"), FakeNode("b:1")
    a.answer = lambda _: b":1\r\n"
    b.answer = answer_with({b"EVALSHA": b"-NOSCRIPT No matching script.\r\n", b"EVAL": b":2\r\n"})
    routes = FakeRoutes(a, b)
    link = MultiplexedLink(routes, 3)
    assert await link.run(SCRIPT, "k") == 1

    def moved(_: list[bytes]) -> bytes:
        routes.first = b
        return b"-MOVED 5 b:1\r\n"

    a.transport.answer = moved
    assert await link.run(SCRIPT, "k") == 2
    assert ("MOVED", "5 b:1") in routes.heard
    await link.aclose()
    assert a.transport.aborted
    assert b.transport.aborted


async def test_same_address_same_connection(node: FakeNode) -> None:
    """A client that makes new objects for the nodes that it knows, as it reads its topology, gets no new connections."""
    routes = FakeRoutes(node)
    link = MultiplexedLink(routes, 3)
    await link.exchange("k", GET)
    routes.first = again = FakeNode(node.name)
    again.answer = node.answer
    await link.exchange("k", GET)
    assert again.connections == []
    node.transport.end()
    await link.exchange("k", GET)
    assert (len(node.connections), len(again.connections)) == (1, 1)
    await link.aclose()


async def test_node_that_has_left() -> None:
    """The connections to a node that has left the topology end when one to another node is made."""
    a, b = FakeNode("a:1"), FakeNode("b:1")
    a.answer = b.answer = lambda _: OK
    routes = FakeRoutes(a, b)
    link = MultiplexedLink(routes, 3)
    await link.exchange("k", GET)
    routes.first = b
    del routes.nodes["a:1"]
    await link.exchange("k", GET)
    assert a.transport.aborted
    assert not b.transport.aborted
    await link.aclose()
    assert [len(node.connections) for node in (a, b)] == [1, 1]


async def test_node_that_leaves_under_a_crowd() -> None:
    """Whoever still waits for a node that has left is served by the one that has its slots now."""
    a, b = FakeNode("a:1"), FakeNode("b:1")
    b.answer = lambda command: bulk(command[1])
    routes = FakeRoutes(a, b)
    link = MultiplexedLink(routes, 3)
    calls = [asyncio.ensure_future(link.exchange("k", ("GET", number))) for number in range(5)]
    await turns()
    assert len(words(a)) == 5
    routes.first = b
    del routes.nodes["a:1"]
    assert await link.exchange("k", ("GET", 9)) == [b"9"]
    assert await asyncio.gather(*calls) == [[b"%d" % number] for number in range(5)]
    await link.aclose()


async def test_cancelled_while_asking() -> None:
    """Neither a command nor the ASKING before it is sent once its caller is cancelled."""
    a, b = FakeNode("a:1"), FakeNode("b:1")
    a.answer = lambda _: b"-ASK 5 b:1\r\n"
    b.answer = lambda _: OK
    b.gate.clear()
    routes = FakeRoutes(a, b)
    routes.asks = ["b:1"]
    link = MultiplexedLink(routes, 3)
    claim = asyncio.ensure_future(link.exchange("k", ("SET", "k", "v")))
    await turns(20)
    assert len(b.connections) == 1
    claim.cancel()
    await turns()
    b.gate.set()
    await turns()
    assert words(b) == []
    await link.aclose()


async def test_close_while_routes_are_read(node: FakeNode) -> None:
    """Closing ends the reading of a topology that nobody waits for any more."""
    before = asyncio.all_tasks()

    class Hanging:
        """A cluster client whose nodes say nothing."""

        nodes_manager = SimpleNamespace(slots_cache={}, nodes_cache={}, startup_nodes={})

        def get_connection_kwargs(self) -> dict[str, Any]:
            return {}

        async def initialize(self) -> None:
            await asyncio.Event().wait()

    link = MultiplexedLink(ClusterRoutes(Hanging()), 3)  # type: ignore[arg-type]
    call = asyncio.ensure_future(link.exchange("k", GET))
    await turns()
    call.cancel()
    await asyncio.wait([call])
    await link.aclose()
    await turns()
    assert asyncio.all_tasks() == before
