"""The fixture `subject`: each kind of store, with its data empty and a back door to them; and loops that end first."""

import contextlib
import functools
import gc
import warnings
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from conftest import require
from servers import BINARIES, Cluster, Server
from stores.stores_under_test import CLUSTERS, KINDS, SERVERS, TWINS, WANTED, Subject, make_subject


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out kinds that this run does not want, and of twins what their primitives do not decide."""
    kept, left_out = [], []
    for item in items:
        kind = getattr(item, "callspec", None) and item.callspec.params.get("subject")  # type: ignore[attr-defined]
        above = "test_conformance" in item.nodeid and "test_conformance_primitives" not in item.nodeid
        unwanted = kind is not None and (kind not in WANTED or (above and kind in TWINS))
        (left_out if unwanted else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def subject_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """Servers that all subjects of the run share, started when they are first asked for."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(kind: str) -> Server:
            return stack.enter_context(Server(kind, tmp_path_factory.mktemp(f"subject-{kind}")))

        yield start


@pytest.fixture(params=KINDS)
async def subject(
    request: pytest.FixtureRequest, subject_server: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Subject]:
    """Each kind of store; a test for some of them says so with an indirect parameter."""
    kind: str = request.param
    url: str | None = None
    if kind in CLUSTERS:
        cluster: Cluster = request.getfixturevalue("cluster")
        cluster.reset()
        url = cluster.url
    elif kind in (*SERVERS, "decoded"):
        server = subject_server(require(*BINARIES) if kind == "decoded" else require(kind.removesuffix("-plain")))
        server.reset()
        url = server.url
    if kind == "fake-without-lua":
        from fakeredis import _commands

        for name in ("eval", "evalsha"):  # they are not registered where lupa is not installed
            monkeypatch.delitem(_commands.SUPPORTED_COMMANDS, name)
    subject = make_subject(kind, url)
    yield subject
    await subject.aclose()


@pytest.fixture
def dead_loops(multiplex: bool) -> Iterator[None]:
    """Nobody can close a pool's connections of a loop that is gone: they end as garbage, and Python says so.

    A multiplexed one ends with its loop, and leaves nothing to be said.
    """
    with warnings.catch_warnings():
        if not multiplex:
            warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()
