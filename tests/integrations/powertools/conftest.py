"""Both sides on one server, with the same keys."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import pytest

from asyncidem import Idempotency, RedisStore

if TYPE_CHECKING:
    from powertools import Peer


@pytest.fixture
def peer(redis_url: str) -> Iterator[Peer]:
    """Functions under Powertools on the shared server."""
    from powertools import Peer, connect

    with connect(redis_url) as client:
        yield Peer(client)


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[RedisStore]:
    """A store on the same server."""
    async with RedisStore.from_url(redis_url, prefix="") as store:
        yield store


@pytest.fixture
async def earlier(redis_url: str) -> AsyncIterator[RedisStore]:
    """Another one, a minute ago: Powertools goes by the times that it writes, and finds its leases over."""
    async with RedisStore.from_url(redis_url, prefix="", wall=lambda: time.time() - 60) as store:
        yield store


@pytest.fixture
def idem(store: RedisStore) -> Idempotency:
    """Operations on the store."""
    return Idempotency(store, ttl=3_600)
