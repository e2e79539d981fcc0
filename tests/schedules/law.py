"""What no schedule may break: the promises, as rules over what the server and the callers saw.

Each rule has a name, and a breach names it with what happened. The first one of a run counts.
"""

import asyncio
import functools
import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from asyncidem import IdempotencyError, LeaseLostError, StoreUnavailableError

from schedules.processes import Process
from schedules.server import Request, Value, actor_of

Cancelled: TypeAlias = Literal["", "once", "at every await"]
"""How a call was cancelled; there may be no await left at which that would arrive."""


class Lease(Protocol):
    """What the law looks at in a claim."""

    owner: str
    attempt: int
    _deadline: float

    @property
    def _settled(self) -> str: ...


class Boom(Exception):  # noqa: N818 - what a handler raises
    """The handler failed, and says that nothing happened."""


class Breach(NamedTuple):
    """A promise that was broken: the rule's name, and what happened."""

    rule: str
    what: str


@dataclass(slots=True, eq=False)
class Effect:
    """One run of a handler."""

    process: Process
    label: str
    claim: Lease
    status: Literal["running", "returned", "raised", "cancelled"] = "running"
    forgotten: bool = False  # its record expired: nobody can know of it any more

    @property
    def holds(self) -> bool:
        """Whether its owner is within a lease that it has not given up."""
        within = self.claim._deadline > self.process.time() and not self.forgotten
        return within and self.claim._settled not in ("released", "lost")


