"""FastAPI applications with one effect, for the tests of the guard."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI, Header, HTTPException, Response
from pydantic import BaseModel

from asyncidem import Event, Idempotency, MemoryStore, current_operation
from asyncidem.integrations.fastapi import IdempotencyGuard

from web import serving, stable

__all__ = ["ALICE", "BOB", "KEY", "Payment", "Till", "client", "converse", "kind", "same", "shop", "user"]

KEY = {"Idempotency-Key": "k"}

ALICE = {"Authorization": "alice", "Idempotency-Key": "k"}
BOB = {"Authorization": "bob", "Idempotency-Key": "k"}


class Payment(BaseModel):
    """What is paid."""

    amount: int


def user(authorization: Annotated[str | None, Header()] = None) -> str:
    """Authenticate: who says no name is refused."""
    if authorization is None:
        raise HTTPException(401, "who are you?")
    return authorization


class Till:
    """An effect, which can be held up, and the store that guards it.

    Attributes:
        charges: what was charged, by which attempt.
        events: what the hooks were told.
        hold: what the effect waits for; set at first.
        reached: set when it has happened.
    """

    def __init__(self, **options: Any) -> None:
        self.charges: list[int] = []
        self.attempts: list[int | None] = []
        self.events: list[str] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.reached = asyncio.Event()
        self.store = MemoryStore()
        self.idem = Idempotency(self.store, hooks=[self._hear], **options)

    def guard(self, app: FastAPI | None = None, **options: Any) -> IdempotencyGuard:
        """Return a guard, installed if an application is given."""
        guard = IdempotencyGuard(self.idem, **{"principal": None, **options})
        if app is not None:
            guard.install(app)
        return guard

    def count(self, amount: int) -> dict[str, Any]:
        """Charge."""
        op = current_operation()
        self.charges.append(amount)
        self.attempts.append(None if op is None else op.attempt)
        self.reached.set()
        return {"charge": len(self.charges), "guarded": op is not None}

    async def charge(self, amount: int = 1) -> dict[str, Any]:
        """Charge, and wait."""
        charged = self.count(amount)
        await self.hold.wait()
        return charged

    def _hear(self, event: Event) -> None:
        self.events.append(event.name)


@contextlib.asynccontextmanager
async def client(app: FastAPI, **options: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """Serve an application, and connect to it."""
    async with serving(app, **options) as address, httpx.AsyncClient(base_url=address, timeout=20) as http:
        yield http


def shop(till: Till, **options: Any) -> FastAPI:
    """Return an application with one guarded route."""
    app = FastAPI()
    guard = till.guard(app, **{"principal": Depends(user), **options})

    @app.post("/pay", dependencies=[Depends(guard)], status_code=201)
    async def pay(payment: Payment, response: Response) -> dict[str, Any]:
        response.headers["X-Receipt"] = "r"
        return await till.charge(payment.amount)

    return app


def same(first: httpx.Response, again: httpx.Response) -> bool:
    """Say whether a response is a replay of another."""
    assert again.headers.get("idempotent-replayed") == "true", again.text
    assert "idempotent-replayed" not in first.headers
    equal = stable(first.headers) == stable(again.headers)
    return equal and (first.status_code, first.content) == (again.status_code, again.content)


def kind(response: httpx.Response) -> tuple[int, str]:
    """Return status and type of a problem."""
    assert response.headers["content-type"] == "application/problem+json", response.text
    assert response.json()["status"] == response.status_code
    return response.status_code, response.json()["type"].rpartition(":")[2]


async def converse(app: FastAPI, scope: dict[str, Any], sent: list[Any], *messages: dict[str, Any]) -> None:
    """Give an application what a server would; note what it sends."""
    waiting = list(messages)

    async def receive() -> Any:
        return waiting.pop(0) if waiting else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
