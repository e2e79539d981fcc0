"""Order, cancellation and back-pressure on one connection: what is written when, and whose each reply is."""

import asyncio
import random

import pytest
from redis import exceptions

from asyncidem import StoreError
from asyncidem.stores import channel as channel_module
from asyncidem.stores.channel import CHUNK, PACK, WINDOW, Broken, Channel
from asyncidem.stores.link import Command

from wires import OK, FakeNode, bulk, connected, parse, turns

FAR = 10.0**9
"""A deadline that no test here reaches."""


def later(channel: Channel, *words: bytes | str | int) -> asyncio.Task[object]:
    """Send a command as a task of its own does: in its next turn, and waiting for the reply."""

    async def send() -> object:
        return await channel.send(words, FAR)

    return asyncio.get_running_loop().create_task(send())


@pytest.fixture
def node() -> FakeNode:
    """A server in memory that replies only as the test says."""
    return FakeNode()


# -- order -----------------------------------------------------------------------------------------------------------------


async def test_replies_in_order(node: FakeNode) -> None:
    """Each command gets its own reply, however the bytes of the replies are cut."""
    channel = await connected(node)
    chance = random.Random(7)
    for _ in range(30):
        futures = [channel.send(("GET", str(number)), FAR) for number in range(50)]
        await turns(2)
        data = b"".join(bulk(b"v%d" % number) for number in range(50))
        while data:
            size = chance.randint(1, 60)
            node.transport.reply(data[:size])
            data = data[size:]
        assert await asyncio.gather(*futures) == [b"v%d" % number for number in range(50)]
    await channel.aclose()


async def test_all_kinds_of_replies(node: FakeNode) -> None:
    """Replies are bytes, integers, None and lists as the server means them; an error reply is a value, and is not raised."""
    channel = await connected(node)
    futures = [channel.send(("X",), FAR) for _ in range(7)]
    await turns(2)
    node.transport.reply(b"+OK\r\n:5\r\n$-1\r\n_\r\n*2\r\n:1\r\n$2\r\n\xc3\xa4\r\n$0\r\n\r\n-WRONGTYPE no\r\n")
    *values, error = await asyncio.gather(*futures)
    assert values == [b"OK", 5, None, None, [1, b"\xc3\xa4"], b""]
    assert isinstance(error, exceptions.ResponseError)
    await channel.aclose()


async def test_lone_caller_is_written_at_once(node: FakeNode) -> None:
    """A command with nothing else in flight is written before the caller first waits."""
    channel = await connected(node)
    future = channel.send(("GET", "k"), FAR)
    assert node.transport.commands == [[b"GET", b"k"]]
    node.transport.reply(bulk(b"v"))
    assert await future == b"v"
    future = channel.send(("GET", "l"), FAR)
    assert len(node.transport.writes) == 2
    future.cancel()
    await channel.aclose()


async def test_lone_caller_with_two_commands_writes_once(node: FakeNode) -> None:
    """Commands that belong together go out in one write, at once for a caller on its own."""
    channel = await connected(node)
    futures = channel.send_all((("GET", "k"), ("PTTL", "k")), FAR)
    assert parse(node.transport.writes[0]) == [[b"GET", b"k"], [b"PTTL", b"k"]]
    node.transport.reply(bulk(b"v") + b":7\r\n")
    assert [await future for future in futures] == [b"v", 7]
    await channel.aclose()


async def test_crowd_shares_writes(node: FakeNode) -> None:
    """A hundred commands of one turn take two writes: the first caller did not know of the others."""
    channel = await connected(node)
    tasks = [later(channel, "GET", number) for number in range(100)]
    await turns(3)
    assert [len(parse(write)) for write in node.transport.writes] == [1, 99]
    assert node.transport.commands == [[b"GET", b"%d" % number] for number in range(100)]
    node.transport.reply(OK * 100)
    await asyncio.gather(*tasks)
    await channel.aclose()


