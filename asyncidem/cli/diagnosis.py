"""What ``doctor`` says of what it found: pure, from facts to findings. The advice is that of the guide to Redis."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any, Final, NamedTuple

from .words import size

__all__ = ["Facts", "Finding", "Level", "NodeFacts", "diagnose"]

CLOCK_TOLERANCE: Final = 1.0
"""Seconds that clocks may differ before it is worth a note: the timestamps of Powertools' records are that coarse."""

FULL: Final = 0.9
"""The share of ``maxmemory`` from which memory is nearly full."""


class Level(StrEnum):
    """How much a finding matters: as it should be, worth knowing, a risk, or what breaks a promise."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(NamedTuple):
    """One line of a diagnosis: where, about what, what is so, and what to change ("" for nothing)."""

    node: str
    topic: str
    level: Level
    found: str
    remedy: str = ""


class NodeFacts(NamedTuple):
    """What one server tells.

    Attributes:
        name: its address; "" if there is but one.
        info: the fields of INFO; None if the user may not read it.
        clock_offset: seconds that its clock is ahead of this machine's; None if it does not tell.
        cluster_state: of CLUSTER INFO, where it is part of a cluster.
    """

    name: str
    info: dict[str, str] | None
    clock_offset: float | None
    cluster_state: str | None = None


class Facts(NamedTuple):
    """What was found.

    Attributes:
        nodes: the masters.
        mode: how they were reached: ``standalone``, ``cluster`` or ``sentinel``.
        user: the name of the ACL user; None if it may not ask.
        path: how commands reach the server.
        fallbacks: what stands in for what is missing.
        failure: what the life of a record failed with; "" if it did not.
        latencies: seconds that reads of a record took.
        silence: seconds in which a command must be answered before it is repeated.
    """

    nodes: tuple[NodeFacts, ...]
    mode: str
    user: str | None
    path: str
    fallbacks: tuple[str, ...]
    failure: str
    latencies: tuple[float, ...]
    silence: float


def diagnose(facts: Facts) -> list[Finding]:
    """Return findings, those about the whole first, then each server's."""
    found = [*_whole(facts)]
    for node in facts.nodes:
        found += _node(node, facts.mode)
    return found


