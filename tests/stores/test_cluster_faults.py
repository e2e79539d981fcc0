"""A real cluster that changes under a crowd: failovers, slots that move, new shards, a killed master; on both paths."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import RedisCluster

from asyncidem import Idempotency, RedisStore, StoreError

from conftest import require
from crowd import Call, Crowd
from resharding import Operator, slot_of, tags_in
from servers import BINARIES, Cluster

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def living(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster for the tests of this module to harm one after the other; it fails over by itself for the last alone."""
    kind = require(*BINARIES)
    # On a busy machine it would for the others too, between two commands of the operator.
    options = ("--cluster-replica-no-failover", "yes", "--cluster-allow-replica-migration", "no")
    with Cluster(kind, tmp_path_factory.mktemp(f"living-{kind}"), *options) as cluster:
        yield cluster


@pytest.fixture
async def operator(living: Cluster) -> AsyncIterator[Operator]:
    """Who changes the cluster, which has no data at first."""
    living.reset()
    async with Operator(living) as operator:
        yield operator


@contextlib.asynccontextmanager
async def stores_on(cluster: Cluster, timeout: float = 5) -> AsyncIterator[list[RedisStore]]:
    """Two stores on each path."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                RedisStore.from_url(cluster.url, cluster=True, multiplex=multiplex, timeout=timeout)
            )
            for multiplex in (True, False, True, False)
        ]


async def test_manual_failover(living: Cluster, operator: Operator) -> None:
    """Masters that hand over to their replicas one after the other are followed, without an error or a second effect."""
    replicas = [node for node in living.nodes if node not in living.masters]
    async with stores_on(living) as stores:
        async with Crowd(stores) as crowd:
            for replica in replicas:
                await operator.fail_over(replica)
                await crowd.go_on(32)
        await crowd.check()


async def test_resharding(living: Cluster, operator: Operator) -> None:
    """Many slots, full and empty ones, move from one master to another and back under the crowd."""
    source, target = living.masters[:2]
    slots = sorted(await operator.slots(source))[-100:]
    async with stores_on(living) as stores:
        async with Crowd(stores, tags=("", *tags_in(range(slots[0], slots[-1] + 1), 30))) as crowd:
            await operator.move_slots(slots, source, target)
            await crowd.go_on(32)
            await operator.move_slots(slots, target, source)
            await crowd.go_on(32)
        await crowd.check()


async def test_open_slots(living: Cluster, operator: Operator) -> None:
    """Slots that stay open, some keys here and some there, serve as any other; one goes to a shard without slots.

    That shard is in nobody's table of slots until it has one.
    """
    source, other = living.masters[:2]
    slots = sorted(await operator.slots(source))[:2]
    tags = [tag for slot in slots for tag in tags_in(range(slot, slot + 1), 1)]
    async with stores_on(living) as stores:
        async with Crowd(stores, tags=tags) as crowd:
            targets = dict(zip(slots, (other, await asyncio.to_thread(living.grow)), strict=True))
            await crowd.go_on(64)
            for slot, target in targets.items():
                await operator.open_slot(slot, source, target)
            for _ in range(2):
                await crowd.go_on(32)
                for slot, target in targets.items():
                    assert await operator.move_keys(slot, source, target, 5)
            for slot, target in targets.items():
                await operator.close_slot(slot, source, target)
            await crowd.go_on(32)
            for slot, target in targets.items():
                await operator.move_slots([slot], target, source)
            await crowd.go_on(32)
        await crowd.check()


LEAST = ["+set", "+get", "+pttl", "+del", "+eval", "+evalsha", "+cluster|slots", "+asking"]
"""What the documentation names; for a client that was brought `+command` too."""


@pytest.mark.parametrize("without", [None, "-cluster|slots", "-asking", "-command"])
async def test_least_permissions(living: Cluster, operator: Operator, multiplex: bool, without: str | None) -> None:
    """A user with what the documentation names, and no more, is enough, in an open slot too; without any one it is not."""
    source, target = living.masters[:2]
    slot = min(await operator.slots(source))
    key = f"{{{tags_in(range(slot, slot + 1), 1)[0]}}}"
    brought = without in (None, "-command")
    rules = ["on", ">secret", "~asyncidem:*", "resetchannels", "-@all", *LEAST, *(["+command"] if brought else [])]
    for node in living.nodes:
        await operator.at(node, "ACL", "SETUSER", "worker", "reset", *rules, *([without] if without else []))
    url = living.url.replace("//", "//worker:secret@")
    client = RedisCluster.from_url(url)
    await operator.open_slot(slot, source, target)
    try:
        async with contextlib.AsyncExitStack() as stack:
            stores = [RedisStore.from_url(url, cluster=True, multiplex=multiplex, timeout=1)]
            if brought:
                stores.append(RedisStore(client, multiplex=multiplex, timeout=1))
            for number, store in enumerate(stores):
                await stack.enter_async_context(store)
                run = Idempotency(store).run(f"{key}{number}", asyncio.sleep, 0, number)
                if without is None or (without == "-command" and number == 0):
                    assert await run == number
                else:
                    with pytest.raises(StoreError, match=r"the user needs .*ASKING"):
                        await run
    finally:
        await client.aclose()
        await operator.close_slot(slot, source, target)
        await operator.move_slots([slot], target, source)


async def test_killed_master(living: Cluster, operator: Operator) -> None:
    """A master that dies is waited for within the time of a call, and what had reached its replica holds."""
    victim = living.masters[1]
    slots = await operator.slots(victim)
    replica = next(node for node in living.nodes if f"master_port:{victim.port}\r" in node.text("INFO", "replication"))
    async with stores_on(living, timeout=15) as stores:
        async with Crowd(stores) as crowd:
            await operator.at(replica, "CONFIG", "SET", "cluster-replica-no-failover", "no")
            safe = await crowd.copied(victim, replica)
            killed = time.monotonic()
            victim.kill()
            async with asyncio.timeout(20):
                await operator.promoted(replica)
            await crowd.go_on(64)

        def lost(call: Call) -> bool:
            return call.began < killed and call not in safe and slot_of(f"asyncidem:{call.key}") in slots

        await crowd.check(lost=lost)
    await operator.at(replica, "CONFIG", "SET", "cluster-replica-no-failover", "yes")
    victim.start()
