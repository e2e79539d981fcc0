"""HTTP APIs on Lambda: the rules of every transport, in the forms of API Gateway and ALB."""

import asyncio
import base64
import json
from typing import Any

import pytest

from asyncidem import (
    ConfigurationError,
    Idempotency,
    InvalidKeyError,
    MemoryStore,
    StoreUnavailableError,
    current_operation,
)
from asyncidem.integrations.aws_lambda import DeadlineExceededError, HTTPFailure, idempotent_api, lambda_handler
from asyncidem.integrations.aws_lambda.api import response
from asyncidem.integrations.aws_lambda.events import read_request
from asyncidem.integrations.http import Answer
from asyncidem.testing import FaultyStore

from invocations import Context, alb_event, rest_event, sqs_event, v2_event

PNG = b"\x89PNG\r\n\x1a\n\xff"


class API:
    """A guarded handler that answers with `answer` and counts its calls."""

    def __init__(self, answer: Any, store: Any = None, *, idem: Idempotency | None = None, **options: Any) -> None:
        self.answer = answer
        self.calls = 0
        self.store = store or MemoryStore()
        self.idem = idem or Idempotency(self.store)

        @idempotent_api(self.idem, **options)
        async def handler(event: Any, context: Any) -> Any:
            self.calls += 1
            if isinstance(self.answer, BaseException):
                raise self.answer
            return self.answer(event) if callable(self.answer) else self.answer

        self.handler = handler

    async def __call__(self, event: Any) -> Any:
        return await self.handler(event, Context())


def header(answer: Any, name: str) -> Any:
    """Return a header of an answer, whatever its case."""
    return {key.lower(): value for key, value in answer["headers"].items()}.get(name)


def replayed(answer: Any) -> bool:
    """Say whether an answer is said to be a replay."""
    headers = {name.lower(): value for name, value in (answer.get("headers") or answer["multiValueHeaders"]).items()}
    return headers.get("idempotent-replayed") in ("true", ["true"])


def kind(answer: Any) -> tuple[int, str]:
    """Return status and kind of a problem."""
    assert header(answer, "content-type") == "application/problem+json"
    assert header(answer, "cache-control") == "no-store"
    body = json.loads(answer["body"])
    assert body["status"] == answer["statusCode"]
    return answer["statusCode"], body["type"].removeprefix("urn:asyncidem:")


MAKERS = [
    v2_event,
    rest_event,
    alb_event,
    lambda *args, **more: alb_event(*args, multi=True, **more),
]
FORMS = pytest.mark.parametrize("make", MAKERS, ids=["v2", "v1", "alb", "alb-multi"])


