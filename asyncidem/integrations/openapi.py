"""What an OpenAPI document (3.0 or 3.1) says of a guarded operation: its header, and its refusals."""

from __future__ import annotations

from typing import Any, Final

from .http import KEY_HEADER, Rules

__all__ = ["describe"]

PROBLEM: Final = "application/problem+json"
NAME: Final = "IdempotencyProblem"

STRING: Final = r'"(?:[ !#-\[\]-~]|\\["\\]){1,255}"'
PATTERN: Final = rf"^(?:[A-Za-z0-9._~:/+=@-]{{1,255}}|{STRING})$"

SCHEMA: Final[dict[str, Any]] = {
    "title": NAME,
    "description": "A refusal (RFC 9457).",
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
}

RETRY_AFTER: Final = {
    "Retry-After": {"description": "Seconds after which to repeat it.", "schema": {"type": "integer", "minimum": 1}}
}

REFUSALS: Final = {
    400: f"The {KEY_HEADER} is missing or malformed",
    403: "Nobody who could own the key was found",
    409: f"A request with this {KEY_HEADER} is being processed, or its response was not kept",
    413: "The request is too large to be guarded",
    422: f"The {KEY_HEADER} was used with another request",
    503: "Idempotency is not available; nothing was processed, or its outcome is not known",
}


def describe(document: dict[str, Any], operation: dict[str, Any], rules: Rules[Any]) -> None:
    """Add the header and the refusals to an operation of a document, where they are not there yet.

    Args:
        document: gets the schema of problems.
        operation: the description of one method of one path.
        rules: the rules that guard it.
    """
    parameters: list[Any] = operation.setdefault("parameters", [])
    if not any(
        str(one.get("name", "")).lower() == KEY_HEADER.lower() and one.get("in") == "header" for one in parameters
    ):
        parameters.append(
            {
                "name": KEY_HEADER,
                "in": "header",
                "required": rules.required,
                "description": "Names this operation: a request with the same key gets the same response.",
                "schema": {"type": "string", "pattern": f"^{STRING}$" if rules.strict else PATTERN},
            }
        )
    document.setdefault("components", {}).setdefault("schemas", {}).setdefault(NAME, SCHEMA)
    responses: dict[str, Any] = operation.setdefault("responses", {})
    for status, description in REFUSALS.items():
        response: dict[str, Any] = responses.setdefault(str(status), {"description": description})
        content: dict[str, Any] = response.setdefault("content", {})
        content.setdefault(PROBLEM, {"schema": {"$ref": f"#/components/schemas/{NAME}"}})
        if status in (409, 503):
            response.setdefault("headers", {}).update(RETRY_AFTER)
