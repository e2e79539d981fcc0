"""What the base promises to those who write a store, and to those who await one."""

import asyncio
import threading
from typing import Any

import pytest

from asyncidem import (
    Claimed,
    CodecError,
    ConfigurationError,
    Idempotency,
    InProgress,
    JSONCodec,
    LeaseLostError,
    MemoryStore,
    PydanticCodec,
    Replay,
    ResultUnavailableError,
    Store,
    StoreError,
    StoreUnavailableError,
)
from asyncidem.model import Stored, Swap

from faulty import FaultyStore, settle, virtual


class SmallStore(Store):
    """The least that a store has: four primitives."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MemoryStore()

    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        return await self.inner.put_if_absent(key, value, ttl_ms)

    async def read(self, key: str) -> Stored | None:
        return await self.inner.read(key)

    async def swap(self, key: str, expected: bytes, value: bytes, ttl_ms: int, **how: Any) -> Swap:
        return await self.inner.swap(key, expected, value, ttl_ms, **how)

    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        return await self.inner.remove(key, expected, exact=exact)


@pytest.mark.parametrize(
    "name", ["_write", "_put", "_stored", "_settle", "acquire", "finish", "look", "release_soon", "release_cancelled"]
)
def test_a_store_cannot_replace_what_the_lifecycle_needs(name: str) -> None:
    """A helper of the same name would be found by the first takeover: it is refused where the class is defined."""
    with pytest.raises(ConfigurationError, match=f"MyStore.{name} would replace a method that every store needs"):
        type("MyStore", (SmallStore,), {name: print})
    type("MyStore", (SmallStore,), {"_mine": 1, "__slots__": (), "claim": SmallStore.claim})


class Stop(BaseException):
    """What interrupts a process."""


async def held(store: Store, key: str = "k", **options: Any) -> Claimed:
    """Return a claim that must be given."""
    claim = await store.claim(key, **options)
    assert isinstance(claim, Claimed)
    return claim


async def test_four_primitives_are_a_store() -> None:
    """A store of four primitives runs, replays, and serves the local cache as far as it can tell."""
    idem = Idempotency(SmallStore(), local_cache=10)

    async def handler() -> int:
        return 1

    assert [await idem.run("k", handler), await idem.run("k", handler)] == [1, 1]
    other = Idempotency(idem.store, local_cache=10)
    assert await other.run("k", handler) == 1


async def test_a_claim_shows_what_it_is() -> None:
    """Its text names key, owner and attempt, and nothing of what the store keeps for itself."""
    claim = await held(MemoryStore())
    assert repr(claim) == f"Claimed(key='k', owner='{claim.owner}', attempt=1)"


@pytest.mark.parametrize("method", ["complete", "release", "renew"])
@pytest.mark.parametrize("other", [None, InProgress(1.0)])
async def test_only_claims_are_settled(method: str, other: object) -> None:
    """What is no claim is refused by name, before anything is written."""
    store = MemoryStore()
    with pytest.raises(ConfigurationError, match=f"{method} takes the Claimed .* not {type(other).__name__}"):
        await getattr(store, method)(other, *(["1"] if method == "complete" else []))


@pytest.mark.parametrize(
    "given",
    [
        {"data": None},
        {"data": b"1"},
        {"data": None, "outcome": 'x"y'},
        {"data": "1", "outcome": "too_large"},
        {"data": None, "outcome": "exception", "error": {}},
    ],
)
async def test_a_completion_that_cannot_be_stored_is_refused(given: dict[str, Any]) -> None:
    """Wrong data, outcomes and errors are refused, and the claim is still there to be completed."""
    store = MemoryStore()
    claim = await held(store)
    with pytest.raises(ConfigurationError):
        await store.complete(claim, **given)
    await store.complete(claim, "1")
    assert isinstance(await store.claim("k"), Replay)


async def test_a_fingerprint_is_text() -> None:
    """Another type is refused before anything is written."""
    store = MemoryStore()
    with pytest.raises(ConfigurationError, match="fingerprint must be text, not bytes"):
        await store.claim("k", fingerprint=b"x")  # type: ignore[arg-type]
    assert await store.get("k") is None


@virtual
async def test_a_claim_is_handed_out_with_a_lease_that_runs() -> None:
    """Where the claim's reply is late and its renewal's too, it is renewed again before the handler may start."""
    store = FaultyStore.here()
    store.fault("put_if_absent", after=0.5)
    store.fault("swap", after=1.5)
    claim = await held(store, lease=1)
    assert store.counts == {"put_if_absent": 1, "swap": 2}
    assert claim._deadline > store.clock()


@virtual
async def test_a_store_that_is_slower_than_the_lease_gives_no_claim() -> None:
    """If every renewal comes back after the lease that it began, the claim ends, and leaves nothing."""
    store = FaultyStore.here()
    store.fault("put_if_absent", after=0.5)
    store.fault("swap", after=1.5, times=10)
    with pytest.raises(StoreUnavailableError, match="later than a lease of 1000 ms"):
        await store.claim("k", lease=1)
    await settle()
    assert await store.get("k") is None


@virtual
async def test_what_is_not_answered_within_a_lease_is_given_up() -> None:
    """An undo is repeated for a lease and no longer, however the store fails."""
    store = FaultyStore.here()
    store.fault("put_if_absent", after=StoreUnavailableError("lost"))
    store.fault("remove", before=StoreUnavailableError("down"), times=None)
    with pytest.raises(StoreUnavailableError):
        await store.claim("k", lease=2)
    await asyncio.sleep(60)
    assert max(when for name, _, when in store.calls if name == "remove") <= 2
    assert not store._background


@virtual
async def test_a_result_that_the_store_refuses_is_recorded_without_it() -> None:
    """The caller gets its value, the operation does not run again, and duplicates are told why there is no result."""
    store = FaultyStore.here()
    names: list[str] = []
    idem = Idempotency(store, hooks=[lambda event: names.append(event.name)])
    store.fault("swap", before=StoreError("too big"), when=lambda _, value: len(value) > 1000)

    async def handler() -> str:
        return "x" * 2000

    assert len(await idem.run("k", handler)) == 2000
    with pytest.raises(ResultUnavailableError) as caught:
        await idem.run("k", handler)
    assert caught.value.outcome == "too_large"
    assert names == ["claimed", "result_unavailable", "completed", "result_unavailable"]


@virtual
async def test_an_interrupted_codec_leaves_nobody_waiting() -> None:
    """What interrupts the process while it encodes goes up, and waiters take over when the lease is over."""
    store = FaultyStore.here()

    class Interrupted(JSONCodec):
        def encode(self, value: object) -> str:
            raise Stop

    idem = Idempotency(store, lease=10)

    async def handler() -> int:
        await asyncio.sleep(1)
        return 1

    caught: list[BaseException] = []

    async def owner() -> None:
        try:
            await idem.run("k", handler, codec=Interrupted())
        except Stop as error:
            caught.append(error)

    task = asyncio.create_task(owner())
    await settle()
    assert await idem.run("k", handler, wait=60) == 1
    await task
    assert len(caught) == 1
    assert store.clock() == pytest.approx(11, abs=1)


async def test_without_a_type_pydantic_stores_only_what_comes_back_as_itself() -> None:
    """A model that nothing names would come back as a dict: it is refused as JSONCodec refuses it."""
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Model", id=(int, ...))
    idem = Idempotency(MemoryStore(), codec=PydanticCodec())
    with pytest.raises(CodecError):
        async with idem.operation("k") as op:
            op.set_result(model(id=1))
    async with idem.operation("plain") as op:
        op.set_result({"id": 1})
    async with idem.operation("plain") as op:
        assert op.result == {"id": 1}


def test_one_memory_store_serves_loops_in_threads() -> None:
    """Each running loop has waiters and renewals of its own, and none ends another's."""
    store = MemoryStore()
    idem = Idempotency(store, wait=5)
    inside, leave = threading.Event(), threading.Event()

    async def handler(value: int) -> int:
        if value == 1:
            inside.set()
            await asyncio.to_thread(leave.wait)
        return value

    thread = threading.Thread(target=lambda: asyncio.run(idem.run("one", handler, 1)))
    thread.start()
    assert inside.wait(5)

    async def second() -> int:
        result = await idem.run("two", handler, 2)
        assert len(store.companions) == 2
        first: Any = next(iter(store.companions.values()))
        await store.aclose()
        assert first.renewer._delays, "the other loop's handler still runs, and its lease is still renewed"
        return result

    assert asyncio.run(second()) == 2
    leave.set()
    thread.join(5)
    assert not thread.is_alive()


async def test_losing_a_lease_outside_of_a_task_cancels_nothing() -> None:
    """An operation that no task entered, as a callback may, has nobody to cancel, and still knows of the loss."""
    op = Idempotency(MemoryStore(), renew=False).operation("k")
    entered = asyncio.Event()

    def enter() -> None:
        with pytest.raises(StopIteration):
            op.__aenter__().send(None)
        entered.set()

    asyncio.get_running_loop().call_soon(enter)
    await entered.wait()
    op.lost(LeaseLostError("k", "taken"))
    with pytest.raises(LeaseLostError):
        await op.__aexit__(ValueError, ValueError(), None)


async def test_a_completion_that_was_refused_may_be_tried_with_another_result() -> None:
    """Of a refusal nothing is there: the next completion of the same claim writes its own bytes."""
    store = FaultyStore()
    claim = await held(store)
    store.fault("swap", before=StoreError("too big"))
    with pytest.raises(StoreError):
        await store.complete(claim, '"big"')
    await store.complete(claim, '"small"')
    found = await store.claim("k")
    assert isinstance(found, Replay)
    assert found.record.data == '"small"'
