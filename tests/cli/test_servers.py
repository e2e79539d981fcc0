"""The command line against every kind of deployment, and against servers that refuse, hang or are gone."""

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
from redis import exceptions

from asyncidem import RedisStore, StoreError, StoreUnavailableError
from asyncidem.cli import examination
from asyncidem.cli.entries import Status
from asyncidem.cli.keyspace import Keyspace
from asyncidem.cli.options import Target

from commandline import fill, keys_of, run, store_do
from conftest import ServerFactory, require
from sentinels import Watch
from servers import BINARIES, HOST, Cluster, Server, free_port


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    """A master with a replica and a sentinel."""
    with Watch(require(*BINARIES), tmp_path_factory.mktemp("sentinel"), down_after=60_000) as watch:
        yield watch


# -- cluster --------------------------------------------------------------------------------------------------------------


def test_cluster(cluster: Cluster) -> None:
    """All masters are asked, a key is read and released at its own, a purge goes over all of them."""
    cluster.reset()

    async def claim_many(store: RedisStore) -> None:
        await asyncio.gather(*(store.claim(f"k{number}", lease=300) for number in range(100)))

    store_do(cluster.url, claim_many, cluster=True)
    assert all(node.command("DBSIZE") != ":0" for node in cluster.masters)
    keys = {f"k{number}" for number in range(100)}
    assert keys_of(run("list", "--cluster", "--json", url=cluster.url)) == keys
    assert run("stats", "--cluster", "--json", url=cluster.url).document["status"]["live"]["keys"] == 100
    for key in ("k0", "k1", "k2", "k3"):
        assert run("inspect", key, "--cluster", url=cluster.url).code == 0
        assert run("release", key, "--cluster", "--force", "--apply", "--yes", url=cluster.url).code == 0
    orphans = run("purge", "--cluster", "--orphaned", "--apply", "--yes", "--json", url=cluster.url)
    assert orphans.document["removed"] == 4
    assert len(keys_of(run("list", "--cluster", "--json", url=cluster.url))) == 96


def test_doctor_of_a_cluster(cluster: Cluster) -> None:
    """Each master is examined, and the client's path."""
    found = run("doctor", "--cluster", "--json", url=cluster.url).document["findings"]
    assert len({finding["node"] for finding in found}) == 4
    assert next(finding["found"] for finding in found if finding["topic"] == "mode") == "cluster, 3 masters"
    assert "problem" not in {finding["level"] for finding in found}
    text = run("doctor", cluster.url, "--cluster")
    assert all(f"({HOST}:{node.port})" in text.out for node in cluster.masters)


def test_a_node_of_a_cluster_is_not_taken_for_all_of_it(cluster: Cluster) -> None:
    """Its keys would be shown as if they were all; only doctor looks at it, and says so."""
    for command in (("list",), ("stats",), ("purge", "--orphaned")):
        ran = run(*command, url=cluster.url)
        assert (ran.code, "add --cluster" in ran.err) == (2, True)
    ran = run("doctor", "--json", "--timeout", "2s", url=cluster.url)
    assert ran.code == 5
    assert any("use --cluster" in finding["remedy"] for finding in ran.document["findings"])


def test_a_server_is_no_cluster(redis_url: str) -> None:
    """What was said of it is wrong, and the error says so."""
    ran = run("list", "--cluster", url=redis_url)
    assert ran.code == 3
    assert "cluster support disabled" in ran.err


async def test_a_slot_that_moves_is_followed(redis_url: str) -> None:
    """A key that was found at one node, and is at another when it is read, is read as the store reads keys."""
    async with RedisStore.from_url(redis_url) as store:
        await store.claim("k", lease=300)
        keyspace = Keyspace(store)
        (node,) = await keyspace.masters()
        moved = exceptions.MovedError("1 127.0.0.1:1")
        entry = await keyspace._entry(node, b"asyncidem:k", moved, 0, 0)
        assert entry is not None
        assert entry.status is Status.LIVE
        # One that expired in between is gone, wherever it was.
        assert await keyspace._entry(node, b"asyncidem:gone", moved, 0, 0) is None
        assert await keyspace._entry(node, b"asyncidem:gone", b"", 0, -2) is None
        assert await keyspace._entry(node, b"asyncidem:gone", b"", 9999, 1) is None
        with pytest.raises(StoreError, match="refused to read 'asyncidem:k': no"):
            await keyspace._entry(node, b"asyncidem:k", exceptions.ResponseError("no"), 0, 0)


# -- sentinel -------------------------------------------------------------------------------------------------------------


