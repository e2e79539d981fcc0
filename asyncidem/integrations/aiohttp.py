"""Guards for aiohttp: endpoints that are safe to retry, by middleware for whole applications or decorator for handlers.

::

    app = web.Application(middlewares=[authenticate, idempotency_middleware(principal=lambda request: request[USER])])
    app[IDEMPOTENCY] = Idempotency(store, namespace="shop")

The guard must stand behind the middleware that authenticates, or a replay would be given to whoever sends the key, and
behind those that change responses for one client, such as compression. Signals of ``on_response_prepare`` run for
replays as they do for first answers.

What is stored is a ``web.Response`` with its body in memory, returned or raised. Streams, files, and responses that the
handler compresses itself go to their clients untouched, and are not replayed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any, Final, ParamSpec, Protocol, TypeAlias, Unpack, cast

try:
    from aiohttp import web
    from aiohttp.typedefs import Handler, Middleware
except ImportError as missing:
    raise ImportError('asyncidem.integrations.aiohttp needs aiohttp: pip install "asyncidem[aiohttp]"') from missing

from ..errors import CompletionError, ConfigurationError, IdempotencyError, InProgressError, LeaseLostError
from ..idempotency import Idempotency
from ..operation import Operation
from ..options import is_coroutine_callable
from ..stores.memory import MemoryStore
from .aiohttp_messages import (
    Body,
    body_of,
    headers_of,
    is_routed,
    phrase,
    put,
    read,
    replay,
    request_in,
    response_of,
    status_of,
)
from .guarding import ClientGoneError, UnansweredError, begin, fail, settle
from .http import KEY_HEADER, Answer, HTTPFailure, HTTPOptions, ProblemError, Rules

__all__ = ["IDEMPOTENCY", "HTTPFailure", "idempotency_middleware", "idempotent_handler"]

P = ParamSpec("P")

Principal: TypeAlias = Callable[[web.Request], Any]

IDEMPOTENCY: Final = web.AppKey("asyncidem", Idempotency)
"""Where an application holds the Idempotency of its guards, for sub-applications too."""

FIELD: Final = KEY_HEADER.lower().encode("ascii")

CLIENT_CLOSED_REQUEST: Final = 499
"""What access logs show for a client that went away, after nginx. Nobody gets it."""

acting: ContextVar[object] = ContextVar("asyncidem_aiohttp_acting", default=None)
"""The writer of the request whose guard acts. Clones of a request share it, and no other request has it."""


Guarded: TypeAlias = Coroutine[Any, Any, web.StreamResponse]


class Decorator(Protocol):
    """Keeps the parameters of the handler that it wraps."""

    def __call__(self, fn: Callable[P, Awaitable[web.StreamResponse]], /) -> Callable[P, Guarded]:
        """Return the guarded handler."""
        ...


def idempotency_middleware(
    idempotency: Idempotency | None = None,
    *,
    principal: Principal | None,
    required: bool = False,
    **options: Unpack[HTTPOptions[web.Request]],
) -> Middleware:
    """Return a middleware that guards the routes of an application or sub-application.

    Put it behind the middleware that authenticates. An application behind ``add_domain`` shares its paths with others:
    give it an Idempotency with a namespace of its own.

    Args:
        idempotency: where operations run; without it, ``app[IDEMPOTENCY]``.
        principal: who asks: a function, sync or async, of the request. None, written out, puts all clients into one
            space of keys.
        required: whether a request without a key is refused. The middleware sees routes that need none.
        **options: those of :class:`~asyncidem.integrations.http.Rules`.

    Raises:
        ConfigurationError: an option cannot work.
    """
    guard = Guard(idempotency, principal, required, options)

    # aiohttp calls it with `handler` as a keyword.
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await guard.respond(request, functools.partial(handler, request))

    return middleware


def idempotent_handler(
    idempotency: Idempotency | None = None,
    *,
    principal: Principal | None,
    required: bool = True,
    **options: Unpack[HTTPOptions[web.Request]],
) -> Decorator:
    """Return a decorator that guards one handler: a coroutine function of the request, or a method.

    It belongs below the decorator of the route, which registers the function as it finds it::

        @routes.post("/payments")
        @idempotent_handler(principal=lambda request: request[USER])
        async def pay(request: web.Request) -> web.Response: ...

    Args:
        idempotency: where operations run; without it, ``app[IDEMPOTENCY]`` of the application that serves the request.
        principal: as for :func:`idempotency_middleware`.
        required: whether a request without a key is refused.
        **options: those of :class:`~asyncidem.integrations.http.Rules`.

    Raises:
        ConfigurationError: an option cannot work, or what is decorated is no coroutine function.
    """
    guard = Guard(idempotency, principal, required, options)

    def decorate(fn: Callable[P, Awaitable[web.StreamResponse]], /) -> Callable[P, Guarded]:
        if not is_coroutine_callable(fn):
            raise ConfigurationError(
                f"a guarded handler must be an async function or method, not {fn!r}; of a web.View decorate its methods"
            )

        @functools.wraps(fn)
        async def handler(*args: P.args, **kwargs: P.kwargs) -> web.StreamResponse:
            request = request_in(*args, *kwargs.values())
            return await guard.respond(request, functools.partial(fn, *args, **kwargs))

        return handler

    return decorate


class Guard:
    """What middleware and decorator share.

    Args:
        idempotency: where operations run; None for that of the application.
        principal: who asks.
        required: whether a request without a key is refused.
        options: of the rules.
    """

    def __init__(
        self,
        idempotency: Idempotency | None,
        principal: Principal | None,
        required: bool,  # noqa: FBT001 - called here only
        options: HTTPOptions[web.Request],
    ) -> None:
        self._principal = principal
        self._required = required
        self._options = options
        self._held = idempotency is None
        # Options are checked here and not at the first request, whichever Idempotency there will be.
        self._rules: Rules[web.Request] = self._make(Idempotency(MemoryStore()) if idempotency is None else idempotency)

    def _make(self, idempotency: Idempotency) -> Rules[web.Request]:
        return Rules(idempotency, principal=self._principal, required=self._required, **self._options)

    def _rules_for(self, request: web.Request) -> Rules[web.Request]:
        if self._held:
            held = request.config_dict.get(IDEMPOTENCY)
            if held is None:
                raise ConfigurationError(
                    "the application holds no Idempotency: set app[IDEMPOTENCY] = Idempotency(...) before it starts, or "
                    "give one to the guard"
                )
            if held is not self._rules.idempotency:
                self._rules = self._make(held)
        return self._rules

    async def respond(self, request: web.Request, run: Callable[[], Awaitable[Any]]) -> web.StreamResponse:
        """Answer a request: run its handler, or do not."""
        if not self._rules.guards(request.method) or acting.get() is request.writer or not is_routed(request):
            return cast("web.StreamResponse", await run())
        rules = self._rules_for(request)
        try:
            key = rules.key([line.decode("latin-1") for name, line in request.raw_headers if name.lower() == FIELD])
            if key is None and rules.required:
                raise rules.missing()
            principal = None if key is None else await rules.principal_of(request)
            body = None if key is None else await read(request, rules)
        except ProblemError as refusal:
            return response_of(refusal.problem.answer(rules.documentation_url))
        if key is None or body is None:
            return cast("web.StreamResponse", await run())
        op = _operation(request, rules, principal, key, body)
        refused = await _begin(op, request, rules, body)
        if refused is not None:
            return refused
        if op.replayed:
            answer: Answer = op.result
            return replay(answer)
        return await _run(op, request, rules, run)


# -- one request ------------------------------------------------------------------------------------------------------


def _operation(
    request: web.Request, rules: Rules[web.Request], principal: str | None, key: str, body: Body
) -> Operation:
    url = request.rel_url
    resource = request.match_info.route.resource
    route = url.raw_path if resource is None else resource.canonical  # that of a sub-application has its prefix
    content_type = request.headers.get("Content-Type", "")
    mark = rules.mark(request, request.method, url.raw_path, url.raw_query_string, content_type, body.data)
    return rules.operation(principal, request.method, route, key, mark)


async def _begin(
    op: Operation, request: web.Request, rules: Rules[web.Request], body: Body
) -> web.StreamResponse | None:
    """Enter ``op``; return the refusal if it cannot run, and has no answer."""
    stream = request._payload
    put(request, body)

    async def gone() -> None:
        if request.transport is not None:  # else it went before there was somebody to be told
            await body.left.wait()

    try:
        await begin(op, gone if rules.waits else None)
    except ClientGoneError:
        if request.transport is None:
            return web.Response(status=CLIENT_CLOSED_REQUEST, reason="Client Closed Request")
        return _refusal(rules, InProgressError(op.key, 0))  # the server shuts down, and the client is still there
    except IdempotencyError as error:
        return _refusal(rules, error)
    finally:
        if not body.data:
            put(request, stream)  # without a body there is nothing to put back, and requests tell that by its type
    return None


async def _run(
    op: Operation, request: web.Request, rules: Rules[web.Request], run: Callable[[], Awaitable[Any]]
) -> web.StreamResponse:
    token = acting.set(request.writer)
    try:
        response = await run()
    except BaseException as error:
        # With a response on its way, the effect has most likely happened, and what went wrong may be the client that
        # left: no failure whose key may be released, nor is what was raised the answer.
        begun = request.writer.output_size > 0
        if isinstance(error, web.HTTPException) and not begun:
            refused = await _settle(op, request, rules, error, raised=True)
            if refused is None:
                raise
            return refused
        try:
            await fail(op, UnansweredError() if begun else error)
        except LeaseLostError as lost:
            if begun:
                raise  # another status line would become part of the stream: the server closes the connection
            return _refusal(rules, lost)
        raise
    finally:
        acting.reset(token)
    refused = await _settle(op, request, rules, response)
    return cast("web.StreamResponse", response) if refused is None else refused


async def _settle(
    op: Operation, request: web.Request, rules: Rules[web.Request], response: object, *, raised: bool = False
) -> web.StreamResponse | None:
    """End ``op`` with what its handler gave; return what its client gets instead, if anything.

    Between the handler's end and the completion there is no other await.
    """
    if request.writer.output_size and not (isinstance(response, web.StreamResponse) and response.prepared):
        # The client has got another one, which nobody kept.
        with contextlib.suppress(LeaseLostError, CompletionError):
            await settle(op, rules, HTTPStatus.OK, [], None)
        return None
    if not isinstance(response, web.StreamResponse):
        await settle(op, rules, HTTPStatus.INTERNAL_SERVER_ERROR, [], None)  # which is what the server makes of it
        return None
    status, body = response.status, body_of(response)
    if isinstance(response, web.FileResponse):
        status = status_of(response)
    reason = None if response.reason == phrase(status) else response.reason
    try:
        await settle(op, rules, status, headers_of(response), body, reason=reason, raised=raised)
    except (LeaseLostError, CompletionError) as error:
        return None if response.prepared else _refusal(rules, error)
    return None


def _refusal(rules: Rules[web.Request], error: IdempotencyError) -> web.Response:
    return response_of(rules.problem(error).answer(rules.documentation_url))
