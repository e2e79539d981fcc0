"""Every store gives the same four atomic primitives over opaque bytes."""

import asyncio

import pytest

from asyncidem import StoreError, StoreUnavailableError
from asyncidem.model import LEFT_UNKNOWN, Swap

from stores.stores_under_test import FAKES, GUARDED, KINDS, OLD, PREFIX, SERVERS, Subject

MINUTE = 60_000
K = PREFIX + "k"
WITH_PERSIST = [kind for kind in KINDS if kind != "memory"]


def about(left_ms: int | None, ttl_ms: int) -> bool:
    """Whether so much is left of a ttl that was set a moment ago."""
    return left_ms is not None and ttl_ms - 5_000 < left_ms <= ttl_ms


async def test_put_writes_where_nothing_is(subject: Subject) -> None:
    """A value is written for its ttl where the key is absent, by the first put and by the next one."""
    for key in ("a", "b"):
        assert await subject.store.put_if_absent(PREFIX + key, b"mine", MINUTE) is None
        assert await subject.raw(key) == b"mine"
        assert about(await subject.left(key), MINUTE)


@pytest.mark.parametrize("there", [b"theirs", b""])
async def test_put_changes_nothing_that_is_there(subject: Subject, there: bytes) -> None:
    """A put over a value, even an empty one, returns its bytes and leaves them and their ttl alone."""
    await subject.write("k", there, MINUTE)
    for _ in range(2):
        assert await subject.store.put_if_absent(K, b"mine", 2 * MINUTE) == there
        assert await subject.store.put_if_absent(K + "2", b"warm", MINUTE) in (None, b"warm")
    assert await subject.raw("k") == there
    assert about(await subject.left("k"), MINUTE)


async def test_put_or_read(subject: Subject) -> None:
    """Put or read writes where nothing is; else it returns what is there, with its time left if one trip can tell."""
    store = subject.store
    assert await store.put_or_read(PREFIX + "warm", b"x", MINUTE) is None
    assert await store.put_or_read(K, b"mine", MINUTE) is None
    assert about(await subject.left("k"), MINUTE)
    found = await store.put_or_read(K, b"other", 2 * MINUTE)
    assert found is not None
    assert found.value == b"mine"
    if subject.kind in OLD or not subject.ages:
        assert found.left_ms == LEFT_UNKNOWN
    else:
        assert about(found.left_ms, MINUTE)
    assert await subject.raw("k") == b"mine"


async def test_read(subject: Subject) -> None:
    """A read returns the bytes and the milliseconds they have left, or None."""
    assert await subject.store.read(K) is None
    await subject.write("k", b"\x00\xff\r\n", MINUTE)
    stored = await subject.store.read(K)
    assert stored is not None
    assert stored.value == b"\x00\xff\r\n"
    assert about(stored.left_ms, MINUTE) if subject.ages else stored.left_ms == LEFT_UNKNOWN


@pytest.mark.parametrize("subject", WITH_PERSIST, indirect=True)
async def test_values_without_expiry_say_so(subject: Subject) -> None:
    """What never expires has None left, in a read and in a put or read."""
    await subject.write("k", b"for ever", None)
    expected = None if subject.ages else LEFT_UNKNOWN
    stored = await subject.store.read(K)
    assert stored is not None
    assert stored.left_ms == expected
    await subject.store.put_if_absent(PREFIX + "warm", b"x", MINUTE)
    found = await subject.store.put_or_read(K, b"mine", MINUTE)
    assert found is not None
    assert found.left_ms == (LEFT_UNKNOWN if subject.kind in OLD else expected)


async def test_expired_values_are_absent(subject: Subject) -> None:
    """A value whose time is over is not read, and can be put again."""
    await subject.write("k", b"old", MINUTE)
    await subject.age("k", 2 * MINUTE) if subject.ages else await subject.drop("k")
    assert await subject.store.read(K) is None
    assert await subject.store.put_if_absent(K, b"new", MINUTE) is None


