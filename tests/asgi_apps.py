"""A small payment API as ASGI applications of several frameworks, and pure ones, for the tests of the guards."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from asyncidem import current_operation

__all__ = ["Endpoint", "fixed", "json_response", "read_body", "respond"]


async def read_body(receive: Any) -> bytes:
    """Return the whole body of a request."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        assert message["type"] == "http.request"
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def respond(send: Any, status: int, headers: list[tuple[bytes, bytes]], *parts: bytes) -> None:
    """Send a response in one or several pieces."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for number, part in enumerate(parts, 1):
        await send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})


async def json_response(send: Any, status: int, content: Any) -> None:
    """Send JSON, with its length, as frameworks do."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await respond(send, status, headers, body)


def fixed(status: int, headers: list[tuple[bytes, bytes]], *parts: bytes) -> Callable[..., Any]:
    """Return what answers always the same, in one or several pieces."""

    async def answer(_scope: Any, _receive: Any, send: Any) -> None:
        await respond(send, status, headers, *parts)

    return answer


class Endpoint:
    """A pure ASGI application with one effect, which can be held up and told how to answer.

    Attributes:
        calls: a line for every time that it ran: path, body, attempt and downstream key.
        hold: what it waits for after its effect; set at first.
        reached: set when the effect has happened.
    """

    def __init__(self, answer: Callable[..., Any] | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.reached = asyncio.Event()
        self.cancelled = 0
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Charge, wait, answer with the number of the charge."""
        assert scope["type"] == "http"
        body = await read_body(receive)
        op = current_operation()
        call = {
            "path": scope["path"],
            "body": body.decode("latin-1"),
            "attempt": None if op is None else op.attempt,
            "downstream": None if op is None else op.downstream_key,
        }
        self.calls.append(call)
        self.reached.set()
        try:
            await self.hold.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self._answer is None:
            await json_response(send, 201, {"charge": len(self.calls)})
        else:
            await self._answer(scope, receive, send)
