"""Requests of all sorts before a guard of FastAPI's, clients that leave, and servers that end, by uvicorn."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, File, Form, HTTPException, Request, UploadFile

from shop_app import ALICE, KEY, Payment, Till, client, converse, kind, same, shop
from web import raw, serving


def bodies(till: Till, **options: Any) -> FastAPI:
    """Return an application that takes bodies of all sorts."""
    app = FastAPI()
    guard = till.guard(app, **options)

    @app.post("/form", dependencies=[Depends(guard)])
    async def form(amount: Annotated[int, Form()]) -> dict[str, Any]:
        return await till.charge(amount)

    @app.post("/upload", dependencies=[Depends(guard)])
    async def upload(file: Annotated[UploadFile, File()]) -> dict[str, Any]:
        return await till.charge(len(await file.read()))

    @app.post("/stream", dependencies=[Depends(guard)])
    async def stream(request: Request) -> dict[str, Any]:
        parts = [part async for part in request.stream()]
        assert not await request.is_disconnected()
        return await till.charge(len(b"".join(parts)))

    @app.post("/body", dependencies=[Depends(guard)])
    async def body(request: Request) -> dict[str, Any]:
        return await till.charge(len(await request.body()))

    @app.post("/json", dependencies=[Depends(guard)])
    async def json(payment: Payment) -> dict[str, Any]:
        return await till.charge(payment.amount)

    @app.post("/open")
    async def unguarded(request: Request) -> int:
        return len(await request.body())

    return app


async def test_bodies_of_all_sorts_are_given_whole_and_compared() -> None:
    """JSON, forms, uploads, streams that the endpoint reads itself, nothing; the honest retry of an upload is one."""
    till = Till()
    async with client(bodies(till)) as http:
        for number, (path, sent, other) in enumerate(
            [
                ("/json", {"json": {"amount": 1}}, {"json": {"amount": 2}}),
                ("/form", {"data": {"amount": "1"}}, {"data": {"amount": "2"}}),
                ("/stream", {"content": b"x" * 70_000}, {"content": b"y" * 70_000}),
                ("/body", {"content": b"abc"}, {"content": b"abd"}),
                ("/body", {"content": b""}, {"content": b"a"}),
                ("/upload", {"files": {"file": b"abc"}}, {"json": {"file": "abc"}}),
            ]
        ):
            headers = {"Idempotency-Key": f"k{number}"}
            first = await http.post(path, headers=headers, **sent)
            assert first.status_code == 200, (path, first.text)
            assert same(first, await http.post(path, headers=headers, **sent)), path
            refused = await http.post(path, headers=headers, **other)
            assert refused.status_code == 422, path
    assert till.charges == [1, 1, 70_000, 3, 0, 3]


async def test_chunked_requests_are_the_same_as_others() -> None:
    """How a body is sent is no part of it."""
    till = Till()
    async with serving(bodies(till)) as address, raw(address) as connection:
        lines = ("Idempotency-Key: k", "Content-Type: application/json")
        first = await connection.request("POST", "/json", *lines, body=b'{"amount": 7}', chunked=True)
        assert (first.status, first.all(b"idempotent-replayed")) == (200, [])
        again = await connection.request("POST", "/json", *lines, body=b'{"amount": 7}')
        assert (again.body, again.all(b"idempotent-replayed")) == (first.body, [b"true"])
    assert till.charges == [7]


# Starlette 0.48 (2025-09) leaves the file of an upload that is broken off to the garbage collector.
@pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", ["/json", "/form", "/upload", "/stream", "/body"])
async def test_bodies_over_the_limit_are_refused_without_a_record(path: str, chunked: bool) -> None:
    """Whoever reads them, and whether they say their length or not."""
    till = Till()
    async with client(bodies(till, max_body=1000)) as http:
        kinds = {"/form": "application/x-www-form-urlencoded", "/upload": "multipart/form-data; boundary=x"}
        headers = KEY | {"Content-Type": kinds.get(path, "application/json")}

        begun = (
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' if path == "/upload" else b""
        )

        async def parts() -> AsyncGenerator[bytes]:
            yield begun
            for _ in range(5):
                yield b"x" * 300

        content: Any = parts() if chunked else begun + b"x" * 1500
        assert kind(await http.post(path, headers=headers, content=content)) == (413, "content-too-large")
        assert (await http.post("/open", headers=headers, content=b"x" * 5000)).json() == 5000
        assert (await http.post("/stream", headers={"Idempotency-Key": "l"}, content=b"x" * 1000)).status_code == 200
    assert till.charges == [1000]
    assert till.events == ["claimed", "completed"]
    gc.collect()


# -- clients that leave, servers that end --------------------------------------------------------------------------------


async def test_a_client_that_leaves_does_not_take_the_answer_with_it() -> None:
    """Its endpoint goes on, and the retry gets what it returned."""
    till = Till()
    till.hold.clear()
    async with serving(shop(till)) as address:
        async with raw(address) as connection:
            lines = ("Idempotency-Key: k", "Authorization: alice", "Content-Type: application/json")
            await connection.send("POST", "/pay", *lines, body=b'{"amount": 1}')
            await till.reached.wait()
        till.hold.set()
        async with httpx.AsyncClient(base_url=address) as http:
            while (
                response := await http.post(
                    "/pay", content=b'{"amount": 1}', headers=ALICE | {"Content-Type": "application/json"}
                )
            ).status_code == 409:
                pass
    assert response.headers["idempotent-replayed"] == "true"
    assert till.charges == [1]


def waiting(till: Till) -> int:
    """Return how many duplicates wait."""
    locals_: list[Any] = list(till.store.companions.values())
    return sum(watch.interested for local in locals_ for watch in local.watches._watches.values())


async def test_a_duplicate_whose_client_leaves_never_takes_over() -> None:
    """It ends at once: when the owner fails afterwards, the key is free."""
    till = Till(on_failure="release")
    app = FastAPI()
    guard = till.guard(app, wait=30)

    @app.post("/pay", dependencies=[Depends(guard)])
    async def pay() -> None:
        await till.charge()
        raise HTTPException(500)

    till.hold.clear()
    async with serving(app) as address, httpx.AsyncClient(base_url=address) as http:
        owner = asyncio.create_task(http.post("/pay", headers=KEY))
        await till.reached.wait()
        async with raw(address) as connection:
            await connection.send("POST", "/pay", "Idempotency-Key: k")
            async with asyncio.timeout(10):
                while waiting(till) == 0:
                    await asyncio.sleep(0.001)
        async with asyncio.timeout(10):
            while waiting(till):
                await asyncio.sleep(0.001)
        till.hold.set()
        assert (await owner).status_code == 500
    assert till.charges == [1]


async def test_only_a_disconnect_ends_the_wait_of_a_duplicate() -> None:
    """Whatever else a server has to say; then nobody is there to be answered."""
    till = Till()
    till.hold.clear()
    app = bodies(till, wait=30)
    head: dict[str, Any] = {"type": "http", "method": "POST", "path": "/body", "query_string": b""}
    scopes = [head | {"headers": [(b"idempotency-key", b"k")]} for _ in range(2)]
    body = {"type": "http.request", "body": b"abc"}
    first: list[Any] = []
    second: list[Any] = []
    owner = asyncio.create_task(converse(app, scopes[0], first, body))
    await till.reached.wait()
    await converse(app, scopes[1], second, body, {"type": "http.request"}, {"type": "http.disconnect"})
    assert second == []
    till.hold.set()
    await owner
    assert first[0]["status"] == 200
    assert till.charges == [3]


@pytest.mark.parametrize("path", ["stream", "json"])
async def test_a_client_that_leaves_in_the_middle_of_its_body_runs_nothing(path: str) -> None:
    """And leaves no record, whether the guard was reading or the application."""
    till = Till()
    async with serving(bodies(till)) as address:
        async with raw(address) as connection:
            head = f"POST /{path} HTTP/1.1\r\nHost: x\r\nIdempotency-Key: k\r\nContent-Length: 10\r\n\r\nabc"
            connection.writer.write(head.encode())
            await connection.writer.drain()
        async with httpx.AsyncClient(base_url=address) as http:
            assert (await http.post("/stream", headers=KEY, content=b"abc")).status_code == 200
    assert till.charges == [3]
    assert till.events == ["claimed", "completed"]


@pytest.mark.parametrize("on_cancel", ["keep", "release"])
async def test_a_graceful_shutdown_follows_on_cancel(on_cancel: Any) -> None:
    """The endpoint is cancelled; whether it may run again at once is for `on_cancel` to say."""
    till = Till(on_cancel=on_cancel)
    till.hold.clear()
    app = shop(till)
    async with httpx.AsyncClient() as http:
        async with serving(app) as address:
            request = asyncio.create_task(http.post(f"{address}/pay", json={"amount": 1}, headers=ALICE))
            await till.reached.wait()
        with contextlib.suppress(httpx.HTTPError):
            assert (await request).status_code == 500
        till.hold.set()
        async with serving(app) as address:
            again = await http.post(f"{address}/pay", json={"amount": 1}, headers=ALICE)
    assert again.status_code == (409 if on_cancel == "keep" else 201)
    assert len(till.charges) == (1 if on_cancel == "keep" else 2)
