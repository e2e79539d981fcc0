"""What a store must do when several calls meet, when one is cancelled, and as a whole."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Final

from ..errors import LeaseLostError
from ..model import Claimed, InProgress, Replay, State, Stored, Swap
from ..stores.base import Store
from .bench import MINUTE, Bench, BreachError, expect, shown
from .checks import Check

__all__ = ["RACES"]

RACERS: Final = 8

ROUNDS: Final = 4
"""How often a race is run: what is not atomic shows in the first round on most stores, and in one of a few on the rest."""

PATIENCE: Final = (0, 1, 2, 3, 5, 8)
"""After how many turns of the loop a call is cancelled: before it begins, and at its first awaits."""

LEASE: Final = 0.1
"""Seconds of the lease whose end is waited for, of a store that is quick."""

PACES: Final = 10
"""How many primitives must fit into that lease: a claim that took a third of its lease renews it, and one that took all
of it is nobody's."""


def _put(key: str, value: bytes) -> Callable[[Store], Awaitable[bytes | None]]:
    return lambda store: store.put_if_absent(key, value, MINUTE)


def _swap(
    key: str, expected: bytes, value: bytes, *, exact: bool = True, or_absent: bool = False
) -> Callable[[Store], Awaitable[Swap]]:
    return lambda store: store.swap(key, expected, value, MINUTE, exact=exact, or_absent=or_absent)


def _remove(key: str, expected: bytes, *, exact: bool = True) -> Callable[[Store], Awaitable[bool]]:
    return lambda store: store.remove(key, expected, exact=exact)


async def _puts_race(bench: Bench) -> None:
    for _ in range(ROUNDS):
        key = bench.key()
        replies = await bench.race(_put(key, b"%d" % n) for n in range(RACERS))
        winners = [n for n, reply in enumerate(replies) if reply is None]
        expect(len(winners) == 1, f"of {RACERS} calls {len(winners)} wrote")
        winner = b"%d" % winners[0]
        await bench.stored(key, winner)
        others = {reply for reply in replies if reply is not None}
        expect(others == {winner}, f"{shown(winner)} was written, and others were told {shown(others)}")


async def _swaps_race(bench: Bench, *, absent: bool) -> None:
    for _ in range(ROUNDS):
        key = bench.key() if absent else await bench.seeded(b"old")
        # The exact swap of a takeover, and the swap of a renewal, which looks at the beginning alone.
        swaps = await bench.race(
            _swap(key, b"old" if n % 2 else b"o", b"new%d" % n, exact=n % 2 == 1, or_absent=absent)
            for n in range(RACERS)
        )
        winners = [n for n, swap in enumerate(swaps) if swap.written]
        expect(len(winners) == 1, f"of {RACERS} calls {len(winners)} wrote")
        winner = b"new%d" % winners[0]
        await bench.stored(key, winner)
        others = {swap.found for swap in swaps if not swap.written}
        expect(others == {winner}, f"{shown(winner)} was written, and others were told {shown(others)}")


async def _removes_race(bench: Bench) -> None:
    for _ in range(ROUNDS):
        key = await bench.seeded(b"old")
        removed = await bench.race(_remove(key, b"o", exact=False) for _ in range(RACERS))
        expect(removed.count(True) == 1, f"of {RACERS} calls {removed.count(True)} said that they deleted")
        await bench.stored(key, None)


async def _remove_meets_swap(bench: Bench, *, exact: bool) -> None:
    for number in range(2 * ROUNDS):
        key = await bench.seeded(b"old")
        calls: list[Callable[[Store], Awaitable[object]]] = [
            _remove(key, b"old" if exact else b"o", exact=exact),
            _swap(key, b"old" if exact else b"o", b"new", exact=exact),
        ]
        answers = await bench.race(calls if number % 2 else reversed(calls))
        (swap,) = (answer for answer in answers if isinstance(answer, Swap))
        (removed,) = (answer for answer in answers if not isinstance(answer, Swap))
        expect(
            swap.written is not removed, f"swap returned {shown(swap)}, and remove {shown(removed)}: one of them acts"
        )
        await bench.stored(key, b"new" if swap.written else None)


