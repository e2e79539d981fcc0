"""Checks what worker processes logged of their effects against the promises: a pure function of events.

An event is an object with the time `t` (seconds of CLOCK_MONOTONIC, which all processes of a machine share) and `what`:

==========  ============================================================================================================
call        a call of `key` begins; `by` says how. It ends with `got` (`value`) or `raised` (`error`, `family`)
begin       its effect begins, as `owner`, with `attempt`; the lease lasts `until` at least, and with `lease` seconds of it
            a record in progress lives for `lives`; a result lives for `ttl`
lease       a renewal of `owner` was acknowledged: until `until`
end         the effect ended: "done" with a `value`, "released" (it failed, and said that nothing was done), "kept" (it
            failed, or was cancelled, in the middle) or "lost" (cancelled, for another owner has the key)
stored      the store acknowledged the completion; `unsure`: it did not
==========  ============================================================================================================

and of the processes `spawned`, `ready`, `killed`, `hung` and `exited` (with `code` and `stderr`), `unhandled` (an exception that
reached the loop), `fault` (`kind`), and `carried` out, of a `kind` that needs the servers' consent.

All that is concluded is certain, whatever the delays between an event and its line in the log: a lease counts as held
only from when its owner knew of it until when its server cannot have ended it before; a completion only from when
somebody knew of it. What an owner does after its own lease has run out, such as to begin an effect because its process
was frozen between the claim and that, breaks no promise; that its completion is refused does.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, permutations
from math import inf
from typing import Any, Final, NamedTuple

SLACK: Final = 0.02
"""Seconds by which the server's clock may differ from ours over a lease or a ttl: it counts whole milliseconds."""

EXPECTED: Final = frozenset(
    {"CompletionError", "InProgressError", "LeaseLostError", "StoreUnavailableError", "WaitTimeoutError"}
)
"""The errors of the library that faults may lead to; any other would be about a misuse that there is not."""


class Violation(NamedTuple):
    """A broken promise: which one, of which key, and what was seen."""

    kind: str
    key: str
    text: str


@dataclass
class Effect:
    """One run of a handler, by one owner."""

    key: str
    owner: str
    call: str
    attempt: int
    begin: float
    until: float
    lease: float
    lives: float
    ttl: float
    leases: list[tuple[float, float]] = field(default_factory=list)
    end: float = inf
    how: str = ""
    value: str | None = None
    stored: float = inf
    unsure: bool = False

    @property
    def late(self) -> bool:
        """Whether the effect began when its owner's lease may have been over already."""
        return self.begin >= self.until

    @property
    def spans(self) -> list[tuple[float, float]]:
        """When its owner certainly had the lease."""
        end = self.end if self.how == "released" else self.end + self.ttl if self.how == "done" else inf
        spans = [(self.begin, self.until), *self.leases]
        return [(since, min(until, end) - SLACK) for since, until in spans if since < min(until, end) - SLACK]

    @property
    def expires(self) -> float:
        """How long its record in progress was there at least, unless it was replaced."""
        return max(until for _, until in ((0.0, self.until), *self.leases)) - self.lease + self.lives

    @property
    def keeps(self) -> float:
        """How long its result was there at least, once it was stored."""
        return self.end + self.ttl - SLACK

    def __str__(self) -> str:
        """Say what is known of it."""
        end = f"{self.how} at {self.end:.3f}" if self.how else "no end"
        stored = f", stored by {self.stored:.3f}" if self.stored < inf else ", completion not acknowledged"
        leases = "".join(f", renewed at {since:.3f} until {until:.3f}" for since, until in self.leases)
        return (
            f"[{self.call} owner {self.owner[:8]} attempt {self.attempt}: {self.begin:.3f} with a lease until "
            f"{self.until:.3f}{leases}, {end}{stored if self.how == 'done' else ''}]"
        )


class Got(NamedTuple):
    """A call that returned a value."""

    call: str
    since: float
    at: float
    value: str


class Report(NamedTuple):
    """What came out: broken promises, and how much was tried."""

    violations: list[Violation]
    figures: Counter[str]

    def lines(self, key: str, events: Iterable[Mapping[str, Any]]) -> list[str]:
        """Return the history of a key, a line for each event."""
        mine = [event for event in events if event.get("key") == key]
        calls = {event["call"] for event in mine if "call" in event}
        owners = {event["owner"] for event in mine if "owner" in event}
        return [
            f"{event['t']:.4f} " + " ".join(f"{name}={value}" for name, value in event.items() if name != "t")
            for event in sorted(events, key=lambda event: float(event["t"]))
            if event.get("key") == key or event.get("call") in calls or event.get("owner") in owners
        ]


