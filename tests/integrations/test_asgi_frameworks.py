"""The ASGI middleware under the frameworks themselves, served by uvicorn."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Annotated, Any

import fastapi
import httpx
import litestar
import litestar.middleware
import pytest
import quart
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from asyncidem import Event, Idempotency, MemoryStore, current_operation
from asyncidem.integrations.asgi import IdempotencyMiddleware

from web import serving

KEY = {"Idempotency-Key": "order-1"}


class Counted:
    """What endpoints do, and what the hooks were told.

    Attributes:
        calls: how often an endpoint ran.
        events: the labels of the operations, in their order.
        idem: over a store in memory.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.operations: list[str | None] = []
        self.idem = Idempotency(MemoryStore(), hooks=[self.note])

    def note(self, event: Event) -> None:
        """Take the label of an operation."""
        self.operations.append(event.operation)

    def charge(self) -> dict[str, int]:
        """Do it once more."""
        self.calls += 1
        op = current_operation()
        return {"charge": self.calls, "attempt": 0 if op is None else op.attempt}

    def guard(self, **options: Any) -> Middleware:
        """Return the middleware as Starlette takes it."""
        return Middleware(IdempotencyMiddleware, idempotency=self.idem, **{"principal": None, **options})


@pytest.fixture
def counted() -> Counted:
    """An effect that is counted."""
    return Counted()


async def times(number: int, address: str, path: str, **options: Any) -> list[httpx.Response]:
    """Send one request several times, each on a connection of its own."""
    options["headers"] = KEY | options.get("headers", {})
    answers: list[httpx.Response] = []
    for _ in range(number):
        async with httpx.AsyncClient(base_url=address) as client:
            answers.append(await client.post(path, **options))
    return answers


def replayed(answers: list[httpx.Response]) -> bool:
    """Say whether all but the first are replays of it."""
    first, *others = answers
    return all(
        (one.status_code, one.content) == (first.status_code, first.content) and "idempotent-replayed" in one.headers
        for one in others
    )


def starlette(counted: Counted, *outside: Middleware, inside: tuple[Middleware, ...] = (), **options: Any) -> Starlette:
    """Return an application of Starlette whose guard stands between other middleware."""

    async def charge(request: Request) -> Response:
        await request.body()
        return JSONResponse(counted.charge(), 201)

    async def file(request: Request) -> Response:
        counted.charge()
        return FileResponse(request.query_params["path"])

    async def events(_request: Request) -> Response:
        counted.charge()

        async def tell() -> AsyncGenerator[str]:
            for number in range(3):
                yield f"data: {number}\n\n"
                await asyncio.sleep(0)

        return StreamingResponse(tell(), media_type="text/event-stream")

    routes = [
        Route("/orders/{order}/pay", charge, methods=["POST"]),
        Route("/file", file, methods=["POST"]),
        Route("/events", events, methods=["POST"]),
    ]
    return Starlette(
        routes=[*routes, Mount("/v2", routes=routes), Mount("/other", app=Opaque(counted))],
        middleware=[*outside, counted.guard(**options), *inside],
    )


