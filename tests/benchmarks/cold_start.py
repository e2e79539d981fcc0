"""Scenarios of a cold start on Lambda: what the handler's module costs at import, and what its first invocation takes."""

import os
import statistics
import subprocess
import sys
import time
from typing import Final

from benchmarks.figures import BARE, OURS, Measured, Series, single
from benchmarks.harness import LEAST_ROUNDS
from benchmarks.stage import Stage

ROWS: Final = ("lambda_import", "lambda_first")

PREPARED: Final = """
import asyncio, os, sys, time
began = time.process_time()
import redis.asyncio
between = time.process_time()
"""

OURS_CODE: Final = """
from asyncidem import Idempotency, RedisStore
from asyncidem.integrations.aws_lambda import event_key, lambda_handler

store = RedisStore.from_url(os.environ["REDIS_URL"], timeout=3)
idem = Idempotency(store, ttl=60)

@lambda_handler
@idem.idempotent(key=event_key)
async def handler(event, context):
    return {"receipt": "r-1"}

class Context:
    def get_remaining_time_in_millis(self):
        return 3000
"""

BARE_CODE: Final = """
client = redis.asyncio.Redis.from_url(os.environ["REDIS_URL"])
client.connection_pool.make_connection()  # redis-py imports 17 modules with its first one, and the store lets it do so here

async def work(event):
    key = event["id"]
    await client.set(key, "running", nx=True, get=True, px=60_000)
    await client.set(key, "done", px=60_000)
    return {"receipt": "r-1"}

runner = asyncio.Runner()

def handler(event, context):
    return runner.run(work(event))

Context = object
"""

MEASURE: Final = """
imported = time.process_time()
event = {"id": os.urandom(8).hex(), "detail-type": "Order", "source": "shop"}
start = time.perf_counter()
assert handler(event, Context()) == {"receipt": "r-1"}
first = time.perf_counter() - start
print((between - began) * 1000, (imported - between) * 1000, first * 1000, flush=True)
os._exit(0)  # an execution environment does not end in good order either
"""


def cold_start(stage: Stage) -> dict[str, Measured]:
    """Both in fresh processes, ours and a bare client's in turn."""
    sides = {BARE: PREPARED + BARE_CODE + MEASURE, OURS: PREPARED + OURS_CODE + MEASURE}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env["REDIS_URL"] = stage.server.url

    def start(code: str) -> tuple[float, float, float]:
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env)
        base, added, first = map(float, done.stdout.split())
        return base, added, first

    start(sides[OURS])  # writes the byte code
    series, bases, imports = Series(), [], []
    end = time.monotonic() + stage.effort.within
    rounds = 0
    while rounds < stage.effort.rounds and (rounds < LEAST_ROUNDS or time.monotonic() < end):
        firsts: dict[str, list[float]] = {BARE: [], OURS: []}
        for name in (BARE, OURS, OURS, BARE) if rounds % 2 else (OURS, BARE, BARE, OURS):
            base, added, first = start(sides[name])
            firsts[name].append(first)
            if name == OURS:
                bases.append(base)
                imports.append(added)
        for name, values in firsts.items():
            series.add(name, {"lambda_first": statistics.mean(values)})
        rounds += 1
    return {
        "lambda_import": single(imports, "ms", bare=bases, note="with what redis-py imports for its first connection"),
        "lambda_first": series.row(
            "lambda_first", unit="ms", note="its connection and event loop included; neither side imports anything then"
        ),
    }
