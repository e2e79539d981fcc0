"""A master with a replica, and a sentinel that watches them."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from servers import HOST, Server, find_binary, free_port

READY_WITHIN: Final = 20.0


class Watch:
    """A sentinel that watches one master and its replica."""

    def __init__(self, kind: str, directory: Path, *, down_after: int = 1000) -> None:
        """Prepare the three; a master is down after `down_after` milliseconds without an answer."""
        self._down_after = down_after
        # A replica that asks is served at once: by default the master waits five seconds for others.
        self.master = Server(kind, directory / "master", "--repl-diskless-sync-delay", "0")
        self.replica = Server(kind, directory / "replica", "--replicaof", HOST, str(self.master.port))
        self.port = free_port()
        self._binary = find_binary(kind)
        self._file = directory / "sentinel.conf"
        self._log = directory / "sentinel.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Watch":
        """Start them, and return once the sentinel knows the replica and the replica has the master's data."""
        self.master.start()
        self.replica.start()
        lines = (
            f"port {self.port}",
            f"bind {HOST}",
            f"sentinel monitor payments {HOST} {self.master.port} 1",
            f"sentinel down-after-milliseconds payments {self._down_after}",
            "sentinel failover-timeout payments 5000",
        )
        self._file.write_text("\n".join(lines) + "\n")
        assert self._binary is not None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._binary, str(self._file), "--sentinel"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={"LC_ALL": "C"},
            )
        self.until(lambda: "state=online" in self.master.text("INFO", "replication"))
        self.until(lambda: "slaves=1" in self.ask("INFO", "sentinel"))
        return self

    def ask(self, *words: str) -> str:
        """Send a command to the sentinel, and return its text."""
        sentinel = Server(self.master.kind, self._file.parent)
        sentinel.port = self.port
        try:
            return sentinel.text(*words) if words[0] == "INFO" else sentinel.command(*words)
        except OSError:
            return ""

    def promoted(self) -> bool:
        """Say whether the replica is the master now; Sentinel cuts the connections of the node that it promotes."""
        try:
            return "role:master" in self.replica.text("INFO", "replication")
        except (OSError, RuntimeError):
            return False

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + READY_WITHIN
        while not condition():
            assert time.monotonic() < deadline, self._log.read_text()[-2000:]
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        """Kill all three."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.replica.kill()
        self.master.kill()
