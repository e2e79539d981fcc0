"""Commands over multiplexed connections: what is repeated, where, until when, and what the caller is told."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from redis import exceptions

from asyncidem import StoreError, StoreUnavailableError
from asyncidem.stores import channel as channel_module
from asyncidem.stores import link as link_module
from asyncidem.stores import multiplex, primitives
from asyncidem.stores.multiplex import MultiplexedLink
from asyncidem.stores.primitives import Within
from asyncidem.stores.routes import inherited

from loops import run_virtual
from wires import OK, FakeNode, FakeRoutes, LoopClock, answer_with, bulk, script, turns, words

GET = ("GET", "k")
LOST = exceptions.ConnectionError("lost")
SCRIPT = script("return 1")


@pytest.fixture
def node() -> FakeNode:
    """A server in memory that says OK."""
    node = FakeNode()
    node.answer = lambda _: OK
    return node


# -- one try ---------------------------------------------------------------------------------------------------------------


async def test_exchange(node: FakeNode) -> None:
    """Replies come in the order of the commands, over one connection that is made once."""
    node.answer = answer_with({b"GET": bulk(b"v"), b"PTTL": b":7\r\n"})
    link = MultiplexedLink(FakeRoutes(node), 3)
    for _ in range(3):
        assert await link.exchange("k", GET, ("PTTL", "k")) == [b"v", 7]
        assert await link.exchange("k", GET) == [b"v"]
    assert len(node.connections) == 1
    assert len(node.transport.writes) == 6
    await link.aclose()


async def test_refusal(node: FakeNode) -> None:
    """What the server refuses for good is told at once, and was not written."""
    node.answer = answer_with({b"GET": b"-WRONGTYPE no\r\n"})
    link = MultiplexedLink(FakeRoutes(node), 3)
    for _ in range(2):
        with pytest.raises(StoreError, match="another Redis type") as raised:
            await link.exchange("k", GET)
        assert not raised.value.outcome_unknown
    assert len(words(node)) == 2
    assert len(node.connections) == 1
    await link.aclose()


@pytest.mark.parametrize("known", [False, True], ids=["first try", "repeated"])
async def test_refused_behind_a_write(node: FakeNode, known: bool) -> None:
    """A refusal of a later command says nothing of an earlier one of the same exchange: that one has written."""
    link = MultiplexedLink(FakeRoutes(node), 3)
    if known:
        await link.exchange("k", GET)
    node.answer = answer_with({b"SET": b"$-1\r\n", b"PTTL": b"-NOPERM no\r\n"})
    for connection in node.connections:
        connection.transport.answer = node.answer
    with pytest.raises(StoreError, match="the user needs SET") as raised:
        await link.exchange("k", ("SET", "k", "v", "NX", "GET"), ("PTTL", "k"))
    assert raised.value.outcome_unknown
    await link.aclose()


async def test_refused_before_anything_was_written(node: FakeNode) -> None:
    """Where the first command is refused too, nothing was written."""
    node.answer = answer_with({b"SET": b"-NOPERM no\r\n", b"PTTL": b"-NOPERM no\r\n"})
    link = MultiplexedLink(FakeRoutes(node), 3)
    with pytest.raises(StoreError) as raised:
        await link.exchange("k", ("SET", "k", "v", "NX", "GET"), ("PTTL", "k"))
    assert not raised.value.outcome_unknown
    await link.aclose()


# -- repeating -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passing", ["LOADING x", "BUSY x", "TRYAGAIN x", "CLUSTERDOWN x", "MASTERDOWN x"])
async def test_what_passes_is_repeated(node: FakeNode, passing: str) -> None:
    """A refusal that passes is repeated over the same connection; a crowd's as a crowd."""
    replies = [f"-{passing}\r\n".encode()] * 20
    node.answer = lambda _: replies.pop() if replies else bulk(b"v")
    routes = FakeRoutes(node)
    link = MultiplexedLink(routes, 3)
    assert await asyncio.gather(*(link.exchange("k", GET) for _ in range(10))) == [[b"v"]] * 10
    assert len(node.connections) == 1
    assert {code for code, _ in routes.heard} == {passing.split(maxsplit=1)[0]}
    await link.aclose()


async def test_readonly_drops_the_connection(node: FakeNode) -> None:
    """A master that was demoted is left: the next connection goes to whichever node answers to the name by then."""
    replies = [b"-READONLY replica\r\n"] * 5
    node.answer = lambda _: replies.pop() if replies else bulk(b"v")
    link = MultiplexedLink(FakeRoutes(node), 3)
    assert await asyncio.gather(*(link.exchange("k", GET) for _ in range(5))) == [[b"v"]] * 5
    assert [connection.transport.aborted for connection in node.connections] == [True, False]
    await link.aclose()


