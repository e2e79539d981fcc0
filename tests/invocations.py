"""Events and contexts of Lambda invocations, for tests."""

import asyncio
import json
import time
import uuid
from typing import Any

__all__ = ["Context", "Handler", "alb_event", "failed", "rest_event", "sqs_event", "v2_event"]


class Context:
    """As much of a Lambda context as is asked for: what is left of ``seconds`` from now on."""

    aws_request_id = "request"

    def __init__(self, seconds: float = 30) -> None:
        self._end = time.monotonic() + seconds

    def get_remaining_time_in_millis(self) -> int:
        return max(0, int((self._end - time.monotonic()) * 1000))


def sqs_event(*names: str, queue: str = "orders", groups: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a batch of messages with these ids; in a FIFO queue each is of its group."""
    return {
        "Records": [
            {
                "messageId": name,
                "receiptHandle": uuid.uuid4().hex,
                "body": json.dumps({"order_id": name}),
                "attributes": {"MessageGroupId": groups[number]} if groups else {},
                "eventSource": "aws:sqs",
                "eventSourceARN": f"arn:aws:sqs:eu-central-1:123456789012:{queue}",
            }
            for number, name in enumerate(names)
        ]
    }


def v2_event(key: str | None = None, *, body: str = "{}", method: str = "POST", **more: Any) -> dict[str, Any]:
    """Return an event of an HTTP API, of a client with a JWT."""
    return {
        "version": "2.0",
        "routeKey": f"{method} /items/{{id}}",
        "rawPath": "/items/1",
        "rawQueryString": "a=1",
        "headers": {"content-type": "application/json", **({} if key is None else {"idempotency-key": key})},
        "requestContext": {
            "http": {"method": method, "path": "/items/1"},
            "authorizer": {"jwt": {"claims": {"iss": "https://issuer.example", "sub": "alice"}}},
        },
        "body": body,
        "isBase64Encoded": False,
        **more,
    }


def rest_event(key: str | None = None, *, body: str | None = "{}", method: str = "POST", **more: Any) -> dict[str, Any]:
    """Return an event of a REST API, of a client of a Lambda authorizer."""
    headers = {"Content-Type": "application/json", **({} if key is None else {"Idempotency-Key": key})}
    return {
        "resource": "/items/{id}",
        "path": "/items/1",
        "httpMethod": method,
        "headers": headers,
        "multiValueHeaders": {name: [value] for name, value in headers.items()},
        "queryStringParameters": {"a": "2"},
        "multiValueQueryStringParameters": {"a": ["1", "2"]},
        "requestContext": {"authorizer": {"principalId": "alice"}, "identity": {}},
        "body": body,
        "isBase64Encoded": False,
        **more,
    }


def alb_event(key: str | None = None, *, multi: bool = False, **more: Any) -> dict[str, Any]:
    """Return an event of ALB, whose target group has multi-value headers or not."""
    headers = {"content-type": "application/json", **({} if key is None else {"idempotency-key": key})}
    values = (
        {"multiValueHeaders": {name: [value] for name, value in headers.items()}} if multi else {"headers": headers}
    )
    return {
        "requestContext": {
            "elb": {"targetGroupArn": "arn:aws:elasticloadbalancing:eu-central-1:123456789012:targetgroup/a"}
        },
        "httpMethod": "POST",
        "path": "/items/1",
        "queryStringParameters": {"b": "2", "a": "1"},
        **values,
        "body": "{}",
        "isBase64Encoded": False,
        **more,
    }


class Handler:
    """Takes notes of the messages that it runs for; those in `failing` raise."""

    def __init__(self, *failing: str) -> None:
        self.failing = set(failing)
        self.ran: list[str] = []

    async def __call__(self, message: Any) -> object:
        self.ran.append(message["messageId"])
        await asyncio.sleep(0)
        if message["messageId"] in self.failing:
            raise ValueError(message["messageId"])
        return object()  # which no codec could store


def failed(response: Any) -> list[str]:
    """Return the names in the response to a batch."""
    assert list(response) == ["batchItemFailures"]
    return [item["itemIdentifier"] for item in response["batchItemFailures"]]
