"""What the benchmarks make of their figures: summaries, verdicts, the table, the plot and the JSON."""

import json
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from benchmarks.environment import Environment
from benchmarks.figures import BARE, OURS, Measured, Series, Side, Spread, percentile
from benchmarks.goals import GOALS, Goal, Verdict
from benchmarks.harness import QUICK, fresh_keys, interleaved, rotated
from benchmarks.plot import as_svg
from benchmarks.report import Run, as_json, as_markdown, as_text, bound, losses, number, with_unit

HERE = Environment("2026-01-02", "Linux x86_64", 2, {"Python": "3.13.0", "Valkey": "9.1.2"}, {"idemkit": "1.0.2"})
FIRST = next(goal for goal in GOALS if goal.key == "first_p50")
LEAST = next(goal for goal in GOALS if goal.key == "throughput_64")


def spread(value: float) -> Spread:
    """Return a spread around a value."""
    return Spread(value, value * 0.9, value * 1.1, 9)


def row(ratio: float, absolute: float = 100.0, **peers: Side) -> Measured:
    """Return a row in which ours has this ratio, and bare 100."""
    sides = {BARE: Side(spread(100.0), spread(1.0)), OURS: Side(spread(absolute), spread(ratio)), **peers}
    return Measured(spread(ratio), sides, "µs")


def everything_met(*, quick: bool = False) -> Run:
    """Return a run in which every goal is met."""
    rows = {goal.key: row(goal.target * (0.5 if goal.relation == "<=" else 1.5), 50.0) for goal in GOALS}
    for goal in GOALS:
        if goal.relation == ">=":
            rows[goal.key] = row(goal.target * 1.5, 500.0)
    return Run(HERE, 9, quick, rows)


