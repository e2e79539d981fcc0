"""What an error reply of the server means, and what its caller is told."""

from __future__ import annotations

import re
from typing import Final, NoReturn

from redis import exceptions

from ..errors import StoreError, StoreUnavailableError

__all__ = ["PASSING", "behind", "error_reply", "raise_refusal", "redirection", "refusal", "remedy", "untrusted"]

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

DEMOTED: Final = ("UNBLOCKED ", "WAIT cannot be used with replica instances")
"""What a master that was demoted answers to a WAIT: to one that blocks then, and to those after it."""

NO_CLUSTER: Final = "this instance has cluster support disabled"

UNWRITABLE: Final = frozenset({"OOM", "MISCONF", "NOREPLICAS", NO_CLUSTER})
"""Refusals that last until an operator acts, and are not about the command."""

HINTS: Final = {
    "NOPERM": "; the user needs SET, GET, PTTL, DEL, EVAL and EVALSHA on the keys of the prefix, with wait_replicas "
    "WAIT and PEXPIRE, in a cluster also CLUSTER SLOTS and ASKING, and COMMAND for a client that was brought",
    "WRONGTYPE": "; the key holds another Redis type than a string: use another prefix, or delete it",
    "NOAUTH": "; check the user name and the password",
    NO_CLUSTER: "; leave out cluster=True, or use redis.asyncio.Redis",
    "READONLY": "; it is a replica: give the address of its master, or use RedisStore.from_sentinel or cluster=True",
}


def refusal(error: BaseException | None) -> str:
    """Return the code of an error reply (``"WRONGTYPE"``, ``"syntax error"``, ...), or "" for any other error."""
    for kind, code in CODES:
        if isinstance(error, kind):
            return code
    if not isinstance(error, exceptions.ResponseError):
        return ""
    message = str(error)
    if message.startswith(DEMOTED):
        return "READONLY"  # it says the same, to a command that writes nothing
    # Below Redis 7.0 an error inside a script is wrapped into a sentence: "... @user_script: 9: -READONLY ...".
    inner = re.search(r"@user_script: ?[^:]*: -?([A-Z]+) ", message)
    if inner is not None:
        return inner.group(1)
    if message.startswith(("ACL failure in script", "The user executing the script can't run")):
        return "NOPERM"  # of Valkey, and of Redis
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


def behind(error: Exception) -> Exception:
    """Return the error reply for which a client could not read its topology; ``error`` itself if there was none.

    For any error reply to CLUSTER SLOTS redis-py says that cluster mode is not enabled.
    """
    cause = error.__cause__
    for found in (cause and cause.__context__, cause):
        if isinstance(found, Exception) and refusal(found):
            return found
    return error


def untrusted(error: BaseException) -> bool:
    """Say whether the server's certificate was refused here."""
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def remedy(error: BaseException, *, sent: bool, tls: bool, cluster: bool) -> str:
    """Return what to change where a server that did not answer in time gave a sign; "" where it gave none.

    Args:
        error: the last error of the call.
        sent: whether a command was sent in it: then there was a connection.
        tls: whether connections use TLS.
        cluster: whether the client knows a cluster.
    """
    code, text = refusal(error), str(error)
    if code in ("MOVED", "ASK"):
        if cluster:
            return "; where a slot is moving, the user needs ASKING"
        return "; it is a node of a cluster: use cluster=True, or a client of redis.asyncio.RedisCluster"
    if code or sent:
        return HINTS.get(code, "")
    if untrusted(error):
        return "; ssl_ca_certs must name the authority of its certificate, and the URL a host that is in it"
    if isinstance(error, TimeoutError | exceptions.TimeoutError):
        return "; if the port speaks no TLS, use redis:// or ssl=False" if tls else ""
    if any(sign in text for sign in ("reset by peer", "Connection closed", "Connection lost", "ALERT")):
        if tls:
            return "; if it asks for a client certificate, give one that it trusts: ssl_certfile and ssl_keyfile"
        return "; if the port expects TLS, use rediss:// or ssl=True"
    return ""


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
