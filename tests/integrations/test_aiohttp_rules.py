"""The rules of guarded endpoints, seen by a client of a real aiohttp server."""

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from asyncidem import MemoryStore, Record, StoreUnavailableError
from asyncidem.integrations.aiohttp import HTTPFailure
from asyncidem.testing import FaultyStore

from integrations.aiohttp_sites import Effect, Gate, guarded, make_idempotency, message, receive, serve


def problem_of(reply: Any) -> str:
    """Return the kind of a problem, after a look at its form."""
    body = json.loads(reply.body)
    assert reply.header("content-type") == "application/problem+json"
    assert reply.header("cache-control") == "no-store"
    assert body["status"] == reply.status
    assert body["title"]
    assert body["detail"]
    kind: str = body["type"].removeprefix("urn:asyncidem:")
    return kind


async def test_a_retry_gets_the_first_answer() -> None:
    """The effect happens once; status, header lines and body are the same, and the replay says that it is one."""
    effect = Effect()
    async with serve(guarded(effect.run)) as site:
        first, second = await site.post(json={"amount": 1}), await site.post(json={"amount": 1})
    assert effect.count == 1
    assert (first.status, first.body) == (second.status, second.body) == (201, b'{"charged": 1}')
    assert first.kept_lines == second.kept_lines
    assert (first.replayed, second.replayed) == (False, True)


async def test_quoted_and_raw_key_are_one_and_strict_takes_quoted_ones_only() -> None:
    """`"k"` and `k`, with parameters and blanks around, name one operation; with strict the raw one is malformed."""
    effect = Effect()
    async with serve(guarded(effect.run)) as site:
        for key in ("k", '"k"', '"k";a=1', ' \t"k" '):
            assert (await site.post(key=key)).body == b'{"charged": 1}'
    async with serve(guarded(effect.run, strict=True)) as site:
        assert problem_of(await site.post(key="k")) == "malformed-key"
        assert (await site.post(key='"k"')).status == 201


@pytest.mark.parametrize("lines", [("",), ('"a", "b"',), ('"a',), ("a b",), ("x" * 256,), ("caf\xe9",), ("a", "a")])
async def test_malformed_key_is_400_before_anything_is_looked_up(lines: tuple[str, ...]) -> None:
    """A list, an empty or overlong value, characters outside of ASCII, a second header line: 400, and no store call."""
    effect, store = Effect(), FaultyStore(MemoryStore())
    async with (
        serve(guarded(effect.run, idempotency=make_idempotency(store))) as site,
        site.socket() as (reader, writer),
    ):
        writer.write(message(*(f"Idempotency-Key: {line}" for line in lines)))
        reply = await receive(reader)
    assert (reply.status, problem_of(reply)) == (400, "malformed-key")
    assert (effect.count, store.calls) == (0, [])


async def test_missing_key_is_400_only_where_it_is_required() -> None:
    """Without a key an unrequired route runs each time; a required one refuses."""
    effect = Effect()
    async with serve(guarded(effect.run)) as site:
        assert [(await site.post(key=None)).body for _ in range(2)] == [b'{"charged": 1}', b'{"charged": 2}']
    async with serve(guarded(effect.run, required=True)) as site:
        reply = await site.post(key=None)
    assert (reply.status, problem_of(reply), effect.count) == (400, "missing-key", 2)


async def test_router_comes_before_a_missing_or_malformed_key() -> None:
    """404, 405 (of a View, too) and redirects are the router's, whatever the key."""

    class Payments(web.View):
        async def put(self) -> web.Response:
            raise NotImplementedError

    app = guarded(Effect().run, required=True)
    app.router.add_get("/read", Effect().run)
    app.router.add_view("/view", Payments)
    app.middlewares.append(web.normalize_path_middleware())
    app.router.add_post("/slash/", Effect().run)
    async with serve(app) as site:
        for key in (None, "a b"):
            assert (await site.post("/nothing", key=key)).status == 404
            assert (await site.post("/read", key=key)).status == 405
            assert (await site.post("/view", key=key)).status == 405
            assert (await site.post("/slash", key=key)).status == 308