class TestReplay:
    """A retry gets the first answer."""

    @FORMS
    async def test_status_headers_and_body_come_again(self, make: Any) -> None:
        """In the form of its gateway, with `Idempotent-Replayed`; the first answer is what the handler returned."""
        headers = {"Content-Type": "text/plain; charset=utf-8", "X-Name": "café"}
        answer = {
            "statusCode": 201,
            "headers": headers,
            "multiValueHeaders": {name: [v] for name, v in headers.items()},
            "body": "ü",
        }
        api = API(answer, principal=lambda _: "alice")
        assert await api(make("k")) == answer
        again = await api(make('"k"'))
        assert api.calls == 1
        assert (again["statusCode"], again["body"], again["isBase64Encoded"]) == (201, "ü", False)
        if "multiValueHeaders" in make("k") and "elb" in make("k")["requestContext"]:
            assert again["multiValueHeaders"] == {name: [v] for name, v in headers.items()} | {
                "idempotent-replayed": ["true"]
            }
            assert "headers" not in again
        else:
            assert again["headers"] == headers | {"idempotent-replayed": "true"}

    @FORMS
    @pytest.mark.parametrize("content", [PNG, b"text"])
    async def test_a_body_in_base64_comes_again_in_base64(self, make: Any, content: bytes) -> None:
        """Text too: a REST API without binary media types sends it as it is."""
        answer = {"statusCode": 200, "headers": {}, "body": base64.b64encode(content).decode(), "isBase64Encoded": True}
        api = API(answer, principal=None)
        assert await api(make("k")) == answer
        again = await api(make("k"))
        assert (again["body"], again["isBase64Encoded"]) == (answer["body"], True)
        assert replayed(again)
        assert api.calls == 1

    async def test_text_that_is_no_utf_8(self) -> None:
        """A lone surrogate, which JSON may hold, comes again as a question mark."""
        api = API({"statusCode": 200, "body": "\ud800"})
        await api(v2_event("k"))
        assert (await api(v2_event("k")))["body"] == "?"

    def test_bytes_that_another_transport_has_stored(self) -> None:
        """What is no text is given in Base64."""
        answer = response(read_request(v2_event("k")), Answer(200, [], PNG))
        assert (answer["body"], answer["isBase64Encoded"]) == (base64.b64encode(PNG).decode(), True)

    @pytest.mark.parametrize("result", [{"id": 1}, [1], "text", None, 7])
    async def test_a_result_without_status_is_given_its_form(self, result: Any) -> None:
        """HTTP APIs take it for JSON with status 200: both answers say so."""
        api = API(result)
        body = result if isinstance(result, str) else json.dumps(result)
        answer = {
            "statusCode": 200,
            "headers": {"content-type": "application/json"},
            "body": body,
            "isBase64Encoded": False,
        }
        assert await api(v2_event("k")) == answer
        again = await api(v2_event("k"))
        assert again == answer | {"headers": answer["headers"] | {"idempotent-replayed": "true"}}  # type: ignore[operator]
        assert api.calls == 1

    async def test_repeated_headers_come_again(self) -> None:
        """REST APIs have them in `multiValueHeaders`, which is merged with `headers`; HTTP APIs join them."""
        several = {
            "statusCode": 200,
            "headers": {"A": "1", "B": "1"},
            "multiValueHeaders": {"A": ["1", "2"]},
            "body": "",
        }
        api = API(several)
        await api(rest_event("k"))
        again = await api(rest_event("k"))
        assert again["multiValueHeaders"] == {"A": ["1", "2"], "B": ["1"], "idempotent-replayed": ["true"]}
        joined = API({"statusCode": 200, "headers": {"a": "1", "A": "2"}, "body": ""})
        await joined(v2_event("k"))
        assert (await joined(v2_event("k")))["headers"] == {"a": "1", "A": "2", "idempotent-replayed": "true"}

    @pytest.mark.parametrize("store_cookies", [False, True])
    async def test_cookies_come_again_if_asked_for(self, store_cookies: bool) -> None:
        """HTTP APIs have them in a list of their own."""
        api = API({"statusCode": "200", "cookies": ["a=1", "b=2"], "body": None}, store_cookies=store_cookies)
        await api(v2_event("k"))
        again = await api(v2_event("k"))
        assert again.get("cookies") == (["a=1", "b=2"] if store_cookies else None)
        assert (again["statusCode"], again["body"]) == (200, "")

    async def test_unguarded_methods_and_requests_without_key_pass(self) -> None:
        """No store call, no operation."""
        faulty = FaultyStore(MemoryStore())

        def answer(event: Any) -> Any:
            assert current_operation() is None
            return {"statusCode": 200}

        api = API(answer, faulty)
        for event in (v2_event("k", method="GET"), v2_event(), rest_event("k", method="PUT")):
            assert await api(event) == {"statusCode": 200}
        assert faulty.calls == []

    async def test_the_handler_knows_its_operation(self) -> None:
        """Labelled by method and route."""
        names: list[Any] = []

        def answer(event: Any) -> Any:
            op = current_operation()
            assert op is not None
            names.append(op.name)
            return {"statusCode": 200}

        for event in (v2_event("k"), rest_event("k"), alb_event("k")):
            await API(answer, principal=None)(event)
        await API(answer)(v2_event("k", routeKey="$default"))
        await API(answer)(rest_event("k", resource="/{proxy+}"))
        assert names == ["POST /items/{id}", "POST /items/{id}", "POST /items/1", "POST /items/1", "POST /items/1"]


