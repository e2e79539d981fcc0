"""What error replies mean, and what is told of those that last."""

import hiredis
import pytest
from redis import exceptions

from asyncidem import StoreError, StoreUnavailableError
from asyncidem.stores.refusals import PASSING, error_reply, raise_refusal, redirection, refusal, remedy


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (exceptions.ReadOnlyError("You can't write against a read only replica."), "READONLY"),
        (exceptions.BusyLoadingError("Redis is loading the dataset in memory"), "LOADING"),
        (exceptions.TryAgainError("Multiple keys request during rehashing of slot"), "TRYAGAIN"),
        (exceptions.MasterDownError("Link with MASTER is down"), "MASTERDOWN"),
        (exceptions.ClusterDownError("The cluster is down"), "CLUSTERDOWN"),
        (exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), "OOM"),
        (exceptions.NoPermissionError("this user has no permissions to run the 'set' command"), "NOPERM"),
        (
            exceptions.ResponseError("ACL failure in script: User u has no permissions to run the 'set' command"),
            "NOPERM",
        ),
        (exceptions.ResponseError("The user executing the script can't run this command or subcommand"), "NOPERM"),
        (exceptions.NoScriptError("No matching script."), "NOSCRIPT"),
        (
            exceptions.ResponseError(
                "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)"
            ),
            "READONLY",
        ),
        (
            exceptions.ResponseError(
                "WAIT cannot be used with replica instances. Please also note that since Redis 4.0"
            ),
            "READONLY",
        ),
        (exceptions.AuthenticationError("invalid username-password pair or user is disabled."), "NOAUTH"),
        (exceptions.AuthorizationError("no"), "NOAUTH"),
        (exceptions.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), "WRONGTYPE"),
        (exceptions.ResponseError("MISCONF Redis is configured to save RDB snapshots"), "MISCONF"),
        (exceptions.ResponseError("NOREPLICAS Not enough good replicas to write."), "NOREPLICAS"),
        (exceptions.ResponseError("BUSY Redis is busy running a script."), "BUSY"),
        (exceptions.ResponseError("syntax error"), "syntax error"),
        (exceptions.ResponseError("Unknown command 'EVALSHA'"), "unknown command 'evalsha'"),
        (exceptions.ResponseError(""), ""),
        (
            exceptions.ResponseError("WRONGTYPE Operation against a key script: 3f, on @user_script:5."),
            "WRONGTYPE",
        ),
        # Redis 6.2 wraps what went wrong inside a script.
        (
            exceptions.ResponseError(
                "Error running script (call to f_93): @user_script:6: @user_script: 6: -READONLY You can't write "
                "against a read only replica. "
            ),
            "READONLY",
        ),
        (
            exceptions.ResponseError(
                "Error running script (call to f_93): @user_script:4: @user_script: 4: -OOM command not allowed "
                "when used memory > 'maxmemory'. "
            ),
            "OOM",
        ),
        (exceptions.ResponseError("no -SUCH thing"), "no -such thing"),
        (exceptions.ConnectionError("WRONGTYPE reset by peer"), ""),
        (exceptions.TimeoutError("Timeout reading from socket"), ""),
        (exceptions.MaxConnectionsError("Too many connections"), ""),
        (RuntimeError("Event loop is closed"), ""),
        (TimeoutError(), ""),
        (None, ""),
    ],
)
def test_refusal(error: BaseException | None, code: str) -> None:
    """An error reply is told from every other error, and by its code from other error replies."""
    assert refusal(error) == code


REPLIES: dict[str, tuple[type[Exception], str]] = {
    "READONLY You can't write against a read only replica.": (exceptions.ReadOnlyError, "READONLY"),
    "LOADING Redis is loading the dataset in memory": (exceptions.BusyLoadingError, "LOADING"),
    "TRYAGAIN Multiple keys request during rehashing of slot": (exceptions.TryAgainError, "TRYAGAIN"),
    "MASTERDOWN Link with MASTER is down": (exceptions.MasterDownError, "MASTERDOWN"),
    "CLUSTERDOWN Hash slot not served": (exceptions.ClusterDownError, "CLUSTERDOWN"),
    "MOVED 3999 127.0.0.1:6381": (exceptions.MovedError, "MOVED"),
    "ASK 3999 127.0.0.1:6381": (exceptions.AskError, "ASK"),
    "OOM command not allowed when used memory > 'maxmemory'.": (exceptions.OutOfMemoryError, "OOM"),
    "NOPERM User u has no permissions to run the 'set' command": (exceptions.NoPermissionError, "NOPERM"),
    "NOSCRIPT No matching script.": (exceptions.NoScriptError, "NOSCRIPT"),
    "NOAUTH Authentication required.": (exceptions.AuthenticationError, "NOAUTH"),
    "WRONGTYPE Operation against a key holding the wrong kind of value": (exceptions.ResponseError, "WRONGTYPE"),
    "BUSY Redis is busy running a script.": (exceptions.ResponseError, "BUSY"),
    "ERR syntax error": (exceptions.ResponseError, "syntax error"),
    "ERR unknown command 'EVALSHA', with args beginning with: ": (
        exceptions.ResponseError,
        "unknown command 'evalsha', with args beginning with: ",
    ),
    "": (exceptions.ResponseError, ""),
}
"""What servers write, the class that redis-py has for it, and its code."""


@pytest.mark.parametrize(("text", "kind", "code"), [(text, *rest) for text, rest in REPLIES.items()], ids=list(REPLIES))
def test_error_reply(text: str, kind: type[Exception], code: str) -> None:
    """An error reply that is read without redis-py is the exception that redis-py would have made of it."""
    error = error_reply(text)
    assert type(error) is kind
    assert refusal(error) == code


