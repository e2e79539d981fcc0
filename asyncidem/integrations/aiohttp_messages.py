"""Requests and responses of aiohttp, as the rules of guarded endpoints see them, and back."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import stat
from http import HTTPStatus
from pathlib import Path
from typing import Final

from aiohttp import BytesPayload, StreamReader, web
from aiohttp.base_protocol import BaseProtocol

from ..errors import ConfigurationError
from .http import REPLAYED, Answer, Headers, Rules

__all__ = [
    "Body",
    "body_of",
    "headers_of",
    "is_routed",
    "phrase",
    "put",
    "read",
    "replay",
    "request_in",
    "response_of",
    "status_of",
]

ENCODED: Final = (".br", ".gz")
"""Files that a FileResponse sends in the place of the one that it was given."""

EXCEPTIONS: Final[dict[int, type[web.HTTPException]]] = {
    kind.status_code: kind
    for kind in vars(web).values()
    if inspect.isclass(kind) and issubclass(kind, web.HTTPException) and kind.__init__ is web.HTTPException.__init__
}
"""aiohttp's exceptions by status, but those that are made of something else than a response."""


def request_in(*args: object) -> web.Request:
    """Return the request among the arguments of a handler.

    Raises:
        ConfigurationError: there is none.
    """
    for arg in args:
        if isinstance(arg, web.Request):
            return arg
        if isinstance(arg, web.View):
            return arg.request
    raise ConfigurationError("a guarded handler must be called with its web.Request, or be a method of a web.View")


def is_routed(request: web.Request) -> bool:
    """Say whether there is a handler for the request: the router's 404 and 405 come before any refusal of ours."""
    match = request.match_info
    if match.http_exception is not None:
        return False
    handler: object = match.handler
    view = inspect.isclass(handler) and issubclass(handler, web.View)
    return not view or hasattr(handler, request.method.lower())


async def read(request: web.Request, rules: Rules[web.Request]) -> Body:
    """Read the body. What is returned can take its place, so that ``post()`` and ``multipart()`` find it whole, too.

    Raises:
        ProblemError: 413, it is larger than the rules allow; no more than that was read.
    """
    stream = request._payload
    if stream.at_eof():
        data = await request.read()  # there is none, or a middleware has read it: then aiohttp keeps it
    else:
        if (request.content_length or 0) > rules.max_body:
            raise rules.too_large()
        chunks = bytearray()
        while len(chunks) <= rules.max_body and (chunk := await stream.readany()):
            chunks += chunk
        data = bytes(chunks)
    if len(data) > rules.max_body:
        raise rules.too_large()
    return Body(data)


class Body(StreamReader):
    """The body of a request that was read, to be read once more.

    The server tells a request's stream that its client has gone. This one is whole, and stays readable; it is how a
    waiting duplicate hears of it.

    Attributes:
        data: all of it.
        left: set when the client has gone, or the server shuts down.
    """

    __slots__ = ("data", "left")

    def __init__(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        # A protocol without a connection: what is in memory must neither pause nor resume the real one.
        super().__init__(BaseProtocol(loop), max(1, len(data)), loop=loop)
        self.feed_data(data)
        self.feed_eof()
        self.data = data
        self.left = asyncio.Event()

    def set_exception(self, exc: BaseException, exc_cause: BaseException | None = None) -> None:  # noqa: ARG002
        """Take note that the client has gone."""
        self.left.set()


def put(request: web.Request, stream: StreamReader) -> None:
    """Let a request read from ``stream``: the request itself, for what its state holds belongs to all its middlewares."""
    request._payload = stream
    request._cache.pop("content", None)  # where `request.content` keeps the one before


def body_of(response: web.StreamResponse) -> bytes | None:
    """Return the body of a response that can be kept; None of any other."""
    if not isinstance(response, web.Response) or response.prepared or response.compression:
        return None
    body = response.body
    if isinstance(body, BytesPayload):
        return body.decode("latin-1").encode("latin-1")  # its bytes, in whatever encoding they are
    return bytes(body or b"") if isinstance(body, bytes | bytearray | None) else None


def headers_of(response: web.StreamResponse) -> Headers:
    """Return header lines as the bytes that aiohttp sends, with those that it makes of cookies."""
    lines = [*response.headers.items()]
    lines += [("Set-Cookie", cookie.output(header="").lstrip()) for cookie in response.cookies.values()]
    # What cannot be sent as UTF-8 must not fail here, between the effect and its completion.
    return [(name.encode("utf-8", "surrogatepass"), value.encode("utf-8", "surrogatepass")) for name, value in lines]


def status_of(response: web.FileResponse) -> int:
    """Return the status of a file, which aiohttp finds out when it sends it: its own, or 404 if there is none to send.

    It is asked without a thread: an await here would come between the effect and its completion.
    """
    path: Path = response._path
    for candidate in (path, *(path.with_name(path.name + suffix) for suffix in ENCODED)):
        with contextlib.suppress(OSError, ValueError):  # not there, not to be looked at, no name of a file
            if stat.S_ISREG(candidate.stat().st_mode):
                return response.status
    return HTTPStatus.NOT_FOUND


def phrase(status: int) -> str:
    """Return what a status line says of a status unless told otherwise."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _lines_of(headers: Headers) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), line.decode("utf-8", "surrogateescape")) for name, line in headers]


def response_of(answer: Answer) -> web.Response:
    """Return a new response: aiohttp sends each object once. It adds the Content-Length."""
    return web.Response(status=answer.status, reason=answer.reason, headers=_lines_of(answer.headers), body=answer.body)


def replay(answer: Answer) -> web.Response:
    """Return a stored response; raise it if the handler did, for middlewares that make error pages of exceptions."""
    headers = [*answer.headers, REPLAYED]
    if not answer.raised:
        return response_of(answer._replace(headers=headers))
    error = _exception(answer.status)(reason=answer.reason)
    error.body = answer.body
    error.headers.clear()
    error.headers.extend(_lines_of(headers))
    raise error


@functools.cache
def _exception(status: int) -> type[web.HTTPException]:
    """Return an exception of a status, aiohttp's own if it can be made of a response."""
    return EXCEPTIONS.get(status) or type("HTTPException", (web.HTTPException,), {"status_code": status})
