"""The lifecycle of an operation through the decorator, the context manager and the call form."""

import asyncio
from typing import Any

import pytest

from asyncidem import (
    Claimed,
    Event,
    FingerprintMismatchError,
    Idempotency,
    IdempotencyError,
    InProgressError,
    JSONCodec,
    MissingKeyError,
    Operation,
    Record,
    State,
    WaitTimeoutError,
    current_operation,
)
from asyncidem.keys import digest

from faulty import FaultyStore, settle, virtual


class Effects:
    """A handler that counts how often it ran."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.count = 0
        self.attempts: list[int] = []

    async def __call__(self, *args: Any) -> dict[str, Any]:
        self.count += 1
        op = current_operation()
        assert op is not None
        self.attempts.append(op.attempt)
        await asyncio.sleep(self.seconds)
        return {"n": self.count, "args": list(args)}


async def state_of(idem: Idempotency, key: str) -> State | None:
    """Return the state of a record, None where there is none."""
    record = await idem.store.get(key)
    return None if record is None else record.state


@virtual
async def test_the_decorator_runs_once_and_replays() -> None:
    """A decorated function goes from claimed to completed; its duplicate gets the same result and runs nothing."""
    idem = Idempotency(FaultyStore.here(turns=1))
    seen: list[State | None] = []

    @idem.idempotent(key="order")
    async def charge(order: str, amount: int) -> dict[str, Any]:
        seen.append(await state_of(idem, idem.key_for(charge, order, amount)))
        return {"charged": amount}

    assert await charge("o1", 5) == {"charged": 5}
    assert await state_of(idem, idem.key_for(charge, "o1", 5)) is State.COMPLETED
    assert await charge("o1", 6) == {"charged": 5}
    assert seen == [State.INPROGRESS]
    assert await charge("o2", 7) == {"charged": 7}


@virtual
async def test_the_decorator_works_without_arguments() -> None:
    """Without a key the arguments are the key, and the bare decorator is enough."""
    idem = Idempotency(FaultyStore.here())
    runs: list[int] = []

    @idem.idempotent
    async def double(n: int) -> int:
        runs.append(n)
        return 2 * n

    assert [await double(1), await double(2), await double(n=1)] == [2, 4, 2]
    assert runs == [1, 2]


@virtual
async def test_the_context_manager_runs_once_and_replays() -> None:
    """The block's result is stored when it ends, and a replay offers it as `op.result`."""
    idem = Idempotency(FaultyStore.here(turns=1), namespace="shop")
    async with idem.operation("order:1") as op:
        assert not op.replayed
        assert op.key == "shop:order:1"
        assert await state_of(idem, op.key) is State.INPROGRESS
        assert op.set_result([1, {"a": None}]) == [1, {"a": None}]
    assert await state_of(idem, op.key) is State.COMPLETED
    async with idem.operation("order:1") as again:
        assert again.replayed
        assert again.result == [1, {"a": None}]
    assert again.replayed  # after the block, too
    assert not op.replayed


@virtual
async def test_run_calls_once_and_replays() -> None:
    """The call form hands positional arguments on, and shares its keys with the context manager."""
    idem, effects = Idempotency(FaultyStore.here(turns=1)), Effects()
    assert await idem.run("k", effects, 1, "two") == {"n": 1, "args": [1, "two"]}
    assert await idem.run("k", effects, 3) == {"n": 1, "args": [1, "two"]}
    async with idem.operation("k") as op:
        assert op.result == {"n": 1, "args": [1, "two"]}
    assert effects.count == 1


@virtual
async def test_a_duplicate_of_a_running_call_is_refused_at_once() -> None:
    """Without `wait`, the duplicate gets `InProgressError` with what is left of the lease, while no time passes."""
    loop = asyncio.get_running_loop()
    idem, effects = Idempotency(FaultyStore.here(), lease=30), Effects(20)
    running = asyncio.create_task(idem.run("k", effects))
    await asyncio.sleep(4)
    with pytest.raises(InProgressError) as caught:
        await idem.run("k", effects)
    assert not isinstance(caught.value, WaitTimeoutError)
    assert (caught.value.key, caught.value.retry_after) == ("k", pytest.approx(26, abs=0.01))
    assert loop.time() == 4
    await running
    assert effects.count == 1


