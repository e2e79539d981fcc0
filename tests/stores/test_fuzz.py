"""Whatever stands under a key, and whatever a key is: a documented outcome, or a takeover, in memory and on a server."""

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncidem import (
    Claimed,
    CodecError,
    Idempotency,
    InProgress,
    InProgressError,
    InvalidKeyError,
    MemoryStore,
    Mismatch,
    MissingKeyError,
    Record,
    RedisStore,
    Replay,
    ReplayedError,
    ResultUnavailableError,
    State,
    Store,
    StoreError,
)
from asyncidem.keys import lock_of, stored_form

TTL: Final = 60_000

GOLDEN: Final = [
    json.loads(line)["record"].encode()
    for file in (Path(__file__).parent.parent / "golden").glob("*.jsonl")
    for line in file.read_text(encoding="utf-8").splitlines()
]

# Times and counts as they are, and as no writer in its right mind has them.
edges = st.sampled_from(
    [0, 1, -1, 1_700_000_000, 2**63, -(2**63), 10**400, 1e308, math.inf, -math.inf, math.nan, True, "1"]
)
numbers = edges | st.integers() | st.floats()
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
# Records with every attribute as it may be, and as it may not.
records = st.fixed_dictionaries(
    {"status": st.sampled_from(["INPROGRESS", "COMPLETED", "COMPLETED", "EXPIRED"]) | anything},
    optional={
        "owner": st.sampled_from(["0123456789abcdef0123456789abcdef", ""]) | anything,
        "expiration": numbers | anything,
        "in_progress_expiration": numbers | anything,
        "validation": st.sampled_from(["f", "g"]) | anything,
        "data": st.sampled_from(["1", "!", "[", ""]) | anything,
        "lease": numbers | anything,
        "ttl": numbers | anything,
        "attempt": numbers | anything,
        "outcome": st.sampled_from(["exception", "unavailable", "too_large", "new"]) | anything,
        "error": st.sampled_from(["{}", '{"type": "builtins.ValueError"}', "["]) | anything,
    },
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Golden records of which a part was lost, or is another."""
    golden = draw(st.sampled_from(GOLDEN))
    start = draw(st.integers(0, len(golden)))
    end = draw(st.integers(start, len(golden)))
    return golden[:start] + draw(st.binary(max_size=8) | st.just(b'"') | st.just(b"9" * 5000)) + golden[end:]


texts = st.builds(
    lambda item, pair: json.dumps(item, separators=pair).encode(), records, st.sampled_from([None, (",", ":")])
)
values = st.one_of(
    st.binary(max_size=64), damaged(), texts, texts, st.builds(lambda item: json.dumps(item).encode(), anything)
)


class Stores:
    """A store in memory and one on a server, on one loop, with a new name for each try."""

    def __init__(self, url: str) -> None:
        self.runner = asyncio.Runner()
        self.each: tuple[Store, Store] = (MemoryStore(prefix="t:"), RedisStore.from_url(url, prefix="t:", timeout=20))
        self.tries = 0

    def key(self) -> str:
        """Return a key that nobody has used."""
        self.tries += 1
        return f"{self.tries}"

    def close(self) -> None:
        """Close all."""
        for store in self.each:
            self.runner.run(store.aclose())
        self.runner.close()


@pytest.fixture
def stores(redis_url: str) -> Iterator[Stores]:
    """Both stores, empty."""
    stores = Stores(redis_url)
    yield stores
    stores.close()


async def bytes_at(store: Store, key: str) -> bytes | None:
    """Return what is stored."""
    stored = await store.read(f"t:{key}")
    return None if stored is None else stored.value


async def claimed_over(store: Store, key: str, value: bytes) -> str:
    """Claim a key where such a value is; return what came out, in a word."""
    assert await store.put_if_absent(f"t:{key}", value, TTL) is None
    try:
        assert isinstance(await store.get(key), Record | None)
    except StoreError as refusal:
        with pytest.raises(type(refusal)):
            await store.claim(key, lease=10, fingerprint="f")
        assert await bytes_at(store, key) == value
        return type(refusal).__name__
    claim = await store.claim(key, lease=10, fingerprint="f")
    if isinstance(claim, Claimed):
        assert claim.attempt > 1, "somebody was there"
        await store.complete(claim, "1")
        record = await store.get(key)
        assert record is not None
        assert (record.state, record.data, record.attempt) == (State.COMPLETED, "1", claim.attempt)
    else:
        assert isinstance(claim, Replay | InProgress | Mismatch)
        assert await bytes_at(store, key) == value
    return type(claim).__name__


async def ran_over(store: Store, key: str, value: bytes) -> str:
    """Run an operation where such a value is; return what came out."""
    assert await store.put_if_absent(f"t:{key}", value, TTL) is None
    ran = 0

    async def handler() -> str:
        nonlocal ran
        ran += 1
        return "mine"

    word = "returned"
    try:
        result = await Idempotency(store).run(key, handler, replay_exceptions=(ValueError,))
    except (InProgressError, ResultUnavailableError, CodecError, StoreError, ReplayedError, ValueError) as error:
        word = type(error.__cause__ if isinstance(error.__cause__, ReplayedError) else error).__name__
    else:
        assert ran == (result == "mine" and await bytes_at(store, key) != value)
    assert word not in ("ValueError", "StoreUnavailableError"), "of the handler's errors only what was stored is raised"
    if word != "returned":
        assert ran == 0
        assert await bytes_at(store, key) == value
    return word


async def deleted_over(store: Store, key: str, value: bytes) -> str:
    """Delete a key where such a value is: whatever it is, an operator can, and the next claim may have it."""
    assert await store.put_if_absent(f"t:{key}", value, TTL) is None
    assert await store.delete(key)
    claim = await store.claim(key)
    assert isinstance(claim, Claimed)
    return str(claim.attempt)


@pytest.mark.timeout(300)  # a failure takes its time to be made small
@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
@pytest.mark.parametrize("act", [claimed_over, ran_over, deleted_over])
def test_any_bytes_under_a_key(stores: Stores, act: Any) -> None:
    """They are a documented outcome and stay, or an orphan and are taken over; in memory and on a server alike."""

    @settings(max_examples=max(50, settings.default.max_examples // 2), deadline=None)
    @given(values)
    @example(b"")
    @example(b"[" * 100_000)
    @example(b'{"status": "INPROGRESS", "attempt": ' + b"9" * 5000 + b"}")
    def check(value: bytes) -> None:
        key = stores.key()
        words = {stores.runner.run(act(store, key, value)) for store in stores.each}
        assert len(words) == 1, words
        assert "StoreUnavailableError" not in words, "it is there"

    check()


# With what is no UTF-8, and in the forms of the keys that stores have for themselves.
keys = st.one_of(
    st.text(),
    st.text(st.characters()),
    st.builds(
        lambda text, tail: text + tail,
        st.text(max_size=10),
        st.sampled_from([":lock", "\ud800", "\x00", "\r\n", "}{", "*"]),
    ),
    st.builds(lambda text, times: text * times, st.text(min_size=1, max_size=20), st.integers(1, 200)),
)


async def lived(store: Store, key: str, other: str) -> None:
    """Go through the life of a key while another one is held."""
    await store.put_if_absent("t:other", b"x", TTL)
    neighbour = await store.claim(other)
    claim = await store.claim(key, fingerprint="f")
    assert isinstance(neighbour, Claimed)
    assert isinstance(claim, Claimed)
    assert (claim.key, claim.attempt) == (key, 1)
    record = await store.get(key)
    assert record is not None
    assert (record.key, record.state, record.owner) == (key, State.INPROGRESS, claim.owner)
    assert isinstance(await store.claim(key), InProgress)
    await store.renew(claim)
    await store.complete(claim, '"done"')
    assert await Idempotency(store).run(key, asyncio.sleep, 0, "not run") == "done"
    assert await store.delete(key)
    assert await store.get(key) is None
    assert isinstance(await store.claim(key), Claimed)
    assert await store.delete(key)
    # Its orphan is taken over under a lock, whose key is nobody's.
    assert await Idempotency(store).run(key, asyncio.sleep, 0, "run") == "run"
    assert await store.delete(key)
    await store.remove(
        lock_of(f"t:{stored_form(key)}"), b"", exact=False
    )  # it would last for the next try of the same key
    record = await store.get(other)
    assert record is not None
    assert record.owner == neighbour.owner
    await store.release(neighbour)


async def refused(store: Store, key: Any, error: type[Exception]) -> None:
    """See that every way to use a key refuses it."""
    for call in (store.claim, store.get, store.delete):
        with pytest.raises(error):
            await call(key)
    with pytest.raises(error):
        await Idempotency(store).run(key, asyncio.sleep, 0)
    with pytest.raises(error):
        Idempotency(store).operation(key)


@pytest.mark.timeout(300)  # a failure takes its time to be made small
@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_any_text_is_a_key(stores: Stores) -> None:
    """What is UTF-8 lives its life and leaves its neighbours alone; of the rest nothing is sent."""

    @settings(max_examples=max(50, settings.default.max_examples // 2), deadline=None)
    @given(keys)
    @example("")
    @example("\ud800")
    @example("a:lock")
    @example("k" * 513)
    def check(key: str) -> None:
        error = (
            MissingKeyError if not key else InvalidKeyError if any("\ud800" <= one <= "\udfff" for one in key) else None
        )
        for store in stores.each:
            if error is not None:
                stores.runner.run(refused(store, key, error))
                continue
            for other in (key + "x", key + ":lock", key[:-1] or "y", key.swapcase()):
                if other != key:
                    stores.runner.run(lived(store, key, other))

    check()


@given(anything | st.binary() | st.tuples(st.text()) | st.builds(object))
def test_what_is_no_text_is_no_key(key: Any) -> None:
    """Numbers, containers and other objects are refused by their type, or as missing, by every way to use a key."""
    store = MemoryStore()

    async def check() -> None:
        if isinstance(key, str):
            return
        for call in (store.claim, store.get, store.delete):
            with pytest.raises((InvalidKeyError, MissingKeyError)):
                await call(key)
        with pytest.raises((InvalidKeyError, MissingKeyError)):
            await Idempotency(store).run(key, asyncio.sleep, 0)
        assert store._values == {}

    asyncio.run(check())
