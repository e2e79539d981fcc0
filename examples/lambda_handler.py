"""Payments on Lambda behind an HTTP API: a retry with the same ``Idempotency-Key`` gets the first answer.

``python examples/lambda/local_lambda.py lambda_handler`` runs it on this machine.
"""

import asyncio
import json
import os
import uuid
from typing import Any

from asyncidem import Idempotency, RedisStore, current_operation
from asyncidem.integrations.aws_lambda import idempotent_api, lambda_handler

# Made at import, once for each process; it connects at the first invocation. A third of the timeout is the silence that
# a connection may keep after a freeze.
store = RedisStore.from_url(os.environ["REDIS_URL"], timeout=3)
idem = Idempotency(store, namespace="payments", ttl=86_400)


@lambda_handler
@idempotent_api(idem, required=True)
async def handler(event: dict[str, Any], context: object) -> dict[str, Any]:  # noqa: ARG001 - the signature of a handler
    """Charge a customer."""
    amount = json.loads(event["body"])["amount"]
    op = current_operation()
    assert op is not None
    print(f"charging {amount}, attempt {op.attempt}, downstream key {op.downstream_key[:8]}...")
    if amount == 0:
        await asyncio.sleep(60)  # a provider that does not answer
    receipt = {"receipt": uuid.uuid4().hex[:8], "amount": amount}
    return {"statusCode": 201, "headers": {"content-type": "application/json"}, "body": json.dumps(receipt)}
