"""Keys and payloads of decorated functions, operations and runs: which calls are one."""

import enum
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from asyncidem import FingerprintMismatchError, Idempotency, InvalidKeyError, MemoryStore, MissingKeyError, State
from asyncidem.keys import fingerprint


async def ordinary(order_id: Any, amount: Any = 1) -> str:
    """Take parameters of every ordinary kind."""
    return "ordinary"


async def defaulted(amount: Any = 1, order_id: Any = "o1") -> str:
    """Have a default for its key."""
    return "defaulted"


async def keyword_only(*, order_id: Any = "o1", amount: Any = 1) -> str:
    """Take its key by keyword only."""
    return "keyword_only"


async def positional_only(amount: Any, order_id: Any = "o1", /, **kwargs: Any) -> str:
    """Take its key by position only."""
    return "positional_only"


async def variadic(*order_id: Any, **options: Any) -> str:
    """Take any number of arguments."""
    return "variadic"


@pytest.fixture
def store() -> MemoryStore:
    """Return an empty store."""
    return MemoryStore()


@pytest.fixture
def idem(store: MemoryStore) -> Idempotency:
    """Return an object without a namespace."""
    return Idempotency(store)


CALLS: list[tuple[Callable[..., Any], str, tuple[Any, ...], dict[str, Any], str]] = [
    (ordinary, "order_id", ("o1",), {}, "o1"),
    (ordinary, "order_id", ("o1", 5), {}, "o1"),
    (ordinary, "order_id", (), {"order_id": "o1"}, "o1"),
    (ordinary, "order_id", (), {"amount": 5, "order_id": "o1"}, "o1"),
    (ordinary, "amount", ("o1",), {}, "1"),
    (ordinary, "amount", ("o1",), {"amount": 7}, "7"),
    (defaulted, "order_id", (), {}, "o1"),
    (defaulted, "order_id", (5, "o2"), {}, "o2"),
    (defaulted, "order_id", (5,), {"order_id": "o2"}, "o2"),
    (keyword_only, "order_id", (), {"order_id": "o2"}, "o2"),
    (keyword_only, "order_id", (), {"amount": 2}, "o1"),
    (positional_only, "order_id", (5, "o2"), {}, "o2"),
    (positional_only, "order_id", (5, "o2"), {"order_id": "not this"}, "o2"),
    (positional_only, "order_id", (5,), {"other": "not this"}, "o1"),
    (variadic, "order_id", ("a", 1), {}, '["a",1]'),
    (variadic, "options", (), {"b": 2, "a": "x"}, '{"a":"x","b":2}'),
    (variadic, "options", (), {"options": 1}, '{"options":1}'),
]


@pytest.mark.parametrize(("fn", "key", "args", "kwargs", "text"), CALLS)
async def test_one_parameter_is_the_key_however_it_is_passed(
    store: MemoryStore, fn: Callable[..., Any], key: str, args: tuple[Any, ...], kwargs: dict[str, Any], text: str
) -> None:
    """The named parameter's value is the key: by position, keyword or default, and all of `*args` and `**kwargs`."""
    idem = Idempotency(store)
    protected = idem.idempotent(key=key, name="f")(fn)
    assert idem.key_for(protected, *args, **kwargs) == f"f:{text}"
    assert await protected(*args, **kwargs) == fn.__name__
    record = await store.get(f"f:{text}")
    assert record is not None
    assert record.state is State.COMPLETED


@pytest.mark.parametrize("kind", [list, tuple])
def test_several_parameters_are_one_key(idem: Idempotency, kind: Callable[[Any], Any]) -> None:
    """A list or tuple of names joins their values in its order, without ambiguity."""
    one = idem.idempotent(key=kind(["order_id", "amount"]), name="one")(ordinary)
    other = idem.idempotent(key=kind(["amount", "order_id"]), name="two")(ordinary)
    single = idem.idempotent(key=kind(["order_id"]), name="three")(ordinary)
    assert idem.key_for(one, "o1", 5) == 'one:["o1",5]'
    assert idem.key_for(other, "o1", amount=5) == 'two:[5,"o1"]'
    assert idem.key_for(one, "o1") == 'one:["o1",1]'
    assert idem.key_for(single, "o1") == 'three:["o1"]'
    assert idem.key_for(one, 'o"', '1",') != idem.key_for(one, 'o","1', '"')


