"""The algorithm that the project started from, as a model: the checker must find what is wrong with it.

It is that of the synchronous layer of Powertools for AWS Lambda: SET NX; a record that is there is read, and taken for an
orphan when `in_progress_expiration` has passed on the client's clock; then the lock, and a blind SET; a blind SET at
completion, a blind DEL at failure. Its records name an owner, a lease and an attempt for the law's eyes; the algorithm
looks at none of them.
"""

import json
from types import SimpleNamespace
from typing import Any, Final

from asyncidem import InProgressError

from schedules.law import record_in
from schedules.network import KEY, Command, Network
from schedules.plan import Call
from schedules.processes import Process
from schedules.server import Request
from schedules.world import World

TTL: Final = 3600
LOCK_MS: Final = 10_000


class SeedLayer:
    """What `RedisCachePersistenceLayer` sends for one process."""

    def __init__(self, process: Process, network: Network) -> None:
        self._process = process
        self._network = network
        self._sent = 0
        self._background: tuple[()] = ()

    async def send(
        self, op: str, key: str, value: dict[str, Any] | None = None, ttl_ms: int = 0, actor: str = ""
    ) -> Any:
        self._sent += 1
        data = b"True" if value is None else json.dumps(value).encode()
        command = Command(self._process, Request(op, key, data, ttl_ms, actor=actor), self._sent)
        self._network.commands.append(command)
        return await command.future

    def record(self, owner: str, lease: int, attempt: int, **more: Any) -> dict[str, Any]:
        return {
            "owner": owner,
            "expiration": int(self._process.wall()) + TTL,
            "lease": lease * 1000,
            "attempt": attempt,
            **more,
        }


async def run_seed(world: World, call: Call) -> Any:
    """Run the operation as the layer does it."""
    process, lease = call.process, world.scenario.lease
    layer: SeedLayer = world.stores[process.number]
    owner, now, attempt = process.token(), process.wall(), 1
    progress = {"status": "INPROGRESS", "in_progress_expiration": int((now + lease) * 1000)}
    deadline = process.time() + lease
    if await layer.send("put", KEY, layer.record(owner, lease, 1, **progress), TTL * 1000, owner) is not None:
        found: bytes | None = await layer.send("get", KEY)
        record = None if found is None else record_in(found)
        if record is not None and record["status"] == "COMPLETED":
            return json.loads(record["data"])
        if record is None or record["in_progress_expiration"] > int(now * 1000):
            raise InProgressError(KEY, 0)
        if await layer.send("put", f"{KEY}:lock", None, LOCK_MS) is not None:
            raise InProgressError(KEY, 0)
        attempt = record["attempt"] + 1  # for the law: what it finds is not to be that nobody counts
        deadline = process.time() + lease
        await layer.send("set", KEY, layer.record(owner, lease, attempt, **progress), TTL * 1000, owner)
    claim = SimpleNamespace(owner=owner, attempt=attempt, _deadline=deadline, _settled="")
    try:
        result = await world.handle(call, claim)
    except Exception:
        claim._settled = "released"
        await layer.send("delete", KEY, actor=owner)
        raise
    claim._settled = "completed"
    completed = layer.record(owner, lease, attempt, status="COMPLETED", data=json.dumps(result))
    await layer.send("set", KEY, completed, TTL * 1000, owner)
    call.events.append("completed")
    return result
