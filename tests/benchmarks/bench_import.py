"""What ``import asyncidem`` and ``asyncidem.RedisStore`` add to ``import redis.asyncio``: at most 15 ms.

Both are timed in the same process, one after the other, so that a round compares what the machine does in the same
moment. Exits with 1 if the median is over the limit.

Run it with ``python tests/benchmarks/bench_import.py`` where asyncidem is installed.
"""

import os
import platform
import statistics
import subprocess
import sys

ROUNDS = 15
LIMIT_MS = 15.0

CODE = """
import time
start = time.process_time()
import redis.asyncio
between = time.process_time()
import asyncidem
asyncidem.RedisStore
print((between - start) * 1000, (time.process_time() - between) * 1000)
"""


def one_round() -> tuple[float, float]:
    """Return the milliseconds of processor time for redis.asyncio, and for asyncidem after it."""
    # An import is that of byte code, as after any installation; a first one that compiles is no measure of it.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True, env=env)
    base, added = map(float, done.stdout.split())
    return base, added


def spread(name: str, values: list[float]) -> None:
    """Print the median of some milliseconds, and how far they lie apart."""
    low, median, high = statistics.quantiles(values, n=4)
    print(f"{name:14} median {median:7.2f} ms   quartiles {low:.2f} to {high:.2f}   least {min(values):.2f}")


def main() -> int:
    """Measure, print, and say whether the limit holds."""
    one_round()  # writes the byte code
    base, added = zip(*(one_round() for _ in range(ROUNDS)), strict=True)
    print(f"Python {platform.python_version()}, {ROUNDS} rounds, processor time")
    spread("redis.asyncio", list(base))
    spread("asyncidem", list(added))
    median = statistics.median(added)
    print(
        f"asyncidem adds {median:.2f} ms of at most {LIMIT_MS:.0f} ms, {median / statistics.median(base):.2f} x of it"
    )
    return 0 if median <= LIMIT_MS else 1


if __name__ == "__main__":
    sys.exit(main())
