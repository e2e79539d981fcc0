"""A cluster client of redis-py's in memory, as far as the routes look at it."""

import asyncio
from typing import Any

from redis import exceptions


class Connection:
    """A connection of the client's, as far as the routes look at it."""

    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = kwargs
        self.retry: Any = None
        self.failure: BaseException | None = None
        self.connects = 0
        self.closed = False

    async def disconnect(self, *, nowait: bool) -> None:
        assert nowait
        self.closed = True

    async def connect(self) -> None:
        self.connects += 1
        if self.failure is not None:
            raise self.failure


class Node:
    """A node of a redis-py cluster client."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.connection_class = Connection
        self.connection_kwargs = {"host": name}
        self._connections: list[Connection] = []
        self._free: list[Connection] = []

    def acquire_connection(self) -> Connection:
        connection = self._free.pop() if self._free else Connection()
        if connection not in self._connections:
            self._connections.append(connection)
        return connection

    def release(self, connection: Connection) -> None:
        self._free.append(connection)


class Manager:
    """The topology of a cluster client: what it knows, and what it will find when it asks."""

    def __init__(self, names: dict[str, range]) -> None:
        self.there = names
        self.failures: list[BaseException] = []
        self.read = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.nodes_cache: dict[str, Node] = {}
        self.slots_cache: dict[int, list[Node]] = {}
        self.startup_nodes: dict[str, Node] = {name: Node(name) for name in names}
        self.connection_kwargs: dict[str, Any] = {"connection_class": Connection}
        self.remapped: dict[tuple[str, int], tuple[str, int]] = {}
        self.sources: list[str] = []

    async def initialize(self) -> None:
        self.read += 1
        self.sources.append(next(iter(self.startup_nodes)))
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        self.nodes_cache = {name: self.nodes_cache.get(name) or Node(name) for name in self.there}
        self.slots_cache = {slot: [self.nodes_cache[name]] for name, slots in self.there.items() for slot in slots}
        self.startup_nodes = dict(self.nodes_cache)

    def get_node(self, host: str, port: int) -> Node | None:
        return self.nodes_cache.get(f"{host}:{port}")

    def remap_host_port(self, host: str, port: int) -> tuple[str, int]:
        return self.remapped.get((host, port), (host, port))


class Client:
    """A cluster client whose slots are the numbers that keys are."""

    def __init__(self, **names: range) -> None:
        self.nodes_manager = Manager({f"{name}:1": slots for name, slots in names.items()})
        self.initialized = 0
        self.limit: int | None = 7

    def get_connection_kwargs(self) -> dict[str, Any]:
        return {"max_connections": self.limit}

    async def initialize(self) -> None:
        self.initialized += 1
        await self.nodes_manager.initialize()

    def keyslot(self, key: str) -> int:
        return int(key)

    def get_node_from_key(self, key: str) -> Node:
        nodes = self.nodes_manager.slots_cache.get(int(key))
        if nodes is None:
            raise exceptions.SlotNotCoveredError(key)
        return nodes[0]
