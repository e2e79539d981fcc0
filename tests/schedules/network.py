"""What is between the workers and the server: commands under way, and a store whose primitives are such commands."""

import asyncio
from typing import Any, Final, Protocol

from asyncidem import Store, StoreUnavailableError
from asyncidem.model import Stored, Swap

from schedules.processes import Process
from schedules.server import Request, Server

KEY: Final = "k"


class Network(Protocol):
    """Where commands are until they are done."""

    commands: "list[Command]"
    server: Server


class Command:
    """A command under way, and the caller that waits for its reply.

    Attributes:
        state: `sent`, `answered` (carried out, and its reply is under way) or `late` (nobody waits for it any more, and
            the server may still carry it out).
    """

    def __init__(self, process: Process, request: Request, number: int) -> None:
        self.process = process
        self.request = request
        self.number = number
        self.future: asyncio.Future[Any] = process.create_future()
        self.state = "sent"
        self.reply: Any = None

    @property
    def is_next(self) -> bool:
        """Whether it may be carried out, or its reply arrive."""
        return self.state != "late"

    @property
    def is_late(self) -> bool:
        """Whether the server may carry it out although nobody waits for it."""
        return self.state == "late"

    @property
    def forsaken(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.future.done()

    def __str__(self) -> str:
        return f"{self.request.op} {'lock ' if self.request.key.endswith(':lock') else ''}of P{self.process.number}"

    def execute(self, server: Server) -> None:
        """Let the server carry it out."""
        self.reply = server.execute(self.request)
        self.state = "answered"

    def deliver(self) -> None:
        """Let the reply arrive."""
        if not self.future.done():
            self.future.set_result(self.reply)

    def lose(self) -> None:
        """Let its caller meet an error that says nothing about the outcome."""
        if not self.future.done():
            self.future.set_exception(OSError("connection reset"))

    def drop(self) -> None:
        """Let the reply go."""

    def refuse(self) -> None:
        """Let its caller meet an error that says that nothing was written."""
        if not self.future.done():
            self.future.set_exception(StoreUnavailableError("not sent", outcome_unknown=False))


class NetworkStore(Store):
    """The lifecycle of every store, over primitives that are commands of the simulation."""

    def __init_subclass__(cls) -> None:
        """Accept mutants, which replace what no store may replace."""

    def __init__(self, process: Process, network: Network) -> None:
        super().__init__(clock=process.time, wall=process.wall)
        self._process = process
        self._network = network
        self._sent = 0

    async def send(self, request: Request) -> Any:
        """Send a command, and wait for its reply."""
        self._sent += 1
        command = Command(self._process, request, self._sent)
        self._network.commands.append(command)
        return await command.future

    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        found: bytes | None = await self.send(Request("put", key, value, ttl_ms))
        return found

    async def read(self, key: str) -> Stored | None:
        stored: Stored | None = await self.send(Request("read", key))
        return stored

    async def swap(
        self,
        key: str,
        expected: bytes,
        value: bytes,
        ttl_ms: int,
        *,
        exact: bool,
        or_absent: bool,
        left_ms: int | None = None,
    ) -> Swap:
        swap: Swap = await self.send(Request("swap", key, value, ttl_ms, expected, exact, or_absent, left_ms))
        return swap

    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        removed: bool = await self.send(Request("remove", key, expected=expected, exact=exact))
        return removed