@pytest.mark.parametrize("text", [text for text in REPLIES if text], ids=[text for text in REPLIES if text])
def test_error_reply_is_that_of_redis_py(text: str) -> None:
    """Code, class and message of an error reply are those that redis-py's own parser gives it, where it has a class."""
    from redis._parsers.base import BaseParser

    theirs = BaseParser.parse_error(text)
    ours = error_reply(text)
    assert refusal(ours) == refusal(theirs)
    if type(theirs) is exceptions.ResponseError:  # its older parsers leave the errors of a cluster as they come
        assert str(theirs).endswith(str(ours))
    else:
        assert type(ours) is type(theirs)
        assert str(ours) == str(theirs)


def test_error_reply_of_the_reader() -> None:
    """The reader of replies hands on error replies, in arrays too, as values."""
    reader = hiredis.Reader(replyError=error_reply)
    reader.feed(b"-READONLY no\r\n*2\r\n:1\r\n-ERR odd\r\n")
    assert type(reader.gets()) is exceptions.ReadOnlyError
    one, odd = reader.gets()
    assert (one, type(odd), str(odd)) == (1, exceptions.ResponseError, "odd")


@pytest.mark.parametrize("word", ["MOVED", "ASK"])
@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("127.0.0.1:6381", "127.0.0.1"),
        (":6381", ""),
        ("::1:6381", "::1"),
        ("redis-1.example.org:6381", "redis-1.example.org"),
    ],
)
def test_redirection(word: str, address: str, host: str) -> None:
    """A redirection names slot, host (none: the one that answered; one of IPv6 has colons itself) and port."""
    assert redirection(error_reply(f"{word} 3999 {address}")) == (3999, host, 6381)


@pytest.mark.parametrize(
    ("error", "kind", "hint"),
    [
        (exceptions.OutOfMemoryError("used memory > 'maxmemory'"), StoreUnavailableError, "maxmemory'$"),
        (exceptions.ResponseError("MISCONF cannot persist"), StoreUnavailableError, "MISCONF"),
        (exceptions.ResponseError("NOREPLICAS not enough"), StoreUnavailableError, "NOREPLICAS"),
        (
            exceptions.NoPermissionError("no permissions"),
            StoreError,
            "EVALSHA on the keys of the prefix, with wait_replicas",
        ),
        (exceptions.ResponseError("WRONGTYPE wrong kind"), StoreError, "another Redis type"),
        (exceptions.AuthenticationError("WRONGPASS"), StoreError, "check the user name and the password$"),
        (exceptions.ResponseError("value is not an integer"), StoreError, "refused: value is not an integer$"),
    ],
    ids=repr,
)
def test_raise_refusal(error: Exception, kind: type[StoreError], hint: str) -> None:
    """A refusal that lasts is told with its cause and what to do; after an earlier try nothing is known any more."""
    code = refusal(error)
    assert code not in PASSING
    with pytest.raises(StoreError, match=hint) as raised:
        raise_refusal(error, code, unknown=False)
    assert type(raised.value) is kind
    assert raised.value.__cause__ is error
    assert not raised.value.outcome_unknown
    with pytest.raises(StoreUnavailableError, match=hint) as later:
        raise_refusal(error, code, unknown=True)
    assert later.value.__cause__ is error
    assert later.value.outcome_unknown


def test_refused_size() -> None:
    """A value that is too large for the server never ran, however often the connection broke over it."""
    error = exceptions.ResponseError("Protocol error: invalid bulk length")
    with pytest.raises(StoreError) as raised:
        raise_refusal(error, refusal(error), unknown=True)
    assert type(raised.value) is StoreError
    assert not raised.value.outcome_unknown


RESET = exceptions.ConnectionError("Error while reading from a:1 : (104, 'Connection reset by peer')")
UNTRUSTED = exceptions.ConnectionError("Error 1 connecting to a:1. [SSL: CERTIFICATE_VERIFY_FAILED] self-signed")


@pytest.mark.parametrize(
    ("error", "sent", "tls", "cluster", "text"),
    [
        (exceptions.MovedError("1 a:1"), True, False, False, "use cluster=True"),
        (exceptions.AskError("1 a:1"), True, False, False, "use cluster=True"),
        (exceptions.AskError("1 a:1"), True, False, True, "the user needs ASKING"),
        (exceptions.ReadOnlyError("no"), True, False, False, "the address of its master"),
        (exceptions.ClusterDownError("no"), True, False, True, ""),
        (UNTRUSTED, False, True, False, "ssl_ca_certs must name"),
        (TimeoutError("no connection"), False, True, False, "if the port speaks no TLS"),
        (exceptions.TimeoutError("connecting"), False, True, False, "if the port speaks no TLS"),
        (TimeoutError("no connection"), False, False, False, ""),
        (TimeoutError("no answer"), True, True, False, ""),
        (RESET, False, True, False, "ssl_certfile and ssl_keyfile"),
        (RESET, False, False, False, "if the port expects TLS"),
        (RESET, True, False, False, ""),
        (exceptions.ConnectionError("Connection closed by server."), False, False, False, "if the port expects TLS"),
        (
            exceptions.ConnectionError("Error UNKNOWN while writing. Connection lost."),
            False,
            False,
            False,
            "expects TLS",
        ),
        (exceptions.ConnectionError("[SSL: TLSV1_ALERT_UNKNOWN_CA]"), False, True, False, "ssl_certfile"),
        (exceptions.ConnectionError("Connect call failed"), False, True, False, ""),
    ],
)
def test_remedy(error: Exception, sent: bool, tls: bool, cluster: bool, text: str) -> None:
    """What a server that did not answer gave for a sign is told as what to change; where there was none, nothing is."""
    told = remedy(error, sent=sent, tls=tls, cluster=cluster)
    assert (text in told) if text else told == ""