async def test_lost_reply_is_repeated(node: FakeNode) -> None:
    """A command whose reply the connection took with it is sent again over the next."""
    node.answer = None
    link = MultiplexedLink(FakeRoutes(node), 3)
    calls = [asyncio.ensure_future(link.exchange(str(number), ("GET", number))) for number in range(5)]
    await turns()
    node.answer = lambda command: bulk(command[1])
    node.transport.reply(bulk(b"0"))
    node.transport.end()
    assert await asyncio.gather(*calls) == [[b"%d" % number] for number in range(5)]
    assert [len(commands) for commands in node.commands] == [5, 4]
    await link.aclose()


async def test_refusal_after_a_lost_reply(node: FakeNode) -> None:
    """A refusal tells nothing of an earlier try whose reply was lost: that one may have written."""
    node.answer = None
    link = MultiplexedLink(FakeRoutes(node), 3)
    call = asyncio.ensure_future(link.exchange("k", GET))
    await turns()
    node.answer = answer_with({b"GET": b"-NOPERM no\r\n"})
    node.transport.end()
    with pytest.raises(StoreUnavailableError) as raised:
        await call
    assert raised.value.outcome_unknown
    await link.aclose()


@pytest.mark.parametrize("sent", [False, True])
async def test_authentication_fails_at_reconnect(node: FakeNode, sent: bool) -> None:
    """A password that does not hold any more is told at once, with what is known of the command."""
    link = MultiplexedLink(FakeRoutes(node), 3)
    await link.exchange("k", GET)
    node.failures = [exceptions.AuthenticationError("invalid username-password pair")] * 5
    node.transport.answer = None
    if sent:
        call = asyncio.ensure_future(link.exchange("k", GET))
        await turns()
        node.transport.end()
    else:
        node.transport.end()
        call = asyncio.ensure_future(link.exchange("k", GET))
    with pytest.raises(StoreError, match="check the user name and the password") as raised:
        await call
    assert raised.value.outcome_unknown == sent
    assert len(node.connections) == 2
    await link.aclose()


def virtual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let deadlines go by the running loop's clock."""
    for module in (channel_module, link_module, primitives):
        monkeypatch.setattr(module, "time", LoopClock)


def test_silence_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that falls silent costs a third of the time of the call; the repetition goes over a new connection."""
    virtual(monkeypatch)

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        node = FakeNode()
        link = MultiplexedLink(FakeRoutes(node), 3)
        call = asyncio.ensure_future(link.exchange("k", GET))
        await turns()
        node.answer = lambda _: bulk(b"v")
        assert await call == [b"v"]
        assert 1 <= clock() <= 1.05
        assert [len(commands) for commands in node.commands] == [1, 1]
        await link.aclose()

    run_virtual(main())


@pytest.mark.parametrize(
    ("state", "unknown"),
    [("silent", True), ("refused", False), ("hanging", False), ("stalled", False), ("silent, then refused", True)],
)
def test_deadline(monkeypatch: pytest.MonkeyPatch, state: str, unknown: bool) -> None:
    """At its deadline a call ends with an error that says whether something may have been written, over all tries."""
    virtual(monkeypatch)

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        node = FakeNode()
        routes = FakeRoutes(node)
        link = MultiplexedLink(routes, 3)
        if state == "refused":
            node.failures = [LOST] * 1000
        elif state == "hanging":
            node.gate.clear()
        elif state == "stalled":
            node.answer = lambda _: OK
            await link.exchange("k", GET)
            node.gate.clear()
            node.transport._protocol.pause_writing()
        began = clock()
        with Within(3):
            call = asyncio.ensure_future(link.exchange("k", GET))
        if state == "silent, then refused":
            await turns()
            node.failures = [LOST] * 1000
        with pytest.raises(StoreUnavailableError, match="no answer from the server within 3 s") as raised:
            await call
        assert raised.value.outcome_unknown == unknown
        assert raised.value.__cause__ is not None
        assert 3 <= clock() - began <= 3.02
        assert len(node.connections) < 40
        await link.aclose()

    run_virtual(main())


@pytest.mark.parametrize("kind", ["exchange", "run"])
def test_deadline_before_the_silence(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A command in flight at the deadline of a call that had little time left may have run."""
    virtual(monkeypatch)

    async def main() -> None:
        node = FakeNode()
        node.answer = lambda _: OK
        link = MultiplexedLink(FakeRoutes(node), 3)
        await link.run(SCRIPT, "k")
        node.transport.answer = None
        with Within(0.2), pytest.raises(StoreUnavailableError) as raised:
            await (link.exchange("k", GET) if kind == "exchange" else link.run(SCRIPT, "k"))
        assert raised.value.outcome_unknown
        assert asyncio.get_running_loop().time() <= 0.21
        assert len(node.connections) == 1
        await link.aclose()

    run_virtual(main())