class TestRefusals:
    """What is refused, with problem+json."""

    async def test_a_malformed_key(self) -> None:
        """Several lines too: HTTP APIs join them with commas."""
        api = API({"statusCode": 200})
        rest = rest_event("k")
        rest["multiValueHeaders"]["idempotency-KEY"] = ["k"]
        for event in (v2_event("a,b"), v2_event(""), rest):
            assert kind(await api(event)) == (400, "malformed-key")
        assert api.calls == 0

    async def test_a_missing_key_where_it_is_required(self) -> None:
        """Of guarded methods only."""
        api = API({"statusCode": 200}, required=True)
        assert kind(await api(v2_event())) == (400, "missing-key")
        assert await api(v2_event(method="GET")) == {"statusCode": 200}

    async def test_another_request(self) -> None:
        """Body, path, query and content type must be the same; an order of the query that changes does not matter."""
        api = API({"statusCode": 200})
        await api(v2_event("k"))
        for change in ({"body": "{} "}, {"rawPath": "/items/2"}, {"rawQueryString": "a=2"}):
            assert kind(await api(v2_event("k", **change))) == (422, "key-reused")
        api = API({"statusCode": 200}, principal=None)
        await api(alb_event("k"))
        assert replayed(await api(alb_event("k", queryStringParameters={"a": "1", "b": "2"})))
        assert kind(await api(alb_event("k", queryStringParameters=None))) == (422, "key-reused")
        await (api := API({"statusCode": 200}))(rest_event("k"))
        different = rest_event("k", multiValueQueryStringParameters={"a": ["2", "1"]})
        assert kind(await api(different)) == (422, "key-reused")

    async def test_in_base64_the_same_body_is_the_same(self) -> None:
        """What was sent counts, not how the gateway hands it over."""
        api = API({"statusCode": 200})
        await api(v2_event("k", body="{}"))
        assert replayed(await api(v2_event("k", body=base64.b64encode(b"{}").decode(), isBase64Encoded=True)))
        with pytest.raises(InvalidKeyError, match="marked as Base64, and is none"):
            await api(v2_event("k", body="a", isBase64Encoded=True))

    async def test_in_progress(self) -> None:
        """409 with Retry-After."""
        began, go_on = asyncio.Event(), asyncio.Event()
        idem = Idempotency(MemoryStore())

        @idempotent_api(idem)
        async def handler(event: Any, context: Any) -> Any:
            began.set()
            await go_on.wait()
            return {"statusCode": 200}

        first = asyncio.create_task(handler(v2_event("k"), Context()))
        await began.wait()
        answer = await handler(v2_event("k"), Context())
        assert kind(answer) == (409, "in-progress")
        assert 1 <= int(answer["headers"]["retry-after"]) <= 30
        go_on.set()
        assert await first == {"statusCode": 200}

    async def test_a_store_that_is_down(self) -> None:
        """503, and nothing ran."""
        faulty = FaultyStore(MemoryStore())
        faulty.fault("put_if_absent", before=StoreUnavailableError("down"))
        api = API({"statusCode": 200}, faulty)
        assert kind(await api(v2_event("k"))) == (503, "store-unavailable")
        assert api.calls == 0

    async def test_a_body_that_is_too_long(self) -> None:
        """413, of a request with a key."""
        api = API({"statusCode": 200}, max_body=3)
        assert kind(await api(v2_event("k", body="1234"))) == (413, "content-too-large")
        assert await api(v2_event(body="1234")) == {"statusCode": 200}
        assert await api(rest_event("k", body=None)) == {"statusCode": 200}

    async def test_alb_takes_problems_in_its_form(self) -> None:
        """With multi-value headers, where they are on."""
        api = API({"statusCode": 200}, principal=None, documentation_url="https://docs.example/keys")
        answer = await api(alb_event("", multi=True))
        assert answer["statusCode"] == 400
        assert answer["multiValueHeaders"]["content-type"] == ["application/problem+json"]
        assert answer["multiValueHeaders"]["link"] == ['<https://docs.example/keys>; rel="describedby"']