def test_a_spread_is_the_median_with_its_quartiles() -> None:
    """Five values give their third, second and fourth; one value gives itself; none is refused."""
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.0, 1)])
def test_a_percentile_is_one_of_the_values(share: float, expected: int) -> None:
    """It is the least value that so many do not exceed, whatever their order."""
    assert percentile(list(range(100, 0, -1)), share) == expected


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that slows down from round to round changes no ratio."""
    series = Series()
    for slowness in (1.0, 3.0, 2.0):
        series.add(BARE, {"p50": 10.0 * slowness})
        series.add(OURS, {"p50": 5.0 * slowness})
    measured = series.row("p50", unit="µs", scale=1e6)
    assert measured.value == Spread(0.5, 0.5, 0.5, 3)
    assert measured.sides[BARE].absolute == Spread(20e6, 15e6, 25e6, 3)
    assert measured.sides[OURS].ratio == measured.value


def test_a_side_that_fails_says_why_and_has_no_figures() -> None:
    """Its earlier rounds are dropped with it."""
    series = Series()
    for side in (BARE, OURS, "peer"):
        series.add(side, {"p50": 1.0})
    series.fail("peer", "ValueError: no")
    assert series.values("peer", "p50") == []
    measured = series.row("p50", unit="µs")
    assert measured.sides["peer"] == Side(failure="ValueError: no")
    assert measured.value == Spread(1.0, 1.0, 1.0, 1)


def test_a_row_without_figures_of_ours_has_no_value() -> None:
    """It carries the reason instead."""
    series = Series()
    series.add(BARE, {"p50": 1.0})
    assert series.row("p50", unit="µs").failure == "not measured"
    series.fail(OURS, "broken")
    assert series.row("p50", unit="µs").failure == "broken"


@pytest.mark.parametrize(
    ("goal", "value", "verdict"),
    [
        (FIRST, 0.85, Verdict.MET),
        (FIRST, 0.93, Verdict.NEAR),
        (FIRST, 0.94, Verdict.MISSED),
        (FIRST, 1.01, Verdict.BELOW),
        (LEAST, 4.0, Verdict.MET),
        (LEAST, 3.6, Verdict.NEAR),
        (LEAST, 3.5, Verdict.MISSED),
        (LEAST, 2.9, Verdict.BELOW),
        (Goal("none", "none", "<=", 0, "commands"), 0.0, Verdict.MET),
        (Goal("none", "none", "<=", 0, "commands"), 1.0, Verdict.MISSED),
    ],
)
def test_a_figure_is_judged_by_its_median(goal: Goal, value: float, verdict: Verdict) -> None:
    """A goal is met, missed by little, missed, or below what is released at all."""
    assert goal.judge(Measured(spread(value))) is verdict


def test_what_was_not_measured_is_never_met() -> None:
    """No row and a row without a value are the same."""
    assert FIRST.judge(None) is FIRST.judge(Measured(None, failure="broken")) is Verdict.UNMEASURED


@pytest.mark.parametrize(("quick", "value", "failed"), [(True, 0.94, True), (True, 0.93, False), (False, 0.94, False)])
def test_only_a_quick_run_fails_over_a_missed_goal(quick: bool, value: float, failed: bool) -> None:
    """It forgives ten per cent; a full run reports a miss, and fails below a hard minimum alone."""
    run = everything_met(quick=quick)
    assert not run.failed()
    run.rows["first_p50"] = row(value)
    assert run.failed() is failed
    run.rows["first_p50"] = row(1.01)
    assert run.failed()


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.853, "0.85"), (12.34, "12.3"), (345.6, "346"), (12345.6, "12,346")]
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    """More would be noise."""
    assert number(value) == text


def test_goals_read_as_conditions() -> None:
    """With the sign of their relation and their unit."""
    assert bound(0.85, FIRST) == "≤ 0.85 \N{MULTIPLICATION SIGN}"
    assert bound(4.0, LEAST) == "≥ 4 \N{MULTIPLICATION SIGN}"
    assert with_unit(0.9, "x of best") == "0.90 \N{MULTIPLICATION SIGN} of best"
    assert with_unit(240.0, "bytes") == "240 bytes"


def test_goals_have_names_of_their_own() -> None:
    """A row that overwrote another would hide it; a hard minimum is no stricter than its goal."""
    assert len({goal.key for goal in GOALS}) == len(GOALS)
    for goal in GOALS:
        if goal.hard is not None:
            assert goal.judge(Measured(spread(goal.target))) is Verdict.MET


def test_a_run_that_meets_all_loses_nowhere() -> None:
    """Neither a goal, nor bare commands, nor a peer."""
    run = everything_met()
    assert losses(run) == []
    assert "Nowhere in this run." in as_markdown(run)


def test_losses_are_stated_in_words() -> None:
    """Against a goal, against bare commands where the goal allows it, against a peer, and what could not be measured."""
    run = everything_met()
    run.rows["replay_p50"] = row(1.2, 120.0)
    run.rows["large_first"] = row(1.3, 130.0)
    run.rows["throughput_64"] = row(4.5, 450.0, idemkit=Side(spread(460.0), spread(4.6)))
    run.rows["cluster_8"] = Measured(None, failure="RuntimeError: no cluster")
    times = "\N{MULTIPLICATION SIGN}"
    assert losses(run) == [
        f"Replay, sequential, p50: 1.20 {times}, below the hard minimum of ≤ 1 {times}, the goal is ≤ 0.85 {times}.",
        "3+3 cluster, 8 tasks, throughput: could not be measured (RuntimeError: no cluster).",
        "First calls, 64 tasks, throughput: idemkit does better, 460 µs against our 450 µs.",
        "100 KB result, first call, p50: bare commands do better, 100 µs against our 130 µs.",
    ]


def test_the_markdown_has_a_row_for_each_goal_and_peer() -> None:
    """With the goal beside the figure; a peer that failed says why, and a pipe breaks no table."""
    run = everything_met(quick=True)
    run.repeated.append("latency")
    run.rows["first_p50"] = row(0.8, 80.0, peer=Side(failure="ValueError: a|b"))
    text = as_markdown(run)
    lines = text.splitlines()
    for goal in GOALS:
        (line,) = (line for line in lines if line.startswith(f"| {goal.label} |"))
        assert bound(goal.target, goal) in line
        assert line.endswith("| met |")
        assert line.count("|") == 8
    assert "failed: ValueError: a\\|b" in text
    assert "Measured once more" in text
    assert HERE.sentence in text


def test_the_terminal_gets_the_figure_with_its_goal() -> None:
    """A failure takes the figure's place."""
    run = everything_met()
    run.rows["first_p50"] = replace(row(0.8), note="of note")
    assert "≤ 0.85" in as_text(run, "first_p50")
    assert "of note" in as_text(run, "first_p50")
    run.rows["first_p50"] = Measured(None, failure="broken")
    assert "failed: broken" in as_text(run, "first_p50")


