"""Another store under an ``Idempotency``, for the time of a test."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import TypeVar

from ..errors import ConfigurationError, IdempotencyError
from ..idempotency import Idempotency
from ..stores.base import Store

__all__ = ["use_store"]

S = TypeVar("S", bound=Store)


@contextlib.contextmanager
def use_store(idem: Idempotency, store: S) -> Generator[S]:
    """Let ``idem`` keep its records in ``store`` for the time of a ``with`` block, and give the old store back.

    ::

        async def test_one_charge() -> None:
            with use_store(app.idem, MemoryStore()) as store:
                assert await app.charge("42", 100) == await app.charge("42", 100)
                assert await store.get(app.idem.key_for(app.charge, "42", 100))

    All that is called through ``idem`` meanwhile is kept there, in every task and thread of the process: functions that
    it decorated before, ``run`` and ``operation``. All other options stay, and a ``local_cache`` begins empty. An operation
    ends in the store that it was begun in. Blocks may be nested; the one that was begun last ends first.

    Args:
        idem: the object that the application uses.
        store: where records are meanwhile. It is not closed.

    Raises:
        ConfigurationError: one of the two is something else.
        IdempotencyError: at the end, if another block for the same ``idem`` was begun meanwhile and goes on.
    """
    if not isinstance(idem, Idempotency):  # pyright: ignore[reportUnnecessaryIsInstance] - callers without a type checker
        raise ConfigurationError(f"idem must be an Idempotency, not {type(idem).__name__}")
    if not isinstance(store, Store):  # pyright: ignore[reportUnnecessaryIsInstance] - likewise
        raise ConfigurationError(f"store must be a Store such as MemoryStore(), not {type(store).__name__}")
    before = idem._engine
    engine = before.over(store)
    object.__setattr__(idem, "_engine", engine)
    try:
        yield store
    finally:
        if idem._engine is not engine:
            # Given back now, the store of this block would return with the end of the other one, and stay for good.
            raise IdempotencyError("use_store ends inside of a use_store that was begun later; end that one first")
        object.__setattr__(idem, "_engine", before)
