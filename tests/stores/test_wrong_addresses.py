"""What a store is told that has the wrong kind of address, certificate or user: an error in time that says what to change."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
import trustme
from redis import exceptions
from redis.asyncio import Redis

from asyncidem import Claimed, Idempotency, RedisStore, StoreError, StoreUnavailableError

from conftest import ServerFactory, StoreFactory, require
from resharding import slot_of
from servers import HOST, SLOTS, Cluster, Server
from tls import Secure

pytestmark = pytest.mark.once


async def told(
    text: str, url: str, kind: type[StoreError] = StoreUnavailableError, timeout: float = 1.2, **options: Any
) -> list[BaseException | None]:
    """Expect a claim to be told so on both paths, with nothing sent or its outcome known; return the causes."""
    return await asyncio.gather(*(_told(text, url, kind, multiplex, timeout, options) for multiplex in (True, False)))


async def _told(
    text: str, url: str, kind: type[StoreError], multiplex: bool, timeout: float, options: dict[str, Any]
) -> BaseException | None:
    async with RedisStore.from_url(url, multiplex=multiplex, timeout=timeout, **options) as store:
        began = time.monotonic()
        with pytest.raises(kind, match=text) as raised:
            await Idempotency(store).run("k", must_not_run)
        assert time.monotonic() - began < min(timeout + 1, 10)
    assert type(raised.value) is kind
    assert not raised.value.outcome_unknown
    return raised.value.__cause__


async def must_not_run() -> None:
    """Stand for an effect that nobody may have."""
    pytest.fail("the handler ran")


async def works(store: RedisStore, key: str) -> None:
    """Run an operation, and replay it."""
    async with store:
        idem = Idempotency(store)
        assert await idem.run(key, asyncio.sleep, 0, "ä" * 100_000) == "ä" * 100_000
        assert await idem.run(key, must_not_run) == "ä" * 100_000


# -- the wrong kind of server ----------------------------------------------------------------------------------------------


async def test_no_cluster(redis_url: str) -> None:
    """A server that is no cluster is told from one that does not answer, at once."""
    await told("cluster support disabled; leave out cluster=True", redis_url, cluster=True, timeout=60)


async def test_node_of_a_cluster(cluster: Cluster) -> None:
    """A plain client at a node that does not serve the key hears of `cluster=True`."""
    cluster.reset()
    slot = slot_of("asyncidem:k")
    node = cluster.nodes[(slot * 3 // SLOTS + 1) % 3]  # the next to the one that serves it
    causes = await told("it is a node of a cluster: use cluster=True", node.url)
    assert all(isinstance(cause, exceptions.ResponseError) for cause in causes)


async def test_cluster_that_is_gone() -> None:
    """A cluster none of whose nodes answers is quoted."""
    await told("Please provide at least one reachable node.*Connect call failed", "redis://127.0.0.1:1", cluster=True)


async def test_replica(redis_url: str, private_server: ServerFactory) -> None:
    """A replica, which is read-only, names the ways to its master."""
    replica = private_server("--replicaof", HOST, redis_url.rpartition(":")[2].partition("/")[0])
    text = "it is a replica: give the address of its master, or use RedisStore.from_sentinel"
    causes = await told(text, replica.url)
    assert [type(cause) for cause in causes] == [exceptions.ReadOnlyError] * 2


@pytest.mark.parametrize("cluster_client", [False, True], ids=["standalone", "cluster"])
async def test_wrong_password(server: Server, cluster: Cluster, cluster_client: bool) -> None:
    """A wrong password is told at once, for a cluster too."""
    url = (cluster if cluster_client else server).url.replace("//", "//nobody:wrong@")
    causes = await told("check the user name and the password$", url, StoreError, 60, cluster=cluster_client)
    assert [type(cause) for cause in causes] == [exceptions.AuthenticationError] * 2


# -- TLS -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    """A cluster of one node that asks clients for a certificate, and has a port without TLS beside."""
    options = ("--cluster-enabled", "yes", "--tls-cluster", "yes")
    secure = Secure(tmp_path_factory.mktemp("mutual"), require("redis"), *options, ask_clients="yes")
    with secure.server as server:
        assert server.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383") == "+OK"
        while "cluster_state:ok" not in server.text("CLUSTER", "INFO"):
            pass
        yield secure


@pytest.fixture(scope="module")
def misnamed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    """A server whose certificate is for another host."""
    secure = Secure(tmp_path_factory.mktemp("misnamed"), require("redis"), host="redis.example")
    with secure.server:
        yield secure


@pytest.fixture
def files(mutual: Secure) -> dict[str, str]:
    """The options for a client whose certificate the server trusts."""
    cert, key = mutual.issue("client", "worker")
    return {"ssl_ca_certs": str(mutual.ca), "ssl_certfile": str(cert), "ssl_keyfile": str(key)}


@pytest.mark.parametrize(("cluster_client", "protocol"), [(False, 2), (True, 3)], ids=["standalone", "cluster"])
async def test_client_certificate(
    multiplex: bool, mutual: Secure, files: dict[str, str], cluster_client: bool, protocol: int
) -> None:
    """A client shows its certificate, named beside the URL or in it, to one server and to the nodes of a cluster."""
    options: dict[str, Any] = {"cluster": cluster_client, "protocol": protocol, "decode_responses": protocol == 3}
    name = f"{multiplex} {options}"
    await works(RedisStore.from_url(mutual.url, multiplex=multiplex, **files, **options), name)
    query = "&".join(f"{option}={value}" for option, value in files.items())
    await works(RedisStore.from_url(f"{mutual.url}?{query}", multiplex=multiplex, **options), f"{name} by URL")


async def test_connect_with_tls(mutual: Secure, files: dict[str, str], multiplex: bool) -> None:
    """`connect` uses TLS unless it is told not to, and takes the same options."""
    await works(RedisStore.connect(HOST, mutual.port, multiplex=multiplex, **files), f"connect {multiplex}")


async def test_untrusted_server(mutual: Secure, misnamed: Secure, files: dict[str, str]) -> None:
    """A certificate that is of another host or authority says so, names the options, and is not waited for."""
    other_host: dict[str, Any] = {"ssl_ca_certs": str(misnamed.ca), "ssl_check_hostname": True}
    other_authority: dict[str, Any] = {**files, "ssl_ca_certs": str(misnamed.ca)}
    text = "ssl_ca_certs must name the authority of its certificate, and the URL a host that is in it$"
    await told(f"^no connection.*not valid for '127.0.0.1'.*{text}", misnamed.url, timeout=60, **other_host)
    for cluster in (False, True):
        failed = f"^no connection.*CERTIFICATE_VERIFY_FAILED.*{text}"
        await told(failed, mutual.url, timeout=60, cluster=cluster, **other_authority)


async def test_untrusted_client(mutual: Secure, files: dict[str, str]) -> None:
    """Without a certificate that the server trusts, the error names the options for one."""
    cert, key = mutual.issue("stranger", "worker", authority=trustme.CA())
    nobody: dict[str, Any] = {"ssl_ca_certs": files["ssl_ca_certs"]}
    stranger: dict[str, Any] = {**nobody, "ssl_certfile": str(cert), "ssl_keyfile": str(key)}
    text = "give one that it trusts: ssl_certfile and ssl_keyfile$"
    await asyncio.gather(*(told(text, mutual.url, timeout=3, **options) for options in (nobody, stranger)))


async def test_tls_where_there_is_none(mutual: Secure, files: dict[str, str]) -> None:
    """TLS at a port without it, which the server answers with silence, names `redis://`; and the other way round."""
    url = f"rediss://{HOST}:{mutual.server.port}"
    await told("if the port speaks no TLS, use redis:// or ssl=False$", url, **files)  # type: ignore[arg-type]
    await told("if the port expects TLS, use rediss:// or ssl=True$", f"redis://{HOST}:{mutual.port}")


# -- users -----------------------------------------------------------------------------------------------------------------

LEAST = ["+set", "+get", "+pttl", "+del", "+eval", "+evalsha"]


@pytest.fixture
def user(server: Server, redis_url: str) -> Iterator[str]:
    """The URL for a user with the least permissions that do."""
    # Another test may have left a user of this name.
    rules = ["reset", "on", ">secret", "~asyncidem:*", "resetchannels", "-@all", *LEAST]
    assert server.command("ACL", "SETUSER", "worker", *rules) == "+OK"
    yield redis_url.replace("//", "//worker:secret@")
    server.command("ACL", "DELUSER", "worker")


async def everything(store: RedisStore, server: Server) -> None:
    """Claim, find in progress, renew, complete, delete, take over, give back, fence off, release, wait and replay."""
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    await store.claim("k")
    await store.renew(claim)
    await store.complete(claim, '"done"')
    assert await store.delete("k")
    assert isinstance(await store.claim("k", lease=30, ttl=60), Claimed)
    assert server.command("PEXPIRE", "asyncidem:k", "29000") == ":1"  # its lease is over
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    assert claim.attempt == 2
    await store.release(claim)
    assert await store.delete("k")
    assert server.command("DEL", "asyncidem:k") == ":1"
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    await store.release(claim)
    idem = Idempotency(store, wait=5)
    assert await asyncio.gather(*(idem.run("w", asyncio.sleep, 0.02, 7) for _ in range(3))) == [7, 7, 7]


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("brought", [False, True], ids=["own", "brought"])
async def test_least_permissions(user: str, server: Server, multiplex: bool, protocol: int, brought: bool) -> None:
    """A user with what the documentation names, and no more, is enough for everything, over either protocol."""
    client = Redis.from_url(user, protocol=protocol)
    store = (
        RedisStore(client, multiplex=multiplex)
        if brought
        else RedisStore.from_url(user, protocol=protocol, multiplex=multiplex)
    )
    async with store:
        await everything(store, server)
    await client.aclose()


@pytest.mark.parametrize("command", LEAST)
async def test_each_permission_is_needed(user: str, server: Server, store_at: StoreFactory, command: str) -> None:
    """Without any one of them something is refused, with their names."""
    server.command("ACL", "SETUSER", "worker", command.replace("+", "-"))
    async with store_at(user) as store:
        with pytest.raises(StoreError, match="the user needs SET, GET, PTTL, DEL, EVAL and EVALSHA"):
            await everything(store, server)


@pytest.mark.parametrize("known", [False, True], ids=["fresh", "known"])
@pytest.mark.parametrize("command", ["+set", "+get", "+eval", "+evalsha"])
async def test_a_first_call_shows_what_is_missing(
    user: str, redis_url: str, server: Server, store_at: StoreFactory, command: str, known: bool
) -> None:
    """What a completion needs is missed before the effect, by a store's first claim and each after it; none stays.

    It is so on a server that knows the scripts already, too.
    """
    if known:
        async with store_at(redis_url) as store:
            await everything(store, server)
            assert await store.delete("w")
    server.command("ACL", "SETUSER", "worker", command.replace("+", "-"))
    async with store_at(user) as store:
        for _ in range(3):
            with pytest.raises(StoreError, match="the user needs SET, GET, PTTL, DEL, EVAL and EVALSHA"):
                await Idempotency(store).run("k", pytest.fail, "the handler ran")  # type: ignore[arg-type]
            await asyncio.gather(*store._background)
            assert server.command("EXISTS", "asyncidem:k") == ":0"
        server.command("ACL", "SETUSER", "worker", command)
        assert await Idempotency(store).run("k", asyncio.sleep, 0, 1) == 1
