"""A crowd of callers on shared keys, which goes on while something breaks; and what must hold of all that it did."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Self

from asyncidem import Event, Idempotency, LeaseLostError, Store

from servers import Server

LEASE: Final = 3.0
LONG: Final = LEASE / 3 + 0.4
"""Seconds that a handler takes whose lease must be renewed."""


class Declined(Exception):  # noqa: N818 - what a provider says
    """A handler's own failure, which releases the key."""


class Call:
    """One key: the two callers that wanted it at once, and the one that came after them."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.began = time.monotonic()
        self.ended: float | None = None
        self.effects = 0
        self.declined = False
        self.results: list[object] = []
        self.errors: list[str] = []
        self.losses: list[str] = []


class Crowd:
    """Tasks that claim, wait, renew, decline, complete and replay, each key over two of the stores.

    An error that is not the handler's own, a second effect of a key and a result that differs are breaches.

    Args:
        stores: the stores, over the same data.
        tasks: how many keys are under way at a time.
        tags: hash tags of the keys, for a cluster.
        wait: seconds that a duplicate waits.
    """

    def __init__(
        self, stores: Sequence[Store], *, tasks: int = 16, tags: Sequence[str] = ("",), wait: float = 20
    ) -> None:
        self.events: Counter[str] = Counter()
        self.calls: list[Call] = []
        self.tags = tags
        self._tasks = tasks
        self._workers: list[asyncio.Task[None]] = []
        self._stopping = False
        self._moved_on = asyncio.Event()
        self._idems = [Idempotency(store, lease=LEASE, wait=wait, hooks=(self._hear,)) for store in stores]

    def _hear(self, event: Event) -> None:
        self.events[event.name] += 1

    @property
    def _errors(self) -> list[str]:
        return [error for call in self.calls for error in call.errors]

    async def go_on(self, count: int) -> None:
        """Wait until so many more keys that begin from now on are through; fail at once with the first error."""
        began = len(self.calls)
        while sum(call.ended is not None for call in self.calls[began:]) < count:
            assert not self._errors, "\n".join(self._errors)
            self._moved_on.clear()
            await self._moved_on.wait()

    async def __aenter__(self) -> Self:
        """Begin, and return when everybody has been through once."""
        loop = asyncio.get_running_loop()
        self._workers = [loop.create_task(self._work(number)) for number in range(self._tasks)]
        await self.go_on(2 * self._tasks)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Let everybody end what is under way."""
        self._stopping = True
        if kind is not None:
            for worker in self._workers:
                worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    async def _work(self, number: int) -> None:
        turn = 0
        while not self._stopping:
            tag = self.tags[(number + turn) % len(self.tags)]
            call = Call(f"{{{tag}}}{number}-{turn}" if tag else f"{number}-{turn}")
            self.calls.append(call)
            idems = [self._idems[number % len(self._idems)], self._idems[(number + turn) % len(self._idems)]]
            effect = self._effect(call, slow=turn % 8 == number % 8, declines=turn % 8 == (number + 4) % 8)
            await asyncio.gather(*(self._call(call, idem, effect) for idem in idems))
            await self._call(call, idems[1], effect)
            call.ended = time.monotonic()
            self._moved_on.set()
            turn += 1

    async def _call(self, call: Call, idem: Idempotency, effect: Callable[[], Any]) -> None:
        try:
            call.results.append(await idem.run(call.key, effect))
        except Declined:
            pass
        except LeaseLostError as error:  # as it must be where the server has forgotten the claim
            call.losses.append(f"{call.key}: {error}")
        except Exception as error:
            path = type(getattr(idem.store, "_link", None)).__name__
            self._moved_on.set()
            call.errors.append(f"{call.key} over {path}: {type(error).__name__}: {error}, from {error.__cause__!r}")

    def _effect(self, call: Call, *, slow: bool, declines: bool) -> Callable[[], Any]:
        async def effect() -> str:
            await asyncio.sleep(LONG if slow else 0.01)
            if declines and not call.declined:
                call.declined = True
                raise Declined
            call.effects += 1
            return f"{call.key} {call.effects}"

        return effect

    async def copied(self, master: Server, replica: Server) -> set[Call]:
        """Wait until a replica has all that its master had; return the calls that were over then: it has them whole.

        Of all others, whatever had not reached it is forgotten when the master dies.
        """
        over, written = {call for call in self.calls if call.ended is not None}, master.offset()
        while replica.offset(replica=True) < written:
            await asyncio.sleep(0.01)
        return over

    async def check(self, *, lost: Callable[[Call], bool] = lambda _: False) -> None:
        """Replay every key, and fail with all breaches; ``lost`` says which calls the server may have forgotten."""
        errors = self._errors
        kept = [call for call in self.calls if not (lost(call) or call.errors)]
        for call in kept:
            if call.effects != 1 or set(call.results) != {f"{call.key} 1"}:
                errors.append(f"{call.key}: {call.effects} effects, {call.results}")
        for start in range(0, len(kept), 64):
            await asyncio.gather(*(self._call(call, self._idems[0], _nobody) for call in kept[start : start + 64]))
        errors += [f"{call.key}: later {call.results}" for call in kept if call.results[-1:] != call.results[:1]]
        errors += [error for call in kept for error in (*call.errors, *call.losses)]
        assert not errors, f"{len(errors)} breaches in {len(self.calls)} keys:\n" + "\n".join(errors[:20])
        assert self.events.keys() >= {"renewed", "waited", "released"}, f"not all was tried: {self.events}"


async def _nobody() -> None:
    raise AssertionError("a completed operation ran again")
