"""Fixtures that every test module may use: real servers, one set of tests per kind of server found."""

import os
from collections.abc import Callable, Generator, Iterator

import pytest

from servers import BINARIES, Server, find_binary, server_version

ServerFactory = Callable[..., Server]


@pytest.fixture(scope="session", params=tuple(BINARIES))
def server_kind(request: pytest.FixtureRequest) -> str:
    """Each kind of server on this machine; continuous integration may not miss one."""
    kind: str = request.param
    if find_binary(kind) is None:
        reason = f"no {kind} server on this machine"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}, and CI=true")
        pytest.skip(reason)
    return kind


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
