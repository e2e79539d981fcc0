"""Real processes, real servers, real faults, and a history that has to keep every promise.

The other tests leave this directory out: `nox -s chaos`, or `nox -s chaos -- --minutes 30` for longer.
"""

import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from chaos.rounds import CONFIGURATIONS, Configuration, play
from conftest import require
from servers import BINARIES

OTHERS = {"worker frozen", "worker killed", "clients killed", "writes paused", "server frozen"}
NETWORK = {"replies lost", "requests lost", "requests late", "black hole", "connections cut", "connections refused"}


@pytest.mark.timeout(0)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
async def test_no_promise_is_broken(
    configuration: Configuration, pytestconfig: pytest.Config, tmp_path: Path, figures: dict[str, Counter[str]]
) -> None:
    """Whatever happens to workers, connections and servers, each key has one owner at a time and one result."""
    require(*BINARIES)
    seed, seconds = pytestconfig.option.seed, pytestconfig.option.seconds
    end = time.monotonic() + pytestconfig.option.minutes * 60 / len(CONFIGURATIONS)
    total = figures.setdefault(str(configuration), Counter())
    while True:
        played = await play(configuration, seed, seconds, tmp_path / str(seed))
        total.update(played.report.figures)
        total["rounds"] += 1
        assert not played.report.violations, played.explain()
        shutil.rmtree(tmp_path / str(seed))
        seed += 1
        if time.monotonic() >= end:
            break
    # What was not tried proves nothing.
    for kind in OTHERS | NETWORK:
        assert total[f"fault: {kind}"] > 0, kind
    for figure in ("effects", "replays", "renewals", "takeovers"):
        assert total[figure] > 0, figure


@pytest.mark.timeout(0)
async def test_a_store_that_is_wrong_is_found_out(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """The same chaos on SET NX and SET finds effects that ran twice, results that were replaced, hidden attempts."""
    require(*BINARIES)
    played = await play(CONFIGURATIONS[0], pytestconfig.option.seed, 4, tmp_path / "naive", naive=True)
    found = {violation.kind for violation in played.report.violations}
    assert "attempt hidden" in found
    assert found & {"two owners", "executed again"}, found
    assert found & {"completion replaced", "zombie completed", "result replaced"}, found
    assert "--seed" in played.explain()
