"""Deadlines and silence on one connection: one timer for all of them, on a clock that jumps."""

import asyncio
from typing import Any

import pytest

from asyncidem.stores import channel as channel_module
from asyncidem.stores import link, primitives
from asyncidem.stores.channel import GRAIN, Broken, Channel

from loops import run_virtual
from wires import OK, FakeNode, LoopClock, connected, turns

SILENCE = 1.0
LATE = GRAIN + 0.001


@pytest.fixture(autouse=True)
def _virtual_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (channel_module, link, primitives):
        monkeypatch.setattr(module, "time", LoopClock)


def now() -> float:
    """Return the virtual time."""
    return asyncio.get_running_loop().time()


def timers() -> int:
    """Return how many timers the loop holds that were not cancelled."""
    scheduled: list[asyncio.TimerHandle] = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    return sum(not handle.cancelled() for handle in scheduled)


async def broken(future: asyncio.Future[Any]) -> Broken:
    """Return how a command failed."""
    reply = await future
    assert isinstance(reply, Broken)
    return reply


async def quiet(node: FakeNode) -> Channel:
    """Return a channel that has its connection, and no timer that is still to come."""
    channel = await connected(node, SILENCE)
    await asyncio.sleep(2000)
    assert timers() == 0
    return channel


def test_in_flight_at_its_deadline() -> None:
    """A command whose reply does not come by its deadline may have run; its reply, late, is nobody else's."""

    async def main() -> None:
        node = FakeNode()
        channel = await quiet(node)
        began = now()
        late, other = channel.send_all((("GET", "a"),), began + 0.5)[0], channel.send(("GET", "b"), began + 10)
        failure = await broken(late)
        assert failure.sent
        assert isinstance(failure.error, TimeoutError)
        assert 0.5 <= now() - began <= 0.5 + LATE
        await turns()
        node.transport.reply(b"+a\r\n+b\r\n")
        assert await other == b"b"
        assert len(node.connections) == 1
        await channel.aclose()

    run_virtual(main())


def test_waiting_at_its_deadline() -> None:
    """A command that could not be written by its deadline did not run, and is not written after it."""

    async def main() -> None:
        node = FakeNode()
        channel = await quiet(node)
        node.transport.stalled = True
        began = now()
        channel.send(("SET", b"x" * 100_000), began + 100)
        late, other = channel.send(("A",), began + 0.5), channel.send(("B",), began + 100)
        failure = await broken(late)
        assert not failure.sent
        assert 0.5 <= now() - began <= 0.5 + LATE
        node.transport.drain()
        await turns()
        assert [command[0] for command in node.transport.commands] == [b"SET", b"B"]
        node.transport.reply(OK + b"+b\r\n")
        assert await other == b"b"
        await channel.aclose()

    run_virtual(main())


def test_waiting_for_a_connection_at_its_deadline() -> None:
    """A command whose connection is not there by its deadline did not run."""

    async def main() -> None:
        node = FakeNode()
        node.gate.clear()
        channel = Channel(node, asyncio.get_running_loop(), SILENCE)
        future = channel.send(("A",), 0.3)
        assert not (await broken(future)).sent
        assert now() <= 0.3 + LATE
        node.gate.set()
        await turns()
        assert node.transport.writes == []
        await channel.aclose()

    run_virtual(main())


def test_deadlines_of_different_lengths() -> None:
    """Each command of one queue fails at its own deadline, in flight or waiting, whatever their order."""

    async def main() -> None:
        node = FakeNode()
        channel = await connected(node, 100.0)
        began = now()
        seconds = [3.0, 0.2, 5.0, 1.0, 0.2, 4.0, 0.7, 2.0]
        ends: dict[int, float] = {}
        futures = []
        for number, after in enumerate(seconds):
            future = channel.send(("GET", number), began + after)
            future.add_done_callback(lambda _, number=number: ends.setdefault(number, now() - began))  # type: ignore[misc]
            futures.append(future)
            if number == 3:
                await turns(2)
                node.transport.stalled = True
                node.transport.unsent = 10
                node.transport._protocol.pause_writing()
        failures = [await broken(future) for future in futures]
        assert [failure.sent for failure in failures] == [True] * 4 + [False] * 4
        await turns(2)
        for number, after in enumerate(seconds):
            assert after <= ends[number] <= after + LATE
        await channel.aclose()

    run_virtual(main())