def _whole(facts: Facts) -> Iterator[Finding]:
    masters = len(facts.nodes)
    yield Finding("", "mode", Level.OK, f"{facts.mode}, {masters} master{'s' if masters > 1 else ''}")
    if facts.user is None:
        yield Finding("", "user", Level.NOTE, "not known: the user may not ask for its name (ACL WHOAMI)")
    elif facts.user == "default":
        yield Finding(
            "", "user", Level.NOTE, "default, which may do everything", "give workers a user for the prefix alone"
        )
    else:
        yield Finding("", "user", Level.OK, facts.user)
    if facts.failure:
        yield Finding(
            "", "life of a record", Level.PROBLEM, facts.failure, "without it no operation can be claimed or completed"
        )
    else:
        yield Finding("", "life of a record", Level.OK, "claimed, read, renewed, completed, replayed, deleted")
    yield Finding("", "path", Level.OK, facts.path)
    for fallback in facts.fallbacks:
        yield Finding("", "path", Level.NOTE, fallback)
    if facts.latencies:
        times = sorted(facts.latencies)
        middle, worst = times[len(times) // 2] * 1000, times[-1] * 1000
        said = f"median {middle:.2f} ms, worst {worst:.2f} ms of {len(times)} reads"
        slow = times[-1] > facts.silence / 2
        yield Finding(
            "",
            "latency",
            Level.WARNING if slow else Level.OK,
            said,
            f"a command is repeated after {facts.silence:.2g} s of silence: raise the store's timeout" if slow else "",
        )


def _node(node: NodeFacts, mode: str) -> Iterator[Finding]:
    if node.cluster_state not in (None, "ok"):
        yield Finding(
            node.name,
            "cluster",
            Level.PROBLEM,
            f"its state is {node.cluster_state}",
            "bring the masters of the missing slots back; until then their keys are refused",
        )
    if node.clock_offset is not None:
        ahead = node.clock_offset
        yield Finding(
            node.name,
            "clock",
            Level.OK if abs(ahead) <= CLOCK_TOLERANCE else Level.NOTE,
            f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's",
            ""
            if abs(ahead) <= CLOCK_TOLERANCE
            else "it matters only for records shared with Powertools, and for plain clients: synchronise both",
        )
    if node.info is None:
        yield Finding(
            node.name,
            "server",
            Level.NOTE,
            "version, eviction and persistence are not known: the user may not call INFO",
            "allow +info, which the workers' warning about eviction needs too",
        )
        return
    yield from _server(node.name, node.info, mode)
    yield from _memory(node.name, node.info)
    yield from _persistence(node.name, node.info)


def _server(name: str, info: dict[str, str], mode: str) -> Iterator[Finding]:
    valkey = info.get("valkey_version")
    version = f"Valkey {valkey}" if valkey else f"Redis {info.get('redis_version', '(no version)')}"
    old = not valkey and _major(info.get("redis_version", "")) < 7
    yield Finding(
        name,
        "server",
        Level.NOTE if old else Level.OK,
        version,
        "below 7.0 a script stands in for SET NX GET: upgrade when you can" if old else "",
    )
    if info.get("role") not in (None, "master"):
        yield Finding(
            name,
            "role",
            Level.PROBLEM,
            "it is a replica, which refuses writes",
            "give the address of its master, or use --sentinel or --cluster",
        )
    elif info.get("connected_slaves", "0") == "0":
        yield Finding(
            name,
            "replicas",
            Level.NOTE,
            "none: what it loses is lost",
            "a replica and wait_replicas=1 survive the loss of the master",
        )
    else:
        yield Finding(name, "replicas", Level.OK, f"{info['connected_slaves']} connected")
    if info.get("cluster_enabled") == "1" and mode != "cluster":
        yield Finding(
            name,
            "mode",
            Level.PROBLEM,
            "it is a node of a cluster",
            "use --cluster here, and cluster=True for the store",
        )


def _memory(name: str, info: dict[str, str]) -> Iterator[Finding]:
    limit, policy = _number(info, "maxmemory"), info.get("maxmemory_policy", "noeviction")
    used, evicted = _number(info, "used_memory"), _number(info, "evicted_keys")
    if limit and policy != "noeviction":
        yield Finding(
            name,
            "eviction",
            Level.PROBLEM,
            f"maxmemory {size(limit)} with maxmemory-policy {policy}; {evicted} keys evicted since its start",
            "a record that is evicted lets its operation run again: CONFIG SET maxmemory-policy noeviction",
        )
    else:
        yield Finding(name, "eviction", Level.OK, f"none: maxmemory {size(limit) if limit else 'is not set'}, {policy}")
    if limit and used > FULL * limit:
        yield Finding(
            name,
            "memory",
            Level.WARNING,
            f"{size(used)} of {size(limit)} are used",
            "when it is full, claims are refused before their effect: raise maxmemory, or shorten ttl",
        )


def _persistence(name: str, info: dict[str, str]) -> Iterator[Finding]:
    if info.get("aof_last_write_status", "ok") != "ok" or info.get("rdb_last_bgsave_status", "ok") != "ok":
        yield Finding(
            name,
            "persistence",
            Level.PROBLEM,
            "the last write to disk failed; such a server may refuse writes (MISCONF)",
            "free disk space, and see its log",
        )
    if info.get("aof_enabled") == "1":
        yield Finding(name, "persistence", Level.OK, "append-only file")
        return
    yield Finding(
        name,
        "persistence",
        Level.WARNING,
        "no append-only file: a restart loses what was written since the last snapshot, if there is one",
        "completed operations can run again then: appendonly yes",
    )


def _major(version: str) -> int:
    first = version.partition(".")[0]
    return int(first) if first.isdigit() else 0


def _number(info: dict[str, Any], name: str) -> int:
    text = str(info.get(name, "0"))
    return int(text) if text.isdigit() else 0
