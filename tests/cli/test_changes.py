"""The commands that change, in this process, on a real server: what is released and deleted, and what stays."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from asyncidem import Claimed, LeaseLostError, RedisStore, State
from asyncidem.cli.changes import Purge
from asyncidem.cli.entries import Entry
from asyncidem.cli.keyspace import Keyspace

from commandline import ALL, LONG, Ran, changed_before_answer, claimed, keys_of, run, store_do
from servers import Server


def get(url: str, key: str) -> Any:
    """Return the record under a key."""
    return store_do(url, lambda store: store.get(key))


def elsewhere(work: Callable[[], Any]) -> Any:
    """Do something in a thread: the command's own loop runs in this one."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


# -- release --------------------------------------------------------------------------------------------------------------


def test_release_of_a_live_key_needs_force_and_apply(url: str) -> None:
    """Without them the risk is told, and nothing is done; then its next call runs as attempt 2, and its owner is told."""

    async def owned(store: RedisStore) -> None:
        claim = await claimed(store, "mine", lease=300)
        refused = run_elsewhere("release", "mine", "--apply", "--yes")
        assert refused.code == 4
        assert "left alone: if its worker still lives, the effect may happen twice" in refused.err
        dry = run_elsewhere("release", "mine", "--force")
        assert dry.code == 0
        assert "dry run" in dry.err
        declined = run_elsewhere("release", "mine", "--force", "--apply", answer="n\n")
        assert (declined.code, "not confirmed" in declined.err) == (4, True)
        unanswered = run_elsewhere("release", "mine", "--force", "--apply")
        assert (unanswered.code, "not confirmed" in unanswered.err) == (4, True)
        await store.renew(claim)

        released = run_elsewhere("release", "mine", "--force", "--apply", "--json", answer="y\n")
        assert released.code == 0
        assert released.document["released"] is True
        with pytest.raises(LeaseLostError):
            await store.complete(claim, '"late"')
        again = await claimed(store, "mine")
        assert again.attempt == 2

    def run_elsewhere(*args: str, answer: str | None = None) -> Ran:
        done: list[Ran] = []
        elsewhere(lambda: done.append(run(*args, url=url, answer=answer)))
        return done[0]

    store_do(url, owned)


def test_release_of_a_completed_key_lets_it_run_again(url: str) -> None:
    """Which is why it needs force."""
    refused = run("release", "done", "--json", url=url)
    assert refused.code == 4
    assert refused.document["released"] is False
    assert "runs it again" in refused.document["risk"]
    assert get(url, "done") is not None
    assert run("release", "done", "--force", "--apply", "--yes", url=url).code == 0
    assert get(url, "done") is None


@pytest.mark.parametrize("key", ["new", "k:lock"])
def test_release_of_what_is_no_operation(url: str, server: Server, key: str) -> None:
    """A record of another version and a lock are deleted, with force."""
    assert run("release", key, url=url).code == 4
    assert run("release", key, "--force", "--apply", "--yes", url=url).code == 0
    assert server.command("EXISTS", f"asyncidem:{key}") == ":0"


@pytest.mark.parametrize("key", ["orphan", "odd"])
def test_release_of_what_is_free(url: str, key: str) -> None:
    """Is done without doing anything."""
    before = run("inspect", key, "--json", url=url).document
    ran = run("release", key, "--json", "--apply", url=url)
    assert (ran.code, ran.document["released"]) == (0, False)
    assert "nothing: the next c" in ran.err
    assert run("inspect", key, "--json", url=url).document["owner"] == before["owner"]
    assert isinstance(store_do(url, lambda store: store.claim(key)), Claimed)


def test_release_of_what_cannot_be_released(url: str) -> None:
    """Another type, and nothing at all."""
    other = run("release", "list", "--force", "--apply", "--yes", url=url)
    assert (other.code, "delete it yourself" in other.err) == (4, True)
    assert run("release", "nothing", url=url).code == 1


