"""What belongs to an event loop ends with it, and does not begin when that ends."""

import asyncio

import pytest

from asyncidem.cancellation import within_loop


def test_nothing_begins_when_the_loop_is_ending() -> None:
    """Its asynchronous generators are closed: nobody would end what comes after them."""
    begun: list[bool] = []

    async def work() -> None:
        begun.append(True)

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(within_loop(work))
        loop.run_until_complete(loop.shutdown_asyncgens())
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(within_loop(work))
    finally:
        loop.close()
    assert begun == [True]
