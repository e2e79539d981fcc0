"""The guard of FastAPI's routes: a dependency that claims the key once the client is authenticated.

::

    guard = IdempotencyGuard(idem, principal=Depends(user_id))
    guard.install(app)

    @app.post("/payments", dependencies=[Depends(guard)])
    async def create(payment: Payment) -> Receipt: ...

It has two parts. The dependency claims the key, behind all other dependencies of the route, so that no replay is given
out before they have had their say. The layer that ``install`` puts innermost among the application's middleware notes
the request's body as it is read, and stores the response before its last message goes on. A refusal or a replay is an
``HTTPException`` within the application, so that dependencies are ended as for any other; the layer answers in its
place, with the bytes that belong there.
"""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Final, NoReturn, TypeAlias, Unpack

try:
    import fastapi.routing
    from fastapi import FastAPI, HTTPException, Request, params
    from fastapi.dependencies.models import Dependant
    from fastapi.exceptions import RequestValidationError
    from starlette.middleware import Middleware
    from starlette.requests import HTTPConnection
except ImportError as error:
    raise ImportError('asyncidem.integrations.fastapi needs FastAPI: pip install "asyncidem[fastapi]"') from error

from ..errors import ConfigurationError
from ..idempotency import Idempotency
from ..operation import Operation, current_operation
from .asgi import (
    GUARDED,
    SHORTCUTS,
    App,
    Capture,
    HTTPFailure,
    Message,
    Receive,
    Scope,
    Send,
    answer,
    header_lines,
)
from .guarding import ClientGoneError, UnansweredError, begin
from .http import REFUSALS, Answer, HTTPOptions, NotCarriedOutError, Problem, ProblemError, Rules
from .openapi import describe

__all__ = ["HTTPFailure", "IdempotencyGuard"]

EXCHANGES: Final = "asyncidem.exchanges"
"""Where a guard finds the exchange of its layer in the scope: a mounted application may have a layer of its own."""

NOT_READY: Final = Problem(
    503, "not-ready", "Not ready", "This operation has just been added: repeat the request with the same key.", 1
)

Principal: TypeAlias = params.Depends | Callable[[Request], Any] | None


class AnsweredError(HTTPException):
    """Ends a request that its layer answers."""


class IdempotencyGuard:
    """Guards the routes that depend on it: ``Depends(guard)`` at a route, a router or the application.

    Within a guarded route it is worth the running operation, or None where there is none: the method is not guarded, or
    the request has no key and needs none. ``current_operation()`` gives the same, in plain functions too.

    Args:
        idempotency: where operations run.
        principal: who asks; nobody gets another's answer, and a request of nobody is refused with 403. ``Depends(fn)``,
            where ``fn`` returns text, a whole number or a UUID, is resolved by FastAPI, before the key is claimed. Else a
            function, sync or async, of the request, or, written out, None for an API with a single client.
        required: whether a request without a key is refused.
        **options: the further ones of :class:`~asyncidem.integrations.http.Rules`.

    Raises:
        ConfigurationError: an option cannot work.
    """

    def __init__(
        self,
        idempotency: Idempotency,
        *,
        principal: Principal,
        required: bool = True,
        **options: Unpack[HTTPOptions[Request]],
    ) -> None:
        self._resolved = isinstance(principal, params.Depends)
        parameters = [inspect.Parameter("connection", inspect.Parameter.KEYWORD_ONLY, annotation=HTTPConnection)]
        if isinstance(principal, params.Depends):
            if principal.dependency is None:
                raise ConfigurationError("principal must be Depends of a function; Depends() alone names none")
            parameters.append(inspect.Parameter("principal", inspect.Parameter.KEYWORD_ONLY, default=principal))
            principal = None
        elif principal is not None and _has_dependencies(principal):
            raise ConfigurationError(f"principal has dependencies of its own: write Depends({principal.__name__})")
        self.rules: Rules[Request] = Rules(idempotency, principal=principal, required=required, **options)
        # What FastAPI takes for the parameters of `__call__`.
        self.__signature__ = inspect.Signature(parameters)

    def install(self, app: FastAPI) -> None:
        """Put the layer into an application, and the header and its problems into its OpenAPI document.

        Once for each application whose routes are guarded; one that is mounted shares the layer of the one around it,
        and needs one of its own for its document only. Other middleware may be added before or after: all of it is
        outside of the layer. It guards nothing by itself: routes depend on the guard. Where none does when the
        application starts, a warning says so.

        Raises:
            ConfigurationError: ``app`` is no FastAPI application, or has started.
        """
        if not isinstance(app, FastAPI):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"app must be a FastAPI application, not {type(app).__name__}")
        if app.middleware_stack is not None:
            raise ConfigurationError("the application has started: install the guard before that")
        found = [one for middleware in app.user_middleware for one in middleware.args if isinstance(one, Installation)]
        installation = found[0] if found else Installation(app)
        if not found:
            app.user_middleware.append(Middleware(Layer, installation))
        installation.add(self)

    async def __call__(self, connection: HTTPConnection, principal: Any = None) -> AsyncGenerator[Operation | None]:
        """Claim the key of a request; FastAPI calls this.

        Raises:
            ConfigurationError: the guard is not installed.
        """
        scope = connection.scope
        if not isinstance(connection, Request) or not self.rules.guards(scope["method"]):
            yield None
            return
        if GUARDED in scope:
            yield current_operation()
            return
        exchange: Exchange | None = scope.get(EXCHANGES, {}).get(self)
        if exchange is None:
            raise ConfigurationError("the guard is not installed in this application: call guard.install(app)")
        op = await exchange.claim(self.rules, connection, (principal,) if self._resolved else ())
        try:
            yield op
        except RequestValidationError:
            # The endpoint did not run; the 422 that follows is not its answer.
            await exchange.release()
            raise


