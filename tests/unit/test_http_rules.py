"""What a guard of HTTP endpoints decides: which requests, which key, what is stored, what is answered."""

import base64
import hashlib
import itertools
import json
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncidem import (
    CodecError,
    CompletionError,
    ConfigurationError,
    FingerprintMismatchError,
    Idempotency,
    InProgressError,
    LeaseLostError,
    MemoryStore,
    ResultUnavailableError,
    StoreError,
    StoreUnavailableError,
    WaitTimeoutError,
)
from asyncidem.integrations.http import (
    MIB,
    NOT_STORED,
    UNKEPT,
    Answer,
    AnswerCodec,
    Headers,
    HTTPFailure,
    NotCarriedOutError,
    Problem,
    ProblemError,
    Rules,
    multipart,
)

DOCS = "https://api.example.com/docs/idempotency"
ALICE = UUID(int=1)


def rules(*, idempotency: Idempotency | None = None, principal: Any = None, **options: Any) -> Rules[Any]:
    """Return rules over a request that is a plain object."""
    idempotency = idempotency or Idempotency(MemoryStore())
    return Rules(idempotency, principal=principal, required=options.pop("required", True), **options)


def refusal(caught: pytest.ExceptionInfo[ProblemError]) -> tuple[int, str]:
    """Return status and kind of a problem."""
    return caught.value.problem.status, caught.value.problem.kind


# -- options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"idempotency": 3}, r"idempotency must be an Idempotency such as Idempotency\(store\), not int"),
        ({"ttl": 3}, "unknown option 'ttl'; a guard has .*max_body.*; lease, ttl, .* are options of its Idempotency"),
        (
            {"principal": "alice"},
            "principal must be a function of the request, or None for a single client, not 'alice'",
        ),
        ({"required": 1}, "required must be True or False, not 1"),
        ({"strict": None}, "strict must be True or False, not None"),
        ({"store_cookies": "no"}, "store_cookies must be True or False, not 'no'"),
        ({"methods": "POST"}, "methods must be a collection such as .*, not 'POST'"),
        ({"methods": 3}, "methods must be a collection such as .*, not 3"),
        ({"methods": ["post"]}, "a method must be upper-case text such as 'POST', not 'post'"),
        ({"methods": ["PÖST"]}, "a method must be upper-case text"),
        ({"methods": [3]}, "a method must be upper-case text such as 'POST', not 3"),
        ({"max_body": -1}, "max_body must be a number of bytes, not -1"),
        ({"max_body": True}, "max_body must be a number of bytes, not True"),
        ({"max_response": 1.5}, "max_response must be a number of bytes, not 1.5"),
        ({"should_store": 200}, "should_store must be a plain function of a status, not 200"),
        ({"fingerprint": "body"}, "fingerprint must be a plain function of request and body, not 'body'"),
        ({"documentation_url": ""}, "documentation_url must be an absolute http"),
        ({"documentation_url": "/docs"}, "documentation_url must be an absolute http"),
        ({"documentation_url": "ftp://x/y"}, "documentation_url must be an absolute http"),
        ({"documentation_url": "https:///y"}, "documentation_url must be an absolute http"),
        ({"documentation_url": "https://x/y#z"}, "documentation_url must be an absolute http"),
        ({"documentation_url": "https://x/y z"}, "documentation_url must be an absolute http"),
        ({"documentation_url": 'https://x/">'}, "documentation_url must be an absolute http"),
        ({"documentation_url": "https://x/\r\ny"}, "documentation_url must be an absolute http"),
        ({"documentation_url": "https://ex.example/ä"}, "documentation_url must be an absolute http"),
        ({"documentation_url": "http://["}, "documentation_url must be an absolute http"),
        ({"documentation_url": b"https://x/y"}, "documentation_url must be an absolute http"),
        ({"wait": 0}, "wait .*must be"),
        ({"wait": True}, "wait .*must be"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    """When the guard is made, with an error that names the value and says what there should be."""
    given_ = {"idempotency": Idempotency(MemoryStore()), "principal": None, "required": True, **options}
    idempotency = given_.pop("idempotency")
    with pytest.raises(ConfigurationError, match=message):
        Rules(idempotency, **given_)


def test_coroutine_functions_where_plain_ones_belong_are_refused() -> None:
    """A status and a body are judged without waiting."""

    async def later(*_: object) -> Any:
        raise NotImplementedError

    with pytest.raises(ConfigurationError, match="should_store must be a plain function of a status"):
        rules(should_store=later)
    with pytest.raises(ConfigurationError, match="fingerprint must be a plain function of request and body"):
        rules(fingerprint=later)


def test_guarded_are_post_and_patch_unless_told_otherwise() -> None:
    """Methods are case-sensitive."""
    default = rules()
    assert [method for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "post") if default.guards(method)] == [
        "POST",
        "PATCH",
    ]
    other = rules(methods={"PUT"})
    assert other.guards("PUT")
    assert not other.guards("POST")
    assert not rules(methods=()).guards("POST")