def test_sentinel(watch: Watch) -> None:
    """The master is found by its name; user, password and database are those of the URL, whose host is not used."""
    watch.master.command("FLUSHALL")
    watch.master.command("ACL", "SETUSER", "operator", "on", ">s3cret", "~*", "&*", "+@all")
    watch.ask("ACL", "SETUSER", "asker", "on", ">other", "~*", "&*", "+@all")
    sentinels = ("--sentinel", f"{HOST}:{free_port()}", "--sentinel", f"{HOST}:{watch.port}", "--service", "payments")
    store_do(f"redis://{HOST}:{watch.master.port}/2", fill)
    assert keys_of(run("list", "--json", *sentinels)) == set()
    url = "redis://operator:s3cret@nowhere:1/2"
    own = {"ASYNCIDEM_SENTINEL_USER": "asker", "ASYNCIDEM_SENTINEL_PASSWORD": "other"}
    assert "orphan" in keys_of(run("list", "--json", *sentinels, url=url, env=own))
    ran = run("doctor", "--json", *sentinels, url=url, env=own)
    assert ran.code == 0
    said = {finding["topic"]: finding["found"] for finding in ran.document["findings"]}
    assert said["mode"] == "sentinel, 1 master"
    assert said["user"] == "operator"
    assert said["replicas"] == "1 connected"


def test_doctor_of_a_replica(watch: Watch) -> None:
    """It cannot write, and is told apart from a master that cannot."""
    ran = run("doctor", "--json", "--timeout", "1s", url=watch.replica.url)
    assert ran.code == 5
    problems = {finding["topic"] for finding in ran.document["findings"] if finding["level"] == "problem"}
    assert problems == {"role", "life of a record"}


def test_tls_of_the_url_goes_for_master_and_sentinels() -> None:
    """With its certificates."""
    target = Target("rediss://h?ssl_ca_certs=ca.pem", False, ("s:1",), "m", None, None, {})
    store = target.open()
    client: Any = store._client
    assert client.connection_pool.connection_kwargs["ssl_ca_certs"] == "ca.pem"
    sentinel = client.connection_pool.sentinel_manager.sentinels[0]
    assert sentinel.connection_pool.connection_kwargs["ssl_ca_certs"] == "ca.pem"
    assert store._wire is not None
    assert store._wire._routes.tls


# -- what cannot be used --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "url", "said"),
    [
        ((), None, "no store is given: use --url or REDIS_URL, or --sentinel"),
        (("--cluster", "--sentinel", "a", "--service", "b"), None, "exclude each other"),
        (("--sentinel", "a"), None, "go together"),
        (("--service", "a"), "redis://h", "go together"),
        (("--sentinel", "a:b:c", "--service", "b"), None, "a sentinel must be 'host:port'"),
        ((), "http://u:s3cret@h", "the URL is none that redis-py takes"),
        ((), "redis://u:s3/cret@h", "percent-encoded"),
        (("--sentinel", "a", "--service", "b"), "redis://u:s3/cret@h", "percent-encoded"),
        (
            ("--sentinel", "a", "--service", "b"),
            "redis://u:s3cret@h?colour=red",
            "redis-py does not take these options",
        ),
        ((), "redis://u:s3cret@h?s3cret=red", "unexpected keyword argument '***'"),
        (("--cluster",), "redis://u:s3cret@h/3", "a cluster has only the database 0"),
        (("--status-attr", "owner"), "redis://h", "the attribute name 'owner' is taken"),
    ],
)
def test_options_that_cannot_work(options: tuple[str, ...], url: str | None, said: str) -> None:
    """Are misuse, with a remedy; no part of a password is shown, even if the URL is cut in the wrong place."""
    ran = run("list", *options, url=url)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert "s3" not in ran.err.replace("***", "")


