"""Twenty duplicates of a payment, a worker that dies in the middle of one, and a replay: each order is charged once.

::

    python examples/quickstart.py                                     # in memory
    REDIS_URL=redis://localhost:6379 python examples/quickstart.py    # on Redis or Valkey
"""

import asyncio
import json
import os
import sys
import tempfile
import time
import uuid
from pathlib import Path

from asyncidem import Idempotency, MemoryStore, RedisStore, Store, current_operation

URL = os.environ.get("REDIS_URL")
AMOUNT = 4_200

store: Store = RedisStore.from_url(URL) if URL else MemoryStore()
# The lease is so short because the end of one is waited for below; the default is 30 s.
idem = Idempotency(store, namespace="quickstart", lease=1, ttl=60, wait=10)


class Provider:
    """A payment provider that charges as often as it is asked to. Its ledger is a file, which all workers see."""

    ledger: Path
    replies = True

    async def charge(self, key: str, order_id: str, amount: int) -> dict[str, str]:
        """Charge, and return the receipt."""
        await asyncio.sleep(0.1)
        receipt = {"receipt": uuid.uuid4().hex[:8], "order_id": order_id, "amount": str(amount), "key": key}
        self._write(json.dumps(receipt) + "\n")
        if not self.replies:
            await asyncio.sleep(3600)
        return receipt

    def find(self, field: str, value: str) -> list[dict[str, str]]:
        """Return the receipts of all charges with this ``order_id`` or ``key``."""
        lines = self.ledger.read_text().splitlines() if self.ledger.exists() else []
        return [receipt for receipt in map(json.loads, lines) if receipt[field] == value]

    def _write(self, line: str) -> None:
        with self.ledger.open("a") as ledger:
            ledger.write(line)


provider = Provider()


@idem.idempotent(key="order_id", payload="amount", name="charge")
async def charge(order_id: str, amount: int) -> dict[str, str]:
    """Charge an order: the handler that must not charge twice."""
    op = current_operation()
    assert op is not None
    say(f"the handler runs, attempt {op.attempt}")
    if op.attempt > 1:  # a worker was here before and was not heard of again: ask what it did
        for receipt in provider.find("key", op.downstream_key):
            say(f"the provider knows the downstream_key: receipt {receipt['receipt']}, nothing to charge")
            return receipt
    return await provider.charge(op.downstream_key, order_id, amount)


async def lose_worker(order_id: str) -> None:
    """Let a worker charge an order and end before it hears of it, so that its claim is left behind."""
    if URL:
        child = await asyncio.create_subprocess_exec(sys.executable, __file__, order_id, str(provider.ledger))
        try:
            await until_charged(order_id)
        finally:
            child.kill()
            await child.wait()
        say(f"its process {child.pid} was killed")
        return
    # No other process sees a MemoryStore, so none can die here. A handler that is cancelled leaves the same behind: a
    # claim that nobody renews, completes or releases, for nobody knows whether the effect has happened.
    provider.replies = False
    worker = asyncio.create_task(charge(order_id, AMOUNT))
    await until_charged(order_id)
    worker.cancel()
    await asyncio.wait((worker,))
    provider.replies = True
    say("its task was cancelled (there is only this process; with REDIS_URL one is killed)")


async def until_charged(order_id: str) -> None:
    """Wait until an order is in the provider's ledger."""
    async with asyncio.timeout(20):
        while not provider.find("order_id", order_id):  # noqa: ASYNC110 - it may be another process that charges
            await asyncio.sleep(0.01)


async def main() -> None:
    """Show the three, and check what they show."""
    run = uuid.uuid4().hex[:8]
    first, second = f"order-{run}-1", f"order-{run}-2"
    print(f"store: {type(store).__name__}{'' if URL else ', in this process (set REDIS_URL for a server)'}")
    try:
        print("\n1. Twenty calls for one order, at once")
        answers = await asyncio.gather(*(charge(first, AMOUNT) for _ in range(20)))
        check(len(provider.find("order_id", first)) == 1, "20 calls, 1 charge")
        check(all(answer == answers[0] for answer in answers), f"20 answers, all with receipt {answers[0]['receipt']}")

        print("\n2. A worker charges, and dies before it can say so")
        await lose_worker(second)
        record = await store.get(idem.key_for(charge, second, AMOUNT))
        check(record is not None and record.state == "INPROGRESS", "its claim is left behind: INPROGRESS")
        began = time.monotonic()
        answer = await charge(second, AMOUNT)
        say(f"the next call waited {time.monotonic() - began:.1f} s for the end of the lease, and took over")
        check(len(provider.find("order_id", second)) == 1, "2 attempts, 1 charge")

        print("\n3. The same call again")
        check(await charge(second, AMOUNT) == answer, f"the stored answer: receipt {answer['receipt']}")
        check(len(provider.find("order_id", second)) == 1, "the handler did not run: still 1 charge")
    finally:
        for order_id in (first, second):  # the lock of the takeover expires by itself, as the lease would
            await store.delete(idem.key_for(charge, order_id, AMOUNT))
        await store.aclose()


def say(what: str) -> None:
    """Print a line, at once: the worker that dies prints too."""
    print(f"   {what}", flush=True)


def check(met: bool, what: str) -> None:  # noqa: FBT001 - read like an assertion
    """Print what was seen, or end with it as an error."""
    if not met:
        sys.exit(f"NOT MET: {what}")
    say(what)


if __name__ == "__main__":
    if len(sys.argv) > 1:  # the worker of part 2, until it is killed
        provider.ledger, provider.replies = Path(sys.argv[2]), False
        asyncio.run(charge(sys.argv[1], AMOUNT))
    with tempfile.TemporaryDirectory() as directory:
        provider.ledger = Path(directory) / "ledger"
        asyncio.run(main())
