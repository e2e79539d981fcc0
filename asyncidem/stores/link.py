"""The seam that every command passes: deadlines, repeats, cancellation, other loops and forks.

The invariants:

- A command belongs to a task of its own, not to its caller's. A cancelled caller leaves it running, and the next
  command on the same key, from an undo or a repetition, waits for its end instead of overtaking it.
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
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

import redis.asyncio
from redis import exceptions

from ..errors import ConfigurationError, IdempotencyError, StoreError, StoreUnavailableError
from .primitives import Within, call_deadline

__all__ = ["Link", "PoolLink", "Progress", "Script", "refusal"]

T = TypeVar("T")

Command = Sequence[bytes | str | int]

CODES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (exceptions.BusyLoadingError, "LOADING"),
    (exceptions.ReadOnlyError, "READONLY"),
    (exceptions.TryAgainError, "TRYAGAIN"),
    (exceptions.MasterDownError, "MASTERDOWN"),
    (exceptions.ClusterDownError, "CLUSTERDOWN"),
    (exceptions.OutOfMemoryError, "OOM"),
    (exceptions.NoPermissionError, "NOPERM"),
    (exceptions.NoScriptError, "NOSCRIPT"),
    (exceptions.AuthenticationError, "NOAUTH"),
    (exceptions.AuthorizationError, "NOAUTH"),
)
"""redis-py cuts the code off the message where it has a class for it."""

PASSING: Final = frozenset({"LOADING", "READONLY", "TRYAGAIN", "MASTERDOWN", "CLUSTERDOWN", "BUSY"})
"""Refusals that are over soon: repeated within the deadline."""

UNWRITABLE: Final = frozenset({"OOM", "MISCONF", "NOREPLICAS"})
"""Refusals that last until an operator acts, and are nobody's mistake here."""

HINTS: Final = {
    "NOPERM": "; the user needs SET, GET, PTTL, DEL, EVAL and EVALSHA on the keys of the prefix",
    "WRONGTYPE": "; the key holds another Redis type than a string: use another prefix, or delete it",
    "NOAUTH": "; check the user name and the password",
}

inherited: list[Any] = []
"""What a child process has of its parent's connections. It is kept: to close a transport, as its end as garbage does,
would take the parent's socket out of the event queue that both processes share.
"""

forks: list[None] = []
"""As long as there were forks between this process and the one that imported the module."""

os.register_at_fork(after_in_child=lambda: forks.append(None))


def refusal(error: BaseException | None) -> str:
    """Return the code of an error reply (``"WRONGTYPE"``, ``"syntax error"``, ...), or "" for any other error."""
    for kind, code in CODES:
        if isinstance(error, kind):
            return code
    if not isinstance(error, exceptions.ResponseError):
        return ""
    message = str(error)
    # Below Redis 7.0 an error inside a script is wrapped into a sentence: "... @user_script: 9: -READONLY ...".
    inner = re.search(r"@user_script: ?[^:]*: -?([A-Z]+) ", message)
    if inner is not None:
        return inner.group(1)
    first = message.split(" ", 1)[0]
    return first if first.isupper() else message.lower()


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
    """How far one try of a command came."""

    __slots__ = ("sent",)

    def __init__(self) -> None:
        self.sent = False


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
        """Run ``work`` in a task of its own; when the caller is cancelled it goes on, and is waited for by the next."""
        loop = self._enter()
        prior = tuple(self._abandoned.get(key, ()))
        with Within(self._timeout):  # a primitive that is awaited on its own has a deadline too
            task = loop.create_task(self._after(prior, work) if prior else work())
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

    async def step(self, send: Callable[[Progress], Awaitable[T]]) -> T:
        """Try until there is an answer, the server refuses, or the deadline of the call has come."""
        deadline = call_deadline.get() or time.monotonic() + self._timeout
        last: Exception | None = None
        unknown, pause = False, 0.0
        while (left := deadline - time.monotonic()) > 0:
            progress = Progress()
            try:
                async with asyncio.timeout(min(self._silence, left)):
                    return await send(progress)
            except IdempotencyError:
                raise
            except Exception as error:  # noqa: BLE001 - a client may throw anything here; what is not a refusal is not known
                # A try that the deadline cut off says less than the one before it.
                last = last if last is not None and isinstance(error, TimeoutError) else error
                code = refusal(error)
                if isinstance(error, RuntimeError):
                    self.reset()  # connections of a loop that is gone, from before the store had the client
            if not code:
                unknown = unknown or progress.sent
            elif code not in PASSING:
                # A size is refused before anything runs, however often the connection broke over it.
                unknown = unknown and "invalid bulk length" not in str(last)
                message = f"the server refused: {last}{HINTS.get(code, '')}"
                if unknown or code in UNWRITABLE:
                    raise StoreUnavailableError(message, outcome_unknown=unknown) from last
                raise StoreError(message) from last
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 2 or 0.01, 0.25)
        why = (
            f": {type(last).__name__}: {last}"
            if last is not None
            else "; it was over before this command could be sent"
        )
        raise StoreUnavailableError(
            f"no answer from the server within {self._timeout:g} s{why}", outcome_unknown=unknown
        ) from last

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


