"""What type checkers say about the guards for aiohttp: this file is checked and never run."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, assert_type

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from asyncidem import Idempotency, MemoryStore
from asyncidem.integrations.aiohttp import IDEMPOTENCY, HTTPFailure, idempotency_middleware, idempotent_handler

idem = Idempotency(MemoryStore())


async def user(request: web.Request) -> str:
    """Say who asks."""
    return request.headers["X-User"]


def fingerprint(request: web.Request, body: bytes) -> bytes:
    """Choose the payload."""
    return body


app = web.Application(
    middlewares=[idempotency_middleware(idem, principal=user, required=True, wait=timedelta(seconds=5))]
)
app[IDEMPOTENCY] = idem
assert_type(app[IDEMPOTENCY], Idempotency)
assert_type(idempotency_middleware(principal=None, fingerprint=fingerprint), Middleware)
assert_type(HTTPFailure(502).status, int)

idempotency_middleware()  # type: ignore[call-arg]
idempotency_middleware(principal=user, lease=3)  # type: ignore[call-arg]
idempotency_middleware(principal=user, max_body="1")  # type: ignore[arg-type]
app[IDEMPOTENCY] = "redis://"  # type: ignore[misc]


@idempotent_handler(idem, principal=user)
async def pay(request: web.Request, /) -> web.Response:
    """Keep its parameters."""
    return web.json_response({})


assert_type(pay, Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]])


class Payments(web.View):
    """A view with a guarded method."""

    @idempotent_handler(principal=user, required=False)
    async def post(self) -> web.StreamResponse:
        """Keep its parameters."""
        return web.StreamResponse()


handler: Handler = pay
app.router.add_post("/pay", pay)
app.router.add_view("/payments", Payments)


@idempotent_handler(principal=user)  # type: ignore[arg-type]
async def number(request: web.Request) -> int:
    """Return no response."""
    return 1
