"""What the seam keeps besides its main path: whose error is told, what is dropped and reset, what is asked for again.

With it what a replay and the cache keep in the same way: arguments as they were, an end to every search, the order of use.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

import pytest
import redis.asyncio
from redis import exceptions
from redis.asyncio.connection import Connection

from asyncidem import (
    Claimed,
    Idempotency,
    MemoryStore,
    Record,
    RedisStore,
    ReplayedError,
    State,
    StoreError,
    StoreUnavailableError,
)
from asyncidem.cache import Cache
from asyncidem.model import Stored, Swap, owner_of
from asyncidem.replay import describe, rebuild
from asyncidem.stores.link import Link, PoolLink, Progress
from asyncidem.stores.routes import routes_of

from loops import run_virtual

OURS, THEIRS = "a" * 32, "b" * 32
LOST = exceptions.ConnectionError("Connection closed by server.")


class Foreign(BaseException):
    """Neither an error of the client's nor a cancellation."""


class Wire:
    """Connections of a real pool that send nothing; each write is answered with the next list of replies.

    An exception is raised in the place of a reply, and a function is called for it.
    """

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)
        self.made = self.sent = self.dropped = 0
        wire = self

        class Scripted(Connection):
            def __init__(self, **options: Any) -> None:
                super().__init__(**options)
                wire.made += 1
                self.replies: list[Any] = []

            async def connect(self) -> None:
                pass

            async def can_read(self, timeout: float = 0) -> bool:
                return False

            can_read_destructive = can_read

            def should_reconnect(self) -> bool:
                return False

            async def send_packed_command(self, command: Any, *_: Any, **__: Any) -> None:
                wire.sent += 1
                self.replies += wire.answers.pop(0)

            async def read_response(self, *_: Any, **__: Any) -> Any:
                reply = self.replies.pop(0)
                if isinstance(reply, BaseException):
                    raise reply
                return reply() if callable(reply) else reply

            async def disconnect(self, *_: Any, **__: Any) -> None:
                wire.dropped += 1
                self.replies.clear()

        self.pool: Any = redis.asyncio.ConnectionPool(connection_class=Scripted)
        routes = routes_of(redis.asyncio.Redis(connection_pool=self.pool))
        assert routes is not None
        self.link = PoolLink(routes, 1)


GET = ("GET", "k")


class Resets(Link):
    """Counts its resets."""

    count = 0

    def reset(self, *, forked: bool = False) -> None:
        self.count += 1


@pytest.mark.parametrize("first", [exceptions.ReadOnlyError("replica"), LOST], ids=repr)
async def test_the_first_error_is_told(first: Exception) -> None:
    """What went wrong is told by the error that came first, not by the silence until the deadline."""
    tries = 0

    async def send(progress: Progress) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise first
        await asyncio.Event().wait()

    with pytest.raises(StoreUnavailableError) as raised:
        await Link(0.06).step(send)
    assert tries > 1
    assert raised.value.__cause__ is first


async def test_a_primitive_on_its_own_has_one_deadline() -> None:
    """All steps of a primitive that no store call is around end at the link's timeout, and none begins after it."""
    link, sent = Link(0.03), list[str]()

    async def lose(progress: Progress) -> None:
        sent.append("first")
        raise LOST

    async def answer(progress: Progress) -> None:
        sent.append("second")

    async def work() -> None:
        with contextlib.suppress(StoreUnavailableError):
            await link.step(lose)
        await link.step(answer)

    with pytest.raises(StoreUnavailableError, match="before this command could be sent"):
        await link.detached("k", work)
    assert set(sent) == {"first"}


def test_commands_of_a_dead_loop_are_forgotten() -> None:
    """A command whose loop is gone will never end, so that nobody waits for it on the next loop."""
    link, inside = Link(5), list[Any]()

    async def hang() -> None:
        inside.append(asyncio.current_task())
        await asyncio.Event().wait()

    async def answer() -> str:
        return "answer"

    async def abandon() -> None:
        call = asyncio.get_running_loop().create_task(link.detached("k", hang))
        while not inside:
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])

    loop = asyncio.new_event_loop()
    loop.run_until_complete(abandon())
    loop.close()
    inside[0]._log_destroy_pending = False
    assert run_virtual(asyncio.wait_for(link.detached("k", answer), 60)) == "answer"


async def test_the_first_of_several_refusals() -> None:
    """Of several error replies the first is told, and the connection gives the next command its own reply."""
    one, other = exceptions.ResponseError("ERR one"), exceptions.ResponseError("ERR other")
    wire = Wire([b"0", one, other, b"3"], [b"next"])
    with pytest.raises(StoreError) as raised:
        await wire.link.exchange("k", GET, GET, GET, GET)
    assert raised.value.__cause__ is one
    assert await wire.link.exchange("k", GET) == [b"next"]
    assert (wire.made, wire.sent, wire.dropped) == (1, 2, 0)


