"""Options of the chaos, and the figures at its end."""

import random
from collections import Counter

import pytest

FIGURES: pytest.StashKey[dict[str, Counter[str]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say how long, and with which seed."""
    group = parser.getgroup("chaos")
    group.addoption("--minutes", type=float, default=0.0, help="play rounds for so long, all configurations together")
    group.addoption("--seconds", type=float, default=6.0, help="how long the faults of a round last")
    group.addoption("--seed", type=int, default=None, help="of the first round; any by default")


def pytest_configure(config: pytest.Config) -> None:
    """Settle on a seed."""
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(10**6)
    config.stash[FIGURES] = {}


def pytest_report_header(config: pytest.Config) -> str:
    """Say which seed it is."""
    return f"chaos: --seed {config.option.seed}"


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> dict[str, Counter[str]]:
    """The figures of each configuration, over all of its rounds."""
    return pytestconfig.stash[FIGURES]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was tried and what was found, a column for each configuration."""
    figures = config.stash[FIGURES]
    if not figures:
        return
    terminalreporter.section("chaos")
    rows = sorted(set().union(*figures.values()))
    width = max(map(len, rows))
    terminalreporter.write_line(" " * width + "".join(f"{name:>22}" for name in figures) + f"{'all':>12}")
    for row in rows:
        counts = [column[row] for column in figures.values()]
        terminalreporter.write_line(
            row.ljust(width) + "".join(f"{count:>22,}" for count in counts) + f"{sum(counts):>12,}"
        )
