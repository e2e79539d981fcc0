"""The checker of histories that real processes leave behind: it finds each broken promise, and nothing else."""

from typing import Any

import pytest

from chaos.history import Report, check

KEY = "order:1"
Events = list[dict[str, Any]]


def call(name: str, t: float, *, key: str = KEY, by: str = "run") -> Events:
    """A call begins."""
    return [{"t": t, "what": "call", "call": name, "key": key, "by": by}]


def got(name: str, t: float, value: str, *, key: str = KEY) -> Events:
    """It returns."""
    return [{"t": t, "what": "got", "call": name, "key": key, "value": value}]


def raised(name: str, t: float, error: str, family: str = "asyncidem") -> Events:
    """It raises."""
    return [{"t": t, "what": "raised", "call": name, "key": KEY, "error": error, "family": family, "text": "why"}]


def begin(owner: str, t: float, *, attempt: int = 1, until: float | None = None, key: str = KEY) -> Events:
    """The effect of the call of the same name begins: a lease of 1 s, a ttl of 10 s."""
    event = {"t": t, "what": "begin", "key": key, "owner": owner, "call": owner, "attempt": attempt}
    return [{**event, "until": t + 1 if until is None else until, "lease": 1.0, "lives": 10.0, "ttl": 10.0}]


def end(owner: str, t: float, how: str = "done") -> Events:
    """It ends; its value is its owner's name."""
    return [{"t": t, "what": "end", "owner": owner, "how": how, **({"value": owner} if how == "done" else {})}]


def noted(what: str, owner: str, t: float, **more: float) -> Events:
    """The store acknowledges something, or does not."""
    return [{"t": t, "what": what, "owner": owner, **more}]


def process(what: str, worker: str = "a", t: float = 0.0, **more: object) -> Events:
    """Something happens to a process."""
    return [{"t": t, "what": what, "worker": worker, **more}]


def ran(owner: str, t: float, *, attempt: int = 1, until: float | None = None, stored: bool = True) -> Events:
    """A whole call that runs for half a second and returns."""
    effect = begin(owner, t, attempt=attempt, until=until) + end(owner, t + 0.5)
    settled = noted("stored" if stored else "unsure", owner, t + 0.6)
    return call(owner, t) + effect + settled + got(owner, t + 0.7, owner)


def failed(owner: str, t: float, how: str, *, attempt: int = 1) -> Events:
    """A whole call whose handler raises after half a second."""
    effect = begin(owner, t, attempt=attempt) + end(owner, t + 0.5, how)
    return call(owner, t) + effect + raised(owner, t + 0.6, "Declined", "handler")


def kinds(events: Events) -> set[str]:
    """The kinds of violations that are found."""
    return {violation.kind for violation in check(events).violations}


