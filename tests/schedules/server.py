"""The server of the simulation: values that expire, whole commands, and somebody who watches every write."""

from collections.abc import Callable
from typing import Any, NamedTuple

from asyncidem.model import Stored, Swap, matches, owner_of


class Value(NamedTuple):
    """What a key holds; times are the server's milliseconds."""

    data: bytes
    written: int
    expires: int


class Request(NamedTuple):
    """A command as the server carries it out.

    Attributes:
        actor: in whose name it is sent, for the watcher; the server does not look at it.
    """

    op: str
    key: str
    value: bytes = b""
    ttl_ms: int = 0
    expected: bytes = b""
    exact: bool = False
    or_absent: bool = False
    left_ms: int | None = None
    actor: str | None = None


Watcher = Callable[[str, Value | None, bytes | None, Request], None]


class Server:
    """Carries out commands, one at a time, and holds what they wrote.

    Args:
        now: microseconds since the simulation began.
        watcher: is told each write: the key, what was there, what is there now (None: deleted), and the request.
    """

    def __init__(self, now: Callable[[], int], watcher: Watcher) -> None:
        self._now = now
        self._watcher = watcher
        self.values: dict[str, Value] = {}
        self.expired: set[str] = set()
        self.carried_out = 0

    @property
    def now(self) -> int:
        """Return the server's milliseconds."""
        return self._now() // 1000

    def find(self, key: str) -> Value | None:
        """Return what is there."""
        value = self.values.get(key)
        if value is not None and value.expires <= self.now:
            del self.values[key]
            self.expired.add(key)
            return None
        return value

    def execute(self, request: Request) -> Any:
        """Carry a command out, and return its reply."""
        self.carried_out += 1
        reply: Any = getattr(self, f"_{request.op}")(request, self.find(request.key))
        return reply

    def _put(self, request: Request, found: Value | None) -> bytes | None:
        if found is None:
            self._write(request, found)
            return None
        return found.data

    def _probe(self, request: Request, found: Value | None) -> None:
        """Say that the script may run."""

    def _read(self, request: Request, found: Value | None) -> Stored | None:
        return None if found is None else Stored(found.data, found.expires - self.now)

    def _swap(self, request: Request, found: Value | None) -> Swap:
        if found is None:
            if not request.or_absent:
                return Swap(False)
        elif not matches(found.data, request.expected, exact=request.exact) or (
            request.left_ms is not None and found.expires - self.now > request.left_ms
        ):
            return Swap(False, found.data)
        self._write(request, found)
        return Swap(True)

    def _remove(self, request: Request, found: Value | None) -> bool:
        if found is None or not matches(found.data, request.expected, exact=request.exact):
            return False
        return self._delete(request, found)

    # -- what a client without scripts has ------------------------------------------------------------------------------

    def _get(self, request: Request, found: Value | None) -> bytes | None:
        return None if found is None else found.data

    def _pttl(self, request: Request, found: Value | None) -> int:
        return -2 if found is None else found.expires - self.now

    def _set(self, request: Request, found: Value | None) -> bool:
        self._write(request, found)
        return True

    def _delete(self, request: Request, found: Value | None) -> bool:
        if found is None:
            return False
        del self.values[request.key]
        self._watcher(request.key, found, None, request)
        return True

    def _write(self, request: Request, found: Value | None) -> None:
        self.values[request.key] = Value(request.value, self.now, self.now + request.ttl_ms)
        self._watcher(request.key, found, request.value, request)


def actor_of(request: Request) -> str | None:
    """Return in whose name a request of ours is sent: the fence's owner, or the one that a takeover or a put writes."""
    if request.actor is not None:
        return request.actor
    if request.exact and request.op == "swap":
        return owner_of(request.value)
    return owner_of(request.expected) or owner_of(request.value)