SWAPS = [
    # what is there, what is expected, exact, or_absent, whether it is written
    (b"abc", b"abc", False, False, True),
    (b"abc", b"ab", False, False, True),
    (b"abc", b"", False, False, True),
    (b"abc", b"b", False, True, False),
    (b"abc", b"abcd", False, True, False),
    (b"a%ab", b"a%a", False, False, True),
    (b"axb", b"a.", False, True, False),
    (b"abc", b"abc", True, False, True),
    (b"abc", b"ab", True, True, False),
    (b"abc", b"abcd", True, True, False),
    (b"", b"a", True, True, False),
    (b"", b"", True, False, True),
    (b"\x00\xffz", b"\x00\xff", False, False, True),
    (None, b"abc", False, False, False),
    (None, b"abc", True, False, False),
    (None, b"abc", False, True, True),
    (None, b"abc", True, True, True),
]


async def test_swap_compares(subject: Subject) -> None:
    """A swap writes for its ttl if the comparison holds; if not, it says what is there and changes nothing."""
    for number, case in enumerate(SWAPS):
        there, expected, exact, or_absent, written = case
        key = f"k{number}"
        if there is not None:
            await subject.write(key, there, MINUTE)
        swap = await subject.store.swap(PREFIX + key, expected, b"new", 2 * MINUTE, exact=exact, or_absent=or_absent)
        assert swap == (Swap(True) if written else Swap(False, there)), case
        assert await subject.raw(key) == (b"new" if written else there), case
        if written or there is not None:
            assert about(await subject.left(key), 2 * MINUTE if written else MINUTE), case


@pytest.mark.parametrize(("left", "limit", "written"), [(60_000, 30_000, False), (30_000, 60_000, True)])
async def test_swap_is_stopped_by_a_longer_life(subject: Subject, left: int, limit: int, written: bool) -> None:
    """With `left_ms`, bytes that have more time left than that were written again, and are not replaced."""
    await subject.write("k", b"same", left)
    swap = await subject.store.swap(K, b"same", b"new", MINUTE, exact=True, or_absent=False, left_ms=limit)
    written = written or not subject.ages  # who cannot tell does not look
    assert swap == (Swap(True) if written else Swap(False, b"same"))
    assert await subject.raw("k") == (b"new" if written else b"same")


async def test_swap_takes_what_was_just_read(subject: Subject) -> None:
    """The time left that a read reported lets a swap through: equal is not greater."""
    await subject.write("k", b"same", MINUTE)
    stored = await subject.store.read(K)
    assert stored is not None
    left = stored.left_ms if subject.ages else None
    assert (await subject.store.swap(K, b"same", b"new", MINUTE, exact=True, or_absent=False, left_ms=left)).written


async def test_left_ms_does_not_matter_where_nothing_is(subject: Subject) -> None:
    """A swap that may write over nothing does so whatever time left it allows."""
    assert (await subject.store.swap(K, b"x", b"new", MINUTE, exact=True, or_absent=True, left_ms=0)).written
    assert await subject.raw("k") == b"new"


REMOVES = [
    # what is there, what is expected, exact, whether it is removed
    (b"abc", b"abc", True, True),
    (b"abc", b"ab", True, False),
    (b"abc", b"ab", False, True),
    (b"abc", b"abc", False, True),
    (b"abc", b"b", False, False),
    (b"abc", b"abcd", False, False),
    (b"", b"", True, True),
    (b"", b"a", False, False),
    (None, b"", False, False),
    (None, b"abc", True, False),
]


@pytest.mark.parametrize("suffix", ["", ":lock"])
async def test_remove_compares(subject: Subject, suffix: str) -> None:
    """A remove deletes what the comparison holds for, and says whether it did; anything else stays."""
    for number, case in enumerate(REMOVES):
        there, expected, exact, removed = case
        key = f"k{number}{suffix}"
        if there is not None:
            await subject.write(key, there)
        assert await subject.store.remove(PREFIX + key, expected, exact=exact) is removed, case
        assert await subject.raw(key) == (None if removed else there), case


