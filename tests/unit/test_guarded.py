"""The primitives over a client that offers only `get`, `set` and `delete`: each write holds the key's lock."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import exceptions

from asyncidem import Claimed, InProgress, LeaseLostError, RedisStore, Replay, StoreError, StoreUnavailableError
from asyncidem.model import LEFT_UNKNOWN, Stored, Swap
from asyncidem.stores.primitives import Within

from loops import cancel_at_await, run_virtual

OURS, THEIRS = "a" * 32, "b" * 32


def record(owner: str, number: int = 1) -> bytes:
    """What a record in progress of this owner looks like, as far as anyone here looks."""
    return f'{{"owner": "{owner}", "status": "INPROGRESS", "n": {number}}}'.encode()


class Plain:
    """A client of the user's, with faults at will: `fault(method, name)` is called before and after each command."""

    def __init__(self, **values: bytes) -> None:
        self.data = {name.replace("_", ":"): value for name, value in values.items()}
        self.left: dict[str, int] = {}
        self.log: list[tuple[str, str]] = []
        self.before: Callable[[str, str], object] = lambda *_: None
        self.after: Callable[[str, str], object] = lambda *_: None
        self.turns: Callable[[], int] = lambda: 1

    async def _do(self, method: str, name: str, act: Callable[[], Any]) -> Any:
        self.log.append((method, name))
        self.before(method, name)
        for _ in range(self.turns()):
            await asyncio.sleep(0)
        reply = act()
        for _ in range(self.turns()):
            await asyncio.sleep(0)
        self.after(method, name)
        return reply

    async def get(self, name: str) -> bytes | None:
        value: bytes | None = await self._do("get", name, lambda: self.data.get(name))
        return value

    async def set(self, name: str, value: bytes, *, px: int, nx: bool) -> object:
        def act() -> bool:
            if nx and name in self.data:
                return False
            self.data[name], self.left[name] = value, px
            return True

        return await self._do("set", name, act)

    async def delete(self, name: str) -> object:
        return await self._do("delete", name, lambda: self.data.pop(name, None))


class Aged(Plain):
    """A client that also tells how long a key has left."""

    async def pttl(self, name: str) -> int:
        left: int = await self._do("pttl", name, lambda: self.left.get(name, -1) if name in self.data else -2)
        return left


def store_of(client: Plain, **options: Any) -> RedisStore:
    """A store over the client that adds nothing to its keys."""
    return RedisStore(client, prefix="", **options)


@pytest.fixture
async def tasks() -> AsyncIterator[None]:
    """No task is left behind."""
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() <= before | {asyncio.current_task()}


Call = Callable[[RedisStore], Coroutine[Any, Any, Any]]


async def within(call: Call, store: RedisStore) -> Any:
    """Call the primitive as the lifecycle does, with a deadline."""
    with Within(store.timeout):
        return await call(store)


PUT: Call = lambda store: store.put_if_absent("k", record(OURS, 2), 1000)
SWAP: Call = lambda store: store.swap("k", record(OURS), record(OURS, 2), 1000, exact=True, or_absent=False)
SWAP_ABSENT: Call = lambda store: store.swap("k", record(OURS), record(OURS, 2), 1000, exact=False, or_absent=True)
REMOVE: Call = lambda store: store.remove("k", record(OURS), exact=True)

WRITES: dict[str, tuple[Call, dict[str, bytes], bytes | None]] = {
    "put": (PUT, {}, record(OURS, 2)),
    "swap": (SWAP, {"k": record(OURS)}, record(OURS, 2)),
    "swap absent": (SWAP_ABSENT, {}, record(OURS, 2)),
    "remove": (REMOVE, {"k": record(OURS)}, None),
}
"""Each write, what is there before it, and after it."""

EACH_WRITE = pytest.mark.parametrize(("call", "before", "after"), WRITES.values(), ids=list(WRITES))