async def _put_meets_swap(bench: Bench, *, exact: bool) -> None:
    for number in range(ROUNDS):
        keys = [bench.key() for _ in range(RACERS // 2)]
        calls: list[Callable[[Store], Awaitable[object]]] = []
        for key in keys:
            both = [_put(key, b"put"), _swap(key, b"other", b"swapped", exact=exact, or_absent=True)]
            calls += both if number % 2 else reversed(both)
        answers = await bench.race(calls)
        for key, pair in zip(keys, zip(answers[::2], answers[1::2], strict=True), strict=True):
            put, swap = pair if number % 2 else reversed(pair)
            expect(isinstance(swap, Swap), f"swap returned {shown(swap)}, not a Swap")
            assert isinstance(swap, Swap)
            expect(
                (put is None) is not swap.written,
                f"put_if_absent returned {shown(put)}, and swap with or_absent {shown(swap)}: one of them writes",
            )
            await bench.stored(key, b"swapped" if swap.written else b"put")


async def _count(bench: Bench) -> None:
    """Let several count up one number, each by reading it and swapping it for the next."""
    key, counters, steps = await bench.seeded(b"0"), 4, 3

    async def count(store: Store) -> None:
        done = 0
        for _ in range(counters * steps):  # whoever fails does so because another one did not
            if done == steps:
                break
            stored = await store.read(key)
            expect(isinstance(stored, Stored), f"read returned {shown(stored)} for what nobody deletes")
            assert stored is not None
            following = b"%d" % (int(stored.value) + 1)
            swap = await store.swap(key, stored.value, following, MINUTE, exact=True, or_absent=False)
            done += swap.written
        expect(done == steps, f"of {counters * steps} steps of one of them only {done} were taken")

    await bench.race([count] * counters)
    await bench.stored(key, b"%d" % (counters * steps))


async def _cancelled(bench: Bench, call: Callable[[str, Store], Awaitable[object]]) -> None:
    for turns in PATIENCE:
        key = await bench.seeded(b"old")
        bench.names.append(f"{bench.names[-1]}:absent")

        async def begin(key: str = key) -> object:
            return await call(key, bench.first)

        task = asyncio.ensure_future(begin())
        for _ in range(turns):
            await asyncio.sleep(0)
        late = task.cancel()
        await asyncio.wait((task,))
        if late and not task.cancelled():
            error = task.exception()
            result = f"raised {error!r}" if error is not None else f"returned {shown(task.result())}"
            raise BreachError(f"cancelled after {turns} turns of the loop it {result}")
        # Whatever has become of it, nothing is held, and the key can be used.
        await bench.second.put_if_absent(key, b"new", MINUTE)
        await bench.first.swap(key, b"", b"newer", MINUTE, exact=False, or_absent=True)


async def _lifecycle(bench: Bench) -> None:
    key = bench.name()
    claim = await bench.first.claim(key, lease=30, ttl=60, fingerprint="f")
    expect(isinstance(claim, Claimed) and claim.attempt == 1, f"claim returned {claim!r}")
    assert isinstance(claim, Claimed)
    other = await bench.second.claim(key, lease=30, ttl=60, fingerprint="f")
    expect(isinstance(other, InProgress) and 25 < other.retry_after <= 30, f"the second claim returned {other!r}")
    await bench.first.renew(claim)
    await bench.first.complete(claim, '"done"', ttl=60)
    replay = await bench.second.claim(key, lease=30, ttl=60, fingerprint="f")
    expect(
        isinstance(replay, Replay) and replay.record.data == '"done"',
        f"a claim of what is complete returned {replay!r}",
    )
    record = await bench.second.get(key)
    expect(record is not None and record.state is State.COMPLETED, f"get returned {record!r}")
    deleted = await bench.second.delete(key)
    expect(deleted, "delete found nothing")
    record = await bench.first.get(key)
    expect(record is None, f"get returned {record!r} after delete")
    again = await bench.first.claim(key, lease=30, ttl=60)
    expect(isinstance(again, Claimed) and again.attempt == 1, f"a claim after delete returned {again!r}")
    assert isinstance(again, Claimed)
    await bench.first.release(again)
    record = await bench.second.get(key)
    expect(record is None, f"get returned {record!r} after release")


async def _claims_race(bench: Bench) -> None:
    key = bench.name()

    async def claim(store: Store) -> object:
        return await store.claim(key, lease=30, ttl=60)

    claims = await bench.race([claim] * RACERS)
    won = sum(isinstance(outcome, Claimed) for outcome in claims)
    expect(won == 1, f"of {RACERS} claims {won} won")


async def _taken_over(bench: Bench) -> None:
    key = bench.name()
    bench.names.append(f"{key}:lock")
    lease = max(LEASE, PACES * bench.pace)
    zombie = await bench.first.claim(key, lease=lease, ttl=60)
    assert isinstance(zombie, Claimed)
    await bench.pass_time(lease + 0.05)
    owner = await bench.second.claim(key, lease=30, ttl=60)
    expect(isinstance(owner, Claimed) and owner.attempt == 2, f"a claim after the lease's end returned {owner!r}")
    assert isinstance(owner, Claimed)
    try:
        await bench.first.complete(zombie, '"zombie"', ttl=60)
    except LeaseLostError:
        pass
    else:
        raise BreachError("the owner that was replaced could complete")
    await bench.second.complete(owner, '"done"', ttl=60)
    replay = await bench.first.claim(key, lease=30, ttl=60)
    expect(
        isinstance(replay, Replay) and replay.record.data == '"done"',
        f"a claim of what is complete returned {replay!r}",
    )


def _races() -> tuple[Check, ...]:
    part = functools.partial
    calls: dict[str, Callable[[str, Store], Awaitable[object]]] = {
        "put_if_absent": lambda key, store: _put(f"{key}:absent", b"x")(store),
        "read": lambda key, store: store.read(key),
        "swap": lambda key, store: _swap(key, b"old", b"new")(store),
        "remove": lambda key, store: _remove(key, b"old")(store),
    }
    return (
        Check("put_if_absent is atomic", _puts_race),
        Check("swap is atomic", part(_swaps_race, absent=False)),
        Check("swap is atomic where nothing is", part(_swaps_race, absent=True)),
        Check("remove is atomic", _removes_race),
        Check("remove and swap are atomic together", part(_remove_meets_swap, exact=True)),
        Check("remove and swap of a beginning are atomic together", part(_remove_meets_swap, exact=False)),
        Check("put_if_absent and swap are atomic together", part(_put_meets_swap, exact=True)),
        Check("put_if_absent and swap of a beginning are atomic together", part(_put_meets_swap, exact=False)),
        Check("counting by read and swap loses nothing", _count),
        *(Check(f"{name} can be cancelled", part(_cancelled, call=call)) for name, call in calls.items()),
        Check("a key is claimed, completed, replayed, deleted and released", _lifecycle),
        Check("one of many claims wins", _claims_race),
        Check("an orphan is taken over, and its old owner fenced off", _taken_over),
    )


RACES: Final = _races()