def test_the_json_holds_everything() -> None:
    """Versions, cores, date, and each row with its goal, verdict and sides; the same run gives the same text."""
    run = everything_met()
    run.rows["first_p50"] = row(0.8, 80.0, peer=Side(failure="no"))
    text = as_json(run)
    assert text == as_json(run)
    found: dict[str, Any] = json.loads(text)
    assert set(found) == {
        *("date", "platform", "cores", "versions", "peers", "quick", "rounds", "repeated", "rows", "losses"),
    }
    assert [entry["key"] for entry in found["rows"]] == [goal.key for goal in GOALS]
    first = found["rows"][0]
    assert first["goal"] == {"relation": "<=", "target": 0.85, "hard": 1.0, "unit": "x"}
    assert (first["verdict"], first["passed"]) == ("met", True)
    assert first["value"] == {"median": 0.8, "q1": 0.72, "q3": 0.88, "count": 9}
    assert first["sides"]["peer"] == {"failure": "no"}
    assert first["sides"][OURS]["absolute"]["median"] == 80.0


def test_the_plot_is_well_formed_and_the_same_each_time() -> None:
    """It has a bar for each side that did not fail, in colours for light and dark pages."""
    run = everything_met()
    run.rows["first_p50"] = row(0.8, 80.0, idemkit=Side(spread(190.0), spread(1.9)), pyidempotent=Side(failure="<no>"))
    text = as_svg(run)
    assert text == as_svg(run)
    root = ET.fromstring(text)  # noqa: S314 - our own text
    bars = root.findall("{http://www.w3.org/2000/svg}rect")
    assert [bar.get("class") for bar in bars].count("peer") == 1
    assert [bar.get("class") for bar in bars].count("ours") == 4
    assert "prefers-color-scheme: dark" in text
    width = float(root.get("width") or 0)
    assert all(float(bar.get("x") or 0) + float(bar.get("width") or 0) <= width for bar in bars)


def test_an_empty_run_still_reports() -> None:
    """Rows that were not asked for are left out everywhere."""
    run = Run(HERE, 9, quick=False)
    assert json.loads(as_json(run))["rows"] == []
    ET.fromstring(as_svg(run))  # noqa: S314
    assert "Nowhere" in as_markdown(run)
    assert not run.failed()


def test_each_round_begins_with_another_side() -> None:
    """So none is always measured behind the same one."""
    assert [rotated("abc", number)[0] for number in range(-1, 3)] == ["c", "a", "b", "c"]
    assert rotated("abc", 1) == ["b", "c", "a"]


class Player:
    """A side that counts how often it was measured."""

    def __init__(self, name: str, fails_at: int = -1) -> None:
        self.name = name
        self.fails_at = fails_at
        self.turns = 0


async def play(player: Player) -> dict[str, float]:
    """Measure a player."""
    player.turns += 1
    if player.turns == player.fails_at:
        message = "out of breath"
        raise OSError(message)
    return {"turns": float(player.turns)}


async def test_the_first_round_does_not_count() -> None:
    """It warms up."""
    players = [Player(BARE), Player(OURS)]
    series = await interleaved(players, replace(QUICK, rounds=3), play)
    assert series.values(OURS, "turns") == [2.0, 3.0, 4.0]
    series = await interleaved([Player(BARE), Player(OURS)], replace(QUICK, rounds=3), play, warm=True)
    assert series.values(OURS, "turns") == [1.0, 2.0, 3.0]


async def test_a_peer_that_fails_is_left_out_from_then_on() -> None:
    """The others go on; with ours or bare it is the scenario that fails."""
    players = [Player(BARE), Player(OURS), Player("peer", fails_at=2)]
    series = await interleaved(players, replace(QUICK, rounds=3), play)
    assert series.failures == {"peer": "OSError: out of breath"}
    assert [player.turns for player in players] == [4, 4, 2]
    with pytest.raises(OSError, match="out of breath"):
        await interleaved([Player(BARE), Player(OURS, fails_at=1)], QUICK, play)


async def test_a_scenario_that_takes_too_long_ends_with_fewer_rounds() -> None:
    """It has at least two, or there would be no spread."""
    players = [Player(BARE), Player(OURS)]
    series = await interleaved(players, replace(QUICK, rounds=9, within=0.0), play)
    assert len(series.values(OURS, "turns")) == 2


def test_keys_are_new_and_of_one_length() -> None:
    """A key that was used before would be a replay."""
    keys = [*fresh_keys(50), *fresh_keys(50)]
    assert len(set(keys)) == 100
    assert len({len(key) for key in keys}) == 1
