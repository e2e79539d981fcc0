"""The life of a guarded request: a client that leaves takes no key with it, and an effect that happened is recorded."""

import asyncio
from typing import Any

import anyio
import pytest

from asyncidem import (
    CompletionError,
    ConfigurationError,
    Event,
    FingerprintMismatchError,
    Idempotency,
    InProgressError,
    LeaseLostError,
    Operation,
    ResultUnavailableError,
    State,
    StoreUnavailableError,
    WaitTimeoutError,
    current_operation,
)
from asyncidem.integrations.guarding import ClientGoneError, begin, fail, settle
from asyncidem.integrations.http import Answer, HTTPFailure, Rules
from asyncidem.operation import current

from faulty import FaultyStore, down, virtual
from faulty import settle as turns
from loops import VirtualTimeLoop, cancel_at_tick, run_virtual

CREATED = Answer(201, [(b"content-type", b"text/plain")], b"ok")


class Desk:
    """Requests of one client with one key, and what happens to them."""

    def __init__(self, *, turns: int = 0, should_store: Any = None, **options: Any) -> None:
        self.store = FaultyStore.here(turns=turns)
        self.names: list[str] = []
        options = {"wait": 60, "hooks": [self._hear], **options}
        idempotency = Idempotency(self.store, **options)
        self.rules: Rules[Any] = Rules(idempotency, principal=None, required=True, should_store=should_store)

    def operation(self, mark: str = "m") -> Operation:
        """Return the operation of another request."""
        return self.rules.operation(None, "POST", "/", "k", mark)

    async def state(self) -> State | None:
        """Return the state of the record, None where there is none."""
        record = await self.store.get(self.operation().key)
        return None if record is None else record.state

    async def begun(self) -> Operation:
        """Return an operation that runs."""
        op = self.operation()
        await begin(op, None)
        current.set(None)  # each request has a context of its own
        return op

    async def replayed(self) -> Any:
        """Return what a duplicate gets."""
        async with self.operation() as op:
            assert op.replayed
            return op.result

    async def end(self, op: Operation) -> None:
        """End an operation that runs, with a response."""
        await settle(op, self.rules, *CREATED[:3])

    def _hear(self, event: Event) -> None:
        self.names.append(event.name)


async def forever() -> None:
    """Wait for the end of a client that stays."""
    await asyncio.Event().wait()


# -- begin ---------------------------------------------------------------------------------------------------------------


@virtual
async def test_a_request_begins_whether_its_client_is_watched_or_not() -> None:
    """Of a client that stays nothing is heard."""
    for gone in (None, forever):
        desk = Desk(turns=1)
        op = desk.operation()
        await begin(op, gone)
        assert not op.replayed
        assert await desk.state() is State.INPROGRESS
        await desk.end(op)
        again = desk.operation()
        await begin(again, gone)
        assert again.replayed
        assert again.result == CREATED
        assert current_operation() is None  # it is left: nothing is inside of a replay


@virtual
async def test_what_entering_raises_is_raised() -> None:
    """With a client that is watched, too."""
    desk = Desk(turns=1, wait=None)
    op = await desk.begun()
    for gone in (None, forever):
        with pytest.raises(InProgressError):
            await begin(desk.operation(), gone)
        with pytest.raises(FingerprintMismatchError):
            await begin(desk.operation("other"), gone)
    desk.store.fault("put_if_absent", before=down())
    with pytest.raises(StoreUnavailableError):
        await begin(desk.operation(), forever)
    await desk.end(op)


@virtual
async def test_a_duplicate_whose_client_leaves_waits_no_more() -> None:
    """Whatever way the transport says so; the owner is not disturbed."""

    async def leaves() -> None:
        await asyncio.sleep(1)

    async def breaks() -> None:
        await leaves()
        raise OSError("connection reset")

    for gone in (leaves, breaks):
        desk = Desk(turns=1)
        op = await desk.begun()
        began = asyncio.get_running_loop().time()
        with pytest.raises(ClientGoneError):
            await begin(desk.operation(), gone)
        assert asyncio.get_running_loop().time() - began == pytest.approx(1)
        assert await desk.state() is State.INPROGRESS
        await desk.end(op)
        assert await desk.replayed() == CREATED


@virtual
async def test_a_client_that_is_gone_before_anything_was_awaited_is_not_noticed() -> None:
    """The key is won in the same step, and the handler may run: nobody has to know."""
    desk = Desk()
    op = desk.operation()

    async def never_asked() -> None:
        raise AssertionError

    await begin(op, never_asked)
    await desk.end(op)


