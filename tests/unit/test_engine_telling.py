"""What hooks and log do when an effect has run comes behind what the store must know of it."""

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from asyncidem import (
    Claimed,
    CodecError,
    Event,
    Idempotency,
    LeaseLostError,
    ResultUnavailableError,
    State,
    StoreError,
    StoreUnavailableError,
)

from faulty import FaultyStore, virtual


class StopError(BaseException):
    """What ends a process, such as KeyboardInterrupt, which asyncio would take the loop away for."""


def stops_at(name: str) -> Any:
    """Return a hook that is interrupted where it hears of one event."""

    def hook(event: Event) -> None:
        if event.name == name:
            raise StopError

    return hook


@pytest.fixture
def filters() -> Iterator[list[Any]]:
    """Filters of the package's logger, for the time of a test."""
    logger, filters = logging.getLogger("asyncidem"), []
    kept, logger.filters = logger.filters, filters
    yield filters
    logger.filters = kept


async def odd() -> object:
    """Return what JSON cannot hold."""
    return object()


async def large() -> str:
    """Return what the store of a test refuses."""
    return "x" * 2000


@virtual
async def test_an_interruption_while_it_is_told_that_there_is_no_result_runs_nothing_again() -> None:
    """The operation is completed before anybody hears that its result cannot be encoded."""
    store = FaultyStore.here()
    with pytest.raises(StopError):
        await Idempotency(store, hooks=[stops_at("result_unavailable")]).run("k", odd)
    record = await store.get("k")
    assert record is not None
    assert record.state is State.COMPLETED


@virtual
async def test_an_interruption_of_the_log_runs_nothing_again(filters: list[Any]) -> None:
    """The same where the store refuses the result, and the log is told."""

    def interrupted(record: logging.LogRecord) -> bool:
        raise StopError

    filters.append(interrupted)
    store = FaultyStore.here()
    store.fault("swap", before=StoreError("too big"), when=lambda _, value: len(value) > 1000)
    with pytest.raises(StopError):
        await Idempotency(store).run("k", large)
    with pytest.raises(ResultUnavailableError):
        await Idempotency(store).run("k", odd)


@pytest.mark.parametrize("failure", [None, StoreUnavailableError("down"), "lost"], ids=["stored", "down", "lost"])
@virtual
async def test_a_result_that_cannot_be_encoded_is_always_told(failure: Any) -> None:
    """However its completion ends."""
    store = FaultyStore.here()
    events: list[str] = []
    idem = Idempotency(store, lease=5, renew=False, hooks=[lambda event: events.append(event.name)])
    if isinstance(failure, Exception):
        store.fault("swap", before=failure)

    async def handler() -> object:
        if failure == "lost":
            await store.delete("k")
            assert isinstance(await store.claim("k"), Claimed)
        return await odd()

    with pytest.raises(LeaseLostError if failure == "lost" else CodecError):
        await idem.run("k", handler)
    expected = {
        None: ["result_unavailable", "completed"],
        "lost": ["lease_lost", "result_unavailable"],
    }
    assert events == ["claimed", *expected.get(failure, ["completion_failed", "result_unavailable"])]
    await store.aclose()


@virtual
async def test_hooks_are_told_of_a_lost_lease_with_the_result() -> None:
    """The error that a hook gets carries what its caller gets."""
    store = FaultyStore.here()
    results: list[object] = []

    def hook(event: Event) -> None:
        if isinstance(event.error, LeaseLostError):
            results.append(event.error.result)

    async def handler() -> int:
        await store.delete("k")
        assert isinstance(await store.claim("k"), Claimed)
        return 7

    with pytest.raises(LeaseLostError):
        await Idempotency(store, hooks=[hook], renew=False).run("k", handler)
    assert results == [7]


@pytest.mark.parametrize("careless", ["raises", "returns"])
@virtual
async def test_a_filter_that_raises_does_not_hide_what_the_handler_raised(careless: str, filters: list[Any]) -> None:
    """Where `on_failure` itself is at fault and the log is too, the handler's exception still comes out."""

    def broken(record: logging.LogRecord) -> bool:
        raise ValueError("broken filter")

    def choose(error: Exception) -> Any:
        if careless == "raises":
            raise KeyError("careless")
        return "no such choice"

    async def handler() -> None:
        raise ZeroDivisionError

    filters.append(broken)
    store = FaultyStore.here()
    idem = Idempotency(store, wait=60, lease=5, on_failure=choose)
    with pytest.raises(ZeroDivisionError):
        await idem.run("k", handler)
    began = asyncio.get_running_loop().time()
    assert await idem.run("k", asyncio.sleep, 0, 1) == 1
    assert asyncio.get_running_loop().time() - began > 4, "it was kept, for its lease"
