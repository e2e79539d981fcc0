"""How a channel makes, loses and ends its connections; what is told of what was sent, and what never was."""

import asyncio
import contextlib
import gc
import sys
import threading
import weakref
from contextvars import ContextVar
from typing import Any

import pytest
from redis import exceptions

from asyncidem import StoreError
from asyncidem.stores.channel import Broken, Channel
from asyncidem.stores.wire import NotMultiplexableError

from wires import OK, FakeNode, bulk, connected, turns

FAR = 10.0**9

LOST = exceptions.ConnectionError("lost")


@pytest.fixture
def node() -> FakeNode:
    """A server in memory that replies only as the test says."""
    return FakeNode()


def fresh(node: FakeNode) -> Channel:
    """Return a channel that has no connection yet."""
    return Channel(node, asyncio.get_running_loop(), 30.0)


async def broken(future: asyncio.Future[Any]) -> Broken:
    """Return how a command failed."""
    reply = await future
    assert isinstance(reply, Broken)
    return reply


# -- making one ------------------------------------------------------------------------------------------------------------


async def test_one_connection_for_all_who_wait(node: FakeNode) -> None:
    """Commands that come while the connection is made wait for that one, and go out in their order in one write."""
    node.gate.clear()
    channel = fresh(node)
    futures = []
    for number in range(20):
        futures.append(channel.send(("GET", number), FAR))
        await turns(2)
    assert len(node.connections) == 1
    node.gate.set()
    await turns()
    assert len(node.transport.writes) == 1
    assert node.transport.commands == [[b"GET", b"%d" % number] for number in range(20)]
    node.transport.reply(OK * 20)
    assert await asyncio.gather(*futures) == [b"OK"] * 20
    assert len(node.connections) == 1
    await channel.aclose()


@pytest.mark.parametrize(
    "error",
    [
        exceptions.ConnectionError("refused"),
        exceptions.AuthenticationError("WRONGPASS"),
        exceptions.BusyLoadingError("loading"),
        OSError("no route"),
        RuntimeError("Event loop is closed"),
        ValueError("whatever a client throws"),
    ],
    ids=repr,
)
async def test_connecting_fails(node: FakeNode, error: Exception) -> None:
    """All who wait for a connection that fails are told what happened, and that nothing was sent; the next tries anew."""
    node.failures.append(error)
    channel = fresh(node)
    futures = [channel.send(("GET", number), FAR) for number in range(4)]
    futures.pop(1).cancel()
    for future in futures:
        failure = await broken(future)
        assert failure.error is error
        assert not failure.sent
    assert node.connections[0].disconnected
    again = channel.send(("A",), FAR)
    await turns()
    node.transport.reply(b"+a\r\n")
    assert await again == b"a"
    assert len(node.connections) == 2
    await channel.aclose()


