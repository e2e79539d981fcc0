"""What is tested is what users install, with everything that belongs to it."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import asyncidem

PACKAGE = Path(asyncidem.__file__).parent
# Those that serve payments do not end; they have tests of their own.
SCRIPTS = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
EXAMPLES = [script for script in SCRIPTS if not script.stem.endswith("_payments")]

installed = pytest.mark.skipif(
    os.environ.get("ASYNCIDEM_TEST_INSTALLED") != "1", reason="a run on the source tree; nox tests the wheel"
)


@installed
def test_wheel_is_what_is_tested() -> None:
    """The tests import the installed wheel and not the source tree beside them."""
    assert PACKAGE.parent.name == "site-packages"
    assert Path(asyncidem.__file__) in {Path(str(file.locate())) for file in metadata.files("asyncidem") or []}


def test_package_data() -> None:
    """The marker of a typed package and the Lua scripts lie in the package."""
    assert (PACKAGE / "py.typed").is_file()
    scripts = list((PACKAGE / "stores" / "lua").glob("*.lua"))
    assert scripts
    assert all(script.read_bytes().strip() for script in scripts)


@installed
def test_metadata() -> None:
    """The wheel says its licence, brings its text, and keeps tests and examples out; beside the package there is its program."""
    about = metadata.metadata("asyncidem")
    assert about["License-Expression"] == "MIT"
    assert about.get_all("License-File") == ["asyncidem/LICENSE"]
    files = metadata.files("asyncidem") or []
    licences = [file for file in files if file.name == "LICENSE"]
    assert licences
    assert all("MIT License" in file.read_text() for file in licences)
    assert {file.parts[0].partition("-")[0] for file in files} == {"asyncidem", ".."}
    assert [file.stem for file in files if file.parts[0] == ".."] == ["asyncidem"]  # the program


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, redis_url: str) -> None:
    """An example runs to its end as it stands, without a warning; a server's address is in REDIS_URL."""
    env = {**os.environ, "REDIS_URL": redis_url}
    if PACKAGE.parent.name != "site-packages":
        env["PYTHONPATH"] = str(PACKAGE.parent)
    run = subprocess.run(
        [sys.executable, "-W", "error", str(example)], env=env, capture_output=True, text=True, timeout=30, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