@dataclass
class _Call:
    key: str
    by: str
    since: float
    outcome: Mapping[str, Any] | None = None


class _History:
    """The events, sorted into calls and effects."""

    def __init__(self, events: Iterable[Mapping[str, Any]]) -> None:
        self.calls: dict[str, _Call] = {}
        self.effects: dict[str, Effect] = {}
        self.of_key: dict[str, list[Effect]] = defaultdict(list)
        self.of_value: dict[str, Effect] = {}
        self.gone: set[str] = set()
        self.figures: Counter[str] = Counter()
        self.violations: list[Violation] = []
        for event in sorted(events, key=lambda event: float(event["t"])):
            getattr(self, f"_{event['what']}")(event)

    def _call(self, event: Mapping[str, Any]) -> None:
        self.calls[event["call"]] = _Call(event["key"], event["by"], event["t"])
        self.figures["operations"] += 1
        self.figures[f"operations by {event['by']}"] += 1

    def _begin(self, event: Mapping[str, Any]) -> None:
        names = ("key", "owner", "call", "attempt", "until", "lease", "lives", "ttl")
        effect = Effect(begin=event["t"], **{name: event[name] for name in names})
        if effect.owner in self.effects:
            self._breach("one owner twice", effect.key, f"{self.effects[effect.owner]} and {effect}")
        self.effects[effect.owner] = effect
        self.of_key[effect.key].append(effect)
        self.figures["effects"] += 1
        self.figures["takeovers"] += effect.attempt > 1
        self.figures["effects begun after their lease"] += effect.late

    def _lease(self, event: Mapping[str, Any]) -> None:
        self.effects[event["owner"]].leases.append((event["t"], event["until"]))
        self.figures["renewals"] += 1

    def _end(self, event: Mapping[str, Any]) -> None:
        effect = self.effects[event["owner"]]
        effect.end, effect.how, effect.value = event["t"], event["how"], event.get("value")
        if effect.value is not None:
            self.of_value[effect.value] = effect

    def _stored(self, event: Mapping[str, Any]) -> None:
        effect = self.effects[event["owner"]]
        effect.stored = min(effect.stored, event["t"])

    def _unsure(self, event: Mapping[str, Any]) -> None:
        self.effects[event["owner"]].unsure = True
        self.figures["completions not acknowledged"] += 1

    def _got(self, event: Mapping[str, Any]) -> None:
        self.calls[event["call"]].outcome = event

    def _raised(self, event: Mapping[str, Any]) -> None:
        call = self.calls[event["call"]]
        call.outcome = event
        name, family = event["error"], event["family"]
        self.figures[f"raised {name}"] += 1
        self.figures["zombies told"] += name == "LeaseLostError"
        expected = name in EXPECTED if family == "asyncidem" else family in ("handler", "cancelled")
        if not expected:
            self._breach("unexpected exception", call.key, f"{event['call']}: {name}: {event.get('text')}")
        elif call.by == "sweep":
            self._breach("key stuck", call.key, f"{event['call']}: {name}: {event.get('text')}")

    def _spawned(self, _: Mapping[str, Any]) -> None:
        self.figures["processes"] += 1

    def _ready(self, _: Mapping[str, Any]) -> None:
        pass

    def _killed(self, event: Mapping[str, Any]) -> None:
        self.gone.add(event["worker"])

    def _hung(self, event: Mapping[str, Any]) -> None:
        self._breach("worker did not end", "", f"{event['worker']}: {event.get('stderr')}")

    def _exited(self, event: Mapping[str, Any]) -> None:
        if event["stderr"]:
            self._breach("worker wrote to stderr", "", f"{event['worker']}: {event['stderr']}")
        if event["code"] != 0 and event["worker"] not in self.gone:
            self.gone.add(event["worker"])
            self._breach("worker failed", "", f"{event['worker']}: exit code {event['code']}")

    def _unhandled(self, event: Mapping[str, Any]) -> None:
        self._breach("unhandled exception", "", f"{event['worker']}: {event['text']}")

    def _log(self, event: Mapping[str, Any]) -> None:
        self.figures[f"logged {event['text']}"] += 1

    def _fault(self, event: Mapping[str, Any]) -> None:
        self.figures[f"fault: {event['kind']}"] += 1
        self.figures["faults"] += 1

    def _carried(self, event: Mapping[str, Any]) -> None:
        self.figures[f"carried out: {event['kind']}"] += 1

    def _breach(self, kind: str, key: str, text: str) -> None:
        self.violations.append(Violation(kind, key, text))