async def test_making_fails(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that cannot even make a connection is told so too."""

    def make() -> Any:
        message = "bad arguments"
        raise TypeError(message)

    monkeypatch.setattr(node, "make", make)
    channel = fresh(node)
    failure = await broken(channel.send(("A",), FAR))
    assert isinstance(failure.error, TypeError)
    assert not failure.sent
    await channel.aclose()


async def test_connecting_is_cancelled_from_outside(node: FakeNode) -> None:
    """What cancels every task of the loop, as its end does, leaves nobody waiting: they may try again."""
    node.gate.clear()
    channel = fresh(node)
    future = channel.send(("A",), FAR)
    await turns()
    assert channel._connecting is not None
    channel._connecting.cancel()
    failure = await broken(future)
    assert not failure.sent
    assert "cancelled from outside" in str(failure.error)
    node.gate.set()
    again = channel.send(("B",), FAR)
    await turns()
    node.transport.reply(b"+b\r\n")
    assert await again == b"b"
    await channel.aclose()


async def test_connecting_is_cancelled_before_it_began(node: FakeNode) -> None:
    """The same in the turn in which connecting was to begin."""
    channel = fresh(node)
    future = channel.send(("A",), FAR)
    await turns(1)
    assert channel._connecting is not None
    channel._connecting.cancel()
    await turns()
    again = channel.send(("B",), FAR)
    await turns()
    node.transport.reply(OK * len(node.transport.commands))
    assert await again == b"OK"
    assert future.done()
    await channel.aclose()


@pytest.mark.parametrize("unread", [b"+OK\r\n", b"$5\r\nhe", b">1\r\n+moving\r\n+OK\r\n"])
async def test_unread_bytes_are_refused(node: FakeNode, unread: bytes) -> None:
    """A server that has sent what nobody asked for would answer every command with another's reply."""
    node.unread = unread
    channel = fresh(node)
    failure = await broken(channel.send(("A",), FAR))
    assert isinstance(failure.error, exceptions.ConnectionError)
    assert not failure.sent
    assert node.transport.aborted
    assert node.transport.writes == []
    node.unread = b""
    again = channel.send(("B",), FAR)
    await turns()
    node.transport.reply(b"+b\r\n")
    assert await again == b"b"
    await channel.aclose()


@pytest.mark.parametrize("cut", [0, 2, 4, 9, 14])
async def test_unread_push(node: FakeNode, cut: int) -> None:
    """A message that came with the end of the handshake, or its beginning, is no reply, and costs no connection."""
    message = b">1\r\n+moving\r\n"
    node.unread = message[:cut]
    channel = fresh(node)
    future = channel.send(("A",), FAR)
    await turns()
    node.transport.reply(message[cut:] + b"+a\r\n")
    assert await future == b"a"
    assert len(node.connections) == 1
    await channel.aclose()


async def test_no_transport(node: FakeNode) -> None:
    """A client without a transport is told from one that has no connection."""
    node.has_transport = False
    channel = fresh(node)
    failure = await broken(channel.send(("A",), FAR))
    assert isinstance(failure.error, NotMultiplexableError)
    assert not failure.sent
    assert node.connections[0].disconnected
    await channel.aclose()


async def test_context_of_nobody(node: FakeNode) -> None:
    """Connections and timers do not run in a caller's context: it would live as long as they do."""
    who: ContextVar[str] = ContextVar("who", default="nobody")
    seen: list[str] = []
    make = node.make

    def spy() -> Any:
        seen.append(who.get())
        return make()

    node.make = spy  # type: ignore[method-assign]
    channel = fresh(node)
    who.set("caller")
    channel.send(("A",), FAR)
    await turns()
    assert seen == ["nobody"]
    await channel.aclose()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
async def test_eager_tasks(node: FakeNode) -> None:
    """A loop that runs tasks at once, where they are made, makes connections too."""
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    channel = fresh(node)
    future = channel.send(("A",), FAR)
    await turns()
    node.transport.reply(OK)
    assert await future == b"OK"
    await channel.aclose()


def test_loops_in_threads() -> None:
    """Channels of several threads do not get in each other's way, however the interpreter switches between them."""
    errors: list[Any] = []

    def run() -> None:
        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
            node = FakeNode()
            node.answer = lambda command: bulk(command[1])
            channel = await connected(node)
            for _ in range(200):
                futures = [channel.send(("ECHO", number), FAR) for number in range(5)]
                assert await asyncio.gather(*futures) == [b"%d" % number for number in range(5)]
            await channel.aclose()

        try:
            asyncio.run(asyncio.wait_for(main(), 20))
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []


# -- losing it -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["eof", "reset", "closed", "garbage", "unasked", "bad error", "dropped"])
async def test_connection_breaks(node: FakeNode, how: str) -> None:
    """However a connection breaks: what was in flight may have run, what waited goes over a new one, nobody waits on."""
    channel = await connected(node)
    transport = node.transport
    in_flight = [channel.send(("GET", number), FAR) for number in range(3)]
    await turns(2)
    in_flight[1].cancel()
    transport._protocol.pause_writing()
    waiting = channel.send(("W",), FAR)
    if how == "eof":
        transport.end()
    elif how in ("reset", "closed"):
        transport.abort(ConnectionResetError("peer") if how == "reset" else None)
    elif how == "garbage":
        transport.reply(bulk(b"0") + b"?what\r\n")
    elif how == "unasked":
        transport.reply(bulk(b"0") + OK * 3)
    elif how == "bad error":
        transport.reply(bulk(b"0") + b"-MOVED to nowhere\r\n")
    else:
        channel.drop(LOST)
    await turns()
    assert transport.aborted
    if how == "unasked":
        assert [in_flight[0].result(), in_flight[2].result()] == [b"0", b"OK"]
    elif how in ("garbage", "bad error"):
        assert in_flight[0].result() == b"0"
    else:
        assert (await broken(in_flight[0])).sent
    if how != "unasked":
        failure = await broken(in_flight[2])
        assert failure.sent
        assert failure.error is LOST or isinstance(failure.error, exceptions.RedisError)
    assert len(node.connections) == 2
    assert node.transport.commands == [[b"W"]]
    node.transport.reply(b"+w\r\n")
    assert await waiting == b"w"
    await channel.aclose()


@pytest.mark.parametrize("data", [OK, b"$-1\r\n", b"-ERR max number of clients\r\n", b"garbage"])
async def test_reply_to_nothing(node: FakeNode, data: bytes) -> None:
    """What arrives on an idle connection and is no push message ends it: the next command would get it."""
    channel = await connected(node)
    first = node.transport
    first.reply(data)
    assert first.aborted
    await turns()
    assert len(node.connections) == 1, "a connection that nobody asked for"
    future = channel.send(("A",), FAR)
    await turns()
    assert len(node.connections) == 2
    node.transport.reply(b"+a\r\n")
    assert await future == b"a"
    await channel.aclose()


async def test_bytes_of_a_broken_connection(node: FakeNode) -> None:
    """What still arrives over a connection that was given up is nobody's."""
    channel = await connected(node)
    old = node.transport
    old_wire = old._protocol
    future = channel.send(("A",), FAR)
    channel.drop(LOST)
    assert (await broken(future)).sent
    again = channel.send(("B",), FAR)
    await turns()
    old_wire.data_received(b"+a\r\n")
    old_wire.eof_received()
    old_wire.connection_lost(None)
    old_wire.resume_writing()
    await turns()
    node.transport.reply(b"+b\r\n")
    assert await again == b"b"
    assert len(node.connections) == 2
    await channel.aclose()


async def test_streams_end_too(node: FakeNode) -> None:
    """The streams that redis-py had opened hear that their connection is gone."""
    channel = await connected(node)
    error = ConnectionResetError("peer")
    node.transport.abort(error)
    await turns()
    assert node.connections[0].streams.lost == [error]
    await channel.aclose()


async def test_drop_without_a_connection(node: FakeNode) -> None:
    """What was dropped by one caller may be dropped by the next."""
    channel = await connected(node)
    channel.drop(LOST)
    channel.drop(LOST)
    assert node.transport.aborted
    await channel.aclose()


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=["no memory", "interrupted"])
async def test_write_that_fails(node: FakeNode, error: BaseException) -> None:
    """Commands that were not written as they should have been end their connection: the next reply would be another's."""
    channel = await connected(node)
    transport = node.transport
    first = channel.send(("FIRST",), FAR)
    futures = [channel.send(("GET", number), FAR) for number in range(3)]

    def write(_: bytes) -> None:
        del transport.write  # this once
        raise error

    transport.write = write  # type: ignore[method-assign]
    with contextlib.nullcontext() if isinstance(error, Exception) else pytest.raises(KeyboardInterrupt):
        channel._flush()
    again = channel.send(("AGAIN",), FAR)
    await turns()
    transport.reply(b"+first\r\n+again\r\n")
    node.transport.reply(b"+again\r\n")
    assert transport.aborted
    for future in (first, *futures):
        assert (await broken(future)).sent
    assert await again == b"again"
    await channel.aclose()


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=["no memory", "interrupted"])
async def test_lone_write_that_fails(node: FakeNode, error: BaseException) -> None:
    """So does the write of a caller on its own."""
    channel = await connected(node)
    transport = node.transport

    def write(_: bytes) -> None:
        raise error

    transport.write = write  # type: ignore[method-assign]
    if isinstance(error, Exception):
        assert (await broken(channel.send(("LONE",), FAR))).sent
    else:
        with pytest.raises(KeyboardInterrupt):
            channel.send(("LONE",), FAR)
    assert transport.aborted
    again = channel.send(("AGAIN",), FAR)
    await turns()
    node.transport.reply(b"+again\r\n")
    assert await again == b"again"
    await channel.aclose()