@pytest.mark.parametrize("missing", [None, "", [], {}, ()])
async def test_a_missing_part_is_a_missing_key(store: MemoryStore, missing: Any) -> None:
    """One part without a value makes the key of several say nothing: it is refused, and nothing runs."""
    idem = Idempotency(store)

    async def never(order_id: Any, amount: Any) -> None:
        raise AssertionError("must not run")

    protected = idem.idempotent(key=["order_id", "amount"])(never)
    for args in (("o1", missing), (missing, 5)):
        with pytest.raises(MissingKeyError, match="never give no key"):
            await protected(*args)
        with pytest.raises(MissingKeyError, match="never give no key"):
            idem.key_for(protected, *args)


class Empty(enum.Enum):
    NOTHING = ""
    SOMETHING = "s"


@pytest.mark.parametrize("missing", [None, "", [], {}, (), set(), b"", Empty.NOTHING])
@pytest.mark.parametrize("key", ["order_id", lambda order_id, *_: order_id])
async def test_none_and_empty_values_are_missing(idem: Idempotency, key: Any, missing: Any) -> None:
    """None, empty text and empty containers are no keys, whether chosen by name or by a function."""
    protected = idem.idempotent(key=key)(ordinary)
    with pytest.raises(MissingKeyError, match="ordinary give no key: it is None or empty"):
        await protected(missing)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (False, "false"), (0.0, "0.0"), (Empty.SOMETHING, "s")])
def test_zero_and_false_are_keys(idem: Idempotency, value: Any, text: str) -> None:
    """What is false, but not empty, is a key."""
    protected = idem.idempotent(key="order_id", name="f")(ordinary)
    assert idem.key_for(protected, value) == f"f:{text}"


async def test_a_number_and_its_text_are_one_key(idem: Idempotency) -> None:
    """A key that arrived as text in one place and as a number in the other is the same key."""
    calls: list[Any] = []

    @idem.idempotent(key="order_id")
    async def charge(order_id: int | str) -> int:
        calls.append(order_id)
        return len(calls)

    assert [await charge(1), await charge("1"), await charge(order_id="1")] == [1, 1, 1]
    assert calls == [1]


def test_a_callable_gets_the_same_arguments(idem: Idempotency) -> None:
    """A key may be computed from the call, which it gets exactly as it was made."""
    seen: list[Any] = []

    def choose(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return {"id": args[0].lower()}

    protected = idem.idempotent(key=choose, name="f")(ordinary)
    assert idem.key_for(protected, "ABC", amount=5) == 'f:{"id":"abc"}'
    assert seen == [(("ABC",), {"amount": 5})]


async def test_a_key_without_canonical_text_is_refused(idem: Idempotency) -> None:
    """An object, NaN or a lone surrogate is no key: the call is refused."""
    protected = idem.idempotent(key="order_id")(ordinary)
    bare = idem.idempotent(name="bare")(ordinary)
    for value in (object(), float("nan"), "\ud800"):
        with pytest.raises(InvalidKeyError):
            await protected(value)
        with pytest.raises(InvalidKeyError):
            await bare(value)


async def test_a_call_that_cannot_be_made_raises_its_own_error(store: MemoryStore) -> None:
    """Without the argument that is the key, the call is the TypeError that it would be undecorated."""
    protected = Idempotency(store).idempotent(key="order_id")(ordinary)
    with pytest.raises(TypeError, match="order_id"):
        await protected()  # type: ignore[call-arg]


def test_without_a_key_all_arguments_are_it(idem: Idempotency) -> None:
    """The digest of the bound arguments does not depend on how they were passed; other values are other keys."""
    protected = idem.idempotent(name="f")(ordinary)
    key = idem.key_for(protected, "o1", 1)
    assert key == "f:" + hashlib.sha256(b'{"amount":1,"order_id":"o1"}').hexdigest()[:32]
    assert key == idem.key_for(protected, "o1")
    assert key == idem.key_for(protected, amount=1, order_id="o1")
    assert key == idem.key_for(protected, order_id="o1", amount=1)
    others = [("o1", 2), ("o2", 1), (1, "o1"), ("o1", "1"), ("o1", None)]
    assert len({key, *(idem.key_for(protected, *args) for args in others)}) == 6


def test_without_a_key_keyword_arguments_have_no_order(idem: Idempotency) -> None:
    """`**options` are a mapping, `*order_id` a sequence."""
    protected = idem.idempotent(variadic)
    assert idem.key_for(protected, a=1, b=2) == idem.key_for(protected, b=2, a=1)
    assert idem.key_for(protected, 1, 2) != idem.key_for(protected, 2, 1)


def test_a_key_holds_module_and_qualified_name_unless_a_name_fixes_it(store: MemoryStore) -> None:
    """Functions do not share keys by accident; with name= renaming and moving change nothing."""
    idem = Idempotency(store)
    by_name = idem.idempotent(key="order_id")(ordinary)
    assert idem.key_for(by_name, "o1") == f"{__name__}.ordinary:o1"
    old, other = Idempotency(store), Idempotency(store)
    before = old.key_for(old.idempotent(key="order_id", name="charge")(ordinary), "o1")
    after = other.key_for(other.idempotent(key="order_id", name="charge")(defaulted), order_id="o1")
    assert before == after == "charge:o1"


def test_a_namespace_comes_first(store: MemoryStore) -> None:
    """Services that share a store have keys of their own, by every form."""
    idem = Idempotency(store, namespace="payments")
    protected = idem.idempotent(key="order_id", name="charge")(ordinary)
    assert idem.namespace == "payments"
    assert idem.key_for(protected, "o1") == "payments:charge:o1"
    assert idem.operation("o1").key == "payments:o1"


scopes = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(":%"), max_size=6)
texts = scopes.filter(bool)


