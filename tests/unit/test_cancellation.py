"""Cancellation at every turn of the loop, once and repeated, of calls, waiters and the store's own methods."""

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import anyio
import pytest

from asyncidem import Claimed, Idempotency, InProgressError, LeaseLostError, State, Store, current_operation
from asyncidem.stores.memory import MemoryStore

from faulty import FaultyStore, quiet, settle
from loops import VirtualTimeLoop, cancel_at_await, cancel_at_tick, run_virtual

LEASE = 30
TURN = 1e-5

Way: TypeAlias = Literal["asyncio", "asyncio without anyio", "every await", "anyio"]
WAYS: list[Way] = ["asyncio", "asyncio without anyio", "every await", "anyio"]


@dataclass
class Trace:
    """How far a handler came."""

    store: FaultyStore
    fails: bool = False
    started: bool = False
    returned: bool = False
    failed: bool = False
    runs: int = 0

    async def handler(self) -> str:
        self.started = True
        self.runs += 1
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if self.fails:
            self.failed = True
            raise ValueError
        self.returned = True
        return "done"


End: TypeAlias = Literal["cancelled", "ended", ""]
"""How a coroutine ended: cancelled, by itself although it was cancelled, or before it could be."""


async def cancelled(way: Way, coro: Coroutine[Any, Any, Any], at: int) -> End:
    """Run a coroutine and cancel it at some turn; say how it ended."""
    if way == "anyio":
        return await cancelled_scope(coro, at)
    if way == "every await":
        run = await cancel_at_await(coro, at, every=True)
    else:
        run = await cancel_at_tick(coro, at)
    if run.reached:
        assert run.task.cancelled(), f"cancelled at {at}, the caller saw {run.task}"
        return "cancelled"
    run.task.exception()
    return ""


