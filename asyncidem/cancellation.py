"""What a cancelled caller may still wait for.

asyncio cancels a task once; anyio (and with it Starlette and FastAPI) cancels it again at every await until it ends. A
caller whose claim is being undone, or whose result is being stored, must outlast both, or ``asyncio.run`` would end
before the store has answered; but not for long, or a shutdown would hang on a dead server.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Any, Final

__all__ = ["LINGER", "linger"]

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
    end = clock() + LINGER
    with _shield():
        while not task.done() and (left := end - clock()) > 0:
            # the one that is swallowed is a repetition of the one that the caller is about to raise
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((task,), timeout=left)
