"""What an error reply of the server means, and what its caller is told."""

from __future__ import annotations

import re
from typing import Final, NoReturn

from redis import exceptions

from ..errors import StoreError, StoreUnavailableError

__all__ = ["PASSING", "error_reply", "raise_refusal", "redirection", "refusal"]

CODES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (exceptions.MovedError, "MOVED"),  # before its base class
    (exceptions.AskError, "ASK"),
    (exceptions.BusyLoadingError, "LOADING"),
    (exceptions.ReadOnlyError, "READONLY"),
    (exceptions.TryAgainError, "TRYAGAIN"),
    (exceptions.MasterDownError, "MASTERDOWN"),
    (exceptions.ClusterDownError, "CLUSTERDOWN"),
    (exceptions.OutOfMemoryError, "OOM"),
    (exceptions.NoPermissionError, "NOPERM"),
    (exceptions.NoScriptError, "NOSCRIPT"),
    (exceptions.AuthenticationError, "NOAUTH"),
    (exceptions.AuthorizationError, "NOAUTH"),
)
"""redis-py cuts the code off the message where it has a class for it."""

CLASSES: Final = {code: kind for kind, code in reversed(CODES)}

PASSING: Final = frozenset(
    {"LOADING", "READONLY", "TRYAGAIN", "MASTERDOWN", "CLUSTERDOWN", "BUSY", "MOVED", "ASK", "NOSCRIPT"}
)
"""Refusals that are over soon, or elsewhere: repeated within the deadline."""

UNWRITABLE: Final = frozenset({"OOM", "MISCONF", "NOREPLICAS"})
"""Refusals that last until an operator acts, and are nobody's mistake here."""

HINTS: Final = {
    "NOPERM": "; the user needs SET, GET, PTTL, DEL, EVAL and EVALSHA on the keys of the prefix",
    "WRONGTYPE": "; the key holds another Redis type than a string: use another prefix, or delete it",
    "NOAUTH": "; check the user name and the password",
}


def refusal(error: BaseException | None) -> str:
    """Return the code of an error reply (``"WRONGTYPE"``, ``"syntax error"``, ...), or "" for any other error."""
    for kind, code in CODES:
        if isinstance(error, kind):
            return code
    if not isinstance(error, exceptions.ResponseError):
        return ""
    message = str(error)
    # Below Redis 7.0 an error inside a script is wrapped into a sentence: "... @user_script: 9: -READONLY ...".
    inner = re.search(r"@user_script: ?[^:]*: -?([A-Z]+) ", message)
    if inner is not None:
        return inner.group(1)
    first = message.split(" ", 1)[0]
    return first if first.isupper() else message.lower()


def error_reply(text: str) -> Exception:
    """Return the text of an error reply as the exception that redis-py makes of it."""
    code, _, rest = text.partition(" ")
    kind = CLASSES.get(code)
    return exceptions.ResponseError(text.removeprefix("ERR ")) if kind is None else kind(rest)


def redirection(error: BaseException) -> tuple[int, str, int]:
    """Return the slot, the host ("" for that of the node that answered) and the port of a MOVED or an ASK."""
    slot, host, port = re.findall(r"(\d+) (\S*):(\d+)$", str(error))[0]
    return int(slot), host, int(port)


def raise_refusal(error: BaseException, code: str, *, unknown: bool, wrote: bool = False) -> NoReturn:
    """Say what a refusal that lasts means.

    Args:
        error: the error reply.
        code: its code.
        unknown: whether an earlier try of the same command may have written.
        wrote: whether a command before it in the same exchange was carried out.

    Raises:
        StoreUnavailableError: an operator has to act, or an earlier try may have written.
        StoreError: refused, and nothing was written unless its ``outcome_unknown`` says so.
    """
    message = f"the server refused: {error}{HINTS.get(code, '')}"
    # A size is refused before anything runs, however often the connection broke over it.
    unknown = unknown and "invalid bulk length" not in str(error)
    if unknown or code in UNWRITABLE:
        raise StoreUnavailableError(message, outcome_unknown=unknown or wrote) from error
    refused = StoreError(message)
    refused.outcome_unknown = wrote
    raise refused from error
