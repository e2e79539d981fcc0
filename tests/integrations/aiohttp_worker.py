"""A server to be killed: `python aiohttp_worker.py PORT REDIS_URL LEDGER`. Its first attempt never ends."""

import asyncio
import sys
from pathlib import Path

from aiohttp import web

from asyncidem import Idempotency, RedisStore, current_operation
from asyncidem.integrations.aiohttp import IDEMPOTENCY, idempotency_middleware


async def pay(request: web.Request) -> web.Response:
    """Charge; the first attempt does not live to tell."""
    op = current_operation()
    assert op is not None
    with Path(sys.argv[3]).open("a") as ledger:
        ledger.write(f"{op.attempt}\n")
    if op.attempt == 1:
        await asyncio.Event().wait()
    return web.json_response({"attempt": op.attempt}, status=201)


async def serve() -> web.Application:
    """Return the application."""
    app = web.Application(middlewares=[idempotency_middleware(principal=lambda request: request.headers["X-User"])])
    app[IDEMPOTENCY] = Idempotency(RedisStore.from_url(sys.argv[2]), namespace="shop", lease=1, wait=20)
    app.router.add_post("/pay", pay)
    return app


if __name__ == "__main__":
    web.run_app(serve(), host="127.0.0.1", port=int(sys.argv[1]), print=None)
