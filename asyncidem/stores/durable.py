"""What must hold so that Redis keeps what it acknowledged: replicas that have a write, and a memory that evicts nothing.

How a write is confirmed, and what keeps that in order:

- The write goes the way of all commands. Only when its reply is there, a second exchange follows: a script that writes
  the key's time left again, if the key still begins with what was written, and ``WAIT``. Replication is one stream, so
  a replica that has the script's write has the one before it, whichever connection each of them came over.
- The script changes nothing that anybody could see, whenever it runs and however often. So it needs no place in the
  order of its key's commands: an undo and a repetition neither wait for it nor overtake anything, and a caller who is
  cancelled leaves it to itself.
- The script looks at the key because a server that answers now may not be the one that took the write: after a
  failover, what is not there was lost, and what is there is confirmed by the new master's replicas.
- ``WAIT`` blocks its connection. It gets one of the client's pool, never the one that all commands share.
- A master that is demoted meanwhile refuses nothing for good: whoever is the master now is asked, until the deadline of
  the call. Its replicas may still have to find it, so that their number is no answer before then, either.
- A repetition that finds its own bytes has written nothing, and is confirmed like a write.
"""

from __future__ import annotations

import time
from typing import Final

from ..errors import ConfigurationError, StoreError
from ..hooks import logger
from .link import Command, Script, WireLink
from .primitives import NotReplicatedError, call_deadline
from .refusals import refusal

__all__ = ["Replicas", "check_wait_replicas", "refuse_without_wait", "warn_of_eviction"]

BEGINNING: Final = 1280
"""Bytes by which a value is recognised: a record begins with its owner's token, its status and its times.

44 with the token, 14 of the status, two times of at most 19 digits, 10 between them, and three names: each has two
quotes and at most 64 bytes, for one of which JSON writes up to six (control characters).
44 + 14 + 2 * 19 + 10 + 3 * (2 + 64 * 6) = 1264.
"""


LAST_LOOK: Final = 0.25
"""Seconds before the deadline of a call from which on replicas are not asked once more: a server that is told to wait for
three fifths of them, and is late by 100 ms, would still answer in time."""


class Replicas:
    """Confirms writes.

    Args:
        link: sends the commands.
        count: how many replicas must have a write.
    """

    def __init__(self, link: WireLink, count: int) -> None:
        self._link = link
        self._count = count
        self._script = Script("confirm")

    async def confirm(self, key: str, value: bytes) -> None:
        """Return once so many replicas have ``value``, which was written under ``key``.

        Raises:
            NotReplicatedError: they do not have it in time, or the master does not have it any more.
        """

        def commands(ms: int) -> tuple[Command, ...]:
            return ("EVAL", self._script.source, 1, key, value[:BEGINNING]), ("WAIT", self._count, ms)

        changed, last = False, (call_deadline.get() or 0.0) - LAST_LOOK
        while True:
            try:
                (there, acknowledged), ms, again = await self._link.patient(key, commands)
            except StoreError as error:
                # Whatever was refused here, the write itself was not.
                raise NotReplicatedError(f"written, but not confirmed by replicas: {error}") from error.__cause__
            if not there:
                raise NotReplicatedError(
                    "the record was replaced, or lost with its master, before the replicas acknowledged it"
                )
            if acknowledged >= self._count:
                return
            changed = changed or again
            if not changed or time.monotonic() >= last:
                raise NotReplicatedError(
                    f"{acknowledged} of {self._count} replicas acknowledged the write within {ms} ms; connect as many, "
                    f"or lower wait_replicas"
                )


def check_wait_replicas(count: object) -> None:
    """Refuse what is no number of replicas."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigurationError(f"wait_replicas must be a number of replicas, 0 or more, not {count!r}")


def refuse_without_wait(error: NotReplicatedError) -> None:
    """Raise what tells a mistake of configuration from replicas that are missing for now."""
    if refusal(error.__cause__).startswith("unknown command"):
        raise ConfigurationError(
            f"wait_replicas needs a server that knows WAIT, which this one does not: {error.__cause__}"
        ) from error.__cause__


def warn_of_eviction(limit: bytes = b"", policy: bytes = b"") -> None:
    """Say in the log if a server with these settings may evict records; say nothing if it does not tell them.

    All policies but ``noeviction`` may take a record, for each has a ttl; none takes anything without a limit.
    """
    if limit.strip(b"0") and policy not in (b"", b"noeviction"):
        name = policy.decode()
        extra = {"maxmemory_policy": name}
        logger.warning(
            "eviction_possible: the server's maxmemory-policy is %s; a record that is evicted lets its operation run "
            "again: set it to noeviction",
            name,
            extra=extra,
        )
