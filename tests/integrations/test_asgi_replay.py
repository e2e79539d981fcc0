"""The ASGI middleware under uvicorn: what is guarded, what a retry gets, and what is refused."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from asyncidem import Event, Idempotency, MemoryStore, RedisStore, current_operation
from asyncidem.integrations.asgi import IdempotencyMiddleware
from asyncidem.testing import FaultyStore

from asgi_apps import Endpoint, json_response, respond
from web import raw, serving, stable

KEY = {"Idempotency-Key": '"order-1"'}
USER = {"X-User": "ada"}


def user(scope: Any) -> str:
    """Find the principal in a header."""
    return dict(scope["headers"]).get(b"x-user", b"").decode()


def guard(endpoint: Any, store: Any = None, *, principal: Any = None, **options: Any) -> IdempotencyMiddleware:
    """Guard an application over a store in memory."""
    idem = Idempotency(store or MemoryStore(), **{k: options.pop(k) for k in ("lease", "hooks") if k in options})
    return IdempotencyMiddleware(endpoint, idem, principal=principal, **options)


async def post(address: str, path: str = "/pay", **options: Any) -> httpx.Response:
    """Send one request on a connection of its own."""
    async with httpx.AsyncClient(base_url=address) as client:
        return await client.post(path, **options)


async def test_a_retry_gets_status_headers_and_bytes_of_the_first_answer() -> None:
    """The handler runs once; the second answer differs by Date, and by Idempotent-Replayed."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/plain"), (b"X-Name", "café".encode()), (b"x-two", b"1"), (b"x-two", b"2")]
        await respond(send, 201, headers, b"caf\xe9 \x00")

    endpoint = Endpoint(answer)
    async with serving(guard(endpoint)) as address, raw(address) as client:
        line = 'Idempotency-Key: "order-1"'
        first = await client.request("POST", "/pay", line, body=b"{}")
        second = await client.request("POST", "/pay", line, body=b"{}")
    assert (first.status, first.body) == (201, b"caf\xe9 \x00")
    assert (second.status, second.body) == (201, b"caf\xe9 \x00")
    assert second.all(b"x-name") == ["café".encode()]
    assert second.all(b"x-two") == [b"1", b"2"]
    assert second.all(b"content-length") == [b"6"]
    assert second.all(b"idempotent-replayed") == [b"true"]
    assert first.all(b"idempotent-replayed") == []
    assert len(endpoint.calls) == 1


@pytest.mark.parametrize("form", ["order-1", '"order-1"', '"order-1";version=2', ' \t"order-1" \t'])
async def test_all_forms_of_a_key_are_one_key(form: str) -> None:
    """Quotes, parameters and space around the value make no other key."""
    endpoint = Endpoint()
    async with serving(guard(endpoint)) as address, raw(address) as client:
        await client.request("POST", "/pay", "Idempotency-Key: order-1")
        again = await client.request("POST", "/pay", f"Idempotency-Key: {form}")
    assert again.all(b"idempotent-replayed") == [b"true"]
    assert len(endpoint.calls) == 1


@pytest.mark.parametrize(
    "lines", [["Idempotency-Key: a", "Idempotency-Key: a"], ["Idempotency-Key:"], ["Idempotency-Key: ü"]]
)
async def test_a_malformed_key_is_refused_before_anything_is_asked(lines: list[str]) -> None:
    """400, as problem+json, without a principal, a command of the store, or the handler."""
    endpoint = Endpoint()
    store = FaultyStore(MemoryStore())

    def nobody(scope: Any) -> str:
        raise AssertionError(scope)

    async with serving(guard(endpoint, store, principal=nobody)) as address, raw(address) as client:
        refused = await client.request("POST", "/pay", *lines)
    assert store.calls == []
    assert refused.status == 400
    assert refused.all(b"content-type") == [b"application/problem+json"]
    assert refused.all(b"cache-control") == [b"no-store"]
    problem = json.loads(refused.body)
    assert (problem["type"], problem["status"]) == ("urn:asyncidem:malformed-key", 400)
    assert endpoint.calls == []


async def test_a_key_that_is_required_and_missing() -> None:
    """400 with a link to the documentation where one is configured; no effect."""
    endpoint = Endpoint()
    url = "https://api.example/idempotency"
    async with serving(guard(endpoint, required=True, documentation_url=url)) as address:
        refused = await post(address)
        async with raw(address) as client:
            got = await client.request("GET", "/pay")
    assert refused.status_code == 400
    assert refused.json()["type"] == f"{url}#missing-key"
    assert refused.headers["link"] == f'<{url}>; rel="describedby"'
    assert got.status == 201, "GET is not guarded"
    assert [call["attempt"] for call in endpoint.calls] == [None]


