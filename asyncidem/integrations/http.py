"""The rules of guarded HTTP endpoints, for every transport: which requests, which key, what is stored, what is answered.

Nothing here reads or writes. The rules follow the IETF draft *The Idempotency-Key HTTP Header Field* (-07, October
2025, expired since), RFC 9457 for what a refusal looks like, and what payment APIs do where those are silent:

1.  A key belongs to a principal, a method and a route: nobody gets another's answer.
2.  A malformed key is refused before anything is looked up; a missing one only where it is required.
3.  A retry gets the status, the headers and the bytes of the first answer.
4.  2xx and the deterministic among 4xx are stored. 5xx and exceptions are failures, and ``on_failure`` decides.
    All else releases the key: the request was not carried out, or may come out otherwise the next time.
5.  An answer that cannot be kept goes to its client; the operation has completed, and no duplicate runs again.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import Any, Final, Generic, Literal, NamedTuple, TypeAlias, TypedDict, TypeVar
from urllib.parse import urlsplit
from uuid import UUID

from ..codecs import Codec
from ..errors import (
    CodecError,
    CompletionError,
    ConfigurationError,
    FingerprintMismatchError,
    IdempotencyError,
    InProgressError,
    LeaseLostError,
    ResultUnavailableError,
    StoreError,
)
from ..idempotency import Idempotency
from ..keys import digest
from ..operation import Operation
from ..options import Choice, Overrides, is_coroutine_callable
from .fields import MalformedKeyError, parse_key

__all__ = [
    "LATE_REFUSALS",
    "MIB",
    "REFUSALS",
    "REPLAYED",
    "Answer",
    "HTTPFailure",
    "HTTPOptions",
    "Headers",
    "Problem",
    "ProblemError",
    "Rules",
    "Verdict",
    "multipart",
]

R = TypeVar("R")

MIB: Final = 1024 * 1024

KEY_HEADER: Final = "Idempotency-Key"
REPLAYED: Final = (b"idempotent-replayed", b"true")

Headers: TypeAlias = list[tuple[bytes, bytes]]
"""Header lines in their order, as bytes; names in any case."""

Verdict: TypeAlias = Literal["store", "release", "fail"]

NOT_STORED: Final = frozenset({401, 403, 404, 405, 406, 408, 413, 415, 421, 423, 425, 429})
"""They say that the request was not carried out, or that it may be by and by."""

PER_CONNECTION: Final = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade"),
        *(b"content-length", b"date", b"server", REPLAYED[0]),
    }
)
"""Headers of one answer on one connection (RFC 9110, 7.6.1), and those that are made anew for each."""

BODILESS: Final = frozenset({204, 205, 304})


LATE_REFUSALS: Final = (LeaseLostError, CompletionError)
"""What the end of an operation may raise that its client is told instead of what the endpoint answered."""

REFUSALS: Final = (FingerprintMismatchError, InProgressError, ResultUnavailableError, CodecError, StoreError)
"""What the beginning of an operation may raise that a client is told."""


class HTTPFailure(Exception):  # noqa: N818 - it is no error of this library, but what an endpoint answered
    """A response that is a failure: what ``on_failure`` gets where an endpoint answered instead of raising.

    Attributes:
        status: of the response, 500 or higher unless ``should_store`` says otherwise.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"the endpoint answered {status}")
        self.status = status


class NotCarriedOutError(Exception):
    """A response that releases the key, whatever ``on_failure`` says. It leaves no transport."""