class PoolLink(Link):
    """Sends over connections of a redis.asyncio client's own pool, without its retries and callbacks.

    No more commands are under way than the pool has connections: the rest wait for one instead of failing.

    Args:
        client: a standalone or Sentinel client.
        timeout: seconds that one store call may take.
    """

    def __init__(self, client: redis.asyncio.Redis, timeout: float) -> None:
        super().__init__(timeout)
        self._pool: Any = client.connection_pool
        self._loaded: set[str] = set()
        self._limit = max(1, min(int(getattr(self._pool, "max_connections", 64) or 64), 2**16))
        self._slots = asyncio.Semaphore(self._limit)

    def reset(self, *, forked: bool = False) -> None:
        """Forget the pool's connections; the next command opens one of this loop and process."""
        if forked:
            inherited.append(self._pool.__dict__.copy())
        self._pool.reset()
        self._slots = asyncio.Semaphore(self._limit)

    async def exchange(self, key: str, *commands: Command) -> list[Any]:
        """Send commands in one write, and return their replies as bytes.

        Raises:
            StoreError: a command was refused, and nothing was written.
            StoreUnavailableError: no answer by the deadline of the call.
        """
        return await self.detached(key, functools.partial(self._slotted, functools.partial(self._talk, commands)))

    async def run(self, script: Script, key: str, *args: bytes | str | int) -> Any:
        """Run a script on ``key``. Raises what :meth:`exchange` raises."""
        return await self.detached(
            key, functools.partial(self._slotted, functools.partial(self._talk_script, script, (1, key, *args)))
        )

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

    async def _talk_script(self, script: Script, args: Command, progress: Progress) -> Any:
        # The first time with its source, which the server keeps. After that inside one try: a server that restarted
        # has lost the script, and may have run it before.
        if script.sha in self._loaded:
            with contextlib.suppress(exceptions.NoScriptError):
                return (await self._talk((("EVALSHA", script.sha, *args),), progress))[0]
        reply = (await self._talk((("EVAL", script.source, *args),), progress))[0]
        self._loaded.add(script.sha)
        return reply

    async def _talk(self, commands: Sequence[Command], progress: Progress) -> list[Any]:
        connection = await self._pool.get_connection()
        try:
            packed = connection.pack_commands(commands)
            progress.sent = True
            await connection.send_packed_command(packed)
            replies: list[Any] = []
            failed: Exception | None = None
            for _ in commands:
                try:
                    replies.append(await connection.read_response(disable_decoding=True))
                except exceptions.ResponseError as error:
                    failed = failed or error  # the other replies are read first, or the connection is out of step
            if failed is not None:
                raise failed  # noqa: TRY301 - the handlers below are for it too
            return replies
        except exceptions.ReadOnlyError:
            # A master that was demoted: another node may answer to the name by now.
            await connection.disconnect(nowait=True)
            raise
        except exceptions.ResponseError:
            raise
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        finally:
            with contextlib.suppress(KeyError):  # the pool was reset meanwhile, and does not know it any more
                await self._pool.release(connection)
