"""A shop that must not charge twice, for whatever web framework: its store, its effect, its page and its supervisor.

The charges are a list: in this process, or with ``REDIS_URL`` in Redis, where they outlive the worker. Nothing but the
idempotency of the endpoint keeps a second one out of it.
"""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis

from asyncidem import Idempotency, MemoryStore, RedisStore, Store, current_operation

URL: Final = os.environ.get("REDIS_URL")
HOST: Final = "127.0.0.1"
PORT: Final = int(os.environ.get("PORT", "8000"))
TTL: Final = 3600
"""Seconds that charges and answers are kept: it is a demonstration."""

PAUSE: Final = 1.0
"""Seconds before and after a charge: long enough to press a button in the middle of a payment."""

WORKER: Final = "PAYMENTS_WORKER"
"""Set in the environment of the process that serves."""

MEMORY_DIES: Final = (
    "This shop runs on MemoryStore: charges and answers live in the worker's memory, and would die with it. "
    "Start it with REDIS_URL=redis://localhost:6379 to kill the worker and lose nothing."
)

store: Store = RedisStore.from_url(URL) if URL else MemoryStore()
# The lease is so short because a person waits for its end after a kill; the default is 30 s.
idempotency = Idempotency(store, namespace="shop", lease=4, ttl=TTL)


class Provider:
    """A payment provider that charges as often as it is asked to, and can be asked what it has done."""

    def __init__(self) -> None:
        self._charges: list[str] = []
        self._redis: Redis | None = Redis.from_url(URL, decode_responses=True) if URL else None

    async def charge(self, order: str, amount: int, reference: str) -> dict[str, Any]:
        """Charge, and return the receipt. ``amount`` is in cents."""
        receipt = {"receipt": secrets.token_hex(4), "order": order, "amount": amount, "reference": reference}
        if self._redis is None:
            self._charges.append(json.dumps(receipt))
        else:
            await self._redis.rpush(f"shop-charges:{order}", json.dumps(receipt))
            await self._redis.expire(f"shop-charges:{order}", TTL)
        return receipt

    async def charges(self, order: str) -> list[dict[str, Any]]:
        """Return the receipts of an order."""
        found = self._charges if self._redis is None else await self._redis.lrange(f"shop-charges:{order}", 0, -1)
        return [receipt for receipt in map(json.loads, found) if receipt["order"] == order]

    async def aclose(self) -> None:
        """Close the connections."""
        if self._redis is not None:
            await self._redis.aclose()


provider = Provider()


async def pay(order: str, amount: int) -> dict[str, Any]:
    """Pay an order: what the guarded endpoint does."""
    op = current_operation()
    assert op is not None
    await asyncio.sleep(PAUSE)
    if op.attempt > 1:  # a worker was here before and was not heard of again: ask what it did
        for receipt in await provider.charges(order):
            if receipt["reference"] == op.downstream_key:
                return {**receipt, "attempt": op.attempt}
    receipt = await provider.charge(order, amount, op.downstream_key)
    await asyncio.sleep(PAUSE)
    return {**receipt, "attempt": op.attempt}


async def state(order: str) -> dict[str, Any]:
    """Return what the page shows: the charges of an order, and who serves."""
    return {"charges": await provider.charges(order), "worker": os.getpid(), "durable": URL is not None}


def kill() -> str:
    """Kill this worker as an operating system would, without a farewell; or return why that would show nothing."""
    if URL is None or WORKER not in os.environ:
        return MEMORY_DIES
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError  # nobody survives it


def page() -> str:
    """Return the page."""
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


async def aclose() -> None:
    """Close what the shop opened."""
    await provider.aclose()
    await store.aclose()


def supervise(serve: Callable[[], object]) -> None:
    """Run ``serve`` in a worker process, and start another one whenever it is killed."""
    if WORKER in os.environ:
        serve()
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(f"http://{HOST}:{PORT} on {'Redis' if URL else 'MemoryStore (set REDIS_URL for a server)'}", flush=True)
    while True:
        worker = subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, WORKER: "1"})  # noqa: S603 - itself
        try:
            code = worker.wait()
        except (KeyboardInterrupt, SystemExit):
            worker.terminate()
            worker.wait()
            return
        if code != -signal.SIGKILL:
            sys.exit(code)
        print(f"worker {worker.pid} was killed; starting another", flush=True)
        time.sleep(0.5)