class Problem(NamedTuple):
    """A refusal, as RFC 9457 has it.

    Attributes:
        status: 400, 403, 409, 413, 422 or 503.
        kind: the last part of its type.
        title: the same for all of its kind.
        detail: what to do about this one.
        retry_after: whole seconds, at least 1; None where a retry makes no sense.
    """

    status: int
    kind: str
    title: str
    detail: str
    retry_after: int | None = None

    def answer(self, documentation_url: str | None) -> Answer:
        """Return the response."""
        kind = f"urn:asyncidem:{self.kind}" if documentation_url is None else f"{documentation_url}#{self.kind}"
        body = {"type": kind, "title": self.title, "status": self.status, "detail": self.detail}
        headers: Headers = [(b"content-type", b"application/problem+json"), (b"cache-control", b"no-store")]
        if documentation_url is not None:
            headers.append((b"link", f'<{documentation_url}>; rel="describedby"'.encode("ascii")))
        if self.retry_after is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after))
        return Answer(self.status, headers, json.dumps(body).encode())


class ProblemError(Exception):
    """A request that is refused before its endpoint runs.

    Attributes:
        problem: what to answer.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


class Answer(NamedTuple):
    """A response that is whole: status, header lines without Content-Length, and body.

    Attributes:
        reason: phrase of the status line, where a transport has it and it is not the status's own; else None.
        raised: whether the endpoint raised it, where a transport has such responses: code around it sees the difference.
    """

    status: int
    headers: Headers
    body: bytes
    reason: str | None = None
    raised: bool = False

    def lines(self, *, replayed: bool = False) -> Headers:
        """Return its header lines as they are sent, with the Content-Length that it has."""
        lines = [*self.headers]
        if self.status not in BODILESS:
            lines.append((b"content-length", b"%d" % len(self.body)))
        if replayed:
            lines.append(REPLAYED)
        return lines


UNKEPT: Final = Answer(0, [], b"")
"""Stands for an answer that cannot be kept: its operation completes without a result."""


class AnswerCodec(Codec):
    """Answers as JSON: ``{"status": 201, "headers": [["content-type", "text/plain"]], "body": "ok"}``.

    Header lines are Latin-1, so that their bytes come back. A body that is not UTF-8 is ``"base64"`` instead.
    """

    def encode(self, value: object) -> str:
        """Return an answer as text.

        Raises:
            CodecError: it cannot be kept.
        """
        if not isinstance(value, Answer) or value is UNKEPT:
            raise CodecError("the response cannot be kept: it is streamed, too large, or encoded")
        headers = [[name.decode("latin-1"), line.decode("latin-1")] for name, line in value.headers]
        stored: dict[str, Any] = {"status": value.status, "headers": headers}
        try:
            stored["body"] = value.body.decode()
        except UnicodeDecodeError:
            stored["base64"] = base64.b64encode(value.body).decode("ascii")
        if value.reason is not None:
            stored["reason"] = value.reason
        if value.raised:
            stored["raised"] = True
        return json.dumps(stored)

    def decode(self, text: str, annotation: Any) -> Answer:  # noqa: ARG002 (the contract's name)
        """Return the answer.

        Raises:
            CodecError: the text is that of something else.
        """
        try:
            stored = json.loads(text)
            headers = [(name.encode("latin-1"), line.encode("latin-1")) for name, line in stored["headers"]]
            body = base64.b64decode(stored["base64"]) if "base64" in stored else stored["body"].encode()
            return Answer(int(stored["status"]), headers, body, stored.get("reason"), stored.get("raised", False))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise CodecError("the stored result is no HTTP response") from None


class HTTPOptions(TypedDict, Generic[R], total=False):
    """The options that every guard has; :class:`Rules` says what they mean."""

    methods: Collection[str]
    wait: float | timedelta | None
    strict: bool
    max_body: int
    max_response: int
    should_store: Callable[[int], bool] | None
    fingerprint: Callable[[R, bytes], str | bytes] | None
    documentation_url: str | None
    store_cookies: bool


class Rules(Generic[R]):
    """What a guard decides, over the request type ``R`` of its transport.

    Args:
        idempotency: where operations run. Its lease is renewed while an endpoint runs.
        principal: who asks, so that nobody gets another's answer: a function, sync or async, of the request. None puts
            all clients into one space of keys: only where there is one client.
        required: whether a request without a key is refused.
        methods: which requests are guarded; all others pass untouched.
        wait: how long a duplicate of a running request waits for its answer, in seconds or as ``timedelta``; None is
            what ``idempotency`` has, which refuses it at once unless told otherwise.
        strict: whether keys must be strings in quotes, as the draft has it; else raw ones are taken too.
        max_body: bytes of a request with a key that are read into memory; a longer one is refused with 413.
        max_response: bytes of a response that are stored.
        should_store: says of a status whether it is a result to keep; None for the rule above.
        fingerprint: chooses what must be equal for a key to be used again: a function of request and body; by
            default method, path, query, content type and body (of multipart, whose boundaries change, not the body).
        documentation_url: where the API's use of the header is described; it is the type of every problem.
        store_cookies: whether Set-Cookie is replayed.

    Attributes:
        waits: whether duplicates wait.

    Raises:
        ConfigurationError: an option cannot work.
    """

    def __init__(
        self,
        idempotency: Idempotency,
        *,
        principal: Callable[[R], Any] | None,
        required: bool,
        methods: Collection[str] = ("POST", "PATCH"),
        wait: float | timedelta | None = None,
        strict: bool = False,
        max_body: int = MIB,
        max_response: int = MIB,
        should_store: Callable[[int], bool] | None = None,
        fingerprint: Callable[[R, bytes], str | bytes] | None = None,
        documentation_url: str | None = None,
        store_cookies: bool = False,
        **unknown: object,
    ) -> None:
        if unknown:
            raise ConfigurationError(
                f"unknown option {next(iter(unknown))!r}; a guard has principal, required, "
                f"{', '.join(sorted(HTTPOptions.__annotations__))}; lease, ttl, on_failure and their like are options of "
                "its Idempotency"
            )
        if not isinstance(idempotency, Idempotency):  # pyright: ignore[reportUnnecessaryIsInstance]
            given = type(idempotency).__name__
            raise ConfigurationError(f"idempotency must be an Idempotency such as Idempotency(store), not {given}")
        if principal is not None and not callable(principal):
            raise ConfigurationError(
                f"principal must be a function of the request, or None for a single client, not {principal!r}"
            )
        _plain_or_none("should_store", should_store, "a status")
        _plain_or_none("fingerprint", fingerprint, "request and body")
        self.idempotency = idempotency
        self.principal = principal
        self.required = _flag("required", required)
        self.methods = _methods(methods)
        self.max_body = _size("max_body", max_body)
        self.documentation_url = _url(documentation_url)
        self._max_response = _size("max_response", max_response)
        self.strict = _flag("strict", strict)
        self._should_store = should_store
        self._fingerprint = fingerprint
        self._store_cookies = _flag("store_cookies", store_cookies)
        options = idempotency._options
        self._on_failure: Choice | Callable[[Exception], Choice] = options.on_failure
        overrides: Overrides = {
            "codec": AnswerCodec(),
            "on_failure": self._choice,
            "replay_exceptions": (),
            "map_replay": None,
        }
        if wait is not None:
            overrides["wait"] = wait
        self._options = options.override(overrides)
        self.waits = self._options.wait is not None

    # -- the request --------------------------------------------------------------------------------------------------

    def guards(self, method: str) -> bool:
        """Say whether requests of a method are guarded."""
        return method in self.methods

    def key(self, lines: Sequence[str]) -> str | None:
        """Return the idempotency key of a request; None if it has none.

        Args:
            lines: the value of every line of the header, as Latin-1.

        Raises:
            ProblemError: 400, it is malformed.
        """
        try:
            return parse_key(lines, strict=self.strict)
        except MalformedKeyError as error:
            detail = f"{KEY_HEADER} is malformed: {error}."
            raise ProblemError(Problem(400, "malformed-key", f"{KEY_HEADER} is malformed", detail)) from None

    def missing(self) -> ProblemError:
        """Return the refusal of a request without a key."""
        detail = f"This operation is guarded against repetition: send a unique {KEY_HEADER} with it."
        return ProblemError(Problem(400, "missing-key", f"{KEY_HEADER} is missing", detail))

    def too_large(self) -> ProblemError:
        """Return the refusal of a request that is longer than ``max_body``."""
        detail = f"A request with an {KEY_HEADER} may have {self.max_body} bytes here."
        return ProblemError(Problem(413, "content-too-large", "Content too large", detail))

    async def principal_of(self, request: R) -> str | None:
        """Return who asks; None where ``principal=None`` was written out.

        Raises:
            ProblemError: 403, nobody was found.
            ConfigurationError: the function returned something else than text, a whole number or a UUID.
        """
        if self.principal is None:
            return None
        found: Any = self.principal(request)
        return self.known(await found if inspect.isawaitable(found) else found)

    def known(self, principal: Any) -> str:
        """Return a principal as text. Raises what :meth:`principal_of` raises."""
        if principal is None or principal == "":
            detail = f"{KEY_HEADER} is accepted from authenticated clients only."
            raise ProblemError(Problem(403, "no-principal", "Nobody to answer for", detail))
        if isinstance(principal, bool) or not isinstance(principal, str | int | UUID):
            raise ConfigurationError(
                f"principal must give text, a whole number or a UUID, not {type(principal).__name__}: name the client by "
                "what stays the same from request to request"
            )
        return str(principal)

    def operation(self, principal: str | None, method: str, route: str, key: str, mark: object) -> Operation:
        """Return the operation of a request.

        Args:
            principal: who asks.
            method: of the request.
            route: template of the route, else the whole path.
            key: the idempotency key that the client sent.
            mark: what :meth:`mark` returned.
        """
        # JSON joins them without ambiguity, and the digest bounds what is stored and logged.
        full = digest(json.dumps([principal, method, route, key]))
        idem, options = self.idempotency, self._options
        return Operation(
            idem._engine, idem._full(full, options), f"{method} {route}", idem._fingerprint(mark), Any, options
        )

    def mark(self, request: R, method: str, path: str, query: str, content_type: str, body: bytes) -> object:
        """Return what is fingerprinted of a request.

        Args:
            request: what the user's own function gets.
            method: of the request.
            path: the whole path, not the template.
            query: without the question mark.
            content_type: the header, empty if there is none.
            body: all of it.

        Raises:
            ConfigurationError: the user's function returned neither text nor bytes.
        """
        if self._fingerprint is not None:
            chosen = self._fingerprint(request, body)
            if not isinstance(chosen, str | bytes):
                raise ConfigurationError(f"fingerprint must give text or bytes, not {type(chosen).__name__}")
            return chosen.encode("utf-8", "surrogatepass") if isinstance(chosen, str) else chosen
        essence = content_type.partition(";")[0].strip().lower()
        content = "" if multipart(essence) else hashlib.sha256(body).hexdigest()
        return json.dumps([method, path, query, essence, content])  # escapes hold what a path may: NUL, surrogates

    # -- the response -------------------------------------------------------------------------------------------------

    def verdict(self, status: int) -> Verdict:
        """Say what becomes of an operation that was answered with ``status``.

        Raises:
            ConfigurationError: ``should_store`` returned something else than a bool.
        """
        stored = 200 <= status < 300 or (400 <= status < 500 and status not in NOT_STORED)
        if self._should_store is not None:
            stored = self._should_store(status)
            if not isinstance(stored, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigurationError(f"should_store must give True or False, not {stored!r}")
        if stored:
            return "store"
        return "fail" if status >= 500 else "release"

    def keepable(self, headers: Headers, length: int) -> bool:
        """Say whether a response of one piece can be kept: it is not too large, and not encoded for one client."""
        if length > self._max_response:
            return False
        return all(
            name.lower() != b"content-encoding" or line.strip().lower() in (b"", b"identity") for name, line in headers
        )

    def kept(
        self, status: int, headers: Headers, body: bytes, *, reason: str | None = None, raised: bool = False
    ) -> Answer:
        """Return what is stored of a response: the same, without what belongs to one connection or one moment."""
        if not self.keepable(headers, len(body)):
            return UNKEPT
        named = {
            option.strip().lower()
            for name, line in headers
            if name.lower() == b"connection"
            for option in line.split(b",")
        }
        dropped = PER_CONNECTION | named
        if not self._store_cookies:
            dropped |= {b"set-cookie"}
        lines = [
            (name, line)
            for name, line in headers
            if (lower := name.lower()) not in dropped and not lower.startswith(b"access-control-")
        ]
        return Answer(status, lines, body, reason, raised)

    @staticmethod
    def failure(status: int, verdict: Verdict) -> Exception:
        """Return what an operation failed with whose response is not stored."""
        return HTTPFailure(status) if verdict == "fail" else NotCarriedOutError(f"the endpoint answered {status}")

    def _choice(self, error: Exception) -> Literal["release", "keep"]:
        if isinstance(error, NotCarriedOutError):
            return "release"
        choice = self._on_failure
        return choice(error) if callable(choice) else choice

    # -- refusals -----------------------------------------------------------------------------------------------------

    def problem(self, error: IdempotencyError) -> Problem:
        """Return what a client is told of an operation that could not run, or whose end was not stored."""
        if isinstance(error, FingerprintMismatchError):
            detail = f"This {KEY_HEADER} was used with another request: send a new one with a new operation."
            return Problem(422, "key-reused", f"{KEY_HEADER} is already used", detail)
        if isinstance(error, InProgressError | LeaseLostError):
            # The owner that replaced this one answers for the key: it must not have two answers.
            seconds = error.retry_after if isinstance(error, InProgressError) else 0
            detail = f"A request with this {KEY_HEADER} is being processed: repeat it later."
            title = "A request is outstanding for this Idempotency-Key"
            return Problem(409, "in-progress", title, detail, max(1, math.ceil(seconds)))
        if isinstance(error, ResultUnavailableError | CodecError):
            detail = f"The request with this {KEY_HEADER} was processed; its response was not kept. Do not repeat it."
            return Problem(409, "response-not-kept", "Processed before, and the response is not kept", detail)
        detail = "The request was not processed, or its outcome is not known: repeat it with the same key."
        return Problem(503, "store-unavailable", "Idempotency is not available", detail, 1)


def multipart(content_type: str) -> bool:
    """Say whether a body is in parts, whose boundaries differ from one honest retry to the next."""
    return content_type.strip().lower().startswith("multipart/")


def _flag(option: str, given: Any) -> bool:
    if not isinstance(given, bool):
        raise ConfigurationError(f"{option} must be True or False, not {given!r}")
    return given


def _size(option: str, given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise ConfigurationError(f"{option} must be a number of bytes, not {given!r}")
    return given


def _methods(given: Any) -> frozenset[str]:
    if isinstance(given, str) or not isinstance(given, Collection):
        raise ConfigurationError(f"methods must be a collection such as ('POST', 'PATCH'), not {given!r}")
    methods: list[Any] = [*given]
    for method in methods:
        if not isinstance(method, str) or not method.isascii() or not method.isupper():
            raise ConfigurationError(f"a method must be upper-case text such as 'POST', not {method!r}")
    return frozenset(methods)


def _url(given: Any) -> str | None:
    if given is None:
        return None
    if isinstance(given, str) and given.isascii() and given.isprintable() and not set(' <>"#') & set(given):
        with contextlib.suppress(ValueError):  # brackets that hold no address
            parts = urlsplit(given)
            if parts.scheme in ("http", "https") and parts.netloc:
                return given
    raise ConfigurationError(
        f"documentation_url must be an absolute http(s) URL in ASCII without spaces and fragment, not {given!r}"
    )


def _plain_or_none(option: str, given: Any, of: str) -> None:
    if given is not None and (not callable(given) or is_coroutine_callable(given)):
        raise ConfigurationError(f"{option} must be a plain function of {of}, not {given!r}")