class Opaque:
    """An application that is mounted, and says nothing of its routes."""

    def __init__(self, counted: Counted) -> None:
        self._counted = counted

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer."""
        await JSONResponse(self._counted.charge(), 201)(scope, receive, send)


async def test_starlette(counted: Counted) -> None:
    """The template of the route is part of the key, the concrete path of the fingerprint; mounts are places of their own."""
    async with serving(starlette(counted)) as address:
        assert replayed(await times(2, address, "/orders/1/pay"))
        assert (await times(1, address, "/orders/2/pay"))[0].status_code == 422
        for path in ("/v2/orders/1/pay", "/other/a", "/other/b"):
            assert replayed(await times(2, address, path))
    labels = ["POST /orders/{order}/pay", "POST /v2/orders/{order}/pay", "POST /other/a", "POST /other/b"]
    assert list(dict.fromkeys(counted.operations)) == labels
    assert counted.calls == 4


async def test_the_refusals_of_the_router_win_over_a_missing_key(counted: Counted) -> None:
    """404, 405, and the redirect to a path with a slash or without one; 400 only where an endpoint would run."""
    async with serving(starlette(counted, required=True)) as address, httpx.AsyncClient(base_url=address) as client:
        codes = [(await client.post(path)).status_code for path in ("/nowhere", "/orders/1/pay/", "/orders/1/pay")]
        wrong = await client.patch("/orders/1/pay")
        inner = [(await client.post(path)).status_code for path in ("/v2/nowhere", "/v2/orders/1/pay")]
    assert codes == [404, 307, 400]
    assert wrong.status_code == 405
    assert inner == [404, 400]
    assert counted.calls == 0


async def test_a_small_file_is_kept_and_a_large_one_is_not(counted: Counted, tmp_path: Path) -> None:
    """Both reach the client byte for byte."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"\x00\xff" * 100)
    large.write_bytes(b"\x00\xff" * 1_000_000)
    async with serving(starlette(counted)) as address:
        assert replayed(await times(2, address, "/file", params={"path": str(small)}))
        first, again = await times(2, address, "/v2/file", params={"path": str(large)})
    assert first.content == large.read_bytes()
    assert (again.status_code, again.json()["type"]) == (409, "urn:asyncidem:response-not-kept")
    assert counted.calls == 2


async def test_server_sent_events_pass(counted: Counted) -> None:
    """They are not kept."""
    async with serving(starlette(counted)) as address:
        first, again = await times(2, address, "/events")
    assert first.text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert again.status_code == 409


async def test_what_stands_outside_is_made_for_each_client(counted: Counted) -> None:
    """Compression and CORS of the replay are those of the client that asks."""
    outside = (
        Middleware(CORSMiddleware, allow_origins=["https://a.example", "https://b.example"]),
        Middleware(GZipMiddleware, minimum_size=1),
    )
    async with serving(starlette(counted, *outside)) as address:
        plain = {"accept-encoding": "identity", "origin": "https://a.example"}
        packed = {"accept-encoding": "gzip", "origin": "https://b.example"}
        (first,) = await times(1, address, "/orders/1/pay", headers=plain)
        (again,) = await times(1, address, "/orders/1/pay", headers=packed)
    assert first.content == again.content
    assert ("content-encoding" in first.headers, again.headers["content-encoding"]) == (False, "gzip")
    assert again.headers.get_list("access-control-allow-origin") == ["https://b.example"]
    assert again.headers["idempotent-replayed"] == "true"


async def test_compression_inside_makes_an_answer_that_is_not_kept(counted: Counted) -> None:
    """It was made for one client, and may not be what another takes."""
    async with serving(starlette(counted, inside=(Middleware(GZipMiddleware, minimum_size=1),))) as address:
        first, again = await times(2, address, "/orders/1/pay", headers={"accept-encoding": "gzip"})
    assert first.json()["charge"] == 1
    assert again.status_code == 409


