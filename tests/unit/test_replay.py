"""Exceptions as results: described as JSON, rebuilt as the same class, and nothing run that the store names."""

import copy
import enum
import errno
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncidem import Idempotency, IdempotencyError, MemoryStore, ReplayedError, StoreError
from asyncidem.replay import describe, rebuild

KEY = "order:42"


class DeclinedError(Exception):
    """Has an own signature and attributes, and counts how often it is made by its `__init__`."""

    made: ClassVar[int] = 0

    def __init__(self, code: int, *, reason: str, retry: bool = False) -> None:
        super().__init__(f"declined with {code}: {reason}")
        type(self).made += 1
        self.code = code
        self.details = {"reason": reason, "retry": retry}


class PickyError(ValueError):
    """Cannot be called with its own args."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__()
        self.sum = one + two


class Unmade(Exception):  # noqa: N818 - an example of a name
    """Runs code of its own where instances are made."""

    made: ClassVar[int] = 0

    def __new__(cls, *args: Any) -> "Unmade":
        cls.made += 1
        return super().__new__(cls, *args)


class SlottedError(Exception):
    """Has state that is neither in args nor in `__dict__`."""

    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class BareSlotsError(Exception):
    """Has no state of its own, with or without a `__dict__`."""

    __slots__ = ()


class ProviderError(OSError):
    """An OSError with a constructor of its own."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(number, text)
        self.provider = "p"


