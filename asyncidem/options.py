"""The options of an operation, checked once, and their overrides."""

# Annotations are not postponed here: a NamedTuple would compile the text of each of its fields at import.

import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

from .codecs import Codec
from .cutoffs import lease_within
from .durations import to_ms
from .errors import ConfigurationError
from .model import Record

__all__ = ["Choice", "Options", "Overrides", "is_coroutine_callable"]

Choice: TypeAlias = Literal["release", "keep"]


class Overrides(TypedDict, total=False):
    """What a decorator, an operation or a run may override."""

    lease: float | timedelta
    ttl: float | timedelta
    wait: float | timedelta | None
    renew: bool
    on_failure: Choice | Callable[[Exception], Choice]
    on_cancel: Choice
    on_store_error: Literal["raise", "run"]
    on_completion_error: Literal["return", "raise"]
    missing_key: Literal["raise", "run"]
    replay_exceptions: type[Exception] | tuple[type[Exception], ...]
    codec: Codec
    map_replay: Callable[[Any, Record], Any] | None


CHOICES: dict[str, tuple[str, str]] = {
    "on_failure": ("release", "keep"),
    "on_cancel": ("release", "keep"),
    "on_store_error": ("raise", "run"),
    "on_completion_error": ("return", "raise"),
    "missing_key": ("raise", "run"),
}


class Options(NamedTuple):
    """Checked options, in whole milliseconds (``wait`` in seconds); see ``Idempotency`` for what they mean."""

    lease_ms: int
    ttl_ms: int
    wait: float | None
    renew: bool
    on_failure: Choice | Callable[[Exception], Choice]
    on_cancel: Choice
    on_store_error: Literal["raise", "run"]
    on_completion_error: Literal["return", "raise"]
    missing_key: Literal["raise", "run"]
    replay_exceptions: tuple[type[Exception], ...]
    codec: Codec
    map_replay: Callable[[Any, Record], Any] | None

    @classmethod
    def of(cls, **raw: Any) -> "Options":
        """Check every option.

        Raises:
            ConfigurationError: an option cannot work, or is not known.
        """
        return cls(**{name: value for option, given in raw.items() for name, value in (_check(option, given),)})

    def override(self, overrides: Overrides) -> "Options":
        """Return these options with others in place of some. Raises what :meth:`of` raises."""
        if not overrides:
            return self
        return self._replace(**dict(_check(option, given) for option, given in overrides.items()))

    def lease_now(self) -> int:
        """Return the milliseconds of a lease that is claimed now."""
        return lease_within(self.lease_ms)


def _check(option: str, given: Any) -> tuple[str, Any]:
    """Return the name of a field and its checked value."""
    if option in ("lease", "ttl"):
        return f"{option}_ms", to_ms(given, option)
    if option == "wait":
        return option, None if given is None else to_ms(given, "wait (None for not waiting)") / 1000
    if option in CHOICES:
        if option == "on_failure" and callable(given):
            _plain(option, given)
        elif given not in CHOICES[option]:
            more = " or a function of the exception" if option == "on_failure" else ""
            raise ConfigurationError(f"{option} must be one of {CHOICES[option]}{more}, not {given!r}")
        return option, given
    check = {"renew": _flag, "replay_exceptions": _classes, "codec": _codec, "map_replay": _function}.get(option)
    if check is None:
        there = ", ".join(sorted(Overrides.__annotations__))
        raise ConfigurationError(f"unknown option {option!r}; besides key, payload and name there are {there}")
    return option, check(option, given)


def is_coroutine_callable(given: Any) -> bool:
    """Say whether calling ``given`` makes a coroutine; objects whose ``__call__`` is ``async def`` included."""
    call = getattr(given.__class__, "__call__", None)  # noqa: B004 - it is looked at, not tested
    return inspect.iscoroutinefunction(given) or inspect.iscoroutinefunction(call)


def _flag(option: str, given: Any) -> bool:
    if not isinstance(given, bool):
        raise ConfigurationError(f"{option} must be True or False, not {given!r}")
    return given


def _classes(option: str, given: object) -> tuple[type[Exception], ...]:
    candidates: list[object] = [*given] if isinstance(given, tuple) else [given]
    classes = [one for one in candidates if isinstance(one, type) and issubclass(one, Exception)]
    if len(classes) < len(candidates):
        raise ConfigurationError(f"{option} must be classes of exceptions, not {given!r}")
    return tuple(classes)


def _codec(option: str, given: Any) -> Codec:
    if not isinstance(given, Codec):
        raise ConfigurationError(f"{option} must be a Codec object such as JSONCodec(), not {given!r}")
    return given


def _function(option: str, given: Any) -> Any:
    if given is not None:
        if not callable(given):
            raise ConfigurationError(f"{option} must be a function of (result, record), not {given!r}")
        _plain(option, given)
    return given


def _plain(option: str, given: Any) -> None:
    if is_coroutine_callable(given):
        raise ConfigurationError(f"{option} must be a plain function, not the coroutine function {given!r}")