@EACH_WRITE
async def test_write_holds_the_lock(call: Call, before: dict[str, bytes], after: bytes | None) -> None:
    """A write happens while the key's lock is held in the name of the record's owner, and drops it."""
    client = Plain(**before)
    held: list[bytes | None] = []

    def look(method: str, name: str) -> None:
        if method in ("set", "delete") and name == "k":
            held.append(client.data.get("k:lock"))

    client.before = look
    await call(store_of(client))
    assert held == [OURS.encode()]
    assert client.data == ({} if after is None else {"k": after})
    assert client.left["k:lock"] == 10_000


@EACH_WRITE
def test_write_waits_for_the_lock(call: Call, before: dict[str, bytes], after: bytes | None) -> None:
    """A write waits while another holds the key's lock, and happens when it is gone."""
    client = Plain(k_lock=THEIRS.encode(), **before)

    async def main() -> None:
        task = asyncio.get_running_loop().create_task(within(call, store_of(client)))
        await asyncio.sleep(0.5)
        assert not task.done()
        assert client.data.get("k") == before.get("k")
        del client.data["k:lock"]
        await task
        assert client.data == ({} if after is None else {"k": after})

    run_virtual(main())


@EACH_WRITE
async def test_lock_that_stays_taken(call: Call, before: dict[str, bytes], after: bytes | None) -> None:
    """A write that does not get the lock within the time of its call has written nothing, and says so."""
    client = Plain(k_lock=THEIRS.encode(), **before)
    store = store_of(client, timeout=0.05)
    with pytest.raises(StoreUnavailableError) as raised:
        await within(call, store)
    assert not raised.value.outcome_unknown
    assert client.data == {"k:lock": THEIRS.encode(), **before}


async def test_claim_whose_lock_stays_taken() -> None:
    """A claim that does not get the lock leaves nothing to undo."""
    client = Plain(k_lock=THEIRS.encode())
    store = store_of(client, timeout=0.05)
    with pytest.raises(StoreUnavailableError) as raised:
        await store.claim("k")
    assert not raised.value.outcome_unknown
    assert client.data == {"k:lock": THEIRS.encode()}
    assert not store._background


@EACH_WRITE
async def test_own_lock(call: Call, before: dict[str, bytes], after: bytes | None) -> None:
    """The owner of a takeover's lock passes, and the lock stays."""
    client = Plain(k_lock=OURS.encode(), **before)
    await call(store_of(client))
    assert client.data == {"k:lock": OURS.encode(), **({} if after is None else {"k": after})}


async def test_answers_without_the_lock() -> None:
    """What a read shows to be another's is answered without the lock, which somebody else may hold."""
    theirs = record(THEIRS)
    client = Plain(k=theirs, k_lock=THEIRS.encode())
    store = store_of(client)
    assert await PUT(store) == theirs
    assert await SWAP(store) == Swap(False, theirs)
    assert await SWAP_ABSENT(store) == Swap(False, theirs)
    assert not await REMOVE(store)
    assert await store.read("k") == Stored(theirs, LEFT_UNKNOWN)
    assert all(method == "get" for method, _ in client.log)
    client.data.pop("k")
    assert await SWAP(store) == Swap(False)
    assert not await REMOVE(store)
    assert await store.read("k") is None
    assert all(method == "get" for method, _ in client.log)


@EACH_WRITE
async def test_change_before_the_lock(call: Call, before: dict[str, bytes], after: bytes | None) -> None:
    """What changed between the first look and the lock is left alone."""
    theirs = record(THEIRS)
    client = Plain(**before)
    client.before = lambda method, name: client.data.update(k=theirs) if (method, name) == ("set", "k:lock") else None
    assert await call(store_of(client)) in (theirs, Swap(False, theirs), False)
    assert client.data == {"k": theirs}


async def test_write_by_absence_uses_nx() -> None:
    """A write that is allowed because nothing is there does not overwrite what comes at the last moment."""
    theirs = record(THEIRS)
    for call, answer in ((PUT, theirs), (SWAP_ABSENT, Swap(False, theirs))):
        client = Plain()
        client.before = lambda method, name: client.data.update(k=theirs) if (method, name) == ("set", "k") else None
        assert await call(store_of(client)) == answer
        assert client.data == {"k": theirs}


