"""The guard of FastAPI's routes, served by uvicorn: what runs, what is replayed, what is refused."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.responses import FileResponse, StreamingResponse

from asyncidem import Operation, State, StoreUnavailableError, current_operation
from asyncidem.testing import FaultyStore, use_store

from shop_app import ALICE, BOB, KEY, Payment, Till, client, converse, kind, same, shop


async def test_a_retry_straight_after_the_answer_is_a_replay() -> None:
    """Status, headers and bytes are equal, and the endpoint ran once, as an operation."""
    till = Till()
    async with client(shop(till)) as http:
        first = await http.post("/pay", json={"amount": 5}, headers=ALICE)
        assert (first.status_code, first.json(), first.headers["x-receipt"]) == (
            201,
            {"charge": 1, "guarded": True},
            "r",
        )
        assert same(first, await http.post("/pay", json={"amount": 5}, headers=ALICE))
        assert same(first, await http.post("/pay", json={"amount": 5}, headers=ALICE | {"Idempotency-Key": '"k"'}))
        assert (await http.post("/pay", json={"amount": 5}, headers=BOB)).json()["charge"] == 2
    assert till.charges == [5, 5]
    assert till.attempts == [1, 1]


async def test_twenty_at_once_are_one_effect() -> None:
    """The others are told when to come again."""
    till = Till()
    till.hold.clear()
    async with client(shop(till)) as http:
        requests = [asyncio.create_task(http.post("/pay", json={"amount": 1}, headers=ALICE)) for _ in range(20)]
        refused = [await next(done) for done in [asyncio.as_completed(requests)] for _ in range(19)]
        assert {kind(response) for response in refused} == {(409, "in-progress")}
        assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
        till.hold.set()
        answers = await asyncio.gather(*requests)
    assert sorted(response.status_code for response in answers) == [201] + [409] * 19
    assert till.charges == [1]


async def test_twenty_that_wait_get_one_answer() -> None:
    """The owner's."""
    till = Till()
    till.hold.clear()
    async with client(shop(till, wait=20)) as http:
        requests = [asyncio.create_task(http.post("/pay", json={"amount": 1}, headers=ALICE)) for _ in range(20)]
        await till.reached.wait()
        asyncio.get_running_loop().call_later(0.05, till.hold.set)
        answers = await asyncio.gather(*requests)
    assert {(response.status_code, response.content) for response in answers} == {(201, answers[0].content)}
    assert sum("idempotent-replayed" in response.headers for response in answers) == 19
    assert till.charges == [1]


