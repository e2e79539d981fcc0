"""What type checkers say about the public API: this file is checked and never run.

A line that must be an error ignores it, for mypy and pyright alike. Both refuse an ignore that nothing needs, so a
signature that is lost fails the check.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from typing import Any, assert_never, assert_type

import redis.asyncio
from fastapi import Depends, FastAPI, Request

from asyncidem import (
    Claimed,
    Codec,
    Event,
    Hook,
    Idempotency,
    InProgress,
    JSONCodec,
    MemoryStore,
    Mismatch,
    Operation,
    PydanticCodec,
    Record,
    RedisClientProtocol,
    RedisStore,
    Replay,
    State,
    Store,
    StoreUnavailableError,
    current_operation,
)
from asyncidem.integrations.aws_lambda import (
    BatchResponse,
    event_key,
    idempotent_api,
    jmespath_key,
    lambda_handler,
    process_sqs,
)
from asyncidem.integrations.fastapi import HTTPFailure, IdempotencyGuard
from asyncidem.integrations.powertools import powertools_fingerprint, powertools_key
from asyncidem.model import Stored, Swap
from asyncidem.testing import FaultyStore, ManualClock, StoreConformance, use_store

store = MemoryStore()
idem = Idempotency(store, namespace="payments", lease=30, ttl=timedelta(days=1))


# -- the decorator keeps exact signatures


@idem.idempotent
async def bare(order_id: str, amount: int = 1) -> dict[str, str]:
    """Be decorated without arguments."""
    return {order_id: str(amount)}


@idem.idempotent(key="order_id", payload=["amount"], name="charge", lease=5, on_failure=lambda _error: "keep")
async def charge(order_id: str, amount: int = 1, *, note: str = "") -> dict[str, int]:
    """Be decorated with arguments."""
    return {order_id + note: amount}


def both(order_id: str, amount: int) -> tuple[str, int]:
    """Be a key."""
    return order_id, amount


@idem.idempotent(key=both, payload=("order_id", "amount"))
async def by_callable(order_id: str, amount: int) -> None:
    """Have a callable for its key."""


class Account:
    """Has methods."""

    @idem.idempotent(key="order_id")
    async def pay(self, order_id: str, amount: int) -> list[int]:
        """Be a method."""
        return [amount]

    @staticmethod
    @idem.idempotent(key="order_id")
    async def static(order_id: str) -> bool:
        """Be a static method."""
        return bool(order_id)

    @classmethod
    @idem.idempotent(key="order_id")
    async def of_class(cls, order_id: str) -> bool:
        """Be a class method."""
        return bool(order_id)


async def decorated() -> None:
    """Call what was decorated."""
    coroutine = bare("o1", 5)
    await assert_type(coroutine, Coroutine[Any, Any, dict[str, str]])
    assert_type(await bare("o1"), dict[str, str])
    assert_type(await bare(order_id="o1", amount=5), dict[str, str])
    assert_type(await charge("o1", 5, note="n"), dict[str, int])
    assert_type(await Account().pay("o1", amount=5), list[int])
    assert_type(await Account.static("o1"), bool)
    assert_type(await Account.of_class("o1"), bool)
    assert_type(idem.key_for(charge, "o1", 5, note="n"), str)

    await bare(5)  # type: ignore[arg-type]
    await bare()  # type: ignore[call-arg]
    await bare("o1", price=5)  # type: ignore[call-arg]
    await charge("o1", "5")  # type: ignore[arg-type]
    await charge("o1", 5, "n")  # type: ignore[call-arg]
    await by_callable("o1")  # type: ignore[call-arg]
    await Account().pay("o1", "5")  # type: ignore[arg-type]
    await Account.static(5)  # type: ignore[arg-type]
    await Account.of_class(5)  # type: ignore[arg-type]
    idem.key_for(charge, 5)  # type: ignore[arg-type]
    idem.key_for(charge)  # type: ignore[call-arg]


def plain(order_id: str) -> str:
    """Be no coroutine function."""
    return order_id


def not_decorable() -> None:
    """Decorate what cannot be decorated."""
    idem.idempotent(plain)  # type: ignore[arg-type]
    idem.idempotent(key="order_id")(plain)  # type: ignore[arg-type]
    idem.idempotent(key=5)  # type: ignore[call-overload]
    idem.idempotent(leese=5)  # type: ignore[call-overload]
    idem.idempotent(lease="5")  # type: ignore[call-overload]


# -- the call form


async def refund(order_id: str, amount: int) -> float:
    """Be called."""
    return float(amount) + len(order_id)


async def thunk() -> bytes:
    """Be called without arguments."""
    return b""


async def called(client: redis.asyncio.Redis) -> None:
    """Infer results from what is called, and check the arguments."""
    assert_type(await idem.run("k", refund, "o1", 5), float)
    assert_type(await idem.run("k", thunk), bytes)
    assert_type(await idem.run("k", refund, "o1", 5, payload={"a": 1}, name="n", wait=5, ttl=timedelta(1)), float)
    assert_type(await idem.run("k", lambda order: refund(order, 5), "o1"), float)
    assert_type(await idem.run("k", bare, "o1"), dict[str, str])
    assert_type(await idem.run("k", Account().pay, "o1", 5), list[int])
    assert_type(await idem.run(None, thunk, missing_key="run"), bytes)

    await idem.run("k", refund, "o1")  # type: ignore[arg-type]
    await idem.run("k", refund, 5, "o1")  # type: ignore[arg-type]
    await idem.run("k", refund, "o1", 5, 6)  # type: ignore[arg-type]
    await idem.run("k", plain, "o1")  # type: ignore[arg-type]
    await idem.run(5, thunk)  # type: ignore[arg-type]
    await idem.run("k", thunk, leese=5)  # type: ignore[call-arg]
    await idem.run("k", thunk, lease="5")  # type: ignore[arg-type]


# -- the context manager


async def entered() -> object:
    """Use an operation."""
    async with idem.operation("order:42", payload={"amount": 5}, name="n", on_cancel="release") as op:
        assert_type(op, Operation)
        assert_type(op.key, str)
        assert_type(op.name, str | None)
        assert_type(op.downstream_key, str)
        assert_type(op.attempt, int)
        assert_type(op.replayed, bool)
        assert_type(current_operation(), Operation | None)
        if op.replayed:
            return op.result
        op.set_result({"paid": True})
    idem.operation(5)  # type: ignore[arg-type]
    idem.operation("k", leese=5)  # type: ignore[call-arg]
    op.key_of = 5  # type: ignore[attr-defined]
    return None


# -- options and their overrides


def look(result: Any, record: Record) -> Any:
    """Map a replay."""
    return [result, record.key]


def take_note(event: Event) -> None:
    """Be a hook."""


class Metrics:
    """Is a hook as an object."""

    def __call__(self, event: Event, /) -> int:
        """Count an event."""
        return len(event.name)


hook: Hook = take_note
metrics: Hook = Metrics()


def options() -> None:
    """Give every option, rightly and wrongly."""
    Idempotency(
        RedisStore.from_url("redis://localhost", cluster=False),
        namespace="n",
        lease=0.5,
        ttl=timedelta(hours=1),
        wait=None,
        renew=False,
        on_failure="keep",
        on_cancel="release",
        on_store_error="run",
        on_completion_error="raise",
        missing_key="run",
        replay_exceptions=(ValueError, KeyError),
        codec=PydanticCodec(dict[str, int]),
        local_cache=100,
        map_replay=look,
        fingerprint_secret=b"s",
        hooks=[hook, metrics, lambda event: event.key],
    )
    idem.operation(
        "k",
        lease=timedelta(1),
        ttl=5,
        wait=None,
        renew=True,
        on_failure=lambda _error: "release",
        on_cancel="keep",
        on_store_error="raise",
        on_completion_error="return",
        missing_key="raise",
        replay_exceptions=ValueError,
        codec=JSONCodec(),
        map_replay=None,
    )
    Idempotency("redis://")  # type: ignore[arg-type]
    Idempotency(store, on_cancel="retry")  # type: ignore[arg-type]
    Idempotency(store, codec=JSONCodec)  # type: ignore[arg-type]
    Idempotency(store, hooks=[plain])  # type: ignore[list-item]
    Idempotency(store, replay_exceptions=BaseException)  # type: ignore[arg-type]
    idem.operation("k", on_failure="retry")  # type: ignore[arg-type]
    idem.operation("k", on_failure=lambda _error: "retry")  # type: ignore[arg-type, return-value]
    idem.operation("k", namespace="n")  # type: ignore[call-arg]
    idem.namespace = "n"  # type: ignore[misc]


# -- the store, awaited directly


async def worker(some: Store) -> float | str | None:
    """Claim, and match every outcome; a missing one would be an error at `assert_never`."""
    outcome = await some.claim("msg:7", lease=30, ttl=timedelta(hours=1), fingerprint=None)
    assert_type(outcome, Claimed | Replay | InProgress | Mismatch)
    match outcome:
        case Claimed() as claim:
            assert_type(claim.attempt, int)
            await some.renew(claim)
            await some.complete(claim, '"done"', ttl=3600)
            await some.release(claim)
            return claim.owner
        case Replay(record=record):
            assert_type(record, Record)
            assert_type(record.state, State)
            return record.data
        case InProgress(retry_after=seconds):
            assert_type(seconds, float)
            return seconds
        case Mismatch():
            return None
        case _:
            assert_never(outcome)


async def unfinished(some: Store) -> None:
    """Forget an outcome."""
    outcome = await some.claim("msg:7")
    match outcome:
        case Claimed() | Replay() | InProgress():
            pass
        case _:
            assert_never(outcome)  # type: ignore[arg-type]


async def looked_up() -> None:
    """Read, delete and close."""
    RedisStore.from_sentinel(["a:1", ("b", 2)], service="payments", sentinel_kwargs={"password": "p"}, db=3)
    RedisStore.from_sentinel([1], service="payments")  # type: ignore[list-item]
    RedisStore.from_sentinel(["a:1"])  # type: ignore[call-arg]
    async with RedisStore.connect("localhost", 6379, password="p", ssl=False) as some:
        assert_type(some, RedisStore)
        assert_type(await some.get("k"), Record | None)
        assert_type(await some.delete("k"), bool)
        assert_type(await some.aclose(), None)
        await some.claim(5)  # type: ignore[arg-type]
        await some.complete("k", "done")  # type: ignore[arg-type]


# -- what users bring


class DictStore(Store):
    """A store of the user's: four primitives."""

    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        """Write if absent."""
        return value if key else None

    async def read(self, key: str) -> Stored | None:
        """Read."""
        return Stored(b"", 5) if key else None

    async def swap(
        self,
        key: str,
        expected: bytes,
        value: bytes,
        ttl_ms: int,
        *,
        exact: bool,
        or_absent: bool,
        left_ms: int | None = None,
    ) -> Swap:
        """Compare and set."""
        return Swap(exact)

    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        """Compare and delete."""
        return exact


