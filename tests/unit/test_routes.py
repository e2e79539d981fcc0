"""Where commands go: one server, or the nodes of a cluster as its topology and its redirections say."""

import asyncio
from typing import Any

import pytest
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis, RedisCluster
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import AskError, MovedError

from asyncidem.stores.routes import ClusterRoutes, SingleRoute, inherited, routes_of

from topology import Client, Node
from wires import turns


@pytest.fixture
def client() -> Client:
    """A client of two nodes: a has the slots up to 9, b those up to 19."""
    return Client(a=range(10), b=range(10, 20))


@pytest.fixture
async def routes(client: Client) -> ClusterRoutes:
    """Routes that have read the topology once."""
    routes = ClusterRoutes(client)  # type: ignore[arg-type]
    assert routes.find("1") is None
    await routes.refresh(9)
    return routes


def name_of(routes: ClusterRoutes, key: int) -> str | None:
    """Return the name of the node of a key."""
    node = routes.find(str(key))
    return None if node is None else node.name


# -- the topology ----------------------------------------------------------------------------------------------------------


async def test_topology(routes: ClusterRoutes, client: Client) -> None:
    """Each key goes to its slot's node, which is the same object as long as it is there; the client is initialised once."""
    assert [name_of(routes, key) for key in (0, 9, 10, 19)] == ["a:1", "a:1", "b:1", "b:1"]
    assert routes.find("1") is routes.find("2") is routes.named("a:1")
    assert client.initialized == 1
    await routes.refresh(9)
    assert (client.initialized, client.nodes_manager.read) == (1, 2)


@pytest.mark.parametrize(("limit", "lendable"), [(7, 7), (None, 64), (2**31, 2**31)])
def test_limit(limit: int | None, lendable: int) -> None:
    """A node lends as many connections as the client allows."""
    client = Client(a=range(1))
    client.limit = limit
    assert ClusterRoutes(client).lendable == lendable  # type: ignore[arg-type]


async def test_slot_that_nobody_serves(routes: ClusterRoutes, client: Client) -> None:
    """A slot without a node asks for the topology to be read again; commands for other slots need not wait for it."""
    assert routes.find("25") is None
    assert name_of(routes, 1) == "a:1"
    client.nodes_manager.there["b:1"] = range(10, 30)
    await routes.refresh(9)
    assert name_of(routes, 25) == "b:1"


async def test_doubts_of_others_after_a_reading(routes: ClusterRoutes) -> None:
    """Who has waited for a reading goes to the node that it found, whatever others have met there since."""
    node = routes.find("15")
    routes.heed("CLUSTERDOWN", exceptions.ClusterDownError(""), node)
    assert routes.find("15") is None
    await routes.refresh(9)
    routes.heed("", ConnectionError(), node)
    routes.heed("MOVED", exceptions.MovedError("3 :0"), node)
    assert [routes.find("15"), routes.find("15", trust=True), routes.find("25", trust=True)] == [None, node, None]


async def test_vanished_nodes_are_forgotten(routes: ClusterRoutes, client: Client) -> None:
    """A node that has left is forgotten with what belongs to it; under its name another may come."""
    old = routes.find("15")
    assert routes.knows("b:1")
    client.nodes_manager.there = {"a:1": range(20)}
    await routes.refresh(9)
    assert [routes.knows(name) for name in ("a:1", "b:1")] == [True, False]
    assert routes._nodes.keys() <= {"a:1"}
    assert name_of(routes, 15) == "a:1"
    client.nodes_manager.there = {"a:1": range(10), "b:1": range(10, 20)}
    await routes.refresh(9)
    assert name_of(routes, 15) == "b:1"
    assert routes.find("15") is not old


async def test_new_node_behind_a_name(routes: ClusterRoutes, client: Client) -> None:
    """A client that makes a new node for a known address is followed: what the old one says is of no use any more."""
    old = routes.find("1")
    client.nodes_manager.nodes_cache["a:1"] = new = Node("a:1")
    client.nodes_manager.slots_cache = {1: [new]}
    found: Any = routes.find("1")
    assert found is not old
    assert found.node is new


