"""Operations in memory."""

import pytest

from asyncidem import Idempotency, MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    """Return an empty store."""
    return MemoryStore()


@pytest.fixture
def idem(store: MemoryStore) -> Idempotency:
    """Return an object over it."""
    return Idempotency(store)
