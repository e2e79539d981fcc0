"""What becomes of a key whose handler failed, whose store failed, or whose lease was lost."""

import asyncio
import gc
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Literal

import pytest

from asyncidem import (
    CodecError,
    CompletionError,
    Event,
    Idempotency,
    InProgressError,
    JSONCodec,
    MissingKeyError,
    ReplayedError,
    ResultUnavailableError,
    State,
    StoreError,
    StoreUnavailableError,
    current_operation,
)

from faulty import FaultyStore, down, settle, virtual

SECRET_KEY, SECRET_TEXT = "card:4242424242424242", "payload-5555"


class DeclinedError(Exception):
    """A result of the business: the card was declined."""

    def __init__(self, code: int, *, reason: str = "") -> None:
        super().__init__(code)
        self.reason = reason


class StolenError(DeclinedError):
    """One kind of it."""


class StopError(BaseException):
    """No Exception: what frameworks end a task with."""


def raising(error: BaseException) -> Callable[[], Coroutine[Any, Any, None]]:
    """Return a handler that raises."""

    async def handler() -> None:
        await asyncio.sleep(0)
        raise error

    return handler


async def attempt() -> int:
    """A handler that returns its attempt."""
    op = current_operation()
    assert op is not None
    return op.attempt


async def after_keep(idem: Idempotency, key: str, *, lease: float) -> None:
    """Check that the key is blocked for its lease, and then taken over with attempt 2."""
    with pytest.raises(InProgressError) as caught:
        await idem.run(key, attempt)
    assert 0 < caught.value.retry_after <= lease
    await asyncio.sleep(lease)
    assert await idem.run(key, attempt) == 2


@pytest.mark.parametrize(
    "on_failure", ["release", lambda error: "release" if isinstance(error, DeclinedError) else "keep"]
)
@virtual
async def test_a_failure_that_releases_lets_the_next_call_run(on_failure: Any) -> None:
    """With `release`, by itself or as the answer of a callable, the next call runs at once as attempt 1."""
    store = FaultyStore.here(turns=1)
    idem = Idempotency(store, on_failure=on_failure)
    error = DeclinedError(1)
    with pytest.raises(DeclinedError) as caught:
        await idem.run("k", raising(error))
    assert caught.value is error
    assert await store.get("k") is None
    assert await idem.run("k", attempt) == 1


@virtual
async def test_waiters_beside_a_failure_that_keeps_go_on_after_its_lease() -> None:
    """A waiter in the process of an owner that failed and keeps its key takes over when the lease is over."""
    loop = asyncio.get_running_loop()
    idem = Idempotency(FaultyStore.here(turns=1), on_failure="keep", lease=5, wait=60)
    owner = asyncio.create_task(idem.run("k", raising(ValueError())))
    waiter = asyncio.create_task(idem.run("k", attempt))
    with pytest.raises(ValueError):
        await owner
    assert await waiter == 2
    assert loop.time() == pytest.approx(5, abs=0.1)


def broken(error: Exception) -> Literal["release", "keep"]:
    """Raise, as a careless callable may."""
    raise KeyError("broken")