async def test_one_of_fifty_puts_wins(subject: Subject) -> None:
    """Of fifty concurrent puts one writes, and all others are told what it wrote."""
    stores = [subject.store, subject.another()]
    replies = await asyncio.gather(*(stores[n % 2].put_if_absent(K, b"%d" % n, MINUTE) for n in range(50)))
    winner = await subject.record()
    assert [n for n, reply in enumerate(replies) if reply is None] == [int(winner)]
    assert {reply for reply in replies if reply is not None} == {winner}


@pytest.mark.parametrize("there", [b"old", None])
async def test_one_of_fifty_swaps_wins(subject: Subject, there: bytes | None) -> None:
    """Of fifty concurrent swaps from the same value, or from none, one writes."""
    if there is not None:
        await subject.write("k", there)
    stores = [subject.store, subject.another()]
    swaps = await asyncio.gather(
        *(stores[n % 2].swap(K, b"old", b"%d" % n, MINUTE, exact=True, or_absent=there is None) for n in range(50))
    )
    winner = await subject.record()
    assert [n for n, swap in enumerate(swaps) if swap.written] == [int(winner)]
    assert {swap.found for swap in swaps if not swap.written} == {winner}


async def test_one_of_fifty_removes_deletes(subject: Subject) -> None:
    """Of fifty concurrent removes one says that it deleted."""
    await subject.write("k", b"old")
    stores = [subject.store, subject.another()]
    removed = await asyncio.gather(*(stores[n % 2].remove(K, b"old", exact=True) for n in range(50)))
    assert removed.count(True) == 1
    assert await subject.raw("k") is None


@pytest.mark.parametrize("subject", [kind for kind in KINDS if kind in GUARDED], indirect=True)
async def test_a_primitive_on_its_own_waits_for_the_lock(subject: Subject) -> None:
    """A guarded write that finds the lock taken waits until it is free, also outside of a call of the store."""
    await subject.store.put_if_absent(PREFIX + "warm", b"x", MINUTE)
    await subject.write("k:lock", b"somebody")
    put = asyncio.ensure_future(subject.store.put_if_absent(K, b"mine", MINUTE))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not put.done()
    await subject.drop("k:lock")
    assert await put is None
    assert await subject.raw("k") == b"mine"
    assert await subject.raw("k:lock") is None


async def test_large_values(subject: Subject) -> None:
    """A value of 200 kB goes in and out unharmed through every primitive."""
    large = bytes(range(256)) * 800
    assert await subject.store.put_if_absent(K, large, MINUTE) is None
    stored = await subject.store.read(K)
    assert stored is not None
    assert stored.value == large
    assert (await subject.store.swap(K, large, large[::-1], MINUTE, exact=True, or_absent=False)).written
    assert await subject.store.remove(K, large[::-1], exact=True)


@pytest.mark.parametrize("subject", [*SERVERS, *FAKES], indirect=True)
async def test_another_type_is_refused(subject: Subject) -> None:
    """A key of another Redis type is a StoreError that says so, from every primitive, and stays what it is."""
    store = subject.store
    await subject.client.rpush(K, "x")  # type: ignore[attr-defined]
    calls = (
        lambda: store.put_if_absent(K, b"mine", MINUTE),
        lambda: store.put_or_read(K, b"mine", MINUTE),
        lambda: store.read(K),
        lambda: store.swap(K, b"", b"mine", MINUTE, exact=False, or_absent=True),
        lambda: store.remove(K, b"", exact=False),
    )
    await store.put_if_absent(PREFIX + "warm", b"x", MINUTE)  # finds out what the server can
    for call in calls:
        with pytest.raises(StoreError, match="another Redis type") as caught:
            await call()
        assert not isinstance(caught.value, StoreUnavailableError)
        assert caught.value.__cause__ is not None
    assert await subject.client.lrange(K, 0, -1) == [b"x"]  # type: ignore[attr-defined]
