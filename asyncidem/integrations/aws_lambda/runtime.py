"""The entry point that Lambda calls, over an asynchronous handler.

The invariants:

- One event loop for each process, kept from one invocation to the next, for a store's connection lives in it. A forked
  worker has a loop of its own; a snapshot holds none.
- Each invocation runs in a fresh copy of the caller's context: nothing that one sets is seen by the next.
- Nothing but an Exception, SystemExit or KeyboardInterrupt reaches the runtime client. Any other BaseException would
  end the process, and the next invocation start cold.
- Between invocations the process stands still. What it leaves running goes on in the next one, if there is one; so
  leases are not renewed, and end soon after the invocation that they protect.

The end of an invocation, on one line; what is left when Lambda kills the process is a record in progress, whose lease
ends ``GRACE`` later::

    ... calls of the store end | the batch stops | the handler is cancelled | what it settles ends | killed | leases end
                     reserve + 2 x SPARE    reserve + SPARE             reserve                  SPARE     0       -GRACE
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import os
import time
from collections.abc import Callable, Coroutine, Generator
from contextvars import copy_context
from typing import Any, Final, Generic, NamedTuple, TypeVar, overload

from ...cutoffs import Cutoff, cutoff
from ...durations import Duration, to_ms
from ...errors import ConfigurationError, IdempotencyError
from ...options import is_coroutine_callable

__all__ = ["DeadlineExceededError", "HandlerCancelledError", "LambdaHandler", "Limits", "lambda_handler", "limited"]

E = TypeVar("E")
C = TypeVar("C")
R = TypeVar("R")

RESERVE: Final = 0.3
"""Seconds before Lambda kills an invocation at which its handler is cancelled."""

SPARE: Final = 0.05
"""Seconds between one step of the end and the next: an event loop's timers, and an answer on its way to Lambda."""

GRACE: Final = 0.5
"""Seconds that a lease outlives its invocation: clocks, and how punctual Lambda is."""


class DeadlineExceededError(IdempotencyError, TimeoutError):
    """The handler was cancelled, or was not begun, because Lambda would have killed the invocation."""


class HandlerCancelledError(IdempotencyError):
    """The handler ended in a BaseException, which is the cause: it would have ended the process."""


class Limits(NamedTuple):
    """Seconds that an invocation has left.

    Attributes:
        kill: until Lambda kills it.
        cancel: until its handler is cancelled.
        stop: until a batch stops.
    """

    kill: float
    cancel: float
    stop: float


@contextlib.contextmanager
def limited(context: object, reserve: float) -> Generator[Limits | None]:
    """Let what runs in this block end in time for an answer; the module says how. A block within another ends no later.

    Yields:
        What the invocation has left; None if its context does not say, as in a test that passes none.
    """
    ask = getattr(context, "get_remaining_time_in_millis", None)
    if ask is None:
        yield None
        return
    now = time.monotonic()
    killed = now + ask() / 1000
    calls = killed - reserve - 2 * SPARE
    if (outer := cutoff.get()) is not None:
        calls = min(calls, outer.calls)
    token = cutoff.set(Cutoff(calls, max(calls, killed - SPARE), killed + GRACE))
    try:
        yield Limits(killed - now, calls + 2 * SPARE - now, calls + SPARE - now)
    finally:
        with contextlib.suppress(ValueError):  # closed as garbage in another context, whose cutoff is not ours to end
            cutoff.reset(token)