async def tested(idem: Idempotency) -> None:
    """Use what is there for tests."""
    clock = ManualClock()
    await StoreConformance(MemoryStore).run()
    await StoreConformance(DictStore, advance=clock.advance, timeout=timedelta(seconds=30)).run()
    await StoreConformance(made, advance=asyncio.sleep).run()
    StoreConformance(dict)  # type: ignore[arg-type]
    with use_store(idem, FaultyStore(MemoryStore(clock=clock.monotonic, wall=clock.wall), turns=1)) as store:
        assert_type(store, FaultyStore)
        fault = store.fault("swap", before=StoreUnavailableError("down"), after=0.5, times=None)
        store.fault("read", before=asyncio.Event().wait, when=lambda key, value: key == "k" and value == b"")
        store.fault("delete")  # type: ignore[arg-type]
        await fault.reached.wait()
        assert_type(store.calls[0].key, str)
    use_store(MemoryStore(), MemoryStore())  # type: ignore[arg-type]


async def made() -> Store:
    """Make a store."""
    return DictStore()


class HalfStore(Store):
    """Lacks primitives."""

    async def read(self, key: str) -> Stored | None:
        """Read."""


class TextCodec(Codec):
    """A codec of the user's."""

    def encode(self, value: object) -> str:
        """Write."""
        return str(value)

    def decode(self, text: str, annotation: Any) -> Any:
        """Read."""
        return annotation(text)


