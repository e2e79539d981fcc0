"""Options: their defaults work together, and an override takes effect for its use and no other."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from asyncidem import (
    Claimed,
    CompletionError,
    Event,
    Idempotency,
    InProgressError,
    JSONCodec,
    LeaseLostError,
    MemoryStore,
    MissingKeyError,
    PydanticCodec,
    Record,
    ReplayedError,
    StoreUnavailableError,
    WaitTimeoutError,
)
from asyncidem.model import Stored, Swap

from loops import run_virtual


class DownStore(MemoryStore):
    """Does not answer claims, or completions, when it is told so."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock=clock)
        self.down: set[str] = set()

    async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        if "claim" in self.down:
            raise StoreUnavailableError("down", outcome_unknown=False)
        return await super().put_or_read(key, value, ttl_ms)

    async def swap(self, *args: Any, **kwargs: Any) -> Swap:
        if "complete" in self.down:
            raise StoreUnavailableError("down")
        return await super().swap(*args, **kwargs)


Use = Callable[[Idempotency, Callable[[], Awaitable[Any]], dict[str, Any]], Awaitable[Any]]


async def at_object(idem: Idempotency, fn: Callable[[], Awaitable[Any]], options: dict[str, Any]) -> Any:
    """Give the options to an object of their own."""
    return await Idempotency(idem.store, **options).run("k", fn)


async def at_decorator(idem: Idempotency, fn: Callable[[], Any], options: dict[str, Any]) -> Any:
    """Give them to the decorator; a new object each time, for a name belongs to one function."""
    before = idem._options
    fresh = Idempotency(
        idem.store, wait=before.wait, renew=before.renew, missing_key=before.missing_key, map_replay=before.map_replay
    )
    return await fresh.idempotent(key=lambda: _key(options), name="f", **options)(fn)()


async def at_operation(idem: Idempotency, fn: Callable[[], Awaitable[Any]], options: dict[str, Any]) -> Any:
    """Give them to the context manager."""
    async with idem.operation(_key(options), **options) as op:
        return op.result if op.replayed else op.set_result(await fn())


async def at_run(idem: Idempotency, fn: Callable[[], Awaitable[Any]], options: dict[str, Any]) -> Any:
    """Give them to the call."""
    return await idem.run(_key(options), fn, **options)


def _key(options: dict[str, Any]) -> str:
    return "" if "missing_key" in options else "k"


OVERRIDES: list[Use] = [at_decorator, at_operation, at_run]
USES: list[Use] = [at_object, *OVERRIDES]


@pytest.fixture
def store() -> DownStore:
    """Return an empty store."""
    return DownStore()


@pytest.fixture
def idem(store: DownStore) -> Idempotency:
    """Return an object with the defaults."""
    return Idempotency(store)


def key_of(use: Use) -> str:
    """Return the key under which a use of the options stores."""
    return "f:k" if use is at_decorator else "k"


async def five() -> int:
    """Return a result."""
    return 5


async def declined() -> int:
    """Fail."""
    raise ValueError("declined")


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("lease", [0.5, timedelta(milliseconds=500)])
async def test_lease_and_ttl_are_in_the_record(store: DownStore, idem: Idempotency, use: Use, lease: Any) -> None:
    """Seconds and timedeltas become milliseconds in the record, and the ttl how long a result lives."""
    seen: list[Record | None] = []

    async def look() -> int:
        seen.append(await store.get(key_of(use)))
        return 5

    await use(idem, look, {"lease": lease, "ttl": 100})
    (record,) = seen
    assert record is not None
    assert (record.lease_ms, record.ttl_ms) == (500, 100_000)
    done = await store.get(key_of(use))
    assert done is not None
    assert done.expires_in is not None
    assert 99 < done.expires_in <= 100


async def test_the_defaults_are_half_a_minute_and_a_day(store: DownStore, idem: Idempotency) -> None:
    """A use without options has the object's, which has the defaults."""
    seen: list[Record | None] = []

    async def look() -> None:
        seen.append(await store.get("k"))

    await idem.run("k", look)
    (record,) = seen
    assert record is not None
    assert (record.lease_ms, record.ttl_ms) == (30_000, 86_400_000)