@example(("a", "b:c", "d"), ("a", "b", "c:d"))
@example(("a:b", "c", "d"), ("a", "b:c", "d"))
@example(("a%", "3Ab", "d"), ("a%3Ab", "c", "d"))
@given(st.tuples(scopes, texts, texts), st.tuples(scopes, texts, texts))
def test_parts_of_a_key_are_joined_without_ambiguity(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    """Other namespace, name or value, other key: nothing that they contain makes two the same.

    Without a namespace keys stand in the store as they are, and may be anything: only its absence on both sides is fair.
    """
    assume(bool(one[0]) is bool(other[0]))

    def key(parts: tuple[str, str, str]) -> str:
        idem = Idempotency(MemoryStore(), namespace=parts[0])
        return idem.key_for(idem.idempotent(key="order_id", name=parts[1])(ordinary), parts[2])

    assert (key(one) == key(other)) is (one == other)


@example(("a:b", "c"), ("a", "b:c"))
@example(("a%3Ab", "c"), ("a:b", "c"))
@given(st.tuples(texts, texts), st.tuples(texts, texts))
def test_namespaces_of_operations_are_joined_without_ambiguity(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Two namespaces never share the key of an operation."""
    keys = [Idempotency(MemoryStore(), namespace=scope).operation(key).key for scope, key in (one, other)]
    assert (keys[0] == keys[1]) is (one == other)


@given(texts)
def test_without_a_namespace_an_operation_has_the_key_that_it_was_given(key: str) -> None:
    """Byte for byte, so that records can be shared with others."""
    assert Idempotency(MemoryStore()).operation(key).key == key


async def test_the_store_keeps_keys_byte_for_byte() -> None:
    """With neither prefix nor namespace the key in the store is the key that was given."""
    written: list[str] = []

    class Noting(MemoryStore):
        async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Any:
            written.append(key)
            return await super().put_or_read(key, value, ttl_ms)

    idem = Idempotency(Noting(prefix=""))
    for key in ("order:42", "a%3Ab ", "ключ", "x\n"):
        await idem.run(key, ordinary, "o")
    assert written == ["order:42", "a%3Ab ", "ключ", "x\n"]


async def test_operation_and_run_share_one_key_space(idem: Idempotency) -> None:
    """What the call form stored, the context manager replays, whatever their names are."""
    assert await idem.run("order:42", ordinary, "o1", name="one") == "ordinary"
    async with idem.operation("order:42", name="another") as op:
        assert op.replayed
        assert op.result == "ordinary"
    record = await idem.store.get("order:42")
    assert record is not None
    assert record.key == op.key == "order:42"


async def test_key_for_is_the_key_of_the_record(store: MemoryStore) -> None:
    """What `key_for` says, `store.get` finds, `store.delete` deletes and the call runs anew."""
    idem = Idempotency(store, namespace="a:b%")
    calls: list[str] = []

    @idem.idempotent(key=["order_id", "amount"])
    async def charge(order_id: str, amount: int) -> int:
        calls.append(order_id)
        return amount

    await charge("o:1", 5)
    key = idem.key_for(charge, "o:1", amount=5)
    record = await store.get(key)
    assert record is not None
    assert (record.key, record.data) == (key, "5")
    assert await store.delete(key)
    await charge("o:1", 5)
    assert calls == ["o:1", "o:1"]


class Account:
    """Has protected methods of each kind."""

    idem = Idempotency(MemoryStore())

    @idem.idempotent(key="order_id")
    async def pay(self, order_id: str, _amount: int = 1) -> str:
        return order_id

    @classmethod
    @idem.idempotent(key="order_id")
    async def of_class(cls, order_id: str, _amount: int = 1) -> str:
        return order_id

    @staticmethod
    @idem.idempotent(key="order_id")
    async def static(order_id: str, _amount: int = 1) -> str:
        return order_id


async def test_methods_with_a_key_work() -> None:
    """With key= a method is protected as a function is; its instance is no part of the key."""
    account = Account()
    assert await account.pay("o1", 5) == "o1"
    assert await Account().pay(order_id="o1") == "o1"
    assert await Account.of_class("o2", 5) == "o2"
    assert await Account.static("o3", 5) == "o3"
    record = await Account.idem.store.get(Account.idem.key_for(Account.pay, account, "o1"))
    assert record is not None
    assert record.data == '"o1"'


@pytest.mark.parametrize("method", ["pay", "of_class", "static"])
async def test_key_for_a_bound_method_is_the_key_of_its_call(method: str) -> None:
    """Asked about a bound method, `key_for` takes the arguments that the call takes: its instance is bound already."""
    bound = getattr(Account(), method)
    assert await bound(f"bound-{method}", 5) == f"bound-{method}"
    record = await Account.idem.store.get(Account.idem.key_for(bound, f"bound-{method}", 5))
    assert record is not None
    assert record.data == f'"bound-{method}"'


PAYLOADS: list[tuple[Any, Any]] = [
    ("amount", 5),
    (["order_id", "amount"], ["o1", 5]),
    (("amount",), [5]),
    (lambda _order_id, amount: {"sum": amount}, {"sum": 5}),
]


@pytest.mark.parametrize(("payload", "value"), PAYLOADS)
@pytest.mark.parametrize("secret", [None, "pepper", b"pepper"])
async def test_payloads_are_fingerprinted(store: MemoryStore, payload: Any, value: Any, secret: Any) -> None:
    """What the decorator chooses is fingerprinted, with the secret if there is one; another payload is refused."""
    idem = Idempotency(store, fingerprint_secret=secret)
    protected = idem.idempotent(key="order_id", payload=payload)(ordinary)
    await protected("o1", 5)
    record = await store.get(idem.key_for(protected, "o1", 5))
    assert record is not None
    assert record.fingerprint == fingerprint(value, None if secret is None else b"pepper")
    assert await protected("o1", amount=5) == "ordinary"
    with pytest.raises(FingerprintMismatchError, match="another payload"):
        await protected("o1", 6)


async def test_payloads_of_operation_and_run_are_values(store: MemoryStore) -> None:
    """The two forms fingerprint a value, alike; None is none, and compared with nothing."""
    idem = Idempotency(store, fingerprint_secret="pepper")
    assert await idem.run("k", ordinary, "o", payload={"sum": 5}) == "ordinary"
    record = await store.get("k")
    assert record is not None
    assert record.fingerprint == fingerprint({"sum": 5}, b"pepper")
    for same in ({"sum": 5}, None):
        async with idem.operation("k", payload=same) as op:
            assert op.result == "ordinary"
    for other in ({"sum": 6}, 0, "", []):
        with pytest.raises(FingerprintMismatchError):
            await idem.run("k", ordinary, "o", payload=other)
        with pytest.raises(FingerprintMismatchError):
            async with idem.operation("k", payload=other):
                raise AssertionError("must not run")


async def test_without_a_payload_there_is_no_fingerprint(store: MemoryStore) -> None:
    """A record of a call without payload has none, and a later payload is not compared with it."""
    idem = Idempotency(store)
    await idem.run("k", ordinary, "o")
    record = await store.get("k")
    assert record is not None
    assert record.fingerprint is None
    assert await idem.run("k", ordinary, "o", payload=5) == "ordinary"


async def test_a_payload_without_canonical_text_is_refused(store: MemoryStore) -> None:
    """A payload that cannot be fingerprinted is refused before anything runs."""
    idem = Idempotency(store)
    protected = idem.idempotent(key="order_id", payload="amount")(ordinary)
    with pytest.raises(InvalidKeyError):
        await protected("o1", object())
    with pytest.raises(InvalidKeyError):
        await idem.run("k", ordinary, "o", payload=object())
    with pytest.raises(InvalidKeyError):
        idem.operation("k", payload=object())
    assert await store.get("k") is None
    assert await store.get(idem.key_for(protected, "o1")) is None
