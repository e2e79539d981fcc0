"""A worker process: tasks that call protected operations on shared keys, and a log of what they did outside of Redis.

It gets its :class:`Settings` as JSON on its command line, works until SIGTERM, finishes what it has begun, and ends.
"""

import asyncio
import dataclasses
import faulthandler
import json
import logging
import os
import random
import signal
import sys
import time
import zlib
from collections import defaultdict
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import asyncidem
from asyncidem import (
    Claimed,
    Event,
    Idempotency,
    IdempotencyError,
    InProgress,
    InProgressError,
    LeaseLostError,
    RedisStore,
    Replay,
    StoreUnavailableError,
    current_operation,
)
from asyncidem.keys import fingerprint

EPOCH: Final = 0.5
"""Seconds after which new keys come, so that there is always something to run for the first time."""

KEYS: Final = 24
"""How many keys come with each epoch."""

TERMS: Final = ((0.4, 2.0), (0.8, 2.5), (0.4, 60.0), (0.8, 60.0))
"""Lease and ttl in seconds; a key's number says which. A ttl is longer than its lease."""

TIMEOUT: Final = 1.5
"""Seconds that a call of the store may take; a third of it without a byte drops a connection."""

SWEEP_SLACK: Final = 2.0
"""Seconds that a machine may be late in the last calls; a poller of a waiter sleeps a tenth of the time waited."""

PATIENCE: Final = 1.0
"""Seconds that calls may take to end when the worker is told to stop, before they are cancelled."""


class Declined(Exception):  # noqa: N818 - what a provider answers
    """Nothing was done: the key is free again."""


class TimedOut(Exception):  # noqa: N818 - likewise
    """Nobody knows what was done."""


@dataclass(frozen=True)
class Settings:
    """What a worker is told.

    Attributes:
        name: of the worker; the names of its calls begin with it.
        seed: of its choices.
        url: of the server, or of a node of the cluster.
        cluster: whether it is one.
        multiplex: which path of the store.
        ports: of the cluster's nodes, and the ports through which they are to be reached.
        naive: whether to use the store that is wrong, as a proof that this is found.
        log: the path of the file that events are appended to.
        origin: when the first epoch began.
        tasks: how many calls run at a time.
        sweep: instead of all that, call each of these orders once, when there are no faults any more.
    """

    name: str
    seed: str
    url: str
    cluster: bool
    multiplex: bool
    ports: dict[str, int]
    naive: bool
    log: str
    origin: float
    tasks: int = 24
    sweep: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """What is to become of one call."""

    call: str
    order: str
    by: str
    seconds: float = 0.0
    block: bool = False
    outcome: str = "ok"
    on_cancel: str = "keep"
    cancel_after: float | None = None
    wait: float | None = None
    renew: bool = True
    size: int = 0
    cancelled: bool = False
    claim: Claimed | None = None

    @property
    def amount(self) -> int:
        """The payload of an order, the same for all who call it."""
        return zlib.crc32(self.order.encode())

    @property
    def terms(self) -> tuple[float, float]:
        """Lease and ttl."""
        return TERMS[int(self.order.partition("-")[2]) % len(TERMS)]


current: ContextVar[Plan] = ContextVar("plan")


def brief(value: str) -> str:
    """Return a short text that stands for a result."""
    return value if len(value) < 100 else f"{value[:32]}..{len(value)}.{zlib.crc32(value.encode()):08x}"


def chosen_on_failure(error: Exception) -> str:
    """Say what a failure means for the key."""
    return "release" if isinstance(error, Declined) else "keep"