@pytest.mark.parametrize("wait", [None, 2, timedelta(seconds=2)])
@pytest.mark.parametrize("whole", [None, 3])
def test_duplicates_wait_if_the_guard_or_its_idempotency_says_so(whole: float | None, wait: Any) -> None:
    """The guard's own wait comes first; None is what the idempotency has."""
    guarded = rules(idempotency=Idempotency(MemoryStore(), wait=whole), wait=wait)
    assert guarded.waits is (whole is not None or wait is not None)
    expected = 2 if wait is not None else whole
    assert guarded.operation(None, "POST", "/", "k", "m")._options.wait == expected


# -- the key -------------------------------------------------------------------------------------------------------------


def test_keys_are_parsed_before_anything_is_looked_up() -> None:
    """A malformed one is 400, and its detail says what is wrong."""
    guarded = rules()
    assert guarded.key(['"a"']) == guarded.key(["a"]) == "a"
    assert guarded.key([]) is None
    with pytest.raises(ProblemError, match="Idempotency-Key is malformed: the value must be") as caught:
        guarded.key(["a b"])
    assert refusal(caught) == (400, "malformed-key")
    with pytest.raises(ProblemError) as caught:
        rules(strict=True).key(["a"])
    assert refusal(caught) == (400, "malformed-key")


def test_a_missing_key_and_a_long_body_have_problems() -> None:
    """They say what to send, and how much."""
    problem = rules().missing().problem
    assert (problem.status, problem.kind, problem.retry_after) == (400, "missing-key", None)
    assert "send a unique Idempotency-Key" in problem.detail
    problem = rules(max_body=12).too_large().problem
    assert (problem.status, problem.kind, problem.retry_after) == (413, "content-too-large", None)
    assert "12 bytes" in problem.detail


async def test_a_principal_is_found_by_a_plain_function_or_a_coroutine_function() -> None:
    """It gets the request, and is text in the end."""

    async def later(request: dict[str, Any]) -> Any:
        return request["user"]

    for principal in (later, lambda request: request["user"]):
        guarded = rules(principal=principal)
        assert await guarded.principal_of({"user": "alice"}) == "alice"
        assert await guarded.principal_of({"user": 0}) == "0"
        assert await guarded.principal_of({"user": ALICE}) == str(ALICE)
    assert await rules(principal=None).principal_of({}) is None


@pytest.mark.parametrize("nobody", [None, ""])
async def test_nobody_is_refused(nobody: Any) -> None:
    """Not put into a space of keys that all of them share."""
    with pytest.raises(ProblemError) as caught:
        await rules(principal=lambda _: nobody).principal_of({})
    assert refusal(caught) == (403, "no-principal")


@pytest.mark.parametrize("found", [True, False, b"alice", 1.5, ["alice"], object()])
async def test_what_names_nobody_for_sure_is_a_mistake(found: Any) -> None:
    """The address of an object would be another one at the next request; True is anybody who is logged in."""
    with pytest.raises(ConfigurationError, match=f"not {type(found).__name__}: name the client by what stays the same"):
        await rules(principal=lambda _: found).principal_of({})


def test_another_principal_method_route_or_key_is_another_operation() -> None:
    """They are joined without ambiguity, hashed, and the same at each request."""
    guarded = rules(idempotency=Idempotency(MemoryStore(), namespace="shop"))
    parts = ["", "a", "b", '","', "POST", "/a/{b}", "None", "null"]
    keys = {
        guarded.operation(principal, method, route, key, "m").key
        for principal, method, route, key in itertools.product([*parts, None], parts, parts, parts)
    }
    assert len(keys) == 9 * 8**3
    assert all(key.startswith("shop:") and len(key) <= 70 for key in keys)
    again = guarded.operation("a", "POST", "/x", "k", "other")
    assert again.key == guarded.operation("a", "POST", "/x", "k", "m").key
    assert again.name == "POST /x"


