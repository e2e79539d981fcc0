"""The guard of an HTTP API on Lambda: API Gateway (REST and HTTP APIs), function URLs and ALB.

The rules are those of every transport (:mod:`asyncidem.integrations.http`). A response is whole when the handler
returns, so that it is stored before its client sees any of it.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, NamedTuple, ParamSpec, TypeAlias, Unpack, cast

from ...errors import ConfigurationError
from ...idempotency import Idempotency
from ...options import is_coroutine_callable
from ..guarding import begin, fail, settle
from ..http import (
    LATE_REFUSALS,
    REFUSALS,
    REPLAYED,
    Answer,
    Headers,
    HTTPFailure,
    HTTPOptions,
    Problem,
    ProblemError,
    Rules,
)
from .events import Request, caller, read_request

__all__ = ["idempotent_api"]

P = ParamSpec("P")

Event: TypeAlias = Any
Handler: TypeAlias = Callable[[Any, Any], Coroutine[Any, Any, Any]]

ENCODED: Final = (b":base64", b"true")
"""A line of a stored answer whose body the handler had encoded, and that is given again so. No header has this name."""


def idempotent_api(
    idem: Idempotency,
    /,
    *,
    required: bool = False,
    principal: Callable[[Any], Any] | None = caller,
    **options: Unpack[HTTPOptions[Any]],
) -> Callable[[Handler], Handler]:
    """Guard the requests of an HTTP API that carry an ``Idempotency-Key``; all others pass untouched.

    ::

        @lambda_handler
        @idempotent_api(idem)
        async def handler(event, context):
            return {"statusCode": 201, "headers": {"content-type": "application/json"}, "body": "..."}

    A retry gets status, headers and body of the first answer, with ``Idempotent-Replayed: true``. What is refused is
    answered with problem+json. An answer without ``statusCode``, which HTTP APIs and function URLs take for a JSON body
    with status 200, is given that form.

    Args:
        idem: where operations run.
        required: whether a request without a key is refused.
        principal: who asks, as a function, sync or async, of the event. By default whoever API Gateway has
            authenticated: the ``principalId`` of a Lambda authorizer (one that gives all the same puts all into one
            space), the subject of a JWT, the ARN of an IAM identity, or the API key. A request of nobody is refused with
            403. ALB names nobody: there the function must be written out, or None for an API with a single client.
        **options: the further ones of :class:`~asyncidem.integrations.http.Rules`.

    Raises:
        ConfigurationError: an option cannot work; at a request, the event is none of an HTTP API, or of ALB without
            ``principal``.
    """
    rules: Rules[Any] = Rules(idem, principal=principal, required=required, **options)

    def decorate(fn: Handler, /) -> Handler:
        if not is_coroutine_callable(fn):
            raise ConfigurationError(f"@idempotent_api takes a coroutine function of event and context, not {fn!r}")

        @functools.wraps(fn)
        async def guarded(event: Any, context: Any = None) -> Any:
            request = read_request(event)
            if not rules.guards(request.method):
                return await fn(event, context)
            try:
                key = rules.key(request.lines("idempotency-key"))
                if key is None:
                    if rules.required:
                        raise rules.missing()
                    return await fn(event, context)
                return await _guard(rules, key, request, fn, event, context)
            except ProblemError as refusal:
                return response(request, refusal.problem.answer(rules.documentation_url))

        return guarded

    return decorate


async def _guard(rules: Rules[Any], key: str, request: Request, fn: Handler, event: Any, context: Any) -> Any:
    principal = await rules.principal_of(event)
    if len(request.body) > rules.max_body:
        raise rules.too_large()
    content_type = (request.lines("content-type") or [""])[0]
    mark = rules.mark(event, request.method, request.path, request.query, content_type, request.body)
    op = rules.operation(principal, request.method, request.route, key, mark)
    try:
        await begin(op, None)
    except REFUSALS as error:
        return _refusal(rules, request, rules.problem(error))
    if op.replayed:
        return response(request, op.result, replayed=True)
    # From here on the operation has to be settled, whatever happens.
    try:
        result = await fn(event, context)
    except BaseException as error:
        try:
            await fail(op, error)
        except LATE_REFUSALS as lost:
            return _refusal(rules, request, rules.problem(lost))
        raise
    try:
        given = _read(request, result)
    except (
        AttributeError,
        TypeError,
        ValueError,
    ):  # headers that are a list, a lone surrogate: the gateway says 502, too
        given = None
    try:
        if given is None:
            await fail(op, HTTPFailure(502))  # what the gateway answers
            return result
        await settle(op, rules, given.status, given.headers, given.body)
    except LATE_REFUSALS as lost:
        return _refusal(rules, request, rules.problem(lost))
    return given.result


def _refusal(rules: Rules[Any], request: Request, problem: Problem) -> dict[str, Any]:
    return response(request, problem.answer(rules.documentation_url))


# -- answers -----------------------------------------------------------------------------------------------------------


class _Given(NamedTuple):
    """What a handler answered.

    Attributes:
        status: of the response.
        headers: its lines.
        body: its bytes.
        result: what Lambda is given.
    """

    status: int
    headers: Headers
    body: bytes
    result: Any


def response(request: Request, answer: Answer, *, replayed: bool = False) -> dict[str, Any]:
    """Return an answer in the form that the sender of a request takes.

    API Gateway and ALB say how long a body is.
    """
    encoded = ENCODED in answer.headers
    body = ""
    if not encoded:
        try:
            body = answer.body.decode()
        except UnicodeDecodeError:
            encoded = True
    lines: dict[str, list[str]] = {}
    for name, value in (*answer.headers, *((REPLAYED,) if replayed else ())):
        if name != ENCODED[0]:
            lines.setdefault(name.decode("latin-1"), []).append(value.decode("utf-8", "replace"))
    result: dict[str, Any] = {"statusCode": answer.status}
    if request.form == "v2":
        cookies = [value for name in list(lines) if name.lower() == "set-cookie" for value in lines.pop(name)]
        if cookies:
            result["cookies"] = cookies
        result["headers"] = {name: ", ".join(values) for name, values in lines.items()}
    elif request.form == "alb" and request.multi:
        result["multiValueHeaders"] = lines
    else:
        result["headers"] = {name: values[-1] for name, values in lines.items()}
        if request.form == "v1" and any(len(values) > 1 for values in lines.values()):
            result["multiValueHeaders"] = lines
    result["body"] = base64.b64encode(answer.body).decode("ascii") if encoded else body
    result["isBase64Encoded"] = encoded
    return result


def _read(request: Request, result: Any) -> _Given | None:
    """Return what a handler answered; None if it is no answer, for which the gateway has one of its own."""
    if request.form == "v2" and not (isinstance(result, Mapping) and "statusCode" in result):
        return _inferred(request, result)
    if not isinstance(result, Mapping):
        return None
    given = cast("Mapping[str, Any]", result)
    status, body = given.get("statusCode"), given.get("body")
    if isinstance(status, bool) or not (isinstance(status, int) or (isinstance(status, str) and status.isdecimal())):
        return None
    if body is not None and not isinstance(body, str):
        return None
    headers = [(name.encode("latin-1", "replace"), value.encode()) for name, value in _lines(request, given)]
    content = (body or "").encode("utf-8", "replace")
    if given.get("isBase64Encoded"):
        try:
            content = base64.b64decode(content)
        except ValueError:
            return None
        headers.append(ENCODED)
    return _Given(int(status), headers, content, result)


def _inferred(request: Request, result: Any) -> _Given | None:
    """Return a result without a status as HTTP APIs and function URLs take it: as JSON, text as it is."""
    try:
        text = result if isinstance(result, str) else json.dumps(result)
    except (TypeError, ValueError, RecursionError):
        return None
    answer = Answer(200, [(b"content-type", b"application/json")], text.encode("utf-8", "replace"))
    return _Given(answer.status, answer.headers, answer.body, response(request, answer))


def _lines(request: Request, given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the header lines of an answer, as far as its gateway looks at them."""
    single: Any = given.get("headers") or {}
    several: Any = given.get("multiValueHeaders") or {}
    lines: list[tuple[str, str]] = []
    if request.form == "v1" or request.multi:
        lines = [(str(name), str(value)) for name, values in several.items() for value in values]
    if request.form != "alb" or not request.multi:
        ones = [(str(name), str(value)) for name, value in single.items()]
        lines += [one for one in ones if one not in lines]
    if request.form == "v2":
        lines += [("set-cookie", str(cookie)) for cookie in given.get("cookies") or ()]
    return lines
