"""The object that users configure: three forms of one call, immutable, and true to the functions that it wraps."""

import asyncio
import copy
import functools
import inspect
import linecache
import typing
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from asyncidem import Event, Idempotency, MemoryStore, Operation, current_operation


@pytest.fixture
def store() -> MemoryStore:
    """Return an empty store."""
    return MemoryStore()


@pytest.fixture
def idem(store: MemoryStore) -> Idempotency:
    """Return an object over it."""
    return Idempotency(store)


class Handler:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, *args: Any) -> list[Any]:
        self.calls += 1
        return [self.calls, *args]

    async def method(self, *args: Any) -> list[Any]:
        """Do what the object does."""
        return await self(*args)

    def plain_method(self, *args: Any) -> Awaitable[list[Any]]:
        """Return an awaitable, as many clients' methods do."""
        return self(*args)


class TestForms:
    """Decorator, call form and context manager."""

    async def test_a_decorated_function_runs_once_for_a_key(self, idem: Idempotency) -> None:
        """The second call gets the first one's result."""
        calls: list[str] = []

        @idem.idempotent(key="order_id")
        async def charge(order_id: str, amount: int = 1) -> dict[str, Any]:
            calls.append(order_id)
            return {"order": order_id, "amount": amount}

        assert await charge("o1", 5) == {"order": "o1", "amount": 5}
        assert await charge("o1", amount=6) == {"order": "o1", "amount": 5}
        assert await charge("o2") == {"order": "o2", "amount": 1}
        assert calls == ["o1", "o2"]

    async def test_the_bare_decorator_takes_all_arguments_for_the_key(self, idem: Idempotency) -> None:
        """Without parentheses the same arguments are the same call."""
        calls: list[Any] = []

        @idem.idempotent
        async def charge(order_id: str, amount: int = 1) -> int:
            calls.append((order_id, amount))
            return len(calls)

        assert [await charge("o1"), await charge("o1", 1), await charge("o1", 2), await charge("o1")] == [1, 1, 2, 1]

    async def test_empty_parentheses_are_the_bare_decorator(self, idem: Idempotency) -> None:
        """`@idem.idempotent()` does what `@idem.idempotent` does."""
        handler = Handler()

        async def charge(order_id: str) -> list[Any]:
            return await handler(order_id)

        protected = idem.idempotent()(charge)
        assert [await protected("o1"), await protected("o1")] == [[1, "o1"], [1, "o1"]]

    async def test_arguments_arrive_as_they_were_passed(self, idem: Idempotency) -> None:
        """Positional arguments stay positional, keywords keywords, and objects are handed on, not copied."""
        seen: list[Any] = []
        thing: list[int] = [1]

        @idem.idempotent(key="order_id")
        async def charge(order_id: str, *args: Any, **kwargs: Any) -> None:
            seen.extend((order_id, args, kwargs))

        await charge("o1", thing, other=thing)
        assert seen == ["o1", ([1],), {"other": [1]}]
        assert seen[1][0] is thing
        assert seen[2]["other"] is thing

    @pytest.mark.parametrize(
        "make",
        [
            lambda handler: handler,
            lambda handler: handler.method,
            lambda handler: handler.plain_method,
            lambda handler: functools.partial(handler.method),
            lambda handler: lambda *args: handler.method(*args[:1], 2),
            lambda handler: lambda *args: asyncio.ensure_future(handler(*args)),
        ],
        ids=["object", "method", "plain method", "partial", "lambda", "future"],
    )
    async def test_run_calls_whatever_returns_an_awaitable(
        self, idem: Idempotency, make: Callable[[Handler], Callable[..., Awaitable[list[Any]]]]
    ) -> None:
        """Objects, methods, partials and lambdas are called once, with their arguments."""
        handler = Handler()
        results = [await idem.run("k", make(handler), "a", 2) for _ in range(2)]
        assert results == [[1, "a", 2], [1, "a", 2]]
        assert handler.calls == 1

    async def test_run_takes_no_keyword_for_its_own_parameters(self, idem: Idempotency) -> None:
        """Key and function are positional, so that their names are free."""
        with pytest.raises(TypeError):
            await idem.run(key="k", fn=Handler())  # type: ignore[call-arg]

    async def test_a_block_runs_once_and_replays(self, idem: Idempotency) -> None:
        """The context manager gives the operation, which replays what the first block set."""
        async with idem.operation("k") as op:
            assert isinstance(op, Operation)
            assert not op.replayed
            assert op.set_result({"paid": True}) == {"paid": True}
        async with idem.operation("k") as op:
            assert op.replayed
            assert op.result == {"paid": True}

    async def test_the_operation_is_known_further_down(self, idem: Idempotency) -> None:
        """In a decorated function `current_operation()` is its operation; outside there is none."""

        @idem.idempotent(key="order_id", name="charge")
        async def charge(order_id: str) -> list[Any]:
            op = current_operation()
            assert op is not None
            return [op.key, op.name, op.attempt, op.replayed, op.downstream_key]

        key = idem.key_for(charge, "o1")
        assert await charge("o1") == [key, "charge", 1, False, idem.operation(key).downstream_key]
        assert current_operation() is None


