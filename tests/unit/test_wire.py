"""What of redis-py is private and needed: taking a connection's transport over, and a cluster node's connections."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.cluster import ClusterNode
from redis.exceptions import ConnectionError as BrokenConnectionError

from asyncidem import StoreError
from asyncidem.stores.wire import NotMultiplexableError, Wire, forget_connections, give_back

from wires import OK, FakeNode, Streams

HELLO = b"%1\r\n+proto\r\n:3\r\n"


class Recorder(Wire):
    """A protocol that keeps what arrives."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.lost = asyncio.Event()
        self.arrived = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.arrived.set()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.lost.set()


@contextlib.asynccontextmanager
async def speaking(behind: bytes = b"") -> AsyncIterator[int]:
    """Serve handshakes, with `behind` in one piece with the last reply, and echo the first word of all else."""
    serving: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while count := await reader.readline():
                words = [(await reader.readline(), await reader.readline())[1].strip() for _ in range(int(count[1:]))]
                if words[0] in (b"HELLO", b"CLIENT"):
                    writer.write(HELLO if words[0] == b"HELLO" else OK)
                elif words[0] == b"SELECT":
                    writer.write(OK + behind)
                else:
                    writer.write(b"+" + words[0] + b"\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.wait([task for task in serving if task is not None], timeout=5)


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decode_responses", [False, True])
async def test_take_over(protocol: int, decode_responses: bool) -> None:
    """The transport of a connection that redis-py made serves our protocol, and redis-py has none any more."""
    async with speaking() as port:
        client = Redis(port=port, db=3, protocol=protocol, decode_responses=decode_responses)
        connection = client.connection_pool.make_connection()
        await connection.connect()
        wire = Recorder()
        wire.take_over(connection)
        assert not connection.is_connected
        assert wire.transport.get_protocol() is wire
        wire.transport.write(b"*1\r\n$4\r\nPING\r\n")
        await wire.arrived.wait()
        assert wire.received == b"+PING\r\n"
        wire.transport.abort()
        await wire.lost.wait()
        await connection.disconnect()  # of nothing
        await client.aclose()


@pytest.mark.parametrize("kind", [Connection, SSLConnection, UnixDomainSocketConnection])
async def test_not_connected(kind: type[Any]) -> None:
    """A connection that was not made, or was closed, has nothing to take over."""
    wire = Recorder()
    with pytest.raises(NotMultiplexableError, match=f"{kind.__name__} has no transport of its own") as raised:
        wire.take_over(kind())
    assert isinstance(raised.value, StoreError)
    assert not raised.value.outcome_unknown


@pytest.mark.parametrize("missing", ["_reader", "_writer", "_buffer", "transport", "get_protocol", "set_protocol"])
async def test_another_version(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """A connection that is not as expected is left whole, for whoever can use it."""

    class Without:
        def __getattr__(self, name: str) -> Any:
            message = f"no {name}"
            raise AttributeError(message)

    node = FakeNode()
    connection = node.make()
    await connection.connect()
    reader, writer = connection._reader, connection._writer
    if missing in ("_reader", "_writer"):
        delattr(connection, missing)
    elif missing == "_buffer":
        del reader._buffer  # type: ignore[union-attr]
    elif missing == "transport":
        del writer.transport
    else:
        writer.transport = Without()
    with pytest.raises(NotMultiplexableError):
        Recorder().take_over(connection)
    assert missing == "_reader" or connection._reader is reader
    assert missing == "_writer" or connection._writer is writer
    if missing not in ("transport", "get_protocol", "set_protocol"):
        assert isinstance(connection.transport.get_protocol(), Streams)


async def test_unread() -> None:
    """Bytes that the streams had read are handed over with the transport."""
    node = FakeNode()
    node.unread = b">1\r\n+moving\r\n"
    connection = node.make()
    await connection.connect()
    assert Recorder().take_over(connection) == node.unread
    assert not connection.transport.aborted


async def test_closed_by_the_server_before_it_was_taken_over() -> None:
    """A connection that the server had closed by then is none: nobody waits for an answer over it."""
    node = FakeNode()
    connection = node.make()
    await connection.connect()
    assert connection._reader is not None
    connection._reader._eof = True
    with pytest.raises(BrokenConnectionError):
        Recorder().take_over(connection)
    assert connection.transport.aborted


async def test_lost_before_it_was_taken_over() -> None:
    """The same where the transport is closing, whose end our protocol would not hear of."""
    node = FakeNode()
    connection = node.make()
    await connection.connect()
    connection.transport.abort(ConnectionResetError("peer"))
    await asyncio.sleep(0)
    with pytest.raises(BrokenConnectionError):
        Recorder().take_over(connection)


@pytest.mark.parametrize("behind", [b">2\r\n+moving\r\n", b"$5\r\n", b"+late\r\n"])
@pytest.mark.parametrize("protocol", [2, 3])
async def test_unread_in_the_parser(protocol: int, behind: bytes) -> None:
    """What redis-py has read and not looked at counts too: the rest of it would be taken for the first reply."""
    async with speaking(behind) as port:
        client = Redis(port=port, db=3, protocol=protocol)
        connection = client.connection_pool.make_connection()
        await connection.connect()
        wire = Recorder()
        with pytest.raises(BrokenConnectionError, match="what nobody had asked for"):
            wire.take_over(connection)
        await wire.lost.wait()
        await client.aclose()


# -- cluster nodes ---------------------------------------------------------------------------------------------------------


async def test_forget_connections() -> None:
    """A cluster node of redis-py gives up the connections that it holds, free or not."""
    node = ClusterNode("nowhere.invalid", 1)
    connections: list[Any] = [Connection(), Connection()]
    node._connections.extend(connections)
    node._free.append(connections[0])
    taken = forget_connections(node)
    assert set(taken) == set(connections)
    assert not node._connections
    assert not node._free
    assert forget_connections(object()) == []


async def test_give_back() -> None:
    """A connection goes back to its node, in each version of redis-py."""
    node = ClusterNode("nowhere.invalid", 1)
    connection: Any = Connection()
    give_back(node, connection)
    assert list(node._free) == [connection]

    class Older:
        def __init__(self) -> None:
            self._free: list[Any] = []

    older = Older()
    give_back(older, connection)
    assert older._free == [connection]
