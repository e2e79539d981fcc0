"""The checker can fail: it finds what is wrong with the algorithm of the seed, and with each mutant of ours."""

import pytest

from schedules import mutants
from schedules.explorer import Found, explore, replay, shrink, wander
from schedules.network import NetworkStore
from schedules.plan import Scenario
from schedules.scenarios import SCENARIOS
from schedules.seed import SeedLayer, run_seed

TIME = frozenset({"time", "leap"})

SEED = Scenario("seed", store=SeedLayer, run=run_seed, skews=(0,), faults=TIME | {"raise"})
SEED_ORPHAN = Scenario("seed-orphan", store=SeedLayer, run=run_seed, skews=(0,), faults=TIME, orphan=-1)
SEED_SKEW = Scenario("seed-skew", store=SeedLayer, run=run_seed, faults=frozenset())


def find(scenario: Scenario, rule: str, faults: int) -> Found:
    """Return the simplest schedule that breaks `rule`."""
    report = explore(scenario, faults=faults, until=rule)
    assert rule in report.found, f"not found: {report}"
    return report.found[rule]


def test_seed_takes_over_from_a_stale_snapshot() -> None:
    """The seed's takeover writes over a successor's claim: its lock outlasts neither the snapshot nor the handler."""
    found = find(SEED_ORPHAN, "takeover of an orphan", 1)
    assert "0 took over" not in found.breach.what
    assert [step for step in found.trace if step.startswith("get")] == []
    assert found.trace.count("leap") + found.trace.count("time") == 1
    assert found.trace[-1].startswith("do set of P")
    print(found)


def test_seed_zombie_completes() -> None:
    """The seed's completion writes over the claim of whoever took over in the meantime."""
    found = find(SEED, "zombie completion", 1)
    assert found.trace[-1] == "do set of P0"
    assert "do set of P1" in found.trace
    print(found)


def test_seed_zombie_deletes() -> None:
    """The seed's failure deletes the claim of whoever took over in the meantime."""
    found = find(SEED, "zombie delete", 2)
    assert found.trace[-1] == "do delete of P0"
    assert "raise P0" in found.trace
    print(found)


def test_seed_trusts_clocks() -> None:
    """The seed takes a living claim over without any fault where another client's clock is five minutes ahead."""
    found = find(SEED_SKEW, "takeover of an orphan", 0)
    assert "0 ms into a lease" in found.breach.what


@pytest.mark.parametrize(
    ("mutant", "rule", "faults", "allowed", "orphan"),
    [
        (mutants.LooseTakeover, "completed stands", 1, TIME, 0),
        (mutants.UnfencedCompletion, "completed stands", 1, TIME, None),
        (mutants.UnfencedRelease, "zombie delete", 1, {"lost"}, 0),
        (mutants.SameBytes, "takeover of an orphan", 1, TIME, None),
        (mutants.NoOrphan, "attempt counts", 1, {"lost"}, 0),
        (mutants.NoUndo, "nothing is left", 1, {"lost"}, None),
        (mutants.NoUndo, "nothing is left", 1, {"cut"}, None),
        (mutants.LateClaim, "starts within its lease", 1, TIME, 0),
        (mutants.StrayRenewal, "nothing is left", 2, TIME | {"raise"}, None),
        (mutants.DeafZombie, "a zombie is told", 1, TIME, None),
        (mutants.ClientClock, "takeover of an orphan", 0, set(), None),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_mutants(mutant: type[NetworkStore], rule: str, faults: int, allowed: set[str], orphan: float | None) -> None:
    """A store without one of the rules is found out, by a schedule that shows the very promise that the rule keeps."""
    workers = 1 if mutant is mutants.StrayRenewal else 2  # it is its own zombie
    scenario = Scenario(mutant.__name__, workers, store=mutant, faults=frozenset(allowed), orphan=orphan)
    found = find(scenario, rule, faults)
    again = replay(scenario, found.choices)
    assert again is not None
    assert again.trace == found.trace
    assert replay(Scenario("ours", workers, faults=frozenset(allowed), orphan=orphan), found.choices) is None


def test_random_schedules_replay_and_shrink() -> None:
    """What a seed finds is found again by the same seed, and made simpler without becoming another breach."""
    scenario = Scenario("seed", store=SeedLayer, run=run_seed)
    seed, found = next((seed, found) for seed in range(200) if (found := wander(scenario, seed)) is not None)
    again = wander(scenario, seed)
    assert again is not None
    assert again.trace == found.trace
    assert f"--seed {seed}" in str(found)
    assert shrink(found).breach.rule == found.breach.rule


def test_same_exploration_twice() -> None:
    """An exploration is deterministic: it counts the same states and schedules each time."""
    one, two = (explore(SCENARIOS["orphan"], faults=0) for _ in range(2))
    assert (one.schedules, one.merged, one.states, one.operations) == (
        two.schedules,
        two.merged,
        two.states,
        two.operations,
    )