# -- redirections ----------------------------------------------------------------------------------------------------------


async def test_moved(routes: ClusterRoutes, client: Client) -> None:
    """A MOVED is remembered for its slot alone, without reading the topology, until that is read."""
    assert routes.heed("MOVED", MovedError("3 b:1"), routes.find("3")) is None
    assert [name_of(routes, key) for key in (2, 3, 4)] == ["a:1", "b:1", "a:1"]
    assert routes.heed("MOVED", MovedError("3 a:1"), routes.find("3")) is None
    assert name_of(routes, 3) == "a:1"
    routes.heed("MOVED", MovedError("3 b:1"), routes.find("3"))
    assert client.nodes_manager.read == 1
    client.nodes_manager.there = {"a:1": range(20), "b:1": range(0)}
    await routes.refresh(9)
    assert name_of(routes, 3) == "a:1"


@pytest.mark.parametrize("code", ["MOVED", "ASK"])
async def test_redirection_to_an_unknown_node(routes: ClusterRoutes, client: Client, code: str) -> None:
    """A node that the topology does not have, as one without slots, is added to the client's; a reading may remove it."""
    error = MovedError("3 10.0.0.9:7") if code == "MOVED" else AskError("3 10.0.0.9:7")
    assert routes.heed(code, error, routes.find("3")) == ("10.0.0.9:7" if code == "ASK" else None)
    assert [name_of(routes, key) for key in (2, 3)] == ["a:1", "10.0.0.9:7" if code == "MOVED" else "a:1"]
    node: Any = routes.named("10.0.0.9:7")
    assert (node.name, node.make().kwargs) == ("10.0.0.9:7", {"host": "10.0.0.9", "port": 7})
    assert routes.knows("10.0.0.9:7")
    await routes.refresh(9)
    assert not routes.knows("10.0.0.9:7")
    assert routes.named("10.0.0.9:7") is None
    assert name_of(routes, 3) == "a:1"
    assert client.nodes_manager.read == 2


async def test_moved_while_the_topology_is_read(routes: ClusterRoutes, client: Client) -> None:
    """A MOVED that comes while the topology is read outlives the reading: it may be newer. One from before does not."""
    routes.heed("MOVED", MovedError("2 b:1"), None)
    routes.heed("MOVED", MovedError("4 b:1"), None)
    client.nodes_manager.gate.clear()
    reading = asyncio.ensure_future(routes.refresh(9))
    await turns()
    routes.heed("MOVED", MovedError("3 b:1"), None)
    routes.heed("MOVED", MovedError("4 10.0.0.9:7"), None)
    client.nodes_manager.gate.set()
    await reading
    assert [name_of(routes, key) for key in (2, 3, 4)] == ["a:1", "b:1", "a:1"]  # the last one to a node that is gone


@pytest.mark.parametrize("code", ["MOVED", "ASK"])
async def test_redirection_without_a_host(routes: ClusterRoutes, code: str) -> None:
    """A redirection that names no host leaves it to the topology to say which."""
    error = MovedError("3 :1") if code == "MOVED" else AskError("3 :1")
    assert routes.heed(code, error, routes.find("3")) is None
    assert routes.find("1") is None
    await routes.refresh(9)
    assert name_of(routes, 3) == "a:1"


async def test_ask(routes: ClusterRoutes) -> None:
    """An ASK names the node for this once, and is not remembered."""
    assert routes.heed("ASK", AskError("3 b:1"), routes.find("3")) == "b:1"
    assert name_of(routes, 3) == "a:1"
    assert routes.named("b:1") is routes.find("15")


@pytest.mark.parametrize("code", ["MOVED", "ASK"])
async def test_remapped_addresses(routes: ClusterRoutes, client: Client, code: str) -> None:
    """An address that the client translates, behind a tunnel, is translated in redirections too."""
    client.nodes_manager.remapped[("10.0.0.2", 6379)] = ("b", 1)
    error = MovedError("3 10.0.0.2:6379") if code == "MOVED" else AskError("3 10.0.0.2:6379")
    asked = routes.heed(code, error, routes.find("3"))
    if code == "ASK":
        assert asked == "b:1"
    else:
        assert name_of(routes, 3) == "b:1"


