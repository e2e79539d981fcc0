"""The guide to stores and tests of one's own is true: its code runs, and its store keeps the contract."""

import ast
import asyncio
import importlib.util
import inspect
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import asyncidem
from asyncidem import Claimed, StoreUnavailableError
from asyncidem.testing import ManualClock, StoreConformance

HERE = Path(__file__).parent.parent / "examples" / "custom_store"
GUIDE = (HERE / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def example() -> ModuleType:
    """The module of the example."""
    spec = importlib.util.spec_from_file_location("sqlite_store", HERE / "sqlite_store.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_code_of_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Every block runs, in the order of the page, and prints what the page says."""
    names: dict[str, Any] = {"__name__": "guide"}
    with asyncio.Runner() as runner:

        async def run(source: str) -> None:
            code = compile(source, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = eval(code, names)  # noqa: S307 - the repository's own text
            if inspect.isawaitable(result):
                await result

        for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
            runner.run(run(block))
    (shown,) = re.findall(r"```text\n(.*?)```", GUIDE, re.DOTALL)
    assert capsys.readouterr().out == shown


def test_the_example_runs() -> None:
    """As a script, without a warning, in an interpreter of its own."""
    env = {**os.environ}
    package = Path(asyncidem.__file__).parent.parent
    if package.name != "site-packages":
        env["PYTHONPATH"] = str(package)
    run = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "sqlite_store.py")],
        env=env,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "the store keeps the contract\n20 calls, 1 charge, receipt r-42\n"


async def test_its_store_keeps_the_contract_on_a_manual_clock(example: ModuleType, tmp_path: Path) -> None:
    """Expiry goes by the clock that the store was given."""
    clock = ManualClock()
    await StoreConformance(
        lambda: example.SQLiteStore(tmp_path / "r.db", clock=clock.monotonic, wall=clock.wall), advance=clock.advance
    ).run()


async def test_a_file_that_is_taken_is_an_error_that_nothing_was_written(example: ModuleType, tmp_path: Path) -> None:
    """Somebody else's transaction is waited for until the time-out, and then known to have let nothing through."""
    path = tmp_path / "r.db"
    async with example.SQLiteStore(path, timeout=0.05) as store:
        assert isinstance(await store.claim("a"), Claimed)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailableError, match="database is locked") as caught:
            await store.claim("b")
        assert not caught.value.outcome_unknown
        other.execute("ROLLBACK")
        other.close()
        assert await store.get("b") is None
        assert isinstance(await store.claim("b"), Claimed)