class Installation:
    """What the layer of an application knows.

    Args:
        app: the application.

    Attributes:
        guards: those that are installed.
        methods: that any of them guards.
        max_body: bytes of a request's body that the most generous of them takes.
    """

    def __init__(self, app: FastAPI) -> None:
        self.guards: tuple[IdempotencyGuard, ...] = ()
        self.methods: frozenset[str] = frozenset()
        self.max_body = 0
        self._app = app
        self._ordered = False
        self._openapi = app.openapi
        self._document: dict[str, Any] | None = None
        app.openapi = self.openapi  # type: ignore[method-assign]  # as FastAPI's guide to extending the document does

    def add(self, guard: IdempotencyGuard) -> None:
        """Take note of a guard."""
        if guard not in self.guards:
            self.guards += (guard,)
        self.methods |= guard.rules.methods
        self.max_body = max(self.max_body, guard.rules.max_body)

    def order(self) -> None:
        """Move guards behind the other dependencies of their routes."""
        if not self._ordered:
            self._ordered = True
            for route in _routes(self._app.routes, mounted=True):
                order(route.dependant)

    def check(self) -> None:
        """Hold the guards that routes depend on against those that are installed, and warn of one that guards nothing.

        Raises:
            ConfigurationError: one is missing.
        """
        for route in _routes(self._app.routes, mounted=False):
            if any(guard not in self.guards for guard in _guards(route.dependant)):
                raise ConfigurationError(f"the guard of {route.path_format} is not installed: call guard.install(app)")
        routes = [*_routes(self._app.routes, mounted=True)]
        for guard in self.guards:
            if not any(guard in _guards(route.dependant, method) for route in routes for method in route.methods):
                warnings.warn(
                    f"an installed guard guards nothing: no {' or '.join(sorted(guard.rules.methods))} route depends on "
                    "it; write dependencies=[Depends(guard)] at the routes, or name other methods=",
                    UserWarning,
                    stacklevel=2,
                )

    def openapi(self) -> dict[str, Any]:
        """Return the application's document, with what is guarded in it."""
        document = self._openapi()
        if document is not self._document:
            self._document = document
            for route in _routes(self._app.routes, mounted=False):
                for guard in _guards(route.dependant):
                    for method in filter(guard.rules.guards, route.methods):
                        operation = document["paths"].get(route.path_format, {}).get(method.lower())
                        if operation is not None:  # it may be left out of the document
                            describe(document, operation, guard.rules)
        return document