async def test_lone_command_that_is_none(node: FakeNode) -> None:
    """What cannot be packed is its caller's error, and leaves the connection to the next."""
    channel = await connected(node)
    failure = await broken(channel.send((object(),), FAR))  # type: ignore[arg-type]
    assert isinstance(failure.error, StoreError)
    assert not failure.sent
    again = channel.send(("AGAIN",), FAR)
    node.transport.reply(b"+again\r\n")
    assert await again == b"again"
    assert len(node.connections) == 1
    await channel.aclose()


async def test_interrupted_among_replies(node: FakeNode) -> None:
    """An interruption between two replies gives nobody another's reply, and leaves nobody waiting for ever."""
    channel = await connected(node)
    futures = [channel.send(("GET", number), FAR) for number in range(3)]
    await turns(2)
    wire: Any = node.transport._protocol

    class Interrupted:
        """A reader that is interrupted behind the first reply."""

        def __init__(self) -> None:
            self.replies = [b"0"]

        def feed(self, _: bytes) -> None:
            pass

        def gets(self, _: bool) -> bytes:
            if not self.replies:
                raise KeyboardInterrupt
            return self.replies.pop()

    wire._reader = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        node.transport.reply(b"data")
    assert node.transport.aborted
    assert await futures[0] == b"0"
    for future in futures[1:]:
        assert (await broken(future)).sent
    await channel.aclose()