@virtual
async def test_another_payload_is_a_mismatch_while_running_and_when_completed() -> None:
    """The same key with another payload is refused in both states; the same payload, or none, is not."""
    idem, effects = Idempotency(FaultyStore.here()), Effects(20)
    running = asyncio.create_task(idem.run("k", effects, payload={"amount": 1}))
    await settle()
    with pytest.raises(FingerprintMismatchError):
        await idem.run("k", effects, payload={"amount": 2})
    with pytest.raises(InProgressError):
        await idem.run("k", effects, payload={"amount": 1})
    first = await running
    with pytest.raises(FingerprintMismatchError) as caught:
        await idem.run("k", effects, payload={"amount": 2})
    assert caught.value.key == "k"
    assert await idem.run("k", effects, payload={"amount": 1}) == first
    assert await idem.run("k", effects) == first
    assert effects.count == 1


@virtual
async def test_the_decorators_payload_is_fingerprinted() -> None:
    """`payload=` names the parameters that must be the same under one key."""
    idem = Idempotency(FaultyStore.here())

    @idem.idempotent(key="order", payload=["amount", "currency"])
    async def charge(order: str, amount: int, currency: str = "EUR") -> int:
        return amount

    assert await charge("o", 5) == 5
    assert await charge("o", 5, "EUR") == 5
    with pytest.raises(FingerprintMismatchError):
        await charge("o", 5, "USD")


@pytest.mark.parametrize("wait", [None, 60])
@pytest.mark.parametrize("turns", [0, 1])
@virtual
async def test_of_fifty_concurrent_duplicates_one_runs(wait: float | None, turns: int) -> None:
    """Of fifty callers with one key exactly one runs; the others get its result, or are told that it runs."""
    idem, effects = Idempotency(FaultyStore.here(turns=turns)), Effects(1)
    outcomes = await asyncio.gather(*(idem.run("k", effects, wait=wait) for _ in range(50)), return_exceptions=True)
    assert effects.count == 1
    results = [outcome for outcome in outcomes if outcome == {"n": 1, "args": []}]
    refused = [outcome for outcome in outcomes if isinstance(outcome, InProgressError)]
    assert (len(results), len(refused)) == ((1, 49) if wait is None else (50, 0))


@virtual
async def test_current_operation_is_that_of_the_running_code() -> None:
    """It is None outside, the innermost inside, and the outer one again when the inner one ended, however it ended."""
    idem = Idempotency(FaultyStore.here(turns=1))
    seen: list[Operation | None] = []

    async def inner() -> None:
        seen.append(current_operation())

    async def failing() -> None:
        raise ValueError

    assert current_operation() is None
    async with idem.operation("outer", name="label") as outer:
        assert current_operation() is outer
        await idem.run("inner", inner)
        assert current_operation() is outer
        await idem.run("inner", inner)  # a replay
        assert current_operation() is outer
        with pytest.raises(ValueError):
            await idem.run("failing", failing)
        assert current_operation() is outer
        with pytest.raises(MissingKeyError):
            await idem.run("", inner)
        async with idem.operation("block") as block:
            assert current_operation() is block
    assert current_operation() is None
    assert [op and op.key for op in seen] == ["inner"]
    assert outer.name == "label"


@virtual
async def test_attempt_and_downstream_key_across_a_takeover() -> None:
    """A takeover sees `attempt` 2 and the same downstream key, which depends on the whole key."""
    store = FaultyStore.here()
    one, other = Idempotency(store, namespace="a", lease=1), Idempotency(store, namespace="b")
    claim = await store.claim("a:k", lease=1)
    assert isinstance(claim, Claimed)
    await asyncio.sleep(1)
    async with one.operation("k") as op:
        assert (op.attempt, op.downstream_key) == (2, digest("a:k"))
        assert (len(op.downstream_key), int(op.downstream_key, 16) > 0) == (32, True)
        op.set_result(1)
    async with one.operation("k") as replay:
        assert (replay.replayed, replay.attempt, replay.downstream_key) == (True, 2, op.downstream_key)
    async with other.operation("k") as elsewhere:
        assert elsewhere.attempt == 1
        assert elsewhere.downstream_key != op.downstream_key


@virtual
async def test_the_rules_of_set_result() -> None:
    """A result may be set and set again inside the block; not before it, after it or on a replay."""
    idem = Idempotency(FaultyStore.here())
    op = idem.operation("k")
    with pytest.raises(IdempotencyError, match="not begun"):
        op.set_result(1)
    async with op:
        with pytest.raises(IdempotencyError, match="no result yet"):
            _ = op.result
        op.set_result(1)
        op.set_result(2)
        assert op.result == 2
    with pytest.raises(IdempotencyError, match="is over"):
        op.set_result(3)
    async with idem.operation("k") as replay:
        with pytest.raises(IdempotencyError, match="replay"):
            replay.set_result(3)
        assert replay.result == 2


