"""What `doctor` says of what it found, without a server."""

from typing import Any

import pytest

from asyncidem.cli.diagnosis import Facts, Finding, Level, NodeFacts, diagnose

GOOD = {
    "valkey_version": "9.1.2",
    "redis_version": "7.2.4",
    "role": "master",
    "connected_slaves": "1",
    "maxmemory": "1073741824",
    "maxmemory_policy": "noeviction",
    "used_memory": "1000000",
    "aof_enabled": "1",
    "aof_last_write_status": "ok",
    "rdb_last_bgsave_status": "ok",
}


def facts(*, node: dict[str, Any] | None = None, **whole: Any) -> Facts:
    """Return facts about one server with which all is well, but for what is given."""
    server = NodeFacts("", GOOD, 0.1)._replace(**(node or {}))
    good = Facts((server,), "standalone", "worker", "one multiplexed connection per node", (), "", (0.001,) * 5, 1.5)
    return good._replace(**whole)


def info(**fields: str) -> dict[str, Any]:
    """Return what INFO tells, but for these fields."""
    return {"info": {**GOOD, **fields}}


def about(found: list[Finding], topic: str) -> Finding:
    """Return the only finding about a topic that is not as it should be, or the only one."""
    of_topic = [finding for finding in found if finding.topic == topic]
    (finding,) = [finding for finding in of_topic if finding.level is not Level.OK] or of_topic
    return finding


def test_all_is_well() -> None:
    """Then nothing has a remedy."""
    found = diagnose(facts())
    assert {finding.level for finding in found} == {Level.OK}
    assert not any(finding.remedy for finding in found)
    assert about(found, "server").found == "Valkey 9.1.2"
    assert about(found, "eviction").found == "none: maxmemory 1.0 GiB, noeviction"
    assert about(found, "mode").found == "standalone, 1 master"
    assert about(found, "clock").found == "0.1 s ahead of this machine's"


@pytest.mark.parametrize(
    ("given", "topic", "level", "found", "remedy"),
    [
        (facts(user=None), "user", Level.NOTE, "not known", ""),
        (facts(user="default"), "user", Level.NOTE, "may do everything", "for the prefix alone"),
        (facts(failure="NOPERM"), "life of a record", Level.PROBLEM, "NOPERM", "no operation"),
        (facts(fallbacks=("scripts",)), "path", Level.NOTE, "scripts", ""),
        (facts(latencies=(0.001, 0.001, 0.9)), "latency", Level.WARNING, "worst 900.00 ms of 3", "raise the store's"),
        (facts(node={"cluster_state": "fail"}), "cluster", Level.PROBLEM, "fail", "missing slots"),
        (facts(node={"clock_offset": -5.0}), "clock", Level.NOTE, "5.0 s behind", "synchronise"),
        (facts(node={"info": None}), "server", Level.NOTE, "may not call INFO", "+info"),
        (
            facts(node={"info": {**GOOD, "valkey_version": "", "redis_version": "6.2.1"}}),
            "server",
            Level.NOTE,
            "Redis 6.2.1",
            "upgrade",
        ),
        (facts(node={"info": {}}), "server", Level.NOTE, "no version", "upgrade"),
        (facts(node=info(role="slave")), "role", Level.PROBLEM, "refuses writes", "--sentinel or --cluster"),
        (facts(node=info(connected_slaves="0")), "replicas", Level.NOTE, "none", "wait_replicas=1"),
        (facts(node=info(cluster_enabled="1")), "mode", Level.PROBLEM, "node of a cluster", "--cluster"),
        (
            facts(node=info(maxmemory_policy="allkeys-lru", evicted_keys="7")),
            "eviction",
            Level.PROBLEM,
            "allkeys-lru; 7 keys evicted",
            "noeviction",
        ),
        (facts(node=info(used_memory="1073741823")), "memory", Level.WARNING, "of 1.0 GiB", "raise maxmemory"),
        (facts(node=info(rdb_last_bgsave_status="err")), "persistence", Level.PROBLEM, "failed", "disk"),
        (facts(node=info(aof_last_write_status="err")), "persistence", Level.PROBLEM, "failed", "disk"),
        (facts(node=info(aof_enabled="0")), "persistence", Level.WARNING, "no append-only", "appendonly yes"),
    ],
)
def test_findings(given: Facts, topic: str, level: Level, found: str, remedy: str) -> None:
    """What is not as it should be says so, and what to change."""
    finding = about(diagnose(given), topic)
    assert finding.level is level
    assert found in finding.found
    assert remedy in finding.remedy


def test_a_policy_without_a_limit_evicts_nothing() -> None:
    """As the library's own warning has it."""
    finding = about(diagnose(facts(node=info(maxmemory="0", maxmemory_policy="allkeys-lru"))), "eviction")
    assert finding.level is Level.OK
    assert "not set" in finding.found


def test_each_node_is_named() -> None:
    """Those of a cluster are told apart, and being one is no problem of theirs."""
    nodes = tuple(NodeFacts(name, {**GOOD, "cluster_enabled": "1"}, None, "ok") for name in ("a:1", "b:1"))
    found = diagnose(facts(nodes=nodes, mode="cluster", latencies=()))
    assert {finding.node for finding in found} == {"", "a:1", "b:1"}
    assert {finding.level for finding in found} == {Level.OK}
    assert about(found, "mode").found == "cluster, 2 masters"