def test_first_try_keeps_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first try may have written is not forgotten when the next ones cannot even connect."""
    virtual(monkeypatch)

    async def main() -> None:
        node = FakeNode()
        node.answer = lambda _: OK
        link = MultiplexedLink(FakeRoutes(node), 3)
        await link.run(SCRIPT, "k")
        node.transport.answer = None
        node.failures = [LOST] * 1000
        call = asyncio.ensure_future(link.run(SCRIPT, "k"))
        await turns()
        node.transport.end()
        with pytest.raises(StoreUnavailableError) as raised:
            await call
        assert raised.value.outcome_unknown
        await link.aclose()

    run_virtual(main())


# -- cancellation ----------------------------------------------------------------------------------------------------------


async def test_undo_behind_its_claim(node: FakeNode) -> None:
    """What undoes a command that was cancelled on the wire follows it over the same connection."""
    link = MultiplexedLink(FakeRoutes(node), 3)
    await link.exchange("k", GET)
    node.transport.answer = None
    claim = asyncio.ensure_future(link.exchange("k", ("SET", "k", "v"), ("PTTL", "k")))
    await turns()
    claim.cancel()
    await asyncio.wait([claim])
    undo = asyncio.ensure_future(link.exchange("k", ("DEL", "k")))
    await turns()
    node.transport.reply(b"+OK\r\n:5\r\n:1\r\n")
    assert await undo == [1]
    assert [command[0] for command in words(node)] == [b"GET", b"SET", b"PTTL", b"DEL"]
    assert len(node.connections) == 1
    await link.aclose()


async def test_cancelled_exchange_is_not_sent(node: FakeNode) -> None:
    """Nothing of an exchange whose caller was cancelled before it was written is sent."""
    node.gate.clear()
    link = MultiplexedLink(FakeRoutes(node), 3)
    claim = asyncio.ensure_future(link.exchange("k", ("SET", "k", "v"), ("PTTL", "k")))
    other = asyncio.ensure_future(link.exchange("l", ("GET", "l")))
    await turns()
    claim.cancel()
    await turns()
    node.gate.set()
    assert await other == [b"OK"]
    assert words(node) == [[b"GET", b"l"]]
    await link.aclose()


# -- scripts ---------------------------------------------------------------------------------------------------------------


async def test_scripts(node: FakeNode) -> None:
    """A script goes with its source the first time, and by its name after that."""
    node.answer = lambda _: b":1\r\n"
    link = MultiplexedLink(FakeRoutes(node), 3)
    for _ in range(3):
        assert await link.run(SCRIPT, "k", "a", 5) == 1
    assert [command[:2] for command in words(node)] == [
        [b"EVAL", b"return 1"],
        [b"EVALSHA", SCRIPT.sha.encode()],
        [b"EVALSHA", SCRIPT.sha.encode()],
    ]
    assert words(node)[0][2:] == [b"1", b"k", b"a", b"5"]
    await link.aclose()


async def test_script_that_the_server_lost(node: FakeNode) -> None:
    """A server that does not know a script any more gets its source, with the next command."""
    node.answer = lambda _: b":1\r\n"
    link = MultiplexedLink(FakeRoutes(node), 3)
    await link.run(SCRIPT, "k")
    node.transport.answer = answer_with({b"EVALSHA": b"-NOSCRIPT No matching script.\r\n", b"EVAL": b":2\r\n"})
    assert await link.run(SCRIPT, "k") == 2
    assert [command[0] for command in words(node)] == [b"EVAL", b"EVALSHA", b"EVAL"]
    await link.aclose()


async def test_script_that_fails(node: FakeNode) -> None:
    """An error inside a script is its caller's."""
    node.answer = lambda _: b":1\r\n"
    link = MultiplexedLink(FakeRoutes(node), 3)
    await link.run(SCRIPT, "k")
    node.transport.answer = answer_with({b"EVALSHA": b"-WRONGTYPE no\r\n"})
    with pytest.raises(StoreError, match="another Redis type"):
        await link.run(SCRIPT, "k")
    await link.aclose()


# -- large values ----------------------------------------------------------------------------------------------------------


