"""Idempotency keys of events: what stays the same when Lambda delivers one again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from ...errors import InvalidKeyError
from ...keys import digest, qualify
from ..expressions import evaluator
from ..fields import MalformedKeyError, parse_key
from .events import caller, read_request

__all__ = ["event_key", "jmespath_key"]

MANY: Final = {
    "aws:sqs": "process_sqs gives each of them its own",
    "aws:kinesis": "give each of them its own: idem.run(event_key(record), ...)",
    "aws:dynamodb": "give each of them its own: idem.run(event_key(record), ...)",
}


def event_key(event: Any, context: object = None) -> str | None:  # noqa: ARG001 - the signature of a handler
    """Return the idempotency key of an event: ``@idem.idempotent(key=event_key)``.

    ===========================  ==================================================================================
    event, or one record of it   key
    ===========================  ==================================================================================
    SQS                          ``messageId``: the same at each delivery of a message
    SNS                          ``Sns.MessageId``
    EventBridge                  ``id``
    Kinesis                      ``eventSourceARN`` and ``eventID`` (shard and sequence number)
    DynamoDB streams             ``eventSourceARN`` and ``eventID``
    API Gateway, function URL    the header ``Idempotency-Key``, with whoever sent it, method and route, as
                                 :func:`~asyncidem.integrations.aws_lambda.idempotent_api` has them; None without one
    ===========================  ==================================================================================

    They tell deliveries of one message apart from other messages; a producer that sends twice makes two messages. A key
    of the business in the message, chosen by :func:`jmespath_key`, covers that too. Of a batch, each record has a key of
    its own: give the record.

    For an HTTP API ``idempotent_api`` is the better choice: it also compares the request, and answers what is refused.

    Raises:
        InvalidKeyError: an event of another source, a batch, or one that lacks what its key is made of; a header that
            is malformed, or sent by nobody.
        ConfigurationError: an event of ALB, which names no principal.
    """
    if not isinstance(event, Mapping):
        raise InvalidKeyError(
            f"an event must be an object, not {type(event).__name__}; choose the key with jmespath_key"
        )
    given = cast("Mapping[str, Any]", event)
    records = given.get("Records")
    if isinstance(records, list):
        found: list[Any] = cast("Any", records)
        if len(found) != 1 or not isinstance(found[0], Mapping):
            source = _source(found[0]) if found else None
            more = MANY.get(str(source), "give each of them its own")
            raise InvalidKeyError(f"a batch of {len(found)} records has no single key; {more}")
        return _record_key(cast("Mapping[str, Any]", found[0]))
    if "requestContext" in given:
        return _http_key(given)
    if "detail-type" in given:
        return _text(given, "id")
    return _record_key(given)


def jmespath_key(expression: str) -> Callable[..., Any]:
    """Return a function of event (and context) for ``key=``, that gives the part which a JMESPath expression chooses.

    ::

        @idem.idempotent(key=jmespath_key("powertools_json(body).order_id"))
        async def handler(event, context): ...

        await process_sqs(event, context, one, idem=idem, key=jmespath_key("powertools_json(body).order_id"))

    JMESPath's own functions are there, and Powertools' ``powertools_json``, ``powertools_base64`` and
    ``powertools_base64_gzip``. Of an expression that chooses several parts, ``"[tenant, order_id]"``, none may be
    missing: two events that lack the same part would be one. A key that is missing is what ``missing_key`` decides about.

    What the function gives for an event that the expression cannot be evaluated on is an ``InvalidKeyError``.

    Raises:
        ConfigurationError: jmespath is missing (the extra ``jmespath``), or the expression is none.
    """
    evaluate = evaluator(expression)

    def key(event: Any, context: object = None) -> Any:  # noqa: ARG001 - the signature of a handler
        part = evaluate(event)
        whole: Any = part
        parts: Any = whole.values() if isinstance(part, dict) else whole if isinstance(part, list) else ()
        return None if any(one is None or one == "" for one in parts) else whole

    return key


def _http_key(event: Mapping[str, Any]) -> str | None:
    request = read_request(event)
    try:
        key = parse_key(request.lines("idempotency-key"), strict=False)
    except MalformedKeyError as error:
        raise InvalidKeyError(f"the header Idempotency-Key is malformed: {error}") from None
    if key is None:
        return None
    principal = caller(event)
    if principal is None:
        raise InvalidKeyError(
            "the event names nobody who sent its Idempotency-Key, and no two may share one; authenticate the route, or "
            "name them with idempotent_api(idem, principal=...)"
        )
    return digest(json.dumps([principal, request.method, request.route, key]))


def _record_key(record: Mapping[str, Any]) -> str:
    source = _source(record)
    if source == "aws:sqs":
        return _text(record, "messageId")
    if source == "aws:sns":
        return _text(record.get("Sns"), "MessageId")
    if source in ("aws:kinesis", "aws:dynamodb"):
        return qualify(_text(record, "eventSourceARN"), _text(record, "eventID"))
    what = "its source is unknown" if source is None else f"its source is {source!r}"
    raise InvalidKeyError(f"no key is known for this event: {what}; choose it with jmespath_key")


def _source(record: Any) -> object:
    if not isinstance(record, Mapping):
        return None
    found = cast("Mapping[str, Any]", record)
    return found.get("eventSource") or found.get("EventSource")


def _text(part: Any, name: str) -> str:
    value = cast("Mapping[str, Any]", part).get(name) if isinstance(part, Mapping) else None
    if not isinstance(value, str) or not value:
        raise InvalidKeyError(f"the event has no {name} that is text; choose the key with jmespath_key")
    return value
