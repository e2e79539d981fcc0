"""The crowd that goes on while something breaks must see what breaks."""

from collections.abc import Callable

import pytest

from asyncidem import MemoryStore

from crowd import Crowd
from loops import run_virtual


def crowded(harm: Callable[[MemoryStore, Crowd], object]) -> None:
    """Let a crowd on a store in memory be harmed in the middle, and check it."""

    async def main() -> None:
        store = MemoryStore()
        async with Crowd([store, store]) as crowd:
            harm(store, crowd)
            await crowd.go_on(32)
        await crowd.check()

    run_virtual(main())


def test_nothing_breaks() -> None:
    """A crowd that nobody harms has nothing to say."""
    crowded(lambda *_: None)


def test_lost_results() -> None:
    """Results that are gone are missed."""
    with pytest.raises(AssertionError, match="a completed operation ran again"):
        crowded(lambda store, _: store._values.clear())


def test_other_results() -> None:
    """A result that is another one later is noticed."""

    def harm(store: MemoryStore, _: Crowd) -> None:
        store._values = {key: (value.replace(b" 1", b" 7"), end) for key, (value, end) in store._values.items()}

    with pytest.raises(AssertionError, match=r"later \["):
        crowded(harm)


def test_second_effect() -> None:
    """A second effect is noticed, though its caller got the first one's result."""

    def harm(_: MemoryStore, crowd: Crowd) -> None:
        crowd.calls[0].effects += 1

    with pytest.raises(AssertionError, match="2 effects"):
        crowded(harm)


def test_error() -> None:
    """An error ends the wait for the others at once."""

    def harm(_: MemoryStore, crowd: Crowd) -> None:
        crowd.calls[0].errors.append("broken")

    with pytest.raises(AssertionError, match="broken"):
        crowded(harm)
