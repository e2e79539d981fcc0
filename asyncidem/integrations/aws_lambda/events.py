"""HTTP events of API Gateway (REST APIs are payload format 1.0, HTTP APIs and function URLs 2.0) and of ALB.

The forms are those of the AWS documents *Create AWS Lambda proxy integrations for HTTP APIs* (payload formats),
*Input format of a Lambda function for proxy integration* (REST APIs) and *Lambda functions as targets* (ALB).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple, TypeAlias, cast
from urllib.parse import urlencode

from ...errors import ConfigurationError, InvalidKeyError

__all__ = ["Form", "Request", "caller", "read_request"]

Form: TypeAlias = Literal["v1", "v2", "alb"]

NOTHING: Final[Mapping[str, Any]] = {}


class Request(NamedTuple):
    """What a guard has to know of an HTTP event.

    Attributes:
        form: of the event, and of what answers it.
        multi: whether the event has ``multiValueHeaders``: ALB then takes these of an answer, and else ``headers``.
        method: in upper case.
        path: the whole path.
        route: the template of the route, or the whole path where the route stands for many.
        query: the query, in an order that does not change.
        headers: name in lower case, and value, of each line.
        body: the bytes that were sent.
    """

    form: Form
    multi: bool
    method: str
    path: str
    route: str
    query: str
    headers: list[tuple[str, str]]
    body: bytes

    def lines(self, name: str) -> list[str]:
        """Return the value of each line of a header. Format 2.0 joins them with commas, into a list of one."""
        return [value for header, value in self.headers if header == name]


def read_request(event: Any) -> Request:
    """Return an HTTP event in one form.

    Raises:
        ConfigurationError: it is the event of something else.
        InvalidKeyError: its body is said to be Base64, and is not.
    """
    event = _object(event)
    context = _object(event.get("requestContext"))
    about = _object(context.get("http"))
    several = event.get("multiValueHeaders") is not None
    if event.get("version") == "2.0" and about:
        form: Form = "v2"
        method, path = about.get("method"), event.get("rawPath")
        template = str(event.get("routeKey") or "").partition(" ")[2]
        query = str(event.get("rawQueryString") or "")
    else:
        form = "alb" if "elb" in context else "v1"
        method, path = event.get("httpMethod"), event.get("path")
        template = str(event.get("resource") or "")
        query = _query(event)
    if not isinstance(method, str) or not isinstance(path, str):
        raise ConfigurationError(
            "this is no event of API Gateway, a function URL or ALB: it has no method and path; idempotent_api guards those"
        )
    # "{proxy+}" stands for many routes.
    route = template if template and "+}" not in template else path
    return Request(form, several, method.upper(), path, route, query, _headers(event), _body(event))


def caller(event: Any) -> str | None:
    """Return who sends an HTTP event, as API Gateway has authenticated them; None if there is nobody.

    It is the first that is there of

    1. the ``principalId`` of a Lambda authorizer,
    2. the subject of a JWT, with its issuer,
    3. the ARN of an IAM identity,
    4. the API key,

    each marked by its kind, so that one cannot pass for another.

    Raises:
        ConfigurationError: an event of ALB, which authenticates nobody here.
    """
    context = _object(_object(event).get("requestContext"))
    if "elb" in context:
        raise ConfigurationError(
            "ALB names no principal: give idempotent_api principal=, a function of the event, or None for a single client"
        )
    authorizer, identity = _object(context.get("authorizer")), _object(context.get("identity"))
    custom = _object(authorizer.get("lambda"))
    claims = _object(_object(authorizer.get("jwt")).get("claims")) or _object(authorizer.get("claims"))
    iam = _object(authorizer.get("iam"))
    found: tuple[tuple[Any, ...], ...] = (
        ("principalId", authorizer.get("principalId") or custom.get("principalId")),
        ("sub", claims.get("iss"), claims.get("sub")),
        ("arn", iam.get("userArn") or identity.get("userArn")),
        ("key", identity.get("apiKeyId") or identity.get("apiKey")),
    )
    return next((json.dumps(one) for one in found if one[-1]), None)


def _object(value: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else NOTHING


def _headers(event: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return all lines. Where both forms are there, ``headers`` has the last of each, which ``multiValueHeaders`` has too."""
    several = _object(event.get("multiValueHeaders"))
    if several:
        return [(name.lower(), str(value)) for name, values in several.items() for value in (values or ())]
    return [(name.lower(), str(value)) for name, value in _object(event.get("headers")).items()]


def _query(event: Mapping[str, Any]) -> str:
    several = _object(event.get("multiValueQueryStringParameters"))
    single = _object(event.get("queryStringParameters"))
    pairs = [(name, values or ()) for name, values in several.items()] or [(name, (v,)) for name, v in single.items()]
    return urlencode([(name, str(value)) for name, values in sorted(pairs) for value in values])


def _body(event: Mapping[str, Any]) -> bytes:
    body = event.get("body")
    if body is None:
        return b""
    if not event.get("isBase64Encoded"):
        return str(body).encode("utf-8", "surrogatepass")
    try:
        return base64.b64decode(str(body))
    except (binascii.Error, ValueError):
        raise InvalidKeyError("the body of the event is marked as Base64, and is none") from None
