"""The fixture `subject`: each kind of store, with its data empty and a back door to them."""

import contextlib
import functools
import os
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from servers import Server, find_binary
from stores.stores_under_test import KINDS, SERVERS, Subject, make_subject


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
    if kind in (*SERVERS, "decoded"):
        server_kind = kind if kind in SERVERS else next((name for name in SERVERS if find_binary(name)), SERVERS[0])
        if find_binary(server_kind) is None:
            reason = f"no {server_kind} server on this machine"
            if os.environ.get("CI") == "true":
                pytest.fail(f"{reason}, and CI=true")
            pytest.skip(reason)
        server = subject_server(server_kind)
        server.reset()
        url = server.url
    if kind == "fake-without-lua":
        from fakeredis import _commands

        for name in ("eval", "evalsha"):  # they are not registered where lupa is not installed
            monkeypatch.delitem(_commands.SUPPORTED_COMMANDS, name)
    subject = make_subject(kind, url)
    yield subject
    await subject.aclose()