@pytest.mark.parametrize("on_failure", ["keep", lambda _error: "keep", broken, lambda _error: "nonsense"])
@virtual
async def test_a_failure_that_keeps_blocks_for_its_lease(on_failure: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With `keep`, and after a callable that fails, the next call runs after the lease, as attempt 2."""
    idem = Idempotency(FaultyStore.here(turns=1), on_failure=on_failure, lease=5)
    error = DeclinedError(1)
    with pytest.raises(DeclinedError) as caught:
        async with idem.operation("k"):
            await raising(error)()
    assert caught.value is error
    assert current_operation() is None
    await after_keep(idem, "k", lease=5)
    careless = on_failure is broken or (callable(on_failure) and on_failure(error) == "nonsense")
    assert [record.getMessage() for record in caplog.records] == ["on_failure_failed"] * careless


@pytest.mark.parametrize("error", [StopError(), KeyboardInterrupt(), SystemExit(3), asyncio.CancelledError()])
@pytest.mark.parametrize("on_cancel", ["keep", "release"])
@virtual
async def test_a_base_exception_counts_as_cancellation(on_cancel: Any, error: BaseException) -> None:
    """What is no Exception has an unknown outcome: `on_cancel` decides, `on_failure` and `replay_exceptions` do not."""
    opposite: Any = {"keep": "release", "release": "keep"}[on_cancel]
    idem = Idempotency(
        FaultyStore.here(turns=1), on_cancel=on_cancel, on_failure=opposite, lease=5, replay_exceptions=Exception
    )
    with pytest.raises(BaseException) as caught:
        await idem.run("k", raising(error))
    assert caught.value is error
    if on_cancel == "keep":
        await after_keep(idem, "k", lease=5)
    else:
        assert await idem.run("k", attempt) == 1


@virtual
async def test_a_cancelled_caller_waits_half_a_second_for_its_release() -> None:
    """A caller cancelled in its handler outlasts a store that is silent by half a second; the release still happens."""
    loop, events = asyncio.get_running_loop(), list[str]()
    store = FaultyStore.here()
    store.fault("remove", before=3.0)
    idem = Idempotency(store, on_cancel="release", hooks=(lambda event: events.append(event.name),))
    task = loop.create_task(idem.run("k", lambda: asyncio.sleep(1000)))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert loop.time() == pytest.approx(1.5)
    assert events == ["claimed", "release_failed"]
    await asyncio.sleep(3)
    assert await store.get("k") is None
    await store.aclose()


@pytest.mark.parametrize("wait", [None, 60])
@pytest.mark.parametrize("on_cancel", ["keep", "release"])
@virtual
async def test_a_closed_coroutine_awaits_nothing(on_cancel: Any, wait: float | None) -> None:
    """A coroutine that is closed cannot await: its key is kept for its lease, or released in the background."""
    loop = asyncio.get_running_loop()
    store = FaultyStore.here()
    idem = Idempotency(store, on_cancel=on_cancel, lease=5, wait=wait)
    coro = idem.run("k", lambda: asyncio.sleep(1000))
    coro.send(None)
    calls = store.counts.total()
    coro.close()
    assert store.counts.total() == calls
    assert current_operation() is None
    await settle()
    assert await idem.run("k", attempt, wait=60) == (2 if on_cancel == "keep" else 1)
    assert loop.time() == pytest.approx(5 if on_cancel == "keep" else 0, abs=0.1)
    assert store.counts["swap"] <= 2  # a takeover and its completion: nothing was renewed


def test_a_coroutine_that_outlives_its_loop_is_closed_quietly(recwarn: pytest.WarningsRecorder) -> None:
    """Closing a running operation without a loop raises nothing."""
    store = FaultyStore(clock=lambda: 0.0)
    coro = Idempotency(store, wait=5).run("k", lambda: asyncio.sleep(1000))
    with asyncio.Runner() as runner:

        async def start() -> None:
            coro.send(None)

        runner.run(start())
    coro.close()
    gc.collect()
    assert store.counts == {"put_if_absent": 1}
    assert not recwarn.list


@pytest.mark.parametrize("error", [DeclinedError(7, reason="limit"), StolenError(8, reason="stolen")])
@virtual
async def test_an_exception_that_is_a_result_is_replayed(error: DeclinedError) -> None:
    """It is stored, and raised again as its own class, with its arguments and attributes and the cause."""
    store = FaultyStore.here(turns=1)
    events: list[str] = []
    idem = Idempotency(store, replay_exceptions=DeclinedError, hooks=[lambda event: events.append(event.name)])
    with pytest.raises(DeclinedError) as first:
        await idem.run("k", raising(error))
    assert first.value is error
    for _ in range(2):
        with pytest.raises(DeclinedError) as again:
            await idem.run("k", attempt)
        assert type(again.value) is type(error)
        assert (again.value.args, again.value.reason) == (error.args, error.reason)
        assert isinstance(again.value.__cause__, ReplayedError)
    record = await store.get("k")
    assert record is not None
    assert (record.state, record.outcome, record.data) == (State.COMPLETED, "exception", None)
    assert current_operation() is None
    assert events == ["claimed", "completed", "replayed", "replayed"]


@virtual
async def test_a_replayed_exception_whose_class_is_not_configured() -> None:
    """Only configured classes are rebuilt; the others come back as `ReplayedError`, and nothing runs."""
    idem = Idempotency(FaultyStore.here(), replay_exceptions=(DeclinedError, KeyError))
    with pytest.raises(DeclinedError):
        await idem.run("k", raising(DeclinedError(7)))
    with pytest.raises(ReplayedError) as caught:
        await idem.run("k", attempt, replay_exceptions=KeyError)
    assert caught.value.type_name.endswith("DeclinedError")
    with pytest.raises(ReplayedError):
        async with idem.operation("k", replay_exceptions=()):
            pytest.fail("ran again")


@pytest.mark.parametrize("how", ["before", "after"])
@virtual
async def test_a_completion_that_fails_returns_and_is_repeated(how: str) -> None:
    """The value is returned, with an event; the completion lands in the background, and no duplicate runs."""
    store = FaultyStore.here(turns=1)
    events: list[Event] = []
    idem = Idempotency(store, hooks=[events.append], lease=30)
    store.fault("swap", times=2, **{how: down()})
    assert await idem.run("k", attempt) == 1
    assert [event.name for event in events] == ["claimed", "completion_failed"]
    assert isinstance(events[1].error, StoreUnavailableError)
    await asyncio.sleep(1)
    record = await store.get("k")
    assert record is not None
    assert (record.state, record.data) == (State.COMPLETED, "1")
    await store.aclose()


@virtual
async def test_a_completion_that_fails_may_raise() -> None:
    """With `on_completion_error="raise"` the error carries the value, and the completion is repeated all the same."""
    store = FaultyStore.here()
    idem = Idempotency(store, on_completion_error="raise", wait=60, replay_exceptions=DeclinedError)
    store.fault("swap", before=down())
    with pytest.raises(CompletionError) as caught:
        await idem.run("k", attempt)
    assert (caught.value.key, caught.value.result) == ("k", 1)
    assert isinstance(caught.value.__cause__, StoreUnavailableError)
    assert await idem.run("k", raising(AssertionError("ran twice"))) == 1
    store.fault("swap", before=down())
    with pytest.raises(CompletionError):
        await idem.run("declined", raising(DeclinedError(7)))
    with pytest.raises(DeclinedError):
        await idem.run("declined", raising(AssertionError("ran twice")))


@virtual
async def test_a_completion_that_never_lands_ends_with_its_lease() -> None:
    """It is repeated for a lease at most; then the next owner runs as attempt 2, and nothing is left behind."""
    store = FaultyStore.here()
    idem = Idempotency(store, lease=5)
    fault = store.fault("swap", before=down(), times=None)
    assert await idem.run("k", attempt) == 1
    await asyncio.sleep(5.01)
    store.faults.remove(fault)
    await asyncio.sleep(5)
    assert await idem.run("k", attempt) == 2


class CarelessCodec(JSONCodec):
    """A codec that does what its subclass of errors says."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome

    def encode(self, value: object) -> str:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        encoded: str = self.outcome
        return encoded


@pytest.mark.parametrize("on_completion_error", ["return", "raise"])
@pytest.mark.parametrize("outcome", [CodecError("no"), TypeError("no"), RecursionError("deep")])
@virtual
async def test_a_result_that_cannot_be_encoded_is_completed_without_it(
    outcome: Exception, on_completion_error: Any
) -> None:
    """The caller gets `CodecError` with the value; the operation is completed without a result and not run again."""
    store = FaultyStore.here(turns=1)
    events: list[str] = []
    idem = Idempotency(
        store, on_completion_error=on_completion_error, hooks=[lambda event: events.append(event.name)], lease=5
    )
    with pytest.raises(CodecError) as caught:
        await idem.run("k", attempt, codec=CarelessCodec(outcome))
    assert caught.value.result == 1
    assert outcome in (caught.value, caught.value.__cause__)
    for _ in range(2):
        with pytest.raises(ResultUnavailableError) as again:
            await idem.run("k", raising(AssertionError("ran twice")))
    assert (again.value.key, again.value.outcome) == ("k", "unavailable")
    assert events == ["claimed", "result_unavailable", "completed", "result_unavailable", "result_unavailable"]
    store.fault("swap", before=down())
    with pytest.raises(CodecError):  # even if the completion fails as well
        await idem.run("l", attempt, codec=CarelessCodec(outcome))
    await asyncio.sleep(1)
    with pytest.raises(ResultUnavailableError):
        await idem.run("l", attempt)


@pytest.mark.parametrize("outcome", [b"1", None, 1])
@virtual
async def test_a_codec_that_returns_no_text_failed_to_encode(outcome: Any) -> None:
    """A codec that gives bytes or nothing is no reason to lose the value or to run the effect again."""
    store = FaultyStore.here()
    idem = Idempotency(store, lease=5)
    with pytest.raises(CodecError) as caught:
        await idem.run("k", attempt, codec=CarelessCodec(outcome))
    assert caught.value.result == 1
    with pytest.raises(ResultUnavailableError):
        await idem.run("k", attempt)


@pytest.mark.parametrize("error", [CodecError("no"), ValueError("no")])
@virtual
async def test_a_codec_that_cannot_decode_is_a_codec_error(error: Exception) -> None:
    """Whatever a codec raises on a replay comes out as `CodecError`, and nothing runs."""

    class Unreadable(JSONCodec):
        def decode(self, text: str, annotation: Any) -> Any:
            raise error

    idem = Idempotency(FaultyStore.here())
    await idem.run("k", attempt)
    with pytest.raises(CodecError) as caught:
        await idem.run("k", raising(AssertionError("ran twice")), codec=Unreadable())
    assert error in (caught.value, caught.value.__cause__)


@virtual
async def test_a_release_that_fails_does_not_mask_the_failure() -> None:
    """The handler's own exception is raised, with an event for the other; the release lands in the background."""
    store = FaultyStore.here()
    events: list[Event] = []
    idem = Idempotency(store, hooks=[events.append])
    store.fault("remove", before=down())
    error = DeclinedError(1)
    with pytest.raises(DeclinedError) as caught:
        await idem.run("k", raising(error))
    assert caught.value is error
    assert [event.name for event in events] == ["claimed", "release_failed"]
    await asyncio.sleep(1)
    assert await idem.run("k", attempt) == 1


@virtual
async def test_a_store_that_is_down_before_the_effect_raises() -> None:
    """By default nothing runs, the caller gets the store's error, and nothing is left behind."""
    store = FaultyStore.here()
    events: list[str] = []
    idem = Idempotency(store, hooks=[lambda event: events.append(event.name)])
    store.fault("put_if_absent", after=OSError("reset"))  # it was written, and its reply was lost
    with pytest.raises(StoreUnavailableError) as caught:
        await idem.run("k", raising(AssertionError("ran")))
    assert isinstance(caught.value.__cause__, OSError)
    assert events == ["store_error"]
    await settle()
    assert await store.get("k") is None


@virtual
async def test_a_store_that_is_down_may_be_run_without(caplog: pytest.LogCaptureFixture) -> None:
    """With `run` the handler runs unprotected, with an event and a warning; a refusal is raised all the same."""
    store = FaultyStore.here()
    events: list[str] = []
    idem = Idempotency(store, on_store_error="run", hooks=[lambda event: events.append(event.name)])
    store.fault("put_if_absent", before=down(), times=3)
    assert await idem.run("k", attempt) == 1
    async with idem.operation("k") as op:
        assert not op.replayed
        assert op.set_result(5) == op.result == 5
    with pytest.raises(DeclinedError):
        await idem.run("k", raising(DeclinedError(1)))
    assert events == ["store_error", "ran_unprotected"] * 3
    assert [(record.getMessage(), record.levelno) for record in caplog.records] == [
        ("ran_unprotected", logging.WARNING)
    ] * 3
    await settle()
    assert await store.get("k") is None
    store.fault("put_if_absent", before=StoreError("refused"))
    with pytest.raises(StoreError, match="refused"):
        await idem.run("k", raising(AssertionError("ran")))


@pytest.mark.parametrize("key", [None, ""])
@virtual
async def test_a_missing_key(key: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused before anything is written, or with `run` the handler runs unprotected and a warning says so."""
    store = FaultyStore.here()
    events: list[Event] = []
    idem = Idempotency(store, hooks=[events.append])

    @idem.idempotent(key="order", missing_key="run")
    async def pay(order: str | None) -> int:
        return await attempt()

    with pytest.raises(MissingKeyError):
        await idem.run(key, attempt)
    with pytest.raises(MissingKeyError):
        idem.operation(key)
    assert await idem.run(key, attempt, missing_key="run") == 1
    assert await pay(key) == 1
    assert await pay(key) == 1
    assert [(event.name, event.key) for event in events] == [("ran_unprotected", "")] * 3
    assert [record.getMessage() for record in caplog.records] == ["ran_unprotected"] * 3
    assert store.calls == []