@pytest.mark.parametrize("use", USES)
def test_wait_is_overridden(use: Use) -> None:
    """By default a duplicate is refused at once; with a wait it is refused after it."""

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        store = DownStore(loop.time)
        idem, waited = Idempotency(store), [loop.time()]
        assert isinstance(await store.claim(key_of(use), lease=60), Claimed)
        with pytest.raises(InProgressError) as refused:
            await use(idem, five, {"lease": 20})
        assert not isinstance(refused.value, WaitTimeoutError)
        waited.append(loop.time())
        with pytest.raises(WaitTimeoutError):
            await use(idem, five, {"wait": timedelta(seconds=7)})
        waited.append(loop.time())
        await store.aclose()
        return waited

    assert run_virtual(main()) == [0, 0, pytest.approx(7)]


@pytest.mark.parametrize("use", OVERRIDES)
async def test_not_waiting_overrides_a_wait(store: DownStore, use: Use) -> None:
    """None is an override like others."""
    idem = Idempotency(store, wait=60)
    assert isinstance(await store.claim(key_of(use)), Claimed)
    with pytest.raises(InProgressError) as refused:
        await use(idem, five, {"wait": None})
    assert not isinstance(refused.value, WaitTimeoutError)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("renew", [True, False])
def test_renew_is_overridden(use: Use, renew: bool) -> None:
    """A handler of many leases keeps its key only while it is renewed."""

    async def main() -> tuple[object, int]:
        store = MemoryStore(clock=asyncio.get_running_loop().time)
        idem, attempts = Idempotency(store, lease=3, renew=not renew), list[int]()

        async def long() -> int:
            await asyncio.sleep(10)
            claim = await store.claim(key_of(use), lease=3)
            if isinstance(claim, Claimed):
                attempts.append(claim.attempt)
                await store.release(claim)
            return 5

        if renew:
            result = await use(idem, long, {"renew": True, "lease": 3})
        else:
            with pytest.raises(LeaseLostError) as lost:
                await use(idem, long, {"renew": False, "lease": 3})
            result = lost.value.result
        await store.aclose()
        return result, len(attempts)

    assert run_virtual(main()) == (5, 0 if renew else 1)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("choice", "free"),
    [("release", True), ("keep", False), (lambda _error: "keep", False), (lambda _error: "release", True)],
)
async def test_on_failure_is_overridden(store: DownStore, idem: Idempotency, use: Use, choice: Any, free: bool) -> None:
    """A failure frees the key or keeps it, as the use says."""
    with pytest.raises(ValueError, match="declined"):
        await use(idem, declined, {"on_failure": choice})
    assert (await store.get(key_of(use)) is None) is free


@pytest.mark.parametrize(
    "choose", [lambda _error: 1 / 0, lambda _error: None, lambda _error: "retry"], ids=["raises", "None", "unknown"]
)
async def test_an_on_failure_that_fails_keeps_the_key(
    store: DownStore, idem: Idempotency, caplog: pytest.LogCaptureFixture, choose: Any
) -> None:
    """Of the two choices it is the one that cannot run an effect twice; the log says why."""
    with pytest.raises(ValueError, match="declined"):
        await idem.run("k", declined, on_failure=choose)
    assert await store.get("k") is not None
    assert [(record.getMessage(), record.levelno) for record in caplog.records] == [
        ("on_failure_failed", logging.ERROR)
    ]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("choice", "free"), [("keep", False), ("release", True), (None, False)])
async def test_on_cancel_is_overridden(store: DownStore, idem: Idempotency, use: Use, choice: Any, free: bool) -> None:
    """A handler that was cancelled keeps its key unless the use says otherwise."""
    running = asyncio.Event()

    async def hang() -> int:
        running.set()
        await asyncio.Event().wait()
        return 5

    task = asyncio.ensure_future(use(idem, hang, {} if choice is None else {"on_cancel": choice}))
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await store.get(key_of(use)) is None) is free
    await store.aclose()