async def test_crowd_goes_on_in_one_write(node: FakeNode) -> None:
    """What callers send in the turn in which their replies woke them goes out in one write, and in that same turn."""
    channel = await connected(node)

    async def twice(number: int) -> None:
        await channel.send(("FIRST", number), FAR)
        await channel.send(("SECOND", number), FAR)

    tasks = [asyncio.ensure_future(twice(number)) for number in range(50)]
    await turns(3)
    node.transport.writes.clear()
    node.transport.reply(OK * 50)
    await turns(1)
    assert [len(parse(write)) for write in node.transport.writes] == [50]
    node.transport.reply(OK * 50)
    await asyncio.gather(*tasks)
    await channel.aclose()


async def test_crowd_that_comes_back(node: FakeNode) -> None:
    """Where the last replies came several at a time, the next commands are expected to: one write for all, the first too."""
    channel = await connected(node)
    for size in (5, 3, 2):
        futures = [channel.send(("GET", number), FAR) for number in range(size)]
        await turns()
        assert len(node.transport.writes) == (2 if size == 5 else 1)
        node.transport.writes.clear()
        node.transport.reply(OK * size)
        await asyncio.gather(*futures)
        await turns()
    lone = channel.send(("GET", "k"), FAR)
    await turns()
    node.transport.reply(OK)
    await lone
    channel.send(("GET", "l"), FAR)
    assert len(node.transport.writes) == 2
    await channel.aclose()


async def test_crowd_at_once_on_many_turns(node: FakeNode) -> None:
    """While replies are out, each turn of the loop writes once at the most."""
    channel = await connected(node)
    tasks = []
    for turn in range(20):
        tasks += [later(channel, "GET", turn, number) for number in range(10)]
        await turns(1)
    await turns(3)
    assert len(node.transport.commands) == 200
    assert len(node.transport.writes) <= 22
    node.transport.reply(OK * 200)
    await asyncio.gather(*tasks)
    await channel.aclose()


async def test_push_messages_are_skipped(node: FakeNode) -> None:
    """A push message of RESP3 is nobody's reply, wherever it arrives."""
    channel = await connected(node)
    push = b">2\r\n+moving\r\n:5\r\n"
    node.transport.reply(push)
    futures = [channel.send(("GET", number), FAR) for number in range(3)]
    await turns(2)
    node.transport.reply(push[:5])
    node.transport.reply(push[5:] + bulk(b"0") + push + push + bulk(b"1") + push)
    node.transport.reply(bulk(b"2"))
    assert await asyncio.gather(*futures) == [b"0", b"1", b"2"]
    assert len(node.connections) == 1
    await channel.aclose()


# -- what is no command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("\ud800",), (None,), (True,)], ids=["surrogate", "None", "bool"])
async def test_what_cannot_be_packed(node: FakeNode, arguments: tuple[str]) -> None:
    """A command that is none fails alone: nobody else's reply goes astray, and nobody waits for ever."""
    channel = await connected(node)
    futures = [channel.send(words, FAR) for words in (("A",), ("B",), ("SET", *arguments), ("C",))]
    await turns(2)
    assert node.transport.commands == [[b"A"], [b"B"], [b"C"]]
    node.transport.reply(b"+a\r\n+b\r\n+c\r\n")
    a, b, broken, c = await asyncio.gather(*futures)
    assert [a, b, c] == [b"a", b"b", b"c"]
    assert isinstance(broken, Broken)
    assert isinstance(broken.error, StoreError)
    assert not broken.sent
    await channel.aclose()


# -- cancellation ----------------------------------------------------------------------------------------------------------


async def test_cancelled_before_it_was_written(node: FakeNode) -> None:
    """A command that waits for the end of its turn is not sent once its caller is cancelled."""
    channel = await connected(node)
    futures = [channel.send((word,), FAR) for word in ("A", "B", "C", "D")]
    futures[1].cancel()
    futures[2].cancel()
    await turns(2)
    assert node.transport.commands == [[b"A"], [b"D"]]
    node.transport.reply(b"+a\r\n+d\r\n")
    assert [await futures[0], await futures[3]] == [b"a", b"d"]
    await channel.aclose()