async def cancelled_scope(coro: Coroutine[Any, Any, Any], at: int) -> End:
    """Do it as anyio does: a scope is cancelled, and cancels its task again and again until it ends."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    scope, ended = anyio.CancelScope(), False

    async def run() -> None:
        nonlocal ended
        with scope:
            await coro
            ended = True

    loop.call_at_tick(at, scope.cancel)
    task = loop.create_task(run())
    await asyncio.wait([task])
    if not scope.cancel_called:
        task.exception()
        return ""
    assert task.cancelling() == 0
    if scope.cancelled_caught:
        return "cancelled"
    # A scope leaves a task alone whose await is already over: then the call ended by itself.
    assert ended or isinstance(task.exception(), ValueError)
    return "ended"


def at_every_turn(way: Way, once: Callable[[int], Coroutine[Any, Any, bool]]) -> int:
    """Run a scenario on a new loop for every turn that it lives; return how many there were."""
    noise: list[dict[str, Any]] = []
    for at in range(1, 500):
        if not run_virtual(quiet(once(at), noise), tick=TURN):
            gc.collect()  # a task or future whose exception nobody took complains when it goes
            assert not noise, f"a loop complained: {noise}"
            return at
    raise AssertionError("it never ended by itself")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """Each way in which a task is cancelled."""
    if request.param == "asyncio without anyio":
        monkeypatch.delitem(sys.modules, "anyio")
    chosen: Way = request.param
    return chosen


async def decorated(idem: Idempotency, trace: Trace) -> str:
    """Call a decorated function."""

    @idem.idempotent(key=lambda: "k", name="n")
    async def handler() -> str:
        return await trace.handler()

    return await handler()


async def block(idem: Idempotency, trace: Trace) -> str:
    """Run a block."""
    async with idem.operation("n:k") as op:
        if op.replayed:
            replayed: str = op.result
            return replayed
        result: str = op.set_result(await trace.handler())
        return result


async def called(idem: Idempotency, trace: Trace) -> str:
    """Use the call form."""
    return await idem.run("n:k", trace.handler)


async def waiting(idem: Idempotency, trace: Trace) -> str:
    """Use the call form with a wait."""
    return await idem.run("n:k", trace.handler, wait=100)


FORMS = [decorated, block, called, waiting]


async def attempt() -> int:
    """A handler that returns its attempt."""
    op = current_operation()
    assert op is not None
    return op.attempt


async def check(store: FaultyStore, trace: Trace, on_cancel: str, orphans: int) -> None:
    """Check what a cancelled call left behind, and that the next one gets what it should."""
    idem = Idempotency(store, lease=LEASE)
    record = await store.get("n:k")
    if trace.returned:
        assert record is not None, "the result is lost"
        assert (record.state, record.data) == (State.COMPLETED, '"done"')
        assert await idem.run("n:k", attempt) == "done"
        return
    if trace.started and not trace.failed and on_cancel == "keep":
        assert record is not None
        assert (record.state, record.attempt) == (State.INPROGRESS, orphans + 1)
        with pytest.raises(InProgressError) as caught:
            await idem.run("n:k", attempt)
        assert caught.value.retry_after <= LEASE
        await asyncio.sleep(LEASE)
        assert await idem.run("n:k", attempt) == orphans + 2
        return
    assert (record is None) is (orphans == 0), "the key is stuck"
    assert await store.read("n:k:lock") is None
    assert await idem.run("n:k", attempt) == orphans + 1
    assert await idem.run("n:k", attempt) == orphans + 1


@pytest.mark.parametrize(
    ("on_cancel", "orphans", "fails"),
    [("keep", 0, False), ("release", 0, False), ("keep", 1, False), ("release", 1, False), ("keep", 0, True)],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_call_cancelled_at_any_turn_leaves_no_key_stuck(
    form: Callable[[Idempotency, Trace], Coroutine[Any, Any, str]],
    way: Way,
    on_cancel: Literal["keep", "release"],
    orphans: int,
    fails: bool,
) -> None:
    """The key is free, or completed, or (the handler had started) kept for a lease; nothing else is left behind."""
    ends: set[str] = set()

    async def once(at: int) -> bool:
        store = FaultyStore.here(turns=2)
        if orphans:
            await store.claim("n:k", lease=LEASE)
            await asyncio.sleep(LEASE)
        trace = Trace(store, fails)
        idem = Idempotency(store, lease=LEASE, on_cancel=on_cancel)
        reached = await cancelled(way, form(idem, trace), at)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"the caller did not wait for {left}"
        if reached:
            ends.add("returned" if trace.returned else "failed" if trace.failed else "ran" if trace.started else "no")
            await check(store, trace, on_cancel, orphans)
        return bool(reached)

    turns = at_every_turn(way, once)
    assert turns > 8
    # Each phase of the call was hit.
    assert ends == {"no", "ran", "failed" if fails else "returned"}


@pytest.mark.parametrize("end", ["complete", "release", "lease"])
def test_a_waiter_cancelled_at_any_turn(way: Way, end: Literal["complete", "release", "lease"]) -> None:
    """A cancelled waiter takes nothing over, and whoever waits beside it is still served."""

    async def once(at: int) -> bool:
        store = FaultyStore.here(turns=1)
        claim = await store.claim("n:k", lease=0.2)
        assert isinstance(claim, Claimed)
        trace, beside = Trace(store), Trace(store)
        idem = Idempotency(store, lease=LEASE, wait=100, renew=False)

        async def owner() -> None:
            await asyncio.sleep(0.05)
            if end == "complete":
                await store.complete(claim, '"done"')
            elif end == "release":
                await store.release(claim)

        owning = asyncio.create_task(owner())
        other: list[asyncio.Task[str]] = []

        async def join() -> None:
            # behind the first, so that it is elected when the first hands its election on
            await asyncio.sleep(0)
            other.append(asyncio.create_task(waiting(idem, beside)))

        joining = asyncio.create_task(join())
        reached = await cancelled(way, waiting(idem, trace), at)
        await asyncio.gather(owning, joining)
        before = asyncio.get_running_loop().time()
        if trace.started and not trace.returned:
            await asyncio.wait(other, timeout=LEASE + 1)  # kept for its lease
        outcome = await other[0]
        took = asyncio.get_running_loop().time() - before
        assert outcome == "done"
        assert took < (LEASE + 1 if trace.started and not trace.returned else 0.3)
        assert trace.runs + beside.runs == (0 if end == "complete" else 1 + (trace.started and not trace.returned))
        return bool(reached)

    # A waiter suspends once, and in the store.
    assert at_every_turn(way, once) > (3 if way == "every await" else 20)


StoreCall: TypeAlias = Callable[[Store, Claimed], Awaitable[Any]]


@pytest.mark.parametrize("orphans", [0, 1])
@pytest.mark.parametrize("method", ["claim", "complete", "release", "renew"])
def test_a_method_of_the_store_cancelled_at_any_turn(
    way: Way, method: Literal["claim", "complete", "release", "renew"], orphans: int
) -> None:
    """A cancelled claim is undone, a completion and a release are done, a renewal leaves a claim that can go on."""

    async def once(at: int) -> bool:
        store = FaultyStore.here(turns=2)
        if orphans:
            await store.claim("k", lease=LEASE)
            await asyncio.sleep(LEASE)
        if method == "claim":
            reached = await cancelled(way, store.claim("k", lease=LEASE), at)
        else:
            claim = await store.claim("k", lease=LEASE)
            assert isinstance(claim, Claimed)
            steps: dict[str, Coroutine[Any, Any, None]] = {method: getattr(store, method)(claim, *args_of(method))}
            reached = await cancelled(way, steps[method], at)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        if reached != "cancelled" or (at == 1 and method != "claim"):
            return bool(reached)  # a coroutine that was cancelled before its first step did nothing
        record = await store.get("k")
        if method == "complete":
            assert record is not None
            assert record.data == "1"
        elif method == "renew":
            await store.renew(claim)
            await store.complete(claim, "2")
        else:
            assert (record is None) is (orphans == 0)
            again = await store.claim("k")
            assert isinstance(again, Claimed)
            assert again.attempt == orphans + 1
        return True

    # A scope is not cancelled in the last turn, and an await is counted once for each suspension.
    assert at_every_turn(way, once) >= 4


def args_of(method: str) -> tuple[str, ...]:
    """Return the further arguments of a store's method."""
    return ("1",) if method == "complete" else ()


