"""The guard of any ASGI application: Starlette, FastAPI, Litestar, Quart. It imports none of them.

::

    app.add_middleware(IdempotencyMiddleware, idempotency=idem, principal=lambda scope: scope["user"].display_name)

It must stand inside of what authenticates (added before it, for Starlette's last one added is the outermost), or a
replay would be given out before anybody was asked who they are, and inside of what compresses and of CORS: what they add
belongs to one client. Pure ASGI below it: under Starlette's ``BaseHTTPMiddleware`` a client that leaves ends the
response silently; such a response is recognised only if it says its length.

What an await leaves behind: until the endpoint runs, nothing (a cancelled claim is undone). While it runs, a record in
progress, with a lease that is renewed. The response is stored before its last message goes on, so that a retry that
follows the answer finds it; whatever happens to the connection after that, the record stays.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final, TypeAlias, Unpack

from ..errors import IdempotencyError
from ..idempotency import Idempotency
from ..operation import Operation
from .guarding import ClientGoneError, UnansweredError, begin, fail, settle
from .http import LATE_REFUSALS, REFUSALS, Answer, Headers, HTTPFailure, HTTPOptions, ProblemError, Rules

__all__ = ["HTTPFailure", "IdempotencyMiddleware"]

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

GUARDED: Final = "asyncidem.guarded"
"""Marks the scope of a request that a guard has taken: another one within stands aside."""

SHORTCUTS: Final = frozenset(
    {"http.response.pathsend", "http.response.zerocopysend", "http.response.trailers", "http.response.push"}
)
"""Extensions by which a response reaches its client past its body messages, or in pieces that no record holds."""

FULL: Final = 2
"""What Starlette's routes call a match of path and method."""