class Client:
    """A client of the user's."""

    async def get(self, name: str) -> bytes | None:
        """Read."""
        return name.encode()

    async def set(self, name: str, value: bytes, *, px: int, nx: bool) -> bool:
        """Write."""
        return nx

    async def delete(self, name: str) -> int:
        """Delete."""
        return len(name)


class BadClient:
    """Has no `delete`."""

    async def get(self, name: str) -> bytes | None:
        """Read."""

    async def set(self, name: str, value: bytes, *, px: int, nx: bool) -> bool:
        """Write."""
        return nx


def brought(client: redis.asyncio.Redis) -> None:
    """Use what users bring where the library takes it."""
    Idempotency(DictStore(prefix="p:", timeout=5), codec=TextCodec())
    HalfStore()  # type: ignore[abstract]
    RedisStore(Client(), prefix="p:", timeout=timedelta(seconds=1))
    RedisStore(client)
    RedisStore(BadClient())  # type: ignore[arg-type]
    take_client(Client())
    take_client(client)


def take_client(client: RedisClientProtocol) -> None:
    """Take what the protocol allows."""


# -- functions that take functions see through the decorator


def register(handler: Callable[[str, int], Awaitable[dict[str, str]]]) -> None:
    """Take a handler."""


register(bare)
register(charge)  # type: ignore[arg-type]


