"""How a guarded request may end early under uvicorn: clients that leave, shutdowns, leases that are lost."""

import asyncio
from typing import Any

import httpx
import pytest

from asyncidem import ConfigurationError, Idempotency, MemoryStore, RedisStore, StoreUnavailableError
from asyncidem.integrations.asgi import IdempotencyMiddleware
from asyncidem.testing import FaultyStore

from asgi_apps import Endpoint, respond
from web import raw, serving

KEY = {"Idempotency-Key": "order-1"}
LINE = "Idempotency-Key: order-1"


async def post(address: str) -> httpx.Response:
    """Send one request on a connection of its own."""
    async with httpx.AsyncClient(base_url=address) as client:
        return await client.post("/pay", headers=KEY)


async def test_the_result_of_a_client_that_left_is_stored() -> None:
    """It disconnects in the middle of the handler, and its retry gets the answer."""
    endpoint = Endpoint()
    endpoint.hold.clear()
    async with serving(IdempotencyMiddleware(endpoint, Idempotency(MemoryStore()), principal=None)) as address:
        async with raw(address) as client:
            await client.send("POST", "/pay", LINE)
            await endpoint.reached.wait()
        endpoint.hold.set()
        retry = await post(address)
        while retry.status_code == 409:  # until the handler has been woken
            retry = await post(address)
    assert retry.json() == {"charge": 1}
    assert retry.headers["idempotent-replayed"] == "true"
    assert len(endpoint.calls) == 1


async def test_a_client_that_leaves_before_it_has_sent_all_leaves_nothing() -> None:
    """Neither record nor effect."""
    endpoint = Endpoint()
    store = FaultyStore(MemoryStore())
    ended = asyncio.Event()
    guarded = IdempotencyMiddleware(endpoint, Idempotency(store), principal=None)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await guarded(scope, receive, send)
        ended.set()

    async with serving(app) as address:
        async with raw(address) as client:
            client.writer.write(f"POST /pay HTTP/1.1\r\nHost: a\r\n{LINE}\r\nContent-Length: 9\r\n\r\nhalf".encode())
            await client.writer.drain()
        await ended.wait()
    assert store.calls == []
    assert endpoint.calls == []


async def test_a_duplicate_whose_client_left_never_takes_over() -> None:
    """Its wait ends with the connection; when the owner fails, the key is free for the next request."""
    endpoint = Endpoint()
    endpoint.hold.clear()
    ended: list[str] = []
    waiting = asyncio.Event()

    guarded = IdempotencyMiddleware(endpoint, Idempotency(MemoryStore()), principal=None, wait=3600)
    left = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        name = dict(scope["headers"]).get(b"x-name", b"").decode()
        asked = 0

        async def listen() -> Any:
            nonlocal asked
            asked += 1
            if name == "duplicate" and asked == 2:  # it has the body, and listens for the client while it waits
                waiting.set()
                return {"type": "http.request", "body": b"", "more_body": False}  # which says nothing of the client
            return await receive()

        try:
            await guarded(scope, listen, send)
        except ValueError:
            name += " failed"
        ended.append(name)
        if name == "duplicate":
            left.set()

    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError

    endpoint._answer = fail
    async with serving(app) as address, raw(address) as owner:
        await owner.send("POST", "/pay", LINE, "X-Name: owner")
        await endpoint.reached.wait()
        async with raw(address) as duplicate:
            await duplicate.send("POST", "/pay", LINE, "X-Name: duplicate")
            await waiting.wait()
        await left.wait()
        endpoint.hold.set()
        assert (await owner.answer()).status == 500
        endpoint._answer = None
        assert (await post(address)).json() == {"charge": 2}
    assert ended[:2] == ["duplicate", "owner failed"]
    assert [call["attempt"] for call in endpoint.calls] == [1, 1]


@pytest.mark.parametrize("on_cancel", ["keep", "release"])
async def test_a_graceful_shutdown_follows_on_cancel(on_cancel: Any) -> None:
    """Uvicorn cancels what still runs; kept, the next process runs it again as the second attempt when the lease is over."""
    endpoint = Endpoint()
    endpoint.hold.clear()
    now = 0.0
    store = MemoryStore(clock=lambda: now)
    guarded = IdempotencyMiddleware(endpoint, Idempotency(store, lease=30, on_cancel=on_cancel), principal=None)
    async with serving(guarded, timeout_graceful_shutdown=0) as address:
        request = asyncio.create_task(post(address))
        await endpoint.reached.wait()
    with pytest.raises(httpx.HTTPError):
        (await request).raise_for_status()
    endpoint.hold.set()
    assert endpoint.cancelled == 1
    async with serving(guarded) as address:
        if on_cancel == "keep":
            assert (await post(address)).status_code == 409
            now += 31
        assert (await post(address)).status_code == 201
    assert [call["attempt"] for call in endpoint.calls] == [1, 2 if on_cancel == "keep" else 1]


