"""Fixtures that every test module may use: real servers, one set of tests per kind of server found."""

import functools
import gc
import os
from collections.abc import Callable, Generator, Iterator

import pytest
from hypothesis import settings

from asyncidem import RedisStore

from servers import BINARIES, Cluster, Server, find_binary, server_version

ServerFactory = Callable[..., Server]
StoreFactory = Callable[..., RedisStore]

# `pytest --hypothesis-profile=thorough`: ten times as many examples of every property. In continuous integration
# Hypothesis takes its own profile, which is the same examples in every run; whatever fails says how to run it again.
settings.register_profile("thorough", max_examples=1_000, deadline=None)


def require(*kinds: str) -> str:
    """Return the first of these kinds of server that the machine has; continuous integration may not miss all."""
    for kind in kinds:
        if find_binary(kind) is not None:
            return kind
    reason = f"no {' or '.join(kinds)} server on this machine"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and CI=true")
    pytest.skip(reason)


@pytest.fixture(scope="session", params=("valkey", "redis"))
def server_kind(request: pytest.FixtureRequest) -> str:
    """The kinds of server whose faults are tested; all others are held to the contract (`stores_under_test`)."""
    return require(request.param)


@pytest.fixture(scope="session")
def server(server_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that the whole run shares: use it through `redis_url`, and do no harm to the process."""
    with Server(server_kind, tmp_path_factory.mktemp(server_kind)) as server:
        yield server


@pytest.fixture
def redis_url(server: Server) -> str:
    """The URL of the shared server, with no data, no scripts and no statistics from other tests."""
    server.reset()
    return server.url


@pytest.fixture
def private_server(server_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFactory]:
    """A factory `private_server(*args) -> Server` of started servers that the test may kill, restart and pause."""
    servers: list[Server] = []

    def make(*args: str) -> Server:
        server = Server(server_kind, tmp_path_factory.mktemp(f"private-{server_kind}"), *args)
        servers.append(server)
        return server.start()

    yield make
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three masters and three replicas that the whole run shares: do no harm to its processes."""
    kind = require(*BINARIES)
    # A busy machine must not fail over in the middle of a test: it would lose what the test has just written.
    options = ("--cluster-replica-no-failover", "yes")
    with Cluster(kind, tmp_path_factory.mktemp(f"cluster-{kind}"), *options) as cluster:
        yield cluster


@pytest.fixture(params=[True, False], ids=["multiplexed", "plain"])
def multiplex(request: pytest.FixtureRequest) -> bool:
    """Both paths of a store: one connection for all commands, and one of the client's pool for each."""
    path: bool = request.param
    return path


@pytest.fixture
def store_at(multiplex: bool) -> StoreFactory:
    """`RedisStore.from_url` on both paths."""
    return functools.partial(RedisStore.from_url, multiplex=multiplex)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one worker have all tests of the cluster: six servers, and seconds until they have found each other."""
    for item in items:
        subject = getattr(item, "callspec", None) and item.callspec.params.get("subject")  # type: ignore[attr-defined]
        if "cluster" in getattr(item, "fixturenames", ()) or "cluster" in str(subject):
            item.add_marker(pytest.mark.xdist_group("cluster"))


def pytest_collection_finish() -> None:
    """Leave what is there before the first test out of all collections: many tests collect, and would search it all."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> list[str]:
    """Say which servers the run is against."""
    return [f"{kind}: {server_version(kind) or 'not found'}" for kind in BINARIES]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what its server logged with a test that failed."""
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(server, Server):
        report.sections.append((f"log of {server.kind}", server.log[-4000:]))
    return report