# -- integrations


async def shared(order: dict[str, object]) -> None:
    """Use keys and hashes of Powertools."""
    key = powertools_key(order, key_prefix="charge", hash_function="sha256", jmespath="order_id")
    assert_type(key, str)
    assert_type(await idem.run(key, bare, "1", payload=powertools_fingerprint(order)), dict[str, str])
    await store.claim(key, fingerprint=powertools_fingerprint(order, jmespath="amount"))
    powertools_key(order)  # type: ignore[call-arg]
    powertools_key(order, key_prefix=b"charge")  # type: ignore[arg-type]


def user_id(request: Request) -> int:
    """Say who asks."""
    return int(request.headers["x-user"])


guard = IdempotencyGuard(
    idem, principal=Depends(user_id), wait=2, methods={"POST"}, should_store=lambda status: status < 500
)
IdempotencyGuard(
    idem, principal=user_id, required=False, fingerprint=lambda request, body: request.url.path.encode() + body
)
IdempotencyGuard(idem, principal=None)
IdempotencyGuard(idem)  # type: ignore[call-arg]
IdempotencyGuard(idem, principal=None, max_bodies=1)  # type: ignore[call-arg]
guard.install(FastAPI())
assert_type(HTTPFailure(503).status, int)


@lambda_handler
@idem.idempotent(key=event_key)
async def invoked(event: dict[str, Any], context: object) -> dict[str, str]:
    """Be called by Lambda."""
    return {}


@lambda_handler(reserve=timedelta(seconds=1))
@idempotent_api(idem, required=True, principal=None, max_body=1)
async def api(event: dict[str, Any], context: object) -> dict[str, Any]:
    """Answer requests."""
    return {"statusCode": 200}


async def on_lambda(event: dict[str, Any]) -> None:
    """Keeps the types of event, context and result; the decorators take coroutine functions alone."""
    assert_type(invoked(event, None), dict[str, str])
    assert_type(await invoked.aio(event, None), dict[str, str])
    invoked(1, None)  # type: ignore[arg-type]

    async def one(message: dict[str, Any]) -> None: ...

    response = await process_sqs(event, None, one, idem=idem, key=jmespath_key("messageId"), concurrency=2)
    assert_type(response, BatchResponse)
    assert_type(response["batchItemFailures"][0]["itemIdentifier"], str)
    await process_sqs(event, None, one)  # type: ignore[call-arg]
    idempotent_api(idem, nothing=1)  # type: ignore[call-arg]

    @lambda_handler  # type: ignore[arg-type]
    def plain(event: dict[str, Any], context: object) -> None: ...