async def test_without_a_key_nothing_is_guarded() -> None:
    """Two requests, two effects, and no command."""
    endpoint = Endpoint()
    store = FaultyStore(MemoryStore())
    async with serving(guard(endpoint, store)) as address:
        await post(address)
        await post(address)
    assert len(endpoint.calls) == 2
    assert store.calls == []


async def test_other_methods_pass() -> None:
    """PUT and GET with a key cost nothing; methods= chooses."""
    endpoint = Endpoint()
    store = FaultyStore(MemoryStore())
    async with serving(guard(endpoint, store)) as address, httpx.AsyncClient(base_url=address) as client:
        await client.put("/pay", headers=KEY)
        await client.get("/pay", headers=KEY)
        assert store.calls == []
    async with serving(guard(endpoint, methods=["PUT"])) as address, httpx.AsyncClient(base_url=address) as client:
        await client.put("/pay", headers=KEY)
        again = await client.put("/pay", headers=KEY)
    assert again.headers["idempotent-replayed"] == "true"


async def test_the_same_key_with_another_request() -> None:
    """422 where body, query or content type differ, while it runs and after; another path is another key."""
    endpoint = Endpoint()
    endpoint.hold.clear()
    async with serving(guard(endpoint)) as address:
        first = asyncio.create_task(post(address, json={"amount": 1}, headers=KEY))
        await endpoint.reached.wait()
        running = await post(address, json={"amount": 2}, headers=KEY)
        endpoint.hold.set()
        assert (await first).status_code == 201
        reused = [
            await post(address, json={"amount": 2}, headers=KEY),
            await post(address, "/pay?x=1", json={"amount": 1}, headers=KEY),
            await post(address, content=b'{"amount": 1}', headers=KEY | {"content-type": "text/plain"}),
        ]
        other = await post(address, "/refund", json={"amount": 1}, headers=KEY)
    assert [answer.status_code for answer in (running, *reused)] == [422] * 4
    assert running.json()["type"] == "urn:asyncidem:key-reused"
    assert other.status_code == 201
    assert len(endpoint.calls) == 2


async def test_a_fingerprint_of_the_users() -> None:
    """It alone says what has to be the same, and gets the scope and the body."""
    endpoint = Endpoint()
    seen: list[Any] = []

    def amount(scope: Any, body: bytes) -> str:
        seen.append(scope["path"])
        return str(json.loads(body)["amount"])

    async with serving(guard(endpoint, fingerprint=amount)) as address:
        await post(address, json={"amount": 1, "at": 1}, headers=KEY)
        same = await post(address, json={"amount": 1, "at": 2}, headers=KEY)
        other = await post(address, json={"amount": 2, "at": 1}, headers=KEY)
    assert same.headers["idempotent-replayed"] == "true"
    assert other.status_code == 422
    assert seen == ["/pay"] * 3


async def test_multipart_with_another_boundary_is_the_same_request() -> None:
    """Clients make a boundary for each try; files reach the handler whole."""
    endpoint = Endpoint()
    files = {"file": ("a.bin", bytes(range(256)) * 100)}
    async with serving(guard(endpoint)) as address:
        await post(address, files=files, data={"a": "1"}, headers=KEY)
        again = await post(address, files=files, data={"a": "1"}, headers=KEY)
    assert again.headers["idempotent-replayed"] == "true"
    assert (bytes(range(256)) * 100).decode("latin-1") in endpoint.calls[0]["body"]


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("body", [b"", b"x" * 100_000])
async def test_bodies_reach_the_handler_as_they_were_sent(body: bytes, chunked: bool) -> None:
    """Empty, large, in chunks, on one kept connection."""
    endpoint = Endpoint()
    async with serving(guard(endpoint)) as address, raw(address) as client:
        for number in range(2):
            await client.request("POST", "/pay", f"Idempotency-Key: k{number}", body=body, chunked=chunked)
            again = await client.request("POST", "/pay", f"Idempotency-Key: k{number}", body=body, chunked=not chunked)
            assert again.all(b"idempotent-replayed") == [b"true"]
    assert [call["body"].encode("latin-1") for call in endpoint.calls] == [body, body]


@pytest.mark.parametrize("chunked", [True, False])
async def test_an_upload_beyond_the_limit(chunked: bool) -> None:
    """413, problem+json, and no record; without a key it passes."""
    endpoint = Endpoint()
    store = FaultyStore(MemoryStore())
    async with serving(guard(endpoint, store, max_body=10)) as address:
        async with raw(address) as client:
            refused = await client.request("POST", "/pay", "Idempotency-Key: a", body=b"x" * 11, chunked=chunked)
        assert (refused.status, json.loads(refused.body)["type"]) == (413, "urn:asyncidem:content-too-large")
        assert store.calls == []
        async with raw(address) as client:
            assert (await client.request("POST", "/pay", "Idempotency-Key: a", body=b"x" * 10)).status == 201
            assert (await client.request("POST", "/pay", body=b"x" * 100)).status == 201


