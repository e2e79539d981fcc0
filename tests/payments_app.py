"""The payment examples as a user starts them: a process with a supervisor, on a free port."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx

import asyncidem

from servers import free_port

__all__ = ["EXAMPLES", "started"]

EXAMPLES: Final = Path(__file__).parent.parent / "examples"


@contextlib.contextmanager
def started(script: str, redis_url: str | None = None) -> Iterator[str]:
    """Start an example by its one command; yield its address once it answers."""
    port = free_port()
    env = {name: value for name, value in os.environ.items() if name not in ("REDIS_URL", "PYTHONSAFEPATH")}
    env |= {"PORT": str(port)} | ({"REDIS_URL": redis_url} if redis_url else {})
    package = Path(asyncidem.__file__).parent.parent
    if package.name != "site-packages":
        env["PYTHONPATH"] = str(package)
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-W", "error", str(EXAMPLES / script)], env=env)
    try:
        with httpx.Client() as http:
            deadline = time.monotonic() + 30
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if http.get(address).status_code == 200:
                        break
                assert process.poll() is None, "the example ended"
                assert time.monotonic() < deadline, "the example does not answer"
                time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        assert process.wait(20) == 0
