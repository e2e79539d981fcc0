"""Keys of events: the same when Lambda delivers an event again, and another one for another event."""

from typing import Any

import pytest

from asyncidem import ConfigurationError, Idempotency, InvalidKeyError, MemoryStore, MissingKeyError
from asyncidem.integrations.aws_lambda import event_key, jmespath_key

from invocations import alb_event, rest_event, sqs_event, v2_event

STREAM = "arn:aws:kinesis:eu-central-1:123456789012:stream/orders"
TABLE = "arn:aws:dynamodb:eu-central-1:123456789012:table/orders/stream/2026-01-01T00:00:00.000"


def sns_event(name: str = "m-1") -> dict[str, Any]:
    """Return an event of SNS."""
    return {"Records": [{"EventSource": "aws:sns", "Sns": {"MessageId": name, "Message": "{}"}}]}


def stream_event(source: str = "aws:kinesis", arn: str = STREAM, name: str = "shardId-0:1") -> dict[str, Any]:
    """Return an event of a stream with one record."""
    return {"Records": [{"eventSource": source, "eventSourceARN": arn, "eventID": name}]}


@pytest.mark.parametrize(
    ("event", "key"),
    [
        (sqs_event("m-1"), "m-1"),
        (sns_event(), "m-1"),
        ({"id": "e-1", "detail-type": "Order", "source": "shop", "detail": {}}, "e-1"),
        (stream_event(), f"{STREAM.replace(':', '%3A')}:shardId-0:1"),
        (stream_event("aws:dynamodb", TABLE, "c4ca42"), f"{TABLE.replace(':', '%3A')}:c4ca42"),
    ],
    ids=["SQS", "SNS", "EventBridge", "Kinesis", "DynamoDB"],
)
def test_an_event_and_its_single_record_have_one_key(event: dict[str, Any], key: str) -> None:
    """It is what the source calls the message, and no more: what changes with a delivery is no part of it."""
    assert event_key(event) == event_key(event, object()) == key
    if "Records" in event:
        (record,) = event["Records"]
        assert event_key(record) == event_key({**record, "receiptHandle": "other"}) == key


def test_records_of_two_streams_are_two() -> None:
    """A shard and a sequence number are unique in their stream only."""
    assert event_key(stream_event()) != event_key(stream_event(arn=f"{STREAM}-2"))


@pytest.mark.parametrize(
    ("event", "remedy"),
    [
        (sqs_event("m-1", "m-2"), "a batch of 2 records has no single key; process_sqs gives each"),
        (
            {"Records": [*stream_event()["Records"]] * 3},
            r"a batch of 3 .* give each of them its own: idem\.run\(event_key",
        ),
        ({"Records": []}, "a batch of 0 records has no single key; give each"),
        ({"Records": [1]}, "a batch of 1 records"),
        ({"Records": [{"eventSource": "aws:s3"}]}, "its source is 'aws:s3'; choose it with jmespath_key"),
        ({"order_id": 1}, "its source is unknown"),
        ({"Records": "many"}, "its source is unknown"),
        (["a"], "an event must be an object, not list"),
        ({"detail-type": "Order"}, "has no id that is text"),
        (sns_event(""), "has no MessageId that is text"),
        ({"EventSource": "aws:sns", "Sns": 1}, "has no MessageId that is text"),
        ({"eventSource": "aws:sqs", "messageId": 7}, "has no messageId that is text"),
        ({"eventSource": "aws:kinesis", "eventID": "1"}, "has no eventSourceARN that is text"),
    ],
)
def test_what_has_no_key_is_refused(event: Any, remedy: str) -> None:
    """The error says why, and what to do."""
    with pytest.raises(InvalidKeyError, match=remedy):
        event_key(event)


class TestHTTP:
    """The key of an HTTP event is the client's, and belongs to whoever sent it, method and route."""

    @pytest.mark.parametrize("make", [v2_event, rest_event])
    def test_a_key_belongs_to_principal_method_and_route(self, make: Any) -> None:
        """What differs in one of the three has another key; body and path are not in it."""
        key = event_key(make("k"))
        assert key is not None
        assert len(key) == 32
        assert event_key(make('"k"', body="other")) == key
        others = [
            make("other"),
            make("k", method="PATCH"),
            make("k", requestContext=make("k")["requestContext"] | {"authorizer": {"principalId": "bob"}}),
        ]
        assert len({key, *map(event_key, others)}) == 4

    def test_no_header_is_no_key(self) -> None:
        """`missing_key` decides then."""
        assert event_key(v2_event()) is None

    def test_a_malformed_header_is_refused(self) -> None:
        """As by the guard; HTTP APIs join several lines to one."""
        with pytest.raises(InvalidKeyError, match="malformed"):
            event_key(v2_event("a,b"))

    def test_nobody_has_no_key(self) -> None:
        """No two clients may share one."""
        with pytest.raises(InvalidKeyError, match="names nobody"):
            event_key(v2_event("k", requestContext={"http": {"method": "POST"}}))
        with pytest.raises(ConfigurationError, match="ALB names no principal"):
            event_key(alb_event("k"))


class TestJMESPath:
    """A part of the event that an expression chooses."""

    def test_a_part_is_the_key(self) -> None:
        """Of an event, with or without its context, and of a record."""
        key = jmespath_key("powertools_json(body).order_id")
        assert key(v2_event(body='{"order_id": "o-1"}'), object()) == "o-1"
        assert key(sqs_event("m-1")["Records"][0]) == "m-1"

    @pytest.mark.parametrize(
        ("expression", "part"),
        [
            ("a", 1),
            ("[a, b]", [1, "x"]),
            ("{a: a, b: b}", {"a": 1, "b": "x"}),
            ("missing", None),
            ("[a, missing]", None),
            ("{a: a, b: missing}", None),
            ("[a, empty]", None),
            ("zero", 0),
            ("[zero, a]", [0, 1]),
        ],
    )
    def test_of_several_parts_none_may_be_missing(self, expression: str, part: Any) -> None:
        """Two events that lack the same part would be one; 0 is a part."""
        assert jmespath_key(expression)({"a": 1, "b": "x", "empty": "", "zero": 0}) == part

    async def test_it_selects_the_key_of_a_handler(self) -> None:
        """The same part, the same operation; a missing one is refused."""
        calls: list[Any] = []
        idem = Idempotency(MemoryStore())

        @idem.idempotent(key=jmespath_key("[tenant, order]"))
        async def handler(event: Any, context: Any) -> int:
            calls.append(event)
            return len(calls)

        events = [{"tenant": "a", "order": 1}, {"tenant": "a", "order": 1, "at": 2}, {"tenant": "b", "order": 1}]
        assert [await handler(event, None) for event in events] == [1, 1, 2]
        with pytest.raises(MissingKeyError):
            await handler({"tenant": "a"}, None)

    def test_what_is_no_expression_is_refused_at_once(self) -> None:
        """And what it cannot be evaluated on, at the call."""
        with pytest.raises(ConfigurationError, match="no JMESPath expression"):
            jmespath_key("a[")
        with pytest.raises(InvalidKeyError, match="cannot be evaluated"):
            jmespath_key("powertools_json(body)")({"body": "{"})