@pytest.mark.parametrize("use", USES)
async def test_on_store_error_is_overridden(
    store: DownStore, idem: Idempotency, use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that is down before the effect is an error, or the handler runs unprotected, with a warning."""
    store.down = {"claim"}
    with pytest.raises(StoreUnavailableError):
        await use(idem, five, {"lease": 20})
    assert caplog.messages == []
    assert await use(idem, five, {"on_store_error": "run"}) == 5
    assert caplog.messages == ["ran_unprotected"]


@pytest.mark.parametrize("use", USES)
def test_on_completion_error_is_overridden(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    """A store that is down after the effect costs a warning, or is an error that carries the result."""

    async def main() -> None:
        store = DownStore(asyncio.get_running_loop().time)
        idem = Idempotency(store)
        store.down = {"complete"}
        assert await use(idem, five, {"lease": 1}) == 5
        assert caplog.messages == ["completion_failed"]
        store.down = set()
        await store.aclose()
        assert await store.delete(key_of(use))
        store.down = {"complete"}
        with pytest.raises(CompletionError) as found:
            await use(idem, five, {"on_completion_error": "raise", "lease": 1})
        assert found.value.result == 5
        store.down = set()
        await store.aclose()

    run_virtual(main())


@pytest.mark.parametrize("use", OVERRIDES)
async def test_missing_key_is_overridden(
    store: DownStore, idem: Idempotency, use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing key is refused, or the handler runs each time, with a warning and no record."""
    with pytest.raises(MissingKeyError):
        await use(Idempotency(store, missing_key="run"), five, {"missing_key": "raise"})
    for _ in range(2):
        assert await use(idem, five, {"missing_key": "run"}) == 5
    assert caplog.messages == ["ran_unprotected"] * 2


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("classes", [ValueError, (KeyError, ValueError)])
async def test_replay_exceptions_are_overridden(idem: Idempotency, use: Use, classes: Any) -> None:
    """What the use names is stored and raised again; a use that does not name it gets a ReplayedError."""
    for _ in range(2):
        with pytest.raises(ValueError, match="declined"):
            await use(idem, declined, {"replay_exceptions": classes})
    with pytest.raises(ReplayedError, match="declined"):
        await use(idem, five, {"replay_exceptions": ()})


@pytest.mark.parametrize("use", USES)
async def test_codecs_are_overridden(store: DownStore, idem: Idempotency, use: Use) -> None:
    """A use may store with another codec than the object's."""

    class Reversed(JSONCodec):
        def encode(self, value: object) -> str:
            return super().encode(value)[::-1]

        def decode(self, text: str, annotation: Any) -> Any:
            return super().decode(text[::-1], annotation)

    async def handler() -> list[int]:
        return [12]

    for _ in range(2):
        assert await use(idem, handler, {"codec": Reversed()}) == [12]
    record = await store.get(key_of(use))
    assert record is not None
    assert record.data == "]21["


@pytest.mark.parametrize("use", USES)
async def test_map_replay_is_overridden(store: DownStore, use: Use) -> None:
    """A use may map its replays, or leave them as they are where the object maps them."""
    idem = Idempotency(store, map_replay=lambda *_: "object's")
    mapped: dict[str, Any] = {"map_replay": lambda result, record: [result, record.key]}
    assert await use(idem, five, {"map_replay": None}) == 5
    assert await use(idem, five, mapped) == [5, key_of(use)]
    assert await use(idem, five, {"map_replay": None}) == 5


async def test_an_override_leaves_the_others_as_they_are(store: DownStore) -> None:
    """One option given where it is used does not bring back the defaults of the rest."""
    codec = PydanticCodec()
    idem = Idempotency(
        store,
        lease=5,
        ttl=50,
        wait=1,
        renew=False,
        on_failure="keep",
        on_cancel="release",
        on_store_error="run",
        on_completion_error="raise",
        missing_key="run",
        replay_exceptions=KeyError,
        codec=codec,
        map_replay=repr,  # type: ignore[arg-type]
    )
    changed = idem.operation("k", lease=7)._options
    before = idem._options
    names = [name for name in before._fields if getattr(changed, name) != getattr(before, name)]
    assert (names, changed.lease_ms, before.lease_ms) == (["lease_ms"], 7000, 5000)
    assert (before.ttl_ms, before.wait, before.replay_exceptions, before.codec) == (50_000, 1.0, (KeyError,), codec)


async def test_a_local_cache_answers_without_the_store(store: DownStore) -> None:
    """As many results as it says are kept in process; the events say where a replay came from."""
    seen: list[Event] = []
    idem = Idempotency(store, local_cache=1, hooks=[seen.append])
    await idem.run("a", five)
    assert await idem.run("a", five) == 5
    await idem.run("b", five)
    assert await idem.run("a", five) == 5
    assert [event.source for event in seen if event.name == "replayed"] == ["local_cache", "store"]


async def test_hooks_are_told_in_their_order(store: DownStore) -> None:
    """Each hook gets each event."""
    seen: list[tuple[int, str]] = []
    hooks: list[Any] = [lambda event: seen.append((1, event.name)), lambda event: seen.append((2, event.name))]
    await Idempotency(store, hooks=hooks).run("k", five)
    assert seen == [(1, "claimed"), (2, "claimed"), (1, "completed"), (2, "completed")]


def test_the_constructor_takes_no_unknown_option(store: DownStore) -> None:
    """A misspelt option of the constructor is the TypeError of every Python function."""
    with pytest.raises(TypeError, match="leese"):
        Idempotency(store, leese=5)  # type: ignore[call-arg]
