"""Code that runs in an interpreter of its own, and may leave nothing to be said when its loop has ended."""

import subprocess
import sys
from collections.abc import Callable

PRELUDE = """
import asyncio, gc, logging, sys, time
from redis.asyncio import Redis
from asyncidem import Claimed, Idempotency, RedisStore, StoreError
logging.getLogger("asyncio").setLevel(logging.ERROR)  # of a slow callback on a busy machine nothing is said
url = sys.argv[1]

def ending():
    global ended
    ended = time.monotonic()
"""

POSTLUDE = """
asyncio.run(main())
print(time.monotonic() - ended)
gc.collect()
"""


def run_alone(code: str, *args: str, during: Callable[[subprocess.Popen[str]], object] | None = None) -> float:
    """Run `code` in an interpreter of its own that says all that there is to say, and see that it says nothing.

    `code` defines `main()`, which calls `ending()` before it returns; what `asyncio.run` takes after that is returned.
    """
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PRELUDE + code + POSTLUDE, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if during is not None:
            during(process)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert err == "", err
    assert process.returncode == 0, out
    return float(out)