async def test_lock_that_goes_between_two_looks() -> None:
    """A lock that its owner drops just when it was refused to us is taken, not believed to be ours."""
    client = Plain(k=record(OURS), k_lock=THEIRS.encode())
    held: list[bytes | None] = []

    def look(method: str, name: str) -> None:
        if (method, name) == ("get", "k:lock"):
            if client.data.get(name) == THEIRS.encode():
                del client.data[name]
        elif (method, name) == ("set", "k"):
            held.append(client.data.get("k:lock"))

    client.before = look
    assert (await within(SWAP, store_of(client))).written
    assert held == [OURS.encode()]
    assert "k:lock" not in client.data


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), writers=st.integers(2, 5))
def test_one_of_many_swaps_wins(seed: int, writers: int) -> None:
    """Of many swaps of the same bytes one writes, however their commands interleave."""
    client, turns = Plain(k=record("f" * 32)), random.Random(seed)
    client.turns = lambda: turns.randrange(4)
    store = store_of(client)

    async def main() -> list[Swap]:
        swaps = (
            store.swap("k", record("f" * 32), record(f"{number:032x}"), 1000, exact=True, or_absent=False)
            for number in range(writers)
        )
        with Within(60):
            return await asyncio.gather(*swaps)

    assert sum(swap.written for swap in run_virtual(main())) == 1
    assert set(client.data) == {"k"}


async def test_locks_need_no_lock() -> None:
    """A takeover's lock itself is put and removed without another."""
    client = Plain()
    store = store_of(client)
    assert await store.put_if_absent("k:lock", b"t", 1000) is None
    assert await store.put_if_absent("k:lock", b"u", 1000) == b"t"
    assert not await store.remove("k:lock", b"u", exact=True)
    assert await store.remove("k:lock", b"t", exact=True)
    assert {name for _, name in client.log} == {"k:lock"}
    assert client.data == {}


async def test_time_left() -> None:
    """With `pttl` a value's time left is told, and a swap refuses what was written again."""
    client = Aged(k=record(OURS))
    store = store_of(client)
    assert await store.read("k") == Stored(record(OURS), None)
    client.left["k"] = 500
    assert await store.read("k") == Stored(record(OURS), 500)
    assert await store.put_or_read("k", b"x", 1000) == Stored(record(OURS), 500)
    swap = (record(OURS), record(OURS, 2), 1000)
    refused = await store.swap("k", *swap, exact=True, or_absent=False, left_ms=499)
    assert refused == Swap(False, record(OURS))
    assert (await store.swap("k", *swap, exact=True, or_absent=False, left_ms=500)).written
    client.before = lambda method, _: client.data.clear() if method == "pttl" else None
    assert await store.read("k") == Stored(record(OURS, 2), 0)


@EACH_WRITE
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("n", range(1, 10))
async def test_one_lost_reply(call: Call, before: dict[str, bytes], after: bytes | None, when: str, n: int) -> None:
    """A command or reply that is lost, whichever, is repeated: the write has happened, as if nothing had been lost."""
    client, count = Plain(**before), 0

    def lose(method: str, name: str) -> None:
        nonlocal count
        count += 1
        if count == n:
            raise ConnectionResetError("lost")

    setattr(client, when, lose)
    reply = await call(store_of(client))
    # Its repetition finds a put of ours to be ours.
    assert reply in (None, record(OURS, 2), Swap(True), Swap(True, record(OURS, 2)), True)
    assert client.data.get("k") == after


@EACH_WRITE
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("n", range(1, 8))
async def test_lost_for_good(
    call: Call, before: dict[str, bytes], after: bytes | None, when: str, n: int, tasks: None
) -> None:
    """When a client fails for good, whatever may have been written is said to be unknown."""
    client, count = Plain(**before), 0

    def lose(method: str, name: str) -> None:
        nonlocal count
        count += 1
        if count >= n:
            raise ConnectionResetError("lost")

    setattr(client, when, lose)
    try:
        await call(store_of(client, timeout=0.03))
    except StoreUnavailableError as caught:
        error = caught
    else:
        error = None
    if error is None:
        assert client.data.get("k") == after
    else:
        assert error.outcome_unknown
        assert isinstance(error.__cause__, ConnectionResetError | TimeoutError)


