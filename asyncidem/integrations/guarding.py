"""The life of a guarded request, for every transport: it begins, and it is settled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from ..errors import CodecError
from ..operation import Operation
from .http import UNKEPT, Answer, Headers, NotCarriedOutError, Rules

__all__ = ["ClientGoneError", "UnansweredError", "begin", "fail", "settle"]


class ClientGoneError(Exception):
    """The client of a duplicate went away while it waited. Nothing ran for it, and nobody is there to be answered."""


class UnansweredError(asyncio.CancelledError):
    """A response that did not come to its end: what its endpoint did is not known, as if it was cancelled."""


async def begin(op: Operation, gone: Callable[[], Awaitable[object]] | None) -> None:
    """Enter ``op``, and leave it again if it is a replay; raise what ``async with`` raises.

    A duplicate that waits does so in this task, for an operation belongs to the task that entered it; another task
    watches the client. When that goes, the wait is cancelled, which leaves nothing; a key that was won in the same
    moment is given back, or the effect would run for nobody. Between the claim and the caller there is no await.

    Args:
        op: the operation.
        gone: returns when the client has gone; None where that is of no interest, or cannot be seen.

    Raises:
        ClientGoneError: the client has gone.
    """
    if gone is None:
        await op.__aenter__()
    else:
        await _enter_while_there(op, gone)
    if op.replayed:  # nothing runs: left open, it would be around all that this task serves after it
        await op.__aexit__(None, None, None)


async def _enter_while_there(op: Operation, gone: Callable[[], Awaitable[object]]) -> None:
    left = entered = False
    with anyio.CancelScope() as waiting:

        async def watch() -> None:
            nonlocal left
            with contextlib.suppress(Exception):  # whatever a server raises here, the client cannot be reached
                await gone()
            left = True
            waiting.cancel()

        watching = asyncio.create_task(watch())
        try:
            await op.__aenter__()
            entered = True
        finally:
            watching.cancel()
    if left:
        if entered:
            await fail(op, NotCarriedOutError())
        raise ClientGoneError


async def settle(
    op: Operation,
    rules: Rules[Any],
    status: int,
    headers: Headers,
    body: bytes | None,
    *,
    reason: str | None = None,
    raised: bool = False,
) -> None:
    """End ``op`` with a whole response: store it, or release the key, as the rules say of its status.

    A cancellation meanwhile changes nothing: what was begun is repeated in the background.

    Args:
        op: the operation, running.
        rules: what decides.
        status: of the response.
        headers: all that the endpoint sent.
        body: all of it; None if it cannot be kept.
        reason: phrase of the status line, if it is to be replayed.
        raised: whether the endpoint raised it.

    Raises:
        LeaseLostError: another owner answers for the key.
        CompletionError: not acknowledged, with ``on_completion_error="raise"``.
    """
    try:
        verdict = rules.verdict(status)
        answer = UNKEPT if body is None else rules.kept(status, headers, body, reason=reason, raised=raised)
    except Exception:  # the user's function failed; the effect has happened, and must not do so twice
        await _complete(op, UNKEPT)
        raise
    if verdict == "store":
        await _complete(op, answer)
    else:
        await fail(op, rules.failure(status, verdict))


async def fail(op: Operation, error: BaseException) -> None:
    """End ``op`` whose endpoint raised, or whose response is a failure, as ``on_failure`` and ``on_cancel`` say.

    Raises:
        LeaseLostError: another owner answers for the key.
    """
    await op.__aexit__(type(error), error, None)


async def _complete(op: Operation, answer: Answer) -> None:
    op.set_result(answer)
    # What has no text is completed without a result, and that is meant; the response still goes to its client.
    with contextlib.suppress(CodecError):
        await op.__aexit__(None, None, None)
