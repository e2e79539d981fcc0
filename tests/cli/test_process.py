"""The command line as a process: its entry points, what is missing, its memory, its speed."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import asyncidem

from commandline import run
from conftest import require
from servers import BINARIES, Server

pytestmark = pytest.mark.once

PACKAGE = Path(asyncidem.__file__).parent

FILL = """
for number = tonumber(ARGV[1]), tonumber(ARGV[2]) do
    local owner = string.format('%032x', number)
    local record = '{"owner": "' .. owner .. '", "status": "COMPLETED", "data": "1", "expiration": 1795701639}'
    redis.call('SET', 'asyncidem:order:' .. number, record, 'PX', 86400000)
end
return redis.status_reply('OK')
"""

PEAK = """
import sys
from asyncidem.cli import main
try:
    main()
finally:
    with open("/proc/self/status") as status:
        peak = next(line for line in status if line.startswith("VmHWM"))
    sys.stderr.write(peak.split()[1])
"""


@pytest.fixture(scope="session")
def server_kind() -> str:
    """One kind is enough here: what differs between servers is tested without processes."""
    return require(*BINARIES)


def process(*args: str, url: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    env = {**os.environ, "REDIS_URL": url, **(env or {})}
    if PACKAGE.parent.name != "site-packages":
        env["PYTHONPATH"] = str(PACKAGE.parent)
    return subprocess.run(
        [sys.executable, "-W", "error", *args], env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_python_m(redis_url: str) -> None:
    """`python -m asyncidem` is the command line, and its exit code is the process's."""
    ran = process("-m", "asyncidem", "inspect", "nothing", url=redis_url)
    assert ran.returncode == 1
    assert ran.stderr == "nothing is stored under 'nothing'\n"
    assert ran.stdout == ""


def test_what_the_terminal_cannot_show_is_escaped(redis_url: str, server: Server) -> None:
    """A key outside of its encoding is no traceback."""
    server.command("SET", "asyncidem:日", "odd")
    ran = process("-m", "asyncidem", "list", url=redis_url, env={"PYTHONIOENCODING": "latin-1"})
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.endswith("\\u65e5\n")


def test_the_librarys_log_does_not_come_between(redis_url: str, server: Server) -> None:
    """What the library warns of, doctor says itself."""
    server.command("CONFIG", "SET", "maxmemory", "100mb")
    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        ran = process("-m", "asyncidem", "doctor", "--json", url=redis_url)
    finally:
        server.command("CONFIG", "SET", "maxmemory", "0")
        server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert (ran.returncode, ran.stderr) == (5, "")
    assert "allkeys-lru" in ran.stdout


def test_version_and_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The module runs the command line; the version is the package's."""
    monkeypatch.setattr(sys, "argv", ["asyncidem", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("asyncidem", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"asyncidem, version {metadata.version('asyncidem')}\n"
    importlib.import_module("asyncidem.__main__")  # to look at it runs nothing
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(os.environ.get("ASYNCIDEM_TEST_INSTALLED") != "1", reason="a run on the source tree")
def test_entry_point() -> None:
    """The wheel installs a program."""
    program = Path(sys.executable).parent / "asyncidem"
    ran = subprocess.run([str(program), "--help"], capture_output=True, text=True, timeout=50, check=False)
    assert ran.returncode == 0
    assert "Exit codes" in ran.stdout


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra(missing: str) -> None:
    """What to install is said, in place of a traceback; any other missing module is a bug, and shown as one."""
    block = "import sys; sys.modules[{!r}] = None; from asyncidem.cli import main; main()"
    ran = process("-c", block.format(missing))
    assert ran.returncode == 2
    assert ran.stderr == f"the command line needs {missing}: pip install 'asyncidem[cli]'\n"
    assert "ModuleNotFoundError" in process("-c", block.format("asyncidem.cli.words")).stderr


@pytest.mark.parametrize("command", ["", "inspect", "list", "stats", "release", "purge", "doctor"])
def test_help_says_the_exit_codes(command: str) -> None:
    """Everywhere, whatever the width."""
    ran = run(*command.split(), "--help")
    assert ran.code == 0
    words = " ".join(ran.out.split())
    for code in ("0 done", "1 nothing is stored", "2 the command", "3 the store", "4 left alone", "5 doctor", "130"):
        assert code in words


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.timeout(240)  # a hundred thousand keys, on a machine that does other things
def test_memory_does_not_grow_with_the_keyspace(redis_url: str, server: Server) -> None:
    """A hundred times the keys, the same peak of memory: a page is held at a time, and nothing of what was."""
    peaks: list[int] = []
    for first, last in ((1, 1_000), (1_001, 100_000)):
        for number in range(first, last, 10_000):
            assert server.command("EVAL", FILL, "0", str(number), str(min(last, number + 9_999))) == "+OK"
        # Coverage counts in memory and time too.
        ran = process("-c", PEAK, "stats", "--json", url=redis_url, env={"COVERAGE_PROCESS_CONFIG": ""})
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout)["keys"] == last
        peaks.append(int(ran.stderr))
    assert peaks[1] < peaks[0] + 4_096, peaks  # kilobytes; 100,000 entries held at once would be a hundred times that
