"""Work that is cut off from outside at a known instant: store calls, waits, leases and farewells end in time."""

import asyncio
import contextlib
import time
from collections.abc import Generator

import pytest

from asyncidem import Idempotency, MemoryStore, StoreUnavailableError, WaitTimeoutError
from asyncidem.cancellation import linger
from asyncidem.cutoffs import Cutoff, bounded, cutoff, lease_within
from asyncidem.stores.primitives import Within, call_deadline
from asyncidem.testing import FaultyStore


@contextlib.contextmanager
def cut(*, calls: float, last_calls: float | None = None, leases: float | None = None) -> Generator[None]:
    """Cut the block off, in so many seconds from now."""
    now = time.monotonic()
    last_calls = calls if last_calls is None else last_calls
    token = cutoff.set(Cutoff(now + calls, now + last_calls, now + (last_calls if leases is None else leases)))
    try:
        yield
    finally:
        cutoff.reset(token)


async def forever() -> None:
    """Run until it is cancelled."""
    await asyncio.Event().wait()


def test_nothing_is_bounded_without_one() -> None:
    """Seconds and leases are what they were given as."""
    assert (bounded(5), lease_within(30_000)) == (5, 30_000)


def test_calls_have_the_time_that_is_left() -> None:
    """They end by the cutoff; those that begin after it, to settle, by the second one; after that there is no time."""
    with cut(calls=2, last_calls=3):
        assert bounded(1) == 1
        assert bounded(5) == pytest.approx(2, abs=0.1)
    with cut(calls=-1, last_calls=3):
        assert bounded(5) == pytest.approx(3, abs=0.1)
    with cut(calls=-2, last_calls=-1):
        assert bounded(5) == 0


def test_a_store_call_is_bounded() -> None:
    """Its deadline is the cutoff, where that comes before its timeout."""
    for seconds, expected in ((5, 2), (1, 1)):
        with cut(calls=2), Within(seconds):
            deadline = call_deadline.get()
            assert deadline is not None
            assert deadline - time.monotonic() == pytest.approx(expected, abs=0.1)


async def test_a_lease_ends_with_the_work() -> None:
    """It is as long as the work may still take, longer or shorter than the option, and never less than a millisecond."""
    store = MemoryStore()
    idem = Idempotency(store, lease=30)
    for number, (seconds, expected) in enumerate(((2.0, 2_000), (100.0, 100_000), (-1.0, 1))):
        with cut(calls=5, leases=seconds):
            async with idem.operation(f"k{number}") as op:
                assert op._claim is not None
                assert op._claim._lease_ms == pytest.approx(expected, abs=100)
                assert op._local is not None
                assert op._local.renewer._delays == {}  # type: ignore[attr-defined]


async def test_a_lease_is_renewed_without_one() -> None:
    """Where nothing takes the time away the renewer has the claim."""
    async with Idempotency(MemoryStore()).operation("k") as op:
        assert op._local is not None
        assert list(op._local.renewer._delays) == [op._claim]  # type: ignore[attr-defined]


async def test_a_wait_ends_in_time_and_takes_over_for_the_rest() -> None:
    """A duplicate waits no longer than the cutoff; who claims after a wait gets the lease that there is time for then."""
    idem = Idempotency(MemoryStore(), lease=0.2, renew=False, wait=30, on_cancel="keep")
    running = asyncio.create_task(idem.run("k", forever))
    await asyncio.sleep(0)
    began = time.monotonic()
    with cut(calls=0.05), pytest.raises(WaitTimeoutError):
        await idem.run("k", forever)
    with cut(calls=began + 10 - time.monotonic()):
        async with idem.operation("k") as op:
            waited = time.monotonic() - began
            assert op._claim is not None
            assert waited > 0.1
            assert op._claim._lease_ms / 1000 == pytest.approx(10 - waited, abs=0.1)
            assert op.attempt == 2
    running.cancel()
    await asyncio.wait((running,))


async def test_who_is_cancelled_lingers_while_there_is_time() -> None:
    """What it owes goes on in the background."""
    task = asyncio.create_task(forever())
    began = time.monotonic()
    with cut(calls=-1, last_calls=0.02):
        await linger(task)
    assert time.monotonic() - began < 0.3
    assert not task.done()
    task.cancel()
    await asyncio.wait((task,))


async def test_what_is_repeated_in_the_background_has_the_time_of_a_new_call() -> None:
    """A completion that was not acknowledged may outlast the work that it belongs to: a frozen process goes on."""
    faulty = FaultyStore(MemoryStore())
    left: list[float] = []

    def note() -> None:
        left.append((call_deadline.get() or 0.0) - time.monotonic())

    faulty.fault("swap", before=StoreUnavailableError("down"))
    repeated = faulty.fault("swap", before=note)
    with cut(calls=0.5):
        assert await Idempotency(faulty).run("k", asyncio.sleep, 0, 42) == 42
    await repeated.reached.wait()
    await asyncio.sleep(0)
    assert left == [pytest.approx(faulty.timeout, abs=0.2)]
