"""Where a guard may stand: routes, routers, applications, mounts; and that a replay never comes before authentication."""

import asyncio
import importlib
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware

from asyncidem import ConfigurationError, Idempotency, MemoryStore
from asyncidem.integrations.asgi import IdempotencyMiddleware
from asyncidem.integrations.fastapi import IdempotencyGuard

from shop_app import ALICE, BOB, KEY, Payment, Till, client, converse, user


def direct(app: FastAPI) -> httpx.AsyncClient:
    """Return a client without a server between: what the application raises is raised here."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def replayed(response: httpx.Response) -> bool:
    """Say whether a response is a replay."""
    return "idempotent-replayed" in response.headers


# -- levels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["route", "parameter", "router", "include", "nested", "application", "twice"])
async def test_a_guard_stands_at_any_level(level: str) -> None:
    """The key is the route's own: another path, also of the same router that is included twice, is another operation."""
    till = Till()
    guard = till.guard(principal=Depends(user))
    here = {level: [Depends(guard)]}
    if level == "twice":
        here = {"application": [Depends(guard)], "route": [Depends(guard)]}
    app = FastAPI(dependencies=here.get("application"))
    guard.install(app)
    router = APIRouter(prefix="/r", dependencies=here.get("router"))

    async def pay(item: str) -> dict[str, Any]:
        return {"item": item, **await till.charge()}

    async def pay_guarded(item: str, op: Annotated[Any, Depends(guard)]) -> dict[str, Any]:
        return {"item": item, **await till.charge()}

    endpoint = pay_guarded if level == "parameter" else pay
    router.post("/pay/{item}", dependencies=here.get("route"))(endpoint)
    router.get("/pay/{item}", dependencies=here.get("route"))(endpoint)
    outer = APIRouter(prefix="/o")
    outer.include_router(router, dependencies=here.get("include"))
    app.include_router(outer, prefix="/a", dependencies=here.get("nested"))
    app.include_router(outer, prefix="/b", dependencies=here.get("nested"))
    async with client(app) as http:
        for path in ("/a/o/r/pay/1", "/b/o/r/pay/1"):
            first, again = [await http.post(path, headers=ALICE) for _ in range(2)]
            assert first.json()["guarded"]
            assert replayed(again)
            assert again.content == first.content
            reused = await http.post(path.replace("/1", "/2"), headers=ALICE)
            assert reused.status_code == 422  # of the same route, and yet another request
        assert len(till.charges) == 2
        for _ in range(2):
            assert not (await http.get("/a/o/r/pay/1", headers=ALICE)).json()["guarded"]
        assert (await http.get("/a/o/r/pay/1", headers={"Authorization": "a"})).status_code == 200
        missing = await http.post("/a/o/r/pay/1", headers={"Authorization": "a"})
        assert missing.status_code == 400
    assert till.events.count("claimed") == 2


@pytest.mark.parametrize("own", [True, False], ids=["own layer", "shared layer"])
async def test_mounted_applications_are_guarded_at_each_of_their_places(own: bool) -> None:
    """By a layer of their own, or by that of the application around them."""
    till = Till()
    app, sub = FastAPI(), FastAPI()
    guard = till.guard(sub if own else app)
    for other in (app, sub):
        till.guard(other)  # others, in layers of their own

    @sub.post("/pay/{item}", dependencies=[Depends(guard)])
    async def pay(item: str) -> dict[str, Any]:
        return await till.charge()

    app.mount("/a", sub)
    app.mount("/t/{tenant}", sub)
    async with client(app, root_path="/api") as http:
        for path in ("/a/pay/1", "/t/1/pay/1", "/t/2/pay/1"):
            first, again = [await http.post(path, headers=KEY) for _ in range(2)]
            assert (first.json()["guarded"], replayed(first), replayed(again)) == (True, False, True)
        assert (await http.post("/t/2/pay/2", headers=KEY)).status_code == 422
    assert len(till.charges) == 3


