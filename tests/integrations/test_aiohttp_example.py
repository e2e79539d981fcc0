"""The aiohttp example: paid once, whatever a client or a kill of its worker does to it."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from conftest import require
from payments_app import started
from servers import Server

pytestmark = pytest.mark.once

HEADERS = {"Idempotency-Key": '"k"', "X-Customer": "alice"}


class Shop:
    """A client of the example."""

    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        self._session = session
        self._address = address

    async def pay(self, order: Any = "o-1", *, headers: dict[str, str] = HEADERS) -> tuple[int, bytes, bool]:
        """Pay; return status, body, and whether it is a replay."""
        payment = {"order": order, "amount": 4200}
        async with self._session.post(f"{self._address}/payments", json=payment, headers=headers) as response:
            return response.status, await response.read(), "Idempotent-Replayed" in response.headers

    async def retry(self) -> tuple[int, bytes, bool]:
        """Pay as soon as there is a worker again, and the lease of the dead one is over."""
        while True:
            try:
                answer = await self.pay()
            except aiohttp.ClientError:
                answer = (409, b"", False)
            if answer[0] != 409:
                return answer
            await asyncio.sleep(0.05)

    async def charges(self) -> list[Any]:
        """Return the charges of the order."""
        async with self._session.get(f"{self._address}/charges", params={"order": "o-1"}) as response:
            found: list[Any] = (await response.json())["charges"]
            return found

    async def kill(self) -> str:
        """Press the button."""
        async with self._session.post(f"{self._address}/kill") as response:
            assert response.status == 409
            detail: str = (await response.json())["detail"]
            return detail


async def test_pay_twice_in_memory() -> None:
    """One command starts it; the second answer is the first one, and killing the worker is explained instead."""
    with started("aiohttp_payments.py") as address:
        async with aiohttp.ClientSession() as session:
            shop = Shop(session, address)
            first, again = await shop.pay(), await shop.pay()
            assert (first[0], first[2]) == (201, False)
            assert again == (201, first[1], True)
            assert len(await shop.charges()) == 1
            assert "would die with it" in await shop.kill()
            assert (await shop.pay(headers={"X-Customer": "alice"}))[0] == 400
            assert (await shop.pay(headers={"Idempotency-Key": "k"}))[0] == 403
            assert (await shop.pay(order=7))[0] == 422
            assert (await shop.pay(order=7, headers={**HEADERS, "Idempotency-Key": "other"}))[0] == 422
            assert len(await shop.charges()) == 1
            async with session.post(
                f"{address}/payments", data=b"{", headers=HEADERS | {"Idempotency-Key": "third"}
            ) as response:
                assert response.status == 422
            async with session.get(f"{address}/charges") as response:
                assert (await response.json())["charges"] == []


async def test_worker_that_is_killed_in_a_payment_charges_once(tmp_path: Path) -> None:
    """Its client sees the connection break; the retry is attempt 2, and its answer is the stored one."""
    with Server(require("valkey", "redis"), tmp_path) as server, started("aiohttp_payments.py", server.url) as address:
        async with aiohttp.ClientSession() as session:
            shop = Shop(session, address)
            payment = asyncio.create_task(shop.pay())
            async with asyncio.timeout(20):
                while not await shop.charges():
                    await asyncio.sleep(0.02)
            with pytest.raises(aiohttp.ClientError):
                await shop.kill()
            with pytest.raises(aiohttp.ClientError):
                await payment
            async with asyncio.timeout(30):
                answer = await shop.retry()
            assert (answer[0], answer[2]) == (201, False)
            assert b'"attempt": 2' in answer[1]
            assert await shop.pay() == (201, answer[1], True)
            assert len(await shop.charges()) == 1
