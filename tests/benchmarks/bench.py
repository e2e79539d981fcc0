"""The benchmarks: asyncidem beside the bare commands that it sends, and beside its peers.

::

    nox -s bench                 # all of it: tests/benchmarks/results gets a JSON file, a table and a plot
    nox -s bench -- --quick      # under a minute, without the peers; fails if a goal is missed by more than 10 %

Without nox: ``python tests/benchmarks/bench.py`` where asyncidem and the dependency group ``bench`` are installed.

The rules of measurement: within a round all sides run one after the other, in an order that rotates; figures are medians
over the rounds, with quartiles; ratios are taken within the round; CPU is that of the process, not the wall. A quick run
may measure a scenario that missed once more, with more rounds, and says so. A full run fails below a hard minimum.
"""

import argparse
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

# The directory above: the modules are `benchmarks.…` here as they are in the tests, and `servers` is beside them.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cold_start, latency, load, memory, processes, waiters, web
from benchmarks.environment import environment
from benchmarks.figures import Measured
from benchmarks.goals import GOALS, Verdict
from benchmarks.harness import FULL, QUICK
from benchmarks.plot import as_svg
from benchmarks.report import Run, as_json, as_markdown, as_text, losses
from benchmarks.stage import Stage, stage

from servers import BINARIES, find_binary

RESULTS: Final = Path(__file__).resolve().parent / "results"

QUICK_SECONDS: Final = 55.0
"""A quick run measures nothing again that would end later than after so many seconds: it takes under a minute."""

Scenario = Callable[[Stage], dict[str, Measured]]

SCENARIOS: Final[dict[str, tuple[Scenario, tuple[str, ...]]]] = {
    "latency": (latency.small, ("first_p50", "first_cpu", "replay_p50", "replay_cpu")),
    "throughput": (
        load.throughput,
        (*(f"throughput_{tasks}" for tasks in load.LEVELS), "throughput_kept", "tail_64"),
    ),
    "large": (latency.large_result, ("large_first", "large_replay")),
    "cluster": (load.on_a_cluster, ("cluster_8", "cluster_64")),
    "processes": (processes.several_processes, tuple(f"processes_{number}" for number in processes.NUMBERS)),
    "beside": (load.beside_large, ("beside_large",)),
    "http": (web.over_http, web.ROUNDS),
    "cache": (latency.cached, ("cache_commands", "cache_cpu")),
    "waiters": (waiters.waiters, tuple(goal.key for goal in GOALS if goal.key.startswith("waiters_"))),
    "records": (memory.records, ("record_bytes", "record_bytes_fingerprint")),
    "growth": (latency.growth, ("replay_growth",)),
    "import": (memory.imports, ("import_ms",)),
    "lambda": (cold_start.cold_start, cold_start.ROWS),
    "memory": (memory.process_growth, ("process_growth",)),
}
"""What is measured together, and the rows that it gives."""


def main() -> int:
    """Measure, report, and say whether it is good enough."""
    options = _options()
    began = time.monotonic()
    kind = options.server or next((kind for kind in BINARIES if find_binary(kind)), None)
    if kind is None:
        print("no Valkey and no Redis server on this machine")
        return 2
    out = options.out or (None if options.quick or options.only else RESULTS)
    effort = QUICK if options.quick else FULL
    run = Run(environment(kind), effort.rounds, options.quick)
    took: dict[str, float] = {}
    _allow_connections()
    print(run.environment.sentence)
    with (
        tempfile.TemporaryDirectory() as directory,
        stage(kind, Path(directory), effort, with_peers=not options.quick and not options.no_peers) as place,
    ):
        for name in options.only or SCENARIOS:
            started = time.monotonic()
            run.rows |= measure(name, place)
            took[name] = time.monotonic() - started
            print(f"{name}: {took[name]:.1f} s")
            _report(run, name, out)
        place.effort = effort.more()
        for name in took if options.quick else ():
            # It has about twice the time that it took.
            if _misses(run, name) and time.monotonic() - began + 2 * took[name] < QUICK_SECONDS:
                print(f"{name}: missed, measured once more")
                run.repeated.append(name)
                run.rows |= measure(name, place)
                _report(run, name, out)
    print(f"{time.monotonic() - began:.0f} s")
    print("Where we lose:", *(losses(run) or ["nowhere in this run"]), sep="\n  ")
    return 1 if run.failed() else 0


def _allow_connections() -> None:
    """Make room for the thousand connections of bare commands, at both of their ends."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if most == resource.RLIM_INFINITY else min(most, 8192)
    if resource.RLIM_INFINITY != limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def measure(name: str, place: Stage) -> dict[str, Measured]:
    """Measure a scenario; one that fails gives its rows with the reason, and the run goes on."""
    scenario, rows = SCENARIOS[name]
    try:
        return scenario(place)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"[:300]
        return {row: Measured(None, failure=failure) for row in rows}


def _misses(run: Run, name: str) -> bool:
    verdicts = run.verdicts()
    return any(verdicts[row] in {Verdict.MISSED, Verdict.BELOW, Verdict.UNMEASURED} for row in SCENARIOS[name][1])


def _report(run: Run, name: str, out: Path | None) -> None:
    """Print a scenario and write what there is by now: a run that is interrupted keeps it."""
    for row in SCENARIOS[name][1]:
        print(as_text(run, row))
    sys.stdout.flush()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for suffix, text in (("json", as_json(run)), ("md", as_markdown(run)), ("svg", as_svg(run))):
            (out / f"results.{suffix}").write_text(text, encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="asyncidem beside the bare commands that it sends, and its peers")
    parser.add_argument(
        "--quick", action="store_true", help="under a minute, without the peers; writes only with --out"
    )
    parser.add_argument("--out", type=Path, help="directory of the results (default: beside this file)")
    parser.add_argument("--server", choices=tuple(BINARIES), help="kind of server (default: the first one found)")
    parser.add_argument("--no-peers", action="store_true", help="leave the peers out")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(SCENARIOS), help="only these scenarios; writes only with --out"
    )
    return parser.parse_args()


if __name__ == "__main__":
    # Ended from outside, it still ends its servers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
