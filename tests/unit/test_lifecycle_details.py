"""What the engine and the base keep besides the main path: what is interrupted, refused, late or overlaps."""

import asyncio
import contextvars
import json
import time

import pytest
from redis import exceptions

from asyncidem import (
    Claimed,
    Event,
    Idempotency,
    LeaseLostError,
    MemoryStore,
    Mismatch,
    RedisStore,
    ResultUnavailableError,
    Store,
    StoreError,
    StoreUnavailableError,
    current_operation,
)
from asyncidem.durations import MAX_MS
from asyncidem.model import Orphan
from asyncidem.stores.primitives import Within, call_deadline

from conftest import ServerFactory
from faulty import FaultyStore, down, settle, virtual


class Stop(BaseException):
    """What interrupts a process."""


class Client:
    """A plain client that loses its reply to the first lock that it sets."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.lost = False

    async def get(self, name: str) -> bytes | None:
        return self.data.get(name)

    async def set(self, name: str, value: bytes, *, px: int, nx: bool) -> object:
        assert px > 0
        if nx and name in self.data:
            return None
        self.data[name] = value
        if name.endswith(":lock") and not self.lost:
            self.lost = True
            raise ConnectionResetError("lost")
        return True

    async def delete(self, name: str) -> object:
        return self.data.pop(name, None)


async def held(store: Store, key: str = "k", *, lease: float = 30, fingerprint: str | None = None) -> Claimed:
    """Return a claim that must be given."""
    claim = await store.claim(key, lease=lease, fingerprint=fingerprint)
    assert isinstance(claim, Claimed)
    return claim


async def second() -> str:
    """Return at once."""
    return "second"


# -- the engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["claimed", "taken_over"])
def test_an_owner_interrupted_in_a_hook_is_waited_for_until_its_lease_is_over(name: str) -> None:
    """What a hook's interruption ended is renewed by nobody, even while its traceback lives: a waiter takes over."""

    @virtual
    async def main() -> None:
        store = FaultyStore.here()
        if name == "taken_over":
            await held(store, lease=1)
            await asyncio.sleep(2)
        told: list[str] = []

        def interrupt(event: Event) -> None:
            told.append(event.name)
            if told == [name]:
                raise Stop

        kept: list[Stop] = []

        async def owner() -> None:
            try:
                await idem.run("k", second)
            except Stop as error:
                kept.append(error)

        idem = Idempotency(store, lease=30, wait=60, hooks=[interrupt])
        began = store.clock()
        owning = asyncio.create_task(owner())
        waiter = asyncio.create_task(idem.run("k", second))
        await owning
        assert len(kept) == 1
        assert await waiter == "second"
        assert store.clock() - began == pytest.approx(30, abs=0.1)
        assert told[1:] == ["taken_over", "waited", "completed"] or told[1:] == ["waited", "taken_over", "completed"]

    main()


async def test_operations_that_overlap_leave_no_current_one() -> None:
    """Of two that overlap in one context, the one that ends last does not bring back the one that ended first."""
    idem = Idempotency(MemoryStore())
    first, last = idem.operation("first"), idem.operation("last")
    await first.__aenter__()
    await last.__aenter__()
    await first.__aexit__(None, None, None)
    assert current_operation() is last
    await last.__aexit__(None, None, None)
    assert current_operation() is None


@virtual
async def test_a_lost_lease_gives_back_what_was_set() -> None:
    """The result that a handler had set before its lease was lost is in the error."""
    store = FaultyStore.here()
    idem = Idempotency(store, lease=3)
    with pytest.raises(LeaseLostError) as caught:
        async with idem.operation("k") as op:
            op.set_result({"charge": 7})
            await store.delete("k")
            await asyncio.sleep(100)
    assert caught.value.result == {"charge": 7}
    assert store.clock() < 3


@virtual
async def test_an_exception_that_the_store_refuses_is_kept_nowhere() -> None:
    """An exception too large to be stored is not replayed from the cache either, and the hooks hear why."""
    store = FaultyStore.here()
    told: list[tuple[str, str | None]] = []
    hooks = [lambda event: told.append((event.name, event.source))]
    idem = Idempotency(store, local_cache=10, replay_exceptions=ValueError, hooks=hooks)
    store.fault("swap", before=StoreError("too big"), when=lambda _, value: len(value) > 1000)

    async def handler() -> str:
        raise ValueError("x" * 2000)

    with pytest.raises(ValueError, match="xxx"):
        await idem.run("k", handler)
    cached = idem._engine._cache
    assert cached is not None
    record = cached.get("k")
    assert record is not None
    assert (record.outcome, record.error, record.data) == ("too_large", None, None)
    commands = len(store.calls)
    with pytest.raises(ResultUnavailableError) as caught:
        await idem.run("k", handler)
    assert caught.value.outcome == "too_large"
    assert len(store.calls) == commands
    assert [name for name, _ in told] == ["claimed", "result_unavailable", "completed", "result_unavailable"]


# -- the base ---------------------------------------------------------------------------------------------------------


@virtual
async def test_a_deleted_claim_keeps_its_payload() -> None:
    """What stays of a claim in progress that was deleted is an orphan of its payload, and refuses another."""
    store = FaultyStore.here()
    await held(store, fingerprint="A")
    assert await store.delete("k")
    assert isinstance(await store.claim("k", fingerprint="B"), Mismatch)
    claim = await held(store, fingerprint="A")
    assert claim.attempt == 2


def endless(ttl_ms: int) -> bytes:
    """Return a record in progress that says it lives so long."""
    return json.dumps({"owner": "a" * 32, "status": "INPROGRESS", "lease": 1000, "ttl": ttl_ms}).encode()