class TestNames:
    """What labels an operation, in events only."""

    async def test_events_carry_the_label(self, store: MemoryStore) -> None:
        """That is the decorated function's name, the called one's, or `name=`; a bare operation has none."""
        seen: list[Event] = []
        idem = Idempotency(store, hooks=[seen.append])

        @idem.idempotent
        async def charge() -> None: ...

        async def refund() -> None: ...

        await charge()
        await idem.idempotent(name="charge!")(refund)()
        await idem.run("a", refund)
        await idem.run("b", refund, name="money back")
        await idem.run("c", Handler())
        for name in (None, "block"):
            async with idem.operation(f"op:{name}", name=name):
                pass
        labels = [event.operation for event in seen if event.name == "claimed"]
        here = "TestNames.test_events_carry_the_label.<locals>"
        assert labels == [
            f"{__name__}.{here}.charge",
            "charge!",
            f"{here}.refund",
            "money back",
            None,
            None,
            "block",
        ]
        assert [event.name for event in seen] == ["claimed", "completed"] * 7


class TestImmutable:
    """Operations that run share the object, so nothing about it changes."""

    @pytest.mark.parametrize("name", ["lease", "_options", "namespace", "store", "new"])
    def test_attributes_cannot_be_set_or_deleted(self, idem: Idempotency, name: str) -> None:
        """Setting says what to do instead; deleting says that it stays."""
        with pytest.raises(AttributeError, match=f"immutable; make another one, or override '{name}' where it is used"):
            setattr(idem, name, 5)
        with pytest.raises(AttributeError, match=f"immutable; '{name}' stays"):
            delattr(idem, name)

    def test_it_has_no_dict(self, idem: Idempotency) -> None:
        """There is no back door of the everyday kind."""
        assert not hasattr(idem, "__dict__")

    async def test_what_it_was_given_may_change_later(self, store: MemoryStore) -> None:
        """Lists are copied: adding to one afterwards changes nothing."""
        seen: list[Event] = []
        hooks: list[Any] = [seen.append]
        idem = Idempotency(store, hooks=hooks)
        hooks.append(5)
        await idem.run("k", Handler())
        assert [event.name for event in seen] == ["claimed", "completed"]

    def test_store_and_namespace_can_be_read(self, store: MemoryStore) -> None:
        """What users hand around can be asked for."""
        idem = Idempotency(store, namespace="payments")
        assert (idem.store, idem.namespace) == (store, "payments")

    def test_overrides_leave_the_object_as_it_is(self, idem: Idempotency) -> None:
        """An override is for its use only."""
        before = idem._options
        idem.operation("k", lease=1, on_cancel="release")
        idem.idempotent(lease=2)
        assert idem._options is before