class IdempotencyMiddleware:
    """Guards the POST and PATCH requests (or ``methods``) that carry an ``Idempotency-Key``; all others pass untouched.

    Args:
        app: the application.
        idempotency: where operations run.
        principal: who asks, as a function, sync or async, of the ASGI ``scope``; nobody gets another's answer, and a
            request of nobody is refused with 403. None, written out, is for an API with a single client. The host is
            no part of a key: an application for several hosts puts it into the principal.
        required: whether a request without a key is refused; a middleware sees every route.
        **options: the further ones of :class:`~asyncidem.integrations.http.Rules`.

    Raises:
        ConfigurationError: an option cannot work.
    """

    def __init__(
        self,
        app: App,
        idempotency: Idempotency,
        *,
        principal: Callable[[Scope], Any] | None,
        required: bool = False,
        **options: Unpack[HTTPOptions[Scope]],
    ) -> None:
        self.app = app
        self._rules: Rules[Scope] = Rules(idempotency, principal=principal, required=required, **options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, a websocket or the lifespan."""
        if scope["type"] != "http" or not self._rules.guards(scope["method"]) or GUARDED in scope:
            await self.app(scope, receive, send)
            return
        try:
            key = self._rules.key(header_lines(scope, b"idempotency-key"))
            if key is None:
                route = route_of(self.app, scope) if self._rules.required else None
                if route is not None:
                    raise self._rules.missing()
        except ProblemError as refusal:
            await answer(send, refusal.problem.answer(self._rules.documentation_url))
            return
        if key is None:
            await self.app(scope, receive, send)
        else:
            await self._guard(key, scope, receive, send)

    async def _guard(self, key: str, scope: Scope, receive: Receive, send: Send) -> None:
        rules = self._rules
        try:
            principal = await rules.principal_of(scope)
            body = Body(receive, rules.max_body)
            if not body.may_fit(scope) or not await body.read():
                raise rules.too_large()
            op = operation(rules, scope, route_of(self.app, scope) or scope["path"], principal, key, body.content)
            await begin(op, body.gone if rules.waits else None)
        except ClientGoneError:
            return
        except ProblemError as refusal:
            await answer(send, refusal.problem.answer(rules.documentation_url))
            return
        except REFUSALS as error:
            await answer(send, rules.problem(error).answer(rules.documentation_url))
            return
        if op.replayed:
            await answer(send, op.result, replayed=True)
            return
        # From here on the operation has to be settled, whatever happens; `serve` does.
        await Capture(rules, op, send).serve(self.app, scope, body.receive)


class Body:
    """The body of a request: read whole, and given again as one message.

    Args:
        receive: the server's.
        limit: bytes that are read into memory.

    Attributes:
        content: what was read.
    """

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._given = False
        self.content = b""

    def may_fit(self, scope: Scope) -> bool:
        """Say whether the length that the request declares is within the limit, if it declares one."""
        lengths = header_lines(scope, b"content-length")
        return not lengths or not lengths[0].isdecimal() or int(lengths[0]) <= self._limit

    async def read(self) -> bool:
        """Read it all; return False if it is too long.

        Raises:
            ClientGoneError: the client left before it had sent all.
        """
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGoneError
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > self._limit:
                return False
            parts.append(part)
            if not message.get("more_body", False):
                self.content = parts[0] if len(parts) == 1 else b"".join(parts)
                return True

    async def receive(self) -> Message:
        """Give the body; after it, what the server has to say (an invented disconnect would end streams)."""
        if self._given:
            return await self._receive()
        self._given = True
        return {"type": "http.request", "body": self.content, "more_body": False}

    async def gone(self) -> None:
        """Return when the client has disconnected."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


class Capture:
    """The response to one guarded request: held back while it may be stored, untouched once it cannot be.

    Args:
        rules: what decides.
        op: the operation, running.
        send: the server's.
    """

    def __init__(self, rules: Rules[Any], op: Operation, send: Send) -> None:
        self._rules = rules
        self._op = op
        self._send = send
        self._start: Message | None = None
        self._body: list[Message] | None = []  # the messages held back; None once the response goes its way
        self._size = 0
        self._settled = False
        self._replaced = False  # whether a problem was sent in its place

    async def serve(self, app: App, scope: Scope, receive: Receive) -> None:
        """Run the application, and settle the operation."""
        scope = {**scope, GUARDED: True}
        extensions: Any = scope.get("extensions")
        if extensions and not SHORTCUTS.isdisjoint(extensions):
            scope["extensions"] = {name: value for name, value in extensions.items() if name not in SHORTCUTS}
        try:
            await app(scope, receive, self.send)
        except BaseException as error:
            await self._ended(error)
            if not self._replaced:
                raise
        else:
            await self._ended(UnansweredError())

    async def send(self, message: Message) -> None:
        """Take a message of the application to the client."""
        kind = message["type"]
        if self._replaced:
            return
        if self._settled or kind not in ("http.response.start", "http.response.body"):
            await self._send(message)
        elif kind == "http.response.start":
            # Any iterable may hold the headers (ASGI, response start), and they are looked at more than once.
            self._start = {**message, "headers": _headers(message)}
        elif self._start is None:
            await self._send(message)  # the server says what is wrong with it
        elif message.get("more_body", False):
            await self._part(self._start, message)
        else:
            await self._last(self._start, message)

    async def _part(self, start: Message, message: Message) -> None:
        """Hold a part of the body back if the whole is said to be small; else it goes on, with all that follows."""
        if self._body is None:
            await self._send(message)
            return
        self._body.append(message)
        self._size += len(message.get("body", b""))
        length = _declared(start)
        if length is None or self._size > length or not self._rules.keepable(_headers(start), length):
            await self._let_go(start)

    async def _last(self, start: Message, message: Message) -> None:
        body: bytes | None = None
        whole = True
        if self._body is not None:
            body = b"".join(part.get("body", b"") for part in (*self._body, message))
            # A response in parts that ends early was cut off by what stands between: it must not become the stored one.
            whole = not self._body or len(body) == _declared(start)
        status, headers = start["status"], _headers(start)  # what is malformed fails here, while somebody settles it
        self._settled = True
        try:
            if whole:
                await settle(self._op, self._rules, status, headers, body)
            else:
                await fail(self._op, UnansweredError())
        except LATE_REFUSALS as error:
            await self._replace(error)
        if not self._replaced:
            await self._let_go(start)
            await self._send(message)

    async def _ended(self, error: BaseException) -> None:
        """Settle the operation if its response has not, for the application has ended.

        What was held back never reaches the client: an outer layer answers for the exception. If a response was on its
        way, the effect has most likely happened, and what went wrong may be the client that left (from ASGI 2.4 on,
        ``send`` raises then): that is no failure whose key may be released, but an outcome that is not known.
        """
        if self._settled:
            return
        self._settled = True
        try:
            await fail(self._op, error if self._body is not None else UnansweredError())
        except LATE_REFUSALS as lost:
            await self._replace(lost)

    async def _replace(self, error: IdempotencyError) -> None:
        """Answer with a problem instead, unless the response is on its way."""
        if self._body is not None:
            self._replaced = True
            await answer(self._send, self._rules.problem(error).answer(self._rules.documentation_url))

    async def _let_go(self, start: Message) -> None:
        """Send what was held back."""
        held, self._body = self._body, None
        if held is not None:
            for message in (start, *held):
                await self._send(message)


async def answer(send: Send, response: Answer, *, replayed: bool = False) -> None:
    """Send a whole response."""
    await send({"type": "http.response.start", "status": response.status, "headers": response.lines(replayed=replayed)})
    await send({"type": "http.response.body", "body": response.body, "more_body": False})


def operation(
    rules: Rules[Scope], scope: Scope, route: str, principal: str | None, key: str, content: bytes
) -> Operation:
    """Return the operation of a request that was read."""
    query: bytes = scope.get("query_string", b"")
    types = header_lines(scope, b"content-type")
    mark = rules.mark(
        scope, scope["method"], scope["path"], query.decode("latin-1"), types[0] if types else "", content
    )
    return rules.operation(principal, scope["method"], route, key, mark)


def header_lines(scope: Scope, name: bytes) -> list[str]:
    """Return the value of every line of a request header; names are in lower case (ASGI, HTTP connection scope)."""
    return [value.decode("latin-1") for header, value in scope["headers"] if header == name]


def route_of(app: Any, scope: Scope) -> str | None:
    """Return the template of the route that will serve a request; None if its router will refuse it.

    Where nothing says what routes there are, it is the whole path. Starlette and FastAPI have a list of routes that
    match scopes; Litestar has routed before its middleware runs.
    """
    template = scope.get("path_template")
    if isinstance(template, str):
        return f"{scope.get('root_path', '')}{template}"
    routes = getattr(app, "routes", None) or getattr(scope.get("app"), "routes", None)
    if routes is None or not all(hasattr(route, "matches") for route in routes):
        path: str = scope["path"]
        return path
    return _template(routes, {**scope})  # some routers take notes in it


def _template(routes: Iterable[Any], scope: Scope) -> str | None:
    for route in routes:
        match, child = route.matches(scope)
        if match.value == FULL:
            inner, template = getattr(route, "routes", None), getattr(route, "path", None)
            if inner:
                return _template(inner, {**scope, **child})
            # Of an application that is mounted, and of a router that FastAPI includes, nothing is known.
            opaque = inner is not None or template is None
            return str(scope["path"] if opaque else scope.get("root_path", "") + template)
    return None


def _headers(start: Message) -> Headers:
    return [(bytes(name), bytes(value)) for name, value in start.get("headers", ())]


def _declared(start: Message) -> int | None:
    """Return the length that a response declares, if it does."""
    for name, value in _headers(start):
        if name.lower() == b"content-length" and value.isdigit():
            return int(value)
    return None
