"""One connection per node for all commands: replies resolve futures in order, one write per turn of the loop.

The invariants:

- A command is in one of two queues: waiting (nothing of it was sent) or in flight (the server may have seen it), and
  leaves them with its reply, with what broke the connection, or with its deadline. A command whose caller was cancelled
  is not sent any more if it waits; in flight, its reply is read and dropped. Nothing is repeated here: whoever awaits the
  command knows whether it may be, and until when (:class:`~asyncidem.stores.link.Link`).
- Commands reach the server in the order in which they were given, as long as their connection lives: so an undo never
  overtakes what it undoes. What a broken connection still carried may run late, which costs one lease at the most.
- Bytes are packed when they are written, not before, and written only while the transport takes them: a server that
  stalls holds up callers, and costs no memory beyond what the transport holds and one write.
- Whatever ends the loop ends the connection: an asynchronous generator holds the transport, and loops close those.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextvars import Context
from typing import Any, Final, TypeAlias

import hiredis
from redis import exceptions

from ..cancellation import within_loop
from ..errors import StoreError, StoreUnavailableError
from .link import Command, forks
from .refusals import error_reply
from .routes import Node
from .wire import Wire

__all__ = ["Asking", "Broken", "Channel"]

WINDOW: Final = 1024
"""Commands in flight on one connection: as many replies, each up to the size of a result, may pile up in the server."""

CHUNK: Final = 256 * 1024
"""Bytes after which a write is handed over, and the transport is asked whether it takes more."""

GRAIN: Final = 0.005
"""Seconds by which a deadline may be late: so many commands of one moment cost one timer."""

NOTHING: Final = object()

PACK: Final[Callable[[Command], bytes]] = hiredis.pack_command  # type: ignore[assignment]  # its own annotation knows tuples of one argument


class Asking(tuple[bytes | str | int, ...]):
    """A command that another node is asked for: behind an ASKING, in the same write, for that holds for whatever is next."""

    __slots__ = ()


Entry: TypeAlias = "tuple[Command, asyncio.Future[Any], float]"
"""A command, the future of its reply, and its deadline on ``time.monotonic``."""


class Broken(Exception):  # noqa: N818 - a reply like any other; it is never raised
    """What a command gets instead of a reply.

    Attributes:
        error: what happened.
        sent: whether the server may have seen the command.
    """

    def __init__(self, error: Exception, *, sent: bool) -> None:
        super().__init__(error)
        self.error = error
        self.sent = sent


class MultiplexedWire(Wire):
    """One connection, and the commands in flight on it.

    It knows its channel weakly: the loop holds a connection, and a store that nobody holds any more must end.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = weakref.ref(channel)
        self.inflight: deque[Entry] = deque()
        self.heard = time.monotonic()
        self.unsent = 0  # what the transport held when the timer last looked
        self.batch = 0  # how many replies came with the last bytes: more than one, and commands come in crowds too
        self.paused = False
        self.open = True
        self._forks = len(forks)
        self._reader = hiredis.Reader(replyError=error_reply, notEnoughData=NOTHING)

    def begin(self, connection: Any) -> None:
        """Serve the transport of ``connection``. Raises what :meth:`~Wire.take_over` raises."""
        unread = self.take_over(connection)
        if unread[:1] == b">":
            self.data_received(unread)  # a message that is no reply, or the beginning of one
        elif unread:  # the first command would get it, or the rest of it, for its own reply
            self.lose(exceptions.ConnectionError())
        if not self.open:
            raise exceptions.ConnectionError("the server sent what nobody had asked for behind the handshake")

    def data_received(self, data: bytes) -> None:
        """Give each reply to its command."""
        self.heard = time.monotonic()
        inflight, count = self.inflight, 0
        gets = self._reader.gets
        try:
            self._reader.feed(data)
            while (reply := gets(False)) is not NOTHING:
                if reply.__class__ is hiredis.PushNotification:
                    continue  # a server that announces its maintenance
                future = inflight[0][1]
                if not future.done():
                    future.set_result(reply)
                del inflight[0]  # not before it has its reply: an interruption between the two would leave it without
                count += 1
        except BaseException as error:
            # Bytes that are no replies, a reply to nothing, an error that redis-py cannot read, an interruption.
            self.lose(exceptions.InvalidResponse(f"the server's replies are out of step: {error!r}"))
            if not isinstance(error, Exception):
                raise
            return
        self.batch = count
        channel = self.channel()
        if channel is not None and (count > 1 or channel.waiting):
            channel.flush_soon()  # behind those who wake up now, and will have commands to send

    def eof_received(self) -> None:
        """Take it for the end: what is written now would be lost."""
        self.lose(exceptions.ConnectionError("Connection closed by server."))

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up what was in flight."""
        super().connection_lost(exc)
        self.lose(exceptions.ConnectionError(f"Connection lost: {exc}" if exc else "Connection closed."))

    def pause_writing(self) -> None:
        """Send nothing more for now."""
        self.paused = True
        self.unsent = self.transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        """Send what has waited."""
        self.paused = False
        self.heard = time.monotonic()
        if (channel := self.channel()) is not None:
            channel.flush_soon()

    def lose(self, error: Exception) -> None:
        """End the connection: of what was in flight nobody knows whether it ran."""
        if not self.open:
            return
        self.open = False
        if self._forks == len(forks):  # a child would take its parent's socket out of the event queue that both share
            self.transport.abort()
        for _, future, _ in self.inflight:
            if not future.done():
                future.set_result(Broken(error, sent=True))
        self.inflight.clear()
        if (channel := self.channel()) is not None:
            channel.lost(self)


def _ended() -> Exception:
    return exceptions.ConnectionError("the store was closed, or its event loop ended")


async def _let_go() -> None:
    await asyncio.sleep(0)  # the transport lets its socket go in the next turn
    await asyncio.sleep(0)  # and one of TLS in the turn after it


def _not_written(error: BaseException) -> Exception:
    return exceptions.ConnectionError(f"nothing could be written: {error!r}")


def _no_command(error: Exception) -> Broken:
    return Broken(StoreError(f"not a command: {error!r}"), sent=False)


class Hold:
    """What must end with its channel or with its loop, whichever ends first."""

    __slots__ = ("ended", "wire")

    def __init__(self) -> None:
        self.wire: MultiplexedWire | None = None
        self.ended = False

    async def until_the_end(self) -> AsyncGenerator[None]:
        """End the connection when this generator ends: closed, collected, or with its loop."""
        try:
            yield
        finally:
            closed, self.ended = self.ended, True  # no task of a loop that ends makes another connection
            if self.wire is not None:
                self.wire.lose(_ended())
            if not closed:  # closed by its channel it takes no turn, and never is in the way of the end of the loop
                await _let_go()


class Channel:
    """The commands for one node, over one connection after the other.

    Args:
        node: the server.
        loop: the event loop.
        silence: seconds without a byte after which a connection with commands in flight is given up, and that making
            one may take.
    """

    def __init__(self, node: Node, loop: asyncio.AbstractEventLoop, silence: float) -> None:
        self.node = node
        self.waiting: deque[Entry] = deque()
        self._loop = loop
        self._silence = silence
        self._wire: MultiplexedWire | None = None
        self._hold = Hold()
        self._guard: AsyncGenerator[None] | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._nobody = loop.create_future()  # whose replies are read and dropped
        self._nobody.set_result(None)
        self._flushing = False
        self._context = Context()  # of no caller; one of each channel, for threads cannot be in the same one at once
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def send(self, command: Command, deadline: float) -> asyncio.Future[Any]:
        """Send ``command``; what is returned gives its reply, an error reply, or :class:`Broken`, and raises nothing."""
        future = self._loop.create_future()
        wire = self._wire
        if wire is None or wire.inflight or wire.batch > 1 or wire.paused or self._flushing or self.waiting:
            self.waiting.append((command, future, deadline))
            self._sending(deadline)
            return future
        # A caller on its own: what `_sending`, `_flush` and `_write` do, without a queue.
        wire.heard = time.monotonic()
        if (nearest := min(deadline, wire.heard + self._silence)) < self._timer_at:
            self._arm(nearest)
        try:
            packed = PACK(command)
        except Exception as error:  # noqa: BLE001 - arguments that are none
            future.set_result(_no_command(error))
            return future
        try:
            wire.inflight.append((command, future, deadline))
            wire.transport.write(packed)
        except BaseException as error:
            wire.lose(_not_written(error))
            if not isinstance(error, Exception):
                raise
        return future

    def send_all(self, commands: Sequence[Command], deadline: float) -> list[asyncio.Future[Any]]:
        """Send commands behind each other, in one write."""
        futures = [self._loop.create_future() for _ in commands]
        self.waiting.extend((command, future, deadline) for command, future in zip(commands, futures, strict=True))
        self._sending(deadline)
        return futures

    def _sending(self, deadline: float) -> None:
        if deadline < self._timer_at:
            self._arm(min(deadline, time.monotonic() + self._silence) if self._timer is None else deadline)
        if not self._flushing:
            wire = self._wire
            if wire is not None and not wire.inflight and wire.batch <= 1:
                self._flush()  # a caller on its own
            else:
                self.flush_soon()

    def flush_soon(self) -> None:
        """Write what waits at the end of this turn of the loop, all in one."""
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush, context=self._context)

    def _flush(self) -> None:
        self._flushing = False
        wire, waiting = self._wire, self.waiting
        if wire is None:
            if self._hold.ended:
                self._fail_waiting(StoreUnavailableError("the event loop of the store ends", outcome_unknown=False))
            elif waiting and (self._connecting is None or self._connecting.done()):
                self._connecting = self._loop.create_task(within_loop(self._connect), context=Context())
            return
        inflight = wire.inflight
        if not inflight:
            wire.heard = time.monotonic()
            if waiting and self._timer_at > wire.heard + self._silence:
                self._arm(wire.heard + self._silence)  # it stands at a deadline
        try:
            while waiting and not wire.paused and len(inflight) < WINDOW:
                self._write(wire)
        except BaseException as error:
            # What was counted as in flight and never written would let all replies behind it go to the wrong callers.
            wire.lose(_not_written(error))
            if not isinstance(error, Exception):
                raise

    def _write(self, wire: MultiplexedWire) -> None:
        """Write what waits, up to a chunk."""
        waiting, inflight = self.waiting, wire.inflight
        parts: list[bytes] = []
        size = 0
        while waiting and size < CHUNK and len(inflight) < WINDOW:
            entry = waiting.popleft()
            if not entry[1].done():  # cancelled or too late before it was sent: it never runs
                try:
                    packed = PACK(entry[0])
                except Exception as error:  # noqa: BLE001 - arguments that are none: their caller is told, not the others
                    entry[1].set_result(_no_command(error))
                    continue
                if entry[0].__class__ is Asking:
                    packed = PACK(("ASKING",)) + packed
                    inflight.append(((), self._nobody, math.inf))
                parts.append(packed)
                size += len(packed)
                inflight.append(entry)
        if parts:
            wire.transport.write(parts[0] if len(parts) == 1 else b"".join(parts))

    async def _connect(self) -> None:
        """Make a connection; who waits gets what came in between."""
        wire = MultiplexedWire(self)
        failure: Exception = exceptions.ConnectionError("connecting was cancelled from outside")
        try:
            if self._guard is None:
                self._guard = self._hold.until_the_end()
                await anext(self._guard)
            async with asyncio.timeout(self._silence):
                connection = self.node.make()
                try:
                    await connection.connect()
                    wire.begin(connection)
                except BaseException:
                    with contextlib.suppress(Exception):  # what ends a half-made connection is not what ended the try
                        await connection.disconnect(nowait=True)
                    raise
            if self._hold.ended:
                wire.lose(_ended())
            else:
                self._wire = self._hold.wire = wire
        except TimeoutError:
            failure = TimeoutError(f"no connection within {self._silence:g} s")
        except Exception as error:  # noqa: BLE001 - whatever redis-py raises, it is told to those who wait
            failure = error
        finally:
            self._connecting = None
            if self._wire is None:
                self._fail_waiting(failure)
        self._flush()

    def lost(self, wire: MultiplexedWire) -> None:
        """Hear that a connection ended; who waits gets a new one."""
        if self._wire is wire:
            self._wire = self._hold.wire = None
            if self.waiting:
                self.flush_soon()

    def drop(self, error: Exception) -> None:
        """Give the connection up; the next command makes another, to whichever server then answers to the name."""
        if self._wire is not None:
            self._wire.lose(error)

    def end(self) -> None:
        """End the connection, and make no other."""
        self._hold.ended = True
        self._fail_waiting(_ended())
        self.drop(_ended())

    async def aclose(self) -> None:
        """End the connection, and leave no task, timer or socket behind."""
        self.end()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait((self._connecting,))
        if self._timer is not None:
            self._timer.cancel()
        if self._guard is not None:
            with contextlib.suppress(RuntimeError):  # the end of the loop is closing it
                await self._guard.aclose()
            await _let_go()

    def _fail_waiting(self, error: Exception) -> None:
        waiting = list(self.waiting)
        self.waiting.clear()
        for _, future, _ in waiting:
            if not future.done():
                future.set_result(Broken(error, sent=False))

    # -- deadlines ----------------------------------------------------------------------------------------------------

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        now = time.monotonic()
        self._timer_at = max(when, now + GRAIN)
        self._timer = self._loop.call_later(self._timer_at - now, self._tick, context=self._context)

    def _tick(self) -> None:
        self._timer, self._timer_at = None, math.inf
        now = time.monotonic()
        nearest = self._expire(self.waiting, now, sent=False)
        self.waiting = deque(entry for entry in self.waiting if not entry[1].done())
        wire = self._wire
        if wire is not None and wire.inflight:
            unsent = wire.transport.get_write_buffer_size()
            if unsent < wire.unsent:
                wire.heard = now  # a large value on its way is no silence
            wire.unsent = unsent
            if now >= wire.heard + self._silence:
                wire.lose(TimeoutError(f"no answer for {self._silence:g} s"))
            else:
                nearest = min(nearest, wire.heard + self._silence, self._expire(wire.inflight, now, sent=True))
        if nearest < math.inf:
            self._arm(nearest)

    def _expire(self, entries: deque[Entry], now: float, *, sent: bool) -> float:
        """Give up what is too late, and return the next deadline."""
        nearest = math.inf
        for _, future, deadline in entries:
            if not future.done():
                if deadline <= now:
                    future.set_result(Broken(TimeoutError("the deadline has come"), sent=sent))
                else:
                    nearest = min(nearest, deadline)
        return nearest