# -- the fingerprint -----------------------------------------------------------------------------------------------------


def mark(guarded: Rules[Any], **parts: Any) -> object:
    """Return the mark of a request, of which some parts are given."""
    whole: dict[str, Any] = {"method": "POST", "path": "/items/1", "query": "", "content_type": "a/b", "body": b"{}"}
    whole.update(parts)
    return guarded.mark({"request": 1}, **whole)


def test_method_path_query_type_and_body_must_be_equal() -> None:
    """The concrete path, not its template; of the content type only the essence."""
    guarded = rules()
    first = mark(guarded)
    for part, other in [
        ("method", "PATCH"),
        ("path", "/items/2"),
        ("query", "a=1"),
        ("content_type", "a/c"),
        ("body", b"{} "),
        ("body", b""),
    ]:
        assert mark(guarded, **{part: other}) != first, part
    assert mark(guarded, content_type=" A/B ; charset=utf-8") == first
    assert mark(guarded, path="/\x00\udcff") != mark(guarded, path="/\x00\udcfe")
    assert "card" not in str(mark(guarded, body=b"card"))


def test_of_multipart_the_body_does_not_count() -> None:
    """An honest retry has another boundary."""
    guarded = rules()
    parts = [{"content_type": f"Multipart/Form-Data; boundary={n}", "body": b"%d" % n} for n in (1, 2)]
    assert mark(guarded, **parts[0]) == mark(guarded, **parts[1])
    assert mark(guarded, **parts[0]) != mark(guarded, **parts[0], query="a=1")
    assert multipart(" multipart/form-data; boundary=x")
    assert not multipart("application/x-multipart/")


def test_a_function_chooses_what_must_be_equal() -> None:
    """It gets request and body; text and bytes of the same content are one."""
    seen: list[Any] = []

    def choose(request: Any, body: bytes) -> str | bytes:
        seen.append((request, body))
        return body if body.startswith(b"b") else body.decode()

    guarded = rules(fingerprint=choose)
    assert mark(guarded, body=b"abc", path="/x") == mark(guarded, body=b"abc", path="/y") == b"abc"
    assert mark(guarded, body=b"bcd") == b"bcd"
    assert seen[0] == ({"request": 1}, b"abc")
    assert mark(rules(fingerprint=lambda *_: "\udcff")) == b"\xed\xb3\xbf"  # what a path may hold
    with pytest.raises(ConfigurationError, match="fingerprint must give text or bytes, not NoneType"):
        mark(rules(fingerprint=lambda *_: None))


async def test_marks_are_fingerprinted_with_the_secret_of_the_idempotency() -> None:
    """What is stored of a body is a digest, or with a secret an HMAC."""
    plain, secret = (
        rules(idempotency=Idempotency(MemoryStore(), fingerprint_secret=given_)) for given_ in (None, "secret")
    )
    marks = [guarded.operation("a", "POST", "/", "k", mark(guarded))._fingerprint for guarded in (plain, secret)]
    assert marks[0] != marks[1]
    assert hashlib.sha256(b"{}").hexdigest() not in str(marks)


# -- what is stored ------------------------------------------------------------------------------------------------------


def test_deterministic_answers_are_stored_and_failures_are_failures() -> None:
    """All other statuses release the key."""
    guarded = rules()
    for status in range(100, 600):
        if status >= 500:
            expected = "fail"
        elif 200 <= status < 300 or (status >= 400 and status not in NOT_STORED):
            expected = "store"
        else:
            expected = "release"
        assert guarded.verdict(status) == expected, status
    released = [401, 403, 404, 405, 406, 408, 413, 415, 421, 423, 425, 429, 100, 103, 301, 302, 304, 307]
    assert {guarded.verdict(status) for status in released} == {"release"}
    assert {guarded.verdict(status) for status in (200, 201, 204, 400, 402, 409, 410, 422, 451)} == {"store"}


