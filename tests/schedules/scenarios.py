"""What is explored, and how far.

The bounds of `BOUNDED` take about 20 seconds together; `explore.py` goes further.
"""

from typing import Final

from schedules.plan import ALL_FAULTS, Scenario
from schedules.wire import wire_store

CANCELLED: Final = frozenset({"cancel", "cut", "time", "leap", "crash"})
NETWORK: Final = frozenset({"lost", "unknown", "refuse", "slow"})

SCENARIOS: Final = {
    scenario.name: scenario
    for scenario in (
        # Two callers, and nobody was there before; a key whose owner is dead; one whose owner has half a lease left.
        Scenario("two"),
        Scenario("orphan", orphan=0),
        Scenario("dead-owner", orphan=15),
        Scenario("no-renewal", options={"renew": False}),
        # Three callers of an orphan; two that call again.
        Scenario("three", processes=3, orphan=0),
        Scenario("again", calls=2),
        Scenario("keep", calls=2, options={"on_failure": "keep"}),
        Scenario("cancel-releases", calls=2, options={"on_cancel": "release"}),
        # Those who wait: beside other processes, and beside each other.
        Scenario("waiting", options={"wait": 60}),
        Scenario("crowd", calls=2, at_once=2, options={"wait": 60}),
        # Cancellations of anyio come at every await.
        Scenario("anyio", anyio=True, faults=CANCELLED),
        Scenario("anyio-orphan", anyio=True, orphan=0, faults=CANCELLED),
        # A result that lives shorter than a lease.
        Scenario("short-lived", calls=2, options={"ttl": 2}),
        # Redis' own store on its multiplexed connection, which may break with all that is under way on it.
        Scenario("wire", lease=6, store=wire_store),
        Scenario("wire-orphan", lease=6, store=wire_store, orphan=0),
        Scenario("wire-anyio", lease=6, store=wire_store, anyio=True, faults=CANCELLED | NETWORK),
        Scenario("wire-waiting", lease=6, store=wire_store, options={"wait": 60}, calls=2, at_once=2),
    )
}

BOUNDED: Final[tuple[tuple[str, int, int | None], ...]] = (
    # scenario, faults, and switches (None: any number, which is every order)
    ("two", 1, None),
    ("orphan", 1, 1),
    ("dead-owner", 1, None),
    ("no-renewal", 1, None),
    ("three", 0, None),
    ("again", 1, 0),
    ("keep", 1, 0),
    ("cancel-releases", 1, 0),
    ("waiting", 1, 0),
    ("crowd", 0, None),
    ("anyio", 1, None),
    ("anyio-orphan", 1, 0),
    ("short-lived", 1, 0),
    ("wire-orphan", 0, None),
    ("wire-waiting", 0, None),
    ("wire-anyio", 1, 0),
)
"""What the tests explore to the end."""

WANDERED: Final = 40
"""How many schedules of each scenario the tests run at random."""

assert ALL_FAULTS >= CANCELLED | NETWORK
