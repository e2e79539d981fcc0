"""What the package offers for users' tests: another store under their functions, a clock, and faults."""

import asyncio
import itertools
from datetime import timedelta
from typing import Any

import pytest

from asyncidem import (
    Claimed,
    ConfigurationError,
    Event,
    Idempotency,
    InProgress,
    LeaseLostError,
    MemoryStore,
    Replay,
    State,
    Store,
    StoreError,
    StoreUnavailableError,
)
from asyncidem.testing import FaultyStore, ManualClock, use_store

from faulty import settle, virtual


class Shop:
    """An application: its object, its decorated function, and how often that ran."""

    def __init__(self, **options: Any) -> None:
        self.store = MemoryStore()
        self.idem = Idempotency(self.store, namespace="shop", **options)
        self.charges = 0

        @self.idem.idempotent(key="order", name="charge")
        async def charge(order: str) -> int:
            self.charges += 1
            return self.charges

        self.charge = charge


# -- use_store


async def test_decorated_functions_use_the_store_of_the_block() -> None:
    """A function that was decorated before runs against the other store, and against its own again after the block."""
    shop = Shop()
    assert await shop.charge("1") == 1
    with use_store(shop.idem, MemoryStore()) as store:
        assert shop.idem.store is store
        assert [await shop.charge("1"), await shop.charge("1")] == [2, 2]
        record = await store.get(shop.idem.key_for(shop.charge, "1"))
        assert record is not None
        assert record.data == "2"
    assert shop.idem.store is shop.store
    assert await shop.charge("1") == 1


async def test_every_form_of_call_uses_the_store_of_the_block() -> None:
    """`run`, `operation` and functions that are decorated meanwhile keep their records there, with the same options."""
    told: list[Event] = []
    shop = Shop(hooks=[told.append])
    with use_store(shop.idem, MemoryStore()) as store:

        @shop.idem.idempotent(key="order")
        async def refund(order: str) -> str:
            return "refunded"

        async with shop.idem.operation("a") as op:
            op.set_result(1)
        await shop.idem.run("b", asyncio.sleep, 0)
        await refund("1")
        keys = set(store._values)
    assert len(keys) == 3
    assert all("shop" in key for key in keys), "the namespace is the application's"
    assert len(told) == 6, "and its hooks are told"
    assert shop.store._values == {}
    assert await refund("1") == "refunded"
    assert len(shop.store._values) == 1


async def test_the_local_cache_is_the_blocks_own() -> None:
    """What is cached of one store is not replayed from the other, and is still there afterwards."""
    shop = Shop(local_cache=5)
    assert await shop.charge("1") == 1
    with use_store(shop.idem, FaultyStore(MemoryStore())) as store:
        assert [await shop.charge("1"), await shop.charge("1")] == [2, 2]
        assert len(store.calls) == 2, "the replay came from a cache"
    shop.store._values.clear()
    assert await shop.charge("1") == 1


async def test_the_old_store_comes_back_from_an_error_and_from_nested_blocks() -> None:
    """Each block gives back what it found, whatever ends it."""
    shop = Shop()
    outer, inner = MemoryStore(), MemoryStore()
    with pytest.raises(KeyError), use_store(shop.idem, outer):
        with pytest.raises(ZeroDivisionError), use_store(shop.idem, inner):
            assert shop.idem.store is inner
            raise ZeroDivisionError
        assert shop.idem.store is outer
        raise KeyError
    assert shop.idem.store is shop.store


async def test_an_operation_ends_in_the_store_that_it_was_begun_in() -> None:
    """What runs when a block begins or ends completes where its claim is."""
    shop = Shop()
    async with shop.idem.operation("early") as op:
        with use_store(shop.idem, MemoryStore()) as store:
            late = shop.idem.operation("late")
            await late.__aenter__()
            op.set_result("early")
    late.set_result("late")
    await late.__aexit__(None, None, None)
    for where, name in ((shop.store, "early"), (store, "late")):
        (key,) = where._values
        record = await where.get(key)
        assert record is not None
        assert (record.state, record.data) == (State.COMPLETED, f'"{name}"')