async def test_what_is_not_guarded_passes_untouched() -> None:
    """Other routes, other methods, websockets and unknown paths: no store call, whatever they carry."""
    till = Till()
    guard = till.guard(principal=lambda request: request.headers.get("authorization"))
    app = FastAPI(dependencies=[Depends(guard)])
    guard.install(app)
    open_app = FastAPI()
    app.mount("/open", open_app)

    @open_app.post("/pay")
    async def unguarded() -> dict[str, Any]:
        return await till.charge()

    @app.get("/items")
    @app.put("/items")
    async def items() -> dict[str, Any]:
        return await till.charge()

    @app.websocket("/ws")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    async with client(app) as http:
        for _ in range(2):
            assert not (await http.post("/open/pay", headers=KEY)).json()["guarded"]
            for method in ("GET", "PUT"):
                assert not (await http.request(method, "/items", headers=KEY)).json()["guarded"]
        assert (await http.post("/none", headers=KEY)).status_code == 404
        assert (await http.post("/items")).status_code == 405
    scope = {"type": "websocket", "path": "/ws", "headers": [(b"idempotency-key", b"k")], "query_string": b""}
    sent: list[Any] = []
    await converse(app, scope, sent, {"type": "websocket.connect"}, {"type": "websocket.receive", "text": "x"})
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.send", "websocket.close"]
    assert till.events == []
    assert len(till.charges) == 6


# -- authentication ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["parameter", "route", "router"])
async def test_a_replay_never_comes_before_authentication(where: str) -> None:
    """Wherever the application authenticates, and although the guard names no principal of its own."""
    till = Till()
    guard = till.guard()
    app = FastAPI(dependencies=[Depends(guard)])
    guard.install(app)
    allowed = {"alice"}

    def authenticate(authorization: Annotated[str, Header()]) -> str:
        if authorization not in allowed:
            raise HTTPException(401)
        return authorization

    router = APIRouter(dependencies=[Depends(authenticate)] if where == "router" else [])
    if where == "parameter":

        @router.post("/pay")
        async def pay(name: Annotated[str, Depends(authenticate)]) -> dict[str, Any]:
            return await till.charge()

    else:

        @router.post("/pay", dependencies=[Depends(authenticate)] if where == "route" else [])
        async def pay_too() -> dict[str, Any]:
            return await till.charge()

    app.include_router(router)
    async with client(app) as http:
        assert (await http.post("/pay", headers=BOB)).status_code == 401
        assert till.events == []
        assert (await http.post("/pay", headers=ALICE)).status_code == 200
        assert replayed(await http.post("/pay", headers=ALICE))
        refused = await http.post("/pay", headers=BOB)
        assert (refused.status_code, replayed(refused)) == (401, False)
    assert till.charges == [1]


@pytest.mark.parametrize("where", ["parameter", "route", "nested", "nested twice"])
async def test_a_replay_never_comes_to_who_says_nothing(where: str) -> None:
    """FastAPI runs the next dependency although one got no valid parameters; and a guard may be part of another one."""
    till = Till()
    guard = till.guard()
    app = FastAPI()
    guard.install(app)
    asked: list[str] = []

    def authenticate(authorization: Annotated[str, Header()]) -> str:
        asked.append(authorization)
        return authorization

    async def operation(op: Annotated[Any, Depends(guard)]) -> Any:
        return op

    async def both(op: Annotated[Any, Depends(guard)], name: Annotated[str, Depends(authenticate)]) -> str:
        return name

    # Of `use_cache=False` nothing may come twice either.
    last = Depends(authenticate, use_cache=False)
    before = {"route": [Depends(guard), last], "nested": [Depends(operation), last]}
    before["nested twice"] = [Depends(operation), Depends(both)]

    async def pay() -> dict[str, Any]:
        return await till.charge()

    async def pay_named(op: Annotated[Any, Depends(guard)], name: Annotated[str, last]) -> dict[str, Any]:
        return {"name": name, **await till.charge()}

    app.post("/pay", dependencies=before.get(where))(pay_named if where == "parameter" else pay)
    async with client(app) as http:
        assert (await http.post("/pay", headers=KEY)).status_code == 422
        assert till.events == []
        assert (await http.post("/pay", headers=ALICE)).status_code == 200
        assert replayed(await http.post("/pay", headers=ALICE))
        refused = await http.post("/pay", headers=KEY)
        assert (refused.status_code, replayed(refused)) == (422, False)
        assert (await http.get("/openapi.json")).status_code == 200
    assert till.charges == [1]
    assert asked == ["alice", "alice"]


