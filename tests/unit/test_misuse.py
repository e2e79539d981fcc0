"""Misuse: refused before anything runs or is written, by a message that names the value and what to do instead."""

import asyncio
import functools
import inspect
import math
import re
import types
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import redis.asyncio

from asyncidem import (
    ConfigurationError,
    Idempotency,
    InvalidKeyError,
    JSONCodec,
    MemoryStore,
    MissingKeyError,
    PydanticCodec,
    RedisStore,
)
from asyncidem.model import Stored


class SpyStore(MemoryStore):
    """Counts what would be round trips."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        self.calls += 1
        return await super().put_or_read(key, value, ttl_ms)

    async def read(self, key: str) -> Stored | None:
        self.calls += 1
        return await super().read(key)


class AsyncCallable:
    """An object whose call is a coroutine, which `inspect.iscoroutinefunction` does not see."""

    async def __call__(self, *args: Any, **kwargs: Any) -> str:
        return "release"


async def pay(order_id: str, amount: int = 1) -> dict[str, int]:
    """Stand for a handler; its calls are counted by whoever wraps it."""
    return {order_id: amount}


async def coroutine(*args: Any, **kwargs: Any) -> str:
    """Stand for a function that should have been a plain one."""
    return "release"


def plain(order_id: str) -> str:
    """Stand for a function that should have been a coroutine function."""
    raise AssertionError("a plain function must not be called")


async def generator(order_id: str) -> AsyncGenerator[str, None]:
    """Stand for an async generator."""
    yield order_id


class Service:
    """Has methods to decorate."""

    async def method(self, order_id: str) -> str:
        return order_id


@pytest.fixture
def store() -> SpyStore:
    """Return a store that counts the calls that reach it."""
    return SpyStore()


@pytest.fixture
def idem(store: SpyStore) -> Idempotency:
    """Return an object over the counting store."""
    return Idempotency(store)


BAD_FUNCTIONS: list[tuple[Any, str]] = [
    (plain, "not a coroutine function; define it with async def"),
    (lambda order_id: order_id, "not a coroutine function"),
    (generator, "async generator: it has no single result"),
    (staticmethod(pay), "put @idempotent below @staticmethod"),
    (classmethod(pay), "put @idempotent below @classmethod"),
    (AsyncCallable(), "not a coroutine function"),
    (functools.partial(pay, "o"), "has no name to make keys of; decorate the function itself"),
    (Service, "not a coroutine function"),
    ("order_id", r"write @idempotent\(key='order_id'\)"),
]


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize(("fn", "message"), BAD_FUNCTIONS)
def test_what_is_no_coroutine_function_is_refused_at_decoration(
    idem: Idempotency, fn: Any, message: str, bare: bool
) -> None:
    """Both forms of the decorator refuse what they cannot protect, and say what to do."""
    with pytest.raises(ConfigurationError, match=message):
        idem.idempotent(fn) if bare else idem.idempotent(key="order_id")(fn)


@pytest.mark.parametrize("option", ["key", "payload"])
@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("order", "'order' names no parameter; there are: order_id, amount"),
        (["order_id", "nope"], "'nope' names no parameter"),
        ("", "'' names no parameter"),
        ([], r"must be parameter names or a callable of the same arguments, not \[\]"),
        ((), r"must be parameter names or a callable of the same arguments, not \(\)"),
        (5, "must be parameter names or a callable of the same arguments, not 5"),
        ({"order_id"}, "must be parameter names or a callable"),
        ([5], "5 names no parameter"),
        (coroutine, "must be a plain function, not the coroutine function"),
        (functools.partial(coroutine), "must be a plain function, not the coroutine function"),
    ],
)
def test_selectors_that_cannot_work_are_refused_at_decoration(
    idem: Idempotency, option: str, chosen: Any, message: str
) -> None:
    """A parameter that does not exist, a value of another kind and a coroutine function choose nothing."""
    with pytest.raises(ConfigurationError, match=f"{option}.*{message}"):
        idem.idempotent(**{option: chosen})(pay)


@pytest.mark.parametrize("option", ["key", "payload"])
def test_a_selector_of_lists_of_lists_is_refused(idem: Idempotency, option: str) -> None:
    """A part that is no name is refused as such, be it unhashable."""
    with pytest.raises(ConfigurationError, match=option):
        idem.idempotent(**{option: [["order_id"]]})(pay)  # type: ignore[call-overload]


def test_a_selector_names_that_there_are_no_parameters(idem: Idempotency) -> None:
    """A function without parameters says so in the message."""

    async def tick() -> None: ...

    with pytest.raises(ConfigurationError, match="key='x' names no parameter; there are: none"):
        idem.idempotent(key="x")(tick)


@pytest.mark.parametrize("option", ["key", "payload"])
def test_a_selector_object_with_an_async_call_is_refused(idem: Idempotency, option: str) -> None:
    """An object whose call is a coroutine is no plain function either."""
    with pytest.raises(ConfigurationError, match=f"{option} must be a plain function"):
        idem.idempotent(**{option: AsyncCallable()})(pay)  # type: ignore[call-overload]


@pytest.mark.parametrize("option", ["on_failure", "map_replay"])
@pytest.mark.parametrize("given", [coroutine, functools.partial(coroutine), AsyncCallable()])
def test_callable_options_are_plain_functions(store: SpyStore, option: str, given: Any) -> None:
    """A coroutine function would never be awaited: it is refused as an option."""
    with pytest.raises(ConfigurationError, match=f"{option} must be a plain function, not the coroutine function"):
        Idempotency(store, **{option: given})


@pytest.mark.parametrize("hook", [coroutine, functools.partial(coroutine), AsyncCallable(), 5, None])
def test_a_hook_is_a_plain_function(store: SpyStore, hook: Any) -> None:
    """What cannot be called, or would never be awaited, is no hook."""
    with pytest.raises(ConfigurationError, match="a hook must be a plain function of one event, not "):
        Idempotency(store, hooks=[hook])


@pytest.mark.parametrize("hooks", [None, 5, print, plain])
def test_hooks_are_a_sequence(store: SpyStore, hooks: Any) -> None:
    """A hook that is not in a list is refused clearly."""
    with pytest.raises(ConfigurationError, match="hook"):
        Idempotency(store, hooks=hooks)


BAD_TIMES: list[Any] = [
    True,
    False,
    math.nan,
    0,
    0.0,
    -1,
    -0.5,
    math.inf,
    -math.inf,
    10**400,
    "30",
    b"30",
    Decimal(30),
    timedelta(0),
    timedelta(seconds=-1),
    [30],
    0.0001,
]


@pytest.mark.parametrize("given", [*BAD_TIMES, None], ids=repr)
@pytest.mark.parametrize("option", ["lease", "ttl"])
async def test_lease_and_ttl_are_times_above_zero(store: SpyStore, option: str, given: Any) -> None:
    """Wherever a lease or a ttl may be given, what is no time is refused, by name, with its value."""
    idem, options = Idempotency(store), {option: given}
    uses: list[Callable[[], Any]] = [
        lambda: Idempotency(store, **options),
        lambda: idem.idempotent(**options),
        lambda: idem.operation("k", **options),
        lambda: idem.run("k", pay, "o", **options),
        lambda: store.claim("k", **options),
    ]
    for use in uses:
        with pytest.raises(ConfigurationError, match=f"^{option} must be.*{re.escape(repr(given)[:20])}"):
            value = use()
            await value
    assert store.calls == 0


@pytest.mark.parametrize("given", BAD_TIMES, ids=repr)
async def test_wait_is_a_time_above_zero_or_none(store: SpyStore, given: Any) -> None:
    """A wait that is no time is refused everywhere, and the message says how not to wait."""
    idem = Idempotency(store)
    uses: list[Callable[[], Any]] = [
        lambda: Idempotency(store, wait=given),
        lambda: idem.idempotent(wait=given),
        lambda: idem.operation("k", wait=given),
        lambda: idem.run("k", pay, "o", wait=given),
    ]
    for use in uses:
        with pytest.raises(ConfigurationError, match=r"^wait \(None for not waiting\) must be"):
            await use()
    assert store.calls == 0


@pytest.mark.parametrize("given", [True, False, -1, 10**9, 1.0, math.nan, "5", None, [1]], ids=repr)
def test_local_cache_is_a_number_of_results(store: SpyStore, given: Any) -> None:
    """What is no whole number, negative, or more than any memory holds is refused with its value."""
    with pytest.raises(ConfigurationError, match=f"^local_cache must be a whole number.*{re.escape(repr(given))}"):
        Idempotency(store, local_cache=given)


BAD_OPTIONS: list[tuple[str, Any]] = [
    ("renew", 1),
    ("renew", None),
    ("on_failure", "retry"),
    ("on_failure", None),
    ("on_cancel", "raise"),
    ("on_cancel", plain),
    ("on_cancel", ["keep"]),
    ("on_store_error", "keep"),
    ("on_completion_error", "run"),
    ("missing_key", "return"),
    ("missing_key", None),
    ("replay_exceptions", "ValueError"),
    ("replay_exceptions", [ValueError]),
    ("replay_exceptions", (ValueError, "x")),
    ("replay_exceptions", int),
    ("replay_exceptions", (asyncio.CancelledError,)),
    ("replay_exceptions", BaseException),
    ("replay_exceptions", ValueError("x")),
    ("replay_exceptions", None),
    ("codec", JSONCodec),
    ("codec", None),
    ("codec", "json"),
    ("map_replay", "x"),
    ("map_replay", 5),
]


@pytest.mark.parametrize(("option", "given"), BAD_OPTIONS)
async def test_options_that_cannot_work_are_refused_wherever_they_are_given(
    store: SpyStore, option: str, given: Any
) -> None:
    """Constructor, decorator, operation and run check options alike, and name the option and the value."""
    idem, options = Idempotency(store), {option: given}
    uses: list[Callable[[], Any]] = [
        lambda: Idempotency(store, **options),
        lambda: idem.idempotent(**options),
        lambda: idem.operation("k", **options),
        lambda: idem.run("k", pay, "o", **options),
    ]
    for use in uses:
        with pytest.raises(ConfigurationError, match=f"^{option} must be.*{re.escape(repr(given))}"):
            await use()
    assert store.calls == 0


@pytest.mark.parametrize(
    "option", ["leese", "lease_ms", "namespace", "hooks", "local_cache", "fingerprint_secret", "store"]
)
async def test_unknown_options_are_refused(store: SpyStore, option: str) -> None:
    """What cannot be overridden is refused by name, and the message lists what can."""
    idem, options = Idempotency(store), {option: 5}
    uses: list[Callable[[], Any]] = [
        lambda: idem.idempotent(**options),
        lambda: idem.operation("k", **options),
        lambda: idem.run("k", pay, "o", **options),
    ]
    for use in uses:
        with pytest.raises(
            ConfigurationError, match=f"unknown option '{option}'; besides key, .* there are codec, .*wait$"
        ):
            await use()
    assert store.calls == 0


@pytest.mark.parametrize("given", [None, "redis://localhost", MemoryStore, object()])
def test_the_store_is_a_store(given: Any) -> None:
    """A URL, a class or nothing in the store's place is refused."""
    with pytest.raises(
        ConfigurationError, match=r"store must be a Store such as RedisStore.* or MemoryStore\(\), not "
    ):
        Idempotency(given)