@pytest.mark.parametrize("code", ["", "READONLY", "CLUSTERDOWN", "MASTERDOWN"])
async def test_doubted_node(routes: ClusterRoutes, code: str) -> None:
    """A node that failed, or is no master, makes the topology be read before the next command for it, and for no other."""
    assert routes.heed(code, OSError("reset"), routes.find("1")) is None
    assert routes.find("1") is None
    assert name_of(routes, 15) == "b:1"
    routes.heed("TRYAGAIN", exceptions.TryAgainError("again"), routes.find("15"))
    assert routes.find("1") is None
    await routes.refresh(9)
    assert name_of(routes, 1) == "a:1"


@pytest.mark.parametrize("code", ["TRYAGAIN", "LOADING", "BUSY", "NOSCRIPT", "OOM"])
async def test_what_raises_no_doubt(routes: ClusterRoutes, code: str) -> None:
    """A refusal that has nothing to do with who serves the slot leaves the topology alone."""
    assert routes.heed(code, exceptions.ResponseError("no"), routes.find("1")) is None
    assert name_of(routes, 1) == "a:1"


async def test_failures_that_are_no_nodes(routes: ClusterRoutes) -> None:
    """A pool that is used up, and what failed before there was a node, raise no doubt."""
    routes.heed("", exceptions.MaxConnectionsError(), routes.find("1"))
    routes.heed("", OSError("reset"), None)
    assert [name_of(routes, key) for key in (1, 15)] == ["a:1", "b:1"]


async def test_failure_of_a_node_that_was_replaced(routes: ClusterRoutes, client: Client) -> None:
    """What breaks of a node that the client has replaced meanwhile, closing its connections, says nothing of the new one."""
    old = routes.find("1")
    client.nodes_manager.nodes_cache["a:1"] = new = Node("a:1")
    client.nodes_manager.slots_cache[1] = [new]
    routes.heed("", OSError("reset"), old)
    assert name_of(routes, 1) == "a:1"


async def test_doubted_node_is_asked_last(routes: ClusterRoutes, client: Client) -> None:
    """A node that is doubted is not the first to be asked for the topology: cut off, it would name itself."""
    routes.heed("", OSError("reset"), routes.find("1"))
    await routes.refresh(9)
    assert client.nodes_manager.sources == ["a:1", "b:1"]


async def test_reading_that_fails_goes_on_elsewhere(routes: ClusterRoutes, client: Client) -> None:
    """After a reading that failed or took too long the next begins with another node, and knows where the client began."""
    manager = client.nodes_manager
    del manager.startup_nodes["b:1"]
    manager.failures.append(exceptions.RedisClusterException("cannot be connected"))
    with pytest.raises(exceptions.RedisClusterException):
        await routes.refresh(9)
    assert list(manager.startup_nodes) == ["a:1", "b:1"]
    manager.gate.clear()
    with pytest.raises(TimeoutError):
        await routes.refresh(0)
    manager.gate.set()
    await routes.refresh(9)
    assert manager.sources == ["a:1", "a:1", "a:1", "b:1"]


def replied(reply: Exception, what: str = "Cluster mode is not enabled on this node") -> Exception:
    """Return what redis-py makes of an error reply to CLUSTER SLOTS."""
    try:
        try:
            try:
                raise reply
            except exceptions.ResponseError:
                raise exceptions.RedisClusterException(what)  # noqa: B904 - as redis-py does
        except Exception as error:
            raise exceptions.RedisClusterException("cannot be connected") from error
    except exceptions.RedisClusterException as error:
        return error


@pytest.mark.parametrize(
    "reply",
    [exceptions.NoPermissionError("no"), exceptions.ResponseError("no cluster"), exceptions.AuthenticationError("no")],
)
async def test_topology_is_refused(routes: ClusterRoutes, client: Client, reply: Exception) -> None:
    """A server that refuses to tell its topology is quoted, not redis-py's guess at what it said."""
    client.nodes_manager.failures.append(replied(reply))
    with pytest.raises(type(reply)) as raised:
        await routes.refresh(9)
    assert raised.value is reply