async def test_a_route_that_is_added_while_the_application_runs_is_refused_once() -> None:
    """Rather than replayed before authentication; from then on the guard is in its place."""
    till = Till()
    guard = till.guard()
    app = FastAPI(dependencies=[Depends(guard)])
    guard.install(app)
    async with client(app) as http:
        assert (await http.post("/none")).status_code == 404

        @app.post("/pay")
        async def pay(name: Annotated[str, Depends(user)]) -> dict[str, Any]:
            return await till.charge()

        first = await http.post("/pay", headers=KEY)
        assert (first.status_code, first.headers["retry-after"]) == (503, "1")
        assert first.json()["type"] == "urn:asyncidem:not-ready"
        assert (await http.post("/pay", headers=KEY)).status_code == 401
        assert (await http.post("/pay", headers=ALICE)).status_code == 200
    assert till.charges == [1]


async def test_principals_are_found_by_dependencies_and_by_functions() -> None:
    """Each has answers of their own, and what a dependency refuses is refused before any store call."""
    till = Till()
    app = FastAPI()
    ids = {"alice": UUID(int=1), "bob": UUID(int=2)}

    async def user_id(name: Annotated[str, Depends(user)]) -> UUID | None:
        return ids.get(name)

    async def of_request(request: Request) -> UUID | None:
        return ids.get(request.headers["authorization"])

    for path, principal in [
        ("/a", Depends(user_id)),
        ("/b", of_request),
        ("/c", lambda request: ids.get(request.headers["authorization"])),
    ]:
        guard = till.guard(app, principal=principal)
        app.post(path, dependencies=[Depends(guard)])(till.charge)
    async with client(app) as http:
        for path in ("/a", "/b", "/c"):
            first, again, other = [await http.post(path, headers=headers) for headers in (ALICE, ALICE, BOB)]
            assert (replayed(first), replayed(again), replayed(other)) == (False, True, False)
            assert other.json() != first.json()
            assert (await http.post(path, headers={**KEY, "Authorization": "eve"})).status_code == 403
        assert (await http.post("/a", headers=KEY)).status_code == 401
    assert len(till.charges) == 6


async def test_a_principal_that_names_nobody_for_sure_is_a_mistake() -> None:
    """It is the application's, and not its client's."""
    till = Till()
    app = FastAPI()
    guard = till.guard(app, principal=Depends(lambda: {"id": 1}))
    app.post("/pay", dependencies=[Depends(guard)])(till.charge)
    async with direct(app) as http:
        with pytest.raises(ConfigurationError, match="not dict: name the client"):
            await http.post("/pay", headers=KEY)
    assert till.charges == []


# -- with other parts of an application ----------------------------------------------------------------------------------