@pytest.mark.parametrize("given", [None, 5, b"payments", ["a"]])
def test_the_namespace_is_text(store: SpyStore, given: Any) -> None:
    """A namespace that is no text is refused with its value."""
    with pytest.raises(ConfigurationError, match=f"namespace must be text, not {re.escape(repr(given))}"):
        Idempotency(store, namespace=given)


def test_the_namespace_is_text_that_a_store_can_hold(store: SpyStore) -> None:
    """A lone surrogate is no UTF-8: every key would fail, so the namespace does."""
    with pytest.raises(ConfigurationError, match="namespace"):
        Idempotency(store, namespace="\ud800")


@pytest.mark.parametrize("given", [5, b"pay", "", ["pay"], "\ud800"])
def test_a_name_is_text(idem: Idempotency, given: Any) -> None:
    """A decorator's name is part of its keys: it must be text that a store can hold."""
    with pytest.raises(ConfigurationError, match="name must be text"):
        idem.idempotent(name=given)(pay)


@pytest.mark.parametrize("given", ["", b"", 5, bytearray(b"s"), ["s"]])
def test_a_fingerprint_secret_is_text_or_bytes(store: SpyStore, given: Any) -> None:
    """An empty secret, or another type, is refused without showing it."""
    with pytest.raises(ConfigurationError, match=r"^fingerprint_secret must be text or bytes, and not empty$"):
        Idempotency(store, fingerprint_secret=given)


