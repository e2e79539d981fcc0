"""The clients that a store makes for itself, the addresses it refuses, and the options of others that it warns of."""

import asyncio
import re
from typing import Any

import pytest
from redis import exceptions
from redis.asyncio import Redis, RedisCluster, SSLConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff

from asyncidem import ConfigurationError, RedisStore
from asyncidem.stores.clients import OwnCluster, OwnSentinel, sentinel_addresses

UP = {"is_master": True, "is_sdown": False, "is_odown": False, "num-other-sentinels": 0}


# -- addresses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "addresses"),
    [
        (["a:1", "b.example:26380"], [("a", 1), ("b.example", 26380)]),
        (["a"], [("a", 26379)]),
        ([("a", 1), ["b", 2]], [("a", 1), ("b", 2)]),
        (("[::1]:5", "[fe80::1]"), [("::1", 5), ("fe80::1", 26379)]),
        (iter(["a:65535"]), [("a", 65535)]),
    ],
)
def test_addresses(given: Any, addresses: list[tuple[str, int]]) -> None:
    """A sentinel is text with or without a port, or a pair."""
    assert sentinel_addresses(given) == addresses


@pytest.mark.parametrize("given", ["a:1", b"a:1", None, 7])
def test_no_list_of_sentinels(given: Any) -> None:
    """One address, or something else, in place of a list of them is refused."""
    with pytest.raises(
        ConfigurationError, match=re.escape(f"must be a list such as ['sentinel-1:26379'], not {given!r}")
    ):
        RedisStore.from_sentinel(given, service="x")


WRONG = [
    "",
    ":1",
    "a:",
    "a:b",
    "a:0",
    "a:65536",
    "a:123456",
    "redis://a:1",
    "a:1/0",
    "u@a:1",
    "::1",
    "a b",
    "[]:1",
    "[a:1",
]
PAIRS = [("a",), ("a", 1, 2), ("a", "1"), ("a", True), ("a", 0), ("", 1), (1, 1), (None, 1), None, 7, b"ab"]


@pytest.mark.parametrize("wrong", [*WRONG, *PAIRS])
def test_wrong_address(wrong: Any) -> None:
    """What is no host and port is named, with what would be one."""
    with pytest.raises(ConfigurationError, match=r"a sentinel must be 'host:port' or \(host, port\)") as raised:
        RedisStore.from_sentinel(["a:1", wrong], service="x")
    assert str(raised.value).endswith(f"not {wrong!r}")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sentinels": [], "service": "x"}, "sentinels is empty"),
        ({"service": ""}, "service must be the name .* not ''"),
        ({"service": None}, "service must be the name .* not None"),
        ({"service": "x", "no_such_option": 1}, "redis-py does not take these options.*no_such"),
        ({"service": "x", "sentinel_kwargs": {"no_such_option": 1}}, "redis-py does not take these options.*no_such"),
        ({"service": "x", "sentinel_kwargs": "password"}, "redis-py does not take these options"),
        ({"service": "x", "timeout": 0}, "timeout"),
        ({"service": "x", "client": Redis()}, "a client has its address already"),
    ],
)
def test_refused(options: dict[str, Any], text: str) -> None:
    """What cannot work is refused where the store is made."""
    with pytest.raises(ConfigurationError, match=text):
        RedisStore.from_sentinel(**{"sentinels": ["a:1"]} | options)


@pytest.mark.parametrize(
    ("url", "options"),
    [("redis://a:1/3", {}), ("redis://a:1?db=3", {}), ("redis://a:1", {"db": 3}), ("rediss://a:1/3", {})],
)
def test_database_of_a_cluster(url: str, options: dict[str, Any]) -> None:
    """A cluster with the number of a database is refused, wherever it stands."""
    with pytest.raises(ConfigurationError, match="a cluster has only the database 0, not 3: leave the number out"):
        RedisStore.from_url(url, cluster=True, **options)
    RedisStore.from_url("redis://a:1/0", cluster=True)


