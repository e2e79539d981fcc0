"""The private part of redis-py that multiplexing needs, all of it: the transport under a connection.

Over the public methods of a connection (``send_packed_command`` and a task around ``read_response``) a lone caller needs
1.2 times the time, and a thousand get two thirds of the commands a second. What is not there as expected, in another
version or in a client that only looks like redis-py's, raises :class:`NotMultiplexableError`, and the store takes the
plain path.
"""

from __future__ import annotations

import asyncio
from typing import Any

from redis.exceptions import ConnectionError as BrokenConnectionError

from ..errors import StoreError

__all__ = ["NotMultiplexableError", "Wire", "forget_connections", "give_back"]


class NotMultiplexableError(StoreError):
    """The connection has no transport that a protocol of ours could serve; nothing was sent."""


class Wire(asyncio.Protocol):
    """A protocol that serves the transport of a connection which redis-py made and introduced to the server."""

    transport: asyncio.Transport
    _former: asyncio.BaseProtocol
    _writer: Any  # it warns, and closes the transport, when it is collected before it is closed

    def take_over(self, connection: Any) -> bytes:
        """Serve the transport of ``connection`` from now on; the connection is left without one.

        Returns:
            What the server sent behind the handshake, and nobody has read.

        Raises:
            NotMultiplexableError: it has none that can be served.
            redis.exceptions.ConnectionError: the server has ended it, or redis-py has read half of something.
        """
        try:
            reader = connection._reader
            parsed = getattr(getattr(connection, "_parser", None), "_reader", None)  # of hiredis
            half = parsed is not None and parsed.has_data()
            unread, ended = bytes(reader._buffer), reader.at_eof()
            writer = connection._writer
            transport = writer.transport
            former, set_protocol = transport.get_protocol(), transport.set_protocol
            connection._reader = connection._writer = None
        except (AttributeError, TypeError) as error:
            raise NotMultiplexableError(f"{type(connection).__name__} has no transport of its own: {error}") from error
        self.transport, self._former, self._writer = transport, former, writer
        set_protocol(self)
        if half or ended or transport.is_closing():
            transport.abort()
            what = "sent what nobody had asked for" if half else "closed the connection"
            raise BrokenConnectionError(f"the server {what} behind the handshake")
        return unread

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the streams end that redis-py had opened."""
        self._former.connection_lost(exc)


def give_back(node: Any, connection: Any) -> None:
    """Give a connection back to a cluster node's own; older versions have no method for it."""
    release = getattr(node, "release", None)
    if release is None:
        node._free.append(connection)
    else:
        release(connection)


def forget_connections(node: Any) -> list[Any]:
    """Take a cluster node's connections of another loop or process from it, and return them."""
    taken: list[Any] = []
    for name in ("_free", "_connections"):
        connections = getattr(node, name, None)
        if connections is not None:
            taken.extend(connections)
            connections.clear()
    return taken
