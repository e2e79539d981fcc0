"""Completed results that are kept in process: no command for a replay, never past their ttl."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncidem import Claimed, Event, FingerprintMismatchError, Idempotency, Record, ResultUnavailableError, State
from asyncidem.cache import Cache

from faulty import FaultyStore, down, virtual


class Counted:
    """A handler that counts."""

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self) -> int:
        self.count += 1
        return self.count


async def costs(idem: Idempotency, key: str, handler: Any) -> tuple[Any, int]:
    """Return a call's result, and the store calls that it cost."""
    store = idem.store
    assert isinstance(store, FaultyStore)
    before = len(store.calls)
    result = await idem.run(key, handler)
    return result, len(store.calls) - before


@virtual
async def test_a_replay_from_the_cache_costs_no_store_call() -> None:
    """What completed here is replayed without the store, through every form, and the event says from where."""
    events: list[Event] = []
    idem, handler = Idempotency(FaultyStore.here(), local_cache=10, hooks=[events.append]), Counted()
    assert await costs(idem, "k", handler) == (1, 2)
    assert await costs(idem, "k", handler) == (1, 0)
    async with idem.operation("k") as op:
        assert (op.replayed, op.result, op.attempt) == (True, 1, 1)
    assert [(event.name, event.source) for event in events[2:]] == [("replayed", "local_cache")] * 2
    idem_without = Idempotency(idem.store)
    assert await costs(idem_without, "k", handler) == (1, 1)
    assert await costs(idem_without, "k", handler) == (1, 1)


@virtual
async def test_a_replay_from_the_store_is_kept() -> None:
    """What completed elsewhere is kept after its first replay, in one round trip and for the rest of its ttl."""
    store, handler = FaultyStore.here(), Counted()
    await Idempotency(store, ttl=100).run("k", handler)
    await asyncio.sleep(60)
    idem = Idempotency(store, ttl=1000, local_cache=10)
    assert await costs(idem, "k", handler) == (1, 1)
    await asyncio.sleep(39.5)
    assert await costs(idem, "k", handler) == (1, 0)
    await asyncio.sleep(0.5)
    assert await costs(idem, "k", handler) == (2, 2)


@virtual
async def test_what_a_waiter_learnt_is_kept() -> None:
    """A result that came by waiting, from a process elsewhere or a task here, is replayed without the store."""
    store, handler = FaultyStore.here(), Counted()
    idem = Idempotency(store, local_cache=10, wait=100)
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    waiters = [asyncio.create_task(idem.run("k", handler)) for _ in range(3)]
    await asyncio.sleep(1)
    await store.complete(claim, '"theirs"', ttl=50)
    assert await asyncio.gather(*waiters) == ["theirs"] * 3
    assert await costs(idem, "k", handler) == ("theirs", 0)
    await asyncio.sleep(50)
    assert (await costs(idem, "k", handler))[0] == 1


@virtual
async def test_the_least_recently_used_goes_first() -> None:
    """A full cache drops the result that was not used for longest; a replay is a use."""
    idem, handler = Idempotency(FaultyStore.here(), local_cache=2), Counted()
    for key in ("a", "b"):
        await idem.run(key, handler)
    assert await costs(idem, "a", handler) == (1, 0)
    await idem.run("c", handler)
    assert await costs(idem, "a", handler) == (1, 0)
    assert await costs(idem, "c", handler) == (3, 0)
    assert await costs(idem, "b", handler) == (2, 1)


@pytest.mark.parametrize("ttl", [0.1, 1, 100])
@virtual
async def test_nothing_is_replayed_past_its_ttl(ttl: float) -> None:
    """When the record is over, and not before, the store is asked again; no record lives for less than a second."""
    idem, handler = Idempotency(FaultyStore.here(), ttl=ttl, local_cache=10), Counted()
    lives = max(1, ttl)
    await idem.run("k", handler)
    await asyncio.sleep(lives - 0.01)
    assert await costs(idem, "k", handler) == (1, 0)
    await asyncio.sleep(0.01)
    assert await costs(idem, "k", handler) == (2, 2)


@pytest.mark.parametrize("source", ["completion", "replay", "waiting"])
@virtual
async def test_a_late_reply_does_not_prolong_a_result(source: str) -> None:
    """The ttl counts from when the store was asked, for the record may have been written, or read, right then."""
    store, handler = FaultyStore.here(), Counted()
    idem = Idempotency(store, ttl=100, local_cache=10, lease=30)
    slow = 5.0
    if source == "completion":
        store.fault("swap", after=slow)
    elif source == "replay":
        await Idempotency(store, ttl=100).run("k", handler)
        store.fault("put_if_absent", after=slow)
    else:
        claim = await store.claim("k")
        assert isinstance(claim, Claimed)
        waiter = asyncio.create_task(idem.run("k", handler, wait=50))
        await asyncio.sleep(1)
        store.fault("read", after=slow)
        await store.complete(claim, "1", ttl=100)
        handler.count += 1
        await waiter
    if source != "waiting":
        await idem.run("k", handler)
    await asyncio.sleep(100 - slow)
    assert await store.get("k") is None
    assert await costs(idem, "k", handler) == (2, 2)