async def test_an_owner_that_was_replaced_does_not_answer() -> None:
    """Its lease was lost while it ran: another answers for the key, and its client is told to ask again."""
    endpoint = Endpoint()
    endpoint.hold.clear()
    now = 0.0
    store = MemoryStore(clock=lambda: now)
    idem = Idempotency(store, lease=30, renew=False)
    async with serving(IdempotencyMiddleware(endpoint, idem, principal=None)) as address:
        slow = asyncio.create_task(post(address))
        await endpoint.reached.wait()
        now += 31
        endpoint.hold.set()
        endpoint.hold = asyncio.Event()
        endpoint.hold.set()
        # The second one completes first: the first was held up by its clock only.
        answers = await asyncio.gather(slow, post(address))
    codes = sorted(answer.status_code for answer in answers)
    assert codes in ([201, 201], [201, 409])
    if codes == [201, 409]:
        refused = next(answer for answer in answers if answer.status_code == 409)
        assert (refused.json()["type"], refused.headers["retry-after"]) == ("urn:asyncidem:in-progress", "1")


@pytest.mark.parametrize("parts", [[b"one"], [b"one", b"two"]], ids=["whole", "streamed"])
async def test_a_completion_that_finds_another_owner(parts: list[bytes]) -> None:
    """A whole response is replaced by 409; a stream that is on its way reaches its client to the end."""
    store = MemoryStore()

    async def steal(scope: Any, receive: Any, send: Any) -> None:
        keys = [key for key in store._values if not key.endswith(":lock")]
        for key in keys:
            del store._values[key]
            await store.put_if_absent(key, b'{"status":"COMPLETED","data":"1"}', 60_000)
        await respond(send, 200, [], *parts)
        if len(parts) == 1:  # one that sends too much reaches nobody behind the refusal
            await send({"type": "http.response.body", "body": b"late"})

    endpoint = Endpoint(steal)
    async with serving(IdempotencyMiddleware(endpoint, Idempotency(store), principal=None)) as address:
        answer = await post(address)
    if len(parts) == 1:
        assert (answer.status_code, answer.json()["type"]) == (409, "urn:asyncidem:in-progress")
    else:
        assert (answer.status_code, answer.content) == (200, b"onetwo")


async def test_a_lease_that_is_lost_while_the_handler_runs() -> None:
    """The handler is cancelled, and the client told to ask again."""
    endpoint = Endpoint()
    endpoint.hold.clear()
    store = MemoryStore()
    idem = Idempotency(store, lease=0.3)
    async with serving(IdempotencyMiddleware(endpoint, idem, principal=None)) as address:
        request = asyncio.create_task(post(address))
        await endpoint.reached.wait()
        for key in list(store._values):
            del store._values[key]
            await store.put_if_absent(key, b'{"status":"COMPLETED","data":"1"}', 60_000)
        answer = await request
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:asyncidem:in-progress")
    assert endpoint.cancelled == 1


async def test_a_completion_that_is_not_acknowledged() -> None:
    """The client gets its answer, or with on_completion_error="raise" a 503; both may be repeated with the same key."""
    down = StoreUnavailableError("down")
    for choice, status in (("return", 201), ("raise", 503)):
        store = FaultyStore(MemoryStore())
        store.fault("swap", after=down)
        endpoint = Endpoint()
        idem = Idempotency(store, on_completion_error=choice)  # type: ignore[arg-type]
        async with serving(IdempotencyMiddleware(endpoint, idem, principal=None)) as address:
            assert (await post(address)).status_code == status
            assert (await post(address)).json() == {"charge": 1}
        assert len(endpoint.calls) == 1


async def test_a_principal_of_the_wrong_kind_is_a_fault_of_the_program() -> None:
    """Not a refusal of the client: the server says 500, and nothing ran."""
    endpoint = Endpoint()

    def broken(scope: Any) -> Any:
        return {"id": 1}

    async with serving(IdempotencyMiddleware(endpoint, Idempotency(MemoryStore()), principal=broken)) as address:
        assert (await post(address)).status_code == 500
    assert endpoint.calls == []


async def test_what_is_stored_by_something_else_is_no_answer() -> None:
    """A record that holds no response: it does not run again."""
    endpoint = Endpoint()
    store = FaultyStore(MemoryStore())
    guarded = IdempotencyMiddleware(endpoint, Idempotency(store), principal=None)
    async with serving(guarded) as address:
        await post(address)
        key = store.calls[0].key
        other = Idempotency(store)
        await store.delete(key.removeprefix(store.prefix))

        async def text() -> str:
            return "no answer"

        await other.run(key.removeprefix(store.prefix), text)
        answer = await post(address)
    assert answer.status_code in (409, 422)


def test_options_that_cannot_work() -> None:
    """They are refused when the middleware is made, by name, with the remedy."""
    idem = Idempotency(MemoryStore())
    endpoint: Any = None
    for options, words in (
        ({"principal": "ada"}, "principal must be a function"),
        ({"methods": "POST"}, "methods must be a collection"),
        ({"required": 1}, "required must be True or False"),
        ({"max_body": -1}, "max_body must be a number of bytes"),
        ({"wait": -1}, "wait"),
        ({"documentation_url": "/docs"}, "documentation_url must be an absolute"),
    ):
        given: dict[str, Any] = {"principal": None, **options}  # type: ignore[dict-item]
        with pytest.raises(ConfigurationError, match=words):
            IdempotencyMiddleware(endpoint, idem, **given)
    with pytest.raises(ConfigurationError, match="must be an Idempotency"):
        IdempotencyMiddleware(endpoint, RedisStore, principal=None)  # type: ignore[arg-type]