async def test_large_values_have_their_own_connection(node: FakeNode) -> None:
    """Large values go over a second connection; small commands beside them do not wait, and their order is kept."""
    link = MultiplexedLink(FakeRoutes(node), 3)
    await link.run(SCRIPT, "k")
    large = [asyncio.ensure_future(link.run(SCRIPT, "k", number, b"x" * 100_000, large=True)) for number in range(3)]
    node.answer = None
    await turns()
    assert await link.exchange("k", GET) == [b"OK"]
    assert len(node.connections) == 2
    assert [command[4] for command in node.commands[1]] == [b"0", b"1", b"2"]
    node.transport.reply(OK * 3)
    assert await asyncio.gather(*large) == [b"OK"] * 3
    await link.aclose()
    assert all(connection.transport.aborted for connection in node.connections)


# -- falling back ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exchange", "run"])
async def test_falls_back(node: FakeNode, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """A client without a transport is used over its own connections; one log line says so, to whole crowds of callers."""
    node.has_transport = False
    node.answer = lambda _: b":1\r\n"
    link = MultiplexedLink(FakeRoutes(node), 3)

    async def call() -> Any:
        return await (link.run(SCRIPT, "k") if kind == "run" else link.exchange("k", GET))

    with caplog.at_level(logging.INFO, "asyncidem"):
        assert await asyncio.gather(*(call() for _ in range(10))) == ([1] if kind == "run" else [[1]]) * 10
        assert await call() in (1, [1])
    (record,) = caplog.records
    assert record.getMessage().startswith("fallback_mode: a connection for every command, because Connection has no")
    assert (record.mode, record.missing) == ("plain", "a transport")  # type: ignore[attr-defined]
    assert len(node.lent) == 11
    assert all(lent.back for lent in node.lent)
    await link.aclose()


# -- closing, loops, forks -------------------------------------------------------------------------------------------------


async def test_used_again_after_close(node: FakeNode) -> None:
    """A link that was closed makes a new connection for the next command."""
    link = MultiplexedLink(FakeRoutes(node), 3)
    for number in range(1, 4):
        await link.exchange("k", GET)
        await link.aclose()
        await link.aclose()
        assert len(node.connections) == number
        assert node.transport.aborted


def test_used_while_the_loop_ends() -> None:
    """What uses a link when its loop has ended the connection is told at once, not at its deadline."""
    errors: list[BaseException] = []
    seconds: list[float] = []

    async def main() -> None:
        node = FakeNode()
        node.answer = lambda _: OK
        link = MultiplexedLink(FakeRoutes(node), 3)

        async def generator() -> AsyncGenerator[None]:
            try:
                yield
            finally:
                await turns()
                began = time.monotonic()
                try:
                    await link.exchange("k", GET)
                except StoreUnavailableError as error:
                    errors.append(error)
                seconds.append(time.monotonic() - began)

        await link.exchange("k", GET)
        kept.append(generator())
        await anext(kept[0])

    kept: list[AsyncGenerator[None]] = []
    asyncio.run(main())
    assert len(errors) == 1
    assert not errors[0].outcome_unknown  # type: ignore[attr-defined]
    assert seconds[0] < 1


def test_next_loop() -> None:
    """The next loop forgets the connections of the one before, which had ended with it."""
    nodes: list[FakeNode] = []
    routes: list[FakeRoutes] = []
    links: list[MultiplexedLink] = []

    async def main() -> None:
        node = FakeNode()
        node.answer = lambda _: OK
        nodes.append(node)
        if links:
            routes[0].first = node
        else:
            routes.append(FakeRoutes(node))
            links.append(MultiplexedLink(routes[0], 3))
        await links[0].exchange("k", GET)

    for _ in range(3):
        asyncio.run(main())
    assert [len(node.connections) for node in nodes] == [1, 1, 1]
    assert all(node.transport.aborted for node in nodes)
    assert routes[0].resets == [False, False]


async def test_fork(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process forgets its parent's connections, and keeps them from being closed."""
    link = MultiplexedLink(routes := FakeRoutes(node), 3)
    await link.exchange("k", GET)
    parents = node.transport
    before = len(inherited)
    monkeypatch.setattr(link_module, "forks", [None])
    monkeypatch.setattr(multiplex, "forks", link_module.forks)
    monkeypatch.setattr(channel_module, "forks", link_module.forks)
    await link.exchange("k", GET)
    assert len(node.connections) == 2
    assert not parents.aborted
    assert routes.resets == [True]
    assert any(channels for channels in inherited[before:])
    for channels in inherited[before:]:
        for channel in channels.values():
            await channel.aclose()
    del inherited[before:]
    await link.aclose()
