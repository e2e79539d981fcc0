"""MemoryStore: its clock, its size, its threads. What it shares with every store is in the conformance suite."""

import asyncio
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from asyncidem import Claimed, InProgress, MemoryStore, Replay, Store
from asyncidem.model import Stored, Swap


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Return a clock at 1000 s."""
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryStore:
    """Return a store on that clock."""
    return MemoryStore(clock=clock)


async def test_values_live_their_ttl(store: MemoryStore, clock: Clock) -> None:
    """A value is there until its ttl has passed, to the moment, and its time left counts down."""
    await store.put_if_absent("k", b"v", 1500)
    assert await store.read("k") == Stored(b"v", 1500)
    clock.now += 0.5
    assert await store.read("k") == Stored(b"v", 1000)
    assert await store.put_or_read("k", b"w", 9000) == Stored(b"v", 1000)
    clock.now += 0.75
    assert await store.put_if_absent("k", b"w", 9000) == b"v"
    clock.now += 0.25
    assert await store.read("k") is None


async def test_expired_values_are_absent_to_all_primitives(store: MemoryStore, clock: Clock) -> None:
    """An expired value can be put over, is not swapped unless absence is allowed, and is not removed."""
    for key in "abcd":
        await store.put_if_absent(key, b"v", 1000)
    clock.now += 1
    assert await store.swap("a", b"v", b"w", 1000, exact=True, or_absent=False) == Swap(False)
    assert await store.swap("b", b"x", b"w", 1000, exact=True, or_absent=True) == Swap(True)
    assert await store.remove("c", b"v", exact=True) is False
    assert await store.put_or_read("d", b"w", 1000) is None
    assert await store.read("a") is None
    assert await store.read("d") == Stored(b"w", 1000)


async def test_a_swap_starts_the_ttl_anew(store: MemoryStore, clock: Clock) -> None:
    """A swapped value lives its own ttl, longer or shorter than the one it replaced."""
    await store.put_if_absent("k", b"a", 1000)
    await store.swap("k", b"a", b"b", 5000, exact=True, or_absent=False)
    clock.now += 4
    assert await store.read("k") == Stored(b"b", 1000)
    await store.swap("k", b"b", b"c", 500, exact=True, or_absent=False)
    clock.now += 0.5
    assert await store.read("k") is None


@pytest.mark.parametrize(("left_ms", "written"), [(999, False), (1000, True), (1001, True)])
async def test_swap_compares_the_time_left(store: MemoryStore, left_ms: int, written: bool) -> None:
    """A swap is refused if more is left than allowed; equal is allowed."""
    await store.put_if_absent("k", b"a", 1000)
    swap = await store.swap("k", b"a", b"b", 1000, exact=True, or_absent=False, left_ms=left_ms)
    assert swap == (Swap(True) if written else Swap(False, b"a"))


async def test_leases_run_on_the_clock(store: MemoryStore, clock: Clock) -> None:
    """A lease is over when its seconds have passed on the store's clock, not before."""
    assert isinstance(await store.claim("k", lease=30), Claimed)
    clock.now += 29.5
    outcome = await store.claim("k", lease=30)
    assert isinstance(outcome, InProgress)
    assert outcome.retry_after == 0.5
    clock.now += 0.5
    successor = await store.claim("k", lease=30)
    assert isinstance(successor, Claimed)
    assert successor.attempt == 2
    clock.now += 86_400
    fresh = await store.claim("k", lease=30)
    assert isinstance(fresh, Claimed)
    assert fresh.attempt == 1


async def test_expired_values_are_dropped(store: MemoryStore, clock: Clock) -> None:
    """However many keys come and go, no more values are kept than live within two ttls."""
    for n in range(2000):
        await store.put_if_absent(f"k{n}", b"v", 1000)
        clock.now += 0.1
        assert len(store._values) <= 20
        assert len(store._expiries) <= 20


async def test_a_burst_is_dropped_by_half_as_many_writes(store: MemoryStore, clock: Clock) -> None:
    """Each write drops up to two expired values, so that what a burst left behind shrinks."""
    for n in range(100):
        await store.put_if_absent(f"old{n}", b"v", 1000)
    clock.now += 1
    for n in range(50):
        await store.put_if_absent(f"new{n}", b"v", 1000)
    assert set(store._values) == {f"new{n}" for n in range(50)}
    assert len(store._expiries) == 50


async def test_a_renewed_value_outlives_its_first_expiry(store: MemoryStore, clock: Clock) -> None:
    """The expiry that a value had before it was written again does not drop it, and is forgotten itself."""
    await store.put_if_absent("k", b"v", 1000)
    for n in range(500):
        clock.now += 0.5
        assert (await store.swap("k", b"v", b"v", 1000, exact=True, or_absent=False)).written
        await store.put_if_absent(f"other{n}", b"x", 100)
        assert await store.read("k") == Stored(b"v", 1000)
    assert len(store._expiries) < 20
    assert len(store._values) < 20


