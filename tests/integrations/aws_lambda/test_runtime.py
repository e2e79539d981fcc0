"""Under AWS's own runtime client, in a process of its own, as Lambda runs it."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from invocations import failed, sqs_event
from lambdas import LOCAL, function, local_lambda, require_runtime
from proxy import Proxy
from servers import HOST, Server

pytestmark = pytest.mark.once

SHORT = "ASYNCIDEM_TEST_KINDS" in os.environ
"""Whether this interpreter has the short run."""


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    """A client of the server."""
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


def record_of(client: Any, key: str) -> dict[str, Any]:
    """Return what is stored under a key."""
    record: dict[str, Any] = json.loads(client.get(f"asyncidem:{key}"))
    return record


def connections(client: Any) -> int:
    """Return how many connections the server has, beside that of the client."""
    return len(client.client_list()) - 1


def test_a_thousand_warm_invocations(redis_url: str, client: Any) -> None:
    """In one process, each key twice, frozen in between: no error, no second effect, and nothing that stays behind."""
    rounds = 50 if SHORT else 500
    seen: list[dict[str, Any]] = []
    with function("handler", redis_url) as local:
        for number in range(rounds):
            first, again = (local.invoke({"key": f"k-{number}"}) for _ in range(2))
            assert first.error is again.error is None
            assert (first.cold, again.cold) == (number == 0, False)
            assert first.pid == again.pid
            assert first.result["request"] == again.result["request"]  # the stored one
            seen += [first.result, again.result]
        assert connections(client) == 1
        assert local.logged() == ""
    assert {result["before"] for result in seen} == {0}
    assert {result["ran"] for result in seen} == {1}
    assert {result["tasks"] for result in seen} == {1}
    assert len({result["files"] for result in seen[2:]}) == 1


@pytest.mark.parametrize(
    ("what", "error"),
    [("raise", "ValueError"), ("cancel", "HandlerCancelledError"), ("outlive", "DeadlineExceededError")],
)
def test_a_handler_that_fails_leaves_its_process(redis_url: str, client: Any, what: str, error: str) -> None:
    """The runtime client reports it, and the next invocation is a warm one: a retry, by what is known of the first."""
    with function("handler", redis_url, timeout=1) as local:
        local.start()
        first = local.invoke({"key": "k", "do": what})
        assert first.error["errorType"] == error
        assert first.seconds < 0.9
        if what == "raise":
            assert client.get("asyncidem:k") is None
        else:  # its outcome is not known: the key is kept until half a second after the invocation could have lasted
            assert record_of(client, "k")["status"] == "INPROGRESS"
            again = local.invoke({"key": "k"})
            assert again.error["errorType"] == "InProgressError"
            wait_for_end_of_lease(client, "k")
        again = local.invoke({"key": "k"})
        assert again.error is None
        assert again.result["attempt"] == (1 if what == "raise" else 2)
        assert (again.pid, again.cold) == (first.pid, False)


def wait_for_end_of_lease(client: Any, key: str) -> None:
    """Wait until the lease of a record is over: it is what has passed of its ttl."""
    record = record_of(client, key)
    while record["ttl"] - client.pttl(f"asyncidem:{key}") < record["lease"]:
        time.sleep(0.02)  # another process' time, and a server's


def test_a_process_that_is_killed_by_the_time_out(redis_url: str, client: Any) -> None:
    """A handler that nothing can cancel dies with it; the cold start after its lease sees that somebody was there."""
    with function("handler", redis_url, timeout=0.8) as local:
        local.start()
        killed = local.invoke({"key": "k", "do": "hang"})
        assert killed.error["errorType"] == "Sandbox.Timedout"
        record = record_of(client, "k")
        assert record["status"] == "INPROGRESS"
        assert record["lease"] == pytest.approx(1_300, abs=200)
        wait_for_end_of_lease(client, "k")
        again = local.invoke({"key": "k"})
        assert again.error is None
        assert again.cold
        assert again.pid != killed.pid
        assert again.result["attempt"] == 2


@pytest.mark.parametrize("how", ["closed", "silent"])
async def test_a_connection_that_died_while_the_process_was_frozen(redis_url: str, server: Server, how: str) -> None:
    """It costs no more than a third of the store's timeout, 3 s here, whether it was closed or lost in silence."""
    async with Proxy(HOST, server.port) as proxy:
        with function("handler", proxy.url, timeout=3) as local:
            first = await asyncio.to_thread(local.invoke, {"key": "a"})
            assert first.error is None
            if how == "closed":
                proxy.cut()
            else:
                for link in proxy._links:  # what a stateful firewall does: it has forgotten them
                    link.forward = lambda _: None  # type: ignore[method-assign]
            again = await asyncio.to_thread(local.invoke, {"key": "b"})
            assert again.error is None
            assert (again.pid, again.cold, again.result["attempt"]) == (first.pid, False, 1)
            assert again.seconds < (1.0 if how == "silent" else 0.0) + 0.5
            assert again.seconds > (0.9 if how == "silent" else 0.0)