@pytest.mark.parametrize("key", [5, 0, False, b"k", 1.5, object(), Decimal(1)])
async def test_keys_of_operations_runs_and_stores_are_text(store: SpyStore, key: Any) -> None:
    """Where a key is used as it is given, only text is one; the message says how to make it text."""
    idem = Idempotency(store)
    uses: list[Callable[[], Any]] = [
        lambda: idem.operation(key),
        lambda: idem.run(key, pay, "o"),
        lambda: store.claim(key),
        lambda: store.get(key),
        lambda: store.delete(key),
    ]
    for use in uses:
        with pytest.raises(InvalidKeyError):
            await use()
    assert store.calls == 0


@pytest.mark.parametrize("key", [None, "", pytest.param([], id="list")])
async def test_empty_keys_are_refused(store: SpyStore, key: Any) -> None:
    """None and empty values are no keys: nothing runs and nothing is written."""
    idem = Idempotency(store)
    uses: list[Callable[[], Any]] = [lambda: idem.operation(key), lambda: idem.run(key, pay, "o")]
    if key != []:
        uses += [lambda: store.claim(key), lambda: store.get(key), lambda: store.delete(key)]
    for use in uses:
        with pytest.raises(MissingKeyError, match="None|empty|" + re.escape(repr(key))):
            await use()
    assert store.calls == 0


