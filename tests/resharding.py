"""What an operator does to a cluster that is in use: masters change, slots move, shards are added."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from redis.asyncio import Redis
from redis.crc import key_slot

from servers import HOST, Cluster, Server


def slot_of(tag: str) -> int:
    """Return the slot of the keys with this hash tag."""
    return int(key_slot(tag.encode()))


def tags_in(slots: range, count: int) -> list[str]:
    """Return so many hash tags whose slots lie in a range."""
    tags: list[str] = []
    number = 0
    while len(tags) < count:
        if slot_of(f"t{number}") in slots:
            tags.append(f"t{number}")
        number += 1
    return tags


class Operator:
    """Commands to the nodes of a cluster, between those of the clients."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._clients: dict[int, Redis] = {}
        self._names: dict[int, str] = {}

    async def __aenter__(self) -> Self:
        """Do nothing yet."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Close the connections."""
        for client in self._clients.values():
            await client.aclose()

    async def at(self, node: Server, *words: str | int) -> Any:
        """Send a command to a node."""
        client = self._clients.get(node.port)
        if client is None:
            client = self._clients[node.port] = Redis(host=HOST, port=node.port)
        return await client.execute_command(*words)

    async def name(self, node: Server) -> str:
        """Return the id by which the cluster knows a node."""
        if node.port not in self._names:
            self._names[node.port] = (await self.at(node, "CLUSTER", "MYID")).decode()
        return self._names[node.port]

    async def slots(self, node: Server) -> set[int]:
        """Return the slots that a node says it serves."""
        client = self._clients.get(node.port) or Redis(host=HOST, port=node.port)
        self._clients[node.port] = client
        client.response_callbacks.pop("CLUSTER NODES", None)
        nodes: bytes = await self.at(node, "CLUSTER NODES")
        words = next(line for line in nodes.decode().splitlines() if "myself" in line).split()[8:]
        found: set[int] = set()
        for word in words:
            if word[:1] != "[":
                first, _, last = word.partition("-")
                found.update(range(int(first), int(last or first) + 1))
        return found

    async def owner(self, slot: int) -> Server:
        """Return the master that serves a slot."""
        for node in self.cluster.masters:
            if slot in await self.slots(node):
                return node
        raise LookupError(slot)

    async def open_slot(self, slot: int, source: Server, target: Server) -> None:
        """Begin to move a slot: keys that the source does not have are asked of the target from now on."""
        await self.at(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", await self.name(source))
        await self.at(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", await self.name(target))

    async def move_keys(self, slot: int, source: Server, target: Server, count: int = 100) -> int:
        """Move some keys of an open slot; return how many."""
        keys = await self.at(source, "CLUSTER", "GETKEYSINSLOT", slot, count)
        if keys:
            await self.at(source, "MIGRATE", HOST, target.port, "", 0, 5000, "KEYS", *keys)
        return len(keys)

    async def close_slot(self, slot: int, source: Server, target: Server) -> None:
        """Move what is left, and give the slot to the target."""
        while await self.move_keys(slot, source, target):
            pass
        name = await self.name(target)
        for node in (target, source):
            await self.at(node, "CLUSTER", "SETSLOT", slot, "NODE", name)

    async def move_slots(self, slots: Sequence[int], source: Server, target: Server) -> None:
        """Move slots whole, a few at a time."""

        async def move(slots: Sequence[int]) -> None:
            for slot in slots:
                await self.open_slot(slot, source, target)
                await self.close_slot(slot, source, target)

        await asyncio.gather(*(move(slots[number::8]) for number in range(8)))

    async def fail_over(self, replica: Server) -> None:
        """Make a replica the master in agreement with its master, and wait until it is."""
        async with asyncio.timeout(20):
            while (await self.at(replica, "ROLE"))[0] not in (b"slave", "slave"):
                await asyncio.sleep(0.02)
            await self.at(replica, "CLUSTER", "FAILOVER")
            await self.promoted(replica)

    async def promoted(self, replica: Server) -> None:
        """Wait until a replica is the master."""
        while (await self.at(replica, "ROLE"))[0] not in (b"master", "master"):
            await asyncio.sleep(0.01)