HONEST = {
    "a result and its replays": ran("a", 0) + call("b", 1) + got("b", 1.1, "a"),
    "a new run after the ttl": ran("a", 0) + ran("b", 10.6),
    "a replay that began before the ttl was over": ran("a", 0) + call("b", 10.4) + got("b", 12, "a"),
    "a run after a release": failed("a", 0, "released") + ran("b", 0.51),
    "a takeover from who failed in the middle": failed("a", 0, "kept") + ran("b", 1.01, attempt=2),
    "a takeover from who was killed": process("killed") + call("a.1", 0) + begin("a.1", 0) + ran("b", 1.01, attempt=2),
    "a takeover after a renewal": process("killed")
    + call("a.1", 0)
    + begin("a.1", 0)
    + noted("lease", "a.1", 0.5, until=1.4)
    + ran("b", 1.41, attempt=2),
    "a takeover after a completion that was lost": ran("a", 0, stored=False) + ran("b", 1.01, attempt=2),
    "a zombie that is told": call("a", 0)
    + begin("a", 0)
    + ran("b", 1.01, attempt=2)
    + end("a", 3)
    + raised("a", 3.1, "LeaseLostError"),
    "a zombie that begins when its lease is over": call("a", 0)
    + ran("b", 1.01, attempt=2)
    + begin("a", 2, until=1)
    + end("a", 3)
    + raised("a", 3.1, "LeaseLostError"),
    "a zombie that completes where the next owner left nothing": call("a", 0)
    + begin("a", 0)
    + failed("b", 11, "released")
    + end("a", 12)
    + noted("stored", "a", 12.1)
    + got("a", 12.2, "a"),
    "an orphan that was put back": failed("a", 0, "kept")
    + failed("b", 1.01, "released", attempt=2)
    + ran("c", 1.52, attempt=2),
    "nothing known after the record was gone": failed("a", 0, "kept") + ran("b", 10.1),
    "two keys": call("a", 0)
    + begin("a", 0)
    + end("a", 0.5)
    + noted("stored", "a", 0.6)
    + got("a", 0.7, "a")
    + call("b", 0, key="other")
    + begin("b", 0, key="other")
    + end("b", 0.5)
    + noted("stored", "b", 0.6)
    + got("b", 0.7, "b", key="other"),
    "a refusal": call("a", 0) + raised("a", 0.1, "InProgressError"),
    "a call that was cancelled": call("a", 0) + raised("a", 0.1, "CancelledError", "cancelled"),
    "a killed worker's call": process("killed") + call("a.1", 0),
    "a killed worker": process("spawned") + process("killed") + process("exited", code=-9, stderr="", t=1),
    "a fault and a warning": process("fault", kind="failover")
    + process("carried", kind="failover")
    + process("log", text="lease_lost")
    + process("ready"),
}


@pytest.mark.parametrize("events", HONEST.values(), ids=HONEST)
def test_what_is_allowed_is_no_violation(events: Events) -> None:
    """Takeovers, releases, zombies that are told and expiries break no promise."""
    assert check(events).violations == []


BROKEN = {
    "two owners": [
        failed("a", 0, "kept") + ran("b", 0.7, attempt=2),
        failed("a", 0, "released") + ran("b", 0.4),
        call("a", 0)
        + begin("a", 0)
        + noted("lease", "a", 0.5, until=1.5)
        + end("a", 0.6, "kept")
        + raised("a", 0.7, "Declined", "handler")
        + ran("b", 1.1, attempt=2),
    ],
    "executed again": [
        ran("a", 0) + ran("b", 9, attempt=2),
        # Nobody acknowledged it, but somebody got it.
        ran("a", 0, stored=False) + call("b", 1) + got("b", 1.1, "a") + ran("c", 1.2, attempt=2),
    ],
    "completion replaced": [
        call("a", 0)
        + begin("a", 0)
        + ran("b", 1.1, attempt=2)
        + end("a", 3)
        + noted("stored", "a", 3.1)
        + raised("a", 3.2, "InProgressError"),
    ],
    "zombie completed": [
        call("a", 0)
        + begin("a", 0)
        + failed("b", 1.1, "kept", attempt=2)
        + end("a", 3)
        + noted("stored", "a", 3.1)
        + got("a", 3.2, "a"),
        call("a", 0)
        + begin("a", 0)
        + failed("b", 1.1, "released", attempt=2)
        + end("a", 3)
        + noted("stored", "a", 3.1)
        + got("a", 3.2, "a"),
    ],
    "zombie not told": [
        call("a", 0) + begin("a", 0) + ran("b", 1.1, attempt=2) + end("a", 3) + got("a", 3.1, "a"),
    ],
    "attempt hidden": [
        failed("a", 0, "kept") + ran("b", 1.1),
        ran("a", 0, stored=False) + ran("b", 1.1),
        process("killed") + call("a.1", 0) + begin("a.1", 0) + ran("b", 1.1),
        failed("a", 0, "kept") + failed("b", 1.1, "kept", attempt=2) + ran("c", 2.2, attempt=2),
        # The release of a takeover does not make the first attempt undone.
        failed("a", 0, "kept") + failed("b", 1.1, "released", attempt=2) + ran("c", 9.9),
        failed("b", 1.1, "released", attempt=2) + ran("c", 9.9),
    ],
    "result replaced": [
        ran("a", 0, stored=False) + ran("b", 1.1, attempt=2) + call("c", 2) + got("c", 2.1, "a"),
    ],
    "result of nobody": [
        call("a", 0) + got("a", 0.1, "x"),
        call("a", 0) + begin("a", 0) + call("b", 0.1) + got("b", 0.2, "a") + end("a", 0.5) + got("a", 0.6, "a"),
        ran("a", 0) + call("b", 1, key="other") + got("b", 1.1, "a", key="other"),
    ],
    "result of another": [
        ran("a", 0, stored=False) + call("b", 1) + begin("b", 1.1, attempt=2) + end("b", 1.2) + got("b", 1.3, "a"),
    ],
    "key stuck": [call("s", 0, by="sweep") + raised("s", 5, "WaitTimeoutError")],
    "unexpected exception": [
        call("a", 0) + raised("a", 0.1, "ConnectionError", "foreign"),
        call("a", 0) + raised("a", 0.1, "CodecError"),
        call("a", 0) + raised("a", 0.1, "CancelledError", "foreign"),
    ],
    "unhandled exception": [process("unhandled", text="Task exception was never retrieved")],
    "call without an end": [call("a.1", 0)],
    "worker did not end": [process("killed") + process("hung", stderr="Current thread")],
    "worker wrote to stderr": [
        process("exited", code=0, stderr="ResourceWarning"),
        process("killed") + process("exited", code=-9, stderr="RuntimeWarning", t=1),
    ],
    "worker failed": [process("exited", code=1, stderr="")],
    "one owner twice": [call("a", 0) + begin("a", 0) + begin("a", 0.1) + end("a", 0.2) + got("a", 0.3, "a")],
}