async def test_twenty_at_once_are_one_effect() -> None:
    """The others get 409 with the seconds after which to try again."""
    endpoint = Endpoint()
    endpoint.hold.clear()
    async with serving(guard(endpoint)) as address:
        racing = [asyncio.create_task(post(address, headers=KEY)) for _ in range(20)]
        for done, task in enumerate(asyncio.as_completed(racing), 1):
            refused = await task
            assert refused.status_code == 409
            assert refused.json()["type"] == "urn:asyncidem:in-progress"
            assert 1 <= int(refused.headers["retry-after"]) <= 30
            if done == 19:
                break
        endpoint.hold.set()
        answers = [await task for task in racing]
        replay = await post(address, headers=KEY)
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 19
    assert replay.headers["idempotent-replayed"] == "true"
    assert len(endpoint.calls) == 1


async def test_twenty_at_once_that_wait_get_the_same_body() -> None:
    """All get what the first got."""
    endpoint = Endpoint()
    endpoint.hold.clear()
    waited: list[Event] = []
    async with serving(guard(endpoint, wait=30, hooks=[waited.append])) as address:
        racing = [asyncio.create_task(post(address, headers=KEY)) for _ in range(20)]
        await endpoint.reached.wait()
        endpoint.hold.set()
        answers = [await task for task in racing]
    assert {answer.status_code for answer in answers} == {201}
    assert {answer.content for answer in answers} == {b'{"charge": 1}'}
    assert len({json.dumps(stable(answer.headers)) for answer in answers}) == 1
    assert len(endpoint.calls) == 1


async def test_two_principals_with_one_key() -> None:
    """Neither sees the other's answer; an asynchronous function may find them; nobody is refused with 403."""
    endpoint = Endpoint()
    store = FaultyStore(MemoryStore())

    async def find(scope: Any) -> str:
        return user(scope)

    async with serving(guard(endpoint, store, principal=find)) as address:
        ada = await post(address, headers=KEY | USER)
        bob = await post(address, headers=KEY | {"X-User": "bob"})
        again = await post(address, headers=KEY | USER)
        before = len(store.calls)
        nobody = await post(address, headers=KEY)
        assert len(store.calls) == before
    assert [ada.json(), bob.json(), again.json()] == [{"charge": 1}, {"charge": 2}, {"charge": 1}]
    assert (nobody.status_code, nobody.json()["type"]) == (403, "urn:asyncidem:no-principal")


@pytest.mark.parametrize("status", [401, 403, 404, 405, 408, 413, 425, 429, 303])
async def test_an_answer_that_says_not_carried_out_releases_the_key(status: int) -> None:
    """It is not stored, in one piece or several, and the next request runs, whatever on_failure says."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, status, [(b"location", b"/")], *([b"", b"x", b""] if len(endpoint.calls) > 1 else [b""]))

    endpoint = Endpoint(answer)
    idem = Idempotency(MemoryStore(), on_failure="keep")
    async with serving(IdempotencyMiddleware(endpoint, idem, principal=None)) as address:
        answers = [await post(address, headers=KEY) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [status] * 3
    assert [call["attempt"] for call in endpoint.calls] == [1, 1, 1]


@pytest.mark.parametrize("status", [200, 204, 400, 402, 409, 422])
async def test_a_deterministic_answer_is_stored(status: int) -> None:
    """2xx, and 4xx that would come out the same; 204 has no body and no length."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, status, [], b"")

    endpoint = Endpoint(answer)
    async with serving(guard(endpoint)) as address, raw(address) as client:
        first = await client.request("POST", "/pay", "Idempotency-Key: a")
        again = await client.request("POST", "/pay", "Idempotency-Key: a")
    assert (first.status, again.status) == (status, status)
    assert again.all(b"idempotent-replayed") == [b"true"]
    assert again.all(b"content-length") == ([] if status == 204 else [b"0"])
    assert len(endpoint.calls) == 1


async def test_failures_follow_on_failure() -> None:
    """A 500 and an exception release the key by default; a function sees the status and may keep it."""
    seen: list[Any] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/raise":
            raise ValueError("no")
        await json_response(send, 503, {})

    endpoint = Endpoint(answer)

    def choose(error: Exception) -> Any:
        seen.append(getattr(error, "status", repr(error)))
        return "keep"

    async with serving(guard(endpoint)) as address:
        for path in ("/fail", "/raise"):
            assert [(await post(address, path, headers=KEY)).status_code for _ in range(2)] in ([503] * 2, [500] * 2)
    assert len(endpoint.calls) == 4
    keeping = IdempotencyMiddleware(endpoint, Idempotency(MemoryStore(), on_failure=choose), principal=None)
    async with serving(keeping) as address:
        for path in ("/fail", "/raise"):
            codes = [(await post(address, path, headers=KEY)).status_code for _ in range(2)]
            assert codes[1] == 409
    assert seen == [503, "ValueError('no')"]


