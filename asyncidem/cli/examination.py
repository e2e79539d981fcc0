"""What ``doctor`` looks at: the servers' own words, and one record's whole life, which shows what no setting tells."""

from __future__ import annotations

import os
import time
from typing import Any, Final

from ..errors import IdempotencyError, StoreError
from ..model import Claimed, Replay
from ..stores.multiplex import MultiplexedLink
from ..stores.redis import RedisStore
from ..stores.routes import Node
from .diagnosis import Facts, NodeFacts
from .keyspace import Keyspace

__all__ = ["examine"]

READS: Final = 50
"""How many reads the latency is taken from."""

LIVES: Final = 10
"""Seconds that the record of the examination lives, if nothing deletes it."""


async def examine(keyspace: Keyspace, mode: str) -> Facts:
    """Return what is found. It writes one record of its own under the prefix, and deletes it.

    Args:
        keyspace: the store's.
        mode: how the servers are reached.

    Raises:
        StoreError: a server refused to be reached at all.
        StoreUnavailableError: a server does not answer.
    """
    store = keyspace.store
    nodes = await keyspace.masters(checked=False)
    (user,) = await keyspace.ask(nodes[0], ("ACL", "WHOAMI"))
    failure, latencies = "", []
    try:
        latencies = await _live(store)
    except IdempotencyError as error:
        failure = str(error)
    return Facts(
        nodes=tuple([await _node(keyspace, node, mode) for node in nodes]),
        mode=mode,
        user=user.decode(errors="replace") if isinstance(user, bytes) else None,
        path=_path(store),
        fallbacks=_fallbacks(store),
        failure=failure,
        latencies=tuple(latencies),
        silence=store.timeout / 3,
    )


async def _live(store: RedisStore) -> list[float]:
    """Lead a record through its life, as an operation does; return how long reads of it took, in seconds."""
    key = f"doctor:{os.urandom(8).hex()}"
    claim = await store.claim(key, lease=LIVES, ttl=LIVES)
    try:
        if not isinstance(claim, Claimed):
            raise StoreError(f"a new key was not claimed but {type(claim).__name__}")
        await store.renew(claim)
        latencies: list[float] = []
        for _ in range(READS):
            began = time.perf_counter()
            await store.get(key)
            latencies.append(time.perf_counter() - began)
        await store.complete(claim, '"examined"')
        # The second claim goes the way of all that follow: the first one looked for scripts.
        again = await store.claim(key, lease=LIVES, ttl=LIVES)
        if not isinstance(again, Replay):
            raise StoreError(f"what was just completed is not replayed: {type(again).__name__}")
    finally:
        await store.delete(key)
    return latencies


async def _node(keyspace: Keyspace, node: Node, mode: str) -> NodeFacts:
    began = time.time()
    info, clock, state = await keyspace.ask(node, ("INFO",), ("TIME",), ("CLUSTER", "INFO"))
    offset = None
    if isinstance(clock, list):
        seconds, microseconds = (int(part) for part in clock)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        offset = seconds + microseconds / 1e6 - (began + time.time()) / 2
    return NodeFacts(
        name=node.name if mode == "cluster" else "",
        info=_fields(info) if isinstance(info, bytes) else None,
        clock_offset=offset,
        cluster_state=_fields(state).get("cluster_state") if isinstance(state, bytes) else None,
    )


def _fields(text: bytes) -> dict[str, str]:
    lines = text.decode(errors="replace").splitlines()
    return {name: value for name, _, value in (line.partition(":") for line in lines) if value}


def _path(store: RedisStore) -> str:
    if store._plain is not None:
        return "guarded by a lock: not atomic where a write outlasts its lock"
    link: Any = store._wire
    if isinstance(link, MultiplexedLink) and link._plain is None:
        return "one multiplexed connection per node"
    return "a connection of the pool for every command"


def _fallbacks(store: RedisStore) -> tuple[str, ...]:
    if store._plain is not None:
        return ("the server runs no scripts: allow them, or use a server that has them",)
    return () if store._set_get else ("scripts stand in for SET with NX and GET (Redis 7.0)",)
