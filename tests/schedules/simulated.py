"""Takes away what would differ between two runs of one schedule."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from unittest import mock

from asyncidem import waiting
from asyncidem.stores import channel, claiming, link, ownership, primitives

from schedules.processes import Process
from wires import LoopClock


def _token() -> str:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Process)
    return loop.token()


class Certain:
    """Stands for the module `random` where a waiter looks for its next pause."""

    @staticmethod
    def uniform(low: float, _: float) -> float:
        """Return the lower end."""
        return low


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """Take away what would differ between two runs of one schedule: random numbers, real clocks; and the log.

    Waiters look less often than they would, or a run would be all looks.
    """
    logger = logging.getLogger("asyncidem")
    with contextlib.ExitStack() as stack:
        for module in (claiming, ownership):
            stack.enter_context(mock.patch.object(module, "new_token", _token))
        for module in (channel, link, primitives):
            stack.enter_context(mock.patch.object(module, "time", LoopClock))
        stack.enter_context(mock.patch.multiple(waiting, random=Certain, MIN_PAUSE=2.0, MAX_PAUSE=4.0))
        disabled = logger.disabled
        logger.disabled = True
        stack.callback(setattr, logger, "disabled", disabled)
        yield