@pytest.mark.parametrize(("kind", "events"), [(kind, events) for kind, several in BROKEN.items() for events in several])
def test_what_is_broken_is_found(kind: str, events: Events) -> None:
    """Each broken promise is found by its name."""
    assert kind in kinds(events)


def test_the_order_of_the_log_is_that_of_time() -> None:
    """The logs of several processes come one behind the other."""
    assert kinds(ran("b", 1.1, attempt=2) + ran("a", 0)) == kinds(ran("a", 0) + ran("b", 1.1, attempt=2)) != set()


def test_what_was_tried_is_counted() -> None:
    """Operations, effects, replays, takeovers, zombies, faults and violations have their figures."""
    takeover = failed("a", 0, "kept") + ran("b", 1.01, attempt=2) + call("c", 2) + got("c", 2.1, "b")
    zombie = call("z", 0, key="other") + begin("z", 0, key="other")
    after = call("y", 1, key="other") + begin("y", 1.1, attempt=2, key="other") + end("y", 1.2, "kept")
    told = end("z", 2) + raised("z", 2.1, "LeaseLostError") + raised("y", 2.1, "TimedOut", "handler")
    faults = process("fault", kind="failover") + process("carried", kind="failover")
    report = check(takeover + zombie + after + told + faults)
    expected = {"operations": 5, "effects": 4, "replays": 1, "takeovers": 2, "zombies": 1, "zombies told": 1}
    expected |= {
        "carried out: failover": 1,
        "faults": 1,
        "fault: failover": 1,
        "keys": 2,
        "violations": 0,
        "operations by run": 5,
    }
    assert {name: report.figures[name] for name in expected} == expected


def test_a_report_tells_the_history_of_a_key() -> None:
    """All that was logged of a key is there, in the order of time, and nothing of other keys."""
    events = ran("b", 1.1, attempt=2) + ran("a", 0) + call("c", 0.2, key="other")
    report: Report = check(events)
    lines = report.lines(KEY, events)
    assert len(lines) == len(events) - 1
    times = [float(line.split()[0]) for line in lines]
    assert times == sorted(times)
    assert "what=call" in lines[0]
