"""The conformance kit reports every store that breaks the contract, and passes those that keep it."""

import asyncio
import functools
import pickle
import subprocess
import sys
from typing import Any

import pytest

from asyncidem import ConfigurationError, MemoryStore, Store
from asyncidem.model import LEFT_UNKNOWN, Stored, Swap
from asyncidem.testing import ConformanceError, ManualClock, StoreConformance, conformance

from faulty import virtual
from loops import run_virtual
from stores.broken_answers import ReadCannotBeEnded
from stores.broken_pairs import BROKEN
from stores.broken_stores import PutReadsThenWrites


def kit(kind: type[MemoryStore], **options: Any) -> StoreConformance:
    """Return a kit over one store's data, on a clock that nobody waits for."""
    clock = ManualClock()
    first: list[Store] = []

    def make() -> Store:
        store = kind(clock=clock.monotonic, wall=clock.wall)
        if first:
            store.__dict__.update({name: first[0].__dict__[name] for name in ("_lock", "_values", "_expiries")})
        first.append(store)
        return store

    return StoreConformance(make, advance=clock.advance, **options)


@pytest.mark.parametrize(("kind", "words"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_store_is_rejected(kind: type[MemoryStore], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported by what it does wrong, in a sentence of its own."""
    monkeypatch.setattr(conformance, "CHECK_WITHIN", 0.05)

    async def check() -> None:
        over = ReadCannotBeEnded.over = asyncio.Event()
        with pytest.raises(ConformanceError) as caught:
            await kit(kind).run()
        over.set()
        await asyncio.sleep(0.1)
        assert any(words in breach for breach in caught.value.breaches), str(caught.value)
        assert str(caught.value).startswith(f"{kind.__name__} breaks the contract of a store in ")
        assert all(breach in str(caught.value) for breach in caught.value.breaches)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing of it is left"

    run_virtual(check())


class Suspending(MemoryStore):
    """A store as it must be, whose every primitive lets others in before and after it acts."""

    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        await asyncio.sleep(0)
        found = await super().put_if_absent(key, value, ttl_ms)
        await asyncio.sleep(0)
        return found

    async def read(self, key: str) -> Stored | None:
        await asyncio.sleep(0)
        stored = await super().read(key)
        await asyncio.sleep(0)
        return stored

    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        await asyncio.sleep(0)
        swap = await super().swap(key, expected, value, ttl_ms, **how)
        await asyncio.sleep(0)
        return swap

    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        await asyncio.sleep(0)
        removed = await super().remove(key, expected, exact=exact)
        await asyncio.sleep(0)
        return removed


class Untold(Suspending):
    """A store that cannot tell how long a value has left, and is no worse for it."""

    async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        stored = await super().put_or_read(key, value, ttl_ms)
        return None if stored is None else Stored(stored.value, LEFT_UNKNOWN)

    async def read(self, key: str) -> Stored | None:
        stored = await super().read(key)
        return None if stored is None else Stored(stored.value, LEFT_UNKNOWN)

    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return await super().swap(key, expected, value, ttl_ms, **{**how, "left_ms": None})


@pytest.mark.parametrize("kind", [MemoryStore, Suspending, Untold])
@virtual
async def test_a_store_that_keeps_the_contract_passes(kind: type[MemoryStore]) -> None:
    """Nothing is reported, by a second run over the same data neither."""
    checked = kit(kind)
    await checked.run()
    await checked.run()


@pytest.mark.parametrize("at_a_time", [8, 1])
@virtual
async def test_a_slow_store_passes(at_a_time: int) -> None:
    """A store that takes 120 ms for every primitive, one after the other at the worst, is none the worse for it."""
    clock = asyncio.get_running_loop().time
    room = asyncio.Semaphore(at_a_time)

    class Slow(MemoryStore):
        async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
            return await self.slowly(super().put_or_read, key, value, ttl_ms)

        async def read(self, key: str) -> Stored | None:
            return await self.slowly(super().read, key)

        async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
            return await self.slowly(functools.partial(super().swap, **how), key, expected, value, ttl_ms)

        async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
            return await self.slowly(functools.partial(super().remove, exact=exact), key, expected)

        async def slowly(self, primitive: Any, *args: Any) -> Any:
            async with room:
                await asyncio.sleep(0.06)
                answer = await primitive(*args)
                await asyncio.sleep(0.06)
                return answer

    await StoreConformance(lambda: Slow(clock=clock, wall=clock)).run()


@virtual
async def test_time_that_passes_by_itself_is_waited_for() -> None:
    """Without a clock to be advanced the kit waits, here on a loop's virtual time."""
    clock = asyncio.get_running_loop().time
    await StoreConformance(lambda: MemoryStore(clock=clock, wall=clock)).run()
    assert 0 < clock() < 3


@virtual
async def test_the_run_leaves_nothing_behind() -> None:
    """Every key that the kit wrote is removed again, and what others have there is not touched."""
    clock = ManualClock()
    store = MemoryStore(clock=clock.monotonic, wall=clock.wall, prefix="p:")
    await store.put_if_absent("p:mine", b"mine", 600_000)
    written: set[str] = set()

    class Noting(MemoryStore):
        async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
            written.add(key)
            return await super().put_or_read(key, value, ttl_ms)

    def make() -> Store:
        noting = Noting(clock=clock.monotonic, wall=clock.wall, prefix="p:")
        noting._values, noting._expiries, noting._lock = store._values, store._expiries, store._lock
        return noting

    await StoreConformance(make, advance=clock.advance).run()
    assert set(store._values) == {"p:mine"}
    assert len(written) > 100
    assert all(key.startswith("p:conformance:") for key in written)


@virtual
async def test_workers_of_one_backend_race_each_other() -> None:
    """A lock of each store's own is none where two stores share their data: the races run between both."""

    class LockedForItself(PutReadsThenWrites):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.mutex = asyncio.Lock()

        async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
            async with self.mutex:
                return await super().put_if_absent(key, value, ttl_ms)

        async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
            async with self.mutex:
                return await super().swap(key, expected, value, ttl_ms, **how)

    with pytest.raises(ConformanceError, match="put_if_absent is atomic: of 8 calls 2 wrote"):
        await kit(LockedForItself).run()
    clock = ManualClock()
    await StoreConformance(
        lambda: LockedForItself(clock=clock.monotonic, wall=clock.wall), advance=clock.advance
    ).run()  # data of their own: there the lock holds off everybody


@virtual
async def test_the_run_has_an_end() -> None:
    """A store that never answers takes the time that the run may take, and the checks that were not made are counted."""

    class Silent(MemoryStore):
        async def read(self, key: str) -> Stored | None:
            await asyncio.Event().wait()
            return None

    loop = asyncio.get_running_loop()
    with pytest.raises(ConformanceError) as caught:
        await StoreConformance(Silent, timeout=25).run()
    assert any("checks were not made within 25 s" in breach for breach in caught.value.breaches)
    assert loop.time() < 60


@virtual
async def test_a_run_that_is_cancelled_closes_its_stores() -> None:
    """The check that runs is ended, and both stores are closed."""
    closed: list[Store] = []

    class Silent(MemoryStore):
        async def read(self, key: str) -> Stored | None:
            await asyncio.Event().wait()
            return None

        async def aclose(self) -> None:
            await super().aclose()
            closed.append(self)

    task = asyncio.create_task(StoreConformance(Silent).run())
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert len(closed) == 2


async def test_what_interrupts_a_process_goes_through() -> None:
    """It is no breach, and stops the run."""

    class Stop(BaseException):
        pass

    class Stopping(MemoryStore):
        async def swap(self, *args: Any, **options: Any) -> Swap:
            raise Stop

    with pytest.raises(Stop):
        await StoreConformance(Stopping).run()


async def test_make_store_may_be_plain_or_async() -> None:
    """An awaitable of a store is awaited; anything else that is no store is refused by its type."""
    clock = ManualClock()

    async def make() -> Store:
        return MemoryStore(clock=clock.monotonic, wall=clock.wall)

    async def advance(seconds: float) -> None:
        clock.advance(seconds)

    await StoreConformance(make, advance=advance).run()
    with pytest.raises(ConfigurationError, match="make_store must return a Store, not dict"):
        await StoreConformance(dict).run()  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="make_store must be a function"):
        StoreConformance(MemoryStore())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="timeout must be greater than zero"):
        StoreConformance(MemoryStore, timeout=0)


def test_the_verdict_is_an_assertion() -> None:
    """Test runners count it as a failure, and it survives the way between the processes of a parallel run."""
    error = ConformanceError("MyStore", ("swap: wrote",))
    assert isinstance(error, AssertionError)
    assert str(error) == "MyStore breaks the contract of a store in one way:\n  - swap: wrote"
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert (str(copy), copy.breaches, copy.store) == (str(error), error.breaches, "MyStore")


def test_the_kit_needs_no_test_framework() -> None:
    """Its module imports neither a framework nor a client."""
    code = "import asyncidem.testing, sys; print(sorted({'pytest', 'unittest', 'hypothesis', 'redis', 'anyio'} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=50
    )
    assert run.stdout == "[]\n"