@pytest.mark.parametrize("url", ["unix:///run/redis.sock", "a:1"])
def test_url_of_no_cluster(url: str) -> None:
    """A URL that leads to no cluster is an error of ours."""
    with pytest.raises(ConfigurationError, match="redis-py does not take these options"):
        RedisStore.from_url(url, cluster=True)


# -- defaults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["url", "address"])
def test_defaults_of_a_cluster(made: str) -> None:
    """An own cluster client closes no connection for a MOVED, does not retry, and waits for a third of the store's time."""

    def make(**options: Any) -> RedisCluster:
        if made == "url":
            store = RedisStore.from_url("redis://10.0.0.1:1", cluster=True, timeout=3, **options)
        else:
            store = RedisStore.connect("10.0.0.1", 1, cluster=True, ssl=False, timeout=3, **options)
        assert isinstance(store._client, OwnCluster)
        return store._client

    client = make()
    assert client.reinitialize_steps == 0
    assert client.nodes_manager.require_full_coverage is False
    assert client.retry is not None
    assert client.retry._retries == 0
    options = client.get_connection_kwargs()
    assert (options["socket_timeout"], options["socket_connect_timeout"]) == (1, 1)
    other = make(reinitialize_steps=7, require_full_coverage=True, socket_timeout=9)
    assert (other.reinitialize_steps, other.nodes_manager.require_full_coverage) == (7, True)
    assert other.get_connection_kwargs()["socket_timeout"] == 9


def test_defaults_of_sentinels() -> None:
    """Sentinels are not asked twice, and have failed before the time for a connection is over, unless they are told to."""
    sentinel = made_by(RedisStore.from_sentinel(["a:1", "b:2"], service="x", timeout=3))
    assert [_of(client)["host"] for client in sentinel.sentinels] == ["a", "b"]
    for client in sentinel.sentinels:
        assert (_of(client)["socket_timeout"], _of(client)["socket_connect_timeout"]) == (0.5, 0.5)
        assert _of(client)["retry"]._retries == 0
    given = {"socket_timeout": 9, "password": "p"}
    store = RedisStore.from_sentinel(["a:1"], service="x", sentinel_kwargs=given, password="q", db=3, ssl=True)
    sentinel = made_by(store)
    assert isinstance(store._client, Redis)
    assert issubclass(store._client.connection_pool.connection_class, SSLConnection)
    assert not issubclass(sentinel.sentinels[0].connection_pool.connection_class, SSLConnection)
    assert (_of(sentinel.sentinels[0])["socket_timeout"], _of(sentinel.sentinels[0])["password"]) == (9, "p")
    assert sentinel.connection_kwargs["password"] == "q"
    assert sentinel.connection_kwargs["db"] == 3


def made_by(store: RedisStore) -> OwnSentinel:
    """Return the sentinels of a store."""
    assert isinstance(store._client, Redis)
    manager: Any = store._client.connection_pool
    assert isinstance(manager.sentinel_manager, OwnSentinel)
    return manager.sentinel_manager


def _of(client: Any) -> dict[str, Any]:
    options: dict[str, Any] = client.connection_pool.connection_kwargs
    return options


# -- searching the master --------------------------------------------------------------------------------------------------


