"""The commands of a `RedisStore` on its multiplexed connection: its own code, down to the bytes, on a network of ours."""

import asyncio
from typing import Any, Final, cast

import redis.asyncio

from asyncidem import RedisStore
from asyncidem.stores.multiplex import MultiplexedLink
from asyncidem.stores.redis import _scripts

from schedules.network import Command, Network
from schedules.processes import Process
from schedules.server import Request, Server
from wires import Connection, FakeNode, FakeRoutes, Transport, bulk, parse

PUT, SWAP, REMOVE = _scripts()
NAMES: Final = {
    word.encode(): name
    for name, script in (("put", PUT), ("swap", SWAP), ("remove", REMOVE))
    for word in (script.source, script.sha)
}
CLIENT: Final = redis.asyncio.Redis()  # it never connects; a store looks at its class


class WireCommand(Command):
    """A command on a connection: carried out and answered behind those before it, lost with the connection."""

    def __init__(self, process: Process, transport: "WireTransport", command: list[bytes], number: int) -> None:
        super().__init__(process, request_of(command), number)
        self.transport = transport
        # The first claim of a store asks for the limits of memory too, which this server does not tell.
        self.asks = command[0] != b"SET" and self.request.op == "put" and command[-1] == b"1"
        transport.under_way.append(self)

    @property
    def is_next(self) -> bool:
        return not self.transport.aborted and self is self.transport.under_way[0] and self.state != "late"

    @property
    def is_late(self) -> bool:
        return self.state == "late" and self is self.transport.under_way[0]

    @property
    def forsaken(self) -> bool:
        return self.transport.aborted

    def execute(self, server: Server) -> None:
        super().execute(server)
        if self.transport.aborted:
            self.transport.under_way.remove(self)

    def deliver(self) -> None:
        self.transport.under_way.remove(self)
        reply = encoded(self.request.op, self.reply)
        self.process.call_soon(self.transport.reply, b"*1\r\n" + reply if self.asks else reply)

    def lose(self) -> None:
        if self.state == "answered":
            self.transport.under_way.remove(self)
        self.process.call_soon(self.transport.abort)

    def drop(self) -> None:
        self.transport.under_way.remove(self)

    def refuse(self) -> None:
        self.transport.under_way.remove(self)
        self.process.call_soon(self.transport.reply, b"-OOM command not allowed when used memory > 'maxmemory'.\r\n")


class WireTransport(Transport):
    """A transport whose writes are commands of the simulation."""

    def __init__(self, protocol: asyncio.BaseProtocol, node: "WireNode") -> None:
        super().__init__(protocol)
        self.node = node
        self.under_way: list[WireCommand] = []

    def write(self, data: Any) -> None:
        for command in parse(bytes(data)):
            self.node.sent += 1
            made = WireCommand(self.node.process, self, command, self.node.sent)
            self.node.network.commands.append(made)


class WireNode(FakeNode):
    """The server, as one process reaches it."""

    def __init__(self, process: Process, network: Network) -> None:
        super().__init__()
        self.process = process
        self.network = network
        self.sent = 0

    def make(self) -> Connection:
        connection = super().make()
        connection.transport = WireTransport(connection.streams, self)
        return connection


def wire_store(process: Process, network: Network) -> RedisStore:
    """Return a store of `process` on a multiplexed connection."""
    store = RedisStore(CLIENT, prefix="", clock=process.time, wall=process.wall)
    routes = cast("Any", FakeRoutes(WireNode(process, network)))
    store._link = store._wire = MultiplexedLink(routes, store.timeout)
    return store


def request_of(command: list[bytes]) -> Request:
    """Return what a command asks of the server."""
    if command[0] == b"SET":
        return Request("put", command[1].decode(), command[2], int(command[-1]))
    if command[0] in (b"GET", b"PTTL"):
        return Request(command[0].decode().lower(), command[1].decode())
    name, key, args = NAMES[command[1]], command[3].decode(), command[4:]
    if name == "put" and args[2] == b"2":
        return Request("probe", key)
    if name == "put":
        return Request("put", key, args[0], int(args[1]))
    if name == "remove":
        return Request("remove", key, expected=args[0], exact=args[1] == b"1")
    expected, value, ttl, exact, absent, left = args
    left_ms = int(left) if left else None
    return Request("swap", key, value, int(ttl), expected, exact == b"1", absent == b"1", left_ms)


def encoded(op: str, reply: Any) -> bytes:
    """Return a reply as the server sends it."""
    if op == "swap":
        found = b"" if reply.found is None else bulk(reply.found)
        return b"*%d\r\n:%d\r\n%s" % (2 if found else 1, reply.written, found)
    if op in ("pttl", "remove"):
        return b":%d\r\n" % reply
    return bulk(reply)