def test_should_store_overrides() -> None:
    """A status that it refuses releases the key, or is a failure from 500 on."""
    guarded = rules(should_store=lambda status: status in (404, 503))
    assert [guarded.verdict(status) for status in (404, 503, 200, 500, 302)] == [
        "store",
        "store",
        "release",
        "fail",
        "release",
    ]
    with pytest.raises(ConfigurationError, match="should_store must give True or False, not 1"):
        rules(should_store=lambda _: 1).verdict(200)


def test_on_failure_decides_about_failures_only() -> None:
    """What was not carried out is released, whatever it says; a function gets the exception, or the status."""
    seen: list[object] = []

    def decide(error: Exception) -> Any:
        seen.append(error)
        return "keep"

    for given_ in ("keep", decide):
        guarded = rules(idempotency=Idempotency(MemoryStore(), on_failure=given_))
        assert guarded._choice(guarded.failure(503, "fail")) == "keep"
        assert guarded._choice(guarded.failure(302, "release")) == "release"
        assert guarded._choice(NotCarriedOutError()) == "release"
    (failure,) = seen
    assert isinstance(failure, HTTPFailure)
    assert failure.status == 503
    assert str(failure) == "the endpoint answered 503"
    assert rules()._choice(ValueError()) == "release"


def test_large_and_encoded_answers_cannot_be_kept() -> None:
    """Whatever their status; an encoding that is none is no obstacle."""
    guarded = rules(max_response=3)
    assert guarded.kept(200, [], b"abc") == Answer(200, [], b"abc")
    assert guarded.kept(200, [], b"abcd") is UNKEPT
    assert guarded.kept(200, [(b"Content-Encoding", b"gzip")], b"abc") is UNKEPT
    identity: Headers = [(b"content-encoding", b" Identity")]
    assert guarded.kept(200, identity, b"").headers == identity
    assert guarded.keepable([(b"content-encoding", b"")], 0)
    assert rules().keepable([], MIB)
    assert not rules().keepable([], MIB + 1)


def test_headers_of_one_connection_or_moment_are_not_stored() -> None:
    """Nor cookies, unless they are asked for, nor what CORS says to one origin; all others are, as they were."""
    kept: Headers = [
        (b"X-Name", b"caf\xe9"),
        (b"x-name", b"caf\xc3\xa9"),
        (b"Content-Type", b"text/plain"),
        (b"age", b"1"),
    ]
    cookies: Headers = [(b"Set-Cookie", b"a=1"), (b"set-cookie", b"b=2")]
    dropped: Headers = [
        (b"Connection", b"close, X-Hop ,"),
        (b"x-hop", b"1"),
        (b"Keep-Alive", b"timeout=5"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Upgrade", b"h2c"),
        (b"TE", b"x"),
        (b"Trailer", b"x"),
        (b"Proxy-Authenticate", b"x"),
        (b"Proxy-Authorization", b"x"),
        (b"Proxy-Connection", b"x"),
        (b"Date", b"Mon"),
        (b"Server", b"x"),
        (b"Content-Length", b"2"),
        (b"Idempotent-Replayed", b"true"),
        (b"Access-Control-Allow-Origin", b"*"),
    ]
    headers = [*kept[:2], *dropped, *cookies, *kept[2:]]
    assert rules().kept(201, headers, b"ok") == Answer(201, kept, b"ok")
    with_cookies = rules(store_cookies=True).kept(201, headers, b"ok").headers
    assert with_cookies == [*kept[:2], *cookies, *kept[2:]]


def test_answers_have_the_length_that_they_have() -> None:
    """None where there may be no body; a replay says that it is one."""
    answer = Answer(201, [(b"a", b"b")], b"ok")
    assert answer.lines() == [(b"a", b"b"), (b"content-length", b"2")]
    assert answer.lines(replayed=True)[-1] == (b"idempotent-replayed", b"true")
    assert answer.headers == [(b"a", b"b")]
    for status in (204, 205, 304):
        assert Answer(status, [], b"").lines(replayed=True) == [(b"idempotent-replayed", b"true")]


# -- how it is stored ----------------------------------------------------------------------------------------------------

token = st.text("abcxyzABC-", min_size=1).map(str.encode)
answers = st.builds(
    Answer, st.integers(200, 599), st.lists(st.tuples(token, st.binary())), st.binary() | st.text().map(str.encode)
)


@given(answers)
def test_answers_come_back_as_they_were(answer: Answer) -> None:
    """Status, header bytes in their order, and the bytes of the body, whatever they are."""
    codec = AnswerCodec()
    assert codec.decode(codec.encode(answer), Any) == answer


def test_stored_answers_can_be_read() -> None:
    """Text is text in the store, and anything else base64."""
    codec = AnswerCodec()
    text = codec.encode(Answer(201, [(b"a", b"\xe9")], "é".encode()))
    assert json.loads(text) == {"status": 201, "headers": [["a", "é"]], "body": "é"}
    assert json.loads(codec.encode(Answer(200, [], b"\xff")))["base64"] == base64.b64encode(b"\xff").decode()


@pytest.mark.parametrize("value", [UNKEPT, None, {"status": 200}, (200, [], b"")])
def test_what_cannot_be_kept_has_no_text(value: object) -> None:
    """The operation completes without a result."""
    with pytest.raises(CodecError, match="cannot be kept"):
        AnswerCodec().encode(value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "3", "null", "[]", "{}", '{"status": 200}', '{"status": 200, "headers": []}', "[" * 100_000),
        '{"status": 200, "headers": [], "base64": "a"}',
        '{"status": 200, "headers": [], "base64": "ä"}',
        '{"status": 200, "headers": [], "body": 3}',
        '{"status": 200, "headers": [], "body": "\\udcff"}',
        '{"status": null, "headers": [], "body": ""}',
        '{"status": "x", "headers": [], "body": ""}',
        '{"status": Infinity, "headers": [], "body": ""}',
        '{"status": 200, "headers": [["a"]], "body": ""}',
        '{"status": 200, "headers": [["a", 3]], "body": ""}',
        '{"status": 200, "headers": [["a", "\\u20ac"]], "body": ""}',
        '{"status": 200, "headers": 3, "body": ""}',
    ],
)
def test_what_is_no_answer_is_not_replayed(text: str) -> None:
    """A record of something else under the key is an error, which does not show what it holds."""
    with pytest.raises(CodecError, match="the stored result is no HTTP response") as caught:
        AnswerCodec().decode(text, Any)
    assert caught.value.__cause__ is None


