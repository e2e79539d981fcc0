"""What the README shows runs as it stands."""

import ast
import asyncio
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_readme_shows_code_early_and_stays_short() -> None:
    """Working code stands before line 45, and the whole has fewer than 250 lines."""
    lines = README.read_text(encoding="utf-8").splitlines()
    assert lines.index("```python") < 45
    assert len(lines) < 250


def test_code_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Every block of Python runs, in the order of the page, and the first prints one charge for three calls."""
    assert len(BLOCKS) >= 4
    names: dict[str, Any] = {"__name__": "readme"}

    async def run(source: str) -> None:
        code = compile(textwrap.dedent(source), "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, names)  # noqa: S307 - the repository's own text
        if inspect.isawaitable(result):
            await result

    exec(compile(BLOCKS[0], "README.md", "exec"), names)  # noqa: S102 - likewise; it starts a loop itself
    shown = capsys.readouterr().out
    assert shown.count("charging 42") == 1
    assert shown.count("r-42") == 3
    with asyncio.Runner() as runner:
        for block in BLOCKS[1:]:
            runner.run(run(block))
