"""What a cancelled caller may still wait for.

asyncio cancels a task once; anyio (and with it Starlette and FastAPI) cancels it again at every await until it ends. A
caller whose claim is being undone, or whose result is being stored, must outlast both, or ``asyncio.run`` would end
before the store has answered; but not for long, or a shutdown would hang on a dead server.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Final, TypeVar

from .cutoffs import bounded

__all__ = ["LINGER", "linger", "within_loop"]

T = TypeVar("T")

LINGER: Final = 0.5
"""Seconds that a cancelled caller waits for what it began; after them that goes on in the background."""


def _shield() -> contextlib.AbstractContextManager[Any]:
    """Return an anyio shield where anyio is in use: without it, its cancellations arrive at every turn of the loop."""
    anyio = sys.modules.get("anyio")
    return contextlib.nullcontext() if anyio is None else anyio.CancelScope(shield=True)


async def linger(task: asyncio.Task[Any]) -> None:
    """Wait until ``task`` is done, at most ``LINGER`` seconds, through any cancellation. Its outcome is not raised.

    Cancellations that arrive meanwhile are swallowed: the caller is being cancelled, and raises when this returns.
    """
    clock = asyncio.get_running_loop().time
    end = clock() + bounded(LINGER)
    with _shield():
        while not task.done() and (left := end - clock()) > 0:
            # the one that is swallowed is a repetition of the one that the caller is about to raise
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((task,), timeout=left)


async def within_loop(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Do ``work`` in a task of its own, which ends with its loop at the latest.

    ``asyncio.run`` cancels the tasks that are there when it ends. What those begin in their last moments nobody would
    end: it would be destroyed while it is pending, or keep a socket.
    """
    task = asyncio.current_task()
    assert task is not None
    # Whatever begins once a loop closes its asynchronous generators is no part of what it closes. Loops other than
    # asyncio's own do not tell; there it is as without this line.
    if getattr(asyncio.get_running_loop(), "_asyncgens_shutdown_called", False):
        raise asyncio.CancelledError
    guard = _until_loop_ends(task)
    await anext(guard)
    try:
        return await work()
    finally:
        with contextlib.suppress(RuntimeError):  # it is what ends this task, and runs
            await guard.aclose()


async def _until_loop_ends(task: asyncio.Task[Any]) -> AsyncGenerator[None]:
    """Cancel ``task`` when the loop closes the asynchronous generators that were begun in it."""
    try:
        yield
    finally:
        ending = asyncio.current_task() is not task
        while ending and not task.done():
            task.cancel()
            await asyncio.sleep(0)