async def test_removed_values_leave_nothing(store: MemoryStore, clock: Clock) -> None:
    """A removed key's expiry is dropped in time, and does not harm a value that was put there since."""
    await store.put_if_absent("k", b"v", 1000)
    assert await store.remove("k", b"v", exact=True) is True
    clock.now += 0.5
    await store.put_if_absent("k", b"w", 1000)
    clock.now += 0.5
    await store.put_if_absent("x", b"x", 1000)
    assert await store.read("k") == Stored(b"w", 500)
    assert len(store._expiries) == 2


@pytest.mark.parametrize("method", ["put_if_absent", "put_or_read"])
def test_one_of_the_racing_threads_puts(method: str) -> None:
    """Of eight threads that put at the same moment, each on a loop of its own, exactly one writes, every time."""
    threads, rounds = 8, 60
    store = MemoryStore()
    barrier = threading.Barrier(threads, timeout=20)

    def race(name: int) -> list[int]:
        won = []
        with asyncio.Runner() as runner:
            for n in range(rounds):
                barrier.wait()
                reply = runner.run(getattr(store, method)(f"k{n}", b"%d" % name, 60_000))
                if reply is None:
                    won.append(n)
        return won

    with ThreadPoolExecutor(threads) as pool:
        wins = list(pool.map(race, range(threads)))
    assert sorted(itertools.chain.from_iterable(wins)) == list(range(rounds))


class Interrupted(dict[str, tuple[bytes, float]]):
    """Values that let other threads in whenever one looks: a store without a lock would not survive it."""

    def __init__(self, meeting: threading.Barrier) -> None:
        super().__init__()
        self.meeting = meeting

    def get(self, key: str, default: object = None) -> tuple[bytes, float] | None:  # type: ignore[override]
        found = super().get(key)
        try:
            self.meeting.wait(0.05)  # both threads have looked, and neither has written: or the lock keeps one out
        except threading.BrokenBarrierError:
            self.meeting.reset()
        return found


@pytest.mark.parametrize("primitive", ["put_if_absent", "swap", "remove"])
def test_no_thread_comes_between_look_and_write(primitive: str) -> None:
    """Between a primitive's look and its write no other thread gets in: of two that meet there, one succeeds."""
    store = MemoryStore()
    values = Interrupted(threading.Barrier(2))
    if primitive != "put_if_absent":
        values["k"] = (b"old", store.clock() + 60)
    store._values = values

    def race(name: bytes) -> bool:
        async def act() -> bool:
            if primitive == "put_if_absent":
                return await store.put_if_absent("k", name, 60_000) is None
            if primitive == "swap":
                return (await store.swap("k", b"old", name, 60_000, exact=True, or_absent=False)).written
            return await store.remove("k", b"old", exact=True)

        return asyncio.run(act())

    with ThreadPoolExecutor(2) as pool:
        won = list(pool.map(race, [b"a", b"b"]))
    assert sorted(won) == [False, True]


def test_a_result_is_seen_by_the_next_loop() -> None:
    """Records outlive the event loop that wrote them."""
    store = MemoryStore()

    async def write() -> None:
        claim = await store.claim("k")
        assert isinstance(claim, Claimed)
        await store.complete(claim, "1")

    asyncio.run(write())
    assert isinstance(asyncio.run(store.claim("k")), Replay)


class Slow(MemoryStore):
    """A store whose first put takes `late` seconds to be answered, during which `meanwhile` may happen."""

    def __init__(self, clock: Clock, late: float) -> None:
        super().__init__(clock=clock)
        self.late, self.swaps, self.clock_of = late, 0, clock
        self.meanwhile: Store | None = None

    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        reply = await super().put_if_absent(key, value, ttl_ms)
        late, self.late = self.late, 0
        self.clock_of.now += late
        if late and self.meanwhile is not None:
            assert isinstance(await self.meanwhile.claim("k", lease=30), Claimed)
        return reply

    async def swap(self, *args: object, **options: object) -> Swap:
        self.swaps += 1
        return await super().swap(*args, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("late", "renewals"), [(0.0, 0), (9.5, 0), (10.0, 1), (31.0, 1)])
async def test_a_claim_that_was_answered_late_is_renewed(clock: Clock, late: float, renewals: int) -> None:
    """A claim of whose lease a third has passed is renewed before it is handed out, and only then."""
    store = Slow(clock, late)
    claim = await store.claim("k", lease=30)
    assert isinstance(claim, Claimed)
    assert (claim.attempt, store.swaps) == (1, renewals)
    stored = await store.read("k")
    assert stored is not None
    assert stored.left_ms == 86_400_000 - (0 if renewals else round(late * 1000))


async def test_a_claim_that_was_answered_too_late_is_claimed_again(clock: Clock) -> None:
    """A claim whose lease was over when its reply came, and was taken over, is not handed out."""
    store, other = Slow(clock, 31.0), MemoryStore(clock=clock)
    other._values, other._lock, other._expiries = store._values, store._lock, store._expiries
    store.meanwhile = other
    outcome = await store.claim("k", lease=30)
    assert isinstance(outcome, InProgress)
    assert outcome.retry_after == 30
    record = await store.get("k")
    assert record is not None
    assert record.attempt == 2
