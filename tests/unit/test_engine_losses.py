"""Leases that are lost while a handler runs, and what the log says of that and of every other trouble."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from asyncidem import Claimed, Event, Idempotency, LeaseLostError

from faulty import FaultyStore, virtual

SECRET_KEY, SECRET_TEXT = "card:4242424242424242", "payload-5555"


class DeclinedError(Exception):
    """A result of the business."""


def raising(error: Exception) -> Callable[[], Coroutine[Any, Any, None]]:
    """Return a handler that raises."""

    async def handler() -> None:
        raise error

    return handler


def broken(error: Exception) -> Any:
    """Raise, as a careless callable may."""
    raise KeyError("broken")


async def take_over(store: FaultyStore, key: str) -> Claimed:
    """Delete the claim of a key, and become its next owner."""
    await store.delete(key)
    claim = await store.claim(key)
    assert isinstance(claim, Claimed)
    return claim


@virtual
async def test_a_lost_lease_cancels_the_handler() -> None:
    """The handler is cancelled at the next renewal, and its caller gets `LeaseLostError`, uncancelled."""
    loop = asyncio.get_running_loop()
    store = FaultyStore.here(turns=1)
    events: list[str] = []
    idem = Idempotency(store, lease=3, hooks=[lambda event: events.append(event.name)])
    cancelled: list[float] = []

    async def handler() -> None:
        await take_over(store, "k")
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.append(loop.time())
            raise

    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(LeaseLostError) as caught:
        await idem.run("k", handler)
    assert (caught.value.key, caught.value.result) == ("k", None)
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert cancelled == [1]
    assert task.cancelling() == 0
    assert events == ["claimed", "lease_lost"]
    assert await store.get("k") is not None  # the successor's


@pytest.mark.parametrize("stubborn", [True, False])
@virtual
async def test_a_lost_lease_hands_over_the_result_that_came_all_the_same(stubborn: bool) -> None:
    """A handler that returns although its lease is lost, told of it or not, has run: the error carries its result."""
    store = FaultyStore.here(turns=1)
    events: list[str] = []
    idem = Idempotency(store, lease=3, renew=stubborn, hooks=[lambda event: events.append(event.name)])

    async def handler() -> str:
        await take_over(store, "k")
        try:
            await asyncio.sleep(2)
        except asyncio.CancelledError:
            return "charged"
        return "charged"

    with pytest.raises(LeaseLostError) as caught:
        await idem.run("k", handler)
    assert caught.value.result == "charged"
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert events == ["claimed", "lease_lost"]
    with pytest.raises(LeaseLostError) as declined:
        await idem.run("l", failing_after_takeover(store, "l"), replay_exceptions=DeclinedError)
    assert isinstance(declined.value.__cause__, DeclinedError)


def failing_after_takeover(store: FaultyStore, key: str) -> Callable[[], Coroutine[Any, Any, None]]:
    """Return a handler that is replaced, and then fails."""

    async def handler() -> None:
        await take_over(store, key)
        raise DeclinedError(7)

    return handler


@virtual
async def test_a_cancellation_together_with_a_lost_lease_stays_one() -> None:
    """If somebody else cancels the caller in the moment in which its lease is lost, the caller ends cancelled."""
    store = FaultyStore.here()
    tasks: list[asyncio.Task[None]] = []

    def cancel(event: Event) -> None:
        if event.name == "lease_lost":
            tasks[0].cancel()

    idem = Idempotency(store, lease=3, hooks=[cancel])

    async def handler() -> None:
        await take_over(store, "k")
        await asyncio.sleep(1000)

    tasks.append(asyncio.create_task(idem.run("k", handler)))
    await asyncio.wait(tasks)
    assert tasks[0].cancelled()
    assert tasks[0].cancelling() == 1


@virtual
async def test_a_cancellation_of_before_is_none_of_now() -> None:
    """In a task that was cancelled earlier and went on, a lost lease is a lost lease."""
    store = FaultyStore.here()
    idem = Idempotency(store, lease=3)

    async def lose() -> None:
        await take_over(store, "k")
        await asyncio.sleep(1000)

    async def main() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1000)
        await idem.run("k", lose)

    task = asyncio.create_task(main())
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(LeaseLostError):
        await task
    assert task.cancelling() == 1


@virtual
async def test_logs_hold_neither_key_nor_payload(caplog: pytest.LogCaptureFixture) -> None:
    """Every warning, formatted with its traceback, names the key only as a digest, and nothing of what was handled."""
    store = FaultyStore.here()
    idem = Idempotency(store, lease=3, on_store_error="run", replay_exceptions=DeclinedError, hooks=[broken_hook])

    async def lose() -> None:
        await take_over(store, SECRET_KEY)
        await asyncio.sleep(1000)

    with pytest.raises(LeaseLostError):
        await idem.run(SECRET_KEY, lose, payload=SECRET_TEXT)
    failing = raising(ValueError(SECRET_TEXT))
    store.fault("put_if_absent", before=OSError(SECRET_KEY))
    with pytest.raises(ValueError, match=SECRET_TEXT):
        await idem.run(SECRET_KEY + "1", failing)
    store.fault("remove", before=OSError(SECRET_KEY), when=lambda key, _value: key.endswith("2"))
    with pytest.raises(ValueError, match=SECRET_TEXT):
        await idem.run(SECRET_KEY + "2", failing)
    store.fault("swap", before=OSError(SECRET_KEY), when=lambda key, _value: key.endswith("3"))
    with pytest.raises(DeclinedError):
        await idem.run(SECRET_KEY + "3", raising(DeclinedError(SECRET_TEXT)))
    with pytest.raises(ValueError, match=SECRET_TEXT):
        await idem.run(SECRET_KEY + "4", failing, on_failure=broken)
    await asyncio.sleep(1)
    assert {record.getMessage() for record in caplog.records} == {
        "lease_lost",
        "ran_unprotected",
        "release_failed",
        "completion_failed",
        "on_failure_failed",
        "hook_failed",
    }
    shown = "\n".join(logging.Formatter().format(record) + repr(vars(record)) for record in caplog.records)
    assert "4242" not in shown
    assert SECRET_TEXT not in shown


def broken_hook(event: Event) -> None:
    """Raise while the operation's own error is being handled."""
    raise RuntimeError("telemetry is down")