@virtual
async def test_another_payload_is_a_mismatch_from_the_cache() -> None:
    """The cache judges the payload as the store does, without a store call."""
    idem, handler = Idempotency(FaultyStore.here(), local_cache=10), Counted()
    await idem.run("k", handler, payload=1)
    calls = len(idem.store.calls) if isinstance(idem.store, FaultyStore) else 0
    with pytest.raises(FingerprintMismatchError):
        await idem.run("k", handler, payload=2)
    assert await idem.run("k", handler, payload=1) == 1
    assert await idem.run("k", handler) == 1
    assert isinstance(idem.store, FaultyStore)
    assert len(idem.store.calls) == calls


@virtual
async def test_a_deleted_record_is_not_seen() -> None:
    """A record that was deleted meanwhile goes on being replayed here, and not elsewhere: that is the cache's price."""
    idem, handler = Idempotency(FaultyStore.here(), local_cache=10), Counted()
    await idem.run("k", handler)
    await idem.store.delete("k")
    assert await costs(idem, "k", handler) == (1, 0)
    assert await Idempotency(idem.store).run("k", handler) == 2
    assert await costs(idem, "k", handler) == (1, 0)


@virtual
async def test_outcomes_without_a_result_are_kept_too() -> None:
    """Exceptions that are results, and completions without one, come from the cache as from the store."""
    idem = Idempotency(FaultyStore.here(), local_cache=10, replay_exceptions=KeyError)

    async def fail() -> None:
        raise KeyError("missing")

    async def unknown() -> object:
        return object()

    with pytest.raises(KeyError):
        await idem.run("failed", fail)
    with pytest.raises(Exception, match="not come back"):
        await idem.run("unavailable", unknown)
    assert isinstance(idem.store, FaultyStore)
    calls = len(idem.store.calls)
    with pytest.raises(KeyError) as caught:
        await idem.run("failed", fail)
    assert caught.value.args == ("missing",)
    with pytest.raises(ResultUnavailableError):
        await idem.run("unavailable", unknown)
    assert len(idem.store.calls) == calls


@virtual
async def test_what_was_not_acknowledged_is_not_kept() -> None:
    """A completion whose reply was lost, a failure and a replay of an expiring peer's leave nothing in the cache."""
    store, handler = FaultyStore.here(), Counted()
    idem = Idempotency(store, local_cache=10, on_completion_error="return")
    store.fault("swap", before=down())
    await idem.run("k", handler)
    await asyncio.sleep(1)
    assert await costs(idem, "k", handler) == (1, 1)
    assert await costs(idem, "k", handler) == (1, 0)


@virtual
async def test_caches_are_not_shared() -> None:
    """Each `Idempotency` keeps its own, and its namespace is part of the key."""
    store, handler = FaultyStore.here(), Counted()
    one, other = (Idempotency(store, namespace=name, local_cache=10) for name in ("one", "other"))
    assert [await one.run("k", handler), await other.run("k", handler), await one.run("k", handler)] == [1, 2, 1]


def record(key: str, expires_in: float | None) -> Record:
    """Return a completed record."""
    return Record(key, State.COMPLETED, "0" * 32, 1, "1", None, None, expires_in)


def test_a_record_that_does_not_say_how_long_it_lives_is_not_kept() -> None:
    """Without a time left nothing is known of its end."""
    cache = Cache(2, lambda: 0.0)
    cache.put(record("k", None))
    assert cache.get("k") is None


@given(
    size=st.integers(1, 4),
    steps=st.lists(
        st.tuples(st.sampled_from("pgw"), st.sampled_from("abcdef"), st.floats(0.5, 5, allow_nan=False)), max_size=60
    ),
)
def test_the_cache_is_its_model(size: int, steps: list[tuple[str, str, float]]) -> None:
    """For any order of puts, gets and passing time it holds the most recently used, and none past its end."""
    now = 0.0
    cache = Cache(size, lambda: now)
    model: dict[str, float] = {}  # in the order of use
    for step, key, seconds in steps:
        if step == "w":
            now += seconds
        elif step == "p":
            cache.put(record(key, seconds))
            model.pop(key, None)
            model[key] = now + seconds
            if len(model) > size:
                del model[next(iter(model))]
        else:
            found = cache.get(key)
            end = model.pop(key, None)
            lives = end is not None and end > now
            assert (found is not None) is lives
            if end is not None and lives:
                model[key] = end


@virtual
async def test_every_replay_has_a_value_of_its_own() -> None:
    """Who changes what the cache gave changes nobody else's result."""
    idem = Idempotency(FaultyStore.here(), local_cache=10)

    @idem.idempotent(key="key")
    async def rows(key: str) -> list[dict[str, int]]:
        return [{"n": len(key)}]

    async def other() -> list[int]:
        return [1]

    await rows("k")
    await idem.run("k", other)
    for _ in range(3):
        given, called = await rows("k"), await idem.run("k", other)
        assert (given, called) == ([{"n": 1}], [1])
        given[0]["n"] = 2
        called.append(2)


@virtual
async def test_a_replay_from_the_cache_may_be_inside_of_another_operation() -> None:
    """Only its own operation is refused inside itself."""
    idem, handler = Idempotency(FaultyStore.here(), local_cache=10), Counted()
    await idem.run("inner", handler)

    async def outer() -> Any:
        return await idem.run("inner", handler)

    assert await idem.run("outer", outer) == 1
    assert handler.count == 1
