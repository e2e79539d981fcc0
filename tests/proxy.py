"""A TCP proxy between a client and a Redis server that loses, holds and counts requests and replies on demand."""

import asyncio
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from servers import HOST, free_port


def frame_end(data: bytes | bytearray, start: int = 0) -> int:
    """Return where the RESP2 or RESP3 value that begins at `start` ends, or -1 when it is not complete yet."""
    line_end = data.find(b"\r\n", start)
    if line_end < 0:
        return -1
    kind, end = data[start : start + 1], line_end + 2
    if kind in b"+-:_#,(":
        return end
    size = int(data[start + 1 : line_end])
    if kind in b"$!=":
        end += max(size + 2, 0) if size >= 0 else 0
        return end if end <= len(data) else -1
    if kind not in b"*~>%|":
        message = f"not RESP: {bytes(data[start : start + 40])!r}"
        raise ValueError(message)
    # A map is pairs, and attributes come before the value that they describe.
    values = size * 2 if kind in b"%|" else size
    for _ in range(values + (kind == b"|")):
        end = frame_end(data, end)
        if end < 0:
            return -1
    return end


@dataclass
class _Fault:
    """A fault that waits for matching requests: `left` of them, or all when it is None."""

    match: bytes | None = None
    left: int | None = None

    def takes(self, request: bytes) -> bool:
        if self.left == 0 or (self.match is not None and self.match not in request):
            return False
        if self.left is not None:
            self.left -= 1
        return True


@dataclass(frozen=True, slots=True)
class _Pending:
    """What becomes of the reply to a request that the server has got."""

    drop: bool
    hold: bool


class Proxy:
    r"""A proxy that knows where requests and replies end; its faults hold for all connections, old and new.

    `match` is a piece of the request's bytes as they are sent, such as a key or `b"\r\nSET\r\n"` (`b"SET"` would
    match CLIENT SETINFO too); None matches each request, those of a connection's handshake included. The proxy runs no
    task but a connection's set-up.
    """

    def __init__(self, target_host: str, target_port: int) -> None:
        """Prepare a proxy to the server at `target_host` and `target_port`; it listens on a port of its own."""
        self.target = (target_host, target_port)
        self.port = free_port()
        self.connections = 0
        self.requests: list[bytes] = []
        self.round_trips = 0
        self.reply_held = asyncio.Event()
        self.request_held = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._clear()

    @property
    def url(self) -> str:
        """Return the URL of database 0 through the proxy."""
        return f"redis://{HOST}:{self.port}/0"

    @property
    def open_connections(self) -> int:
        """Return how many connections are open now."""
        return len(self._links)

    async def start(self) -> Self:
        """Listen, on the same port each time."""
        if self._server is None:
            self._server = await asyncio.get_running_loop().create_server(self._accept, HOST, self.port)
        return self

    async def close(self) -> None:
        """Stop listening, cut all connections and leave no task behind."""
        self._clear()
        self.refuse()
        connecting = list(self._connecting)
        for task in connecting:
            task.cancel()
        await asyncio.gather(*connecting, return_exceptions=True)
        # A transport tells its protocol of its end in the next turn of the loop.
        await asyncio.sleep(0)

    async def __aenter__(self) -> Self:
        """Start the proxy."""
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Close the proxy."""
        await self.close()

    async def until_open(self, n: int) -> None:
        """Wait until so many connections are open: a client's close is heard of some turns of the loop later.

        Raises:
            TimeoutError: it took more than a second.
        """
        async with asyncio.timeout(1):
            while self.open_connections != n:
                await asyncio.sleep(0)

    def drop_replies(self, n: int = 1, match: bytes | None = None) -> None:
        """Forward the next `n` matching requests, and cut the connection where the reply would be passed on."""
        self._drop_replies = _Fault(match, n)

    def drop_requests(self, n: int = 1, match: bytes | None = None) -> None:
        """Cut the connection at each of the next `n` matching requests, which the server never gets."""
        self._drop_requests = _Fault(match, n)

    def black_hole(self, *, requests: bool = False) -> None:
        """Accept connections and pass no reply on; with `requests`, the server does not get the requests either."""
        self._swallow_replies = True
        self._swallow_requests = requests

    def hold_replies(self, match: bytes | None = None) -> None:
        """Keep replies to matching requests, and all that follow them on their connection, until `release_replies`.

        `reply_held` is set when there is one.
        """
        self._hold_replies = _Fault(match, None)

    def release_replies(self) -> None:
        """Pass on what was held, and hold no more."""
        self._hold_replies = _Fault(left=0)
        self.reply_held.clear()
        for link in tuple(self._links):
            link.release_replies()

    def hold_requests(self, match: bytes | None = None) -> None:
        """Keep matching requests, and all that follow them on their connection, until `release_requests`.

        They outlive their client: what it sent before it gave up reaches the server late. `request_held` is set when
        there is one.
        """
        self._hold_requests = _Fault(match, None)

    def release_requests(self) -> None:
        """Forward what was held, and hold no more."""
        self._hold_requests = _Fault(left=0)
        self.request_held.clear()
        for link in tuple(self._links):
            link.release_requests()

    def cut(self) -> None:
        """Cut all connections that are open now."""
        for link in tuple(self._links):
            link.cut()

    def refuse(self) -> None:
        """Cut all connections and refuse new ones, as a dead server's machine does; `start` listens again."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()

    def heal(self) -> None:
        """End all faults: what was held is passed on, what was swallowed stays lost."""
        self._clear()
        self.release_requests()
        self.release_replies()

    def reset_counters(self) -> None:
        """Begin to count anew, for example after a connection's handshake."""
        self.connections = self.round_trips = 0
        self.requests.clear()

    def _clear(self) -> None:
        self._drop_replies = self._drop_requests = self._hold_replies = self._hold_requests = _Fault(left=0)
        self._swallow_replies = self._swallow_requests = False

    def _accept(self) -> asyncio.Protocol:
        link = _Link(self)
        return link.client

    def _connected(self, link: "_Link") -> None:
        self.connections += 1
        self._links.add(link)
        task = asyncio.get_running_loop().create_task(link.connect())
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)


