"""What the README shows runs as it stands."""

import ast
import asyncio
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from starlette.applications import Starlette
from starlette.authentication import AuthenticationBackend
from starlette.middleware.authentication import AuthenticationMiddleware

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDES = sorted(ROOT.glob("examples/*/README.md"))
CODE = re.compile(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", re.DOTALL)


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Return the blocks of Python of a page, each with what it is said to print, if anything is."""
    return CODE.findall(page.read_text(encoding="utf-8"))


BLOCKS = [code for code, _ in blocks_of(README)]


@web.middleware
async def authenticate(request: web.Request, handler: Any) -> Any:
    """Stand for what a reader has."""
    return await handler(request)


READERS: dict[str, Any] = {
    "authenticate": authenticate,
    "AuthenticationMiddleware": AuthenticationMiddleware,
    "backend": AuthenticationBackend(),
    "current_user": lambda: "ada",
    "pay": lambda: {"charge": 1},
    "starlette": Starlette(),
}
"""What the sections about frameworks take for granted."""


async def run_block(source: str, page: str, names: dict[str, Any]) -> None:
    """Run a block, which may await at its top."""
    code = compile(textwrap.dedent(source), page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)  # noqa: S307 - the repository's own text
    if inspect.isawaitable(result):
        await result


def test_readme_shows_code_early_and_stays_short() -> None:
    """Working code stands before line 45, and the whole has fewer than 250 lines."""
    lines = README.read_text(encoding="utf-8").splitlines()
    assert lines.index("```python") < 45
    assert len(lines) < 250


def test_code_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Every block of Python runs, in the order of the page, and the first prints one charge for three calls."""
    assert len(BLOCKS) >= 4
    names: dict[str, Any] = {"__name__": "readme", **READERS}

    exec(compile(BLOCKS[0], "README.md", "exec"), names)  # noqa: S102 - likewise; it starts a loop itself
    shown = capsys.readouterr().out
    assert shown.count("charging 42") == 1
    assert shown.count("r-42") == 3
    with asyncio.Runner() as runner:
        for block in BLOCKS[1:]:
            runner.run(run_block(block, README.name, names))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.parent.name)
def test_code_of_the_guides_runs(
    guide: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block of Python of a guide runs, in the order of the page beside the guide, and prints what it is said to."""
    monkeypatch.syspath_prepend(guide.parent)
    names: dict[str, Any] = {"__name__": "guide"}
    with asyncio.Runner() as runner:
        for block, printed in blocks_of(guide):
            runner.run(run_block(block, guide.parent.name, names))
            assert capsys.readouterr().out == printed or not printed


def test_links_lead_somewhere() -> None:
    """What README and guides link to within the repository is there."""
    for page in (README, *GUIDES, ROOT / "examples" / "README.md"):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page}: {link}"