async def scene(ending: str, gone_at: int | None, cancelled_at: int | None, scoped: bool) -> tuple[str, State | None]:
    """Let a duplicate wait while its owner ends, and its client leave, or the server cancel it, some turns later."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    desk = Desk(turns=2, on_failure="keep", on_cancel="keep")
    owner = await desk.begun()
    left = asyncio.Event()
    op = desk.operation()
    scope = anyio.CancelScope()
    outcome = "began"

    async def duplicate() -> None:
        nonlocal outcome
        try:
            with scope:
                await begin(op, left.wait)
                outcome = "replayed" if op.replayed else "began"
                return
            outcome = "cancelled"
        except ClientGoneError:
            outcome = "gone"
        except asyncio.CancelledError:
            outcome = "cancelled"

    task = asyncio.create_task(duplicate())
    await turns()
    if gone_at is not None:
        loop.call_at_tick(gone_at + 1, left.set)
    if cancelled_at is not None:
        loop.call_at_tick(cancelled_at + 1, scope.cancel if scoped else task.cancel)
    if ending == "released":
        await fail(owner, desk.rules.failure(302, "release"))
    else:
        await desk.end(owner)
    await task
    await turns(40)
    if outcome == "began":
        assert await desk.state() is State.INPROGRESS
        await fail(op, desk.rules.failure(302, "release"))
        await turns(40)
    return outcome, await desk.state()


@pytest.mark.parametrize("ending", ["released", "completed"])
def test_a_client_that_leaves_at_any_moment_takes_no_key_with_it(ending: str) -> None:
    """Its duplicate waits no more, or has won, and runs."""
    seen: set[str] = set()
    for gone_at in range(40):
        outcome, state = run_virtual(scene(ending, gone_at, None, scoped=False))
        assert state is (None if ending == "released" else State.COMPLETED)
        seen.add(outcome)
    assert seen == {"gone", "began" if ending == "released" else "replayed"}


@pytest.mark.parametrize("taken_over", [False, True])
@virtual
async def test_a_client_that_leaves_in_the_moment_of_winning_gives_the_key_back(taken_over: bool) -> None:
    """Or nobody would run it for a lease. What was an orphan is one again."""
    desk = Desk(lease=1, on_failure="keep", on_cancel="keep")
    if taken_over:
        await fail(await desk.begun(), HTTPFailure(500))
        await asyncio.sleep(2)
    answer, left = asyncio.Event(), asyncio.Event()
    fault = desk.store.fault("swap" if taken_over else "put_if_absent", after=answer.wait)
    task = asyncio.create_task(begin(desk.operation(), left.wait))
    await fault.reached.wait()
    await turns()
    left.set()
    answer.set()
    with pytest.raises(ClientGoneError):
        await task
    assert desk.names[-2:] == ["taken_over" if taken_over else "claimed", "released"]
    assert await desk.state() is (State.INPROGRESS if taken_over else None)
    op = await desk.begun()
    assert op.attempt == (2 if taken_over else 1)
    await desk.end(op)


@virtual
async def test_a_client_that_leaves_after_winning_is_not_noticed() -> None:
    """Its handler may run, and what it does is stored."""
    desk = Desk()
    answer, left = asyncio.Event(), asyncio.Event()
    fault = desk.store.fault("put_if_absent", after=answer.wait)
    op = desk.operation()
    task = asyncio.create_task(begin(op, left.wait))
    await fault.reached.wait()
    await turns()
    answer.set()
    left.set()
    await task
    await turns()
    assert desk.names == ["claimed"]
    await desk.end(op)
    assert await desk.replayed() == CREATED


@pytest.mark.parametrize("scoped", [True, False], ids=["anyio", "asyncio"])
def test_a_duplicate_that_is_cancelled_at_any_moment_takes_no_key_with_it(scoped: bool) -> None:
    """By a server that ends, with or without a client that leaves about then; the cancellation is never swallowed."""
    seen: set[str] = set()
    for cancelled_at in range(24):
        for gone_at in (None, *range(max(0, cancelled_at - 3), cancelled_at + 4)):
            outcome, state = run_virtual(scene("released", gone_at, cancelled_at, scoped))
            assert state is None, (cancelled_at, gone_at)
            seen.add(outcome)
    assert seen == {"cancelled", "gone", "began"}


# -- settle --------------------------------------------------------------------------------------------------------------


@virtual
async def test_a_result_is_stored_and_replayed() -> None:
    """As the response was, without what the rules leave out."""
    desk = Desk()
    op = await desk.begun()
    await settle(op, desk.rules, 201, [*CREATED.headers, (b"date", b"now")], b"ok")
    assert await desk.replayed() == CREATED


@virtual
async def test_what_was_not_carried_out_releases_the_key() -> None:
    """Whatever `on_failure` says, and whether the response could be kept or not."""
    for body in (b"", None):
        desk = Desk(on_failure="keep")
        await settle(await desk.begun(), desk.rules, 404, [], body)
        assert await desk.state() is None


@virtual
async def test_a_failure_is_for_on_failure_to_judge() -> None:
    """It gets the status."""
    seen: list[Exception] = []

    def judge(error: Exception) -> Any:
        seen.append(error)
        return "release" if isinstance(error, HTTPFailure) and error.status == 503 else "keep"

    desk = Desk(on_failure=judge)
    await settle(await desk.begun(), desk.rules, 503, [], b"later")
    assert await desk.state() is None
    await settle(await desk.begun(), desk.rules, 500, [], None)
    assert await desk.state() is State.INPROGRESS
    assert [error.status for error in seen if isinstance(error, HTTPFailure)] == [503, 500]


@virtual
async def test_what_cannot_be_kept_is_completed_without_a_result() -> None:
    """The response goes to its client: nothing is raised. A duplicate does not run."""
    for status, headers, body in [(200, [], None), (200, [(b"content-encoding", b"gzip")], b"x")]:
        desk = Desk()
        await settle(await desk.begun(), desk.rules, status, headers, body)
        assert await desk.state() is State.COMPLETED
        with pytest.raises(ResultUnavailableError):
            await begin(desk.operation(), None)


@virtual
async def test_a_broken_should_store_does_not_run_the_effect_twice() -> None:
    """Its error is raised, and the operation has completed, whatever the status."""

    def broken(status: int) -> bool:
        raise KeyError(status)

    for should_store, error in [(broken, KeyError), (lambda _: None, ConfigurationError)]:
        desk = Desk(should_store=should_store)
        with pytest.raises(error):
            await settle(await desk.begun(), desk.rules, 200, [], b"ok")
        assert await desk.state() is State.COMPLETED
        with pytest.raises(ResultUnavailableError):
            await begin(desk.operation(), None)


@virtual
async def test_the_errors_of_an_end_are_raised() -> None:
    """That another owner answers for the key, and on request that the completion is not acknowledged."""
    desk = Desk()
    op = await desk.begun()
    await desk.store.delete(op.key)
    with pytest.raises(LeaseLostError):
        await desk.end(op)
    for body in (b"ok", None):
        desk = Desk(on_completion_error="raise", lease=1)
        op = await desk.begun()
        desk.store.fault("swap", before=down(), times=None)
        if body is None:  # a response that cannot be kept is nothing to tell its client about
            await settle(op, desk.rules, 200, [], body)
        else:
            with pytest.raises(CompletionError):
                await settle(op, desk.rules, 200, [], body)
        await desk.store.aclose()


@virtual
async def test_what_runs_unprotected_ends_unprotected() -> None:
    """With `on_store_error="run"` there is nothing to store, and nothing to raise."""
    desk = Desk(on_store_error="run")
    desk.store.fault("put_if_absent", before=down())
    op = desk.operation()
    await begin(op, forever)
    await desk.end(op)
    assert await desk.state() is None


@virtual
async def test_a_cancelled_end_is_an_end() -> None:
    """A cancellation at any turn leaves a result, or what becomes one: the effect has happened."""
    for tick in range(1, 8):
        desk = Desk(turns=2)
        op = await desk.begun()

        async def ending(desk: Desk = desk, op: Operation = op) -> None:
            await desk.end(op)

        await cancel_at_tick(ending(), tick)
        await turns(40)
        expected = State.INPROGRESS if tick == 1 else State.COMPLETED  # before its first step it has not begun
        assert await desk.state() is expected, tick
        if tick == 1:
            await desk.end(op)


@virtual
async def test_a_wait_that_runs_out_ends_although_the_client_stays() -> None:
    """And the watching of the client with it."""
    desk = Desk(turns=1, wait=2)
    op = await desk.begun()
    with pytest.raises(WaitTimeoutError):
        await begin(desk.operation(), forever)
    await desk.end(op)
