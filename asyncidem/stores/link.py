"""The seam that every command passes: deadlines, repeats, cancellation, other loops and forks.

The invariants:

- A command does not belong to its caller's task. A cancelled caller leaves it running, and the next command on the same
  key, from an undo or a repetition, comes behind it instead of overtaking it: on one multiplexed connection by its order
  (:mod:`asyncidem.stores.multiplex`), on the plain path because it waits.
- Silence for a third of the store's ``timeout`` drops the connection and repeats the command, which is safe because
  each is idempotent for its owner's token. The deadline of the call bounds all repeats.
- What is known is kept apart from what is not: an error reply means that nothing was written, an error before the
  command was sent too; anything else may have been. ``outcome_unknown`` says which, over all repeats.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import math
import os
import time
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

from redis import exceptions

from ..cancellation import within_loop
from ..errors import ConfigurationError, IdempotencyError, StoreUnavailableError
from .primitives import Within, call_deadline
from .refusals import PASSING, raise_refusal, refusal, remedy, untrusted
from .routes import Node, Routes

__all__ = ["Command", "Link", "PoolLink", "Progress", "Script", "WireLink", "forks"]

T = TypeVar("T")

PATIENCE: Final = 0.6
"""The share of the bearable silence that a server is told to wait; it looks at its clock every 100 ms, and answers late."""

Command = tuple[bytes | str | int, ...]

forks: Final[list[None]] = []
"""As long as there were forks between this process and the one that imported the module."""

os.register_at_fork(after_in_child=lambda: forks.append(None))


class Script:
    """A Lua script of the package.

    Args:
        name: its file in ``lua/``.
    """

    def __init__(self, name: str) -> None:
        loader: Any = __spec__.loader  # the module's own, which also reads from a zip file
        data: bytes = loader.get_data(os.path.join(os.path.dirname(__file__), "lua", f"{name}.lua"))  # noqa: PTH118, PTH120
        self.source = data.decode()
        self.sha = hashlib.sha1(data, usedforsecurity=False).hexdigest()  # Redis names scripts so


class Progress:
    """How far one try of a command came.

    Attributes:
        sent: whether the server may have seen it; a refusal says that it did, and that nothing was written.
        wrote: whether a command was carried out before the one that was refused.
        ask: the node that is to be asked this once, by the answer of another.
        node: the node that was asked.
    """

    __slots__ = ("ask", "node", "sent", "wrote")

    def __init__(self, ask: str | None = None) -> None:
        self.node: Node | None = None
        self.sent = False
        self.wrote = False
        self.ask = ask


class Link:
    """Runs commands in tasks of their own and repeats them within the deadline of the call.

    Args:
        timeout: seconds that one store call may take.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._silence = timeout / 3
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forks = len(forks)
        self._abandoned: dict[str, set[asyncio.Task[Any]]] = {}

    def reset(self, *, forked: bool = False) -> None:
        """Forget connections that belong to another loop, or with ``forked`` to the parent process."""

    def _enter(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if loop is not self._loop or self._forks != len(forks):
            if self._loop is not None:
                if self._forks == len(forks) and self._loop.is_running():
                    raise ConfigurationError(
                        "this store is in use on another event loop that is running; make one store for each loop"
                    )
                self.reset(forked=self._forks != len(forks))
            self._abandoned.clear()
            self._loop, self._forks = loop, len(forks)
        return loop

    async def detached(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run ``work`` in a task of its own; when the caller is cancelled it goes on, and is waited for by the next.

        It ends with its loop at the latest: nobody else would end what a caller left in the loop's last moments.
        """
        loop = self._enter()
        prior = tuple(self._abandoned.get(key, ()))
        with Within(self._timeout):  # a primitive that is awaited on its own has a deadline too
            task = loop.create_task(within_loop(functools.partial(self._after, prior, work) if prior else work))
        done = loop.create_future()
        task.add_done_callback(functools.partial(_set, done))
        try:
            await done
        except asyncio.CancelledError:
            self._abandoned.setdefault(key, set()).add(task)
            task.add_done_callback(functools.partial(self._forget, key))
            raise
        try:
            return task.result()
        except asyncio.CancelledError:
            raise StoreUnavailableError("the command was cancelled from outside") from None

    async def _after(self, prior: tuple[asyncio.Task[Any], ...], work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        await asyncio.wait(prior)
        return await work()

    def _forget(self, key: str, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            task.exception()  # its caller is gone: what became of it is what the next command finds
        tasks = self._abandoned.get(key, set())
        tasks.discard(task)
        if not tasks:
            self._abandoned.pop(key, None)

    async def step(
        self, send: Callable[[Progress], Awaitable[T]], failed: tuple[Exception, Progress] | None = None
    ) -> T:
        """Try until there is an answer, the server refuses, or the deadline of the call has come.

        Args:
            send: does one try.
            failed: the error of a try that was made before, and how far that one came.
        """
        deadline = call_deadline.get() or time.monotonic() + self._timeout
        last: Exception | None = None
        unknown, wrote, pause, ask = False, False, 0.0, None
        while (left := deadline - time.monotonic()) > 0 or failed is not None:
            if failed is None:
                progress = Progress(ask)
                try:
                    async with self._bounded(min(self._silence, left)):
                        return await send(progress)
                except Exception as caught:  # noqa: BLE001 - a client may throw anything here; what is not a refusal is not known
                    failed = caught, progress
            (error, progress), failed = failed, None
            if isinstance(error, IdempotencyError):
                raise error
            # A try that the deadline cut off says less than the one before it.
            last = last if last is not None and isinstance(error, TimeoutError) else error
            code = refusal(error)
            if isinstance(error, RuntimeError):
                self.reset()  # connections of a loop that is gone, from before the store had the client
            ask = self.heed(code, error, progress.node)
            wrote = wrote or progress.wrote
            if not code:
                unknown = unknown or progress.sent
            elif code not in PASSING:
                raise_refusal(last, code, unknown=unknown, wrote=wrote)
            if untrusted(error):
                break  # it is the same in a moment; what is owed is repeated in the background
            await asyncio.sleep(max(0.0, min(pause, left)))
            pause = min(pause * 2 or 0.01, 0.25)
        what = f"no answer from the server within {self._timeout:g} s"
        if last is not None and untrusted(last):
            what = "no connection to the server"
        why = (
            f": {type(last).__name__}: {last}"
            if last is not None
            else "; it was over before this command could be sent"
        )
        advice = "" if last is None else self.advise(last, sent=unknown)
        raise StoreUnavailableError(f"{what}{why}{advice}", outcome_unknown=unknown or wrote) from last

    def heed(self, code: str, error: Exception, node: Node | None) -> str | None:
        """Learn from what a try met at ``node``; return the name of the node that is to be asked next, if only once."""

    def advise(self, error: Exception, *, sent: bool) -> str:  # noqa: ARG002 - of a client of the user's nothing is known
        """Return what to change, where the last error of a call tells."""
        return ""

    def _bounded(self, seconds: float) -> contextlib.AbstractAsyncContextManager[Any]:
        return asyncio.timeout(seconds)

    async def pause(self, seconds: float, why: str) -> None:
        """Sleep between two looks at something that is taken, while the call has time.

        Raises:
            StoreUnavailableError: the deadline has come.
        """
        if time.monotonic() >= (call_deadline.get() or 0.0):
            raise StoreUnavailableError(why, outcome_unknown=False)
        await asyncio.sleep(seconds)

    async def aclose(self) -> None:
        """Wait for the commands whose callers are gone; they end by their deadlines."""
        self._enter()  # what is closed next must not be the connections of another loop
        loop = asyncio.get_running_loop()
        pending = [task for tasks in self._abandoned.values() for task in tasks if task.get_loop() is loop]
        if pending:
            await asyncio.wait(pending)


def _set(done: asyncio.Future[None], _: object) -> None:
    if not done.done():
        done.set_result(None)


class WireLink(Link):
    """Sends commands to the nodes of a redis.asyncio client, without its retries and callbacks.

    Args:
        routes: where the client's commands go.
        timeout: seconds that one store call may take.
    """

    def __init__(self, routes: Routes, timeout: float) -> None:
        super().__init__(timeout)
        self._routes = routes
        self._loaded: set[str] = set()

    def reset(self, *, forked: bool = False) -> None:
        """Forget the client's connections; the next command opens one of this loop and process."""
        self._routes.reset(forked=forked)

    async def aclose(self) -> None:
        """Wait for the commands whose callers are gone, and leave no task behind."""
        await super().aclose()
        await self._routes.aclose()

    def heed(self, code: str, error: Exception, node: Node | None) -> str | None:
        """Let the routes learn from it."""
        return self._routes.heed(code, error, node)

    def advise(self, error: Exception, *, sent: bool) -> str:
        """Say it for the kind of connections that the client makes."""
        return remedy(error, sent=sent, tls=self._routes.tls, cluster=self._routes.cluster)

    @abstractmethod
    async def exchange(self, key: str, *commands: Command) -> list[Any]:
        """Send commands in one write, and return their replies as bytes.

        Raises:
            StoreError: a command was refused, and nothing was written.
            StoreUnavailableError: no answer by the deadline of the call.
        """

    @abstractmethod
    async def run(
        self, script: Script, key: str, *args: bytes | str | int, large: bool = False, probe: Command = ()
    ) -> Any:
        """Run a script on ``key``. Raises what :meth:`exchange` raises.

        Args:
            script: the script.
            key: its key.
            *args: its arguments.
            large: whether they are.
            probe: arguments with which it changes nothing: with them it is run once more, in the same write, so that it
                was tried both by its source and by its digest. Of that reply nothing counts but a refusal.
        """

    @abstractmethod
    async def patient(self, key: str, commands: Callable[[int], Sequence[Command]]) -> tuple[list[Any], int, bool]:
        """Send commands that block their connection, over one of the client's pool, in nobody's order.

        Args:
            key: whose node they go to.
            commands: makes them of the milliseconds that the server may wait.

        Returns:
            Their replies, those milliseconds, and whether an earlier try had failed: then it may be another server that
            answered. Raises what :meth:`exchange` raises.
        """

    @abstractmethod
    async def _talk(
        self, key: str, commands: Sequence[Command], progress: Progress, *, large: bool = False
    ) -> list[Any]:
        """Try once."""

    async def _talk_script(
        self, script: Script, key: str, args: Command, progress: Progress, *, large: bool = False, probe: Command = ()
    ) -> Any:
        # The first time with its source, which the server keeps. After that inside one try: a server that restarted
        # has lost the script, and may have run it before.
        if script.sha in self._loaded and not probe:
            try:
                return (await self._talk(key, (("EVALSHA", script.sha, 1, key, *args),), progress, large=large))[0]
            except exceptions.ResponseError as error:
                if refusal(error) != "NOSCRIPT":
                    raise
        commands: tuple[Command, ...] = (("EVAL", script.source, 1, key, *args),)
        if probe:
            self._loaded.clear()  # if the digest is refused, what undoes this must go by its source
            commands += (("EVALSHA", script.sha, 1, key, *probe),)
        reply = (await self._talk(key, commands, progress, large=large))[0]
        self._loaded.add(script.sha)
        return reply

    async def _locate(self, key: str, progress: Progress) -> Node:
        node = self._routes.find(key) if progress.ask is None else self._routes.named(progress.ask)
        if node is None:
            left = (call_deadline.get() or math.inf) - time.monotonic()
            async with asyncio.timeout(min(left, self._silence)):
                await self._routes.refresh(self._silence)
            node = self._routes.find(key, trust=True)
            if node is None:
                raise exceptions.ClusterDownError("no node of the cluster serves the slot of the key")
        progress.node = node
        return node


class PoolLink(WireLink):
    """The plain path: a task, and a connection of the client's own pool, for every command.

    No more commands are under way than the pool has connections: the rest wait for one instead of failing.

    Args:
        routes: where the client's commands go.
        timeout: seconds that one store call may take.
    """

    def __init__(self, routes: Routes, timeout: float) -> None:
        super().__init__(routes, timeout)
        self._limit = max(1, min(routes.lendable, 2**16))
        self._slots = asyncio.Semaphore(self._limit)

    def reset(self, *, forked: bool = False) -> None:
        """Forget the client's connections; the next command opens one of this loop and process."""
        super().reset(forked=forked)
        self._slots = asyncio.Semaphore(self._limit)

    async def exchange(self, key: str, *commands: Command) -> list[Any]:
        """Send commands in one write, and return their replies as bytes; see :meth:`WireLink.exchange`."""
        talk = functools.partial(self._talk, key, commands)
        return await self.detached(key, functools.partial(self._slotted, talk))

    async def run(
        self,
        script: Script,
        key: str,
        *args: bytes | str | int,
        large: bool = False,  # noqa: ARG002 - each command has a connection of its own here
        probe: Command = (),
    ) -> Any:
        """Run a script on ``key``; see :meth:`WireLink.run`."""
        talk = functools.partial(self._talk_script, script, key, args, probe=probe)
        return await self.detached(key, functools.partial(self._slotted, talk))

    async def patient(self, key: str, commands: Callable[[int], Sequence[Command]]) -> tuple[list[Any], int, bool]:
        """Send commands that block their connection; see :meth:`WireLink.patient`."""
        tries = 0

        async def talk(progress: Progress) -> tuple[list[Any], int, bool]:
            nonlocal tries
            tries += 1
            left = (call_deadline.get() or math.inf) - time.monotonic()
            ms = max(1, int(min(left, self._silence) * PATIENCE * 1000))
            return await self._talk(key, commands(ms), progress), ms, tries > 1

        # Under a name of its own, or the undo of what is waited for would have to wait too.
        return await self.detached(f"{key} patient", functools.partial(self._slotted, talk))

    async def _slotted(self, send: Callable[[Progress], Awaitable[T]]) -> T:
        slots = self._slots
        if slots.locked():
            left = (call_deadline.get() or math.inf) - time.monotonic()
            try:
                async with asyncio.timeout(min(left, self._timeout)):
                    await slots.acquire()
            except TimeoutError:
                raise StoreUnavailableError(
                    f"no connection of the pool of {self._limit} was free within {self._timeout:g} s",
                    outcome_unknown=False,
                ) from None
        else:
            await slots.acquire()
        try:
            return await self.step(send)
        finally:
            slots.release()

    async def _talk(
        self,
        key: str,
        commands: Sequence[Command],
        progress: Progress,
        *,
        large: bool = False,  # noqa: ARG002 - see run
    ) -> list[Any]:
        node = await self._locate(key, progress)
        connection = await node.lend()
        try:
            if progress.ask is not None:
                commands = [part for command in commands for part in (("ASKING",), command)]
            packed = connection.pack_commands(commands)
            progress.sent = True
            await connection.send_packed_command(packed)
            replies: list[Any] = []
            failed: Exception | None = None
            for _ in commands:
                try:
                    replies.append(await connection.read_response(disable_decoding=True))
                except exceptions.ResponseError as error:
                    progress.wrote = progress.wrote or (failed is None and len(replies) > (progress.ask is not None))
                    failed = failed or error  # the other replies are read first, or the connection is out of step
            if failed is not None:
                raise failed  # noqa: TRY301 - the handlers below are for it too
            return replies if progress.ask is None else replies[1::2]
        except exceptions.ResponseError as error:
            if refusal(error) == "READONLY":
                # A master that was demoted: another node may answer to the name by now.
                await connection.disconnect(nowait=True)
            raise
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        finally:
            await node.take_back(connection)