class Layer:
    """The part of the guard that stands between the application's middleware and its routes.

    Args:
        app: what is inside.
        installation: of which application.
    """

    def __init__(self, app: App, installation: Installation) -> None:
        self.app = app
        self._installation = installation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, a websocket or the lifespan."""
        self._installation.order()
        if scope["type"] == "http" and scope["method"] in self._installation.methods:
            exchange = Exchange(scope, receive, send, self._installation.max_body)
            # In place, as routers do: what stands outside may look at the route that they note there.
            scope[EXCHANGES] = {**scope.get(EXCHANGES, {}), **dict.fromkeys(self._installation.guards, exchange)}
            await exchange.serve(self.app)
            return
        if scope["type"] == "lifespan":
            try:
                self._installation.check()
            except ConfigurationError as error:
                await receive()
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                raise
        await self.app(scope, receive, send)


class Exchange:
    """One request and its response, as they pass the layer.

    Args:
        scope: of the request; what routes it notes there is found here.
        receive: the server's.
        send: the server's.
        limit: bytes of the request's body that are noted.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._limit = limit
        self._keyed = bool(header_lines(scope, b"idempotency-key"))
        self._noted: list[bytes] = []
        self._size = 0
        self._whole = False  # whether the body was read to its end
        self._unread: deque[Message] = deque()  # what was read ahead of the application
        self._capture: Capture | None = None
        self._answer: tuple[Answer | None, bool] | None = None
        self._answered = False

    async def serve(self, app: App) -> None:
        """Run the application, and see to it that the request is answered and its operation settled."""
        try:
            await app(self._scope, self.receive, self.send)
        except BaseException as error:
            if self._capture is not None:
                await self._capture._ended(error)
                if self._capture._replaced:
                    return
            elif self._answer is not None and isinstance(error, Exception):
                await self._give()
            raise
        if self._capture is not None:
            await self._capture._ended(UnansweredError())

    async def claim(self, rules: Rules[Request], request: Request, principal: tuple[Any, ...]) -> Operation | None:
        """Begin the operation of the request; None if it has no key and needs none.

        Args:
            rules: the guard's.
            request: as its dependency got it.
            principal: what FastAPI has resolved, if the guard left it to that.

        Raises:
            AnsweredError: the request is refused, or its answer replayed.
        """
        scope = request.scope
        try:
            key = rules.key(header_lines(scope, b"idempotency-key"))
            if key is None:
                if rules.required:
                    raise rules.missing()
                return None
            route = _route(scope)
            _hold_back(route)
            who = rules.known(principal[0]) if principal else await rules.principal_of(request)
            content = await self._read(rules)
            types = header_lines(scope, b"content-type")
            query = scope.get("query_string", b"").decode("latin-1")
            method, path = scope["method"], scope["path"]
            mark = rules.mark(request, method, path, query, types[0] if types else "", content)
            op = rules.operation(who, method, _template(route, scope), key, mark)
            await begin(op, self._left if rules.waits else None)
        except ClientGoneError:
            self._end(None)
        except ProblemError as refusal:
            self._refuse(refusal.problem, rules)
        except REFUSALS as error:
            self._refuse(rules.problem(error), rules)
        if op.replayed:
            self._end(op.result, replayed=True)
        # From here on the operation has to be settled, whatever happens; `serve` does.
        self._capture = Capture(rules, op, self._send)
        scope[GUARDED] = True
        extensions: Any = scope.get("extensions")
        if extensions and not SHORTCUTS.isdisjoint(extensions):
            scope["extensions"] = {name: value for name, value in extensions.items() if name not in SHORTCUTS}
        return op

    async def release(self) -> None:
        """Take note that the endpoint did not run."""
        if self._capture is not None:
            await self._capture._ended(NotCarriedOutError("the request is not valid"))

    # -- the request --------------------------------------------------------------------------------------------------

    async def receive(self) -> Message:
        """Give the application what the server has, and note the body.

        Raises:
            AnsweredError: the body is longer than the guard of the route allows.
        """
        if self._unread:
            return self._unread.popleft()
        if self._whole or not self._keyed:
            return await self._receive()
        guard = next(iter(_guards(getattr(_route(self._scope), "dependant", None), self._scope["method"])), None)
        if guard is not None and self._declared() > guard.rules.max_body:
            self._refuse(guard.rules.too_large().problem, guard.rules)
        message = await self._next()
        if guard is not None and self._size > guard.rules.max_body:
            self._refuse(guard.rules.too_large().problem, guard.rules)
        return message

    async def _read(self, rules: Rules[Request]) -> bytes:
        """Return the whole body, whether the application has read it already or will do so."""
        if self._declared() > rules.max_body:
            raise rules.too_large()
        while not self._whole and self._size <= rules.max_body:
            message = await self._next()
            if message["type"] != "http.request":
                raise ClientGoneError
            self._unread.append(message)
        if self._size > rules.max_body:
            raise rules.too_large()
        return b"".join(self._noted)

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request":
            return message
        part: bytes = message.get("body", b"")
        self._size += len(part)
        self._whole = not message.get("more_body", False)
        self._noted.append(part)
        if self._size > self._limit:
            self._noted = []  # no guard takes it, and what is not guarded may be as long as it likes
        return message

    def _declared(self) -> int:
        lengths = header_lines(self._scope, b"content-length")
        return int(lengths[0]) if lengths and lengths[0].isdecimal() else 0

    async def _left(self) -> None:
        """Return when the client has disconnected."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # -- the response -------------------------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """Take a message of the application to the client, or the layer's own answer in its place."""
        if self._answer is not None:
            await self._give()
        elif self._capture is not None:
            await self._capture.send(message)
        else:
            await self._send(message)

    async def _give(self) -> None:
        if self._answer is None or self._answered:
            return
        self._answered = True
        response, replayed = self._answer
        if response is not None:
            await answer(self._send, response, replayed=replayed)

    def _refuse(self, problem: Problem, rules: Rules[Request]) -> NoReturn:
        self._end(problem.answer(rules.documentation_url))

    def _end(self, response: Answer | None, *, replayed: bool = False) -> NoReturn:
        """End the request with a response, or without one where the client has gone."""
        self._answer = (response, replayed)
        # With a detail, for not every status has a phrase; nobody gets it.
        raise AnsweredError(499 if response is None else response.status, "answered by the idempotency guard") from None