async def test_key_with_another_payload_is_422_even_while_the_first_runs() -> None:
    """It beats 409, and a path of its own under the same template is another payload."""
    gate = Gate()
    app = guarded(gate.run)
    app.router.add_post("/items/{id}", Effect().run)
    async with serve(app) as site:
        first = asyncio.create_task(site.post(data=b"1"))
        await gate.running.wait()
        while_running = await site.post(data=b"2")
        gate.open.set()
        assert (await first).status == 201
        completed = await site.post(data=b"2")
        other_query = await site.post("/pay?x=1", data=b"1")
        other_type = await site.post(data=b"1", headers={"Content-Type": "text/plain"})
        assert (await site.post("/items/1")).status == 201
        other_path = await site.post("/items/2")
    for reply in (while_running, completed, other_query, other_type, other_path):
        assert (reply.status, problem_of(reply)) == (422, "key-reused")


async def test_running_operation_is_409_with_retry_after() -> None:
    """In whole seconds; so is a wait that ran out."""
    gate = Gate()
    async with serve(guarded(gate.run, wait=0.02)) as site:
        first = asyncio.create_task(site.post())
        await gate.running.wait()
        late = await site.post()
        gate.open.set()
        await first
    assert (late.status, problem_of(late)) == (409, "in-progress")
    assert 1 <= int(late.header("retry-after") or 0) <= 30


async def test_store_down_is_503_and_runs_nothing_unless_told_to() -> None:
    """It fails closed; `on_store_error="run"` runs unprotected."""
    for option, status, count in (("raise", 503, 0), ("run", 201, 1)):
        effect, store = Effect(), FaultyStore(MemoryStore())
        store.fault("put_if_absent", before=StoreUnavailableError("down"), times=None)
        app = guarded(effect.run, idempotency=make_idempotency(store, on_store_error=option))
        async with serve(app) as site:
            reply = await site.post()
        assert (reply.status, effect.count) == (status, count)
        if status == 503:
            assert problem_of(reply) == "store-unavailable"
            assert reply.header("retry-after") == "1"


async def test_problems_lead_to_the_documentation() -> None:
    """With a URL it is the type, and a link of the problem."""
    async with serve(guarded(Effect().run, required=True, documentation_url="https://example.com/idempotency")) as site:
        reply = await site.post(key=None)
    assert json.loads(reply.body)["type"] == "https://example.com/idempotency#missing-key"
    assert reply.header("link") == '<https://example.com/idempotency>; rel="describedby"'


async def test_other_methods_cost_no_store_call() -> None:
    """GET, PUT and DELETE with a key, even a malformed one, run each time; `methods` chooses."""
    effect, store = Effect(), FaultyStore(MemoryStore())
    async with serve(guarded(effect.run, required=True, idempotency=make_idempotency(store))) as site:
        for method in ("GET", "PUT", "DELETE"):
            for key in (None, "k", "a b"):
                assert (await site.ask(method, "/pay", key=key)).status == 201
    assert (effect.count, store.calls) == (9, [])
    effect = Effect()
    async with serve(guarded(effect.run, methods=("PUT",))) as site:
        assert [(await site.ask("PUT", "/pay")).body for _ in range(2)] == [b'{"charged": 1}'] * 2
        assert [(await site.ask("POST", "/pay")).body for _ in range(2)] == [b'{"charged": 2}', b'{"charged": 3}']


async def test_principals_methods_and_routes_have_keys_of_their_own() -> None:
    """One key, two users, two methods, two routes: four effects, and nobody gets another's answer."""
    effect = Effect()
    app = guarded(effect.run)
    app.router.add_post("/other", effect.run)
    async with serve(app) as site:
        for _ in range(2):
            assert (await site.post(user="ann")).body == b'{"charged": 1}'
            assert (await site.post(user="bob")).body == b'{"charged": 2}'
            assert (await site.ask("PATCH", "/pay")).body == b'{"charged": 3}'
            assert (await site.post("/other")).body == b'{"charged": 4}'


async def test_nobody_is_403_without_a_store_call_and_none_written_out_is_one_space() -> None:
    """A principal that is not found, by sync or async function, is refused; `principal=None` asks nobody."""

    async def nobody(request: web.Request) -> str | None:
        return None

    for principal in (nobody, lambda _: ""):
        effect, store = Effect(), FaultyStore(MemoryStore())
        async with serve(guarded(effect.run, principal=principal, idempotency=make_idempotency(store))) as site:
            reply = await site.post()
        assert (reply.status, problem_of(reply)) == (403, "no-principal")
        assert (effect.count, store.calls) == (0, [])
    effect = Effect()
    async with serve(guarded(effect.run, principal=None)) as site:
        assert [(await site.post(user=user)).body for user in ("ann", None)] == [b'{"charged": 1}'] * 2