@pytest.mark.parametrize("ends", list(itertools.permutations(range(3))))
def test_blocks_end_in_any_order(ends: tuple[int, ...]) -> None:
    """Of the blocks that go on the one that was begun last counts, and after all of them the application's own store."""
    shop = Shop()
    stores = [MemoryStore() for _ in range(3)]
    blocks = [use_store(shop.idem, store) for store in stores]
    for block in blocks:
        block.__enter__()
    going_on = set(range(3))
    for end in ends:
        blocks[end].__exit__(None, None, None)
        going_on.remove(end)
        assert shop.idem.store is (stores[max(going_on)] if going_on else shop.store)
    with use_store(shop.idem, stores[0]):
        assert shop.idem.store is stores[0]
    assert shop.idem.store is shop.store


def test_blocks_of_several_applications_know_nothing_of_each_other() -> None:
    """Each `Idempotency` has its own."""
    one, other = Shop(), Shop()
    first, second = use_store(one.idem, MemoryStore()), use_store(other.idem, MemoryStore())
    first.__enter__()
    with second:
        first.__exit__(None, None, None)
        assert one.idem.store is one.store
        assert other.idem.store is not other.store
    assert other.idem.store is other.store


async def test_a_block_that_ends_first_keeps_the_error_of_its_body() -> None:
    """A test that fails in a block around which another one goes on fails with its own error."""
    shop = Shop()
    later, over = asyncio.Event(), asyncio.Event()

    async def failing() -> None:
        with use_store(shop.idem, MemoryStore()):
            await later.wait()
            raise ZeroDivisionError

    async def outlasting() -> None:
        with use_store(shop.idem, MemoryStore()) as store:
            later.set()
            await over.wait()
            assert shop.idem.store is store

    failed, outlasts = asyncio.create_task(failing()), asyncio.create_task(outlasting())
    with pytest.raises(ZeroDivisionError):
        await failed
    over.set()
    await outlasts
    assert shop.idem.store is shop.store


@pytest.mark.parametrize(
    ("idem", "store", "words"),
    [
        (MemoryStore(), MemoryStore(), "idem must be an Idempotency, not MemoryStore"),
        (Idempotency(MemoryStore()), {}, "store must be a Store such as MemoryStore.., not dict"),
        (Idempotency(MemoryStore()), MemoryStore, "store must be a Store such as MemoryStore.., not "),
    ],
)
def test_use_store_refuses_what_cannot_work(idem: Any, store: Any, words: str) -> None:
    """Both are checked before anything is changed."""
    with pytest.raises(ConfigurationError, match=words), use_store(idem, store):
        pytest.fail("the block was entered")


# -- ManualClock


async def test_a_lease_and_a_ttl_end_when_the_clock_says_so() -> None:
    """A store on a manual clock takes over and forgets without any waiting."""
    clock = ManualClock()
    store = MemoryStore(clock=clock.monotonic, wall=clock.wall)
    first = await store.claim("k", lease=30, ttl=60)
    clock.advance(29.9)
    assert isinstance(await store.claim("k", lease=30, ttl=60), InProgress)
    clock.advance(0.1)
    second = await store.claim("k", lease=timedelta(seconds=30), ttl=60)
    assert isinstance(first, Claimed)
    assert isinstance(second, Claimed)
    assert second.attempt == 2
    with pytest.raises(LeaseLostError):
        await store.complete(first, "1")
    await store.complete(second, "2", ttl=60)
    clock.advance(timedelta(seconds=59))
    assert isinstance(await store.claim("k"), Replay)
    clock.advance(1)
    assert await store.get("k") is None


def test_both_clocks_advance_and_only_one_can_be_set() -> None:
    """Time that passes moves both; an operator who sets the wall clock moves no monotonic one."""
    clock = ManualClock()
    monotonic, wall = clock.monotonic(), clock.wall()
    assert (monotonic, wall) == (clock.monotonic(), clock.wall()), "it stands still"
    for _ in range(10):
        clock.advance(0.1)
    assert (clock.monotonic() - monotonic, clock.wall() - wall) == (1, 1), "exactly: it counts milliseconds"
    clock.set_wall(wall - 3600)
    assert (clock.monotonic() - monotonic, clock.wall() - wall) == (1, -3600)
    clock.advance(1)
    assert (clock.monotonic() - monotonic, clock.wall() - wall) == (2, -3599)