def test_methods_need_a_key(idem: Idempotency) -> None:
    """Two instances may be two tenants: whatever looks like a method is refused without key=."""

    async def of_self(self: object, order_id: str) -> str:
        return order_id

    async def of_cls(cls: object, order_id: str) -> str:
        return order_id

    for fn in (of_self, of_cls, Service.method, Service().method, types.MethodType(pay, "o1")):
        with pytest.raises(ConfigurationError, match=r"is a method: say with key= what tells one call from another"):
            idem.idempotent(fn)
    with pytest.raises(ConfigurationError, match=r"Inner\.static is a method"):

        class Inner:
            @staticmethod
            @idem.idempotent
            async def static(order_id: str) -> str:
                return order_id


@pytest.mark.parametrize("annotation", [tuple[int, int], datetime, set[str], "dict[int, str]", Service, "bytes"])
def test_annotations_that_json_cannot_hold_are_refused_at_decoration(idem: Idempotency, annotation: Any) -> None:
    """A result that would come back as something else is refused before there is one, with the remedy."""

    async def handler(order_id: str) -> None: ...

    handler.__annotations__["return"] = annotation
    with pytest.raises(ConfigurationError, match=r"JSON cannot give back .*; use codec=PydanticCodec\(\)"):
        idem.idempotent(handler)


