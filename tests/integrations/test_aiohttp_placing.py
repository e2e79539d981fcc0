"""Where guards stand: applications, sub-applications, handlers of every kind, guards within guards."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler

from asyncidem import ConfigurationError, MemoryStore, current_operation
from asyncidem.integrations.aiohttp import IDEMPOTENCY, idempotency_middleware, idempotent_handler
from asyncidem.testing import FaultyStore

from integrations.aiohttp_sites import Effect, guarded, make_idempotency, serve, who

guard = idempotent_handler(principal=who)


@guard
async def function(request: web.Request) -> web.StreamResponse:
    """Answer with the operation."""
    return web.Response(text=named(request))


class Methods:
    """Handlers as methods of an object."""

    @guard
    async def create(self, request: web.Request) -> web.StreamResponse:
        """Answer with the operation."""
        return web.Response(text=named(request))


class Payments(web.View):
    """Handlers as methods of a view, one of them guarded."""

    @guard
    async def post(self) -> web.StreamResponse:
        """Answer with the operation."""
        return web.Response(text=named(self.request))

    async def get(self) -> web.StreamResponse:
        """Answer without one."""
        assert current_operation() is None
        return web.Response(text="read")


def named(request: web.Request) -> str:
    """Return the downstream key of the running operation, whose attempt is the first."""
    op = current_operation()
    assert op is not None
    assert op.attempt == 1
    assert request.method == "POST"
    return op.downstream_key


@pytest.mark.parametrize("handler", [function, Methods().create, Payments])
async def test_decorator_guards_functions_and_methods(handler: Any) -> None:
    """The operation is there for the handler, the key is required, and other methods of a view are not guarded."""
    app = web.Application()
    app[IDEMPOTENCY] = make_idempotency()
    app.router.add_route("*", "/pay", handler)
    async with serve(app) as site:
        first, second, missing = await site.post(), await site.post(), await site.post(key=None)
        assert len(first.body) == 32
        assert (first.body, second.replayed, missing.status) == (second.body, True, 400)
        if handler is Payments:
            assert (await site.ask("GET", "/pay", key=None)).body == b"read"


async def test_decorated_handler_keeps_its_names_and_can_be_called_by_keyword() -> None:
    """Documentation tools find what they look for; a middleware may hand the request on by its name."""
    assert (function.__name__, function.__doc__) == ("function", "Answer with the operation.")

    @web.middleware
    async def by_name(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await function(request=request)

    app = web.Application(middlewares=[by_name])
    app[IDEMPOTENCY] = make_idempotency()
    app.router.add_post("/pay", Effect().run)
    async with serve(app) as site:
        assert [(await site.post()).replayed for _ in range(2)] == [False, True]


async def test_what_is_no_handler_is_refused() -> None:
    """A plain function and a view at decoration; a call without a request when it happens."""
    for wrong in (lambda _: None, Payments):
        decorate: Callable[[Any], Any] = guard
        with pytest.raises(ConfigurationError, match="must be an async function"):
            decorate(wrong)

    async def handler(number: int) -> web.StreamResponse:
        raise NotImplementedError

    with pytest.raises(ConfigurationError, match=r"called with its web\.Request"):
        await guard(handler)(7)


@pytest.mark.parametrize("make", [idempotency_middleware, idempotent_handler])
def test_options_are_checked_when_the_guard_is_made(make: Any) -> None:
    """With an Idempotency or without one."""
    for idempotency in (None, make_idempotency()):
        for options in ({"max_body": -1}, {"wait": -1}, {"required": "yes"}, {"methods": "POST"}):
            with pytest.raises(ConfigurationError):
                make(idempotency, principal=who, **options)
        with pytest.raises(ConfigurationError, match="principal"):
            make(idempotency, principal="ann")
    with pytest.raises(ConfigurationError, match="must be an Idempotency"):
        make("redis://", principal=who)
    with pytest.raises(TypeError, match="principal"):
        make()


async def test_application_without_an_idempotency_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    """At the first request that needs one."""
    app = web.Application()
    app.router.add_post("/pay", function)
    async with serve(app) as site:
        assert (await site.post()).status == 500
    assert "set app[IDEMPOTENCY] = Idempotency(...)" in caplog.text


async def test_one_guard_serves_many_applications() -> None:
    """Each with its own Idempotency; and one that is given to the guard comes before the application's."""
    stores = [FaultyStore(MemoryStore()) for _ in range(3)]
    for store in stores[:2]:
        app = web.Application()
        app[IDEMPOTENCY] = make_idempotency(store)
        app.router.add_post("/pay", function)
        async with serve(app) as site:
            assert [(await site.post()).replayed for _ in range(2)] == [False, True]
    app = web.Application(middlewares=[idempotency_middleware(make_idempotency(stores[2]), principal=who)])
    app[IDEMPOTENCY] = make_idempotency(stores[0])
    app.router.add_post("/pay", Effect().run)
    before = len(stores[0].calls)
    async with serve(app) as site:
        assert [(await site.post()).replayed for _ in range(2)] == [False, True]
    assert all(store.calls for store in stores)
    assert len(stores[0].calls) == before