class MuteError(Exception):
    """Cannot even be turned into text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Quiet(ValueError, LookupError):  # noqa: N818 - an example of a name
    """Has two bases."""


class Level(enum.IntEnum):
    HIGH = 9


@dataclass
class DataError(Exception):
    """An exception that is a dataclass."""

    code: int
    text: str = "t"


EXACT: list[Exception] = [
    ValueError(),
    ValueError("no funds"),
    ValueError("a", 1, 0.5, None, True, ["x", {"y": 0}]),
    KeyError("k"),
    Quiet("q"),
    ZeroDivisionError("division by zero"),
    OSError("text only"),
    OSError(errno.EACCES, "Permission denied"),
    FileNotFoundError(errno.ENOENT, "No such file"),
    TimeoutError(),
    StopAsyncIteration("value"),
    UnicodeTranslateError("käse", 1, 2, "no such letter"),
    DeclinedError(51, reason="no funds"),
    PickyError(1, 2),
    BareSlotsError("x"),
    DataError(5),
    ValueError("lone \ud800 surrogate"),
    NotImplementedError("x" * 10_000),
]


def exact(one: Exception, other: Exception) -> bool:
    """Tell whether two exceptions are the same to whoever catches them."""
    numbers = [(error.errno, error.strerror, error.filename) for error in (one, other) if isinstance(error, OSError)]
    return (
        type(one) is type(other)
        and repr(one.args) == repr(other.args)
        and vars(one) == vars(other)
        and str(one) == str(other)
        and numbers[:1] == numbers[1:]
    )


@pytest.mark.parametrize("error", EXACT, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("base", [False, True])
def test_exceptions_come_back_as_what_they_were(error: Exception, base: bool) -> None:
    """Class, args, attributes, text and errno are those of the original, whether its class or a base was named."""
    back = rebuild(describe(error), (Exception if base else type(error),), KEY)
    assert back is not error
    assert exact(back, error)
    cause = back.__cause__
    assert isinstance(cause, ReplayedError)
    assert (cause.key, cause.type_name) == (KEY, f"{type(error).__module__}.{type(error).__qualname__}")
    assert str(error) in str(cause)


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "No such file", "/etc/x"), ProviderError(errno.ECONNREFUSED, "refused")],
    ids=["filename", "own constructor"],
)
def test_what_an_os_error_says_of_itself_comes_back(error: OSError) -> None:
    """Number, text and file name, which are not all in args, are exact; or it is a ReplayedError that says them."""
    back = rebuild(describe(error), (OSError,), KEY)
    assert exact(back, error) or (type(back) is ReplayedError and str(error) in str(back))


@given(st.lists(st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()), max_size=4))
def test_any_json_arguments_come_back(args: list[Any]) -> None:
    """Whatever JSON can hold is exact in args, with its type."""
    assert exact(rebuild(describe(ValueError(*args)), (ValueError,), KEY), ValueError(*args))


@pytest.mark.parametrize(
    "error",
    [
        ValueError(object()),
        ValueError((1, 2)),
        ValueError({1: 2}),
        ValueError(float("nan")),
        ValueError(b"x"),
        ValueError(Level.HIGH),
        ValueError(Exception("nested")),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        ExceptionGroup("several", [ValueError("one")]),
        SlottedError(5),
        SyntaxError("bad", ("file", 1, 2, "text")),
    ],
)
def test_what_json_cannot_hold_is_a_replayed_error(error: Exception) -> None:
    """An exception that would come back changed comes as a ReplayedError with its class and message."""
    back = rebuild(describe(error), (Exception,), KEY)
    assert type(back) is ReplayedError
    kind = type(error)
    assert (back.key, back.type_name) == (KEY, f"{kind.__module__}.{kind.__qualname__}")
    assert str(back) == f"the operation '{KEY}' ended with {back.type_name}: {error}"


def test_attributes_that_json_cannot_hold_are_not_dropped() -> None:
    """Half an exception would be another one."""
    error = DeclinedError(51, reason="no funds")
    error.details = {"at": object()}
    assert type(rebuild(describe(error), (DeclinedError,), KEY)) is ReplayedError


def test_notes_are_left_out() -> None:
    """What was noted for the one who saw the original is not part of the result."""
    error = ValueError("x")
    error.add_note("seen in worker 7")
    back = rebuild(describe(error), (ValueError,), KEY)
    assert (type(back), back.args, vars(back)) == (ValueError, ("x",), {})


def test_a_message_that_cannot_be_read_costs_nothing() -> None:
    """A `__str__` that raises does not keep the failure from being recorded."""
    error = rebuild(describe(MuteError("x")), (), KEY)
    assert str(error).endswith("MuteError: (its message cannot be read)")


def test_no_constructor_of_the_users_runs() -> None:
    """A replay makes the exception without its `__init__`, which may send mail."""
    error = DeclinedError(51, reason="no funds")
    before = DeclinedError.made
    assert exact(rebuild(describe(error), (DeclinedError,), KEY), error)
    assert DeclinedError.made == before


def test_no_new_of_the_users_runs() -> None:
    """Nor does a `__new__` of its own run."""
    error = Unmade("x")
    before = Unmade.made
    back = rebuild(describe(error), (Unmade,), KEY)
    assert Unmade.made == before
    assert exact(back, error) or type(back) is ReplayedError


@pytest.mark.parametrize("classes", [(), (KeyError,), (DeclinedError, OSError)])
def test_only_the_callers_classes_are_rebuilt(classes: tuple[type[Exception], ...]) -> None:
    """A class that the caller does not name, nor a base of it, is not looked for anywhere else."""
    back = rebuild(describe(ValueError("x")), classes, KEY)
    assert type(back) is ReplayedError
    assert back.type_name == "builtins.ValueError"


@pytest.mark.parametrize(
    "name", ["os.system", "subprocess.Popen", "builtins.SystemExit", "antigravity.X", "eval('1')", "", "builtins.dict"]
)
def test_a_stored_name_is_only_a_name(name: str) -> None:
    """No class is imported or made because the store says so."""
    before = set(sys.modules)
    text = json.dumps({"type": name, "message": "m", "args": ["echo"], "state": {}})
    back = rebuild(text, (Exception,), KEY)
    assert type(back) is ReplayedError
    assert back.type_name == name
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "no json",
        "{}",
        "[]",
        "5",
        '"text"',
        "null",
        '{"type": "builtins.ValueError"}',
        '{"message": "m"}',
        "[" * 100_000,
        '{"type": ' + "1" * 5000 + ', "message": ""}',
    ],
)
def test_a_description_that_cannot_be_read_is_still_a_failure(text: str | None) -> None:
    """The operation failed: whatever the store holds, its caller gets an error that says so."""
    back = rebuild(text, (Exception,), KEY)
    assert type(back) is ReplayedError
    assert str(back) == f"the operation '{KEY}' ended with an exception: its description cannot be read"


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"args": []},
        {"state": {}},
        {"args": None, "state": {}},
        {"args": {}, "state": {}},
        {"args": "text", "state": {}},
        {"args": [], "state": []},
        {"args": [], "state": None},
    ],
)
def test_a_description_with_parts_missing_is_not_rebuilt(more: dict[str, Any]) -> None:
    """Without arguments or attributes of the right kind it stays a ReplayedError."""
    text = json.dumps({"type": "builtins.ValueError", "message": "m"} | more)
    assert type(rebuild(text, (ValueError,), KEY)) is ReplayedError


@pytest.mark.parametrize("args", [[], ["a"], [1, 2, 3, 4], ["a", "b", "c", "d"]])
def test_arguments_that_a_class_no_longer_takes_are_not_fatal(args: list[Any]) -> None:
    """A class whose making fails is replayed as a ReplayedError."""
    text = json.dumps({"type": "builtins.UnicodeTranslateError", "message": "m", "args": args, "state": {}})
    assert type(rebuild(text, (UnicodeError,), KEY)) is ReplayedError


def test_attributes_from_the_store_change_no_machinery() -> None:
    """Attributes named like the interpreter's own become no class, no cause and no traceback."""
    state = {"__class__": "builtins.int", "__cause__": 1, "__traceback__": 2, "args": [9], "__dict__": {"x": 1}}
    text = json.dumps({"type": "builtins.ValueError", "message": "m", "args": ["a"], "state": state})
    back = rebuild(text, (ValueError,), KEY)
    assert (type(back), back.args, back.__traceback__) == (ValueError, ("a",), None)
    assert isinstance(back.__cause__, ReplayedError)