async def test_the_layer_is_inside_of_all_other_middleware() -> None:
    """Whenever it was added: what is compressed for one client is stored as it was before."""
    till = Till()
    app = FastAPI()
    app.add_middleware(GZipMiddleware, minimum_size=1)
    guard = till.guard(app)

    async def dispatch(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["X-Route"] = request.scope["route"].path  # what routes note in the scope is seen outside
        return response

    app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    app.post("/pay", dependencies=[Depends(guard)])(till.charge)
    async with client(app) as http:
        first = await http.post("/pay", headers=KEY | {"Accept-Encoding": "gzip"})
        again = await http.post("/pay", headers=KEY | {"Accept-Encoding": "identity"})
    assert (first.headers["content-encoding"], "content-encoding" in again.headers) == ("gzip", False)
    assert first.json() == again.json()
    assert first.headers["x-route"] == "/pay"
    assert replayed(again)


async def test_middleware_of_a_mounted_application_may_stand_between() -> None:
    """Starlette's sends a response in pieces, from another task: one that says its length is kept all the same."""
    till = Till(lease=0.2)
    app, sub = FastAPI(), FastAPI()
    guard = till.guard(app)
    sub.add_middleware(BaseHTTPMiddleware, dispatch=lambda request, call_next: call_next(request))

    @sub.post("/pay", dependencies=[Depends(guard)])
    async def pay(payment: Payment) -> dict[str, Any]:
        return await till.charge(payment.amount)

    app.mount("/sub", sub)
    till.hold.clear()
    async with client(app) as http:
        request = asyncio.create_task(http.post("/sub/pay", json={"amount": 3}, headers=KEY))
        while "renewed" not in till.events:
            await asyncio.sleep(0.01)
        till.hold.set()
        first = await request
        again = await http.post("/sub/pay", json={"amount": 3}, headers=KEY)
        assert (await http.post("/sub/pay", json={"amount": 4}, headers=KEY)).status_code == 422
    assert (first.status_code, replayed(again), again.content) == (200, True, first.content)
    assert till.charges == [3]


async def test_an_application_s_own_handlers_do_not_change_refusals_and_replays() -> None:
    """They see an HTTPException; its client gets the problem, or the first answer."""
    till = Till()
    app = FastAPI()
    guard = till.guard(app)
    seen: list[int] = []
    ends: list[str] = []

    @app.exception_handler(HTTPException)
    async def teapot(request: Request, error: HTTPException) -> JSONResponse:
        seen.append(error.status_code)
        if error.status_code == 200:
            raise RuntimeError
        return JSONResponse({"mine": True}, 418)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"mine": True}, 400)

    async def session() -> AsyncGenerator[None]:
        try:
            yield
        except HTTPException:
            ends.append("rolled back")
            raise
        ends.append("committed")

    @app.post("/pay", dependencies=[Depends(session), Depends(guard)])
    async def pay(number: int = 0) -> dict[str, Any]:
        return await till.charge()

    async with client(app) as http:
        assert (await http.post("/pay")).json()["type"] == "urn:asyncidem:missing-key"
        assert (await http.post("/pay?number=x", headers=KEY)).json() == {"mine": True}
        first = await http.post("/pay", headers=KEY)
        again = await http.post("/pay", headers=KEY)  # its handler fails, and the answer is the same
    assert (again.content, replayed(again)) == (first.content, True)
    assert seen == [400, 200]
    assert ends == ["rolled back", "committed", "rolled back"]
    assert till.charges == [1]


async def test_a_guard_inside_of_the_middleware_stands_aside() -> None:
    """The request is one operation, the middleware's; without a key the guard still asks for one."""
    till = Till()
    app = FastAPI()
    guard = till.guard(app)
    app.add_middleware(IdempotencyMiddleware, idempotency=till.idem, principal=None)
    app.post("/pay", dependencies=[Depends(guard)])(till.charge)
    async with client(app) as http:
        first, again = [await http.post("/pay", headers=KEY) for _ in range(2)]
        assert (await http.post("/pay")).status_code == 400
    assert first.json()["guarded"]
    assert replayed(again)
    assert till.events.count("claimed") == 1


async def test_files_do_not_pass_the_guard_by(tmp_path: Path) -> None:
    """A server that would send them itself is not asked to: then nothing could be stored of them."""
    till = Till()
    app = FastAPI()
    guard = till.guard(app)
    (tmp_path / "f").write_bytes(b"x")

    @app.post("/file", dependencies=[Depends(guard)])
    async def file() -> FileResponse:
        return FileResponse(tmp_path / "f")

    extensions = {"http.response.pathsend": {}, "tls": {}}
    for key in (b"idempotency-key", b"x-key"):
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": "/file",
            "query_string": b"",
            "headers": [(key, b"k")],
        }
        sent: list[Any] = []
        await converse(app, {**scope, "extensions": extensions}, sent, {"type": "http.request"})
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
        assert sent[0]["status"] == (200 if key == b"idempotency-key" else 400)
    assert len(extensions) == 2


async def test_tests_may_leave_the_guard_out() -> None:
    """By FastAPI's own means."""
    till = Till()
    app = FastAPI()
    guard = till.guard(app)
    app.post("/pay", dependencies=[Depends(guard)])(till.charge)
    app.dependency_overrides[guard] = lambda: None
    async with direct(app) as http:
        assert not (await http.post("/pay")).json()["guarded"]


# -- mistakes ------------------------------------------------------------------------------------------------------------


