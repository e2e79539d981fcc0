"""The value of an ``Idempotency-Key`` header field: a structured field's string (RFC 9651), or raw text.

The header is described in the IETF draft *The Idempotency-Key HTTP Header Field* (-07, October 2025), which has expired.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote_to_bytes

__all__ = ["MalformedKeyError", "parse_key"]

MAX_KEY: Final = 255

RAW: Final = re.compile(r"[A-Za-z0-9._~:/+=@-]{1,255}")
"""What the industry sends instead of a string in quotes. It takes no parameters."""

STRING: Final = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')

PARAMETER: Final = re.compile(
    r"; *[a-z*][a-z0-9_.*-]*"
    r"(?:=(?:"
    r"-?(?:[0-9]{1,12}\.[0-9]{1,3}|[0-9]{1,15})"  # decimal, integer
    r'|"(?:[ !#-\[\]-~]|\\["\\])*"'
    r"|[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*"  # token
    r"|:(?:(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2,4})={0,2})?:"  # bytes; what of their padding is missing is no matter
    r"|\?[01]"
    r"|@-?[0-9]{1,15}"  # date
    r'|%"(?P<display>(?:[ !#$&-~]|%[0-9a-f]{2})*)"'
    r"))?(?=[; ]|$)"
)
"""A parameter behind the string, with whatever value it has: it is ignored, but has to be one."""


class MalformedKeyError(ValueError):
    """A header field that holds no idempotency key. Its text says why, and not what the value is."""


def parse_key(lines: Sequence[str], *, strict: bool) -> str | None:
    """Return the idempotency key of a request.

    ``"a"`` and ``a`` are the same key.

    Args:
        lines: the value of every line of the field, as Latin-1.
        strict: whether raw text is refused.

    Returns:
        1 to 255 printable ASCII characters; None if there is no line.

    Raises:
        MalformedKeyError: it is neither a string nor raw text, a list, empty, too long, or there are several lines.
    """
    if not lines:
        return None
    if len(lines) > 1:
        raise MalformedKeyError("the header is there more than once; send one")
    value = lines[0].strip(" \t")
    if not value.startswith('"'):
        if not strict and RAW.fullmatch(value):
            return value
        form = "a string in double quotes" if strict else "a string in double quotes, or 1 to 255 of A-Za-z0-9._~:/+=@-"
        raise MalformedKeyError(f"the value must be {form}")
    string = STRING.match(value)
    if string is None or not _are_parameters(value, string.end()):
        raise MalformedKeyError(
            "the value is no string of a structured field (RFC 9651): one string of printable ASCII in double quotes, "
            'with a backslash before " and \\'
        )
    key = re.sub(r"\\(.)", r"\1", string[1])
    if not 1 <= len(key) <= MAX_KEY:
        raise MalformedKeyError(f"the key must have 1 to {MAX_KEY} characters, not {len(key)}")
    return key


def _are_parameters(value: str, at: int) -> bool:
    while at < len(value) and value[at] == ";":
        parameter = PARAMETER.match(value, at)
        if parameter is None:
            return False
        if parameter["display"]:
            try:
                unquote_to_bytes(parameter["display"]).decode()
            except UnicodeDecodeError:
                return False
        at = parameter.end()
    return not value[at:].strip(" ")