async def test_a_middleware_that_makes_streams_of_answers(counted: Counted) -> None:
    """Starlette's BaseHTTPMiddleware sends in pieces what says its length: it is kept; what does not is not."""

    async def pass_on(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response

    async with serving(starlette(counted, inside=(Middleware(BaseHTTPMiddleware, dispatch=pass_on),))) as address:
        assert replayed(await times(2, address, "/orders/1/pay"))
        assert [one.status_code for one in await times(2, address, "/events")] == [200, 409]


async def test_around_an_application_that_answers_for_its_crash(counted: Counted) -> None:
    """Starlette sends a 500 and then raises: the key is released once, and the next request runs as the first attempt."""

    async def crash(_request: Request) -> Response:
        counted.charge()
        raise ValueError

    events: list[Event] = []
    idem = Idempotency(MemoryStore(), hooks=[events.append])
    app = IdempotencyMiddleware(Starlette(routes=[Route("/", crash, methods=["POST"])]), idem, principal=None)
    async with serving(app) as address:
        answers = await times(2, address, "/")
    assert [answer.status_code for answer in answers] == [500, 500]
    assert [event.name for event in events] == ["claimed", "released"] * 2
    assert [event.attempt for event in events] == [1] * 4


class Backend(AuthenticationBackend):
    """Knows people by a header."""

    async def authenticate(self, conn: Any) -> Any:
        """Return who it is."""
        name = conn.headers.get("x-user")
        return None if name is None else (AuthCredentials(), SimpleUser(name))


async def test_inside_of_authentication(counted: Counted) -> None:
    """What authenticates stands outside and tells who asks; nobody is refused."""
    outside = (Middleware(AuthenticationMiddleware, backend=Backend()),)
    async with serving(starlette(counted, *outside, principal=lambda scope: scope["user"].display_name)) as address:
        ada, bob = [await times(2, address, "/orders/1/pay", headers={"x-user": name}) for name in ("ada", "bob")]
        (nobody,) = await times(1, address, "/orders/1/pay")
    assert replayed(ada)
    assert replayed(bob)
    assert ada[0].content != bob[0].content
    assert nobody.status_code == 403


async def test_fastapi(counted: Counted) -> None:
    """Added to an application of FastAPI, with a router that it includes: there the path stands for the template."""
    app = fastapi.FastAPI()
    router = fastapi.APIRouter(prefix="/orders")

    @router.post("/{order}/pay", status_code=201)
    async def pay(order: int, amount: Annotated[int, fastapi.Body(embed=True)]) -> dict[str, int]:
        return {**counted.charge(), "order": order, "amount": amount}

    app.post("/v1/{order}/pay")(pay)
    app.include_router(router)
    app.add_middleware(IdempotencyMiddleware, idempotency=counted.idem, principal=None)
    async with serving(app) as address:
        answers = await times(2, address, "/orders/7/pay", json={"amount": 5})
        assert replayed(answers)
        assert answers[0].json() == {"charge": 1, "attempt": 1, "order": 7, "amount": 5}
        assert replayed(await times(2, address, "/v1/7/pay", json={"amount": 5}))
    # Newer versions include a router as a whole, and say of its routes only whether one matches.
    assert set(counted.operations) - {"POST /orders/7/pay"} <= {"POST /orders/{order}/pay", "POST /v1/{order}/pay"}


async def test_litestar(counted: Counted) -> None:
    """As middleware, behind its router: the template is known."""

    @litestar.post("/orders/{order:int}/pay")
    async def pay(request: litestar.Request[Any, Any, Any]) -> dict[str, int]:
        return {**counted.charge(), "order": request.path_params["order"]}

    guard = litestar.middleware.DefineMiddleware(IdempotencyMiddleware, idempotency=counted.idem, principal=None)
    app = litestar.Litestar([pay], middleware=[guard], openapi_config=None)
    async with serving(app, lifespan="on") as address:
        answers = await times(2, address, "/orders/7/pay")
        assert replayed(answers)
        assert answers[0].json() == {"charge": 1, "attempt": 1, "order": 7}
        assert (await times(1, address, "/nowhere"))[0].status_code == 404
    assert "POST /orders/{order}/pay" in counted.operations
    assert counted.calls == 1


async def test_quart(counted: Counted) -> None:
    """Around its ASGI application: the whole path stands for the route."""
    app = quart.Quart(__name__)

    @app.post("/orders/<int:order>/pay")
    async def pay(order: int) -> Any:
        await quart.request.get_data()
        return {**counted.charge(), "order": order}, 201

    app.asgi_app = IdempotencyMiddleware(app.asgi_app, counted.idem, principal=None)  # type: ignore[method-assign, assignment, arg-type]
    async with serving(app) as address:
        answers = await times(2, address, "/orders/7/pay", json={"amount": 1})
        assert replayed(answers)
        assert answers[0].json() == {"charge": 1, "attempt": 1, "order": 7}
    assert set(counted.operations) == {"POST /orders/7/pay"}
