"""Random sequences of commands come out alike on a model, in memory, and on a server.

Time passes by hand on all three: a model's number, a manual clock, and a script that makes every key of the server older.
All durations are multiples of ten seconds, so that the moments that a run really takes decide nothing.
"""

import asyncio
import itertools
from collections.abc import Coroutine, Iterator
from typing import Any, Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from asyncidem import (
    Claimed,
    InProgress,
    LeaseLostError,
    MemoryStore,
    Mismatch,
    Record,
    RedisStore,
    Replay,
    Store,
)
from asyncidem.testing import ManualClock

from stores.lifecycle_model import Model, ModelClaim, Outcome

AGE: Final = """
for _, key in ipairs(redis.call('keys', ARGV[1] .. '*')) do
    local left = redis.call('pttl', key) - ARGV[2]
    if left > 0 then redis.call('pexpire', key, left) else redis.call('del', key) end
end
"""
DRIFT: Final = 5.0
"""Seconds that a number of the server may be off: it goes on while a sequence runs."""

KEYS: Final = st.sampled_from(["a", "a", "b"])
LEASES: Final = st.sampled_from([10, 30])
TTLS: Final = st.sampled_from([10, 20, 100])
MARKS: Final = st.sampled_from([None, None, "f", "g"])


class World:
    """The two stores that are held against the model, with data that all sequences share, each under names of its own."""

    def __init__(self, url: str) -> None:
        self.runner = asyncio.Runner()
        self.clock = ManualClock()
        clocks: dict[str, Any] = {"clock": self.clock.monotonic, "wall": self.clock.wall}
        self.memory = MemoryStore(prefix="t:", **clocks)
        self.server = RedisStore.from_url(url, prefix="t:", timeout=20, **clocks)
        self.sequences = itertools.count()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do work on the loop that all of it shares."""
        return self.runner.run(work)

    def close(self) -> None:
        """Close both stores and the loop."""
        self.run(self.server.aclose())
        self.runner.close()


class Machine(RuleBasedStateMachine):
    """The sequences: claims of several keys, which are settled at any time, by whoever still or no longer owns them."""

    claims = Bundle("claims")

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.model = Model()
        self.scope = f"{next(world.sequences)}:"
        self.keys: set[str] = set()

    @rule(target=claims, key=KEYS, lease=LEASES, ttl=TTLS, mark=MARKS)
    def claim(self, key: str, lease: int, ttl: int, mark: str | None) -> Any:
        self.keys.add(key)
        expected, model = self.model.claim(key, lease, ttl, mark)
        made = [
            self.world.run(store.claim(self.scope + key, lease=lease, ttl=ttl, fingerprint=mark))
            for store in self.stores
        ]
        self.compare(expected, [outcome_of(one) for one in made])
        return multiple() if model is None else (model, made)

    @precondition(lambda self: self.keys)
    @rule(target=claims, key=KEYS, mark=MARKS)
    def take_over(self, key: str, mark: str | None) -> Any:
        self.pass_time(30)
        return self.claim(key, 30, 100, mark)

    @rule(claim=claims)
    def renew(self, claim: tuple[ModelClaim, list[Claimed]]) -> None:
        self.settle(self.model.renew(claim[0]), claim, lambda store, mine: store.renew(mine))

    @rule(claim=claims, data=st.sampled_from(["1", '"x"', "[]"]), ttl=st.none() | TTLS)
    def complete(self, claim: tuple[ModelClaim, list[Claimed]], data: str, ttl: int | None) -> None:
        expected = self.model.complete(claim[0], data, ttl)
        self.settle(expected, claim, lambda store, mine: store.complete(mine, data, ttl=ttl))

    @rule(claim=claims)
    def release(self, claim: tuple[ModelClaim, list[Claimed]]) -> None:
        self.settle(self.model.release(claim[0]), claim, lambda store, mine: store.release(mine))

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        expected = self.model.delete(key)
        self.compare(expected, [("deleted", self.world.run(store.delete(self.scope + key))) for store in self.stores])

    @rule(key=KEYS)
    def drop(self, key: str) -> None:
        self.model.drop(key)
        for store in self.stores:
            self.world.run(store.remove(f"t:{self.scope}{key}", b"", exact=False))

    @rule(key=KEYS, ttl=TTLS, value=st.sampled_from([b"", b"{}", b"garbage", b"[1]"]))
    def garble(self, key: str, ttl: int, value: bytes) -> None:
        self.keys.add(key)
        self.model.garble(key, ttl)
        for store in self.stores:
            name = f"t:{self.scope}{key}"
            self.world.run(store.swap(name, b"", value, ttl * 1000, exact=False, or_absent=True))

    @precondition(lambda self: self.keys)
    @rule(seconds=st.sampled_from([10, 20, 30]))
    def pass_time(self, seconds: int) -> None:
        self.model.now += seconds
        self.world.clock.advance(seconds)
        client: Any = self.world.server._client
        self.world.run(client.eval(AGE, 0, f"t:{self.scope}", seconds * 1000))

    @invariant()
    def all_hold_the_same(self) -> None:
        for key in self.keys:
            records = [self.world.run(store.get(self.scope + key)) for store in self.stores]
            self.compare(self.model.get(key), [outcome_of(record) for record in records])

    @property
    def stores(self) -> tuple[Store, Store]:
        return self.world.memory, self.world.server

    def settle(self, expected: Outcome, claim: tuple[ModelClaim, list[Claimed]], act: Any) -> None:
        """Let the owner of a claim do something on both stores."""

        async def outcome(store: Store, mine: Claimed) -> Outcome:
            try:
                await act(store, mine)
            except LeaseLostError:
                return ("lost",)
            return ("done",)

        pairs = zip(self.stores, claim[1], strict=True)
        self.compare(expected, [self.world.run(outcome(store, mine)) for store, mine in pairs])

    def compare(self, expected: Outcome, seen: list[Outcome]) -> None:
        """Hold what both stores said against the model."""
        for name, outcome in zip(("memory", "server"), seen, strict=True):
            drift = DRIFT if name == "server" else 0.001
            same = len(outcome) == len(expected) and all(
                abs(one - other) <= drift if isinstance(other, float) else one == other
                for one, other in zip(outcome, expected, strict=True)
            )
            assert same, f"{name}: {outcome}, and the model: {expected}"


def outcome_of(result: Any) -> Outcome:
    """Return what came out in the model's words."""
    match result:
        case Claimed():
            return ("claimed", result.attempt)
        case Replay():
            return ("replay", result.record.data, result.record.attempt)
        case InProgress():
            return ("in progress", result.retry_after)
        case Mismatch():
            return ("mismatch", result.record.fingerprint)
        case Record():
            assert result.expires_in is not None
            return ("record", result.state, result.attempt, result.data, result.fingerprint, result.expires_in)
        case _:
            return ("record", result)


@pytest.fixture
def world(redis_url: str) -> Iterator[World]:
    """Both stores, the server's data empty."""
    world = World(redis_url)
    yield world
    world.close()


@pytest.mark.timeout(300)  # a failure takes its time to be made small
@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_model_memory_and_server_agree(world: World) -> None:
    """Whatever is claimed, renewed, completed, released, deleted, lost and waited for, all three say the same."""
    few = settings(max_examples=max(10, settings.default.max_examples // 3), stateful_step_count=40, deadline=None)
    run_state_machine_as_test(lambda: Machine(world), settings=few)  # type: ignore[no-untyped-call]