# -- what is answered ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (FingerprintMismatchError("k"), 422, "key-reused", None),
        (InProgressError("k", 1.2), 409, "in-progress", 2),
        (InProgressError("k", 0), 409, "in-progress", 1),
        (InProgressError("k", 30), 409, "in-progress", 30),
        (WaitTimeoutError("k", 0.2), 409, "in-progress", 1),
        (LeaseLostError("k", "gone"), 409, "in-progress", 1),
        (ResultUnavailableError("k", "too_large"), 409, "response-not-kept", None),
        (CodecError("x"), 409, "response-not-kept", None),
        (StoreUnavailableError("down"), 503, "store-unavailable", 1),
        (StoreError("wrong type"), 503, "store-unavailable", 1),
        (CompletionError("k", None), 503, "store-unavailable", 1),
    ],
)
def test_every_refusal_is_a_problem(error: Any, status: int, kind: str, retry_after: int | None) -> None:
    """What can be repeated says when, in whole seconds; no key and nothing of the store's is told."""
    problem = rules().problem(error)
    assert (problem.status, problem.kind, problem.retry_after) == (status, kind, retry_after)
    assert "down" not in problem.detail


def test_problems_are_json_of_their_own_type() -> None:
    """With a URL where the API's use of the header is described, the type is there, and a link to it."""
    problem = Problem(409, "in-progress", "A title", "A detail.", 3)
    plain = problem.answer(None)
    assert plain.status == 409
    assert json.loads(plain.body) == {
        "type": "urn:asyncidem:in-progress",
        "title": "A title",
        "status": 409,
        "detail": "A detail.",
    }
    assert plain.headers == [
        (b"content-type", b"application/problem+json"),
        (b"cache-control", b"no-store"),
        (b"retry-after", b"3"),
    ]
    linked = rules(documentation_url=DOCS)
    answer = linked.missing().problem.answer(linked.documentation_url)
    assert json.loads(answer.body)["type"] == f"{DOCS}#missing-key"
    assert (b"link", f'<{DOCS}>; rel="describedby"'.encode()) in answer.headers
    assert b"retry-after" not in dict(answer.headers)