async def test_a_wall_clock_that_jumps_frees_no_lease() -> None:
    """A store's decisions are about time that has passed, whatever the wall says."""
    clock = ManualClock()
    store = MemoryStore(clock=clock.monotonic, wall=clock.wall)
    assert isinstance(await store.claim("k", lease=30), Claimed)
    clock.set_wall(clock.wall() + 86_400)
    assert isinstance(await store.claim("k", lease=30), InProgress)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), True, "1", None])
def test_time_does_not_go_back(seconds: Any) -> None:
    """Only durations are taken."""
    with pytest.raises(ConfigurationError, match="seconds must be"):
        ManualClock().advance(seconds)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), True, "1", None, 1 << 40])
def test_the_wall_is_set_to_unix_time(seconds: Any) -> None:
    """Anything else is refused."""
    clock = ManualClock()
    with pytest.raises(ConfigurationError, match="seconds must be unix time such as 1700000000, not"):
        clock.set_wall(seconds)
    assert clock.wall() == 1_700_000_000


# -- FaultyStore


async def held(store: Store) -> Claimed:
    """Return a claim that must be given."""
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    return claim


def down() -> StoreUnavailableError:
    """Return what a store raises that does not answer."""
    return StoreUnavailableError("down")


async def test_without_faults_it_is_the_store() -> None:
    """It keeps prefix, names, time-out and clocks of the store that it stands before, and its records are there."""
    clock = ManualClock()
    inner = MemoryStore(
        prefix="p:",
        timeout=3,
        status_attr="st",
        expiry_attr="ex",
        in_progress_expiry_attr="ip",
        data_attr="da",
        validation_key_attr="va",
        clock=clock.monotonic,
        wall=clock.wall,
    )
    store = FaultyStore(inner)
    claim = await store.claim("k", lease=30, fingerprint="f")
    assert isinstance(claim, Claimed)
    stored = await inner.read("p:k")
    assert stored is not None
    assert b'"st": "INPROGRESS", "ex": 1700086400, "ip": 1700000030000, "va": "f"' in stored.value
    clock.advance(31)
    assert isinstance(await inner.claim("k"), Claimed), "the same clock, the same key, the same names"
    assert (store.timeout, store.prefix) == (3, "p:")
    with pytest.raises(ConfigurationError, match=r"store must be a Store such as MemoryStore\(\), not dict"):
        FaultyStore({})  # type: ignore[arg-type]


@virtual
async def test_a_failure_before_a_primitive_writes_nothing() -> None:
    """Its caller gets the exception, as often as was said, and then the store again."""
    store = FaultyStore(MemoryStore())
    store.fault("put_if_absent", before=StoreError("refused"), times=2)
    for _ in range(2):
        with pytest.raises(StoreError, match="refused"):
            await store.claim("k")
    assert await store.store.read("k") is None
    await held(store)
    assert store.counts == {"put_if_absent": 3}


@virtual
async def test_a_lost_reply_has_written() -> None:
    """The completion is there, its caller does not know, and its repetition in the background finds it."""
    store = FaultyStore(MemoryStore())
    claim = await held(store)
    store.fault("swap", after=down())
    with pytest.raises(StoreUnavailableError):
        await store.complete(claim, "1")
    assert isinstance(await store.claim("k"), Replay)
    await asyncio.sleep(1)
    assert store.counts["swap"] == 2


@virtual
async def test_a_delay_passes_before_or_after() -> None:
    """Before it the record is not there yet; after it, it is, and its caller waits."""
    loop = asyncio.get_running_loop()
    for step, there in (("before", False), ("after", True)):
        store = FaultyStore(MemoryStore())
        fault = store.fault("put_if_absent", **{step: 2.0})  # type: ignore[arg-type]
        began = loop.time()
        put = asyncio.create_task(store.put_if_absent("k", b"x", 60_000))
        await fault.reached.wait()
        await asyncio.sleep(1)
        assert (await store.store.read("k") is not None) is there
        assert await put is None
        assert loop.time() - began == 2


@virtual
async def test_a_function_is_called_and_awaited() -> None:
    """A plain one and a coroutine function let somebody in between; an event holds the call there."""
    store = FaultyStore(MemoryStore())
    seen: list[str] = []

    async def come_between() -> None:
        await store.store.put_if_absent("k", b"theirs", 60_000)

    store.fault("put_if_absent", before=come_between, after=lambda: seen.append("after"))
    assert await store.put_if_absent("k", b"mine", 60_000) == b"theirs"
    assert seen == ["after"]
    gate = asyncio.Event()
    fault = store.fault("read", before=gate.wait)
    read = asyncio.create_task(store.read("k"))
    await fault.reached.wait()
    await settle()
    assert not read.done()
    gate.set()
    stored = await read
    assert stored is not None
    assert stored.value == b"theirs"