def order(dependant: Any) -> bool:
    """Put the guards of a route behind its other dependencies; return whether they were not there.

    To be called later is not enough: FastAPI goes on with the next dependency where the parameters of one are not valid,
    a missing token among them, and refuses the request behind the last one. So guards depend on all others, which leaves
    guards alone that are not to run. They are not run twice, for FastAPI keeps what they gave.

    The list is replaced, and not changed, for a request may be on its way through it.
    """
    if not any(_guards(dependant)) or _are_behind(dependant):
        return False
    gate = Dependant(call=others, dependencies=[*_unguarded(dependant)])
    dependant.dependencies = _behind(dependant.dependencies, gate)
    return True


def _are_behind(dependant: Any) -> bool:
    return all(
        any(below.call is others for below in one.dependencies)
        if isinstance(one.call, IdempotencyGuard)
        else _are_behind(one)
        for one in dependant.dependencies
    )


async def others() -> None:
    """Stand for all dependencies of a route but its guards, in the list of what these depend on."""


def _behind(dependencies: list[Any], gate: Dependant) -> list[Any]:
    """Return dependencies whose guards, and what depends on them, are the last, and depend on ``gate``."""
    first: list[Any] = []
    last: list[Any] = []
    for one in dependencies:
        if isinstance(one.call, IdempotencyGuard):
            last.append(replace(one, dependencies=[gate, *one.dependencies]))
        elif any(_guards(one)):
            last.append(replace(one, dependencies=_behind(one.dependencies, gate)))
        else:
            first.append(one)
    return first + last


def _unguarded(dependant: Any) -> Iterator[Any]:
    """Yield the dependencies that no guard is among, each to be run once."""
    for one in dependant.dependencies:
        if isinstance(one.call, IdempotencyGuard):
            continue
        if any(_guards(one)):
            yield from _unguarded(one)
        else:
            yield replace(_once(one), name=None)  # nobody takes the value


def _once(dependant: Any) -> Any:
    """Return a dependency whose value, and that of all below, is taken from where it was run."""
    return replace(dependant, use_cache=True, dependencies=[*map(_once, dependant.dependencies)])


def _hold_back(route: Any) -> None:
    """Refuse a request whose guard is not behind the other dependencies: what authenticates may not have run yet.

    The route was added while the application ran. Next time the guard is.
    """
    if order(getattr(route, "dependant", None)):
        raise ProblemError(NOT_READY)


def _guards(dependant: Any, method: str | None = None) -> Iterator[IdempotencyGuard]:
    """Yield the guards that a route depends on, also by way of others; with a method, those that guard it."""
    for one in getattr(dependant, "dependencies", ()):
        if isinstance(one.call, IdempotencyGuard) and (method is None or one.call.rules.guards(method)):
            yield one.call
        yield from _guards(one, method)


def _routes(routes: Iterable[Any], *, mounted: bool) -> Iterator[Any]:
    """Yield what is known of each route that has dependencies; with those of mounted applications, if they are wanted."""
    # In FastAPI 0.165 (2026-11) a router that is included keeps its routes; contexts tell what they are there.
    contexts: Any = getattr(fastapi.routing, "iter_route_contexts", iter)
    for route in contexts(routes):
        if getattr(route, "dependant", None) is not None:
            if getattr(route, "methods", None):  # a websocket has none
                yield route
        elif mounted:
            yield from _routes(getattr(route, "routes", None) or (), mounted=True)


def _route(scope: Scope) -> Any:
    """Return what is known of the route that serves a request; see :func:`_routes`."""
    route = scope.get("route")
    context = scope.get("fastapi", {}).get("effective_route_context")
    return context if context is not None and context.original_route is route else route


def _template(route: Any, scope: Scope) -> str:
    """Return the template of a route, behind the path that its application is mounted at; else the whole path."""
    root: str = scope.get("root_path", "")
    return root.removeprefix(scope.get("app_root_path", root)) + str(getattr(route, "path_format", scope["path"]))


def _has_dependencies(fn: Callable[..., Any]) -> bool:
    """Say whether a function is written for FastAPI to call."""
    try:
        parameters = inspect.signature(fn, eval_str=True).parameters.values()
    except (TypeError, ValueError, NameError):
        return False
    marks = [mark for one in parameters for mark in (one.default, *getattr(one.annotation, "__metadata__", ()))]
    return any(isinstance(mark, params.Depends | params.Param | params.Body) for mark in marks)