def check(events: Iterable[Mapping[str, Any]]) -> Report:
    """Return every violation in a history whose last calls, `by` "sweep", were made when all faults were over."""
    history = _History(events)
    found, figures = history.violations, history.figures
    results: dict[str, list[Got]] = defaultdict(list)
    for name, call in history.calls.items():
        if call.outcome is None:
            if name.partition(".")[0] not in history.gone:
                found.append(Violation("call without an end", call.key, name))
        elif call.outcome["what"] == "got":
            results[call.key].append(Got(name, call.since, call.outcome["t"], call.outcome["value"]))
    for got in (got for of_key in results.values() for got in of_key):
        # A result that somebody was given is stored, whether its owner heard of it or not.
        effect = history.of_value.get(got.value)
        if effect is not None and effect.call != got.call:
            effect.stored = min(effect.stored, max(got.at, effect.end))
            figures["replays"] += 1
    for key, effects in history.of_key.items():
        for rule in (_two_owners, _executed_again, _completed_again, _attempt_hidden):
            found.extend(Violation(*what, key, text) for *what, text in rule(effects))
    for key, given in results.items():
        for got in given:
            found.extend(
                Violation(kind, key, text) for kind, text in _wrong_result(got, history.of_value, history.of_key[key])
            )
    figures["zombies"] = sum(
        any(one.begin < other.begin < one.end and not other.late for other in effects)
        for effects in history.of_key.values()
        for one in effects
        if one.end < inf
    )
    figures["keys"] = len({call.key for call in history.calls.values()})
    figures["violations"] = len(found)
    return Report(found, figures)


Found = Iterator[tuple[str, str]]


def _two_owners(effects: list[Effect]) -> Found:
    """One owner at a time within its lease."""
    for one, other in combinations(effects, 2):
        if any(since < end and begin < until for since, until in one.spans for begin, end in other.spans):
            yield "two owners", f"{one} and {other}"


def _executed_again(effects: list[Effect]) -> Found:
    """COMPLETED is not re-executed within its ttl."""
    for done, other in permutations(effects, 2):
        if not other.late and done.stored < other.begin < done.keeps:
            yield "executed again", f"{done}, and then {other}"


def _completed_again(effects: list[Effect]) -> Found:
    """COMPLETED is not replaced within its ttl, and who was replaced completes nothing."""
    for done, other in permutations(effects, 2):
        if done.stored <= other.end and other.stored < done.keeps:
            yield "completion replaced", f"{done} by {other}"
        replaced = done.begin < other.begin < done.end and not other.late
        # One that runs for the first time may be gone again without a trace, by its release or its end.
        if replaced and done.stored < other.expires - SLACK and (other.attempt > 1 or other.how != "released"):
            yield "zombie completed", f"{done}, although there was {other}"


def _attempt_hidden(effects: list[Effect]) -> Found:
    """Whoever runs after an attempt whose outcome is unknown sees a higher attempt."""
    for earlier, other in permutations(effects, 2):
        if other.late or not earlier.begin < other.begin < earlier.expires - SLACK:
            continue
        if earlier.how == "released" and earlier.end <= other.begin:
            # What it found it has put back: it may have been one of several that know nothing of the first.
            hidden = other.attempt < earlier.attempt
        else:
            hidden = other.attempt <= earlier.attempt
        if hidden:
            yield "attempt hidden", f"{earlier}, and then {other}"


def _wrong_result(got: Got, of_value: Mapping[str, Effect], effects: list[Effect]) -> Found:
    """Every replay is the acknowledged result; who ran gets its own, or is told."""
    effect = of_value.get(got.value)
    if effect is None or effect not in effects or effect.end > got.at:
        yield "result of nobody", f"{got}"
        return
    for own in effects:
        if own.call == got.call and own is not effect:
            yield "result of another", f"{got}, although it ran {own}"
    if effect.call == got.call and effect.stored == inf and not effect.unsure:
        yield "zombie not told", f"{got} of {effect}"
    for other in effects:
        if other is not effect and other.stored <= got.since and got.at < other.keeps:
            yield "result replaced", f"{got} of {effect}, although there was {other}"