class TestPrincipal:
    """Nobody gets another's answer."""

    @pytest.mark.parametrize(
        "context",
        [
            {"authorizer": {"principalId": "alice"}},
            {"authorizer": {"lambda": {"principalId": "alice"}}},
            {"authorizer": {"jwt": {"claims": {"iss": "i", "sub": "alice"}}}},
            {"authorizer": {"claims": {"iss": "i", "sub": "alice"}}},
            {"authorizer": {"iam": {"userArn": "alice"}}},
            {"identity": {"userArn": "alice"}},
            {"identity": {"apiKeyId": "alice"}},
            {"identity": {"apiKey": "alice"}},
        ],
    )
    async def test_whoever_the_gateway_has_authenticated(self, context: dict[str, Any]) -> None:
        """Each sort of authorizer names its own; a retry of the same is replayed, that of another runs."""
        api = API(lambda _: {"statusCode": 200, "body": str(api.calls)})
        other = json.loads(json.dumps(context).replace("alice", "bob"))
        answers = [await api(rest_event("k", requestContext=one)) for one in (context, context, other)]
        assert [answer["body"] for answer in answers] == ["1", "1", "2"]

    async def test_one_cannot_pass_for_another(self) -> None:
        """A subject is one of its issuer, and no IAM identity."""
        api = API({"statusCode": 200})
        contexts = [
            {"authorizer": {"claims": {"iss": "i", "sub": "a"}}},
            {"authorizer": {"claims": {"iss": "j", "sub": "a"}}},
            {"authorizer": {"iam": {"userArn": "a"}}},
            {"authorizer": {"principalId": "a"}},
            {"identity": {"apiKey": "a"}},
        ]
        for context in contexts:
            await api(rest_event("k", requestContext=context))
        assert api.calls == len(contexts)

    async def test_the_first_in_the_order_counts(self) -> None:
        """Authorizer, JWT, IAM, API key."""
        api = API({"statusCode": 200})
        both = {"authorizer": {"principalId": "a"}, "identity": {"apiKey": "x"}}
        await api(rest_event("k", requestContext=both))
        assert replayed(await api(rest_event("k", requestContext={"authorizer": {"principalId": "a"}})))

    async def test_nobody_is_refused(self) -> None:
        """403, before any store call."""
        faulty = FaultyStore(MemoryStore())
        api = API({"statusCode": 200}, faulty)
        assert kind(await api(rest_event("k", requestContext={"identity": None}))) == (403, "no-principal")
        assert faulty.calls == []

    async def test_alb_has_none(self) -> None:
        """It must be written out, as a function or as None."""
        with pytest.raises(ConfigurationError, match="give idempotent_api principal="):
            await API({"statusCode": 200})(alb_event("k"))

        async def principal(event: Any) -> str:
            return event["headers"]["x-client"]  # type: ignore[no-any-return]

        api = API({"statusCode": 200}, principal=principal)
        event = alb_event("k")
        for client in ("a", "a", "b"):
            event["headers"]["x-client"] = client
            await api(event)
        assert api.calls == 2


