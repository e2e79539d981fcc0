"""Which node answers for a key, and how connections to it are made: by the client's own pool or topology."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from typing import Any, Final

import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from ..cancellation import within_loop
from .refusals import redirection
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

    @abstractmethod
    def find(self, key: str, /) -> Node | None:
        """Return the node of ``key``; None if ``refresh`` must be awaited first."""

    @abstractmethod
    def named(self, name: str, /) -> Node | None:
        """Return the node that a redirection names; None if it is not known, or not any more."""

    @abstractmethod
    def knows(self, name: str, /) -> bool:
        """Say whether there still is a node of this name."""

    @abstractmethod
    def heed(self, code: str, error: BaseException, /) -> str | None:
        """Learn from what a command met; return the name of the node that is to be asked this once."""

    @abstractmethod
    async def refresh(self) -> None:
        """Ask the client for its topology."""

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

    def find(self, _: str) -> Node:
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

    async def refresh(self) -> None:
        """Do nothing: ``find`` never asks for it."""

    async def aclose(self) -> None:
        """Do nothing: nothing is read."""

    def reset(self, *, forked: bool) -> None:
        """Forget the pool's connections."""
        if forked:
            inherited.append(self._pool.__dict__.copy())
        self._pool.reset()


class ClusterNode(Node):
    """One node of a cluster."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.name: str = node.name

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
        """Give it back."""
        give_back(self.node, connection)


class ClusterRoutes(Routes):
    """The client's topology, and what redirections said since it was read.

    A MOVED is remembered for its slot alone: reading the whole topology again for each, as a resharding moves slot
    after slot, would cost more than the commands. A connection that fails, or a node that is no master any more, makes
    the topology stale; it is read again once for all commands that need it.

    Args:
        client: a cluster client.
    """

    def __init__(self, client: redis.asyncio.RedisCluster) -> None:
        self._client: Any = client
        self._moved: dict[int, str] = {}
        self._nodes: dict[str, ClusterNode] = {}
        self._stale = True
        self._reading: asyncio.Task[None] | None = None
        self.lendable = int(self._client.get_connection_kwargs().get("max_connections") or 64)

    def find(self, key: str) -> Node | None:
        """Return the master of the key's slot; None if the topology must be read first."""
        if self._stale:
            return None
        if self._moved and (name := self._moved.get(self._client.keyslot(key))) is not None:
            return self.named(name)
        try:
            return self._wrap(self._client.get_node_from_key(key))
        except exceptions.RedisClusterException:  # a slot that no node serves, now
            self._stale = True
            return None

    def named(self, name: str) -> Node | None:
        """Return the node with this address; None if the topology does not have it."""
        node = self._client.nodes_manager.nodes_cache.get(name)
        if node is None:
            self._stale = True
            return None
        return self._wrap(node)

    def knows(self, name: str) -> bool:
        """Say whether the topology has a node with this address."""
        return name in self._client.nodes_manager.nodes_cache

    def heed(self, code: str, error: BaseException) -> str | None:
        """Remember a MOVED, return the node of an ASK, and take what broke for a change of the topology."""
        if code not in ("MOVED", "ASK"):
            self._stale = self._stale or code in ("", "READONLY", "CLUSTERDOWN", "MASTERDOWN")
            return None
        slot, host, port = redirection(error)
        if not host:  # "the host that you asked": only the topology says it in full
            self._stale = True
            return None
        host, port = self._client.nodes_manager.remap_host_port(host, port)
        name = f"{host}:{port}"
        if code == "ASK":
            return name
        self._moved[slot] = name
        return None

    async def refresh(self) -> None:
        """Read the topology, once for all that wait for it."""
        reading = self._reading
        if reading is None or reading.done():
            reading = self._reading = asyncio.get_running_loop().create_task(within_loop(self._read))
            reading.add_done_callback(_seen)
        await asyncio.wait((reading,))  # whoever is cancelled leaves it to the others
        if reading.cancelled():
            raise exceptions.ConnectionError("reading the topology was cancelled from outside")
        reading.result()

    async def _read(self) -> None:
        if self._client.nodes_manager.slots_cache:
            await self._client.nodes_manager.initialize()
        else:
            await self._client.initialize()
        self._moved.clear()
        self._stale = False
        known = self._client.nodes_manager.nodes_cache
        for name in [name for name in self._nodes if name not in known]:
            del self._nodes[name]

    def _wrap(self, node: Any) -> ClusterNode:
        known = self._nodes.get(node.name)
        if known is None or known.node is not node:
            known = self._nodes[node.name] = ClusterNode(node)
        return known

    async def aclose(self) -> None:
        """End what reads the topology."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait((self._reading,))

    def reset(self, *, forked: bool) -> None:
        """Forget the connections of all nodes."""
        for node in self._client.nodes_manager.nodes_cache.values():
            taken = forget_connections(node)
            if forked:
                inherited.append(taken)
        self._reading = None


def _seen(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # those who wait have it, if anybody still does


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