async def test_a_guard_that_is_not_installed_is_told_of() -> None:
    """At the first request, or, where another one is installed, when the application starts."""
    for other in (False, True):
        till = Till()
        app = FastAPI()
        app.post("/pay/{n}", dependencies=[Depends(till.guard())])(till.charge)
        if other:
            till.guard(app)
            sent: list[Any] = []
            with pytest.raises(ConfigurationError, match=r"the guard of /pay/\{n\} is not installed"):
                await converse(app, {"type": "lifespan"}, sent, {"type": "lifespan.startup"})
            assert [message["type"] for message in sent] == ["lifespan.startup.failed"]  # and a server ends
        async with direct(app) as http:
            with pytest.raises(ConfigurationError, match=r"call guard\.install\(app\)"):
                await http.post("/pay/1", headers=KEY)
        assert till.charges == []


@pytest.mark.parametrize("method", [None, "GET"])
async def test_an_installed_guard_that_guards_nothing_is_warned_about(method: str | None) -> None:
    """When the application starts: no route depends on it, or those that do have other methods."""
    till = Till()
    app = FastAPI()
    guard = till.guard(app)
    app.post("/open")(till.charge)
    if method is not None:
        app.api_route("/pay", methods=[method], dependencies=[Depends(guard)])(till.charge)
    with pytest.warns(
        UserWarning, match=r"guards nothing: no PATCH or POST route .* dependencies=\[Depends\(guard\)\]"
    ):
        await converse(app, {"type": "lifespan"}, [], {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})


async def test_a_guard_of_mounted_routes_guards_something() -> None:
    """The layer is that of the application around them."""
    till = Till()
    app, inner = FastAPI(), FastAPI()
    inner.post("/pay", dependencies=[Depends(till.guard(app))])(till.charge)
    app.mount("/inner", inner)
    sent: list[Any] = []
    await converse(app, {"type": "lifespan"}, sent, {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
    assert len(sent) == 2


async def test_an_application_whose_guards_are_installed_starts() -> None:
    """And ends."""
    till = Till()
    app = FastAPI()
    app.post("/pay", dependencies=[Depends(till.guard(app))])(till.charge)
    app.post("/open")(till.charge)
    sent: list[Any] = []
    await converse(app, {"type": "lifespan"}, sent, {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_without_fastapi_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else of the package needs it."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("fastapi", "starlette")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "asyncidem.integrations.fastapi")
    with pytest.raises(ImportError, match=r'needs FastAPI: pip install "asyncidem\[fastapi\]"'):
        importlib.import_module("asyncidem.integrations.fastapi")


async def test_installing_is_for_fastapi_and_before_the_start() -> None:
    """And twice is once."""
    guard = Till().guard()
    with pytest.raises(ConfigurationError, match="must be a FastAPI application, not APIRouter"):
        guard.install(APIRouter())  # type: ignore[arg-type]
    app = FastAPI()
    guard.install(app)
    guard.install(app)
    assert len(app.user_middleware) == 1
    async with direct(app) as http:
        assert (await http.get("/none")).status_code == 404
    with pytest.raises(ConfigurationError, match="has started"):
        guard.install(app)


def test_principals_that_cannot_work_are_refused() -> None:
    """A function that FastAPI has to call is told apart from one of the request."""

    def of_default(token: str = Depends(user)) -> str:
        return token

    def of_annotation(token: Annotated[str, Header()]) -> str:
        return token

    idem = Idempotency(MemoryStore())
    for principal in (of_default, of_annotation):
        with pytest.raises(ConfigurationError, match=rf"write Depends\({principal.__name__}\)"):
            IdempotencyGuard(idem, principal=principal)
    with pytest.raises(ConfigurationError, match=r"Depends\(\) alone names none"):
        IdempotencyGuard(idem, principal=Depends())
    with pytest.raises(ConfigurationError, match="principal must be a function of the request"):
        IdempotencyGuard(idem, principal="alice")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="max_body must be"):
        IdempotencyGuard(idem, principal=None, max_body=-1)

    def unresolved(request: "Nowhere") -> str:  # type: ignore[name-defined]  # noqa: F821
        return str(request)

    IdempotencyGuard(idem, principal=unresolved)
