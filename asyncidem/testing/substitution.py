"""Another store under an ``Idempotency``, for the time of a test."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from typing import Final, TypeVar

from ..engine import Engine
from ..errors import ConfigurationError
from ..idempotency import Idempotency
from ..stores.base import Store

__all__ = ["use_store"]

S = TypeVar("S", bound=Store)

_blocks: Final[dict[int, list[Engine]]] = {}
"""Of each ``Idempotency`` that has blocks, by its id: its own engine, and those of the blocks in the order in which they
were begun. The last one is in use. Every block holds its ``Idempotency``, so the id is of no other one."""

_lock: Final = threading.RLock()
"""A block that was left to the garbage ends wherever the collector runs, here too."""


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
    ends in the store that it was begun in. Blocks may be nested, and may overlap in any order, as those of tasks and
    fixtures do: of the blocks that go on, the one that was begun last counts.

    Args:
        idem: the object that the application uses.
        store: where records are meanwhile. It is not closed.

    Raises:
        ConfigurationError: one of the two is something else.
    """
    if not isinstance(idem, Idempotency):  # pyright: ignore[reportUnnecessaryIsInstance] - callers without a type checker
        raise ConfigurationError(f"idem must be an Idempotency, not {type(idem).__name__}")
    if not isinstance(store, Store):  # pyright: ignore[reportUnnecessaryIsInstance] - likewise
        raise ConfigurationError(f"store must be a Store such as MemoryStore(), not {type(store).__name__}")
    with _lock:
        engine = idem._engine.over(store)
        engines = _blocks.get(id(idem)) or [idem._engine]
        engines.append(engine)
        _blocks[id(idem)] = engines
        object.__setattr__(idem, "_engine", engine)
    try:
        yield store
    finally:
        with _lock:
            engines.remove(engine)  # its own, wherever it stands by now
            object.__setattr__(idem, "_engine", engines[-1])
            if len(engines) == 1:
                _blocks.pop(id(idem), None)