# -- reading it ------------------------------------------------------------------------------------------------------------


async def test_refresh_is_shared(routes: ClusterRoutes, client: Client) -> None:
    """All who wait for the topology share one reading of it; the next that is needed is a new one."""
    client.nodes_manager.gate.clear()
    waiting = [asyncio.ensure_future(routes.refresh(9)) for _ in range(10)]
    await turns()
    waiting[0].cancel()
    await turns()
    assert waiting[0].cancelled()
    assert not any(task.done() for task in waiting[1:])
    client.nodes_manager.gate.set()
    await asyncio.gather(*waiting[1:])
    assert client.nodes_manager.read == 2
    await routes.refresh(9)
    assert client.nodes_manager.read == 3


async def test_refresh_fails(routes: ClusterRoutes, client: Client) -> None:
    """A reading that fails tells all who waited, leaves the topology stale, and is tried again by the next."""
    routes.heed("", OSError("reset"), routes.find("3"))
    client.nodes_manager.failures.append(exceptions.RedisClusterException("cannot be connected"))
    results = await asyncio.gather(*(routes.refresh(9) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [exceptions.RedisClusterException] * 3
    assert client.nodes_manager.read == 2
    assert routes.find("1") is None
    await routes.refresh(9)
    assert name_of(routes, 1) == "a:1"


async def test_refresh_that_nobody_waits_for(routes: ClusterRoutes, client: Client) -> None:
    """A reading whose callers are gone goes on, and its failure is no error of anybody's."""
    errors: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    client.nodes_manager.gate.clear()
    client.nodes_manager.failures.append(OSError("reset"))
    task = asyncio.ensure_future(routes.refresh(9))
    await turns()
    task.cancel()
    client.nodes_manager.gate.set()
    await turns()
    assert task.cancelled()
    del task
    assert errors == []


async def test_refresh_is_cancelled_from_outside(routes: ClusterRoutes, client: Client) -> None:
    """What cancels every task of the loop ends no caller's wait with a cancellation that is not theirs."""
    client.nodes_manager.gate.clear()
    waiting = asyncio.ensure_future(routes.refresh(9))
    await turns()
    assert routes._reading is not None
    routes._reading.cancel()
    with pytest.raises(exceptions.ConnectionError, match="cancelled from outside"):
        await waiting
    client.nodes_manager.gate.set()
    await routes.refresh(9)


def test_refresh_on_the_next_loop(client: Client) -> None:
    """A reading that its loop cut short does not hold up the next loop."""
    routes = ClusterRoutes(client)  # type: ignore[arg-type]

    async def first() -> None:
        client.nodes_manager.gate = asyncio.Event()
        task = asyncio.ensure_future(routes.refresh(9))
        await turns()
        assert not task.done()

    async def second() -> None:
        client.nodes_manager.gate = asyncio.Event()
        client.nodes_manager.gate.set()
        await routes.refresh(9)
        assert name_of(routes, 1) == "a:1"

    asyncio.run(first())
    routes.reset(forked=False)
    asyncio.run(second())


# -- connections -----------------------------------------------------------------------------------------------------------


async def test_cluster_connections(routes: ClusterRoutes, client: Client) -> None:
    """A connection of one's own is none of the client's, and does not retry; one that is lent is connected."""
    node: Any = routes.find("1")
    own = node.make()
    assert own.kwargs == {"host": "a:1"}
    assert own.retry._retries == 0
    lent = await node.lend()
    assert lent.connects == 1
    assert node.node._connections == [lent]
    assert node.node._free == []
    await node.take_back(lent)
    assert node.node._free == [lent]


async def test_connection_of_a_node_that_was_replaced(routes: ClusterRoutes, client: Client) -> None:
    """A connection whose node the client has replaced while it was lent is closed: nobody else would."""
    node: Any = routes.find("1")
    kept, lent = await node.lend(), await node.lend()
    await node.take_back(kept)
    client.nodes_manager.nodes_cache["a:1"] = Node("a:1")
    await node.take_back(lent)
    assert (kept.closed, lent.closed) == (False, True)
    assert node.node._free == [kept, lent]


async def test_cluster_connection_that_fails(routes: ClusterRoutes) -> None:
    """A connection that cannot be made goes back to the client, which has only so many."""
    node: Any = routes.find("1")
    lent = await node.lend()
    lent.failure = OSError("refused")
    await node.take_back(lent)
    with pytest.raises(OSError, match="refused"):
        await node.lend()
    assert node.node._free == [lent]


@pytest.mark.parametrize("forked", [False, True])
async def test_cluster_reset(routes: ClusterRoutes, forked: bool) -> None:
    """Connections of another loop are forgotten; those of the parent process are kept from being closed as garbage."""
    node: Any = routes.find("1")
    lent = await node.lend()
    await node.take_back(lent)
    before = len(inherited)
    routes.reset(forked=forked)
    assert node.node._free == node.node._connections == []
    kept = [connection for taken in inherited[before:] for connection in taken]
    assert (lent in kept) == forked
    del inherited[before:]


async def test_single() -> None:
    """A standalone client is one node for all keys, whatever happens; its connections do not retry."""
    client = Redis(host="nowhere.invalid", port=1, db=3, max_connections=5)
    routes = routes_of(client)
    assert isinstance(routes, SingleRoute)
    assert routes.lendable == 5
    node = routes.find("k")
    assert node is routes.find("l") is routes.named("other:1")
    assert routes.knows(node.name)
    routes.heed("MOVED", MovedError("1 a:1"), routes.find("3"))
    await routes.refresh(9)
    assert routes.find("k") is node
    connection = node.make()
    assert connection.retry._retries == 0
    assert connection.db == 3
    assert connection is not node.make()
    await client.aclose()


@pytest.mark.parametrize("kind", [ConnectionPool, BlockingConnectionPool])
async def test_single_connection_of_a_pool_that_was_reset(kind: type[ConnectionPool]) -> None:
    """A connection that its pool does not know any more, from before a reset, may be given back all the same."""
    pool = kind(host="nowhere.invalid")
    stranger = pool.make_connection()
    await SingleRoute(Redis(connection_pool=pool)).find("k").take_back(stranger)
    assert stranger not in pool._available_connections


@pytest.mark.parametrize("kind", [ConnectionPool, BlockingConnectionPool])
@pytest.mark.parametrize("forked", [False, True])
async def test_single_reset(kind: type[ConnectionPool], forked: bool) -> None:
    """The pool forgets what it had; what is the parent's is kept from being closed as garbage."""
    pool = kind(host="nowhere.invalid")
    idle = pool.make_connection()
    pool._available_connections.append(idle)
    routes = SingleRoute(Redis(connection_pool=pool))
    before = len(inherited)
    routes.reset(forked=forked)
    assert idle not in pool._available_connections
    assert (len(inherited) > before) == forked
    del inherited[before:]


@pytest.mark.parametrize("forked", [False, True])
async def test_sentinel_reset(forked: bool) -> None:
    """The connections to the sentinels are forgotten with those to the master."""
    sentinel = Sentinel([("nowhere.invalid", 1), ("nowhere.invalid", 2)])
    pools = [one.connection_pool for one in sentinel.sentinels]
    for pool in pools:
        pool._available_connections.append(pool.make_connection())
    kept = [pool._available_connections for pool in pools]
    routes = SingleRoute(sentinel.master_for("payments"))
    before = len(inherited)
    routes.reset(forked=forked)
    assert [pool._available_connections for pool in pools] == [[], []]
    held = [taken["_available_connections"] for taken in inherited[before:]]
    assert [connections in held for connections in kept] == [forked, forked]
    del inherited[before:]


async def test_other_clients() -> None:
    """Only redis-py's own clients have routes."""
    assert routes_of(object()) is None
    cluster = RedisCluster(host="nowhere.invalid", port=1)
    assert isinstance(routes_of(cluster), ClusterRoutes)
