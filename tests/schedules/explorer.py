"""Who chooses: everything up to a bound, or at random from a seed, or what is to be seen once more.

The packages that explore schedules of asyncio were tried and left. They have one loop for all workers, in which none can
crash or sleep alone; they reorder every callback, so that a bound is spent on what nobody outside can tell apart; and
they run what meets in the same state again. Here the only choices are what the network, the server and the callers do.
"""

import heapq
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from schedules.law import Breach
from schedules.plan import FREE, MAX_STEPS, Option, Scenario
from schedules.simulated import simulated
from schedules.world import BreachError, World

Pick = Callable[[World], tuple[int, Option] | None]
"""Chooses among a world's options: which one it is, or None at the end."""


class Known(Exception):  # noqa: N818 - not an error
    """The run has come to a state that was explored before."""


@dataclass
class Found:
    """A breach, and the schedule that leads to it."""

    scenario: Scenario
    breach: Breach
    choices: tuple[int, ...]
    trace: list[str]
    seed: int | None = None

    def __str__(self) -> str:
        steps = "\n".join(f"  {number:3} {step}" for number, step in enumerate(self.trace, 1))
        how = f"--seed {self.seed}" if self.seed is not None else f"--replay {'.'.join(map(str, self.choices)) or 0}"
        return (
            f"{self.breach.rule}: {self.breach.what}\nin the scenario {self.scenario.name!r}, by the schedule\n{steps}\n"
            f"once more: python tests/schedules/explore.py --scenario {self.scenario.name} {how}"
        )


@dataclass
class Report:
    """What an exploration did.

    Attributes:
        schedules: runs that came to their end, different from each other.
        merged: runs that came to a state from which another had gone on already.
        states: different states.
        faults: how many were injected, by kind.
        operations: commands that the server carried out.
        complete: whether all schedules within the bound were explored.
    """

    bound: str
    schedules: int = 0
    merged: int = 0
    states: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    operations: int = 0
    complete: bool = False
    seconds: float = 0.0
    found: dict[str, Found] = field(default_factory=dict)

    def __str__(self) -> str:
        how = "all" if self.complete else "some"
        return (
            f"{how} of {self.bound}: {self.schedules} schedules and {self.merged} that merged with one of them, "
            f"{self.states} states, {self.faults.total()} faults, {self.operations} operations, "
            f"violations: {len(self.found)}, {self.seconds:.1f} s"
        )


def run(scenario: Scenario, pick: Pick, report: Report | None = None) -> tuple[World, tuple[int, ...]]:
    """Run a scenario once, and conclude it.

    Raises:
        BreachError: a promise was broken; its `world` and `choices` say how.
        Known: `pick` raised it.
    """
    world = World(scenario)
    choices: list[int] = []
    try:
        while (picked := pick(world)) is not None:
            choices.append(picked[0])
            world.take(picked[1])
            if len(choices) > MAX_STEPS:
                world.law.broken("runs end", f"there is no end after {MAX_STEPS} steps")
                world.judge()
        world.conclude()
        return world, tuple(choices)
    except BreachError as error:
        error.__dict__.update(world=world, choices=tuple(choices))
        raise
    finally:
        if report is not None:
            report.faults.update(world.injected)
            report.operations += world.server.carried_out
        world.close()


