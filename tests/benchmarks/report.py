"""A run as JSON, as a Markdown table and in plain words."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from benchmarks.environment import Environment
from benchmarks.figures import BARE, OURS, TIMES, Measured, Side, Spread
from benchmarks.goals import GOALS, Goal, Verdict

PEER_ROWS: Final = (
    "first_p50",
    "first_cpu",
    "replay_p50",
    "replay_cpu",
    "throughput_64",
    "large_first",
    "large_replay",
)
"""The rows in which the peers take part."""

MORE_IS_BETTER: Final = frozenset(goal.key for goal in GOALS if goal.relation == ">=")


@dataclass(slots=True)
class Run:
    """All that a run has measured.

    Attributes:
        environment: where, when and with what.
        rounds: of each scenario.
        quick: whether it was short.
        rows: by the goal's key.
        repeated: scenarios of a quick run that missed, and were measured once more, with more rounds.
    """

    environment: Environment
    rounds: int
    quick: bool
    rows: dict[str, Measured] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)

    def verdicts(self) -> dict[str, Verdict]:
        """Return the verdict on every row that was asked for."""
        return {goal.key: goal.judge(self.rows[goal.key]) for goal in GOALS if goal.key in self.rows}

    def failed(self) -> bool:
        """Say whether the run ends in an error: what a quick run refuses, or a hard minimum that is not reached."""
        refused = {Verdict.BELOW, Verdict.UNMEASURED} | ({Verdict.MISSED} if self.quick else set())
        return any(verdict in refused for verdict in self.verdicts().values())


def number(value: float) -> str:
    """Return a figure with three digits that mean something, the same on every machine."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}"


def shown(unit: str) -> str:
    """Return a unit as readers see it."""
    return TIMES + unit.removeprefix("x") if unit == "x" or unit.startswith("x ") else unit


def with_unit(value: float, unit: str) -> str:
    """Return a figure with its unit."""
    return f"{number(value)} {shown(unit)}"


def bound(value: float, goal: Goal) -> str:
    """Return a goal or a hard minimum as a condition."""
    sign = "≤" if goal.relation == "<=" else "≥"
    return f"{sign} {value:g} {shown(goal.unit)}"


def losses(run: Run) -> list[str]:
    """Say in plain words where we lose: against our goals, against bare commands, and against the peers."""
    found: list[str] = []
    for goal, measured in _judged(run):
        verdict = goal.judge(measured)
        if measured.value is None:
            found.append(f"{goal.label}: could not be measured ({measured.failure}).")
        elif verdict is not Verdict.MET:
            value = with_unit(measured.value.median, goal.unit)
            words = {Verdict.BELOW: "below the hard minimum of " + bound(goal.hard or 0, goal) + ", "}.get(verdict, "")
            found.append(f"{goal.label}: {value}, {words}the goal is {bound(goal.target, goal)}.")
    for goal, measured in _judged(run):
        found.extend(_beaten(goal, measured))
    return found


def _beaten(goal: Goal, measured: Measured) -> Iterator[str]:
    ours = measured.sides.get(OURS)
    if goal.key not in PEER_ROWS or ours is None or ours.absolute is None:
        return
    met = goal.judge(measured) is Verdict.MET
    better = {
        name: side.absolute.median
        for name, side in measured.sides.items()
        if side.absolute is not None and not name.startswith(OURS)
        if met or name != BARE  # that a missed goal is one over bare commands has been said
        if (side.absolute.median > ours.absolute.median) is (goal.key in MORE_IS_BETTER)
        if side.absolute.median != ours.absolute.median
    }
    for name, value in better.items():
        who = "bare commands do" if name == BARE else f"{name} does"
        yield (
            f"{goal.label}: {who} better, {number(value)} {measured.unit} "
            f"against our {number(ours.absolute.median)} {measured.unit}."
        )


def _judged(run: Run) -> Iterator[tuple[Goal, Measured]]:
    for goal in GOALS:
        if goal.key in run.rows:
            yield goal, run.rows[goal.key]


def as_json(run: Run) -> str:
    """Return everything that was measured; the same run gives the same text."""
    return json.dumps(_plain(run), indent=1, ensure_ascii=False) + "\n"


