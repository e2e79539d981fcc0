"""The FastAPI example: paid once, whatever a client, a kill of its worker or a generator of requests does to it."""

import asyncio
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from conftest import require
from payments_app import EXAMPLES, started
from servers import Server
from web import serving

pytestmark = pytest.mark.once

PAYMENT = {"order": "o-1", "amount": 4200}
HEADERS = {"Idempotency-Key": '"k"', "X-Customer": "alice"}


def until(reached: Callable[[], Any]) -> Any:
    """Wait for something that is true, and return it."""
    deadline = time.monotonic() + 30
    while not (found := reached()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_pay_twice_in_memory() -> None:
    """One command starts it; the second answer is the first one, and killing the worker is explained instead."""
    with started("fastapi_payments.py") as address, httpx.Client(base_url=address, timeout=20) as http:
        assert "Pay once" in http.get("/").text
        first, again = [http.post("/payments", json=PAYMENT, headers=HEADERS) for _ in range(2)]
        assert first.status_code == again.status_code == 201
        assert first.json() == again.json()
        assert again.headers["idempotent-replayed"] == "true"
        refused = http.post("/kill")
        assert refused.status_code == 409
        assert "would die with it" in refused.json()["detail"]
        assert len(http.get("/charges", params={"order": "o-1"}).json()["charges"]) == 1


def test_a_worker_that_is_killed_mid_payment_charges_once(tmp_path: Path) -> None:
    """Before its charge or after it: the retry runs once more when the lease is over, and its answer is the stored one."""
    with (
        Server(require("valkey", "redis"), tmp_path) as server,
        started("fastapi_payments.py", server.url) as address,
        httpx.Client(base_url=address, timeout=20) as http,
    ):

        def charges(order: str) -> int:
            return len(http.get("/charges", params={"order": order}).json()["charges"])

        def pay(order: str) -> httpx.Response:
            headers = HEADERS | {"Idempotency-Key": order}
            return http.post("/payments", json=PAYMENT | {"order": order}, headers=headers)

        def retry(order: str) -> httpx.Response | None:
            try:
                response = pay(order)
            except httpx.TransportError:  # the next worker is not there yet
                return None
            return None if response.status_code == 409 else response

        def records() -> int:
            return int(server.command("DBSIZE").removeprefix(":"))

        with ThreadPoolExecutor() as threads:
            payments = [threads.submit(pay, "after")]
            until(lambda: charges("after"))
            assert records() == 2  # the payment's and the charges'
            payments.append(threads.submit(pay, "before"))
            until(lambda: records() == 3)
            with pytest.raises(httpx.TransportError):
                http.post("/kill")
            for payment in payments:
                with pytest.raises(httpx.TransportError):
                    payment.result()
            assert int(server.command("EXISTS", "shop-charges:before").removeprefix(":")) == 0
            answers = list(threads.map(lambda order: until(lambda: retry(order)), ("after", "before")))
        for order, answer in zip(("after", "before"), answers, strict=True):
            assert (answer.status_code, answer.json()["attempt"]) == (201, 2)
            repeated = pay(order)
            assert (repeated.content, repeated.headers["idempotent-replayed"]) == (answer.content, "true")
            assert charges(order) == 1


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the example, on a store in memory, without its pauses."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delenv("REDIS_URL", raising=False)
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location("fastapi_payments", EXAMPLES / "fastapi_payments.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.shop, "PAUSE", 0)
    yield module
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "payments":
            del sys.modules[name]


async def test_every_generated_request_may_be_sent_twice(example: ModuleType) -> None:
    """Schemathesis makes requests from the OpenAPI document, right ones and wrong ones; the second of each charges nothing."""
    schemathesis = pytest.importorskip(
        "schemathesis", reason="needs Python packages that are newer than the lowest ones"
    )
    statuses: set[int] = set()

    def twice(case: Any) -> Any:
        response = case.call()
        charges = list(example.shop.provider._charges)
        again = case.call()
        statuses.add(response.status_code)
        assert again.status_code == response.status_code
        assert again.content == response.content
        assert example.shop.provider._charges == charges
        if response.status_code == 201:
            assert again.headers["idempotent-replayed"] == ["true"]
        return response

    def explore(address: str) -> None:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        # A key that was used with another payment is refused: what the schema allows need not be accepted.
        left_out = schemathesis.checks.CHECKS.get_by_names(["positive_data_acceptance"])
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            requests = schema["/payments"]["POST"].as_strategy(generation_mode=mode)

            @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
            @given(requests)
            def send(case: Any) -> None:
                response = twice(case)
                # What FastAPI says of a body that is no UTF-8 is in no document.
                if b"error parsing the body" not in response.content:
                    case.validate_response(response, excluded_checks=left_out)

            send()

    async with serving(example.app) as address:
        await asyncio.to_thread(explore, address)
    assert {201, 400, 422} <= statuses