@virtual
async def test_a_block_that_sets_no_result_completes_with_none() -> None:
    """Its replay has the result None."""
    idem = Idempotency(FaultyStore.here())
    async with idem.operation("k"):
        pass
    async with idem.operation("k") as op:
        assert op.replayed
        assert op.result is None


@virtual
async def test_a_replayed_block_that_did_not_look_is_an_error() -> None:
    """A block that asked for neither `replayed` nor `result` ran its body a second time, and is told so."""
    idem = Idempotency(FaultyStore.here())
    async with idem.operation("k") as op:
        op.set_result(1)
    with pytest.raises(IdempotencyError, match="ran again"):
        async with idem.operation("k"):
            pass
    with pytest.raises(ZeroDivisionError):
        async with idem.operation("k"):
            _ = 1 / 0
    assert current_operation() is None
    async with idem.operation("k") as op:
        assert op.result == 1


@virtual
async def test_an_operation_is_entered_once() -> None:
    """Entering an operation again is an error, inside its block and after it; so is leaving it without entering."""
    idem = Idempotency(FaultyStore.here())
    op = idem.operation("k")
    async with op:
        with pytest.raises(IdempotencyError, match="entered before"):
            await op.__aenter__()
    with pytest.raises(IdempotencyError, match="entered before"):
        await op.__aenter__()
    with pytest.raises(IdempotencyError, match="not running"):
        await op.__aexit__(None, None, None)
    with pytest.raises(IdempotencyError, match="not running"):
        await idem.operation("l").__aexit__(None, None, None)


@pytest.mark.parametrize("wait", [None, 10])
@virtual
async def test_an_operation_inside_itself_is_refused_at_once(wait: float | None) -> None:
    """The same key inside its own operation would wait for its own end: refused at once, with `wait` and in children."""
    loop = asyncio.get_running_loop()
    store = FaultyStore.here()
    idem, twin = Idempotency(store, lease=30), Idempotency(store)
    effects = Effects()
    async with idem.operation("k") as op:
        await asyncio.sleep(1)
        async with idem.operation("between"):
            calls = store.counts.total()
            with pytest.raises(InProgressError, match="inside itself") as caught:
                await idem.run("k", effects, wait=wait)
            with pytest.raises(InProgressError, match="inside itself"):
                await twin.run("k", effects, wait=wait)
            with pytest.raises(InProgressError, match="inside itself"):
                await asyncio.create_task(idem.run("k", effects, wait=wait))
            assert store.counts.total() == calls
        assert caught.value.retry_after == pytest.approx(29, abs=0.002)
        assert loop.time() == 1
        op.set_result("outer")
    assert await idem.run("k", effects) == "outer"
    assert effects.count == 0


@virtual
async def test_the_same_key_is_fine_after_its_end_and_elsewhere() -> None:
    """An ended operation refuses nothing, in its children neither; another store or namespace has keys of its own."""
    store = FaultyStore.here()
    idem = Idempotency(store)
    ended = asyncio.Event()

    async def child() -> Any:
        await ended.wait()
        return await idem.run("k", Effects())

    async with idem.operation("k") as op:
        running = asyncio.create_task(child())
        await settle()
        assert await Idempotency(store, namespace="n").run("k", Effects()) == {"n": 1, "args": []}
        assert await Idempotency(FaultyStore.here()).run("k", Effects()) == {"n": 1, "args": []}
        op.set_result("outer")
    ended.set()
    assert await running == "outer"
    assert await idem.run("k", Effects()) == "outer"


@virtual
async def test_map_replay_changes_what_a_replay_returns() -> None:
    """It is called with result and record at every replay, never for the first call."""
    seen: list[tuple[Any, Record]] = []

    def mark(result: Any, record: Record) -> Any:
        seen.append((result, record))
        return {**result, "replayed": True}

    idem = Idempotency(FaultyStore.here(), map_replay=mark)
    assert await idem.run("k", Effects()) == {"n": 1, "args": []}
    assert seen == []
    assert await idem.run("k", Effects()) == {"n": 1, "args": [], "replayed": True}
    assert [(result, record.key, record.state) for result, record in seen] == [
        ({"n": 1, "args": []}, "k", State.COMPLETED)
    ]


@virtual
async def test_a_map_replay_that_raises_leaves_no_operation_behind() -> None:
    """Its exception is the caller's, and the code after it is part of no operation."""
    idem = Idempotency(FaultyStore.here(), map_replay=lambda result, _record: result["missing"])
    await idem.run("k", Effects())
    with pytest.raises(KeyError):
        await idem.run("k", Effects())
    assert current_operation() is None