async def test_sub_applications_have_keys_of_their_own() -> None:
    """The route of a nested application has the prefixes of those around it; what the root holds serves them all."""
    effect = Effect()
    inner, middle, outer = web.Application(), web.Application(), guarded(effect.run)
    for app in (inner, middle):
        app.router.add_post("/pay", effect.run)
    middle.add_subapp("/inner", inner)
    outer.add_subapp("/middle", middle)
    async with serve(outer) as site:
        for _ in range(2):
            bodies = [(await site.post(path)).body for path in ("/pay", "/middle/pay", "/middle/inner/pay")]
            assert bodies == [b'{"charged": 1}', b'{"charged": 2}', b'{"charged": 3}']
        assert (await site.post("/middle/nothing", key="a b")).status == 404


async def test_middleware_of_a_sub_application_guards_it_alone() -> None:
    """With the Idempotency of the nearest application around it."""
    effect, store = Effect(), FaultyStore(MemoryStore())
    inner = web.Application(middlewares=[idempotency_middleware(principal=who)])
    inner[IDEMPOTENCY] = make_idempotency(store)
    inner.router.add_post("/pay", effect.run)
    outer = web.Application()
    outer[IDEMPOTENCY] = make_idempotency()
    outer.router.add_post("/pay", effect.run)
    outer.add_subapp("/inner", inner)
    async with serve(outer) as site:
        assert [(await site.post("/inner/pay")).replayed for _ in range(2)] == [False, True]
        assert [(await site.post()).replayed for _ in range(2)] == [False, False]
    assert store.calls


async def test_guard_within_a_guard_leaves_it_to_the_outer_one() -> None:
    """One operation, two store calls; the inner one still asks for a key where the outer one does not."""
    store = FaultyStore(MemoryStore())
    app = guarded(function, idempotency=make_idempotency(store))
    clones = web.Application(middlewares=[*app.middlewares])

    @web.middleware
    async def clone(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await handler(request.clone())

    clones.middlewares.append(clone)
    clones[IDEMPOTENCY] = make_idempotency(store)
    clones.router.add_post("/pay", function)
    for number, one in enumerate((app, clones)):
        store.calls.clear()
        async with serve(one) as site:
            assert (await site.post(key=f"k{number}")).status == 200
            assert [call.primitive for call in store.calls] == ["put_if_absent", "swap"]
            assert (await site.post(key=f"k{number}")).replayed
            assert (await site.post(key=None)).status == 400


async def test_middleware_outside_may_call_its_handler_twice() -> None:
    """The second call of one request is guarded as the first was, and is a replay."""

    @web.middleware
    async def again(request: web.Request, handler: Handler) -> web.StreamResponse:
        await handler(request)
        return await handler(request)

    effect = Effect()
    app = guarded(effect.run)
    app.middlewares.insert(0, again)
    async with serve(app) as site:
        assert (await site.post(data=b"1")).replayed
    assert effect.count == 1


async def test_operation_ends_with_its_guard() -> None:
    """Middlewares outside see none, behind a first answer as behind a replay and a refusal."""
    seen = []

    @web.middleware
    async def outside(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        finally:
            seen.append(current_operation())

    app = guarded(Effect().run)
    app.middlewares.insert(0, outside)
    async with serve(app) as site:
        for data in (b"1", b"1", b"2"):
            await site.post(data=data)
    assert seen == [None] * 3


async def test_server_that_a_guarded_handler_starts_is_guarded_itself() -> None:
    """Its requests inherit the context of the handler, and are no part of its request."""
    inner = web.Application()
    inner[IDEMPOTENCY] = make_idempotency()
    inner.router.add_post("/pay", function)

    async def handler(request: web.Request) -> web.StreamResponse:
        async with serve(inner) as site:
            return web.json_response([(await site.post()).replayed for _ in range(2)])

    async with serve(guarded(handler)) as site:
        assert (await site.post()).body == b"[false, true]"


async def test_middleware_behind_authentication_never_answers_a_stranger() -> None:
    """A replay needs the same user as the first call; what authentication refuses never reaches the guard."""

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {who(request)}":
            raise web.HTTPUnauthorized
        return await handler(request)

    store = FaultyStore(MemoryStore())
    effect = Effect()
    app = guarded(effect.run, idempotency=make_idempotency(store))
    app.middlewares.insert(0, authenticate)
    async with serve(app) as site:
        assert (await site.post()).status == 401
        assert store.calls == []
        assert (await site.post(headers={"Authorization": "Bearer ann"})).status == 201
        assert (await site.post(headers={"Authorization": "Bearer mallory"})).status == 401
        assert (await site.post(headers={"Authorization": "Bearer ann"})).replayed
    assert effect.count == 1


async def test_route_without_a_resource_is_known_by_its_path() -> None:
    """A router may find handlers that belong to no resource."""

    class Router(web.UrlDispatcher):
        async def resolve(self, request: web.Request) -> web.UrlMappingMatchInfo:
            found = await super().resolve(request)
            found.route._resource = None
            return found

    app = guarded(Effect().run)
    app._router = Router()
    app.router.add_post("/{any}", Effect().run)
    async with serve(app) as site:
        for path in ("/a", "/b"):
            assert [(await site.post(path)).replayed for _ in range(2)] == [False, True]


def test_module_says_what_to_install() -> None:
    """Without aiohttp its import names the extra; and the package does not import it by itself."""
    script = (
        "import sys, asyncidem, asyncidem.integrations.guarding; assert 'aiohttp' not in sys.modules\n"
        "sys.modules['aiohttp'] = None\nimport asyncidem.integrations.aiohttp"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert 'ImportError: asyncidem.integrations.aiohttp needs aiohttp: pip install "asyncidem[aiohttp]"' in done.stderr
