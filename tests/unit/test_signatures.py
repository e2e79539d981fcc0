"""What is kept of the functions that are run: nothing that outlives them, nothing that is another's."""

import functools
import gc
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from asyncidem import ConfigurationError, Idempotency, JSONCodec, MemoryStore
from asyncidem.signatures import MAX_KNOWN, Functions


class CountingCodec(JSONCodec):
    """Counts how often it is asked about an annotation."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def check(self, annotation: Any) -> None:
        """Take note."""
        self.asked.append(annotation)
        super().check(annotation)


@pytest.fixture
def codec() -> CountingCodec:
    """Return a codec that counts."""
    return CountingCodec()


@pytest.fixture
def idem(codec: CountingCodec) -> Idempotency:
    """Return an object whose runs use it."""
    return Idempotency(MemoryStore(), codec=codec)


async def charge() -> int:
    """Return what it took."""
    return 1


async def test_a_function_is_looked_at_once(idem: Idempotency, codec: CountingCodec) -> None:
    """The second run of a function, with the same codec, asks nothing about it."""
    assert [await idem.run(key, charge) for key in "abc"] == [1, 1, 1]
    assert codec.asked == [int]


async def test_each_codec_is_asked(idem: Idempotency, codec: CountingCodec) -> None:
    """What one codec accepts another one may refuse."""
    other = CountingCodec()
    await idem.run("a", charge)
    await idem.run("b", charge, codec=other)
    await idem.run("c", charge)
    assert (codec.asked, other.asked) == ([int, int], [int])


async def test_what_is_refused_is_refused_every_time(idem: Idempotency) -> None:
    """Nothing is kept of a function that cannot be run."""

    async def pair() -> tuple[int, int]:
        return (1, 2)

    def plain() -> int:
        return 1

    for _ in range(3):
        with pytest.raises(ConfigurationError, match=r"JSON cannot give back tuple"):
            await idem.run("k", pair)
        with pytest.raises(ConfigurationError, match="not a coroutine function"):
            await idem.run("k", plain)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_a_closure_dies_with_its_caller(idem: Idempotency) -> None:
    """A function that was run is not kept alive, nor is what it closes over."""

    class Request:
        pass

    def closure() -> tuple[Callable[[], Coroutine[Any, Any, int]], weakref.ref[Request]]:
        request = Request()

        async def handle() -> int:
            return 1 if request else 0

        return handle, weakref.ref(request)

    functions = []
    for number in range(3):
        handle, request = closure()
        assert await idem.run(str(number), handle) == 1
        functions.append((weakref.ref(handle), request))
        del handle
    gc.collect()
    assert [(function(), request()) for function, request in functions] == 3 * [(None, None)]
    assert idem._functions._known == {}


async def test_a_function_in_the_place_of_another_is_looked_at_itself(codec: CountingCodec) -> None:
    """Functions that come and go have the same addresses, not the same annotations."""
    functions = Functions()
    places = set()
    for number in range(20):
        namespace: dict[str, Any] = {}
        exec(f"async def made() -> {('int', 'str')[number % 2]}: ...", namespace)  # noqa: S102 - a function of its own
        made = namespace.pop("made")
        assert functions.annotation(made, codec) is (int, str)[number % 2]
        places.add(id(made))
        del made, namespace
    assert len(places) < 20, "no place was used twice: this shows nothing"


async def test_what_is_kept_is_bounded(codec: CountingCodec) -> None:
    """Functions that are kept alive by their own annotations cannot fill the memory."""
    functions = Functions()
    kept = []
    for _ in range(MAX_KNOWN + 10):

        async def made() -> int:
            return 1

        kept.append(made)
        functions.annotation(made, codec)
    assert len(functions._known) <= MAX_KNOWN


async def test_what_is_no_plain_function_is_looked_at_each_time(idem: Idempotency, codec: CountingCodec) -> None:
    """Methods, partials and callable objects may be gone, changed or another one's equal at the next call."""

    class Provider:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return True

        async def pay(self) -> int:
            return 2

        async def __call__(self) -> int:
            return 3

    provider = Provider()
    for number in range(2):
        assert await idem.run(f"method {number}", provider.pay) == 2
        assert await idem.run(f"object {number}", provider) == 3
        assert await idem.run(f"partial {number}", functools.partial(charge)) == 1
    assert codec.asked == 6 * [int]
    assert idem._functions._known == {}


async def test_a_lambda_is_checked_by_what_it_returns(idem: Idempotency) -> None:
    """The first call and the later ones of a lambda refuse what is no awaitable."""
    given = lambda value: value
    assert await idem.run("a", given, charge()) == 1
    assert await idem.run("b", given, charge()) == 1
    with pytest.raises(ConfigurationError, match="returned int, not an awaitable"):
        await idem.run("c", given, 1)