async def test_refusals_are_problems() -> None:
    """Missing, malformed, several and reused keys; nobody; nothing of them leaves a record or runs."""
    till = Till()
    app = shop(till)
    named = till.guard(
        app, principal=lambda request: request.headers.get("x-name"), documentation_url="https://d.example/i"
    )

    @app.post("/named", dependencies=[Depends(named)])
    async def pay() -> dict[str, Any]:
        return await till.charge()

    async with client(app) as http:
        body = {"amount": 1}
        assert kind(await http.post("/pay", json=body, headers={"Authorization": "a"})) == (400, "missing-key")
        assert kind(await http.post("/pay", json=body, headers=ALICE | {"Idempotency-Key": "a b"})) == (
            400,
            "malformed-key",
        )
        several = [("Authorization", "a"), ("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
        assert kind(await http.post("/pay", json=body, headers=several)) == (400, "malformed-key")
        nobody = await http.post("/named", headers=KEY)
        assert (nobody.status_code, nobody.json()["type"]) == (403, "https://d.example/i#no-principal")
        assert nobody.headers["link"] == '<https://d.example/i>; rel="describedby"'
        assert till.charges == till.events == []
        assert (await http.post("/pay", json=body, headers=ALICE)).status_code == 201
        assert kind(await http.post("/pay", json={"amount": 2}, headers=ALICE)) == (422, "key-reused")
        assert (await http.post("/named", headers=KEY | {"x-name": "n"})).status_code == 200
    assert till.charges == [1, 1]


async def test_a_store_that_is_down_fails_closed() -> None:
    """503, and nothing ran."""
    till = Till()
    app = shop(till)
    store = FaultyStore(till.store)
    store.fault("put_if_absent", before=StoreUnavailableError("down"))
    with use_store(till.idem, store):
        async with client(app) as http:
            response = await http.post("/pay", json={"amount": 1}, headers=ALICE)
            assert kind(response) == (503, "store-unavailable")
            assert response.headers["retry-after"] == "1"
            assert till.charges == []
            assert (await http.post("/pay", json={"amount": 1}, headers=ALICE)).status_code == 201


async def test_a_response_whose_completion_is_not_known_is_not_given_out_if_so_wished() -> None:
    """With `on_completion_error="raise"` the client is told to ask again."""
    till = Till(on_completion_error="raise", lease=1)
    store = FaultyStore(till.store)
    store.fault("swap", before=StoreUnavailableError("down"), times=None)
    with use_store(till.idem, store):
        async with client(shop(till)) as http:
            assert kind(await http.post("/pay", json={"amount": 1}, headers=ALICE)) == (503, "store-unavailable")
        await store.aclose()


async def test_a_request_that_is_not_valid_does_not_burn_its_key() -> None:
    """FastAPI's own 422, before and after the guard, and a body that is no JSON: corrected, it runs."""
    till = Till()
    app = FastAPI()
    guard = till.guard(app, required=False)

    @app.post("/pay", dependencies=[Depends(guard)])
    async def pay(payment: Payment, number: int = 0) -> dict[str, Any]:
        return await till.charge(payment.amount)

    async with client(app) as http:
        assert (
            await http.post("/pay", json={"amount": "x"})
        ).status_code == 422  # without a key there is none to release
        for path, content in [("/pay", b'{"amount": "x"}'), ("/pay?number=x", b'{"amount": 1}'), ("/pay", b"{")]:
            response = await http.post(path, content=content, headers=KEY | {"Content-Type": "application/json"})
            assert response.status_code == 422
            assert response.json()["detail"]
        assert (await http.post("/pay", json={"amount": 3}, headers=KEY)).status_code == 200
    assert till.charges == [3]
    assert till.events == ["claimed", "released", "claimed", "released", "claimed", "completed"]


@pytest.mark.parametrize(
    ("status", "runs"), [(401, 2), (403, 2), (404, 2), (429, 2), (500, 2), (400, 1), (402, 1), (422, 1), (499, 1)]
)
async def test_what_an_endpoint_raises_is_its_answer(status: int, runs: int) -> None:
    """A deterministic refusal of the endpoint is replayed; what may come out otherwise runs again."""
    till = Till()
    app = FastAPI()
    guard = till.guard(app)

    @app.post("/pay", dependencies=[Depends(guard)])
    async def pay() -> None:
        await till.charge()
        raise HTTPException(status, "no", headers={"X-Reason": "r"})

    async with client(app) as http:
        first, again = [await http.post("/pay", headers=KEY) for _ in range(2)]
    assert first.status_code == again.status_code == status
    assert first.json() == again.json() == {"detail": "no"}
    assert len(till.charges) == runs
    if runs == 1:
        assert same(first, again)


async def test_exceptions_are_failures_that_on_failure_judges() -> None:
    """It gets the exception; its client gets the 500 of the server."""
    till = Till(on_failure=lambda error: "keep" if isinstance(error, KeyError) else "release")
    app = FastAPI()
    guard = till.guard(app)

    @app.post("/pay/{how}", dependencies=[Depends(guard)])
    async def pay(how: str) -> None:
        await till.charge()
        raise {"lookup": KeyError, "value": ValueError}[how](how)

    async with client(app) as http:
        for _ in range(2):
            assert (await http.post("/pay/value", headers=KEY)).text == "Internal Server Error"
        assert (await http.post("/pay/lookup", headers=KEY | {"Idempotency-Key": "l"})).status_code == 500
        assert kind(await http.post("/pay/lookup", headers=KEY | {"Idempotency-Key": "l"})) == (409, "in-progress")
    assert len(till.charges) == 3


async def test_an_endpoint_that_lost_its_key_has_no_answer() -> None:
    """It is cancelled where it waits; the owner that replaced it answers for the key."""
    till = Till(lease=0.2)
    app = FastAPI()
    guard = till.guard(app)

    @app.post("/pay")
    async def pay(op: Annotated[Operation, Depends(guard)]) -> None:
        await till.store.delete(op.key)
        await asyncio.Event().wait()

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/pay", "query_string": b""}
    sent: list[Any] = []
    scope["headers"] = [(b"idempotency-key", b"k")]
    await converse(app, scope, sent, {"type": "http.request"})  # the cancellation ends here: it was the lease's
    assert sent[0]["status"] == 409
    assert json.loads(sent[1]["body"])["type"] == "urn:asyncidem:in-progress"


async def test_the_operation_is_there_in_coroutines_and_in_threads() -> None:
    """As the value of the dependency, and from `current_operation`; its key is the same downstream."""
    till = Till()
    app = FastAPI()
    guard = till.guard(app, required=False)
    seen: list[Any] = []

    @app.post("/async")
    async def in_coroutine(op: Annotated[Operation | None, Depends(guard)]) -> str | None:
        seen.append((op, current_operation()))
        return op and op.downstream_key

    @app.post("/sync")
    def in_thread(op: Annotated[Operation | None, Depends(guard)]) -> str | None:
        seen.append((op, current_operation()))
        return op and op.downstream_key

    async with client(app) as http:
        for path in ("/async", "/sync"):
            first = await http.post(path, headers=KEY)
            assert len(first.json()) == 32
            assert same(first, await http.post(path, headers=KEY))
            assert (await http.post(path)).json() is None
    assert len(seen) == 4
    assert all(op is current for op, current in seen)
    assert [op is None for op, _ in seen] == [False, True, False, True]


async def test_background_tasks_run_once_and_may_fail() -> None:
    """After the response, which is stored before they begin."""
    till = Till()
    app = FastAPI()
    guard = till.guard(app)
    states: list[State | None] = []

    @app.post("/pay")
    async def pay(tasks: BackgroundTasks, op: Annotated[Operation, Depends(guard)]) -> dict[str, Any]:
        async def after() -> None:
            record = await till.store.get(op.key)
            states.append(None if record is None else record.state)
            raise RuntimeError

        tasks.add_task(after)
        return await till.charge()

    async with client(app) as http:
        first = await http.post("/pay", headers=KEY)
        assert same(first, await http.post("/pay", headers=KEY))
    assert states == [State.COMPLETED]
    assert till.charges == [1]


async def test_streams_and_large_files_pass_and_are_not_repeated(tmp_path: Any) -> None:
    """A small file is kept. The others complete without a result, and a duplicate is told so."""
    till = Till()
    app = FastAPI()
    guard = till.guard(app, max_response=1000)
    for name, size in (("small", 10), ("large", 2000)):
        (tmp_path / name).write_bytes(b"x" * size)

    @app.post("/file/{name}", dependencies=[Depends(guard)])
    async def file(name: str) -> FileResponse:
        await till.charge()
        return FileResponse(tmp_path / name)

    @app.post("/stream", dependencies=[Depends(guard)])
    async def stream() -> StreamingResponse:
        await till.charge()

        async def parts() -> AsyncGenerator[bytes]:
            for part in (b"a", b"b"):
                yield part
                await asyncio.sleep(0)

        return StreamingResponse(parts())

    async with client(app) as http:
        small = await http.post("/file/small", headers=KEY)
        assert same(small, await http.post("/file/small", headers=KEY))
        for path, content in (("/file/large", b"x" * 2000), ("/stream", b"ab")):
            assert (await http.post(path, headers=KEY | {"Idempotency-Key": path})).content == content
            assert kind(await http.post(path, headers=KEY | {"Idempotency-Key": path})) == (409, "response-not-kept")
    assert len(till.charges) == 3