async def test_lost_while_a_caller_is_woken(node: FakeNode) -> None:
    """A connection that breaks in the turn in which replies have come takes none of them back."""
    channel = await connected(node)
    futures = [channel.send(("GET", number), FAR) for number in range(2)]
    await turns(2)
    node.transport.reply(bulk(b"0"))
    node.transport.end()
    assert await futures[0] == b"0"
    assert (await broken(futures[1])).sent
    await channel.aclose()


# -- ending it -------------------------------------------------------------------------------------------------------------


async def test_close_with_everything_under_way(node: FakeNode) -> None:
    """Closing tells what was in flight that it may have run, and what waited that it has not; no task is left."""
    before = asyncio.all_tasks()
    channel = await connected(node)
    in_flight = channel.send(("A",), FAR)
    node.transport._protocol.pause_writing()
    waiting = channel.send(("B",), FAR)
    await channel.aclose()
    assert (await broken(in_flight)).sent
    assert not (await broken(waiting)).sent
    assert node.transport.aborted
    assert asyncio.all_tasks() == before


async def test_close_while_connecting(node: FakeNode) -> None:
    """Closing ends a connection that is being made, and leaves neither task nor connection."""
    before = asyncio.all_tasks()
    node.gate.clear()
    channel = fresh(node)
    future = channel.send(("A",), FAR)
    await turns()
    await channel.aclose()
    assert not (await broken(future)).sent
    assert node.connections[0].disconnected
    assert asyncio.all_tasks() == before
    node.gate.set()
    await turns()
    assert len(node.connections) == 1


async def test_close_before_anything(node: FakeNode) -> None:
    """A channel that never had anything to send ends as well."""
    await fresh(node).aclose()
    assert node.connections == []


async def test_end_while_connecting(node: FakeNode) -> None:
    """A connection that comes when the loop is ending is ended with it, and nothing goes over it."""
    node.gate.clear()
    channel = fresh(node)
    future = channel.send(("A",), FAR)
    await turns()
    channel._hold.ended = True
    node.gate.set()
    assert not (await broken(future)).sent
    await turns()
    assert node.transport.aborted
    assert node.transport.writes == []
    later = channel.send(("B",), FAR)
    assert not (await broken(later)).sent
    assert len(node.connections) == 1
    await channel.aclose()


def test_loop_ends_first() -> None:
    """A loop that ends without a word ends the connection, and nobody is left waiting."""
    nodes: list[FakeNode] = []
    futures: list[asyncio.Future[Any]] = []
    channels: list[Channel] = []

    async def main() -> None:
        nodes.append(FakeNode())
        channels.append(await connected(nodes[0]))
        futures.append(channels[0].send(("A",), FAR))

    asyncio.run(main())
    assert nodes[0].transport.aborted
    assert futures[0].done()
    assert futures[0].result().sent


async def test_channel_that_nobody_holds(node: FakeNode) -> None:
    """A channel that nobody holds any more is collected, and its connection ends with it."""
    channel = await connected(node)
    channel._timer.cancel()  # type: ignore[union-attr]  # that of the far deadline holds it until then
    channel._timer = None
    gone = weakref.ref(channel)
    transport = node.transport
    del channel
    gc.collect()
    assert gone() is None
    transport._protocol.data_received(b">1\r\n+x\r\n")
    transport._protocol.pause_writing()
    transport._protocol.resume_writing()
    await turns()
    assert transport.aborted
    assert node.connections[0].streams.lost == [None]
