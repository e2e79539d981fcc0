"""Which node answers for a key, and how connections to it are made: by the client's own pool or topology."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from abc import ABC, abstractmethod
from typing import Any, Final

import redis.asyncio
from redis import exceptions
from redis.asyncio import SSLConnection
from redis.asyncio.cluster import ClusterNode as ClientNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.cluster import PRIMARY

from ..cancellation import within_loop
from .clients import OwnCluster
from .refusals import behind, redirection
from .wire import forget_connections, give_back

__all__ = ["ClusterRoutes", "Node", "Routes", "SingleRoute", "inherited", "routes_of"]

inherited: Final[list[Any]] = []
"""What a child process has of its parent's connections. It is kept: to close a transport, as its end as garbage does,
would take the parent's socket out of the event queue that both processes share.
"""


class Node(ABC):
    """A server."""

    name: str

    @abstractmethod
    def make(self) -> Any:
        """Return a connection of redis-py's to this server that is the caller's alone, not connected yet."""

    @abstractmethod
    async def lend(self) -> Any:
        """Return a connection of the client's pool; it goes back with ``take_back``."""

    @abstractmethod
    async def take_back(self, connection: Any) -> None:
        """Give a connection back to the client's pool."""


class Routes(ABC):
    """Where the commands of a client go."""

    lendable: int
    """How many connections to one node the client's pool gives out at a time."""

    tls: bool
    """Whether connections use TLS."""

    cluster: bool
    """Whether redirections are followed."""

    @abstractmethod
    def find(self, key: str, /, *, trust: bool = False) -> Node | None:
        """Return the node of ``key``; None if ``refresh`` must be awaited first, or with ``trust`` if there is none."""

    @abstractmethod
    def named(self, name: str, /) -> Node | None:
        """Return the node that a redirection names; None if it is not known, or not any more."""

    @abstractmethod
    def knows(self, name: str, /) -> bool:
        """Say whether there still is a node of this name."""

    @abstractmethod
    def heed(self, code: str, error: BaseException, node: Node | None, /) -> str | None:
        """Learn from what a command met at ``node``; return the name of the node that is to be asked this once."""

    @abstractmethod
    async def refresh(self, seconds: float, /) -> None:
        """Ask the client for its topology; a reading that takes longer is given up, and the next asks another node."""

    @abstractmethod
    async def aclose(self) -> None:
        """End what reads the topology."""

    @abstractmethod
    def reset(self, *, forked: bool) -> None:
        """Forget connections that belong to another loop, or with ``forked`` to the parent process."""


class PoolNode(Node):
    """The server behind a connection pool: standalone, or the master that Sentinel names."""

    name = ""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def make(self) -> Any:
        """Return a connection that is the caller's alone."""
        return _without_retries(self._pool.make_connection())

    async def lend(self) -> Any:
        """Return one of the client's connections."""
        return await self._pool.get_connection()

    async def take_back(self, connection: Any) -> None:
        """Give it back."""
        with contextlib.suppress(KeyError):  # the pool was reset meanwhile, and does not know it any more
            await self._pool.release(connection)


class SingleRoute(Routes):
    """All keys are on one server.

    Args:
        client: a standalone or Sentinel client.
    """

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._pool: Any = client.connection_pool
        self._node = PoolNode(self._pool)
        self.lendable = int(getattr(self._pool, "max_connections", 64) or 64)
        self.tls = _uses_tls(getattr(self._pool, "connection_class", None))
        self.cluster = False

    def find(self, _: str, *, trust: bool = False) -> Node:  # noqa: ARG002 - it is always trusted
        """Return the only node."""
        return self._node

    def named(self, _: str) -> Node:
        """Return the only node."""
        return self._node

    def knows(self, _: str) -> bool:
        """Know the only node."""
        return True

    def heed(self, *_: object) -> None:
        """Learn nothing: with Sentinel it is the pool that finds the master of each new connection."""

    async def refresh(self, _: float) -> None:
        """Do nothing: ``find`` never asks for it."""

    async def aclose(self) -> None:
        """Do nothing: nothing is read."""

    def reset(self, *, forked: bool) -> None:
        """Forget the pool's connections, and those over which it asks sentinels for the master."""
        manager = getattr(self._pool, "sentinel_manager", None)
        sentinels = () if manager is None else manager.sentinels
        for pool in (self._pool, *(sentinel.connection_pool for sentinel in sentinels)):
            if forked:
                inherited.append(pool.__dict__.copy())
            pool.reset()