@pytest.mark.parametrize("form", FORMS)
def test_a_loop_that_shuts_down_at_any_turn_still_undoes(
    form: Callable[[Idempotency, Trace], Coroutine[Any, Any, str]],
) -> None:
    """`asyncio.run` cancels every task at once, those that undo and complete too: they get their half second."""
    for at in range(1, 100):
        now = [0.0]
        store = FaultyStore(turns=2, clock=lambda: now[0], wall=lambda: now[0])
        trace = Trace(store)
        idem = Idempotency(store, lease=LEASE)
        done: list[bool] = []

        async def main() -> None:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualTimeLoop)
            over = asyncio.Event()
            loop.call_at_tick(at, over.set)
            task = loop.create_task(form(idem, trace))
            await over.wait()
            done.append(task.done())

        run_virtual(main(), tick=TURN)

        async def after() -> None:
            record = await store.get("n:k")
            if trace.returned:
                assert record is not None
                assert record.state is State.COMPLETED
            elif trace.started:
                assert record is not None
                assert record.state is State.INPROGRESS
                now[0] += LEASE
                assert await Idempotency(store).run("n:k", attempt) == 2
            else:
                assert record is None

        run_virtual(quiet(after()))
        if done[0]:
            break
    else:
        pytest.fail("it never ended by itself")
    assert at > 8


def test_a_claim_on_a_slow_store_is_undone_in_the_background(way: Way) -> None:
    """Its cancelled caller waits half a second at most; the undoing goes on, and the key is free when it ends."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        store = FaultyStore.here()
        store.fault("put_if_absent", after=10.0)
        store.fault("remove", before=3.0)
        task = asyncio.create_task(in_way(way, store.claim("k"), 1.0))
        await asyncio.wait([task])
        assert loop.time() == pytest.approx(1.5, abs=0.01)
        assert await store.get("k") is not None
        await asyncio.sleep(2.6)
        assert await store.get("k") is None
        await settle()

    run_virtual(quiet(main()), tick=TURN)


@pytest.mark.parametrize("settling", ["complete", "release"])
def test_settling_on_a_slow_store_goes_on_in_the_background(way: Way, settling: Literal["complete", "release"]) -> None:
    """A cancelled completion or release is repeated and lands; its caller waits half a second at most."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        store = FaultyStore.here()
        trace = Trace(store, fails=settling == "release")
        idem = Idempotency(store, lease=LEASE)
        store.fault("swap" if settling == "complete" else "remove", before=3.0, times=2)
        task = asyncio.create_task(in_way(way, called(idem, trace), 1.0))
        await asyncio.wait([task])
        assert loop.time() == pytest.approx(1.5, abs=0.01)
        record = await store.get("n:k")
        assert record is not None
        assert record.state is State.INPROGRESS
        await asyncio.sleep(3)
        record = await store.get("n:k")
        assert (record is None) is (settling == "release")
        assert record is None or record.state is State.COMPLETED
        await settle()

    run_virtual(quiet(main()), tick=TURN)


