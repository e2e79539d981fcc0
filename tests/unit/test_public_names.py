"""Public names: what `from asyncidem import ...` offers, and the defaults that users rely on."""

import inspect
import pydoc

import pytest

import asyncidem
from asyncidem import errors
from asyncidem.codecs import JSONCodec

NAMES = {
    "Claimed",
    "Codec",
    "Event",
    "Hook",
    "Idempotency",
    "InProgress",
    "JSONCodec",
    "MemoryStore",
    "Mismatch",
    "MsgspecCodec",
    "Operation",
    "PydanticCodec",
    "Record",
    "RedisClientProtocol",
    "RedisStore",
    "Replay",
    "State",
    "Store",
    "current_operation",
}
ERRORS = {
    "CodecError",
    "CompletionError",
    "ConfigurationError",
    "FingerprintMismatchError",
    "IdempotencyError",
    "InProgressError",
    "InvalidKeyError",
    "LeaseLostError",
    "MissingKeyError",
    "ReplayedError",
    "ResultUnavailableError",
    "StoreError",
    "StoreUnavailableError",
    "WaitTimeoutError",
}


def test_the_public_names_are_these() -> None:
    """The list is complete, has no double entry and nothing else."""
    assert set(asyncidem.__all__) == NAMES | ERRORS
    assert len(asyncidem.__all__) == len(NAMES | ERRORS)
    assert set(errors.__all__) == ERRORS


@pytest.mark.parametrize("name", sorted(NAMES | ERRORS))
def test_each_name_can_be_imported_and_is_documented(name: str) -> None:
    """A name is there under its own name, with a docstring."""
    found = getattr(asyncidem, name)
    assert found.__name__ == name
    assert found.__module__.startswith("asyncidem.")
    assert inspect.getdoc(found)


def test_a_star_import_brings_them_all() -> None:
    """The names that are imported late are among them."""
    names: dict[str, object] = {}
    exec("from asyncidem import *", names)  # noqa: S102 - a star import needs a module
    assert set(names) >= NAMES | ERRORS


def test_dir_and_help_work() -> None:
    """Both show the public names, the late ones included."""
    assert dir(asyncidem) == sorted(NAMES | ERRORS)
    text = pydoc.plain(pydoc.render_doc(asyncidem))
    assert "one idempotency key" in text
    assert "class RedisStore(" in text


def test_other_names_are_attribute_errors() -> None:
    """A misspelt name is the error of every module, which names both."""
    with pytest.raises(AttributeError, match="module 'asyncidem' has no attribute 'RedisStor'"):
        _ = asyncidem.RedisStor
    with pytest.raises(ImportError, match="RedisStor"):
        exec("from asyncidem import RedisStor")  # noqa: S102 - the statement is what is tested


def test_a_late_name_is_the_same_each_time() -> None:
    """What is imported late is one class, the one of its module."""
    from asyncidem.stores.guarded import RedisClientProtocol
    from asyncidem.stores.redis import RedisStore

    assert asyncidem.RedisStore is asyncidem.RedisStore is RedisStore
    assert asyncidem.RedisClientProtocol is RedisClientProtocol


def parameters(fn: object) -> dict[str, object]:
    """Return names and defaults; those that are keyword-only have a `*`."""
    assert callable(fn)
    signature = inspect.signature(fn)
    return {
        ("*" if one.kind is one.KEYWORD_ONLY else "**" if one.kind is one.VAR_KEYWORD else "") + name: one.default
        for name, one in signature.parameters.items()
    }


def test_the_constructor_has_the_documented_defaults() -> None:
    """Every option is keyword-only and has the default that users rely on."""
    options = parameters(asyncidem.Idempotency)
    assert type(options.pop("*codec")) is JSONCodec
    assert options == {
        "store": inspect.Parameter.empty,
        "*namespace": "",
        "*lease": 30,
        "*ttl": 86_400,
        "*wait": None,
        "*renew": True,
        "*on_failure": "release",
        "*on_cancel": "keep",
        "*on_store_error": "raise",
        "*on_completion_error": "return",
        "*missing_key": "raise",
        "*replay_exceptions": (),
        "*local_cache": 0,
        "*map_replay": None,
        "*fingerprint_secret": None,
        "*hooks": (),
    }


def test_stores_have_the_documented_parameters() -> None:
    """The store's methods and constructors take what is documented, by the same names."""
    empty = inspect.Parameter.empty
    store = parameters(asyncidem.RedisStore)
    assert {name: store[name] for name in ("client", "*prefix", "*timeout")} == {
        "client": empty,
        "*prefix": "asyncidem:",
        "*timeout": 5,
    }
    assert parameters(asyncidem.RedisStore.from_url) == {"url": empty, "*cluster": False, "**options": empty}
    assert parameters(asyncidem.RedisStore.connect) == {
        "host": empty,
        "port": 6379,
        "*username": None,
        "*password": None,
        "*db": 0,
        "*cluster": False,
        "*ssl": True,
        "**options": empty,
    }
    claim = parameters(asyncidem.Store.claim)
    assert claim == {"self": empty, "key": empty, "*lease": 30, "*ttl": 86_400, "*fingerprint": None}
    for name in ("complete", "release", "renew", "get", "delete", "aclose", "__aenter__", "__aexit__"):
        assert inspect.iscoroutinefunction(getattr(asyncidem.Store, name))


def test_values_have_the_documented_fields() -> None:
    """Records, claims and operations carry what is documented."""
    record = {"key", "state", "owner", "attempt", "data", "fingerprint", "outcome", "expires_in"}
    assert record <= set(asyncidem.Record._fields)
    assert {"key", "owner", "attempt"} <= set(asyncidem.Claimed.__slots__)
    operation = {"key", "downstream_key", "attempt", "replayed", "result", "set_result"}
    assert operation <= set(dir(asyncidem.Operation))
    assert [(state.name, str(state)) for state in asyncidem.State] == [
        ("INPROGRESS", "INPROGRESS"),
        ("COMPLETED", "COMPLETED"),
    ]
