"""The commands that read, in this process, on a real server; and values of every kind and size."""

from typing import Any

import pytest

from asyncidem import RedisStore
from asyncidem.cli.changes import Purge
from asyncidem.cli.entries import Entry
from asyncidem.cli.keyspace import Keyspace
from asyncidem.stores.link import Command
from asyncidem.stores.routes import Node

from commandline import ALL, LONG, claimed, keys_of, run, store_do
from servers import Server

# -- list -----------------------------------------------------------------------------------------------------------------


def test_list_shows_every_status_and_no_payload(url: str, server: Server) -> None:
    """A line for each key of the prefix, whatever it holds; the same in JSON."""
    ran = run("list", url=url)
    assert ran.code == 0
    header, *lines = ran.out.splitlines()
    assert header.split() == ["STATUS", "ATTEMPT", "AGE", "EXPIRES", "SIZE", "KEY"]
    assert {line.split()[-1]: line.split()[0] for line in lines} == {
        "live": "live",
        "done": "completed",
        "failed": "completed",
        "orphan": "orphan",
        LONG: "live",
        "odd": "no-record",
        "new": "unknown",
        "list": "other-type",
        "k:lock": "lock",
    }
    as_json = run("list", "--json", url=url)
    assert keys_of(as_json) == ALL
    assert "s3cret" not in ran.out + as_json.out + ran.err + as_json.err


def test_every_listed_key_is_an_argument(url: str) -> None:
    """The digest of a long key and a lock's key too, and whole stored keys."""
    for document in run("list", "--json", url=url).documents:
        for form in ("key", "stored_key"):
            ran = run("inspect", document[form], "--json", url=url)
            assert ran.code == 0
            assert ran.document["stored_key"] == document["stored_key"]
            assert ran.document["status"] == document["status"]
    assert run("inspect", "n:long" + "g" * 600, "--json", url=url).document["key"] == LONG


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (("--status", "completed"), {"done", "failed"}),
        (("--status", "completed", "--orphaned"), {"done", "failed", "orphan"}),
        (("--orphaned",), {"orphan"}),
        (("--status", "lock", "--status", "other-type"), {"k:lock", "list"}),
        (("--starting-with", "l"), {"live", "list"}),
        (("--starting-with", "sha256:"), {LONG}),
        (("--starting-with", "*"), set()),
        (("--older-than", "1h"), set()),
        (("--older-than", "1h", "--ttl", "7d"), {"done", "failed"}),
        (("--prefix", "else:"), {"where"}),
        (("--prefix", "", "--starting-with", "else"), {"else:where"}),
    ],
)
def test_list_filters(url: str, options: tuple[str, ...], keys: set[str]) -> None:
    """By status, age and beginning; of unknown age is not older."""
    assert keys_of(run("list", "--json", *options, url=url)) == keys


@pytest.mark.parametrize("option", ["--older-than", "--ttl", "--timeout"])
def test_durations_that_are_none_are_refused(redis_url: str, option: str) -> None:
    """As misuse, which names the option and shows what to write."""
    ran = run("list", option, "soon", url=redis_url)
    assert ran.code == 2
    words = " ".join(ran.err.split())
    assert f"Invalid value for '{option}': 'soon' is no duration; write 90, 90s, 15m, 1h30m or 7d" in words


