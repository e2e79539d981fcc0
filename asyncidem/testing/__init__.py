"""For tests: of a store that you write, and of your own functions that asyncidem protects.

- :func:`use_store` puts another store under an ``Idempotency`` for the time of a test;
- :class:`ManualClock` lets leases and ttls end without waiting for them;
- :class:`FaultyStore` fails, is late, or loses replies, exactly where a test says so;
- :class:`StoreConformance` holds a store to what the protocol needs of it.

Nothing here needs a test framework.
"""

from .clock import ManualClock
from .conformance import ConformanceError, StoreConformance
from .faulty import Call, Fault, FaultyStore
from .substitution import use_store

__all__ = ["Call", "ConformanceError", "Fault", "FaultyStore", "ManualClock", "StoreConformance", "use_store"]
