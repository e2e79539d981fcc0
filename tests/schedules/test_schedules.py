"""Every schedule up to a bound, and random ones beyond it: none breaks a promise."""

from collections.abc import Callable

import pytest

from schedules.explorer import Report, explore, wander
from schedules.scenarios import BOUNDED, SCENARIOS, WANDERED


@pytest.mark.parametrize(("name", "faults", "switches"), BOUNDED, ids=str)
def test_all_schedules_within_a_bound(
    name: str, faults: int, switches: int | None, record_property: Callable[[str, object], None]
) -> None:
    """Every schedule of the scenario with so many faults and switches keeps every promise."""
    report = explore(SCENARIOS[name], faults=faults, switches=switches)
    record_property("schedules", str(report))
    print(report)
    assert not report.found, "\n".join(map(str, report.found.values()))
    assert report.complete
    assert report.schedules >= 2


@pytest.mark.parametrize("name", SCENARIOS)
def test_random_schedules(name: str) -> None:
    """Schedules beyond the bound, with any order and up to six faults, keep every promise too."""
    report = Report(f"{name} at random, seeds 0 to {WANDERED - 1}")
    found = [found for seed in range(WANDERED) if (found := wander(SCENARIOS[name], seed, report)) is not None]
    print(report)
    assert not found, "\n".join(map(str, found))
    assert report.faults.total() > 0