async def in_way(way: Way, coro: Coroutine[Any, Any, Any], seconds: float) -> None:
    """Cancel a call after some seconds, as a deadline does; its caller sees a time-out and is whole again."""
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(TimeoutError):
        if way == "anyio":
            with anyio.fail_after(seconds):
                await coro
        elif way == "every await":
            # a second cancellation arrives while the caller still waits
            asyncio.get_running_loop().call_later(seconds + 0.2, task.cancel)
            try:
                async with asyncio.timeout(seconds):
                    await coro
            except asyncio.CancelledError:
                task.uncancel()
                raise TimeoutError from None
        else:
            async with asyncio.timeout(seconds):
                await coro
    assert task.cancelling() == 0


def test_a_slow_store_at_shutdown_costs_half_a_second() -> None:
    """The undoing that a shutdown cancels goes on for half a second, and is then given up: the lease ends the claim."""
    store = FaultyStore(clock=lambda: 0.0)
    times: list[float] = []

    async def main() -> None:
        store.fault("put_if_absent", after=10.0)
        store.fault("remove", before=60.0, times=None)
        task = asyncio.create_task(store.claim("k", lease=600))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.wait([task])
        times.append(asyncio.get_running_loop().time())

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        loop = runner.get_loop()
        runner.run(main())
        runner.close()
    times.append(loop.time())
    assert times == [pytest.approx(1.5), pytest.approx(2.0)]


def test_a_call_closed_at_any_suspension_awaits_nothing() -> None:
    """A coroutine that is closed sends nothing more and leaves no task; its lease ends what it has claimed."""

    async def once(at: int) -> bool:
        store = FaultyStore.here(turns=1)
        trace = Trace(store)
        coro = waiting(Idempotency(store, lease=LEASE), trace)
        try:
            for _ in range(at):
                coro.send(None)
        except StopIteration:
            return False
        calls = list(store.calls)
        coro.close()
        assert store.calls == calls
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert current_operation() is None
        beside = Trace(store)
        assert await waiting(Idempotency(store, lease=LEASE), beside) == "done"
        assert asyncio.get_running_loop().time() < LEASE + 1
        return True

    assert at_every_turn("asyncio", once) > 6


def test_a_waiter_closed_when_it_was_elected_hands_on() -> None:
    """A waiter whose coroutine is closed in the moment of its election leaves the key to the next."""

    async def main() -> None:
        store = FaultyStore.here()
        claim = await store.claim("n:k", lease=LEASE)
        assert isinstance(claim, Claimed)
        trace, beside = Trace(store), Trace(store)
        idem = Idempotency(store, lease=LEASE)
        coro = waiting(idem, trace)
        coro.send(None)  # it waits; nobody will wake it
        other = asyncio.create_task(waiting(idem, beside))
        await settle()
        await store.release(claim)
        await asyncio.sleep(1)
        coro.close()
        assert await asyncio.wait_for(other, 5) == "done"
        assert (trace.runs, beside.runs) == (0, 1)

    run_virtual(quiet(main()))


def test_a_cancelled_claims_token_is_never_used_again() -> None:
    """A claim that was undone can be neither renewed nor completed by what still holds it."""

    async def main() -> None:
        store = FaultyStore.here()
        claim = await MemoryStore.claim(store, "k")
        assert isinstance(claim, Claimed)
        await store.release(claim)
        with pytest.raises(LeaseLostError):
            await store.complete(claim, "1")
        with pytest.raises(LeaseLostError):
            await store.renew(claim)
        assert await store.get("k") is None

    run_virtual(quiet(main()))