async def test_a_demoted_master_is_left() -> None:
    """A connection to a node that became a replica is dropped, and the command repeated over another."""
    wire = Wire([exceptions.ReadOnlyError("replica")], [b"answer"])
    assert await wire.link.exchange("k", GET) == [b"answer"]
    assert (wire.sent, wire.dropped) == (2, 1)


async def test_another_node_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the plain path too a node that is to be asked gets ASKING before each command, and its answers are no replies."""
    wire = Wire([exceptions.AskError("7 b:1"), b"late"], [b"OK", b"answer", b"OK", b"other"])
    monkeypatch.setattr(wire.link._routes, "heed", lambda code, *_: "b:1" if code == "ASK" else None)
    assert await wire.link.exchange("k", GET, GET) == [b"answer", b"other"]
    assert (wire.sent, wire.dropped) == (2, 0)


async def test_a_connection_in_the_middle_of_a_command_is_dropped() -> None:
    """Whatever ends a command before its reply was read, the connection is dropped, and given back to the pool."""
    wire = Wire([Foreign(), b"late"], [b"next"])
    with pytest.raises(Foreign):
        await wire.link.exchange("k", GET, GET)
    assert wire.dropped == 1
    assert await wire.link.exchange("k", GET) == [b"next"]
    assert wire.made == 1


async def test_a_pool_that_was_reset_meanwhile() -> None:
    """A reply that comes after the pool was reset is an answer, though the pool does not know its connection any more."""
    wire = Wire()

    def reset() -> bytes:
        wire.pool.reset()
        return b"answer"

    wire.answers.append([reset])
    assert await wire.link.exchange("k", GET) == [b"answer"]
    assert wire.sent == 1


async def test_connections_of_a_dead_loop_are_replaced() -> None:
    """A client that says that its loop is gone gets new connections; any other error leaves the pool as it is."""
    wire = Wire([RuntimeError("Event loop is closed")], [b"answer"], [LOST], [b"next"])
    assert await wire.link.exchange("k", GET) == [b"answer"]
    assert wire.made == 2
    assert await wire.link.exchange("k", GET) == [b"next"]
    assert wire.made == 2


def test_closing_on_another_loop_resets_first() -> None:
    """What is closed on another loop than the last one must not be that one's connections; on the same it stays."""
    link = Resets(5)

    async def use(*, close: bool = False) -> int:
        async def answer() -> None:
            pass

        await link.detached("k", answer)
        if close:
            await link.aclose()
        return link.count

    assert run_virtual(use(close=True)) == 0
    run_virtual(link.aclose())
    assert link.count == 1


def record(owner: str, lease: int | None = None) -> bytes:
    """What a record in progress looks like, as far as the primitives look."""
    more = "" if lease is None else f', "lease": {lease}, "ttl": 86400000'
    return f'{{"owner": "{owner}", "status": "INPROGRESS"{more}, "attempt": 1}}'.encode()


class Plain:
    """A client of the user's; `before(method, name)` is called before each command."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.px: dict[str, int] = {}
        self.before: Callable[[str, str], object] = lambda *_: None

    async def get(self, name: str) -> bytes | None:
        self.before("get", name)
        return self.data.get(name)

    async def set(self, name: str, value: bytes, *, px: int, nx: bool) -> object:
        self.before("set", name)
        if nx and name in self.data:
            return False
        self.data[name], self.px[name] = value, px
        return True

    async def delete(self, name: str) -> object:
        self.before("delete", name)
        return self.data.pop(name, None)


Write = Callable[[RedisStore, bytes], Coroutine[Any, Any, Any]]

WRITES: dict[str, Write] = {
    "put": lambda store, value: store.put_if_absent("k", value, 86_400_000),
    "swap": lambda store, value: store.swap("k", b"", value, 86_400_000, exact=False, or_absent=True),
    "remove": lambda store, value: store.remove("k", value, exact=True),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(("lease", "px"), [(500, 500), (9_999, 9_999), (60_000, 10_000), (0, 10_000), (None, 10_000)])
async def test_a_lock_lives_no_longer_than_the_lease(write: str, lease: int | None, px: int) -> None:
    """A worker that dies under the lock keeps others off for its lease at most, and never for more than 10 s."""
    client, value = Plain(), record(OURS, lease)
    if write == "remove":
        client.data["k"] = value
    await WRITES[write](RedisStore(client, prefix=""), value)
    assert client.px["k:lock"] == px
    assert "k:lock" not in client.data


def test_a_lock_that_just_went_is_asked_for_at_once() -> None:
    """A lock that was refused, and is gone when it is looked at, is asked for again without a pause."""
    client = Plain()
    client.data["k:lock"] = THEIRS.encode()

    def go(method: str, name: str) -> None:
        if (method, name) == ("get", "k:lock") and client.data.get(name) == THEIRS.encode():
            del client.data[name]

    client.before = go

    async def main() -> float:
        assert await WRITES["put"](RedisStore(client, prefix=""), record(OURS)) is None
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == 0
    assert client.data == {"k": record(OURS)}


def passing_by(client: Plain) -> None:
    """Let another's record be there at the first write of `k`, and be gone when it is looked at."""
    came: list[bool] = []

    def pass_by(method: str, name: str) -> None:
        if (method, name) == ("set", "k") and not came:
            came.append(True)
            client.data["k"] = record(THEIRS)
        elif method == "get" and client.data.get(name) == record(THEIRS):
            del client.data[name]

    client.before = pass_by