def test_keys_that_go_while_they_are_read_are_left_out(
    url: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SCAN has named may be gone at the next command."""
    page = Keyspace._page

    async def gone_before(keyspace: Keyspace, node: Node, keys: list[bytes]) -> list[Entry]:
        server.command("DEL", "asyncidem:done")
        return await page(keyspace, node, keys)

    monkeypatch.setattr(Keyspace, "_page", gone_before)
    assert keys_of(run("list", "--json", url=url)) == ALL - {"done"}


def test_keys_that_scan_returns_twice_are_shown_once(url: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least within one step of it."""
    ask = Keyspace.ask

    async def twice(keyspace: Keyspace, node: Node, *commands: Command, strict: bool = False) -> list[Any]:
        replies = await ask(keyspace, node, *commands, strict=strict)
        return [[replies[0][0], replies[0][1] * 2]] if commands[0][0] == "SCAN" else replies

    monkeypatch.setattr(Keyspace, "ask", twice)
    assert keys_of(run("list", "--json", url=url)) == ALL


def test_the_time_left_is_read_behind_the_value(url: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older time with newer bytes would show a live record as an orphan, and let it be deleted as what it is."""
    server.command("SET", "asyncidem:large", "x" * 5000)
    ask, order = Keyspace.ask, []

    async def watched(keyspace: Keyspace, node: Node, *commands: Command, strict: bool = False) -> list[Any]:
        order.append([command[0] for command in commands])
        return await ask(keyspace, node, *commands, strict=strict)

    monkeypatch.setattr(Keyspace, "ask", watched)
    assert "large" in keys_of(run("list", "--json", url=url))
    reads = [names for names in order if "PTTL" in names]
    assert {tuple(names) for names in reads} == {("GETRANGE", "STRLEN", "PTTL") * (len(ALL) + 1), ("GET", "PTTL")}


def test_list_says_what_it_could_not_decide(url: str) -> None:
    """Where an age is not known, that is told beside the list."""
    ran = run("list", "--status", "completed", "--older-than", "1s", url=url)
    assert len(ran.out.splitlines()) == 1
    assert "2 keys are left out: their age is not known; completed records need --ttl" in ran.err


def test_list_shows_data_when_asked(url: str) -> None:
    """Of records, and of values that are none."""
    ran = run("list", "--data", "--status", "completed", "--status", "no-record", url=url)
    assert ran.out.count("s3cret") == 3
    assert run("list", "--data", "--json", url=url).out.count("s3cret") == 3


def test_keys_are_data_and_no_commands_to_the_terminal(url: str, server: Server) -> None:
    """Control characters and markup of a key are shown as they are, in tables too; JSON has the key itself."""
    store_do(url, lambda store: store.claim("evil\x1b[2J[red]\n"))
    server.command("SET", "asyncidem:huge[bold]", "x" * 3000)
    for ran in (run("list", url=url), run("stats", url=url), run("inspect", "evil\x1b[2J[red]\n", url=url)):
        assert "\x1b" not in ran.out
        assert "evil\\x1b[2J[red]\\n" in ran.out
    assert "huge[bold]" in run("stats", url=url).out
    assert "evil\x1b[2J[red]\n" in keys_of(run("list", "--json", url=url))


def test_other_names_of_attributes(redis_url: str) -> None:
    """Records are read with the names that their workers were given."""
    store_do(redis_url, lambda store: store.claim("k"), status_attr="state")
    assert run("inspect", "k", "--json", url=redis_url).document["status"] == "unknown"
    assert run("inspect", "k", "--json", "--status-attr", "state", url=redis_url).document["status"] == "live"


# -- inspect and stats ----------------------------------------------------------------------------------------------------


def test_inspect(url: str) -> None:
    """All that is known of a key, and its payload only when asked."""
    live = run("inspect", "live", "--json", url=url).document
    assert live["fingerprint"] == "f" * 32
    assert live["attempt"] == 1
    assert 0 < live["lease_left"] <= 300
    assert live["age"] >= 0
    text = run("inspect", "done", url=url)
    assert "s3cret" not in text.out + text.err
    assert "status       completed" in text.out
    assert "deletes the record" in text.err
    assert 'data         "s3cret"' in run("inspect", "done", "--data", url=url).out
    assert "s3cret" in run("inspect", "failed", "--data", url=url).out
    assert "age          " in run("inspect", "done", "--ttl", "1d", url=url).out
    assert "expires in   never" in run("inspect", "odd", url=url).out
    other = run("inspect", "list", url=url)
    assert "delete it yourself" in other.out
    assert other.err == ""


def test_inspect_of_nothing(url: str) -> None:
    """Is exit code 1, and JSON stays empty."""
    ran = run("inspect", "nothing", "--json", url=url)
    assert (ran.code, ran.out) == (1, "")
    assert "nothing is stored under 'nothing'" in ran.err


@pytest.mark.parametrize("key", ["", "a\udcff"])
def test_keys_that_no_store_takes(url: str, key: str) -> None:
    """Are misuse, as they would be in a program."""
    ran = run("inspect", key, url=url)
    assert ran.code == 2
    assert ran.err.startswith("error: the idempotency key ")


def test_stats(url: str) -> None:
    """Counts add up, in JSON and for people."""
    found = run("stats", "--json", "--top", "2", url=url).document
    assert found["keys"] == len(ALL)
    assert found["status"]["live"]["keys"] == 2
    assert sum(found["size"].values()) == sum(found["age"].values()) == len(ALL)
    assert len(found["biggest"]) == len(found["oldest"]) == 2
    text = run("stats", url=url)
    words = " ".join(text.out.split())
    assert f"all {len(ALL)}" in words
    assert "3 keys never expire" in words
    assert "s3cret" not in text.out


def test_stats_of_nothing(redis_url: str) -> None:
    """An empty keyspace is no error."""
    ran = run("stats", "--top", "0", url=redis_url)
    assert ran.code == 0
    assert "all 0 0 B" in " ".join(ran.out.split())
    assert keys_of(run("list", "--json", url=redis_url)) == set()


# -- values of all kinds --------------------------------------------------------------------------------------------------


def test_large_values(redis_url: str, server: Server) -> None:
    """They are listed by their beginning, read whole where that does not tell, and deleted only as they were read."""
    large = "x" * 70_000

    async def complete(store: RedisStore) -> None:
        await store.complete(await claimed(store, "ours"), f'"{large}"')

    store_do(redis_url, complete)
    peer = f'{{"data": "{large}", "status": "COMPLETED", "expiration": 1}}'
    server.command("SET", "asyncidem:peer", peer, "PX", "90000")
    server.command("SET", "asyncidem:odd", large)
    found = {document["key"]: document for document in run("list", "--json", "--data", url=redis_url).documents}
    assert {key: entry["status"] for key, entry in found.items()} == {
        "ours": "completed",
        "peer": "completed",
        "odd": "no-record",
    }
    assert all(len(str(entry)) < 10_000 for entry in found.values())
    assert all("inspect shows the whole" in entry["note"] for key, entry in found.items() if key != "odd")
    assert found["ours"]["size"] > 70_000
    assert len(run("inspect", "ours", "--json", "--data", url=redis_url).document["data"]) == 70_002
    options = ("purge", "--status", "completed", "--status", "no-record", "--json", "--apply", "--yes")
    assert run(*options, url=redis_url).document["removed"] == 3
    assert keys_of(run("list", "--json", url=redis_url)) == set()


def test_large_values_that_change_meanwhile_stay(
    redis_url: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that took the place of one, and one that went, are left alone."""
    for key in ("a", "b", "c"):
        server.command("SET", f"asyncidem:{key}", "x" * 5000)
    delete = Purge._delete

    async def changed_before(purge: Purge, entries: list[Entry]) -> None:
        server.command("DEL", "asyncidem:a")
        server.command("SET", "asyncidem:b", '{"status": "INPROGRESS"}', "PX", "90000")
        await delete(purge, entries)

    monkeypatch.setattr(Purge, "_delete", changed_before)
    ran = run("purge", "--status", "no-record", "--apply", "--yes", "--json", url=redis_url)
    assert (ran.document["matched"], ran.document["removed"], ran.document["changed"]) == (3, 1, 2)
    assert keys_of(run("list", "--json", url=redis_url)) == {"b"}


def test_keys_that_are_not_utf8(redis_url: str, server: Server) -> None:
    """They are shown, and left alone: no store of asyncidem wrote them."""
    assert server.command("EVAL", "return redis.call('SET', 'asyncidem:\\255', 'odd')", "0") == "+OK"
    assert keys_of(run("list", "--json", url=redis_url)) == {"\\xff"}
    ran = run("purge", "--status", "no-record", "--apply", "--yes", url=redis_url)
    assert ran.code == 0
    assert "1 keys are not UTF-8, and were left alone" in ran.err
    assert server.command("DBSIZE") == ":1"


def test_purge_of_many_shows_some(redis_url: str, server: Server) -> None:
    """Thousands of keys are several pages, and a few examples."""
    fill_up = "for i = 1, 2000 do redis.call('SET', 'asyncidem:' .. i, 'odd') end return redis.status_reply('OK')"
    assert server.command("EVAL", fill_up, "0") == "+OK"
    ran = run("purge", "--status", "no-record", url=redis_url)
    assert len(ran.err.splitlines()) == 7
    assert "…" in ran.err
    assert (
        run("purge", "--status", "no-record", "--apply", "--yes", "--json", url=redis_url).document["removed"] == 2000
    )
    assert server.command("DBSIZE") == ":0"
