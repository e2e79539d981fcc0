"""A node in memory for a multiplexed connection: the test sees each write, and says what comes back and when."""

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any, Final, cast

import hiredis

from asyncidem.stores.channel import Channel
from asyncidem.stores.link import Script

NOT_YET: Final = object()

OK: Final = b"+OK\r\n"


def bulk(data: bytes | None) -> bytes:
    """Return a bulk string as a server sends it; None is the null of RESP2."""
    return b"$-1\r\n" if data is None else b"$%d\r\n%s\r\n" % (len(data), data)


def parse(data: bytes) -> list[list[bytes]]:
    """Return the commands in what was written; what is not whole is an error."""
    reader = hiredis.Reader(notEnoughData=NOT_YET)
    reader.feed(data)
    commands: list[list[bytes]] = []
    while (command := reader.gets()) is not NOT_YET:
        commands.append(command)
    assert not reader.has_data(), "half a command was written"
    return commands


class LoopClock:
    """Stands for the module `time` where deadlines are to pass as fast as a virtual loop turns."""

    @staticmethod
    def monotonic() -> float:
        """Return the running loop's time."""
        return asyncio.get_running_loop().time()


class Transport(asyncio.Transport):
    """A transport whose other end is the test.

    Attributes:
        writes: what was written, one entry for each write.
        answer: gives the reply to each command, which arrives with those of the same write in a later turn; None: the
            test replies itself.
        stalled: the other end takes nothing: writes stay in the buffer, and above `high` the protocol is paused.
    """

    high = 64 * 1024
    low = 16 * 1024

    def __init__(self, protocol: asyncio.BaseProtocol) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.answer: Callable[[list[bytes]], bytes] | None = None
        self.stalled = False
        self.aborted = False
        self.unsent = 0
        self._protocol: Any = protocol
        self._paused = False

    @property
    def commands(self) -> list[list[bytes]]:
        """Return all commands that were written."""
        return parse(b"".join(self.writes))

    def get_protocol(self) -> asyncio.BaseProtocol:
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def is_closing(self) -> bool:
        return self.aborted

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def write(self, data: Any) -> None:
        assert not self.aborted, "written to a connection that is closed"
        self.writes.append(bytes(data))
        if self.stalled:
            self.unsent += len(data)
            if self.unsent > self.high and not self._paused:
                self._paused = True
                self._protocol.pause_writing()
        elif self.answer is not None:
            replies = b"".join(map(self.answer, parse(bytes(data))))
            asyncio.get_running_loop().call_soon(self.reply, replies)

    def drain(self, size: int | None = None) -> None:
        """Take so much of what the buffer holds, by default all."""
        self.unsent -= self.unsent if size is None else size
        if self._paused and self.unsent <= self.low:
            self._paused = False
            self._protocol.resume_writing()

    def reply(self, data: bytes) -> None:
        """Let `data` arrive."""
        if data and not self.aborted:
            self._protocol.data_received(data)

    def end(self) -> None:
        """Let the other end close its side."""
        if not self._protocol.eof_received():
            self.abort()

    def abort(self, error: Exception | None = None) -> None:
        if not self.aborted:
            self.aborted = True
            asyncio.get_running_loop().call_soon(lambda: self._protocol.connection_lost(error))


class Streams(asyncio.BaseProtocol):
    """The protocol of the streams that redis-py had opened."""

    def __init__(self) -> None:
        self.lost: list[Exception | None] = []

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


class Unread:
    """A reader of redis-py's, as far as it is looked at."""

    def __init__(self, data: bytes) -> None:
        self._buffer = bytearray(data)
        self._eof = False

    def at_eof(self) -> bool:
        return self._eof and not self._buffer