def test_release_leaves_what_completed_meanwhile(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that came while the operator read the question stays."""
    claims: list[Claimed] = []

    async def claim(store: RedisStore) -> None:
        claims.append(await claimed(store, "mine", lease=300))

    store_do(url, claim)
    changed_before_answer(
        monkeypatch,
        lambda: elsewhere(lambda: store_do(url, lambda store: store.complete(claims[0], '"just in time"'))),
    )
    ran = run("release", "mine", "--force", "--apply", url=url)
    assert (ran.code, "it changed since it was read" in ran.err) == (4, True)
    assert get(url, "mine").data == '"just in time"'


def test_release_leaves_a_new_owner(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who took the key over meanwhile is not whom the operator decided about."""

    async def replace(store: RedisStore) -> None:
        await store.delete("live")
        await claimed(store, "live", lease=300)

    changed_before_answer(monkeypatch, lambda: elsewhere(lambda: store_do(url, replace)))
    assert run("release", "live", "--force", "--apply", url=url).code == 4
    left = run("inspect", "live", "--json", url=url).document
    assert (left["status"], left["attempt"]) == ("live", 2)


def test_release_leaves_what_was_written_anew(url: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not a live operation is compared once."""
    changed_before_answer(monkeypatch, lambda: server.command("SET", "asyncidem:new", '{"owner": "y"}'))
    assert run("release", "new", "--force", "--apply", url=url).code == 4
    assert server.text("GET", "asyncidem:new") == '{"owner": "y"}'


@pytest.mark.parametrize("renewals", [1, 2, 3])
def test_release_follows_renewals(url: str, server: Server, monkeypatch: pytest.MonkeyPatch, renewals: int) -> None:
    """A renewal is the same claim that was to be released; an owner that renews faster than it is read keeps its key."""
    fence_off = RedisStore._fence_off
    left = renewals

    async def renewed_before(store: RedisStore, key: str, stored_key: str, stored: Any) -> bool:
        nonlocal left
        if left:
            left -= 1
            changed = server.text("GET", stored_key).replace(
                '"in_progress_expiration": ', '"in_progress_expiration": 1'
            )
            assert server.command("SET", stored_key, changed, "KEEPTTL") == "+OK"
        return await fence_off(store, key, stored_key, stored)

    monkeypatch.setattr(RedisStore, "_fence_off", renewed_before)
    ran = run("release", "live", "--force", "--apply", "--yes", url=url)
    assert ran.code == (0 if renewals < 3 else 4)
    assert run("inspect", "live", "--json", url=url).document["status"] == ("orphan" if renewals < 3 else "live")


def test_release_of_what_became_an_orphan_meanwhile(url: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner may still live: it is fenced off, and the next owner sees that somebody was there before."""
    read = Keyspace.read

    async def aged_before(keyspace: Keyspace, stored_key: str) -> Entry | None:
        server.command("PEXPIRE", stored_key, "600000")  # more of its time has passed than its lease
        return await read(keyspace, stored_key)

    def renewed_once() -> None:
        monkeypatch.setattr(Keyspace, "read", aged_before)
        changed = server.text("GET", "asyncidem:live").replace('_expiration": ', '_expiration": 1')
        server.command("SET", "asyncidem:live", changed, "KEEPTTL")

    changed_before_answer(monkeypatch, renewed_once)
    assert run("release", "live", "--force", "--apply", url=url).code == 0
    assert store_do(url, lambda store: store.claim("live")).attempt == 2


def test_release_of_a_peers_claim_does_not_follow(
    redis_url: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a token nothing tells one claim from the next."""
    mine = '{"status": "INPROGRESS", "expiration": 1, "in_progress_expiration": 99999}'
    server.command("SET", "asyncidem:p", mine, "PX", "90000")
    changed_before_answer(monkeypatch, lambda: server.command("SET", "asyncidem:p", mine + " ", "PX", "90000"))
    assert run("release", "p", "--force", "--apply", url=redis_url).code == 4
    assert server.text("GET", "asyncidem:p") == mine + " "


# -- purge ----------------------------------------------------------------------------------------------------------------


def test_purge_counts_and_deletes_nothing_by_default(url: str) -> None:
    """A dry run says how many there are, and shows some."""
    ran = run("purge", "--status", "completed", "--orphaned", url=url)
    assert ran.code == 0
    assert "dry run: 3 keys" in ran.err
    assert keys_of(run("list", "--json", url=url)) == ALL
    document = run("purge", "--status", "completed", "--json", url=url).document
    assert document["matched"] == 2
    assert (document["applied"], document["removed"]) == (False, 0)


def test_purge_deletes_what_it_counted(url: str) -> None:
    """When it is applied and confirmed, and nothing else."""
    options = ("purge", "--orphaned", "--status", "completed", "--status", "no-record", "--status", "unknown")
    declined = run(*options, "--apply", url=url, answer="n\n")
    assert (declined.code, "not confirmed" in declined.err) == (4, True)
    assert keys_of(run("list", "--json", url=url)) == ALL
    ran = run(*options, "--apply", "--starting-with", "n", "--yes", url=url)
    assert "deleted 1 keys; 0 changed meanwhile" in ran.err
    ran = run(*options, "--apply", url=url, answer="y\n")
    assert ran.code == 0
    assert "deleted 4 keys" in ran.err
    assert keys_of(run("list", "--json", url=url)) == {"live", LONG, "list", "k:lock"}
    nothing = run(*options, "--apply", "--json", url=url)
    assert (nothing.code, nothing.document["matched"]) == (0, 0)


def test_purge_draws_its_progress_for_a_terminal_alone(url: str) -> None:
    """On standard error, and never with JSON."""
    options = ("purge", "--status", "completed", "--apply", "--yes", "--starting-with")
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "200"}
    assert "deleting" in run(*options, "done", url=url, env=terminal).err
    assert "deleting" not in run(*options, "failed", "--json", url=url, env=terminal).err
    assert "deleting" not in run(*options, "done", url=url).err


def test_purge_by_age(url: str) -> None:
    """What may be old enough or not is told."""
    ran = run("purge", "--status", "completed", "--older-than", "1h", "--apply", "--yes", url=url)
    assert "deleted 0 keys" in ran.err
    assert "2 keys are left out" in ran.err
    ran = run("purge", "--status", "completed", "--older-than", "10h", "--ttl", "1d", "--apply", "--yes", url=url)
    assert "deleted 1 keys" in ran.err
    assert get(url, "done") is None
    assert get(url, "failed").state is State.COMPLETED


@pytest.mark.parametrize("options", [(), ("--older-than", "1h"), ("--status", "live"), ("--status", "lock")])
def test_purge_must_know_what(url: str, options: tuple[str, ...]) -> None:
    """Not everything, and nothing that runs."""
    assert run("purge", *options, "--apply", "--yes", url=url).code == 2


def test_purge_leaves_what_changes_meanwhile(url: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its being read and its deletion: other bytes are another record."""
    delete = Purge._delete

    async def changed_before(purge: Purge, entries: list[Entry]) -> None:
        server.command("SET", "asyncidem:odd", "s3cret and more")
        server.command("DEL", "asyncidem:done")
        await delete(purge, entries)

    monkeypatch.setattr(Purge, "_delete", changed_before)
    ran = run("purge", "--status", "completed", "--status", "no-record", "--apply", "--yes", "--json", url=url)
    assert ran.code == 0
    assert (ran.document["removed"], ran.document["changed"]) == (1, 2)
    assert server.text("GET", "asyncidem:odd") == "s3cret and more"


def test_purge_says_how_far_it_came(url: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that refuses ends it, with the count of what is deleted."""
    delete = Purge._delete

    async def refused(purge: Purge, entries: list[Entry]) -> None:
        server.command("DEL", "asyncidem:odd")
        server.command("RPUSH", "asyncidem:odd", "1")
        await delete(purge, entries)

    monkeypatch.setattr(Purge, "_delete", refused)
    ran = run("purge", "--status", "completed", "--status", "no-record", "--apply", "--yes", url=url)
    assert ran.code == 3
    assert "deleted 2 keys" in ran.err
    assert "WRONGTYPE" in ran.err