async def test_cancelled_while_connecting(node: FakeNode) -> None:
    """A command whose caller was cancelled while the connection was made is not sent over it."""
    node.gate.clear()
    channel = Channel(node, asyncio.get_running_loop(), 1.0)
    tasks = [later(channel, word) for word in ("A", "B", "C")]
    await turns()
    tasks[1].cancel()
    node.gate.set()
    await turns()
    assert node.transport.commands == [[b"A"], [b"C"]]
    node.transport.reply(b"+a\r\n+c\r\n")
    await asyncio.wait(tasks)
    assert tasks[1].cancelled()
    assert [tasks[0].result(), tasks[2].result()] == [b"a", b"c"]
    await channel.aclose()


async def test_all_cancelled_while_connecting(node: FakeNode) -> None:
    """A connection that nobody waits for any more carries nothing, and the next command finds it there."""
    node.gate.clear()
    channel = Channel(node, asyncio.get_running_loop(), 1.0)
    task = later(channel, "A")
    await turns()
    task.cancel()
    node.gate.set()
    await turns()
    assert node.transport.writes == []
    future = channel.send(("B",), FAR)
    assert node.transport.commands == [[b"B"]]
    node.transport.reply(OK)
    assert await future == b"OK"
    assert len(node.connections) == 1
    await channel.aclose()


async def test_cancelled_while_paused(node: FakeNode) -> None:
    """A command that the transport could not take yet is not sent once its caller is cancelled."""
    channel = await connected(node)
    node.transport.stalled = True
    first = channel.send(("SET", "k", b"x" * 100_000), FAR)
    futures = [channel.send((word,), FAR) for word in ("A", "B", "C")]
    await turns()
    futures[1].cancel()
    node.transport.drain()
    await turns(2)
    assert [command[0] for command in node.transport.commands] == [b"SET", b"A", b"C"]
    node.transport.reply(b"+x\r\n+a\r\n+c\r\n")
    assert [await first, await futures[0], await futures[2]] == [b"x", b"a", b"c"]
    await channel.aclose()


async def test_cancelled_in_flight(node: FakeNode) -> None:
    """The reply to a command whose caller was cancelled is dropped, and everybody else gets their own."""
    channel = await connected(node)
    tasks = [later(channel, "GET", number) for number in range(6)]
    await turns(3)
    for number in (0, 2, 3):
        tasks[number].cancel()
    await turns(2)
    tasks.append(later(channel, "GET", 6))
    await turns(3)
    assert len(node.transport.commands) == 7
    node.transport.reply(b"".join(bulk(b"%d" % number) for number in range(7)))
    await asyncio.wait(tasks)
    assert [task.cancelled() for task in tasks] == [True, False, True, True, False, False, False]
    assert [task.result() for task in tasks if not task.cancelled()] == [b"1", b"4", b"5", b"6"]
    await channel.aclose()


async def test_cancelled_when_its_reply_has_come(node: FakeNode) -> None:
    """A caller that is cancelled in the turn in which its reply arrived takes nobody else's."""
    channel = await connected(node)
    tasks = [later(channel, "GET", number) for number in range(3)]
    await turns(3)
    node.transport.reply(bulk(b"0"))
    tasks[0].cancel()
    node.transport.reply(bulk(b"1") + bulk(b"2"))
    await asyncio.wait(tasks)
    assert tasks[0].cancelled()
    assert [tasks[1].result(), tasks[2].result()] == [b"1", b"2"]
    await channel.aclose()


async def test_random_cancellations(node: FakeNode) -> None:
    """However callers come, are cancelled and are answered: nobody gets a reply that is not theirs."""
    chance = random.Random(11)
    channel = await connected(node)
    transport = node.transport
    tasks: dict[int, asyncio.Task[object]] = {}
    answered = 0
    for number in range(2000):
        tasks[number] = later(channel, "ECHO", number)
        if chance.random() < 0.3:
            chance.choice(list(tasks.values())).cancel()
        if chance.random() < 0.4:
            await turns(chance.randint(0, 2))
        if chance.random() < 0.2:
            written = parse(b"".join(transport.writes))
            transport.reply(b"".join(bulk(words[1]) for words in written))
            transport.writes.clear()
            answered += len(written)
    await turns(3)
    transport.reply(b"".join(bulk(words[1]) for words in transport.commands))
    await asyncio.wait(tasks.values())
    results = {number: task.result() for number, task in tasks.items() if not task.cancelled()}
    assert 500 < len(results) < 2000
    assert answered > 500
    assert results == {number: b"%d" % number for number in results}
    await channel.aclose()


