"""When the platform takes the time away: an invocation is killed at an instant that is known beforehand.

An integration sets ``cutoff`` for the context of such work; nothing else here knows of platforms. What follows from it:

- a store call has its answer in time for its caller to give one (``stores.primitives.enter_call``), and so has a wait;
- a lease ends soon after the work that it protects, and is not renewed: there is nothing to renew it for
  (``Options.lease_now``, ``Engine``);
- who is cancelled waits for what it owes no longer than there is time (``cancellation.linger``).
"""

# Annotations are not postponed here: a NamedTuple would compile the text of each of its fields at import.

import time
from contextvars import ContextVar
from typing import NamedTuple

__all__ = ["Cutoff", "bounded", "cutoff", "lease_within"]


class Cutoff(NamedTuple):
    """Instants on ``time.monotonic``, in their order.

    Attributes:
        calls: store calls and waits that begin before it end by then.
        last_calls: those that begin later, to settle what was cut off, end by then.
        leases: every lease ends then.
    """

    calls: float
    last_calls: float
    leases: float


cutoff: ContextVar[Cutoff | None] = ContextVar("asyncidem_cutoff", default=None)
"""That of the running work; None where nothing takes its time away."""


def bounded(seconds: float) -> float:
    """Return how many of ``seconds`` there is time for, from now on; 0 if none."""
    found = cutoff.get()
    if found is None:
        return seconds
    now = time.monotonic()
    end = found.calls if now < found.calls else found.last_calls
    return min(seconds, max(0.0, end - now))


def lease_within(lease_ms: int) -> int:
    """Return the milliseconds of a lease that begins now: those up to the cutoff, or ``lease_ms`` if there is none."""
    found = cutoff.get()
    return lease_ms if found is None else max(1, round((found.leases - time.monotonic()) * 1000))
