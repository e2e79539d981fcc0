"""Orders from an SQS queue: each is charged once, however often SQS delivers it, and a poisoned one fails alone.

The event source mapping needs ``ReportBatchItemFailures``. ``python examples/lambda/local_lambda.py sqs_batch`` runs it
on this machine.
"""

import asyncio
import json
import os
from typing import Any

from asyncidem import Idempotency, RedisStore
from asyncidem.integrations.aws_lambda import jmespath_key, lambda_handler, process_sqs

store = RedisStore.from_url(os.environ["REDIS_URL"], timeout=3)
idem = Idempotency(store, namespace="orders", ttl=86_400)

# By default the key is the messageId, which a producer that sends twice makes twice. This one is the producer's own.
order_key = jmespath_key("powertools_json(body).order_id")


async def charge(message: dict[str, Any]) -> None:
    """Charge an order."""
    order = json.loads(message["body"])
    if order["amount"] < 0:
        raise ValueError("an amount below zero")
    await asyncio.sleep(0.01)
    print(f"charged {order['order_id']}: {order['amount']}")


@lambda_handler
async def handler(event: dict[str, Any], context: object) -> Any:
    """Process a batch; what is returned names the messages that SQS delivers again."""
    return await process_sqs(event, context, charge, idem=idem, key=order_key)
