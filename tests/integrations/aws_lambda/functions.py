"""Handlers that tests run under the runtime client: what an invocation does is in its event."""

import asyncio
import os
import time
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from asyncidem import Idempotency, RedisStore, current_operation
from asyncidem.integrations.aws_lambda import lambda_handler, process_sqs

store = RedisStore.from_url(os.environ["REDIS_URL"], timeout=3)
idem = Idempotency(store, ttl=60)

invocations: ContextVar[int] = ContextVar("invocations", default=0)

ran: list[str] = []


async def effect(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Do what the event says."""
    op = current_operation()
    assert op is not None
    ran.append(event["key"])
    match event.get("do"):
        case "raise":
            raise ValueError("it went wrong")
        case "cancel":
            raise asyncio.CancelledError
        case "outlive":
            await asyncio.sleep(60)
        case "hang":
            time.sleep(60)
    return {"attempt": op.attempt, "request": context.aws_request_id}


async def run(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Run an operation, and say in which process, beside what."""
    before = invocations.get()
    invocations.set(before + 1)
    result = await idem.run(event["key"], effect, event, context)
    return {
        **result,
        "before": before,
        "ran": ran.count(event["key"]),
        "tasks": len(asyncio.all_tasks()),
        "files": len(list(Path("/proc/self/fd").iterdir())),
    }


handler = lambda_handler(run)


def runs(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Do the same on a loop of its own, as one may who does not know better."""
    return asyncio.run(run(event, context))


@lambda_handler
async def batch(event: dict[str, Any], context: Any) -> Any:
    """Process a batch, whose messages say in their body what they do."""

    async def one(message: dict[str, Any]) -> None:
        await effect({"key": message["messageId"], "do": message["body"]}, context)

    return await process_sqs(event, context, one, idem=idem)


if os.environ.get("WARM"):

    class WarmUp:
        """What a handler is called with before a snapshot."""

        aws_request_id = "warm-up"

    handler({"key": f"warm-up-{os.getpid()}"}, WarmUp())
