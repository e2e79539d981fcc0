"""What the signature of a function says: which it can be protected, where its key is, what it returns."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Awaitable, Callable, Sequence
from types import FunctionType
from typing import Any, Final, TypeAlias, get_args, get_origin

from .codecs import UNRESOLVED, Codec, return_annotation
from .errors import ConfigurationError
from .options import is_coroutine_callable

__all__ = [
    "Functions",
    "Selector",
    "annotation_for",
    "refuse_method",
    "refuse_undecorable",
    "selector",
]

Selector: TypeAlias = str | Sequence[str] | Callable[..., Any]
"""One parameter name, several, or a callable of the same arguments."""


MAX_KNOWN: Final = 1024

Known: TypeAlias = tuple[weakref.ref[Callable[..., Any]], Codec, Any, bool]


class Functions:
    """What was found out about the functions that are run, as long as they live: each is looked at once.

    Only plain functions are kept, weakly, and by identity: a closure must not outlive its caller, and a callable object
    may be another one's equal, or be changed.
    """

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}

    def handler(self, fn: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        """Return ``fn`` so that what it returns is checked, where it is not known to make coroutines."""
        known = self._known.get(id(fn))
        coroutine = known[3] if known is not None and known[0]() is fn else inspect.iscoroutinefunction(fn)
        return fn if coroutine else _checking(fn)

    def annotation(self, fn: Callable[..., Any], codec: Codec) -> Any:
        """Return the return annotation of ``fn``, checked by ``codec``.

        Raises:
            ConfigurationError: ``fn`` is known to return no awaitable, or ``codec`` refuses its annotation.
        """
        known = self._known.get(id(fn))
        if known is not None and known[0]() is fn and known[1] is codec:
            return known[2]
        coroutine = inspect.iscoroutinefunction(fn)
        _refuse_uncallable(fn, coroutine=coroutine)
        annotation = annotation_for(fn, codec)
        if type(fn) is FunctionType and annotation is not UNRESOLVED:
            if len(self._known) >= MAX_KNOWN:  # an annotation may lead back to its function, and keep it alive
                self._known.clear()
            place, forget = id(fn), self._known.pop
            self._known[place] = weakref.ref(fn, lambda _: forget(place, None)), codec, annotation, coroutine
        return annotation


def annotation_for(fn: Callable[..., Any], codec: Codec) -> Any:
    """Return the return annotation of a function that is about to be called, checked by its codec."""
    annotation = _awaited(fn, return_annotation(fn))
    codec.check(annotation)
    if annotation is UNRESOLVED and codec.needs_annotation:
        name = getattr(fn, "__qualname__", repr(fn))
        raise ConfigurationError(
            f"the return annotation of {name} names what does not exist where it is defined; name the type in the "
            f"codec, such as PydanticCodec(Model)"
        )
    return annotation


def _awaited(fn: Callable[..., Any], annotation: Any) -> Any:
    """Return what awaiting a call gives: a plain function's annotation names the awaitable, if anything."""
    if annotation is UNRESOLVED or annotation is Any or is_coroutine_callable(fn):
        return annotation
    form, arguments = get_origin(annotation), get_args(annotation)
    return arguments[-1] if isinstance(form, type) and issubclass(form, Awaitable) and arguments else Any


def refuse_undecorable(fn: Any) -> None:
    """Refuse what is no coroutine function with a name. Raises ``ConfigurationError``."""
    if type(fn) in (staticmethod, classmethod):
        raise ConfigurationError(f"put @idempotent below @{type(fn).__name__}, next to the function {fn!r}")
    if isinstance(fn, str):
        raise ConfigurationError(f"@idempotent takes no positional argument; write @idempotent(key={fn!r})")
    if inspect.isasyncgenfunction(fn):
        raise ConfigurationError(f"{fn!r} is an async generator: it has no single result to store")
    if not inspect.iscoroutinefunction(fn):
        raise ConfigurationError(f"{fn!r} is not a coroutine function; define it with async def")
    if not hasattr(fn, "__qualname__"):
        raise ConfigurationError(f"{fn!r} has no name to make keys of; decorate the function itself")


def refuse_method(fn: Any, signature: inspect.Signature) -> None:
    """Refuse a method without ``key``: two instances may be two tenants, and a digest cannot tell them apart."""
    owner = fn.__qualname__.rpartition(".")[0]
    first = next(iter(signature.parameters), "")
    if inspect.ismethod(fn) or first in ("self", "cls") or (owner and not owner.endswith("<locals>")):
        raise ConfigurationError(f"{fn.__qualname__} is a method: say with key= what tells one call from another")


def _refuse_uncallable(fn: Any, *, coroutine: bool) -> None:
    """Refuse what is known to return no awaitable. Raises ``ConfigurationError``."""
    if not callable(fn):
        raise ConfigurationError(f"run takes a coroutine function and its arguments, not {fn!r}")
    plain = not coroutine and inspect.isfunction(fn) and fn.__name__ != "<lambda>"
    if plain or isinstance(fn, type) or inspect.isasyncgenfunction(fn):
        raise ConfigurationError(f"{fn!r} is not a coroutine function; define it with async def")


def _checking(fn: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """Return ``fn`` so that what it returns is checked, where that was not known before."""

    async def call(*args: Any) -> Any:
        awaitable = fn(*args)
        if not inspect.isawaitable(awaitable):
            raise ConfigurationError(f"{fn!r} returned {type(awaitable).__name__}, not an awaitable; use async def")
        return await awaitable

    return call


def selector(
    option: str, chosen: Selector, signature: inspect.Signature
) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Return a function of a call's arguments that gives what was chosen of them."""
    if isinstance(chosen, str):
        return _parameter(option, chosen, signature)
    if callable(chosen):
        if is_coroutine_callable(chosen):
            raise ConfigurationError(f"{option} must be a plain function, not the coroutine function {chosen!r}")
        return lambda args, kwargs: chosen(*args, **kwargs)
    if not isinstance(chosen, list | tuple) or not chosen:
        raise ConfigurationError(
            f"{option} must be parameter names or a callable of the same arguments, not {chosen!r}"
        )
    parts = [_parameter(option, name, signature) for name in chosen]
    return lambda args, kwargs: [part(args, kwargs) for part in parts]


def _parameter(
    option: str, name: Any, signature: inspect.Signature
) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Return a function that finds one parameter's value without binding all of them, where its place is fixed."""
    parameters = signature.parameters
    if not isinstance(name, str) or name not in parameters:
        names = ", ".join(parameters) or "none"
        raise ConfigurationError(f"{option}={name!r} names no parameter; there are: {names}")
    parameter = parameters[name]
    place = list(parameters).index(name)
    positional = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    keyword = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)

    def find(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if positional and place < len(args):
            return args[place]
        if keyword and name in kwargs:
            return kwargs[name]
        bound = signature.bind(*args, **kwargs)  # a default, *args or **kwargs; or the call's own TypeError
        bound.apply_defaults()
        return bound.arguments[name]

    return find