async def test_run_refuses_annotations_that_json_cannot_hold(store: SpyStore) -> None:
    """The call form looks at the annotation of what it calls, before it calls it."""

    async def handler() -> tuple[int, int]:
        raise AssertionError("must not run")

    with pytest.raises(ConfigurationError, match="PydanticCodec"):
        await Idempotency(store).run("k", handler)
    assert store.calls == 0


async def test_a_name_that_comes_later_is_checked_at_the_first_call(store: SpyStore) -> None:
    """An annotation that could not be resolved at decoration is refused at the first call, before anything runs."""

    async def handler(order_id: str) -> "Later":  # type: ignore[name-defined]  # noqa: F821
        raise AssertionError("must not run")

    protected = Idempotency(store).idempotent(handler)
    handler.__annotations__["return"] = datetime
    with pytest.raises(ConfigurationError, match="PydanticCodec"):
        await protected("o")
    assert store.calls == 0


async def test_pydantic_needs_an_annotation_that_can_be_resolved(store: SpyStore) -> None:
    """A type that stays unknown could not be rebuilt at replay: the call is refused before anything runs."""

    async def handler(order_id: str = "o") -> "Nowhere":  # type: ignore[name-defined]  # noqa: F821
        raise AssertionError("must not run")

    idem = Idempotency(store, codec=PydanticCodec())
    message = r"return annotation of .*handler names what does not exist.*PydanticCodec\(Model\)"
    protected = idem.idempotent(handler)
    uses: list[Callable[[], Awaitable[Any]]] = [protected, lambda: idem.run("k", handler)]
    for use in uses:
        with pytest.raises(ConfigurationError, match=message):
            await use()
    assert store.calls == 0


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (plain, "not a coroutine function; define it with async def"),
        (Service, "not a coroutine function; define it with async def"),
        (generator, "not a coroutine function; define it with async def"),
        (functools.partial(generator), "not a coroutine function; define it with async def"),
        (pay("o"), "run takes a coroutine function and its arguments, not <coroutine"),
        (None, "run takes a coroutine function and its arguments, not None"),
    ],
)
async def test_run_refuses_what_returns_no_awaitable(store: SpyStore, fn: Any, message: str) -> None:
    """A plain function, a class, an async generator and a coroutine that is already made are refused unrun."""
    with pytest.raises(ConfigurationError, match=message):
        await Idempotency(store).run("k", fn, "o")
    if inspect.iscoroutine(fn):
        fn.close()
    assert store.calls == 0


async def test_run_refuses_a_lambda_that_returned_no_awaitable(store: SpyStore) -> None:
    """What a lambda returns is known only when it has run: the error says so, and leaves the key free."""
    with pytest.raises(ConfigurationError, match="returned int, not an awaitable; use async def"):
        await Idempotency(store).run("k", lambda: 5)  # type: ignore[arg-type, return-value]
    assert await store.get("k") is None


async def test_a_client_and_an_address_do_not_mix() -> None:
    """A store gets a client, or what to make one from, never both."""
    async with redis.asyncio.Redis() as client:
        for make in (
            lambda: RedisStore.from_url("redis://localhost", client=client),
            lambda: RedisStore.connect("localhost", client=client),
        ):
            with pytest.raises(ConfigurationError, match=r"pass it to RedisStore\(client\)"):
                make()
        for option in ("url", "host", "cluster"):
            with pytest.raises(ConfigurationError, match=f"unknown option '{option}'; connection options go with"):
                RedisStore(client, **{option: "x"})
        with pytest.raises(ConfigurationError, match="url must be text such as"):
            RedisStore.from_url(client)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"use RedisStore\.from_url"):
        RedisStore("redis://localhost")  # type: ignore[arg-type]


def test_key_for_refuses_what_it_did_not_decorate(store: SpyStore) -> None:
    """Only the object that decorated a function knows its keys."""
    idem, other = Idempotency(store), Idempotency(store)
    for fn in (pay, other.idempotent(pay)):
        with pytest.raises(ConfigurationError, match="was not decorated by this Idempotency"):
            idem.key_for(fn, "o")
