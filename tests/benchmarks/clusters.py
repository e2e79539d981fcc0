"""A cluster of three primaries and three replicas, formed with CLUSTER commands alone."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import redis

from servers import HOST, Server

SLOTS: Final = 16_384
OPTIONS: Final = (
    *("--cluster-enabled", "yes", "--cluster-node-timeout", "500", "--appendonly", "no"),
    # A busy machine must not fail over in the middle of a sample.
    *("--cluster-replica-no-failover", "yes"),
)

FORMED_WITHIN: Final = 30.0
"""Seconds that six nodes may take to know one another."""


@contextlib.contextmanager
def cluster(kind: str, directory: Path, primaries: int = 3) -> Iterator[list[Server]]:
    """Start a cluster with a replica for each primary, and end it; the primaries come first.

    Raises:
        RuntimeError: it did not form in time.
    """
    with contextlib.ExitStack() as stack:
        nodes: list[Server] = []
        for number in range(2 * primaries):
            nodes.append(stack.enter_context(Server(kind, directory / str(number), *OPTIONS)))
        clients = [stack.enter_context(redis.Redis(host=HOST, port=node.port)) for node in nodes]
        _form(nodes, clients, primaries)
        yield nodes


def _form(nodes: list[Server], clients: list[Any], primaries: int) -> None:
    bounds = [SLOTS * number // primaries for number in range(primaries + 1)]
    for number, client in enumerate(clients):
        client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        if number < primaries:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        clients[0].execute_command("CLUSTER", "MEET", HOST, nodes[number].port)
    deadline = time.monotonic() + FORMED_WITHIN
    _until(deadline, lambda: all(_facts(client)["cluster_known_nodes"] == str(len(nodes)) for client in clients))
    names = [_text(client.execute_command("CLUSTER", "MYID")) for client in clients]
    for number in range(primaries, len(nodes)):
        # Refused until the replica has heard that the other one is a primary.
        _until(deadline, lambda number=number: _replicate(clients[number], names[number - primaries]))
    _until(deadline, lambda: all(_facts(client)["cluster_state"] == "ok" for client in clients))
    _until(deadline, lambda: all(client.info("replication")["connected_slaves"] == 1 for client in clients[:primaries]))
    # Until every node knows the replicas, clients may be told to change their minds.
    _until(deadline, lambda: all(_settled(client, primaries) for client in clients))


def _replicate(client: Any, primary: str) -> bool:
    try:
        client.execute_command("CLUSTER", "REPLICATE", primary)
    except redis.ResponseError:
        return False
    return True


def _settled(client: Any, primaries: int) -> bool:
    """Say whether a node knows a primary and a replica for each range of slots."""
    ranges = client.execute_command("CLUSTER", "SLOTS")
    return len(ranges) == primaries and all(len(nodes) == 4 for nodes in ranges)


def _facts(client: Any) -> dict[str, str]:
    reply = client.execute_command("CLUSTER", "INFO")
    if isinstance(reply, dict):
        return {_text(name): _text(value) for name, value in reply.items()}
    return dict(line.split(":", 1) for line in _text(reply).split() if ":" in line)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _until(deadline: float, condition: Any) -> None:
    while not condition():
        if time.monotonic() > deadline:
            message = f"the cluster did not form within {FORMED_WITHIN:g} s"
            raise RuntimeError(message)
        time.sleep(0.02)
