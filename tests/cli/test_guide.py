"""The guide for operators is true: its shell blocks run in a clean virtual environment and print what it says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import asyncidem

from conftest import require
from servers import BINARIES

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent.parent
GUIDE = (ROOT / "examples" / "operations" / "README.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"```sh\n(.*?)```\n(?:```text\n(.*?)```\n)?", GUIDE, re.DOTALL)
INSTALLED = os.environ.get("ASYNCIDEM_TEST_INSTALLED") == "1"


@pytest.fixture(scope="session")
def server_kind() -> str:
    """One kind is enough here: what differs between servers is tested without processes."""
    return require(*BINARIES)


def stand_in(directory: Path) -> None:
    """Make what looks like the environment of the guide's first step, of the interpreter and the package under test."""
    programs = directory / ".venv" / "bin"
    programs.mkdir(parents=True)
    package = Path(asyncidem.__file__).parent.parent
    for name, arguments in (("python", ""), ("asyncidem", "-m asyncidem")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nPYTHONPATH="{package}" exec "{sys.executable}" {arguments} "$@"\n')
        program.chmod(0o755)


def said(text: str) -> re.Pattern[str]:
    """Return the pattern of what a block is said to print, in which an ellipsis stands for anything within a line."""
    return re.compile(".*".join(map(re.escape, text.split("…"))))


@pytest.mark.timeout(300)
def test_shell_blocks_run(redis_url: str, tmp_path: Path) -> None:
    """In the order of the page, by a reader who does what it says.

    Where the installed wheel is tested (by nox), the first block runs too: it builds the package and installs it with
    its dependencies into an environment with nothing else. On a source tree that would take longer than all the rest,
    and two programs stand in for that environment.
    """
    install, *others = BLOCKS
    (program,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "orders.py").write_text(program)
    if INSTALLED:
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, tmp_path)
        shutil.copytree(ROOT / "asyncidem", tmp_path / "asyncidem")
        others.insert(0, install)
    else:
        stand_in(tmp_path)
    env = {**os.environ, "REDIS_URL": redis_url}
    env.pop("PYTHONPATH", None)
    for block, text in others:
        ran = subprocess.run(
            ["/bin/sh", "-c", block],
            cwd=tmp_path,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            check=False,
        )
        if text:
            assert said(text).fullmatch(ran.stdout), f"{block}\n{ran.stdout}"
        else:
            assert ran.returncode == 0, f"{block}\n{ran.stdout}"


def test_the_guide_says_the_exit_codes_of_the_command_line() -> None:
    """And the first block is what it is left out for."""
    assert "pip install" in BLOCKS[0][0]
    assert len(BLOCKS) >= 8
    for code in range(6):
        assert re.search(rf"\b{code} [a-z`]", GUIDE)
