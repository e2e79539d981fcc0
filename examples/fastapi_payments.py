"""A payment endpoint that is safe to retry, with FastAPI, and a page to try it on.

::

    pip install ".[fastapi]" uvicorn                                        # in a checkout
    python examples/fastapi_payments.py                                     # in memory
    REDIS_URL=redis://localhost:6379 python examples/fastapi_payments.py    # on Redis or Valkey: the worker may be killed

Open http://127.0.0.1:8000 and press Pay twice.
"""

import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Header
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field

from asyncidem.integrations.fastapi import IdempotencyGuard

from payments import shop


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Close the shop when the application ends."""
    yield
    await shop.aclose()


app = FastAPI(title="Payments", lifespan=lifespan)


def customer(x_customer: Annotated[str, Header(min_length=1)]) -> str:
    """Return who pays. It stands for your authentication."""
    return x_customer


guard = IdempotencyGuard(shop.idempotency, principal=Depends(customer))
guard.install(app)


class Payment(BaseModel):
    """What is paid: an order, and its price in cents."""

    model_config = ConfigDict(extra="forbid")

    order: str = Field(pattern="^[a-z0-9-]{1,40}$")
    amount: int = Field(ge=1, le=1_000_000)


class Receipt(BaseModel):
    """What the provider says of a charge."""

    receipt: str
    order: str
    amount: int
    reference: str
    attempt: int


@app.post("/payments", status_code=201, dependencies=[Depends(guard)])
async def pay(payment: Payment) -> Receipt:
    """Pay an order: the effect that must not happen twice."""
    return Receipt(**await shop.pay(payment.order, payment.amount))


@app.get("/charges")
async def charges(order: str) -> dict[str, Any]:
    """Return what was charged for an order."""
    return await shop.state(order)


@app.post("/kill", status_code=409, include_in_schema=False)
async def kill() -> dict[str, str]:
    """Kill the worker, or say why that would show nothing."""
    return {"detail": shop.kill()}


@app.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """Return the page."""
    return HTMLResponse(shop.page())


if __name__ == "__main__":
    shop.supervise(lambda: uvicorn.run(app, host=shop.HOST, port=shop.PORT, log_level="warning"))
