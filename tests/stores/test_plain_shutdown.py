"""Loops that end while a server or its replica is silent, on the path that has a task for every command."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from alone import run_alone
from conftest import require
from servers import BINARIES, HOST, Server

FROZEN = """
import warnings
# Nobody can close what a pool has idle when its loop has ended, and Python says so.
warnings.simplefilter("ignore", ResourceWarning)

async def main():
    store = RedisStore.from_url(url, multiplex={multiplex}, wait_replicas=1, timeout=3)
    claim = await store.claim("before")
    open(sys.argv[2], "w").close()  # the server may fall silent
    while not pathlib.Path(sys.argv[2] + "-frozen").exists():
        await asyncio.sleep(0.005)
    tasks = [asyncio.create_task(call) for call in ({under_way},)]
    await asyncio.sleep(0.05)
    assert not tasks[0].done()
    ending()
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """A master and its replica."""
    kind, directory = require(*BINARIES), tmp_path_factory.mktemp("frozen")
    with (
        Server(kind, directory / "master", "--repl-diskless-sync-delay", "0") as master,
        Server(kind, directory / "replica", "--replicaof", HOST, str(master.port)) as replica,
    ):
        while master.command("WAIT", "1", "1000") != ":1":
            time.sleep(0.01)
        yield master, replica


UNDER_WAY: Final = {
    "claim": "store.claim('k')",
    "completion": "store.complete(claim, '1')",
    "renewal": "store.renew(claim)",
    "release": "store.release(claim)",
    "several and closing": "store.claim('k'), store.complete(claim, '1'), store.aclose()",
    "call": "Idempotency(store).run('k', asyncio.sleep, 0, 1)",
}
CASES: Final = [
    (frozen, what)
    for frozen in ("replica", "master")
    for what in UNDER_WAY
    if (frozen, what) != ("replica", "release")  # it waits for no replica
]


@pytest.mark.parametrize(("frozen", "what"), CASES)
def test_loop_that_ends_on_a_silent_server(
    pair: tuple[Server, Server], tmp_path: Path, frozen: str, what: str, multiplex: bool
) -> None:
    """It ends in good time, and leaves no task that is destroyed while it is pending."""
    master, replica = pair
    master.command("FLUSHALL")

    def freeze(process: subprocess.Popen[str]) -> None:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.005)
        (replica if frozen == "replica" else master).pause()
        (tmp_path / "ready-frozen").touch()

    code = "import pathlib\n" + FROZEN.format(multiplex=multiplex, under_way=UNDER_WAY[what])
    try:
        assert run_alone(code, master.url, str(tmp_path / "ready"), during=freeze) < 2
    finally:
        replica.resume()
        master.resume()