class ClusterNode(Node):
    """One node of a cluster."""

    def __init__(self, node: Any, manager: Any) -> None:
        self.node = node
        self.name: str = node.name
        self._manager = manager

    @property
    def current(self) -> bool:
        """Whether the client still has this node; readings of the topology may have replaced or removed it."""
        return self._manager.nodes_cache.get(self.name) is self.node

    def make(self) -> Any:
        """Return a connection that is the caller's alone."""
        return _without_retries(self.node.connection_class(**self.node.connection_kwargs))

    async def lend(self) -> Any:
        """Return one of the client's connections."""
        connection = self.node.acquire_connection()
        try:
            await connection.connect()
        except BaseException:
            give_back(self.node, connection)
            raise
        return connection

    async def take_back(self, connection: Any) -> None:
        """Give it back; a node that the client does not have any more is not closed with it."""
        if not self.current:
            await connection.disconnect(nowait=True)
        give_back(self.node, connection)


class ClusterRoutes(Routes):
    """The client's topology, and what redirections said since it was read.

    A MOVED is remembered for its slot alone: reading the whole topology again for each, as a resharding moves slot
    after slot, would cost more than the commands. A node that fails, or is no master any more, is doubted: before the
    next command for it the topology is read again, once for all commands that need it. Those for other nodes go on.

    Args:
        client: a cluster client.
    """

    def __init__(self, client: redis.asyncio.RedisCluster) -> None:
        self._client: Any = client
        self._manager: Any = client.nodes_manager
        self._first: dict[str, Any] = dict(self._manager.startup_nodes)
        self._moved: dict[int, str] = {}
        self._doubted: set[str] = set()
        self._nodes: dict[str, ClusterNode] = {}
        self._stale = True
        self._reading: asyncio.Task[None] | None = None
        options = self._client.get_connection_kwargs()
        self.lendable = int(options.get("max_connections") or 64)
        self.tls = _uses_tls(options.get("connection_class"))
        self.cluster = True

    def find(self, key: str, *, trust: bool = False) -> Node | None:
        """Return the master of the key's slot; None if the topology must be read first.

        With ``trust`` it was: what others have met since then is no reason to read it again before this one has tried,
        or each of many that fail at a time would send all the others to read once more.
        """
        if self._stale and not trust:
            return None
        node = None
        if self._moved and (name := self._moved.get(self._client.keyslot(key))) is not None:
            node = self._manager.nodes_cache.get(name)
        if node is None:
            try:
                node = self._client.get_node_from_key(key)
            except exceptions.RedisClusterException:  # a slot that no node serves, now
                return None
        return None if node.name in self._doubted and not trust else self._wrap(node)

    def named(self, name: str) -> Node | None:
        """Return the node with this address; None if a reading since has shown that there is none."""
        node = self._manager.nodes_cache.get(name)
        return None if node is None else self._wrap(node)

    def knows(self, name: str) -> bool:
        """Say whether the topology has a node with this address."""
        return name in self._manager.nodes_cache

    def heed(self, code: str, error: BaseException, node: Node | None) -> str | None:
        """Remember a MOVED, return the node of an ASK, and doubt a node that broke or says that it is no master."""
        if code in ("MOVED", "ASK"):
            return self._redirected(code, error)
        broken = code in ("READONLY", "CLUSTERDOWN", "MASTERDOWN") or (
            code == "" and not isinstance(error, exceptions.MaxConnectionsError)
        )
        # Older versions of redis-py replace all nodes in each reading, and close the connections of the old ones: what
        # broke there says nothing of the new ones.
        if broken and isinstance(node, ClusterNode) and node.current:
            self._doubted.add(node.name)
        return None

    def _redirected(self, code: str, error: BaseException) -> str | None:
        slot, host, port = redirection(error)
        if not host:  # "the host that you asked": only the topology says it in full
            self._stale = True
            return None
        host, port = self._manager.remap_host_port(host, port)
        node = self._manager.get_node(host=host, port=port)
        if node is None:
            # A shard that is being filled has no slot yet, and is in nobody's table of slots.
            node = ClientNode(host, port, PRIMARY, **self._manager.connection_kwargs)
            self._manager.nodes_cache[node.name] = node
        name: str = node.name
        if code == "ASK":
            return name
        self._moved[slot] = name
        return None

    async def refresh(self, seconds: float) -> None:
        """Read the topology, once for all that wait for it."""
        reading = self._reading
        if reading is None or reading.done():
            read = functools.partial(self._read, seconds)
            reading = self._reading = asyncio.get_running_loop().create_task(within_loop(read))
            reading.add_done_callback(_seen)
        await asyncio.wait((reading,))  # whoever is cancelled leaves it to the others
        if reading.cancelled():
            raise exceptions.ConnectionError("reading the topology was cancelled from outside")
        reading.result()

    async def _read(self, seconds: float) -> None:
        manager, moved, sources = self._manager, self._moved.copy(), self._manager.startup_nodes
        # A client that was brought is initialised whole, once: its owner's closing it counts on that.
        whole = not manager.slots_cache and not isinstance(self._client, OwnCluster)
        initialize = self._client.initialize if whole else manager.initialize
        for name in self._doubted & sources.keys():
            # Asked last: it may hang, or be cut off from the others and tell of itself as the master.
            sources[name] = sources.pop(name)
            if (
                "last_failed_node_name" in inspect.signature(initialize).parameters
            ):  # that version does not go by the order
                initialize = functools.partial(initialize, last_failed_node_name=name)
        try:
            async with asyncio.timeout(seconds):
                await initialize()
        except Exception as error:
            # The next reading begins with another node, and knows again where the client began, with a name perhaps
            # behind which there are other nodes by now: all that the last reading found may be gone.
            for name in list(sources)[:1]:
                sources[name] = sources.pop(name)
            for name, node in self._first.items():
                sources.setdefault(name, node)
            if (reply := behind(error)) is not error:
                raise reply from None
            raise
        # What was learnt meanwhile may be newer than what was read.
        self._moved = {slot: name for slot, name in self._moved.items() if moved.get(slot) != name}
        self._doubted.clear()
        self._stale = False
        known = manager.nodes_cache
        for name in [name for name in self._nodes if name not in known]:
            del self._nodes[name]

    def _wrap(self, node: Any) -> ClusterNode:
        known = self._nodes.get(node.name)
        if known is None or known.node is not node:
            known = self._nodes[node.name] = ClusterNode(node, self._manager)
        return known

    async def aclose(self) -> None:
        """End what reads the topology."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait((self._reading,))

    def reset(self, *, forked: bool) -> None:
        """Forget the connections of all nodes."""
        manager = self._manager
        for node in (*manager.nodes_cache.values(), *manager.startup_nodes.values(), *self._first.values()):
            taken = forget_connections(node)
            if forked:
                inherited.append(taken)
        self._reading = None


def _seen(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # those who wait have it, if anybody still does


def _uses_tls(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, SSLConnection)


def routes_of(client: Any) -> Routes | None:
    """Return the routes of a redis-py client; None for any other."""
    if isinstance(client, redis.asyncio.Redis):
        return SingleRoute(client)
    if isinstance(client, redis.asyncio.RedisCluster):
        return ClusterRoutes(client)
    return None


def _without_retries(connection: Any) -> Any:
    """A connection's own retries would outlast any deadline; the store has its own."""
    connection.retry = Retry(NoBackoff(), 0)
    return connection
