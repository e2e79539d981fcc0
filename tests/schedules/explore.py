"""Explores schedules for as long as it is told, and says what it did.

::

    nox -s schedules -- --minutes 30
    python tests/schedules/explore.py --scenario wire --seed 459       # one random schedule once more
    python tests/schedules/explore.py --scenario two --replay 0.0.2    # one that was found within a bound

Half of the time goes to every schedule with one fault, then with two, and so on; half of it to random ones. It ends with
1 if a promise was broken, and prints the shortest schedule found that does it.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path

# The directory above: the modules are `schedules.…` here as they are in the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from schedules.explorer import Report, explore, replay, wander
from schedules.scenarios import SCENARIOS


def dig(task: tuple[str, float, int]) -> list[Report]:
    """Explore one scenario for so many seconds, with random seeds from a number on."""
    name, seconds, first = task
    scenario, began, reports = SCENARIOS[name], time.monotonic(), list[Report]()
    for faults in itertools.count():
        left = seconds / 2 - (time.monotonic() - began)
        if left <= 0:
            break
        reports.append(explore(scenario, faults=faults, seconds=left))
        if reports[-1].found:
            break
    report = Report(f"{name} at random, seeds from {first}")
    for seed in itertools.count(first):
        if time.monotonic() - began >= seconds:
            break
        wander(scenario, seed, report)
    report.seconds = time.monotonic() - began - seconds / 2
    return [*reports, report]


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="wall time, on all cores")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (by default one per core)")
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, help="run one random schedule")
    parser.add_argument("--replay", help="run one schedule by its choices")
    parser.add_argument("--from-seed", type=int, default=0, help="the first seed of a long run")
    arguments = parser.parse_args()
    names = arguments.scenario or list(SCENARIOS)
    if arguments.seed is not None or arguments.replay is not None:
        if len(names) != 1:
            parser.error("--seed and --replay need one --scenario")
        (name,) = names
        if arguments.replay is not None:
            found = replay(SCENARIOS[name], [int(choice) for choice in arguments.replay.split(".")])
        else:
            found = wander(SCENARIOS[name], arguments.seed)
        print(found or "no promise is broken")
        return 1 if found else 0
    seconds = arguments.minutes * 60 * arguments.jobs / len(names)
    tasks = [(name, seconds, arguments.from_seed) for name in names]
    totals, broken = Counter[str](), 0
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for reports in pool.imap_unordered(dig, tasks):
            for report in reports:
                print(report, flush=True)
                for found in report.found.values():
                    broken += 1
                    print(found, flush=True)
                totals["schedules explored"] += report.schedules + report.merged
                totals["states"] += report.states
                totals["faults injected"] += report.faults.total()
                totals["operations"] += report.operations
    print(", ".join(f"{name}: {count}" for name, count in totals.items()), f"violations: {broken}", sep=", ")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
