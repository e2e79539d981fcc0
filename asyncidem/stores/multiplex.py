"""All commands of a store over one connection per node, and large values over a second one.

On a shared connection the small commands behind a large value would wait for its megabytes. All else of a key goes over
one connection, in its order: only what an owner completes with is large, and behind that it writes nothing smaller.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..hooks import logger
from .channel import Asking, Broken, Channel
from .link import Command, PoolLink, Progress, Script, WireLink, forks
from .primitives import Within, call_deadline
from .refusals import refusal
from .routes import Node, Routes, SingleRoute, inherited
from .wire import NotMultiplexableError

__all__ = ["MultiplexedLink"]


class MultiplexedLink(WireLink):
    """Sends all commands for a node over one connection, and large values over a second one.

    Args:
        routes: where the client's commands go.
        timeout: seconds that one store call may take.
    """

    def __init__(self, routes: Routes, timeout: float) -> None:
        super().__init__(routes, timeout)
        self._channels: dict[str, Channel] = {}
        self._large: dict[str, Channel] = {}
        self._only: Channel | None = None  # where all keys go that are not large, if there is but one node
        self._plain: PoolLink | None = None
        self._patient: PoolLink | None = None  # for what would block the connection of all

    def reset(self, *, forked: bool = False) -> None:
        """Forget the connections; the next command opens one of this loop and process."""
        super().reset(forked=forked)
        if forked:
            inherited.extend((self._channels, self._large))
        self._channels, self._large, self._only, self._patient = {}, {}, None, None

    async def aclose(self) -> None:
        """End all connections."""
        await super().aclose()
        for link in (self._plain, self._patient):
            if link is not None:
                await link.aclose()
        channels = (*self._channels.values(), *self._large.values())
        self._channels, self._large, self._only = {}, {}, None
        for channel in channels:
            await channel.aclose()

    async def exchange(self, key: str, *commands: Command) -> list[Any]:
        """Send commands in one write, and return their replies as bytes; see :meth:`WireLink.exchange`."""
        if self._plain is not None:
            return await self._plain.exchange(key, *commands)
        deadline = call_deadline.get()
        if deadline is None:  # awaited on its own, not by a call of the store
            with Within(self._timeout):
                return await self.exchange(key, *commands)
        if asyncio.get_running_loop() is self._loop and self._forks == len(forks) and self._only is not None:
            channel: Channel | None = self._only
        else:
            channel = self._at_once(key, large=False)
        failed: tuple[Exception, Progress] | None = None
        if channel is not None:
            if len(commands) == 1:
                reply = await channel.send(commands[0], deadline)
                if not isinstance(reply, Exception):
                    return [reply]
                replies = [reply]
            else:
                replies = await _replies(channel, commands, deadline)
            if (failed := _failure(replies, channel)) is None:
                return replies
        try:
            return await self.step(functools.partial(self._talk, key, commands), failed)
        except NotMultiplexableError as error:
            return await self._fall_back(error).exchange(key, *commands)

    async def run(
        self, script: Script, key: str, *args: bytes | str | int, large: bool = False, probe: Command = ()
    ) -> Any:
        """Run a script on ``key``; see :meth:`WireLink.run`."""
        if self._plain is not None:
            return await self._plain.run(script, key, *args, probe=probe)
        deadline = call_deadline.get()
        if deadline is None:
            with Within(self._timeout):
                return await self.run(script, key, *args, large=large, probe=probe)
        channel = self._at_once(key, large=large)
        failed: tuple[Exception, Progress] | None = None
        if channel is not None and script.sha in self._loaded and not probe:
            reply = await channel.send(("EVALSHA", script.sha, 1, key, *args), deadline)
            if not isinstance(reply, Exception):
                return reply
            failed = _failure([reply], channel)
            if refusal(reply) == "NOSCRIPT":
                self._loaded.discard(script.sha)  # the next try brings its source
        try:
            talk = functools.partial(self._talk_script, script, key, args, large=large, probe=probe)
            return await self.step(talk, failed)
        except NotMultiplexableError as error:
            return await self._fall_back(error).run(script, key, *args, probe=probe)

    async def patient(self, key: str, commands: Callable[[int], Sequence[Command]]) -> tuple[list[Any], int, bool]:
        """Send commands that block their connection; see :meth:`WireLink.patient`."""
        if self._patient is None:
            self._patient = self._plain or PoolLink(self._routes, self._timeout)
        return await self._patient.patient(key, commands)

    def _at_once(self, key: str, *, large: bool) -> Channel | None:
        """Return the channel of ``key``; None if the routes must be read first."""
        if asyncio.get_running_loop() is not self._loop or self._forks != len(forks):
            self._enter()
        if self._only is not None and not large:
            return self._only
        node = self._routes.find(key)
        return None if node is None else self._channel(node, large=large)

    def _channel(self, node: Node, *, large: bool) -> Channel:
        channels = self._large if large else self._channels
        channel = channels.get(node.name)
        if channel is None:
            for name in [name for name in channels if not self._routes.knows(name)]:
                channels.pop(name).end()
            channel = channels[node.name] = Channel(node, asyncio.get_running_loop(), self._silence)
            if isinstance(self._routes, SingleRoute) and not large:
                self._only = channel
        channel.node = node  # the same server; a topology that was read again may know another way to it
        return channel

    def _bounded(self, seconds: float) -> contextlib.AbstractAsyncContextManager[None]:  # noqa: ARG002 - nothing is bounded
        return contextlib.nullcontext()  # commands have deadlines, connections their silence

    async def _talk(
        self, key: str, commands: Sequence[Command], progress: Progress, *, large: bool = False
    ) -> list[Any]:
        channel = self._channel(await self._locate(key, progress), large=large)
        if progress.ask is not None:
            commands = [Asking(command) for command in commands]
        replies = await _replies(channel, commands, call_deadline.get() or math.inf)
        failed = _failure(replies, channel)
        if failed is not None:
            error, reached = failed
            progress.sent, progress.wrote = reached.sent, reached.wrote
            raise error
        return replies

    def _fall_back(self, error: NotMultiplexableError) -> PoolLink:
        if self._plain is None:
            self._plain = PoolLink(self._routes, self._timeout)
            extra = {"mode": "plain", "missing": "a transport", "why": str(error)}
            logger.info("fallback_mode: a connection for every command, because %s", error, extra=extra)
        return self._plain


async def _replies(channel: Channel, commands: Sequence[Command], deadline: float) -> list[Any]:
    if len(commands) == 1:
        return [await channel.send(commands[0], deadline)]
    futures = channel.send_all(commands, deadline)
    try:
        return [await future for future in futures]
    except asyncio.CancelledError:
        for future in futures:  # what was not sent never is, none of it
            future.cancel()
        raise


def _failure(replies: list[Any], channel: Channel) -> tuple[Exception, Progress] | None:
    """Return the first error among replies, and how far its try came; None if there is none."""
    for number, reply in enumerate(replies):
        if isinstance(reply, Exception):
            progress = Progress()
            progress.node = channel.node
            progress.wrote = number > 0
            if isinstance(reply, Broken):
                progress.sent = reply.sent
                return reply.error, progress
            if refusal(reply) == "READONLY":
                channel.drop(reply)  # a master that was demoted: another node may answer to the name by now
            progress.sent = True
            return reply, progress
    return None
