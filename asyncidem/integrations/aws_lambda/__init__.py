"""AWS Lambda: asynchronous handlers, batches of SQS, keys of events, HTTP APIs.

::

    store = RedisStore.from_url(os.environ["REDIS_URL"], timeout=3)
    idem = Idempotency(store, ttl=86_400)

    @lambda_handler
    @idem.idempotent(key=event_key)
    async def handler(event, context): ...

    @lambda_handler
    async def consume(event, context):
        return await process_sqs(event, context, one, idem=idem)

    @lambda_handler
    @idempotent_api(idem)
    async def api(event, context):
        return {"statusCode": 201, "body": "..."}

Nothing of AWS is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from .keys import event_key, jmespath_key
from .runtime import DeadlineExceededError, HandlerCancelledError, LambdaHandler, lambda_handler

if TYPE_CHECKING:
    from ..http import HTTPFailure
    from .api import idempotent_api
    from .sqs import BatchResponse, process_sqs

__all__ = [
    "BatchResponse",
    "DeadlineExceededError",
    "HTTPFailure",
    "HandlerCancelledError",
    "LambdaHandler",
    "event_key",
    "idempotent_api",
    "jmespath_key",
    "lambda_handler",
    "process_sqs",
]

LATE: Final = {
    "BatchResponse": ".sqs",
    "HTTPFailure": "..http",
    "idempotent_api": ".api",
    "process_sqs": ".sqs",
}


def __getattr__(name: str) -> Any:
    """Import what a function needs when it asks for it: a cold start pays for nothing else."""
    if name not in LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(LATE[name], __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