class _Side(asyncio.Protocol):
    """One end of a connection: it cuts the stream into frames."""

    def __init__(self, link: "_Link", *, client: bool) -> None:
        self.link = link
        self.is_client = client
        self.transport: asyncio.Transport | None = None
        self.buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self.is_client:
            # Nothing is read before there is a server to send it to.
            transport.pause_reading()
            self.link.proxy._connected(self.link)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := frame_end(self.buffer)) >= 0:
            frame = bytes(self.buffer[:end])
            del self.buffer[:end]
            if self.is_client:
                self.link.request(frame)
            else:
                self.link.reply(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.is_client:
            self.link.client_left()
        else:
            self.link.cut()

    def write(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)


class _Link:
    """A client's connection and its own connection to the server."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.client = _Side(self, client=True)
        self.server = _Side(self, client=False)
        self.pending: deque[_Pending] = deque()
        self.held_requests: list[bytes] = []
        self.held_replies: list[bytes] = []
        self.burst = False

    async def connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: self.server, *self.proxy.target)
        except OSError:
            self.cut()
            return
        if self.client.transport is None:
            self.cut()
        else:
            self.client.transport.resume_reading()

    def request(self, frame: bytes) -> None:
        proxy = self.proxy
        if self.client.transport is None or self.client.transport.is_closing():
            return
        proxy.requests.append(frame)
        if proxy._drop_requests.takes(frame):
            self.cut()
        elif self.held_requests or proxy._hold_requests.takes(frame):
            self.held_requests.append(frame)
            proxy.request_held.set()
        else:
            self.forward(frame)

    def forward(self, frame: bytes) -> None:
        proxy = self.proxy
        if proxy._swallow_requests:
            return
        self.burst = True
        self.pending.append(_Pending(drop=proxy._drop_replies.takes(frame), hold=proxy._hold_replies.takes(frame)))
        self.server.write(frame)

    def reply(self, frame: bytes) -> None:
        proxy = self.proxy
        # A push message (RESP3) answers nothing.
        pending = (
            self.pending.popleft() if self.pending and not frame.startswith(b">") else _Pending(drop=False, hold=False)
        )
        if pending.drop:
            self.cut()
        elif proxy._swallow_replies:
            pass
        elif pending.hold or self.held_replies:
            self.held_replies.append(frame)
            proxy.reply_held.set()
        else:
            self.pass_on(frame)

    def pass_on(self, frame: bytes) -> None:
        if self.burst:
            self.burst = False
            self.proxy.round_trips += 1
        self.client.write(frame)

    def release_replies(self) -> None:
        # A request that was sent while replies were held may still be unanswered, marked to be held.
        self.pending = deque(_Pending(drop=pending.drop, hold=False) for pending in self.pending)
        frames, self.held_replies = self.held_replies, []
        for frame in frames:
            self.pass_on(frame)

    def release_requests(self) -> None:
        frames, self.held_requests = self.held_requests, []
        for frame in frames:
            self.forward(frame)
        if self.client.transport is None:
            self.client_left()

    def client_left(self) -> None:
        if self.held_requests:
            return
        self.proxy._links.discard(self)
        if self.server.transport is not None:
            # Unlike abort, close sends what is still buffered.
            self.server.transport.close()

    def cut(self) -> None:
        self.held_requests.clear()
        self.held_replies.clear()
        self.proxy._links.discard(self)
        for side in (self.client, self.server):
            if side.transport is not None:
                side.transport.abort()