@EACH_WRITE
@pytest.mark.parametrize("error", [exceptions.NoPermissionError("no"), exceptions.OutOfMemoryError("full")], ids=repr)
async def test_refusals(
    call: Call, before: dict[str, bytes], after: bytes | None, error: exceptions.ResponseError
) -> None:
    """A server that refuses the lock has written nothing, and the caller knows it."""
    client = Plain(**before)

    def refuse(method: str, name: str) -> None:
        if method == "set":
            raise error

    client.before = refuse
    with pytest.raises(StoreError) as raised:
        await call(store_of(client))
    assert not raised.value.outcome_unknown
    assert raised.value.__cause__ is error
    assert client.data == before


async def test_refusal_after_a_lost_write() -> None:
    """A refusal that follows a write whose reply was lost does not make that write known."""
    client, lost = Plain(), list[bool]()

    def lose(method: str, name: str) -> None:
        if (method, name) == ("set", "k") and not lost:
            lost.append(True)
            raise ConnectionResetError("lost")

    def refuse(method: str, name: str) -> None:
        if lost and (method, name) == ("get", "k"):
            raise exceptions.OutOfMemoryError("full")

    client.after, client.before = lose, refuse
    with pytest.raises(StoreUnavailableError) as raised:
        await PUT(store_of(client))
    assert client.data["k"] == record(OURS, 2)
    assert raised.value.outcome_unknown


@EACH_WRITE
async def test_lock_of_another_stays(call: Call, before: dict[str, bytes], after: bytes | None) -> None:
    """A lock that ran out during the write, and that another has now, is not dropped."""
    client = Plain(**before)

    def lose_lock(method: str, name: str) -> None:
        if method in ("set", "delete") and name == "k":
            client.data["k:lock"] = THEIRS.encode()

    client.before = lose_lock
    await call(store_of(client))
    assert client.data == {"k:lock": THEIRS.encode(), **({} if after is None else {"k": after})}


@EACH_WRITE
@pytest.mark.parametrize("every", [False, True])
async def test_cancellation_is_held_off(
    call: Call, before: dict[str, bytes], after: bytes | None, every: bool, tasks: None
) -> None:
    """A write whose caller is cancelled at any await runs to its end all the same, and drops its lock."""
    for suspension in range(1, 30):
        client = Plain(**before)
        store = store_of(client)
        run = await cancel_at_await(call(store), suspension, every=every)
        if not run.reached:
            break
        assert run.task.cancelled()
        await store.aclose()
        assert client.data == ({} if after is None else {"k": after})
    assert suspension > 1


@pytest.mark.parametrize("kind", [Plain, Aged])
@pytest.mark.parametrize("end", ["complete", "release"])
async def test_takeover(kind: type[Plain], end: str, tasks: None) -> None:
    """A takeover's lock goes when its claim is settled: it would keep others from writing."""
    now = 1000.0
    client = kind()
    async with store_of(client, wall=lambda: now) as store:
        zombie = await store.claim("k", lease=30, ttl=3600)
        assert isinstance(zombie, Claimed)
        assert set(client.data) == {"k"}
        assert isinstance(await store.claim("k"), InProgress)
        now += 31
        client.left["k"] = 3_569_000
        claim = await store.claim("k", lease=30, ttl=3600)
        assert isinstance(claim, Claimed)
        assert claim.attempt == 2
        assert client.data["k:lock"] == claim.owner.encode()
        with pytest.raises(LeaseLostError):
            await store.complete(zombie, "1")
        await store.renew(claim)
        await (store.complete(claim, "2") if end == "complete" else store.release(claim))
        assert set(client.data) == {"k"}
        after = await store.claim("k")
        if end == "complete":
            assert isinstance(after, Replay)
            assert after.record.data == "2"
        else:
            assert isinstance(after, Claimed)
            assert after.attempt == 2