def explore(
    scenario: Scenario,
    *,
    faults: int,
    switches: int | None = None,
    seconds: float | None = None,
    until: str | None = None,
) -> Report:
    """Run every schedule with so many faults and switches at the most, the simplest first.

    Runs that meet in a state with the same server, the same history of every process and the same commands under way
    are continued once.

    Args:
        scenario: what is explored.
        faults: how many choices that are not `FREE`.
        switches: how many times a process is left that could go on; None: any number, that is all orders.
        seconds: after which it gives up.
        until: the rule whose breach ends the search; None: any. For each rule the first schedule is kept.
    """
    bound = (
        f"{scenario.name} with up to {faults} faults and {'any number of' if switches is None else switches} switches"
    )
    report = Report(bound)
    began = time.perf_counter()
    heap: list[tuple[int, int, int, tuple[int, ...]]] = [(0, 0, 0, ())]
    seen: set[object] = set()
    number = 0
    with simulated():
        while heap and (seconds is None or time.perf_counter() - began < seconds):
            spent, left, _, prefix = heapq.heappop(heap)
            path: list[int] = []

            def pick(world: World) -> tuple[int, Option] | None:
                nonlocal number
                step = len(path)
                if step < len(prefix):
                    choice = prefix[step]
                    options = world.options(faults=False)
                    path.append(choice)
                    return choice, (options if choice < len(options) else world.options())[choice]
                options = world.options(faults=spent < faults)
                if not options:
                    return None
                current = world.current and world.current.number
                state = world.key() if switches is None else (world.key(), left, current)
                if state in seen:
                    raise Known
                seen.add(state)
                for index in range(1, len(options)):
                    costs = spent + (options[index].kind not in FREE)
                    turns = left + (switches is not None and world.switches(options[index], options))
                    if switches is None or turns <= switches:
                        number += 1
                        heapq.heappush(heap, (costs, turns, number, (*path, index)))
                path.append(0)
                return 0, options[0]

            try:
                run(scenario, pick, report)
                report.schedules += 1
            except Known:
                report.merged += 1
            except BreachError as error:
                found = _found(scenario, error)
                report.found.setdefault(found.breach.rule, found)
                if until in (None, found.breach.rule):
                    break
    report.complete = not heap
    report.states = len(seen)
    report.seconds = time.perf_counter() - began
    return report


def wander(scenario: Scenario, seed: int, report: Report | None = None, *, faults: int = 6) -> Found | None:
    """Run one schedule at random: any order, and up to so many faults."""
    dice = random.Random(seed)
    likely = dice.choice((0.02, 0.08, 0.25))
    left = dice.randint(0, faults)

    def pick(world: World) -> tuple[int, Option] | None:
        nonlocal left
        options = world.options()
        if not options:
            return None
        free = [index for index, option in enumerate(options) if option.kind in FREE or index == 0]
        choices = free
        if left and len(free) < len(options) and dice.random() < likely:
            left -= 1
            # First the kind, then the option: of some kinds there are many.
            kind = dice.choice(sorted({option.kind for index, option in enumerate(options) if index not in free}))
            choices = [index for index, option in enumerate(options) if option.kind == kind and index]
        choice = dice.choice(choices)
        return choice, options[choice]

    try:
        with simulated():
            run(scenario, pick, report)
    except BreachError as error:
        found = shrink(_found(scenario, error))
        found.seed = seed
        if report is not None:
            report.found.setdefault(found.breach.rule, found)
        return found
    finally:
        if report is not None:
            report.schedules += 1
    return None


def replay(scenario: Scenario, choices: Sequence[int]) -> Found | None:
    """Run one schedule once more."""

    def pick(world: World) -> tuple[int, Option] | None:
        options = world.options()
        if not options:
            return None
        step = len(world.trace)
        choice = min(choices[step], len(options) - 1) if step < len(choices) else 0
        return choice, options[choice]

    try:
        with simulated():
            run(scenario, pick)
    except BreachError as error:
        return _found(scenario, error)
    return None


def shrink(found: Found) -> Found:
    """Return a simpler schedule that breaks the same rule: choice after choice is left out or made the first one."""
    best = found
    again = True
    while again:
        again = False
        for step in reversed(range(len(best.choices))):
            for shorter in (
                (*best.choices[:step], *best.choices[step + 1 :]),
                (*best.choices[:step], 0, *best.choices[step + 1 :]),
            ):
                if step >= len(best.choices) or shorter == best.choices:
                    continue
                other = replay(found.scenario, shorter)
                if other is not None and other.breach.rule == found.breach.rule and _simpler(other, best):
                    best, again = other, True
                    break
    return best


def _simpler(one: Found, other: Found) -> bool:
    return (sum(map(bool, one.choices)), len(one.choices)) < (sum(map(bool, other.choices)), len(other.choices))


def _found(scenario: Scenario, error: BreachError) -> Found:
    world: World = error.__dict__["world"]
    choices: tuple[int, ...] = error.__dict__["choices"]
    while choices and choices[-1] == 0:
        choices = choices[:-1]
    return Found(scenario, error.breach, choices, list(map(str, world.trace)))