class TestEndings:
    """What is stored, and what releases the key."""

    @pytest.mark.parametrize(
        ("status", "calls"), [(200, 1), (204, 1), (400, 1), (404, 2), (302, 2), (429, 2), (500, 2), (503, 2)]
    )
    async def test_a_status_decides(self, status: int, calls: int) -> None:
        """As for every transport."""
        api = API({"statusCode": status})
        answers = [await api(v2_event("k")) for _ in range(2)]
        assert answers[0] == {"statusCode": status}
        assert api.calls == calls

    @pytest.mark.parametrize(
        "answer",
        [
            "text",
            None,
            {"body": "no status"},
            {"statusCode": True},
            {"statusCode": "abc"},
            {"statusCode": 200, "body": {"a": 1}},
            {"statusCode": 200, "body": "a", "isBase64Encoded": True},
            {"statusCode": 200, "headers": ["x: 1"]},
            {"statusCode": 200, "headers": {"x": "\ud800"}},
            {"statusCode": 200, "multiValueHeaders": {"x": 1}},
        ],
    )
    async def test_what_is_no_answer_is_a_failure(self, answer: Any) -> None:
        """The gateway says 502 for it: `on_failure` gets that, and the handler's result goes on as it is."""
        errors: list[Any] = []
        idem = Idempotency(MemoryStore(), on_failure=lambda error: errors.append(error) or "release")  # type: ignore[func-returns-value]
        api = API(answer, idem=idem)
        assert [await api(rest_event("k")) for _ in range(2)] == [answer, answer]
        assert api.calls == 2
        assert [(type(error), error.status) for error in errors] == [(HTTPFailure, 502)] * 2

    async def test_a_result_that_is_no_json_is_a_failure(self) -> None:
        """The runtime client says so, and the key is free."""
        api = API({1, 2})
        assert await api(v2_event("k")) == {1, 2}
        await api(v2_event("k"))
        assert api.calls == 2

    async def test_an_exception_passes(self) -> None:
        """And releases the key."""
        api = API(ValueError("x"))
        for _ in range(2):
            with pytest.raises(ValueError, match="x"):
                await api(v2_event("k"))
        assert api.calls == 2

    async def test_an_answer_that_cannot_be_kept_goes_on(self) -> None:
        """Its retry is told so, and does not run."""
        api = API({"statusCode": 200, "headers": {"content-encoding": "gzip"}, "body": "x"})
        assert (await api(v2_event("k")))["body"] == "x"
        assert kind(await api(v2_event("k"))) == (409, "response-not-kept")
        assert api.calls == 1

    @pytest.mark.parametrize("answer", [None, ValueError("x"), "no answer", {"statusCode": 200}])
    async def test_a_lost_lease_is_told_instead(self, answer: Any) -> None:
        """Whoever replaced this owner answers for the key, however the handler ends when it is cancelled for that."""
        store = MemoryStore()

        @idempotent_api(Idempotency(store, lease=0.03))
        async def handler(event: Any, context: Any) -> Any:
            op = current_operation()
            assert op is not None
            await store.delete(op.key)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if answer is None:
                    raise
                await asyncio.sleep(0)  # it goes on
                if isinstance(answer, Exception):
                    raise answer from None
                return answer

        assert kind(await handler(rest_event("k"), Context())) == (409, "in-progress")

    async def test_cut_off_it_is_what_on_cancel_decides_about(self) -> None:
        """Under the entry point."""
        idem = Idempotency(MemoryStore(), on_cancel="release")

        @lambda_handler
        @idempotent_api(idem)
        async def handler(event: Any, context: Any) -> Any:
            if context.get_remaining_time_in_millis() < 1_000:
                await asyncio.Event().wait()
            return {"statusCode": 200}

        with pytest.raises(DeadlineExceededError):
            await handler.aio(v2_event("k"), Context(0.5))
        assert await handler.aio(v2_event("k"), Context()) == {"statusCode": 200}


class TestArguments:
    """What it is given."""

    async def test_another_event_is_refused(self) -> None:
        """An event of SQS has no method and path."""
        with pytest.raises(ConfigurationError, match="no event of API Gateway, a function URL or ALB"):
            await API({"statusCode": 200})(sqs_event("a"))
        with pytest.raises(ConfigurationError, match="no event of API Gateway"):
            await API({"statusCode": 200})(None)

    def test_what_cannot_work_is_refused_at_decoration(self) -> None:
        """A plain function, an option, another object."""
        idem = Idempotency(MemoryStore())
        with pytest.raises(ConfigurationError, match="takes a coroutine function of event and context"):
            idempotent_api(idem)(lambda *_: None)  # type: ignore[arg-type, return-value]
        with pytest.raises(ConfigurationError, match="max_body"):
            idempotent_api(idem, max_body=-1)
        with pytest.raises(ConfigurationError, match="must be an Idempotency"):
            idempotent_api(MemoryStore())  # type: ignore[arg-type]