class TestSignature:
    """A decorated function is what it was, to whoever looks at it."""

    def test_it_is_preserved(self, idem: Idempotency) -> None:
        """Name, documentation, module, annotations, signature and kind are those of the function."""

        async def charge(order_id: str, /, amount: int = 1, *rest: float, to: "str", **more: bytes) -> dict[str, str]:
            """Charge."""
            return {}

        vars(charge)["marker"] = 5
        for protected in (idem.idempotent(charge), idem.idempotent(key="order_id", name="x")(charge)):
            assert inspect.iscoroutinefunction(protected)
            assert inspect.isfunction(protected)
            assert inspect.signature(protected) == inspect.signature(charge)
            assert typing.get_type_hints(protected) == typing.get_type_hints(charge)
            assert inspect.unwrap(protected) is charge
            for name in ("__name__", "__qualname__", "__doc__", "__module__"):
                assert getattr(protected, name) == getattr(charge, name)
            assert vars(protected)["marker"] == 5

    def test_the_function_itself_stays_what_it_was(self, idem: Idempotency) -> None:
        """Decorating marks the wrapper, not the function."""

        async def charge(order_id: str) -> None: ...

        before = copy.copy(vars(charge))
        idem.idempotent(charge)
        assert vars(charge) == before

    async def test_a_decorated_function_can_be_decorated_again(self, store: MemoryStore) -> None:
        """By another object over another store, and each one knows its own key."""
        inner, outer = Idempotency(store), Idempotency(MemoryStore(), namespace="outer")
        handler = Handler()

        async def charge(order_id: str) -> list[Any]:
            return await handler(order_id)

        once = inner.idempotent(key="order_id", name="in")(charge)
        twice = outer.idempotent(key="order_id", name="out")(once)
        assert [await twice("o1"), await once("o1"), await twice("o1")] == [[1, "o1"]] * 3
        assert (inner.key_for(once, "o1"), outer.key_for(twice, "o1")) == ("in:o1", "outer:out:o1")

    async def test_wrappers_around_it_know_its_key(self, idem: Idempotency) -> None:
        """What wraps it properly, such as another library's decorator, does not hide it from `key_for`."""

        @idem.idempotent(key="order_id", name="charge")
        async def charge(order_id: str) -> str:
            return order_id

        @functools.wraps(charge)
        async def logged(order_id: str) -> str:
            return await charge(order_id)

        assert idem.key_for(logged, "o1") == "charge:o1"


class TestSameName:
    """Two functions under one name replay each other's results, which is a mistake."""

    @pytest.mark.parametrize("bare", [True, False])
    def test_closures_of_one_factory_are_warned_about(self, idem: Idempotency, bare: bool) -> None:
        """The second closure has the name of the first; the warning says so, where the user's code is."""

        def factory(tenant: str) -> Callable[[str], Any]:
            async def charge(order_id: str) -> str:
                return tenant + order_id

            if bare:
                return idem.idempotent(charge)
            return idem.idempotent(key="order_id")(charge)

        factory("a")
        with pytest.warns(
            UserWarning, match=r"second closure of one factory .*charge'.* give each its own name="
        ) as found:
            factory("b")
        (warning,) = found
        assert warning.filename == __file__
        assert "return idem.idempotent" in linecache.getline(warning.filename, warning.lineno)

    def test_two_functions_of_one_name_are_warned_about(self, idem: Idempotency) -> None:
        """So is another function under a name that is taken."""

        async def one() -> None: ...

        async def two() -> None: ...

        idem.idempotent(name="charge")(one)
        with pytest.warns(UserWarning, match="a second function is protected under the name 'charge'"):
            idem.idempotent(name="charge")(two)

    def test_one_function_twice_is_not(self, store: MemoryStore) -> None:
        """The same function may be protected again, also by another object; other names are no clash."""

        async def one() -> None: ...

        async def two() -> None: ...

        idem = Idempotency(store)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            idem.idempotent(one)
            idem.idempotent(lease=1)(one)
            idem.idempotent(name="other")(two)
            idem.idempotent(two)
            Idempotency(store).idempotent(name="other")(one)
        assert found == []