def test_values_that_are_no_text_in_a_description_become_text() -> None:
    """A name and a message are used as text only."""
    back = rebuild(json.dumps({"type": ["x"], "message": {"y": 1}}), (Exception,), KEY)
    assert type(back) is ReplayedError
    assert str(back).endswith("ended with ['x']: {'y': 1}")


def test_rebuilt_exceptions_are_new_each_time() -> None:
    """Two callers may raise theirs at once: tracebacks and notes are not shared."""
    text = describe(ValueError("x"))
    one, other = rebuild(text, (ValueError,), KEY), rebuild(text, (ValueError,), KEY)
    assert one is not other
    one.add_note("mine")
    assert vars(other) == {}
    assert exact(copy.copy(other), other)


def decorated(idem: Idempotency, fn: Callable[[], Any], **options: Any) -> Callable[[], Any]:
    """Return the decorated form."""
    return idem.idempotent(name="f", **options)(fn)


def called(idem: Idempotency, fn: Callable[[], Any], **options: Any) -> Callable[[], Any]:
    """Return the call form."""
    return lambda: idem.run("f", fn, **options)


def entered(idem: Idempotency, fn: Callable[[], Any], **options: Any) -> Callable[[], Any]:
    """Return the context manager's form."""

    async def use() -> Any:
        async with idem.operation("f", **options) as op:
            return op.result if op.replayed else op.set_result(await fn())

    return use


FORMS = [decorated, called, entered]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("error", [DeclinedError(51, reason="no funds"), FileNotFoundError(2, "gone")], ids=repr)
async def test_replay_exceptions_are_results(form: Callable[..., Any], error: Exception) -> None:
    """The exception is raised to its caller, stored, and raised again to duplicates without running anything."""
    calls: list[int] = []

    async def handler() -> None:
        calls.append(1)
        raise error

    idem = Idempotency(MemoryStore(), on_failure="keep")
    use = form(idem, handler, replay_exceptions=(type(error), KeyError))
    with pytest.raises(type(error)) as first:
        await use()
    assert first.value is error
    for _ in range(2):
        with pytest.raises(type(error)) as again:
            await use()
        assert again.value is not error
        assert exact(again.value, error)
        assert isinstance(again.value.__cause__, ReplayedError)
    assert calls == [1]


@pytest.mark.parametrize("form", FORMS)
async def test_an_exception_that_cannot_be_rebuilt_is_replayed_as_such(form: Callable[..., Any]) -> None:
    """The handler does not run again: the duplicate gets a ReplayedError with class and message."""
    calls: list[int] = []

    async def handler() -> None:
        calls.append(1)
        raise ValueError(object())

    use = form(Idempotency(MemoryStore()), handler, replay_exceptions=ValueError)
    with pytest.raises(ValueError, match="object"):
        await use()
    with pytest.raises(ReplayedError, match=r"builtins\.ValueError"):
        await use()
    assert calls == [1]


async def test_other_exceptions_are_not_results() -> None:
    """What is not named is a failure, after which the next call runs."""
    calls: list[int] = []

    async def handler() -> None:
        calls.append(1)
        raise TypeError("bug")

    idem = Idempotency(MemoryStore(), replay_exceptions=(ValueError, KeyError))
    for _ in range(2):
        with pytest.raises(TypeError, match="bug"):
            await idem.run("k", handler)
    assert calls == [1, 1]


async def test_a_replay_by_a_caller_with_other_classes_is_a_replayed_error() -> None:
    """A stored failure is a failure to every caller, whatever it names itself."""

    async def handler() -> None:
        raise DeclinedError(51, reason="no funds")

    store = MemoryStore()
    with pytest.raises(DeclinedError):
        await Idempotency(store, replay_exceptions=DeclinedError).run("k", handler)
    with pytest.raises(ReplayedError, match="no funds") as found:
        await Idempotency(store).run("k", handler)
    assert isinstance(found.value, IdempotencyError)
    assert not isinstance(found.value, StoreError)
