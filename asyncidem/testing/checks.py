"""What each primitive must do when it is alone, and what time does."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, NamedTuple

from ..durations import MAX_MS
from ..model import LEFT_UNKNOWN, Stored, Swap
from ..stores.base import Store
from .bench import MINUTE, SLACK_MS, Bench, expect, shown

__all__ = ["CHECKS", "Check"]


class Check(NamedTuple):
    """One check: what a report calls it, and the coroutine function that makes it."""

    title: str
    make: Callable[[Bench], Coroutine[Any, Any, None]]


SOON: Final = 50
"""Milliseconds that a value lives whose end is waited for."""

VALUES: Final = {
    "no bytes": b"",
    "a zero byte": b"\x00",
    "every byte": bytes(range(256)),
    "no UTF-8": b'{"owner": "\xff\xfe\xc3"}',
    "ends of lines": b"\r\n \t\n\r",
    "digits": b"0123",
    "200 kB": bytes(range(256)) * 800,
}

LIKE: Final = {
    "another case": ("Key", "key"),
    "a space behind it": ("key", "key "),
    "a zero byte behind it": ("key", "key\x00"),
    "an accent in two forms": ("\u00e9", "e\u0301"),
    "what begins with it": ("key", "key:1"),
    "patterns": ("k*", "key"),
    "wildcards of SQL": ("k_y%", "kéy1"),
    "quotes": ("'key", "''key"),
    "digits": ("1", "01"),
    "the last of 500 bytes": ("k" * 470, "k" * 469 + "l"),
}


class Swapping(NamedTuple):
    """A swap of what is there, and whether it must write."""

    there: bytes | None
    expected: bytes
    exact: bool
    or_absent: bool
    written: bool


class Removing(NamedTuple):
    """A remove of what is there, and whether it must delete."""

    there: bytes | None
    expected: bytes
    exact: bool
    removed: bool


SWAPS: Final = (
    Swapping(b"abc", b"abc", False, False, True),
    Swapping(b"abc", b"ab", False, False, True),
    Swapping(b"abc", b"", False, True, True),
    Swapping(b"abc", b"b", False, True, False),
    Swapping(b"abc", b"abcd", False, True, False),
    Swapping(b"abc", b"aBc", False, True, False),
    Swapping(b"a%c", b"a%", False, False, True),
    Swapping(b"abc", b"a%", False, False, False),
    Swapping(b"abc", b"a.", False, False, False),
    Swapping(b"abc", b"a*", False, False, False),
    Swapping(b"abc", b"abc", True, False, True),
    Swapping(b"abc", b"ab", True, True, False),
    Swapping(b"abc", b"abcd", True, True, False),
    Swapping(b"", b"", True, False, True),
    Swapping(b"", b"", False, False, True),
    Swapping(b"", b"a", True, True, False),
    Swapping(b"\x00\xffz", b"\x00\xff", False, False, True),
    Swapping(b"\x00\xffz", b"\x00", True, True, False),
    Swapping(None, b"abc", False, False, False),
    Swapping(None, b"abc", True, False, False),
    Swapping(None, b"", False, False, False),
    Swapping(None, b"", True, False, False),
    Swapping(None, b"abc", False, True, True),
    Swapping(None, b"abc", True, True, True),
)

REMOVES: Final = (
    Removing(b"abc", b"abc", True, True),
    Removing(b"abc", b"ab", True, False),
    Removing(b"abc", b"abcd", True, False),
    Removing(b"abc", b"xyz", True, False),
    Removing(b"abc", b"ab", False, True),
    Removing(b"abc", b"abc", False, True),
    Removing(b"abc", b"", False, True),
    Removing(b"abc", b"b", False, False),
    Removing(b"abc", b"abcd", False, False),
    Removing(b"", b"", True, True),
    Removing(b"", b"a", False, False),
    Removing(None, b"", False, False),
    Removing(None, b"", True, False),
    Removing(None, b"abc", True, False),
)


REFUSED: Final[dict[str, Callable[[Store, str], Awaitable[object]]]] = {
    "put_if_absent": lambda store, key: store.put_if_absent(key, b"other", MINUTE),
    "put_or_read": lambda store, key: store.put_or_read(key, b"other", MINUTE),
    "read": lambda store, key: store.read(key),
    "swap of another value": lambda store, key: store.swap(key, b"other", b"new", MINUTE, exact=True, or_absent=True),
    "swap of another beginning": lambda store, key: store.swap(key, b"o", b"new", MINUTE, exact=False, or_absent=True),
    # The same value: a store that cannot tell the time left does not look at it, and writes.
    "swap with left_ms": lambda store, key: store.swap(
        key, b"mine", b"mine", MINUTE, exact=True, or_absent=False, left_ms=SOON
    ),
    "swap of a beginning with left_ms": lambda store, key: store.swap(
        key, b"m", b"mine", MINUTE, exact=False, or_absent=True, left_ms=SOON
    ),
    "remove of another value": lambda store, key: store.remove(key, b"other", exact=True),
    "remove of another beginning": lambda store, key: store.remove(key, b"o", exact=False),
}
"""What leaves the value b"mine" as it is, with its ttl: a record that is only asked for must still expire."""


async def _put_absent(bench: Bench) -> None:
    began = bench.now_ms()
    key = await bench.seeded(b"mine")
    await bench.lives(key, b"mine", MINUTE, began)


async def _put_present(there: bytes, bench: Bench) -> None:
    began = bench.now_ms()
    key = await bench.seeded(there)
    found = await bench.second.put_if_absent(key, b"other", 2 * MINUTE)
    expect(found == there and isinstance(found, bytes), f"it returned {shown(found)} over {shown(there)}")
    await bench.lives(key, there, MINUTE, began)


async def _put_or_read(bench: Bench) -> None:
    key, began = bench.key(), bench.now_ms()
    stored = await bench.first.put_or_read(key, b"mine", MINUTE)
    expect(stored is None, f"it returned {shown(stored)} where nothing was, not None")
    await bench.lives(key, b"mine", MINUTE, began)
    stored = await bench.second.put_or_read(key, b"other", 2 * MINUTE)
    expect(isinstance(stored, Stored), f"it returned {shown(stored)} over b'mine', not a Stored")
    assert stored is not None
    expect(stored.value == b"mine", f"it returned {shown(stored.value)} over b'mine'")
    bench.left_of(stored, MINUTE, began)
    await bench.lives(key, b"mine", MINUTE, began)


async def _read_absent(bench: Bench) -> None:
    key = bench.key()
    await bench.stored(key, None)
    await bench.seeded(b"mine", key=key)


async def _value_stays(value: bytes, bench: Bench) -> None:
    key = await bench.seeded(value)
    await bench.stored(key, value)
    found = await bench.second.put_if_absent(key, b"other", MINUTE)
    expect(found == value, f"put_if_absent returned {shown(found)} over {shown(value)}")
    swap = await bench.first.swap(key, b"other", b"new", MINUTE, exact=True, or_absent=False)
    expect(not swap.written and swap.found == value, f"swap returned {shown(swap)} over {shown(value)}")
    other = value[::-1] + b"!"
    swap = await bench.first.swap(key, value, other, MINUTE, exact=True, or_absent=False)
    expect(swap.written, f"swap did not take {shown(value)} for itself, and returned {shown(swap)}")
    await bench.stored(key, other)
    removed = await bench.first.remove(key, other, exact=True)
    expect(removed, f"remove did not take {shown(other)} for itself")


async def _keys_apart(one: str, other: str, bench: Bench) -> None:
    base = bench.key()
    keys = [f"{base}:{part}" for part in (one, other)]
    for key in keys:
        bench.names.append(key.removeprefix(bench.first.prefix))
        await bench.seeded(key.encode(), key=key)
    for key in keys:
        await bench.stored(key, key.encode())
    removed = await bench.first.remove(keys[0], b"", exact=False)
    expect(removed is True, f"remove of {shown(one)} returned {shown(removed)}")
    await bench.stored(keys[0], None)
    await bench.stored(keys[1], keys[1].encode())


async def _swaps(row: Swapping, bench: Bench) -> None:
    there, expected, exact, or_absent, written = row
    began = bench.now_ms()
    key = bench.key() if there is None else await bench.seeded(there)
    swap = await bench.first.swap(key, expected, b"new", 2 * MINUTE, exact=exact, or_absent=or_absent)
    expect(isinstance(swap, Swap), f"it returned {shown(swap)}, not a Swap")
    expect(swap.written is written, f"it returned {shown(swap)}, and must{'' if written else ' not'} write")
    if written:
        await bench.lives(key, b"new", 2 * MINUTE, began)
        return
    expect(swap.found == there, f"it found {shown(swap.found)}, where {shown(there)} is")
    if there is None:
        await bench.stored(key, None)
    else:
        await bench.lives(key, there, MINUTE, began)


async def _swap_shortens(bench: Bench) -> None:
    key, began = await bench.seeded(b"old", 2 * MINUTE), bench.now_ms()
    swap = await bench.first.swap(key, b"old", b"new", MINUTE, exact=True, or_absent=False)
    expect(swap.written, f"it returned {shown(swap)}")
    await bench.lives(key, b"new", MINUTE, began)


async def _swap_left(bench: Bench, *, limit: int | None, written: bool) -> None:
    key = await bench.seeded(b"same")
    stored = await bench.stored(key, b"same")
    assert stored is not None
    if stored.left_ms == LEFT_UNKNOWN:
        return  # who cannot tell does not look
    limit = stored.left_ms if limit is None else limit
    swap = await bench.second.swap(key, b"same", b"new", MINUTE, exact=True, or_absent=False, left_ms=limit)
    expect(
        swap.written is written and (written or swap.found == b"same"),
        f"it returned {shown(swap)} with left_ms={limit}, and {stored.left_ms} ms were left",
    )
    await bench.stored(key, b"new" if written else b"same")


async def _swap_left_compares(bench: Bench) -> None:
    key = await bench.seeded(b"same")
    swap = await bench.second.swap(key, b"other", b"new", MINUTE, exact=True, or_absent=True, left_ms=MINUTE)
    expect(not swap.written, f"it returned {shown(swap)}, and b'same' is there, not b'other'")


async def _swap_left_absent(bench: Bench) -> None:
    key = bench.key()
    swap = await bench.first.swap(key, b"x", b"new", MINUTE, exact=True, or_absent=True, left_ms=0)
    expect(swap.written, f"it returned {shown(swap)}, and nothing is there that could have time left")
    await bench.stored(key, b"new")


async def _removes(row: Removing, suffix: str, bench: Bench) -> None:
    there, expected, exact, removed = row
    key, began = bench.key() + suffix, bench.now_ms()
    bench.names.append(key.removeprefix(bench.first.prefix))
    if there is not None:
        await bench.seeded(there, key=key)
    answer = await bench.first.remove(key, expected, exact=exact)
    expect(answer is removed, f"it returned {shown(answer)}, not {removed}")
    if removed or there is None:
        await bench.stored(key, None)
        await bench.seeded(b"again", key=key)
    else:
        await bench.lives(key, there, MINUTE, began)


async def _longest_ttl(bench: Bench) -> None:
    began = bench.now_ms()
    key = await bench.seeded(b"old", MAX_MS)
    await bench.lives(key, b"old", MAX_MS, began)
    swap = await bench.first.swap(key, b"old", b"new", MAX_MS, exact=True, or_absent=False)
    expect(swap.written, f"swap returned {shown(swap)}")
    await bench.lives(key, b"new", MAX_MS, began)


async def _shortest_ttl(bench: Bench) -> None:
    key = await bench.seeded(b"old", 1)
    await _gone(bench, key)


async def _time_passes(bench: Bench) -> None:
    began = bench.now_ms()
    key = await bench.seeded(b"mine")
    await bench.pass_time(0.1)
    stored = await bench.stored(key, b"mine")
    assert stored is not None
    bench.left_of(stored, MINUTE, began)
    left = stored.left_ms
    assert left is not None
    expect(left <= MINUTE - 100 + SLACK_MS, f"it is said to have {left} ms left of {MINUTE} after 100 ms")


async def _refused_prolongs_nothing(bench: Bench) -> None:
    keys = [await bench.seeded(b"mine") for _ in REFUSED]
    await bench.pass_time(0.1)
    for key, (name, call) in zip(keys, REFUSED.items(), strict=True):
        await call(bench.second, key)
        stored = await bench.stored(key, b"mine")
        assert stored is not None
        left = stored.left_ms
        expect(
            left is not None and left <= MINUTE - 100 + SLACK_MS,
            f"{name} changed nothing, and began the ttl anew: {left} ms are left of {MINUTE} after 100 ms",
        )


async def _put_expires(bench: Bench) -> None:
    # A read may clear away what a put would still have found: the one that is put again was not read before.
    key, later = await bench.seeded(b"old", SOON), await bench.seeded(b"old", SOON)
    await _gone(bench, later)
    await bench.seeded(b"new", key=key)


async def _swap_expires(bench: Bench, *, or_absent: bool) -> None:
    key = bench.key() if or_absent else await bench.seeded(b"old")
    swap = await bench.first.swap(key, b"old", b"new", SOON, exact=True, or_absent=or_absent)
    expect(swap.written, f"it returned {shown(swap)}")
    await _gone(bench, key)


async def _swap_prolongs(bench: Bench) -> None:
    key = await bench.seeded(b"old", 2 * SOON)
    swap = await bench.first.swap(key, b"old", b"new", MINUTE, exact=True, or_absent=False)
    if swap.written:  # else it had expired on a busy machine
        await bench.pass_time(3 * SOON / 1000)
        await bench.stored(key, b"new")


async def _expired_is_absent(bench: Bench) -> None:
    keys = [await bench.seeded(b"old", SOON) for _ in range(3)]
    await _gone(bench, await bench.seeded(b"later", SOON))
    swap = await bench.first.swap(keys[0], b"old", b"new", MINUTE, exact=True, or_absent=False)
    expect(not swap.written and swap.found is None, f"swap returned {shown(swap)} over what has expired")
    swap = await bench.first.swap(keys[1], b"x", b"new", MINUTE, exact=True, or_absent=True, left_ms=0)
    expect(swap.written, f"swap returned {shown(swap)} over what has expired, with or_absent")
    removed = await bench.first.remove(keys[2], b"old", exact=True)
    expect(removed is False, f"remove returned {shown(removed)} for what has expired")


async def _gone(bench: Bench, key: str) -> None:
    """Let time pass until a value that was given ``SOON`` is gone; a store may be a second late."""
    stored: Stored | None = None
    for seconds in (SOON / 1000 + 0.005, 0.05, 0.3, 0.65):
        await bench.pass_time(seconds)
        stored = await bench.second.read(key)
        if stored is None:
            return
    expect(stored is None, f"{shown(stored)} is still there a second after its end")


def _checks() -> tuple[Check, ...]:
    part = functools.partial
    return (
        Check("put_if_absent writes where nothing is, for its ttl", _put_absent),
        Check("put_if_absent changes nothing that is there", part(_put_present, b"theirs")),
        Check("put_if_absent changes nothing that is there, be it empty", part(_put_present, b"")),
        Check("put_or_read does what put_if_absent does", _put_or_read),
        Check("read finds nothing where nothing is", _read_absent),
        *(Check(f"a value stays what it is: {what}", part(_value_stays, value)) for what, value in VALUES.items()),
        *(Check(f"keys are kept apart: {what}", part(_keys_apart, *pair)) for what, pair in LIKE.items()),
        *(
            Check(
                f"swap where {row.there!r} is, of {row.expected!r}, exact={row.exact}, or_absent={row.or_absent}",
                part(_swaps, row),
            )
            for row in SWAPS
        ),
        Check("swap gives a shorter ttl too", _swap_shortens),
        Check("swap with left_ms writes over less time left", part(_swap_left, limit=2 * MINUTE, written=True)),
        Check(
            "swap with left_ms writes over as much time left as was read", part(_swap_left, limit=None, written=True)
        ),
        Check(
            "swap with left_ms does not write over more time left", part(_swap_left, limit=MINUTE // 2, written=False)
        ),
        Check("swap with left_ms still compares", _swap_left_compares),
        Check("swap with left_ms writes where nothing is", _swap_left_absent),
        *(
            Check(
                f"remove where {row.there!r} is, of {row.expected!r}, exact={row.exact}{' (a lock)' if suffix else ''}",
                part(_removes, row, suffix),
            )
            for suffix in ("", ":lock")
            for row in REMOVES
        ),
        Check("a ttl of a century", _longest_ttl),
        Check("a ttl of a millisecond", _shortest_ttl),
        Check("the time left grows less", _time_passes),
        Check("what is refused or read lives no longer for it", _refused_prolongs_nothing),
        Check("what put_if_absent wrote expires, and can be put again", _put_expires),
        Check("what swap wrote expires", part(_swap_expires, or_absent=False)),
        Check("what swap wrote over nothing expires", part(_swap_expires, or_absent=True)),
        Check("what swap wrote lives on where the old value would have expired", _swap_prolongs),
        Check("what has expired is absent to swap and remove", _expired_is_absent),
    )


CHECKS: Final = _checks()