class LambdaHandler(Generic[E, C, R]):
    """What Lambda calls. Made by :func:`lambda_handler`.

    Args:
        fn: the asynchronous handler.
        reserve: seconds before the kill at which it is cancelled.
    """

    def __init__(self, fn: Callable[[E, C], Coroutine[Any, Any, R]], reserve: float) -> None:
        functools.update_wrapper(self, fn)
        self._fn = fn
        self._reserve = reserve

    def __call__(self, event: E, context: C) -> R:
        """Run an invocation to its end.

        Raises:
            DeadlineExceededError: it would have been killed.
            HandlerCancelledError: the handler was cancelled, or raised another BaseException than SystemExit and
                KeyboardInterrupt.
            ConfigurationError: an event loop is running here: await ``aio`` instead.
            Exception: what the handler raised.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            name = getattr(self, "__name__", "handler")
            raise ConfigurationError(f"an event loop is running here already: await {name}.aio(event, context) instead")
        try:
            return _runner().run(self.aio(event, context), context=copy_context())
        except (Exception, SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise HandlerCancelledError(f"the handler ended in {type(error).__name__}") from error

    async def aio(self, event: E, context: C) -> R:
        """Await the same where an event loop runs; a cancellation stays one.

        Raises:
            DeadlineExceededError: it would have been killed.
            Exception: what the handler raised.
        """
        with limited(context, self._reserve) as left:
            if left is None:
                return await self._fn(event, context)
            if left.cancel <= 0:
                raise DeadlineExceededError(
                    f"the handler was not begun: {max(left.kill, 0):.3f} s are left, and {self._reserve:g} s are reserved; "
                    f"raise the function's timeout, or lower reserve"
                )
            bound = asyncio.timeout(left.cancel)
            try:
                async with bound:
                    return await self._fn(event, context)
            except TimeoutError as error:
                if not bound.expired() or not isinstance(error.__cause__, asyncio.CancelledError):
                    raise  # the handler's own
                raise DeadlineExceededError(
                    f"the handler was cancelled {self._reserve:g} s before Lambda would have killed it"
                ) from error.__cause__


@overload
def lambda_handler(fn: Callable[[E, C], Coroutine[Any, Any, R]], /) -> LambdaHandler[E, C, R]: ...


@overload
def lambda_handler(
    *, reserve: Duration = RESERVE
) -> Callable[[Callable[[E, C], Coroutine[Any, Any, R]]], LambdaHandler[E, C, R]]: ...


def lambda_handler(fn: Any = None, /, *, reserve: Duration = RESERVE) -> Any:
    """Make the entry point that Lambda calls of an asynchronous handler.

    ::

        @lambda_handler
        @idem.idempotent(key=event_key)
        async def handler(event, context): ...

    The event loop is kept for the process, and with it the store's connection. Shortly before Lambda would kill the
    invocation the handler is cancelled, and ``on_cancel`` decides about its key. A lease lasts for the rest of the
    invocation and half a second, whatever ``lease`` says, and is not renewed; calls of the store and waits end in time
    for an answer. Where ``snapshot_restore_py`` is there (SnapStart), the loop and its connections end before the
    snapshot.

    Args:
        fn: a coroutine function of event and context, where the decorator is used without arguments.
        reserve: seconds before the kill at which the handler is cancelled: what it takes to store a result, or to
            give a key back, and to answer. Half a second lets a release outlast a slow server.

    Raises:
        ConfigurationError: not a coroutine function, or not a duration.
    """
    seconds = to_ms(reserve, "reserve") / 1000

    def decorate(fn: Any, /) -> LambdaHandler[Any, Any, Any]:
        if not is_coroutine_callable(fn):
            raise ConfigurationError(f"@lambda_handler takes a coroutine function of event and context, not {fn!r}")
        _end_before_snapshots()
        return LambdaHandler(fn, seconds)

    return decorate if fn is None else decorate(fn)


# -- the loop of the process -------------------------------------------------------------------------------------------

_runners: Final[dict[int, asyncio.Runner]] = {}
"""By process. A parent's stays here, untouched: to close it, or to collect it, would take its sockets from the parent."""

_hooked: Final[list[bool]] = []


def _runner() -> asyncio.Runner:
    pid = os.getpid()
    runner = _runners.get(pid)
    if runner is None:
        runner = _runners[pid] = asyncio.Runner()
    elif runner.get_loop().is_running():
        raise ConfigurationError("an invocation is running in another thread: a process runs one at a time")
    return runner


def _end_loop() -> None:
    """End the loop of this process, and with it the connections of every store that was used in it."""
    runner = _runners.pop(os.getpid(), None)
    if runner is not None:
        runner.close()


def _end_before_snapshots() -> None:
    """Let SnapStart take no connection into its snapshot; a store makes another one when it meets another loop."""
    if _hooked:
        return
    _hooked.append(True)
    with contextlib.suppress(ImportError):  # elsewhere there are no snapshots
        importlib.import_module("snapshot_restore_py").register_before_snapshot(_end_loop)