async def deleted(store: Store, ttl_ms: int) -> None:
    """Delete such a record; what is left of it lives a century at the most, and the next claim takes the key over."""
    await store.put_if_absent("k", endless(ttl_ms), 60_000)
    assert await store.delete("k")
    stored = await store.read("k")
    assert stored is not None
    assert stored.left_ms is not None
    assert stored.left_ms <= MAX_MS
    assert (await held(store)).attempt == 2


@pytest.mark.parametrize("ttl_ms", [2**62, 2**63 - 1])
async def test_a_record_with_an_endless_ttl_can_be_deleted(ttl_ms: int) -> None:
    """Also in memory what is left of it has an end."""
    await deleted(MemoryStore(), ttl_ms)


@pytest.mark.parametrize("ttl_ms", [2**62, 2**63 - 1])
async def test_a_record_with_an_endless_ttl_can_be_deleted_on_a_server(redis_url: str, ttl_ms: int) -> None:
    """A ttl that a server refuses, or would keep for ever, is not asked of it."""
    async with RedisStore.from_url(redis_url, prefix="") as store:
        await deleted(store, ttl_ms)


@virtual
async def test_what_is_released_soon_is_settled() -> None:
    """A claim that is released without waiting is renewed no more, also before the release has been sent."""
    store = FaultyStore.here()
    claim = await held(store)
    store.release_soon(claim)
    with pytest.raises(LeaseLostError, match="released"):
        await store.renew(claim)
    await settle()
    assert await store.get("k") is None


@virtual
async def test_what_is_repeated_has_a_deadline_of_its_own() -> None:
    """An undo in the background does not run under the deadline of the call that failed."""
    store = FaultyStore.here()
    store.fault("put_if_absent", after=down())
    seen: list[float | None] = []
    store.fault("remove", before=lambda: seen.append(call_deadline.get()))
    with Within(-1), pytest.raises(StoreUnavailableError):
        await store.claim("k")
    await settle()
    assert len(seen) == 1
    assert seen[0] is not None
    assert seen[0] > time.monotonic()
    assert await store.get("k") is None


@virtual
async def test_what_is_repeated_and_cancelled_ends_with_the_lease() -> None:
    """An undo that is cancelled goes on, but not beyond the lease, after which the key is nobody's."""
    store = FaultyStore.here()
    store.fault("put_if_absent", after=down())
    store.fault("remove", before=down(), times=None)
    with pytest.raises(StoreUnavailableError):
        await store.claim("k", lease=0.1)
    (task,) = store._background
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.wait((task,))
    assert store.clock() == pytest.approx(0.1)


@pytest.mark.parametrize("end", ["complete", "release"])
async def test_a_lock_whose_reply_was_lost_goes_with_its_claim(end: str) -> None:
    """A first attempt that holds the lock of a plain client without knowing it drops it when it is settled."""
    client = Client()
    async with RedisStore(client, prefix="") as store:
        claim = await held(store)
        assert claim.attempt == 1
        assert client.data["k:lock"] == claim.owner.encode()
        await (store.complete(claim, "1") if end == "complete" else store.release(claim))
        assert set(client.data) == ({"k"} if end == "complete" else set())


async def test_a_call_closed_elsewhere_ends_no_deadline_here() -> None:
    """A coroutine inside a store call that is closed in another context leaves that one's deadline alone."""
    store = FaultyStore(turns=1)
    call = store.claim("k")
    contextvars.copy_context().run(call.send, None)
    with Within(60):
        deadline = call_deadline.get()
        call.close()
        assert call_deadline.get() == deadline
    assert deadline is not None


async def test_a_result_too_large_for_the_server(private_server: ServerFactory) -> None:
    """A result that a server takes no more is its caller's all the same, and its duplicates are told why."""
    server = private_server("--proto-max-bulk-len", "1mb")
    async with RedisStore.from_url(server.url, timeout=3) as store:
        idem = Idempotency(store)

        async def handler() -> str:
            return "x" * 2_000_000

        assert len(await idem.run("k", handler)) == 2_000_000
        record = await store.get("k")
        assert record is not None
        assert record.outcome == "too_large"
        with pytest.raises(ResultUnavailableError) as caught:
            await idem.run("k", handler)
        assert caught.value.outcome == "too_large"


async def test_a_result_too_large_for_a_server_that_resets_first() -> None:
    """A server that refuses a size closes the connection, and its answer may be lost: the next one is as final."""

    class Resetting(Client):
        tries = 0

        async def set(self, name: str, value: bytes, *, px: int, nx: bool) -> object:
            if len(value) > 1000:
                self.tries += 1
                if self.tries == 1:
                    raise ConnectionResetError("reset")
                raise exceptions.ResponseError("Protocol error: invalid bulk length")
            return await super().set(name, value, px=px, nx=nx)

    async with RedisStore(Resetting()) as store:
        idem = Idempotency(store)

        async def handler() -> str:
            return "x" * 2000

        assert len(await idem.run("k", handler)) == 2000
        record = await store.get("k")
        assert record is not None
        assert record.outcome == "too_large"


async def test_an_owner_counts_its_lease_as_over_before_anybody_else_does() -> None:
    """Stores count whole milliseconds: what they take for a lease may be a part of one less, and the owner knows."""
    now = 0.0
    store = MemoryStore(clock=lambda: now)
    claim = await store.claim("k", lease=1, ttl=1)
    assert isinstance(claim, Claimed)
    for began in (0.0, 0.5):
        now = began
        await store.renew(claim)
        now = began + 0.9989
        assert not isinstance(await store.look("k"), Orphan)
        now = began + 0.9995
        assert isinstance(await store.look("k"), Orphan)
        assert claim._deadline <= now