def test_no_password_is_shown(private_server: ServerFactory, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the URL nor its password is printed or logged, when it works and when it is refused."""
    caplog.set_level(logging.DEBUG)
    server = private_server("--requirepass", "s3cret")
    address = f"{HOST}:{server.port}"
    for password, code in (("s3cret", 0), ("wr0ng", 3)):
        for command in (("list",), ("doctor",), ("stats", "--json")):
            ran = run(*command, url=f"redis://:{password}@{address}")
            assert ran.code == code
            assert not {"s3cret", "wr0ng"} & set(ran.out.split() + ran.err.split())
            assert password not in ran.out + ran.err + caplog.text


def test_users_who_may_not_scan(redis_url: str, server: Server) -> None:
    """What the command line needs beyond the store's own permissions is named."""
    commands = ("+set", "+get", "+pttl", "+del", "+eval", "+evalsha")
    server.command("ACL", "SETUSER", "worker", "reset", "on", ">pw", "~asyncidem:*", "-@all", *commands)
    try:
        url = redis_url.replace("redis://", "redis://worker:pw@")
        store_do(url, lambda store: store.claim("k", lease=300))
        assert run("inspect", "k", url=url).code == 0
        ran = run("list", url=url)
        assert ran.code == 3
        assert "the user needs SCAN, GETRANGE, STRLEN, PTTL, GET and TYPE" in ran.err
        server.command("ACL", "SETUSER", "worker", "+scan", "+strlen")
        ran = run("list", url=url)
        assert (ran.code, "the user needs SCAN, GETRANGE" in ran.err) == (3, True)
        server.command("ACL", "SETUSER", "worker", "+getrange")
        assert run("list", url=url).code == 0
        found = run("doctor", "--json", url=url).document["findings"]
        said = {finding["topic"]: finding["found"] for finding in found}
        assert "may not ask" in said["user"]
        assert "may not call INFO" in said["server"]
        assert "clock" not in said
        server.command("ACL", "SETUSER", "worker", "-del")
        ran = run("doctor", "--json", url=url)
        assert ran.code == 5
        assert "the user needs SET, GET, PTTL, DEL" in ran.out
    finally:
        server.command("ACL", "DELUSER", "worker")


# -- what is gone ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [("list",), ("inspect", "k"), ("stats",), ("doctor",), ("purge", "--orphaned"), ("release", "k")]
)
def test_a_server_that_is_gone(command: tuple[str, ...]) -> None:
    """Is an error within the time-out, and no traceback."""
    began = time.monotonic()
    ran = run(*command, "--timeout", "300ms", url=f"redis://{HOST}:{free_port()}")
    assert time.monotonic() - began < 5
    assert (ran.code, ran.out.replace("STATUS", "")[:1].strip()) == (3, "")
    assert "error: no answer from the server within 0.3 s" in ran.err


async def test_a_server_that_hangs(private_server: ServerFactory) -> None:
    """Silence drops the connection and is an error in time; the next command has a new one, in step with its replies."""
    server = private_server()
    async with RedisStore.from_url(server.url, timeout=0.6) as store:
        keyspace = Keyspace(store)
        (node,) = await keyspace.masters()
        assert await keyspace.ask(node, ("ECHO", "a")) == [b"a"]
        server.pause()
        with pytest.raises(StoreUnavailableError, match=r"no answer from the server within 0\.6 s"):
            await keyspace.ask(node, ("ECHO", "b"))
        server.resume()
        assert await keyspace.ask(node, ("ECHO", "c")) == [b"c"]


def test_interrupted(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is its own exit code."""

    async def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Keyspace, "find", interrupt)
    assert run("inspect", "k", url=redis_url).code == 130


# -- doctor ---------------------------------------------------------------------------------------------------------------


def test_doctor(redis_url: str, server: Server) -> None:
    """A server as tests have it: no problem, and nothing is left of the examination."""
    ran = run("doctor", redis_url)
    assert ran.code == 0
    words = " ".join(ran.out.split())
    assert "claimed, read, renewed, completed, replayed, deleted" in words
    assert "one multiplexed connection per node" in words
    assert "no append-only file" in words
    assert server.command("DBSIZE") == ":0"


def test_doctor_finds_eviction(redis_url: str, server: Server) -> None:
    """It is a problem, with its remedy, and the library's own warning does not come beside it."""
    server.command("CONFIG", "SET", "maxmemory", "100mb")
    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        ran = run("doctor", url=redis_url)
    finally:
        server.command("CONFIG", "SET", "maxmemory", "0")
        server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert ran.code == 5
    assert "CONFIG SET maxmemory-policy noeviction" in ran.out
    assert "eviction_possible" not in ran.err


def test_doctor_without_scripts(private_server: ServerFactory) -> None:
    """The path is what the store really takes."""
    server = private_server("--rename-command", "EVAL", "", "--rename-command", "EVALSHA", "")
    ran = run("doctor", "--json", url=server.url)
    said = [finding["found"] for finding in ran.document["findings"] if finding["topic"] == "path"]
    assert said[0].startswith("guarded by a lock")
    assert "runs no scripts" in said[1]


async def test_paths(redis_url: str) -> None:
    """What stands in for what is told."""
    async with RedisStore.from_url(redis_url, multiplex=False) as store:
        assert examination._path(store) == "a connection of the pool for every command"
        assert examination._fallbacks(store) == ()
        store._set_get = False
        assert "scripts stand in" in examination._fallbacks(store)[0]


@pytest.mark.parametrize(("name", "said"), [("claim", "a new key was not claimed"), ("second", "is not replayed")])
def test_doctor_of_a_store_that_answers_wrongly(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    """Whatever comes back instead of what must come is a problem."""
    claim, calls = RedisStore.claim, 0

    async def wrong(store: RedisStore, key: str, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if name == "claim":
            await claim(store, key, **options)
        elif calls == 2:
            await store.delete(key)
        return await claim(store, key, **options)

    monkeypatch.setattr(RedisStore, "claim", wrong)
    ran = run("doctor", "--json", url=redis_url)
    assert ran.code == 5
    assert said in ran.out