def _plain(run: Run) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for goal, measured in _judged(run):
        verdict = goal.judge(measured)
        rows.append(
            {
                "key": goal.key,
                "label": goal.label,
                "goal": {"relation": goal.relation, "target": goal.target, "hard": goal.hard, "unit": goal.unit},
                "verdict": verdict.value,
                "passed": verdict is Verdict.MET,
                "value": _spread(measured.value),
                "unit": measured.unit,
                "sides": {name: _side(side) for name, side in measured.sides.items()},
                "note": measured.note,
                "failure": measured.failure,
            }
        )
    return {
        **asdict(run.environment),
        "quick": run.quick,
        "rounds": run.rounds,
        "repeated": run.repeated,
        "rows": rows,
        "losses": losses(run),
    }


def _spread(spread: Spread | None) -> dict[str, float] | None:
    if spread is None:
        return None
    figures = {"median": spread.median, "q1": spread.low, "q3": spread.high}
    return {name: float(f"{value:.6g}") for name, value in figures.items()} | {"count": spread.count}


def _side(side: Side) -> dict[str, Any]:
    if side.failure is not None:
        return {"failure": side.failure}
    return {"absolute": _spread(side.absolute), "ratio_to_bare": _spread(side.ratio)}


def as_markdown(run: Run) -> str:
    """Return the table of goals, that of the peers, and where we lose."""
    what = f"A quick run of at most {run.rounds} rounds" if run.quick else f"A run of {run.rounds} rounds"
    lines = [
        "# Benchmarks",
        "",
        f"{what}: {run.environment.sentence}.",
        "Within a round all sides run one after the other. Medians over the rounds, with quartiles in brackets.",
        "Bare is a redis.asyncio client with hiredis that issues the same commands one at a time;",
        f"{TIMES} is the ratio to it in the same round.",
        "Goals are judged on the complete engine, through the decorator.",
        "",
        "| | goal | hard minimum | measured | asyncidem | bare | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for goal, measured in _judged(run):
        hard = bound(goal.hard, goal) if goal.hard is not None else ""
        value = _bracketed(measured.value, goal.unit) if measured.value else measured.failure or ""
        sides = [_absolute(measured, name) for name in (OURS, BARE)] if goal.unit == "x" else ["", ""]
        cells = [_label(goal, measured), bound(goal.target, goal), hard, value, *sides, goal.judge(measured).value]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    lines += ["", *_sides_table(run), "", "## Where we lose", ""]
    lines += [f"- {line}" for line in losses(run)] or ["Nowhere in this run."]
    if run.repeated:
        again = ", ".join(run.repeated)
        lines += ["", f"Measured once more, with more rounds, because the first figures missed a goal: {again}."]
    return "\n".join(lines) + "\n"


def _sides_table(run: Run) -> list[str]:
    rows = [(goal, measured) for goal, measured in _judged(run) if goal.key in PEER_ROWS]
    names = list(dict.fromkeys(name for _, measured in rows for name in measured.sides))
    if not names:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in run.environment.peers.items())
    lines = [
        "## Beside the peers",
        "",
        f"In the same rounds, each through its own decorator: {versions}.",
        "What is synchronous has threads where the others have tasks.",
        "",
        f"| | {' | '.join(_cell(goal.label) for goal, _ in rows)} |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for name in names:
        cells = [_beside(measured.sides.get(name), measured.unit) for _, measured in rows]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _beside(side: Side | None, unit: str) -> str:
    if side is None:
        return ""
    if side.absolute is None:
        return _cell(f"failed: {side.failure}")
    ratio = f" ({number(side.ratio.median)} {TIMES})" if side.ratio is not None else ""
    return f"{number(side.absolute.median)} {unit}{ratio}"


def _label(goal: Goal, measured: Measured) -> str:
    return f"{goal.label}<br><small>{measured.note}</small>" if measured.note else goal.label


def _bracketed(spread: Spread, unit: str) -> str:
    if spread.count == 1:
        return with_unit(spread.median, unit)
    return f"{with_unit(spread.median, unit)} ({number(spread.low)} to {number(spread.high)})"


def _absolute(measured: Measured, name: str) -> str:
    side = measured.sides.get(name)
    if side is None or side.absolute is None:
        return ""
    return f"{number(side.absolute.median)} {measured.unit}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def as_text(run: Run, key: str) -> str:
    """Return a row for the terminal."""
    goal = next(goal for goal in GOALS if goal.key == key)
    measured = run.rows[key]
    value = _bracketed(measured.value, goal.unit) if measured.value else f"failed: {measured.failure}"
    hard = f", hard {bound(goal.hard, goal)}" if goal.hard is not None else ""
    note = f"\n    {measured.note}" if measured.note else ""
    return f"  {goal.label:54} {value:34} {bound(goal.target, goal)}{hard}: {goal.judge(measured).value}{note}"