class Law:
    """Watches one run.

    Args:
        keep_failed: a handler that raised leaves an unknown outcome (``on_failure="keep"``).
        release_cancelled: a cancelled one leaves none (``on_cancel="release"``).
    """

    def __init__(self, *, keep_failed: bool = False, release_cancelled: bool = False) -> None:
        self._known = {
            status for status, known in (("raised", not keep_failed), ("cancelled", release_cancelled)) if known
        }
        self.effects: list[Effect] = []
        self.results: dict[str, str] = {}  # per owner, the result with which it is recorded as completed
        self.replays: list[str] = []
        self.breach: Breach | None = None
        self.writes = 0

    def broken(self, rule: str, what: str) -> None:
        """Take note of a breach."""
        if self.breach is None:
            self.breach = Breach(rule, what)

    def key(self) -> tuple[object, ...]:
        """Return what the rest of a run can be judged by."""
        return (
            tuple((effect.label, effect.status, effect.claim.attempt, effect.forgotten) for effect in self.effects),
            tuple(self.results.items()),
            tuple(self.replays),
        )

    def known(self, effect: Effect) -> bool:
        """Say whether the outcome of a handler is known: it failed, and its claim was released."""
        return effect.status in self._known

    # -- what the server saw --------------------------------------------------------------------------------------------

    def wrote(self, key: str, before: Value | None, after: bytes | None, request: Request, now: int) -> None:
        """Judge a write."""
        self.writes += 1
        new = None if after is None else record_in(after)
        if new is not None and new["status"] == "COMPLETED":
            self.results.setdefault(new["owner"], new.get("data", ""))
        old = None if before is None else record_in(before.data)
        if old is None or before is None:
            return
        age, owner, actor = now - before.written, old["owner"], actor_of(request)
        if old["status"] == "COMPLETED":
            if after != before.data:
                self.broken("completed stands", f"{request.op} of {actor} replaced the result of {owner}")
            return
        over = age >= old["lease"]
        if new is None:
            if actor != owner:
                self.broken("zombie delete", f"{actor} deleted the claim of {owner}")
            elif old["attempt"] > 1:
                self.broken("attempt counts", f"{owner} of attempt {old['attempt']} left no orphan behind")
        elif new["status"] == "COMPLETED":
            if new["owner"] != owner:
                self.broken("zombie completion", f"{new['owner']} completed over the claim of {owner}")
        elif new["owner"] == owner:
            return
        elif new["lease"] == 0:
            if actor != owner:
                self.broken("zombie release", f"{actor} gave back the claim of {owner}")
        elif not over:
            self.broken(
                "takeover of an orphan", f"{new['owner']} took over {owner}, {age} ms into a lease of {old['lease']} ms"
            )
        elif new["attempt"] <= old["attempt"]:
            self.broken("attempt counts", f"{new['owner']} took over attempt {old['attempt']} as {new['attempt']}")

    def expired(self) -> None:
        """Take note that the key's record expired: who ran before is forgotten."""
        for effect in self.effects:
            effect.forgotten = True

    # -- what the callers saw -------------------------------------------------------------------------------------------

    def starts(self, process: Process, label: str, claim: Lease, stored: Value | None) -> Effect:
        """Judge the beginning of a handler."""
        if claim._deadline <= process.time():
            self.broken("starts within its lease", f"{label} starts {process.time() - claim._deadline:g} s late")
        for effect in self.effects:
            if effect.holds:
                self.broken("one owner", f"{label} starts within the lease of {effect.label}")
            if claim.attempt == 1 and not self.known(effect) and not effect.forgotten:
                self.broken("attempt counts", f"{label} runs as attempt 1 after {effect.label}, {effect.status}")
        record = None if stored is None else record_in(stored.data)
        if record is not None and record["status"] == "COMPLETED":
            self.broken("no effect after a result", f"{label} starts, and {record['owner']} has completed")
        effect = Effect(process, label, claim)
        self.effects.append(effect)
        return effect

    def ended(self, call: "Ended") -> None:
        """Judge the end of a call."""
        effect, error, events = call.effect, call.error, call.events
        if isinstance(error, asyncio.CancelledError):
            if not call.cancelled:
                self.broken("errors are ours", f"{call.label} was cancelled by nobody")
        elif error is not None:
            self._raised(call, error)
        elif call.cancelled == "once":
            self.broken("cancellation arrives", f"{call.label} was cancelled, and returned {call.result!r}")
        elif effect is None:
            self.replays.append(call.result)
            if call.result not in map(decoded, self.results.values()):
                self.broken("replays are results", f"{call.label} got {call.result!r}, which nobody completed with")
        elif call.result != effect.label:
            self.broken("replays are results", f"{call.label} returned {call.result!r} for its own {effect.label!r}")
        elif "completion_failed" not in events and effect.claim.owner not in self.results:
            self.broken("a zombie is told", f"{call.label} returned as if its result were stored")
        if (
            effect is not None
            and "completed" in events
            and decoded(self.results.get(effect.claim.owner)) != effect.label
        ):
            self.broken(
                "an acknowledged result is stored", f"{call.label} completed, and the server has not its result"
            )
        if len({*self.results.values()}) > 1 and not any(one.forgotten for one in self.effects):
            self.broken("one result", f"the key was completed with {sorted(self.results.values())}")

    def _raised(self, call: "Ended", error: BaseException) -> None:
        effect = call.effect
        if isinstance(error, Boom):
            if effect is None or effect.status != "raised":
                self.broken("errors are ours", f"{call.label} raised what its handler did not")
        elif not isinstance(error, IdempotencyError):
            self.broken("errors are ours", f"{call.label} raised {error!r}")
        elif isinstance(error, LeaseLostError):
            if effect is None:
                self.broken("errors are ours", f"{call.label} lost a lease that it never ran in")
            elif effect.claim.owner in self.results and not effect.forgotten:
                self.broken("an owner is not told so", f"{call.label} is completed, and got {error!r}")
        elif isinstance(error, StoreUnavailableError) and effect is not None:
            self.broken("nothing ran", f"{call.label} raised {error!r}, and its handler ran")


class Ended(NamedTuple):
    """The end of a call."""

    label: str
    effect: Effect | None
    result: Any
    error: BaseException | None
    events: list[str]
    cancelled: Cancelled


@functools.lru_cache(maxsize=4096)
def record_in(value: bytes) -> dict[str, Any] | None:
    """Return a record; None for what is none, a lock for example."""
    if not value.startswith(b"{"):
        return None
    record: dict[str, Any] = json.loads(value)
    record.setdefault("attempt", 1)
    return record


def decoded(data: str | None) -> Any:
    """Return the result that a record holds."""
    return None if data is None else json.loads(data)
