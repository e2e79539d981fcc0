"""The table that the project has set itself, row by row, and how a figure is judged by it."""

from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

from benchmarks.figures import Measured

TOLERANCE: Final = 0.1
"""A quick run forgives misses up to this share of a goal: it measures few and short rounds."""


class Verdict(Enum):
    """What a figure is worth."""

    MET = "met"
    NEAR = "missed by up to 10 %"
    MISSED = "missed"
    BELOW = "below the hard minimum"
    UNMEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Goal:
    """A row of the table.

    Attributes:
        key: names the row in the results.
        label: what is measured.
        relation: on which side of ``target`` the figure has to be.
        target: the goal.
        unit: of the judged figure; ``x`` is a ratio over bare commands.
        hard: the minimum below which nothing is released.
    """

    key: str
    label: str
    relation: Literal["<=", ">="]
    target: float
    unit: str = "x"
    hard: float | None = None

    def judge(self, measured: Measured | None) -> Verdict:
        """Judge the median of a row."""
        if measured is None or measured.value is None:
            return Verdict.UNMEASURED
        value = measured.value.median
        if self.hard is not None and not self._reaches(value, self.hard):
            return Verdict.BELOW
        if self._reaches(value, self.target):
            return Verdict.MET
        slack = self.target * (1 + TOLERANCE if self.relation == "<=" else 1 - TOLERANCE)
        return Verdict.NEAR if self._reaches(value, slack) else Verdict.MISSED

    def _reaches(self, value: float, bound: float) -> bool:
        return value <= bound if self.relation == "<=" else value >= bound


GOALS: Final = (
    Goal("first_p50", "First call, sequential, p50", "<=", 0.85, hard=1.0),
    Goal("first_cpu", "First call, sequential, CPU", "<=", 0.8),
    Goal("replay_p50", "Replay, sequential, p50", "<=", 0.85, hard=1.0),
    Goal("replay_cpu", "Replay, sequential, CPU", "<=", 0.8),
    Goal("throughput_8", "First calls, 8 tasks, throughput", ">=", 2.5),
    Goal("throughput_64", "First calls, 64 tasks, throughput", ">=", 4.0, hard=3.0),
    Goal("throughput_256", "First calls, 256 tasks, throughput", ">=", 5.0, hard=3.5),
    Goal("throughput_1024", "First calls, 1,024 tasks, throughput", ">=", 4.0),
    Goal("throughput_kept", "1,024 tasks over our own best", ">=", 0.8, "x of best"),
    Goal("tail_64", "p99 over p50 at 64 tasks", "<=", 3.0, "x p50"),
    Goal("cluster_8", "3+3 cluster, 8 tasks, throughput", ">=", 2.0),
    Goal("cluster_64", "3+3 cluster, 64 tasks, throughput", ">=", 3.5),
    Goal("processes_1", "1 process of 64 tasks, throughput", ">=", 2.0),
    Goal("processes_2", "2 processes of 64 tasks, throughput", ">=", 2.0),
    Goal("processes_4", "4 processes of 64 tasks, throughput", ">=", 2.0),
    Goal("large_first", "100 KB result, first call, p50", "<=", 1.4),
    Goal("large_replay", "100 KB result, replay, p50", "<=", 1.1),
    Goal("beside_large", "Small first calls beside 5 MB results, p99", "<=", 1.0),
    Goal("http_first", "HTTP endpoint that does nothing, first call, requests a second", ">=", 0.5),
    Goal("http_replay", "HTTP endpoint that does nothing, replay, requests a second", ">=", 0.7),
    Goal("cache_commands", "Replay from local_cache, commands", "<=", 0, "commands"),
    Goal("cache_cpu", "Replay from local_cache, CPU", "<=", 5.0, "µs"),
    Goal("waiters_first", "Waiters on one key, first second", "<=", 50, "round trips"),
    Goal("waiters_later", "Waiters on one key, each second after", "<=", 12, "round trips/s", hard=100),
    Goal("waiters_learn", "Time to learn, over a tenth of the wait + 25 ms, p50", "<=", 1.0, "x allowed"),
    Goal("waiters_memory", "100,000 waiters, memory", "<=", 200, "MB"),
    Goal("waiters_lag", "100,000 waiters, longest lag of the event loop", "<=", 100, "ms"),
    Goal("record_bytes", "Small completed record in the server", "<=", 240, "bytes"),
    Goal("record_bytes_fingerprint", "The same with a fingerprint", "<=", 330, "bytes"),
    Goal("process_growth", "Growth of the process over 10^6 operations", "<=", 5.0, "MB"),
    Goal("replay_growth", "Replay p50 beside 10^6 records over beside 10^3", "<=", 1.1, "x"),
    Goal("import_ms", "import asyncidem beyond redis.asyncio, CPU", "<=", 15.0, "ms"),
    Goal("lambda_import", "Lambda handler with the Redis store, import beyond redis.asyncio, CPU", "<=", 40.0, "ms"),
    Goal("lambda_first", "Lambda, first invocation of a process", "<=", 1.5),
)