@virtual
async def test_a_class_of_exceptions_is_raised() -> None:
    """A step that names a class is raised like one that is an exception, and not called."""
    store = FaultyStore(MemoryStore())
    store.fault("put_if_absent", before=TimeoutError)
    with pytest.raises(StoreUnavailableError, match="TimeoutError"):
        await store.claim("k")


async def test_faults_choose_their_calls() -> None:
    """By primitive, by key and value, after some that go well, for so many, the first that was added first."""
    store = FaultyStore(MemoryStore())
    seen: list[str] = []
    store.fault("read", before=lambda: seen.append("second read"), skip=1)
    every = store.fault(before=lambda: seen.append("any"), times=None)
    store.fault("remove", before=lambda: seen.append("never: another one comes first"))
    chosen = store.fault("swap", before=down(), when=lambda key, value: key == "b" and value == b"new")
    store.faults.insert(0, chosen)
    await store.read("a")
    await store.read("a")
    await store.read("a")
    await store.remove("a", b"", exact=False)
    assert seen == ["any", "second read", "any", "any"]
    store.faults.remove(every)
    for key, value in (("a", b"new"), ("b", b"old")):
        await store.swap(key, b"", value, 1000, exact=False, or_absent=True)
    with pytest.raises(StoreUnavailableError):
        await store.swap("b", b"", b"new", 1000, exact=False, or_absent=True)
    assert chosen.times == 0
    with pytest.raises(ConfigurationError, match=r"primitive must be one of .*'swap', 'remove'.*, not 'delete'"):
        store.fault("delete")  # type: ignore[arg-type]


@virtual
async def test_calls_are_noted() -> None:
    """Each one with its primitive, its stored key and the loop's time, whatever becomes of it."""
    store = FaultyStore(MemoryStore(prefix="p:"))
    claim = await held(store)
    await asyncio.sleep(2)
    store.fault("remove", after=down())
    with pytest.raises(StoreUnavailableError):
        await store.release(claim)
    assert [tuple(call) for call in store.calls] == [("put_if_absent", "p:k", 0.0), ("remove", "p:k", 2.0)]
    assert await store.put_or_read("p:k", b"x", 1000) is None
    assert store.counts == {"put_if_absent": 2, "remove": 1}
    await asyncio.sleep(1)


@virtual
async def test_turns_let_others_in() -> None:
    """A store in memory never suspends; with turns every primitive does, before it acts and before its reply."""

    async def turns_of(store: Store) -> int:
        turns = 0
        read = asyncio.create_task(store.read("k"))
        while not read.done():
            await asyncio.sleep(0)
            turns += 1
        return turns

    alone = await turns_of(FaultyStore(MemoryStore()))
    assert await turns_of(FaultyStore(MemoryStore(), turns=3)) == alone + 6


async def test_it_closes_the_store_behind_it() -> None:
    """Closing it closes both."""
    closed: list[Store] = []

    class Closing(MemoryStore):
        async def aclose(self) -> None:
            await super().aclose()
            closed.append(self)

    async with FaultyStore(Closing()) as store:
        pass
    assert closed == [store.store]


def test_it_guards_writes_as_the_store_behind_it_does() -> None:
    """Whether locks keep others from writing may show only at the first command: it is asked each time."""
    store = FaultyStore(MemoryStore())
    assert store.lock_blocks_writes is False
    store.store.lock_blocks_writes = True
    assert store.lock_blocks_writes is True


@virtual
async def test_users_see_how_their_function_meets_a_store_that_is_down() -> None:
    """The two together: an application's function runs against a store that does not answer, and nothing runs."""
    shop = Shop()
    with use_store(shop.idem, FaultyStore(MemoryStore())) as store:
        store.fault("put_if_absent", before=down())
        with pytest.raises(StoreUnavailableError):
            await shop.charge("1")
        assert shop.charges == 0
        await asyncio.sleep(1)
        assert await shop.charge("1") == 1