class Writer:
    """A writer of redis-py's, as far as it is looked at."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport


class Connection:
    """A connection as redis-py makes them: `connect` opens streams, and the handshake is over when it returns."""

    def __init__(self, node: "FakeNode") -> None:
        self.node = node
        self.streams = Streams()
        self.transport = Transport(self.streams)
        self.disconnected = False
        self._reader: Unread | None = None
        self._writer: Any = None

    async def connect(self) -> None:
        await self.node.gate.wait()
        await asyncio.sleep(0)
        if self.node.failures:
            raise self.node.failures.pop(0)
        self.transport.answer = self.node.answer
        self.transport.stalled = self.node.stalled
        self._reader = Unread(self.node.unread)
        self._writer = Writer(self.transport) if self.node.has_transport else object()

    async def disconnect(self, *, nowait: bool = False) -> None:
        assert nowait, "what ends a half-made connection must not wait for the server"
        self.disconnected = True


class FakeNode:
    """A server in memory.

    Attributes:
        gate: connections are made only while it is set.
        failures: what the next tries to connect raise.
        unread: what has arrived by the end of the handshake, and nobody asked for.
        answer: see :class:`Transport`; for connections to come.
        stalled: see :class:`Transport`; for connections to come.
    """

    def __init__(self, name: str = "fake:1") -> None:
        self.name = name
        self.connections: list[Connection] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures: list[BaseException] = []
        self.unread = b""
        self.has_transport = True
        self.answer: Callable[[list[bytes]], bytes] | None = None
        self.stalled = False
        self.lent: list[Lent] = []

    def make(self) -> Connection:
        connection = Connection(self)
        self.connections.append(connection)
        return connection

    @property
    def transport(self) -> Transport:
        """Return the transport of the newest connection."""
        return self.connections[-1].transport

    @property
    def commands(self) -> list[list[list[bytes]]]:
        """Return what each connection carried."""
        return [connection.transport.commands for connection in self.connections]

    async def lend(self) -> "Lent":
        self.lent.append(Lent(self))
        return self.lent[-1]

    async def take_back(self, connection: "Lent") -> None:
        connection.back = True


class Lent:
    """A connection of the client's pool, for the plain path."""

    def __init__(self, node: FakeNode) -> None:
        self.node = node
        self.back = False
        self.replies: list[Any] = []

    def pack_commands(self, commands: Any) -> list[bytes]:
        return [hiredis.pack_command(tuple(command)) for command in commands]

    async def send_packed_command(self, packed: list[bytes]) -> None:
        assert self.node.answer is not None
        reader = hiredis.Reader(notEnoughData=NOT_YET)
        for command in parse(b"".join(packed)):
            reader.feed(self.node.answer(command))
            self.replies.append(reader.gets())

    async def read_response(self, *, disable_decoding: bool) -> Any:
        assert disable_decoding
        await asyncio.sleep(0)
        return self.replies.pop(0)

    async def disconnect(self, *, nowait: bool) -> None:
        raise AssertionError(nowait)


class FakeRoutes:
    """Routes to nodes in memory: all keys to the first, redirections to whichever they name."""

    lendable = 4
    tls = cluster = False

    def __init__(self, *nodes: FakeNode) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.first: FakeNode | None = nodes[0]
        self.heard: list[tuple[str, str]] = []
        self.asks: list[str | None] = []
        self.refreshed = 0
        self.after_refresh: FakeNode | None = None
        self.resets: list[bool] = []

    def find(self, _: str, *, trust: bool = False) -> FakeNode | None:
        return self.first

    def named(self, name: str) -> FakeNode | None:
        return self.nodes.get(name)

    def knows(self, name: str) -> bool:
        return name in self.nodes

    def heed(self, code: str, error: BaseException, node: object) -> str | None:
        self.heard.append((code, str(error)))
        return self.asks.pop(0) if self.asks else None

    async def aclose(self) -> None:
        pass

    async def refresh(self, seconds: float) -> None:
        self.refreshed += 1
        await asyncio.sleep(0)
        self.first = self.after_refresh

    def reset(self, *, forked: bool) -> None:
        self.resets.append(forked)


def answer_with(replies: dict[bytes, bytes]) -> Callable[[list[bytes]], bytes]:
    """Return an `answer` that goes by a command's first word, and is +OK for others."""
    return lambda command: replies.get(command[0], OK)


def words(node: FakeNode) -> list[list[bytes]]:
    """Return the commands that the node got, over all its connections."""
    return [command for commands in node.commands for command in commands]


def script(source: str) -> Script:
    """Return a script that is not in the package."""
    made = object.__new__(Script)
    made.source = source
    made.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
    return made


async def turns(count: int = 10) -> None:
    """Let the loop turn: a connection in memory takes fewer turns than this."""
    for _ in range(count):
        await asyncio.sleep(0)


async def connected(node: FakeNode, silence: float = 1.0) -> Channel:
    """Return a channel to `node` that has its connection, and nothing in flight."""
    channel = Channel(cast("Any", node), asyncio.get_running_loop(), silence)
    answer, node.answer = node.answer, None
    future = channel.send(("PING",), asyncio.get_running_loop().time() + 1000)
    await turns()
    node.transport.reply(b"+PONG\r\n")
    assert await future == b"PONG"
    node.transport.writes.clear()
    node.transport.answer = node.answer = answer
    return channel