def test_one_timer_for_all() -> None:
    """A thousand commands of one deadline cost one timer, and it is not armed anew for any of them."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        armed = 0
        call_later = loop.call_later

        def count_later(*args: Any, **kwargs: Any) -> asyncio.TimerHandle:
            nonlocal armed
            armed += 1
            return call_later(*args, **kwargs)

        node = FakeNode()
        channel = await quiet(node)
        loop.call_later = count_later  # type: ignore[method-assign]
        futures = [channel.send(("GET", number), now() + 5) for number in range(1000)]
        await turns()
        assert armed == 1
        assert timers() == 1
        node.transport.reply(OK * 1000)
        for number in range(1000):  # one after the other, each of a later moment
            futures.append(channel.send(("GET", number), now() + 5 + number / 1e6))
            await turns(1)
            node.transport.reply(OK)
        await asyncio.gather(*futures)
        assert armed == 1
        await asyncio.sleep(100)
        assert timers() == 0, "a timer is left where nothing is waited for"
        assert armed <= 2
        await channel.aclose()

    run_virtual(main())


def test_grain() -> None:
    """Deadlines that are nearer to each other than the grain cost one timer for many."""

    async def main() -> None:
        node = FakeNode()
        channel = await quiet(node)
        loop = asyncio.get_running_loop()
        ticks = loop.ticks  # type: ignore[attr-defined]
        futures = [channel.send(("GET", number), now() + 0.5 + number / 100_000) for number in range(500)]
        failures = [await broken(future) for future in futures]
        assert all(failure.sent for failure in failures)
        assert loop.ticks - ticks < 20  # type: ignore[attr-defined]
        await channel.aclose()

    run_virtual(main())


def test_sooner_deadline_behind_a_later_one() -> None:
    """A deadline that is nearer than all before it is kept."""

    async def main() -> None:
        node = FakeNode()
        channel = await quiet(node)
        began = now()
        channel.send(("A",), began + 0.9)
        soon = channel.send(("B",), began + 0.1)
        assert (await broken(soon)).sent
        assert now() - began <= 0.1 + LATE
        await channel.aclose()

    run_virtual(main())


# -- silence ---------------------------------------------------------------------------------------------------------------


def test_silence_drops_the_connection() -> None:
    """No byte for so long, with commands in flight, ends the connection: what was in flight may have run, the rest goes on."""

    async def main() -> None:
        node = FakeNode()
        channel = await quiet(node)
        began = now()
        future = channel.send(("A",), began + 100)
        failure = await broken(future)
        assert failure.sent
        assert "no answer for 1 s" in str(failure.error)
        assert SILENCE <= now() - began <= SILENCE + LATE
        assert node.transport.aborted
        again = channel.send(("B",), now() + 100)
        await turns()
        node.transport.reply(b"+b\r\n")
        assert await again == b"b"
        assert len(node.connections) == 2
        await channel.aclose()

    run_virtual(main())


def test_no_silence_where_bytes_arrive() -> None:
    """A server that answers slowly, command by command, keeps its connection; so does one that sends a large reply."""

    async def main() -> None:
        node = FakeNode()
        channel = await quiet(node)
        futures = [channel.send(("GET", number), now() + 100) for number in range(10)]
        for _ in range(9):
            await asyncio.sleep(SILENCE * 0.9)
            node.transport.reply(OK)
        for byte in b"$3\r\nabc\r\n":
            await asyncio.sleep(SILENCE * 0.9)
            node.transport.reply(bytes([byte]))
        assert await asyncio.gather(*futures) == [b"OK"] * 9 + [b"abc"]
        assert len(node.connections) == 1
        await channel.aclose()

    run_virtual(main())


def test_no_silence_where_nothing_is_asked() -> None:
    """An idle connection is kept for as long as it takes, and one that comes out of idleness gets its whole time."""

    async def main() -> None:
        node = FakeNode()
        channel = await quiet(node)
        for pause in (5000.0, SILENCE * 0.9, SILENCE * 1.1, 0.0):
            await asyncio.sleep(pause)
            future = channel.send(("A",), now() + 100)
            await asyncio.sleep(SILENCE * 0.99)
            node.transport.reply(OK)
            assert await future == b"OK"
        assert len(node.connections) == 1
        await channel.aclose()

    run_virtual(main())


def test_silence_after_a_late_connection() -> None:
    """What is written once a slow connection is there has no longer to wait for a server that is silent then."""

    async def main() -> None:
        node = FakeNode()
        node.gate.clear()
        channel = Channel(node, asyncio.get_running_loop(), SILENCE)
        channel.send(("A",), 0.5)  # the timer looks at 0.5 s, finds nothing in flight, and stands at 100 s
        future = channel.send(("B",), 100.0)
        await asyncio.sleep(0.9)
        node.gate.set()
        failure = await broken(future)
        assert failure.sent
        assert now() <= 0.9 + SILENCE + LATE
        await channel.aclose()

    run_virtual(main())


def test_silence_after_a_pause() -> None:
    """What was written after the timer had found an idle connection is watched from then on."""

    async def main() -> None:
        node = FakeNode()
        channel = await quiet(node)
        node.transport._protocol.pause_writing()
        began = now()
        channel.send(("A",), began + 0.5)
        future = channel.send(("B",), began + 100)
        await asyncio.sleep(0.7)
        node.transport._protocol.resume_writing()
        assert (await broken(future)).sent
        assert now() - began <= 0.7 + SILENCE + LATE
        await channel.aclose()

    run_virtual(main())


def test_large_value_on_its_way_is_no_silence() -> None:
    """As long as the server takes something of a large value it is not given up; once it stops, it is."""

    async def main() -> None:
        node = FakeNode()
        channel = await quiet(node)
        transport = node.transport
        transport.stalled = True
        future = channel.send(("SET", "k", b"x" * 50_000_000), now() + 100)
        for _ in range(40):
            await asyncio.sleep(SILENCE * 0.5)
            transport.drain(1_000_000)
        assert not future.done()
        stopped = now()
        failure = await broken(future)
        assert failure.sent
        assert SILENCE <= now() - stopped <= 2 * SILENCE + LATE
        await channel.aclose()

    run_virtual(main())


def test_large_values_one_after_another_are_no_silence() -> None:
    """A buffer that drains and fills up again between two looks at it stands still for nobody."""

    async def main() -> None:
        node = FakeNode()
        channel = await quiet(node)
        transport = node.transport
        transport.stalled = True
        futures = [channel.send(("SET", "k", b"x" * 1_000_000), now() + 100) for _ in range(10)]
        for _ in range(10):
            await asyncio.sleep(SILENCE * 0.9)
            transport.drain()
            await turns(2)
        await asyncio.sleep(SILENCE * 0.9)
        transport.reply(OK * 10)
        assert await asyncio.gather(*futures) == [b"OK"] * 10
        assert len(node.connections) == 1
        await channel.aclose()

    run_virtual(main())


def test_stalled_server() -> None:
    """A server that takes nothing at all is given up after one silence, and what was not written goes to the next."""

    async def main() -> None:
        node = FakeNode()
        channel = await quiet(node)
        first = node.transport
        first.stalled = True
        began = now()
        large = channel.send(("SET", "k", b"x" * 1_000_000), began + 100)
        waiting = channel.send(("B",), began + 100)
        assert (await broken(large)).sent
        assert now() - began <= SILENCE + LATE
        await turns()
        assert node.transport is not first
        assert node.transport.commands == [[b"B"]]
        node.transport.reply(b"+b\r\n")
        assert await waiting == b"b"
        await channel.aclose()

    run_virtual(main())


def test_connecting_takes_no_longer_than_the_silence() -> None:
    """A connection that hangs, as into a black hole, is given up after the silence; nothing was sent."""

    async def main() -> None:
        node = FakeNode()
        node.gate.clear()
        channel = Channel(node, asyncio.get_running_loop(), SILENCE)
        future = channel.send(("A",), 100.0)
        failure = await broken(future)
        assert not failure.sent
        assert "no connection within 1 s" in str(failure.error)
        assert now() <= SILENCE + LATE
        assert node.connections[0].disconnected
        await channel.aclose()

    run_virtual(main())


def test_no_timer_is_left() -> None:
    """A channel that is closed leaves no timer behind, whatever was in flight."""

    async def main() -> None:
        node = FakeNode()
        channel = await quiet(node)
        future = channel.send(("A",), now() + 100)
        assert timers() == 1
        await channel.aclose()
        assert (await broken(future)).sent
        assert timers() == 0

    run_virtual(main())