async def test_should_store_overrides() -> None:
    """Of every status it says whether it is a result."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await json_response(send, int(scope["path"][1:]), {})

    endpoint = Endpoint(answer)
    async with serving(guard(endpoint, should_store=lambda status: status in (404, 501))) as address:
        counts = []
        for status in (200, 404, 501, 502):
            before = len(endpoint.calls)
            assert {(await post(address, f"/{status}", headers=KEY)).status_code for _ in range(2)} == {status}
            counts.append(len(endpoint.calls) - before)
    assert counts == [2, 1, 1, 2]


async def test_should_store_that_fails_lets_nothing_run_twice() -> None:
    """The effect has happened: the client gets a 500, a duplicate hears that it was processed."""
    endpoint = Endpoint()

    def broken(status: int) -> bool:
        raise RuntimeError(status)

    async with serving(guard(endpoint, should_store=broken)) as address:
        first = await post(address, headers=KEY)
        again = await post(address, headers=KEY)
    assert (first.status_code, again.status_code) == (500, 409)
    assert again.json()["type"] == "urn:asyncidem:response-not-kept"
    assert len(endpoint.calls) == 1


async def test_headers_of_one_answer_are_not_replayed() -> None:
    """Cookies, CORS, hop-by-hop ones and what Connection names stay with the first; cookies by choice."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        headers = [
            *((b"Set-Cookie", b"a=1"), (b"access-control-allow-origin", b"*"), (b"date", b"then")),
            *((b"x-kept", b"1"), (b"connection", b"x-hop"), (b"x-hop", b"1"), (b"server", b"mine")),
        ]
        await respond(send, 200, headers, b"ok")

    async with serving(guard(Endpoint(answer))) as address:
        first, again = [await post(address, headers=KEY) for _ in range(2)]
    assert "set-cookie" in first.headers
    assert set(again.headers) == {"x-kept", "idempotent-replayed", "content-length", "date", "server"}
    assert (again.headers["date"], again.headers["server"]) != ("then", "mine")
    async with serving(guard(Endpoint(answer), store_cookies=True)) as address:
        first, again = [await post(address, headers=KEY) for _ in range(2)]
    assert again.headers["set-cookie"] == "a=1"


async def test_a_store_that_is_down() -> None:
    """503 with Retry-After and no effect; with on_store_error="run" the handler runs unprotected."""
    endpoint = Endpoint()
    down = RedisStore.from_url("redis://127.0.0.1:1", timeout=0.2)
    try:
        async with serving(guard(endpoint, down)) as address:
            refused = await post(address, headers=KEY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["type"] == "urn:asyncidem:store-unavailable"
        assert endpoint.calls == []
        idem = Idempotency(down, on_store_error="run")
        async with serving(IdempotencyMiddleware(endpoint, idem, principal=None)) as address:
            assert (await post(address, headers=KEY)).status_code == 201
    finally:
        await down.aclose()


async def test_the_operation_is_at_hand_in_the_endpoint() -> None:
    """Its downstream key is the same for the same request of the same principal."""
    endpoint = Endpoint()
    async with serving(guard(endpoint, principal=user)) as address:
        await post(address, headers=KEY | USER)
        await post(address, headers=KEY | {"X-User": "bob"})
    first, second = [call["downstream"] for call in endpoint.calls]
    assert len(first) == 32
    assert first != second
    assert [call["attempt"] for call in endpoint.calls] == [1, 1]


async def test_the_operation_is_over_when_the_request_is() -> None:
    """Also that of a replay: what a task does after it is no part of it."""
    guarded = guard(Endpoint())
    left: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await guarded(scope, receive, send)
        left.append(current_operation())

    async with serving(app) as address:
        for _ in range(2):
            await post(address, headers=KEY)
    assert left == [None, None]


async def test_a_guard_within_a_guard_stands_aside() -> None:
    """One claim, one record."""
    endpoint = Endpoint()
    store = FaultyStore(MemoryStore())
    async with serving(guard(guard(endpoint, store), store)) as address:
        answers = [await post(address, headers=KEY) for _ in range(2)]
    assert [answer.json() for answer in answers] == [{"charge": 1}] * 2
    assert store.counts == {"put_if_absent": 2, "swap": 1}


async def test_websockets_and_lifespan_pass() -> None:
    """They reach the application as they are."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    middleware = guard(app)
    for kind in ("websocket", "lifespan"):
        await middleware({"type": kind}, None, None)  # type: ignore[arg-type]
    assert seen == ["websocket", "lifespan"]