async def test_principal_that_raises_answers_for_itself() -> None:
    """An HTTPUnauthorized of the principal function is the answer, and nothing is claimed."""

    async def authenticate(request: web.Request) -> str:
        raise web.HTTPUnauthorized

    effect = Effect()
    async with serve(guarded(effect.run, principal=authenticate)) as site:
        assert (await site.post()).status == 401
    assert effect.count == 0


async def test_fingerprint_may_be_chosen() -> None:
    """A function of request and body says what must be equal."""
    effect = Effect()

    def amount(request: web.Request, body: bytes) -> str:
        return str(json.loads(body)["amount"])

    async with serve(guarded(effect.run, fingerprint=amount)) as site:
        assert (await site.post(json={"amount": 1, "nonce": 1})).status == 201
        assert (await site.post(json={"amount": 1, "nonce": 2})).replayed
        assert (await site.post(json={"amount": 2, "nonce": 1})).status == 422


@pytest.mark.parametrize("status", [200, 202, 400, 402, 409, 410, 422, 451])
async def test_results_are_stored(status: int) -> None:
    """2xx and deterministic 4xx are what retries get."""
    effect = Effect(lambda _: web.Response(status=status, text="done"))
    async with serve(guarded(effect.run)) as site:
        replies = [await site.post() for _ in range(2)]
    assert [(reply.status, reply.body, reply.replayed) for reply in replies] == [
        (status, b"done", False),
        (status, b"done", True),
    ]
    assert effect.count == 1


@pytest.mark.parametrize("status", [302, 401, 403, 404, 405, 406, 408, 413, 415, 421, 423, 425, 429, 500, 503])
async def test_what_was_not_carried_out_is_not_stored(status: int) -> None:
    """The key is free again; as attempt 1, for by default failures had no effect."""
    effect = Effect(lambda _: web.Response(status=status, text="no"))
    async with serve(guarded(effect.run)) as site:
        replies = [await site.post() for _ in range(2)]
    assert [(reply.status, reply.replayed) for reply in replies] == [(status, False)] * 2
    assert effect.count == 2


async def test_should_store_overrides() -> None:
    """A POST that redirects can be a result."""
    effect = Effect(lambda _: web.Response(status=303, headers={"Location": "/receipt"}))
    async with serve(guarded(effect.run, should_store=lambda status: status == 303)) as site:
        replies = [await site.post() for _ in range(2)]
    assert [(reply.status, reply.header("location")) for reply in replies] == [(303, "/receipt")] * 2
    assert replies[1].replayed
    assert effect.count == 1


@pytest.mark.parametrize("should_store", [lambda _: 1 / 0, lambda _: "yes"])
async def test_should_store_that_fails_runs_nothing_twice(should_store: Any) -> None:
    """It is the application's fault, 500; the effect has happened, and its operation has completed."""
    effect = Effect()
    async with serve(guarded(effect.run, should_store=should_store)) as site:
        assert [(await site.post()).status for _ in range(2)] == [500, 409]
    assert effect.count == 1


async def test_failures_are_what_on_failure_says() -> None:
    """It gets the exception that was raised, or an HTTPFailure with the status; "keep" holds the key for the lease."""
    seen: list[Exception] = []

    def choose(error: Exception) -> Any:
        seen.append(error)
        return "keep"

    def fail(request: web.Request) -> web.Response:
        if "raise" in request.query:
            raise OSError("provider")
        return web.Response(status=502)

    app = guarded(Effect(fail).run, idempotency=make_idempotency(on_failure=choose))
    async with serve(app) as site:
        assert [(await site.post("/pay?raise", key="a")).status for _ in range(2)] == [500, 409]
        assert [(await site.post(key="b")).status for _ in range(2)] == [502, 409]
    raised, answered = seen
    assert isinstance(raised, OSError)
    assert isinstance(answered, HTTPFailure)
    assert answered.status == 502


async def test_handler_that_returns_no_response_is_a_failure() -> None:
    """The server answers 500; the key is free."""
    effect = Effect(lambda _: "text")
    async with serve(guarded(effect.run)) as site:
        assert [(await site.post()).status for _ in range(2)] == [500, 500]
    assert effect.count == 2


async def test_stored_key_is_a_digest() -> None:
    """Neither user nor key can be read in the store; the route can, in events."""
    events: list[Any] = []
    store = MemoryStore()
    async with serve(guarded(Effect().run, idempotency=make_idempotency(store, hooks=[events.append]))) as site:
        await site.post(key="secret-key")
    (key,) = {event.key for event in events}
    assert isinstance(await store.get(key), Record)
    assert "secret-key" not in key
    assert "ann" not in key
    assert {event.operation for event in events} == {"POST /pay"}