class Answers:
    """A sentinel that answers with what it is given, or never."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.cancelled = False

    async def sentinel_masters(self) -> Any:
        if self.answer is None:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled = True
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def asking(*answers: Any, **options: Any) -> OwnSentinel:
    """Return the search over sentinels that answer so."""
    sentinel = OwnSentinel([("a", 1)] * len(answers), **options)
    sentinel.sentinels = [Answers(answer) for answer in answers]  # type: ignore[misc]
    return sentinel


REFUSED = exceptions.ConnectionError("refused")


async def test_first_master_that_is_up() -> None:
    """The first master that a sentinel holds for up is taken, whoever else fails, hangs or knows another."""
    down = {"x": {**UP, "is_sdown": True, "ip": "old", "port": 1}}
    sentinel = asking(REFUSED, None, down, {"y": {**UP, "ip": "y", "port": 2}}, {"x": {**UP, "ip": "new", "port": 3}})
    assert await sentinel.discover_master("x") == ("new", 3)
    assert sentinel.sentinels[1].cancelled


async def test_options_of_the_search() -> None:
    """redis-py's own options for a search hold."""
    few = {"x": {**UP, "ip": "few", "port": 1}}
    enough = {"x": {**UP, "num-other-sentinels": 2, "ip": "enough", "port": 2}}
    assert await asking(few, enough, min_other_sentinels=2).discover_master("x") == ("enough", 2)
    assert await asking(few, force_master_ip="forced").discover_master("x") == ("forced", 1)


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ((REFUSED, REFUSED), "no sentinel answers; check their addresses: ConnectionError: refused$"),
        ((REFUSED, {"y": UP, "a": UP}), "the sentinels watch no 'x', but 'a', 'y': correct service="),
        (({},), "the sentinels watch no 'x', but none: correct service="),
        (({"x": {**UP, "is_odown": True}}, {}), "the sentinels say that the master of 'x' is down"),
    ],
)
async def test_no_master(answers: tuple[Any, ...], text: str) -> None:
    """Where there is no master, the error says what is known."""
    with pytest.raises(MasterNotFoundError, match=text):
        await asking(*answers).discover_master("x")


async def test_cancelled_search() -> None:
    """A search that is given up leaves no task."""
    tasks = asyncio.all_tasks()
    sentinel = asking(None, None)
    search = asyncio.ensure_future(sentinel.discover_master("x"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    search.cancel()
    await asyncio.wait([search])
    assert all(answers.cancelled for answers in sentinel.sentinels)
    assert asyncio.all_tasks() == tasks


# -- clients that were brought ---------------------------------------------------------------------------------------------


def behind(count: int, **options: Any) -> Redis:
    """Return a client of redis-py's behind so many sentinels."""
    return Sentinel([("a", 1)] * count, **options).master_for("x")  # type: ignore[no-any-return]


ONCE = {"retry": Retry(NoBackoff(), 0), "socket_timeout": 0.5, "socket_connect_timeout": 0.5}
DANGERS = {
    "reads from replicas": lambda: RedisCluster(host="10.0.0.1", load_balancing_strategy=_round_robin()),
    "no time-out": lambda: behind(2, sentinel_kwargs={**ONCE, "socket_timeout": None}),
    "no time-out of connecting": lambda: behind(2, sentinel_kwargs={**ONCE, "socket_connect_timeout": None}),
    "too long": lambda: behind(2, sentinel_kwargs={**ONCE, "socket_timeout": 1}),
    "too often": lambda: behind(2, sentinel_kwargs={**ONCE, "retry": Retry(NoBackoff(), 1)}),
    "for ever": lambda: behind(2, sentinel_kwargs={**ONCE, "retry": Retry(NoBackoff(), -1)}),
}
SAFE = {
    "standalone": Redis,
    "cluster": lambda: RedisCluster(host="10.0.0.1"),
    "one sentinel": lambda: behind(1),
    "short": lambda: behind(2, sentinel_kwargs=ONCE),
    "no retry object": lambda: behind(2, sentinel_kwargs={**ONCE, "retry": None, "socket_timeout": 0.05}),
}


def _round_robin() -> Any:
    from redis.cluster import LoadBalancingStrategy

    return LoadBalancingStrategy.ROUND_ROBIN


@pytest.mark.parametrize("make", DANGERS.values(), ids=list(DANGERS))
def test_dangerous_client(make: Any) -> None:
    """A client whose options would harm the store is warned of, once, where the store is made."""
    client = make()
    with pytest.warns(UserWarning, match="leave out read_from_replicas|use RedisStore.from_sentinel") as warned:
        RedisStore(client, timeout=2.4)
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.parametrize("make", SAFE.values(), ids=list(SAFE))
def test_safe_client(make: Any) -> None:
    """There is nothing to say of a client that does no harm: warnings are errors here."""
    RedisStore(make(), timeout=2.4)


def test_client_for_replicas() -> None:
    """A client for the replicas of a service is refused."""
    with pytest.raises(ConfigurationError, match="use master_for"):
        RedisStore(Sentinel([("a", 1)]).slave_for("x"))