async def test_a_put_refused_by_what_is_gone_is_not_won() -> None:
    """A put that was refused and then finds nothing may or may not have written: it answers as if its own were there."""
    client, value = Plain(), record(OURS)
    passing_by(client)
    assert await RedisStore(client, prefix="").put_or_read("k", value, 1000) == Stored(value, 1000)
    assert client.data == {}


async def test_a_claim_refused_by_what_is_gone_is_written() -> None:
    """A claim that is handed out after such a put has its record in the store: others find it in progress."""
    client = Plain()
    passing_by(client)
    store = RedisStore(client, prefix="")
    claim = await store.claim("k")
    assert isinstance(claim, Claimed)
    assert owner_of(client.data["k"]) == claim.owner


async def test_a_swap_refused_by_what_is_gone_is_written() -> None:
    """A swap that says it has written has: a completion that is believed to be stored would else be charged again."""
    client, value = Plain(), record(OURS)
    passing_by(client)
    swap: Swap = await WRITES["swap"](RedisStore(client, prefix=""), value)
    assert swap.written
    assert client.data == {"k": value}


class RewritingError(OSError):
    """Has all that it was given in its args, where an OSError leaves the file name out."""

    def __init__(self, number: int, text: str, file: str) -> None:
        super().__init__(number, text, file)
        self.args = (number, text, file)


class SecretiveError(Exception):
    """Does not give its arguments away."""

    @property
    def args(self) -> tuple[Any, ...]:  # type: ignore[override]
        raise RuntimeError("no arguments")


class Counting(type):
    """Counts how often the names of its classes are looked at."""

    looks: ClassVar[int] = 0

    def __getattribute__(cls, name: str) -> Any:
        if name == "__qualname__":
            Counting.looks += 1
        return super().__getattribute__(name)


def test_rewritten_arguments_come_back() -> None:
    """Args that a class's `__init__` has put in the place of the interpreter's own are those of the replay."""
    error = RewritingError(2, "gone", "/x")
    back = rebuild(describe(error), (RewritingError,), "k")
    assert isinstance(back, RewritingError)
    assert back.args == error.args == (2, "gone", "/x")
    assert (back.errno, back.strerror, back.filename) == (2, "gone", "/x")


def test_each_class_is_searched_once() -> None:
    """A hierarchy of diamonds, with as many ways down as two to the power of its depth, is searched in linear time."""
    top: Any = Counting("Top", (Exception,), {})
    bottom, kinds = top, [top]
    for number in range(12):
        sides = tuple(Counting(f"Side{number}{side}", (bottom,), {}) for side in "ab")
        bottom = Counting(f"Bottom{number}", sides, {})
        kinds += [*sides, bottom]
    Counting.looks = 0
    text = json.dumps({"type": "no.Such", "message": "m", "args": [], "state": {}})
    assert type(rebuild(text, (top,), "k")) is ReplayedError
    assert len(kinds) <= Counting.looks <= 2 * len(kinds)


@pytest.mark.parametrize("make", ["text", {"a": 1}, None, 5])
def test_arguments_to_make_it_that_are_no_list(make: Any) -> None:
    """A description whose arguments for the making are no list is not rebuilt."""
    text = json.dumps({"type": "builtins.ValueError", "message": "m", "args": ["a"], "make": make, "state": {}})
    assert type(rebuild(text, (ValueError,), "k")) is ReplayedError


async def test_an_exception_that_does_not_give_its_arguments() -> None:
    """The caller gets the handler's own exception, and its duplicates one that says its class and message."""
    error = SecretiveError("no funds")

    async def handler() -> None:
        raise error

    idem = Idempotency(MemoryStore(), replay_exceptions=SecretiveError)
    with pytest.raises(SecretiveError) as raised:
        await idem.run("k", handler)
    assert raised.value is error
    with pytest.raises(ReplayedError, match=r"SecretiveError: no funds$"):
        await idem.run("k", handler)


def test_a_result_that_is_put_again_is_used_again() -> None:
    """What was put again is not the least recently used, though it was the first to come."""
    cache = Cache(2, lambda: 0.0)
    for key in "abac":
        cache.put(Record(key, State.COMPLETED, OURS, 1, "1", None, None, 60.0))
    assert [key for key in "abc" if cache.get(key) is not None] == ["a", "c"]