# -- back-pressure ---------------------------------------------------------------------------------------------------------


async def test_nothing_is_written_while_paused(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the transport cannot take is neither written nor packed; when it can, all goes on in order."""
    packed = 0

    def pack(command: Command) -> bytes:
        nonlocal packed
        packed += 1
        return PACK(command)

    monkeypatch.setattr(channel_module, "PACK", pack)
    channel = await connected(node)
    transport = node.transport
    transport.stalled = True
    value = b"v" * 100_000
    futures = [channel.send(("SET", str(number), value), FAR) for number in range(1000)]
    await turns()
    seen: list[list[bytes]] = []
    while True:
        # The buffer up to where it pauses, and one write beyond.
        assert transport.high < transport.unsent <= transport.high + CHUNK + len(value) + 100
        commands = transport.commands
        transport.writes.clear()
        seen += [command[:2] for command in commands]
        assert packed == len(seen) + 1  # and the one that made the connection
        transport.reply(OK * len(commands))
        await turns()
        assert transport.writes == []
        if len(seen) == 1000:
            break
        transport.drain()
        await turns()
    assert seen == [[b"SET", b"%d" % number] for number in range(1000)]
    assert await asyncio.gather(*futures) == [b"OK"] * 1000
    await channel.aclose()


async def test_replies_while_paused(node: FakeNode) -> None:
    """Replies are read while the transport takes nothing, and those who have theirs write nothing over it."""
    channel = await connected(node)
    transport = node.transport
    future = channel.send(("A",), FAR)
    transport.stalled = True
    channel.send(("SET", b"x" * 100_000), FAR)
    await turns()
    transport.reply(b"+a\r\n")
    assert await future == b"a"
    writes = len(transport.writes)
    channel.send(("B",), FAR)
    await turns()
    assert len(transport.writes) == writes
    await channel.aclose()


async def test_window(node: FakeNode) -> None:
    """No more than a window of commands is in flight; replies let as many more go, in order."""
    channel = await connected(node)
    futures = [channel.send(("GET", number), FAR) for number in range(WINDOW + 300)]
    await turns()
    assert len(node.transport.commands) == WINDOW
    node.transport.reply(OK * 10)
    await turns(2)
    assert len(node.transport.commands) == WINDOW + 10
    node.transport.reply(OK)
    await turns(2)
    assert len(node.transport.commands) == WINDOW + 11
    node.transport.reply(OK * (WINDOW - 1))
    await turns(2)
    node.transport.reply(OK * 290)
    assert await asyncio.gather(*futures) == [b"OK"] * (WINDOW + 300)
    assert [int(command[1]) for command in node.transport.commands] == list(range(WINDOW + 300))
    await channel.aclose()


async def test_chunks(node: FakeNode) -> None:
    """A crowd's values are written in chunks, each whole commands, not in one write of any size."""
    channel = await connected(node)
    value = b"v" * (CHUNK // 4)
    futures = [channel.send(("SET", number, value), FAR) for number in range(20)]
    await turns()
    assert all(len(write) <= CHUNK + len(value) for write in node.transport.writes)
    assert len(node.transport.writes) == 6  # the first on its own, then four or five at a time
    node.transport.reply(OK * 20)
    await asyncio.gather(*futures)
    await channel.aclose()


async def test_answers_keep_a_crowd_going() -> None:
    """A thousand callers with ten commands each, one connection, every reply its own."""
    node = FakeNode()
    node.answer = lambda command: bulk(command[1])
    channel = await connected(node)

    async def caller(number: int) -> None:
        for turn in range(10):
            word = b"%d-%d" % (number, turn)
            assert await channel.send(("ECHO", word), FAR) == word

    await asyncio.gather(*(caller(number) for number in range(1000)))
    assert len(node.connections) == 1
    assert len(node.transport.commands) == 10_000
    assert len(node.transport.writes) < 60
    await channel.aclose()
