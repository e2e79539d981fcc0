"""The command line in this process: its exit code, what it prints, and nothing of the terminal that the tests run in."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from asyncidem import Claimed, RedisStore
from asyncidem.cli.commands import cli
from asyncidem.keys import stored_form

NO_ENVIRONMENT = {
    "REDIS_URL": None,
    "ASYNCIDEM_SENTINEL_USER": None,
    "ASYNCIDEM_SENTINEL_PASSWORD": None,
    "FORCE_COLOR": None,
    "COLUMNS": None,
}


LONG = stored_form("n:long" + "g" * 600)
"""What a long key is listed as."""

ALL = {"live", "done", "failed", "orphan", LONG, "odd", "new", "list", "k:lock"}
"""The keys of the fixture `url`."""


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def documents(self) -> list[dict[str, Any]]:
        """Return what `--json` printed."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def document(self) -> dict[str, Any]:
        """Return the only document."""
        (document,) = self.documents
        return document


def run(*args: str, url: str | None = None, env: dict[str, str] | None = None, answer: str | None = None) -> Ran:
    """Run a command; `url` is its REDIS_URL, `answer` what is typed when it asks. No error may be a traceback."""
    environment = {**NO_ENVIRONMENT, "REDIS_URL": url, **(env or {})}
    result = CliRunner().invoke(cli, args, env=environment, input=answer)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


def store_do(url: str, work: Callable[[RedisStore], Awaitable[Any]], **options: Any) -> Any:
    """Do something with a store, on a loop of its own."""

    async def opened() -> Any:
        async with RedisStore.from_url(url, **options) as store:
            return await work(store)

    return asyncio.run(opened())


async def claimed(store: RedisStore, key: str, **options: Any) -> Claimed:
    """Claim a key that is free."""
    claim = await store.claim(key, **options)
    assert isinstance(claim, Claimed)
    return claim


async def fill(store: RedisStore) -> None:
    """Leave one key of each status that a store can leave: live, completed, failed, an orphan, a long key."""
    await claimed(store, "live", lease=300, fingerprint="f" * 32)
    await store.complete(await claimed(store, "done", ttl=1000), '"s3cret"')
    await store.complete(await claimed(store, "failed"), None, outcome="exception", error='{"message": "s3cret"}')
    await claimed(store, "orphan")
    await store.delete("orphan")  # of what is in progress it leaves an orphan
    await claimed(store, "n:long" + "g" * 600)


def keys_of(ran: Ran) -> set[str]:
    """Return the keys of a list in JSON."""
    assert ran.code == 0, ran.err
    keys = [document["key"] for document in ran.documents]
    assert len(keys) == len(set(keys))
    return set(keys)


def changed_before_answer(monkeypatch: pytest.MonkeyPatch, change: Callable[[], Any]) -> None:
    """Let something happen while the operator thinks about the question, who then says yes."""

    def confirm(*_: object, **__: object) -> bool:
        change()
        return True

    monkeypatch.setattr("asyncidem.cli.commands._confirmed", confirm)
