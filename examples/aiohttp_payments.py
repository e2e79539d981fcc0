"""A payment endpoint that is safe to retry, with aiohttp, and a page to try it on.

::

    pip install ".[aiohttp]"                                                # in a checkout
    python examples/aiohttp_payments.py                                     # in memory
    REDIS_URL=redis://localhost:6379 python examples/aiohttp_payments.py    # on Redis or Valkey: the worker may be killed

Open http://127.0.0.1:8000 and press Pay twice.
"""

import json
from typing import Any

from aiohttp import web

from asyncidem.integrations.aiohttp import IDEMPOTENCY, idempotent_handler

from payments import shop

routes = web.RouteTableDef()


def customer(request: web.Request) -> str | None:
    """Return who pays. It stands for your authentication."""
    return request.headers.get("X-Customer")


def payment_of(text: str) -> tuple[str, int]:
    """Return the order and its price in cents."""
    try:
        body: Any = json.loads(text)
    except ValueError:
        body = None
    match body:
        case {"order": str(order), "amount": int(amount)} if order and 0 < amount <= 1_000_000:
            return order, amount
        case _:
            raise web.HTTPUnprocessableEntity(text="a payment is an order and an amount of 1 to 1000000 cents")


@routes.post("/payments")
@idempotent_handler(principal=customer)
async def pay(request: web.Request) -> web.Response:
    """Pay an order: the effect that must not happen twice."""
    order, amount = payment_of(await request.text())
    return web.json_response(await shop.pay(order, amount), status=201)


@routes.get("/charges")
async def charges(request: web.Request) -> web.Response:
    """Return what was charged for an order."""
    return web.json_response(await shop.state(request.query.get("order", "")))


@routes.post("/kill")
async def kill(_request: web.Request) -> web.Response:
    """Kill the worker, or say why that would show nothing."""
    return web.json_response({"detail": shop.kill()}, status=409)


@routes.get("/")
async def page(_request: web.Request) -> web.Response:
    """Return the page."""
    return web.Response(text=shop.page(), content_type="text/html")


async def close(_app: web.Application) -> None:
    """Close the shop when the application ends."""
    await shop.aclose()


app = web.Application()
app[IDEMPOTENCY] = shop.idempotency
app.add_routes(routes)
app.on_cleanup.append(close)

if __name__ == "__main__":
    shop.supervise(lambda: web.run_app(app, host=shop.HOST, port=shop.PORT, print=None))