def test_asyncio_run_for_each_invocation(redis_url: str, client: Any) -> None:
    """Over a store of the module: every invocation works, and leaves no record in progress."""
    with function("runs", redis_url) as local:
        for number in range(10):
            first, again = (local.invoke({"key": f"k-{number}"}) for _ in range(2))
            assert first.error is again.error is None
            assert (first.result["attempt"], again.result["ran"]) == (1, 1)
            assert record_of(client, f"k-{number}")["status"] == "COMPLETED"
            assert first.result["tasks"] == 1
            assert connections(client) == 0
        assert local.logged() == ""


def test_a_batch(redis_url: str, client: Any) -> None:
    """What was cut off by the time is an answer too; delivered again, only that runs."""
    event = sqs_event("a", "b", "c")
    for record, what in zip(event["Records"], ("", "raise", "outlive"), strict=True):
        record["body"] = what
    with function("batch", redis_url, timeout=1) as local:
        first = local.invoke(event)
        assert failed(first.result) == ["b", "c"]
        assert record_of(client, "a")["status"] == "COMPLETED"
        wait_for_end_of_lease(client, "c")
        for record in event["Records"]:
            record["body"] = ""
        again = local.invoke(event)
        assert failed(again.result) == []
        assert (again.pid, again.cold) == (first.pid, False)


def test_a_snapshot_holds_no_connection(redis_url: str, client: Any) -> None:
    """What was warmed up before it is closed, and made anew behind it."""
    env = {"AWS_LAMBDA_INITIALIZATION_TYPE": "snap-start", "WARM": "1"}
    with function("handler", redis_url, env=env) as local:
        local.start()
        assert local.api.restored == 1
        assert len(client.keys("asyncidem:warm-up-*")) == 1
        assert connections(client) == 0
        assert local.invoke({"key": "k"}).error is None
        assert connections(client) == 1
        assert "rror" not in local.logged()


def test_managed_instances_fork_their_workers(redis_url: str, client: Any) -> None:
    """Each has a loop and a connection of its own, and they share the records."""
    env = {"AWS_LAMBDA_MAX_CONCURRENCY": "2"}
    with function("handler", redis_url, env=env, freeze=False) as local:
        local.start()
        for number in range(20):
            key = f"k-{number // 2}"
            assert local.invoke({"key": key}).error is None
        assert [client.exists(f"asyncidem:k-{number}") for number in range(10)] == [1] * 10


def test_the_examples_run(redis_url: str) -> None:
    """In one command, and print their invocations."""
    require_runtime()
    run = subprocess.run(
        [sys.executable, str(LOCAL)],
        env={**os.environ, "REDIS_URL": redis_url},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("a new process") == 2
    assert '"idempotent-replayed": "true"' in run.stdout
    assert '-> {"batchItemFailures": []}' in run.stdout
    assert "attempt 2" in run.stdout


def test_the_local_server_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `REDIS_URL` the examples run over a server that they start themselves."""
    monkeypatch.delenv("REDIS_URL", raising=False)
    with local_lambda().redis_url() as url, redis.Redis.from_url(url) as client:
        assert client.ping()