class Worker:
    """The tasks of a worker."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.random = random.Random(settings.seed)
        self.log_file = os.open(settings.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.store = self.make_store()
        # Without hooks only errors tell; with them the caller may get a value that is not stored.
        self.hooked = self.random.random() < 0.5
        self.idem = Idempotency(
            self.store,
            on_failure=chosen_on_failure,
            on_completion_error="return" if self.hooked else "raise",
            local_cache=self.random.choice((0, 50)),
            hooks=(self.hook,) if self.hooked else (),
        )
        self.charges = [self.decorate(number, *terms) for number, terms in enumerate(TERMS)]
        self.running: dict[str, set[Claimed]] = defaultdict(set)
        self.calls: dict[asyncio.Task[None], Plan] = {}
        self.count = 0
        self.stopping = asyncio.Event()

    def make_store(self) -> RedisStore:
        """Return the store, on the path and through the proxies that the settings say."""
        settings = self.settings
        options: dict[str, Any] = {"timeout": TIMEOUT, "multiplex": settings.multiplex, "cluster": settings.cluster}
        if settings.cluster and settings.ports:
            options["address_remap"] = lambda at: (at[0], settings.ports[str(at[1])])
        if settings.naive:
            from chaos.naive import NaiveStore

            return NaiveStore.from_url(settings.url, **options)
        return RedisStore.from_url(settings.url, **options)

    def decorate(self, number: int, lease: float, ttl: float) -> Any:
        """Return the decorated form of the handler, with options that are its own."""

        @self.idem.idempotent(
            key="order",
            payload="amount",
            name=f"charge-{number}",
            lease=lease,
            ttl=ttl,
            wait=self.random.choice((None, 1.0)),
        )
        async def charge(order: str, amount: int) -> str:
            return await self.handler(order, amount)

        return charge

    def key_of(self, plan: Plan) -> str:
        """Return the key that all ways of calling an order share."""
        number = TERMS.index(plan.terms)
        return self.idem.key_for(self.charges[number], plan.order, plan.amount)

    # -- the log ----------------------------------------------------------------------------------------------------

    def note(self, what: str, **more: Any) -> None:
        """Append an event; a killed process leaves all that it has noted."""
        event = {"t": time.monotonic(), "what": what, "worker": self.settings.name, **more}
        os.write(self.log_file, json.dumps(event).encode() + b"\n")

    def hook(self, event: Event) -> None:
        """Note what the store acknowledged."""
        if event.name == "renewed":  # told in nobody's context
            for claim in self.running[event.key]:
                self.note("lease", owner=claim.owner, until=claim._deadline)
        elif event.name in ("completed", "completion_failed"):
            claim = current.get().claim
            assert claim is not None
            self.note("stored" if event.name == "completed" else "unsure", owner=claim.owner)

    def unhandled(self, _: object, context: dict[str, Any]) -> None:
        """Note what nobody caught."""
        self.note("unhandled", text=f"{context.get('message')}: {context.get('exception')!r}")

    # -- effects ----------------------------------------------------------------------------------------------------

    async def handler(self, _order: str, _amount: int) -> str:
        """Do the effect of the running operation."""
        operation = current_operation()
        assert operation is not None
        assert operation._claim is not None
        try:
            return await self.effect(operation._claim)
        except asyncio.CancelledError:
            if operation._lost is not None:
                self.ended("lost")
            else:
                self.ended("released" if operation._options.on_cancel == "release" else "kept")
            raise

    async def effect(self, claim: Claimed) -> str:
        """Charge somebody, for as long as the plan says."""
        plan = current.get()
        plan.claim = claim
        lease, ttl = plan.terms
        # What is promised of its record, not what a store says that it does.
        terms = {"lease": lease, "ttl": ttl, "lives": max(lease, ttl, 1.0)}
        names = {"call": plan.call, "key": claim.key, "owner": claim.owner, "attempt": claim.attempt}
        self.note("begin", **names, until=claim._deadline, **terms)
        self.running[claim.key].add(claim)
        try:
            if plan.block:
                time.sleep(plan.seconds)
            await asyncio.sleep(0 if plan.block else plan.seconds)
            if plan.outcome == "declined":
                self.ended("released")
                raise Declined
            if plan.outcome == "timed out":
                self.ended("kept")
                raise TimedOut
            value = f"{claim.owner}".ljust(plan.size, "x")
            self.ended("done", value=brief(value))
            return value
        finally:
            self.running[claim.key].discard(claim)

    def ended(self, how: str, **more: Any) -> None:
        """Note how the effect of the running call ended."""
        claim = current.get().claim
        assert claim is not None
        self.note("end", owner=claim.owner, how=how, **more)

    # -- calls ------------------------------------------------------------------------------------------------------

    async def call(self, plan: Plan) -> None:
        """Call an order, and note what came out."""
        current.set(plan)
        key = self.key_of(plan)
        self.note("call", call=plan.call, key=key, order=plan.order, by=plan.by)
        lease, ttl = plan.terms
        options: dict[str, Any] = {"lease": lease, "ttl": ttl, "wait": plan.wait, "renew": plan.renew}
        options["on_cancel"] = plan.on_cancel
        raised: BaseException | None = None
        try:
            if plan.by == "decorator":
                value = await self.charges[TERMS.index(plan.terms)](plan.order, amount=plan.amount)
            elif plan.by == "operation":
                async with self.idem.operation(key, payload=plan.amount, **options) as operation:
                    value = (
                        operation.result
                        if operation.replayed
                        else operation.set_result(await self.handler(plan.order, plan.amount))
                    )
            elif plan.by == "store":
                value = await self.by_hand(plan, key)
            else:
                value = await self.idem.run(key, self.handler, plan.order, plan.amount, payload=plan.amount, **options)
        except BaseException as error:  # the worker itself is never cancelled
            raised = error
        if raised is None:
            owner = plan.claim.owner if plan.claim is not None else ""
            if owner == value[:32] and not self.hooked and plan.by != "store":
                self.note("stored", owner=owner)  # or it would have raised
            self.note("got", call=plan.call, key=key, value=brief(value))
            return
        family = (
            "asyncidem"
            if isinstance(raised, IdempotencyError)
            else "handler"
            if isinstance(raised, Declined | TimedOut)
            else "cancelled"
            if isinstance(raised, asyncio.CancelledError) and plan.cancelled
            else "foreign"
        )
        cause = f" from {raised.__cause__!r}" if raised.__cause__ is not None else ""
        text = f"{str(raised)[:300]}{cause[:300]}"
        names = [kind.__name__ for kind in type(raised).__mro__]
        # What a user can catch by name.
        error = next((name for name in names if name in asyncidem.__all__), names[0])
        self.note("raised", call=plan.call, key=key, error=error, family=family, text=text)

    async def by_hand(self, plan: Plan, key: str) -> str:
        """Do with the store what an operation does."""
        lease, ttl = plan.terms
        match await self.store.claim(key, lease=lease, ttl=ttl, fingerprint=fingerprint(plan.amount)):
            case Claimed() as claim:
                renewing = asyncio.create_task(self.keep(claim)) if plan.renew else None
                try:
                    value = await self.effect(claim)
                except Declined:
                    await self.store.release(claim)
                    raise
                except asyncio.CancelledError:
                    self.ended("released" if plan.on_cancel == "release" else "kept")
                    if plan.on_cancel == "release":
                        await self.store.release(claim)
                    raise
                finally:
                    if renewing is not None:
                        renewing.cancel()
                try:
                    await self.store.complete(claim, json.dumps(value), ttl=ttl)
                except StoreUnavailableError:
                    self.note("unsure", owner=claim.owner)
                    raise
                self.note("stored", owner=claim.owner)
                return value
            case Replay(record=record):
                assert record.data is not None
                value = json.loads(record.data)
                assert isinstance(value, str)
                return value
            case InProgress(retry_after=seconds):
                raise InProgressError(key, seconds)
            case other:
                message = f"not to be expected: {other}"
                raise AssertionError(message)

    async def keep(self, claim: Claimed) -> None:
        """Renew a claim until it is lost or this is cancelled."""
        while True:
            await asyncio.sleep(claim._lease_ms / 3000)
            try:
                await self.store.renew(claim)
            except LeaseLostError:
                return
            except StoreUnavailableError:
                continue
            self.note("lease", owner=claim.owner, until=claim._deadline)

    # -- tasks ------------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Return a call to make, as the seed wants it."""
        pick = self.random
        epoch = int((time.monotonic() - self.settings.origin) / EPOCH)
        # Mostly what is new, often what others may have left behind, sometimes anything.
        epoch -= pick.choices((0, pick.randrange(6), pick.randrange(epoch + 1)), (5, 4, 1))[0]
        order = f"{max(epoch, 0)}-{pick.randrange(KEYS)}"
        self.count += 1
        short, middle, long = (0.0, 0.03), (0.05, 0.4), (0.4, 1.5)
        return Plan(
            call=f"{self.settings.name}.{self.count}",
            order=order,
            by=pick.choice(("decorator", "operation", "run", "store")),
            seconds=pick.uniform(*pick.choices((short, middle, long), (70, 22, 8))[0]),
            block=pick.random() < 0.02,
            outcome=pick.choices(("ok", "declined", "timed out"), (82, 12, 6))[0],
            on_cancel=pick.choice(("keep", "release")),
            cancel_after=pick.uniform(0, 0.3) if pick.random() < 0.08 else None,
            wait=pick.choice((None, pick.uniform(0.2, 2.5))),
            renew=pick.random() < 0.85,
            size=70_000 if pick.random() < 0.03 else 0,
        )

    async def work(self) -> None:
        """Make one call after the other until the worker is told to stop."""
        loop = asyncio.get_running_loop()
        while not self.stopping.is_set():
            plan = self.plan()
            task = asyncio.create_task(self.call(plan))
            self.calls[task] = plan
            task.add_done_callback(self.calls.pop)
            if plan.cancel_after is not None:
                loop.call_later(plan.cancel_after, self.cancel, task, plan)
            await task
            await asyncio.sleep(self.random.uniform(0, 0.03))

    @staticmethod
    def cancel(task: asyncio.Task[None], plan: Plan) -> None:
        """Cancel a call, as a server does whose client has gone."""
        plan.cancelled = task.cancel() or plan.cancelled

    async def stop(self) -> None:
        """Once told to stop, give calls a second, then cancel them, as a server does that shuts down."""
        await self.stopping.wait()
        await asyncio.sleep(PATIENCE)
        for task, plan in list(self.calls.items()):
            self.cancel(task, plan)

    async def sweep(self) -> None:
        """Call each order once: no key may be stuck for longer than a lease and a takeover, and the way there."""
        plans = [Plan(f"{self.settings.name}.{n}", order, "sweep") for n, order in enumerate(self.settings.sweep)]
        for plan in plans:
            plan.wait = plan.terms[0] * 2 + SWEEP_SLACK

        async def work() -> None:
            while plans:
                await asyncio.create_task(self.call(plans.pop()))

        await asyncio.gather(*(work() for _ in range(self.settings.tasks)))

    async def main(self) -> None:
        """Work, or sweep."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self.unhandled)
        loop.add_signal_handler(signal.SIGTERM, self.stopping.set)
        logger = logging.getLogger("asyncidem")
        logger.addHandler(LogHandler(self))
        logger.propagate = False
        self.note("ready")  # a signal before this one would only have ended the process
        if self.settings.sweep:
            await self.sweep()
        else:
            await asyncio.gather(self.stop(), *(self.work() for _ in range(self.settings.tasks)))
        await self.store.aclose()


class LogHandler(logging.Handler):
    """Notes the warnings of the library."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(logging.WARNING)
        self.worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        """Note one."""
        self.worker.note("log", text=record.getMessage())


async def main() -> None:
    """Read the settings, and be a worker."""
    faulthandler.register(signal.SIGUSR1)
    settings = json.loads(sys.argv[1])
    names = {one.name for one in dataclasses.fields(Settings)}
    assert settings.keys() <= names, Path(__file__).name
    await Worker(Settings(**settings)).main()


if __name__ == "__main__":
    asyncio.run(main())
