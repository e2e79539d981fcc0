"""One task at a time claims on behalf of those who wait, and none while a task of the process owns the key."""

import asyncio
from typing import Any

import pytest

from asyncidem import Claimed, Idempotency, LeaseLostError

from faulty import FaultyStore, settle, virtual


@virtual
async def test_callers_who_come_while_a_task_here_owns_the_key_ask_no_store() -> None:
    """They wait for the owner's end, which they learn at once, and cost no round trip."""
    store = FaultyStore.here()
    idem = Idempotency(store, wait=100, renew=False)

    async def handler() -> str:
        await asyncio.sleep(20)
        return "done"

    tasks: list[asyncio.Task[Any]] = []
    for _ in range(10):
        tasks.append(asyncio.create_task(idem.run("k", handler)))
        await asyncio.sleep(1)
    assert await asyncio.gather(*tasks) == ["done"] * 10
    assert store.counts == {"put_if_absent": 1, "swap": 1}


@virtual
async def test_one_waiter_claims_at_a_time() -> None:
    """An owner's release elects nobody while somebody's claim is under way."""
    store = FaultyStore.here()
    idem = Idempotency(store)
    runs: list[str] = []

    async def fail() -> None:
        await asyncio.sleep(1)
        raise ValueError

    async def handler() -> str:
        runs.append("ran")
        return "done"

    owner = asyncio.create_task(idem.run("k", fail))
    await settle()
    store.fault("put_if_absent", before=5.0)
    waiters = [asyncio.create_task(idem.run("k", handler, wait=100)) for _ in range(3)]
    with pytest.raises(ValueError):
        await owner
    await asyncio.sleep(1)
    assert store.counts["put_if_absent"] == 2
    assert await asyncio.gather(*waiters) == ["done"] * 3
    assert runs == ["ran"]


@virtual
async def test_a_release_here_is_followed_in_the_same_moment() -> None:
    """No poll is needed to see what a task of this process released, and no timer outlives its waiter."""
    loop: Any = asyncio.get_running_loop()
    idem = Idempotency(FaultyStore.here(turns=1), wait=100)
    runs: list[float] = []

    async def handler() -> str:
        runs.append(loop.time())
        await asyncio.sleep(20)
        if len(runs) == 1:
            raise ValueError
        return "done"

    owner = asyncio.create_task(idem.run("k", handler, renew=False))
    waiters = [asyncio.create_task(idem.run("k", handler, renew=False)) for _ in range(3)]
    with pytest.raises(ValueError):
        await owner
    assert await asyncio.gather(*waiters) == ["done"] * 3
    assert runs == [0, 20]
    assert [timer for timer in loop._scheduled if not timer.cancelled()] == []


@virtual
async def test_a_claim_that_is_known_to_be_lost_writes_nothing_more() -> None:
    """Once told, a former owner writes nothing, even where its successor has left the key free."""
    store = FaultyStore.here()
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    await store.delete("k")
    successor = await store.claim("k")
    assert isinstance(successor, Claimed)
    with pytest.raises(LeaseLostError):
        await store.renew(claim)
    await store.complete(successor, "1")
    await store.delete("k")
    calls = store.counts.total()
    with pytest.raises(LeaseLostError):
        await store.renew(claim)
    with pytest.raises(LeaseLostError):
        await store.complete(claim, "2")
    await store.release(claim)
    assert store.counts.total() == calls
    assert await store.get("k") is None