@virtual
async def test_results_live_for_their_ttl() -> None:
    """The ttl counts from the completion; after it the operation runs again as attempt 1."""
    idem, effects = Idempotency(FaultyStore.here(), ttl=100), Effects(50)
    await idem.run("k", effects)
    await asyncio.sleep(99.9)
    assert (await idem.run("k", effects))["n"] == 1
    await asyncio.sleep(0.1)
    assert (await idem.run("k", effects))["n"] == 2
    assert effects.attempts == [1, 1]


@pytest.mark.parametrize("value", [{}, [], 0, False, "", 0.0, None, {"a": [{"b": None}, "ß\ud800"]}, True, 2**70])
@virtual
async def test_results_are_exact(value: Any) -> None:
    """A replay gives back an equal value of the same type."""
    idem = Idempotency(FaultyStore.here())

    async def give() -> Any:
        return value

    await idem.run("k", give)
    replay = await idem.run("k", give)
    assert (replay, type(replay)) == (value, type(value))


@virtual
async def test_events_of_a_lifecycle() -> None:
    """Hooks hear of each outcome with key, label, attempt, and where a replay came from."""
    events: list[Event] = []
    store = FaultyStore.here()
    idem = Idempotency(store, hooks=[events.append], lease=1, renew=False)
    effects = Effects(0.5)
    running = asyncio.create_task(idem.run("k", effects, name="pay", payload=1))
    await settle()
    for payload in (1, 2):
        with pytest.raises(IdempotencyError):
            await idem.run("k", effects, payload=payload)
    await asyncio.create_task(idem.run("k", effects, payload=1, wait=5))
    await running
    await idem.run("k", effects)
    await store.claim("orphan", lease=1)
    await asyncio.sleep(1)
    await idem.run("orphan", effects)
    names = [(event.name, event.key, event.attempt, event.source) for event in events]
    assert names == [
        ("claimed", "k", 1, None),
        ("in_progress", "k", None, None),
        ("mismatch", "k", 1, None),
        ("completed", "k", 1, None),
        ("waited", "k", None, None),
        ("replayed", "k", 1, "store"),
        ("replayed", "k", 1, "store"),
        ("taken_over", "orphan", 2, None),
        ("completed", "orphan", 2, None),
    ]
    assert (events[0].operation, events[0].error) == ("pay", None)
    assert isinstance(events[1].error, InProgressError)
    assert isinstance(events[2].error, FingerprintMismatchError)
    assert all(event.elapsed >= 0 for event in events)


@virtual
async def test_a_hook_that_fails_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A raising hook is logged; operation, result and the other hooks go on."""
    events: list[str] = []

    def broken(event: Event) -> None:
        raise RuntimeError("telemetry is down")

    idem = Idempotency(FaultyStore.here(), hooks=[broken, lambda event: events.append(event.name)])
    assert await idem.run("k", Effects()) == await idem.run("k", Effects())
    assert events == ["claimed", "completed", "replayed"]
    assert [record.getMessage() for record in caplog.records] == ["hook_failed"] * 3


@virtual
async def test_a_hook_that_is_interrupted_leaves_the_key_to_its_lease() -> None:
    """KeyboardInterrupt passes through a hook; who waits for the key takes it over when the lease is over."""

    def interrupted(event: Event) -> None:
        if event.name == "claimed":
            raise KeyboardInterrupt

    idem = Idempotency(FaultyStore.here(), lease=2, wait=10, hooks=[interrupted])
    with pytest.raises(KeyboardInterrupt):
        await idem.run("k", Effects())
    assert current_operation() is None
    effects = Effects()
    await idem.run("k", effects)
    assert effects.attempts == [2]


@virtual
async def test_round_trips_of_a_lifecycle() -> None:
    """A first call costs 2, a replay 1, a duplicate of a running call 2, a takeover 4 and its completion."""
    store = FaultyStore.here()
    idem = Idempotency(store, lease=1, codec=JSONCodec())

    async def cost(key: str) -> int:
        before = store.counts.total()
        await idem.run(key, Effects())
        return store.counts.total() - before

    assert [await cost("k"), await cost("k")] == [2, 1]
    await store.claim("orphan", lease=1)
    before = store.counts.total()
    with pytest.raises(InProgressError):
        await idem.run("orphan", Effects())
    assert store.counts.total() - before == 2
    await asyncio.sleep(1)
    assert await cost("orphan") <= 6
