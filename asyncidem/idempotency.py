"""The object that users configure: decorator, context manager and call form over one store."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, Final, Literal, ParamSpec, Protocol, TypeVar, TypeVarTuple, Unpack, cast, final, overload

from .codecs import UNRESOLVED, Codec, JSONCodec, return_annotation
from .durations import Duration
from .engine import MISSING, Engine
from .errors import ConfigurationError, MissingKeyError
from .hooks import Hook
from .keys import canonical, check_key, digest, fingerprint, key_text, qualify
from .model import Record
from .operation import Operation
from .options import Options, Overrides, is_coroutine_callable
from .signatures import (
    Functions,
    Selector,
    annotation_for,
    refuse_method,
    refuse_undecorable,
    selector,
)
from .stores.base import Store
from .switch import is_disabled

__all__ = ["Idempotency"]

P = ParamSpec("P")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")

MAX_LOCAL_CACHE: Final = 10_000_000

NO_KEYWORDS: Final[dict[str, Any]] = {}


class Decorator(Protocol):
    """Keeps the signature of the coroutine function that it wraps."""

    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Callable[P, Coroutine[Any, Any, R]]:
        """Return the protected function."""
        ...


@final
class Idempotency:
    """Makes operations safe to retry: one idempotency key, one effect, one stored result.

    Immutable; every option but ``namespace``, ``local_cache``, ``fingerprint_secret`` and ``hooks`` can be overridden
    per decorator, operation or run. Times are seconds or ``timedelta``.

    For local tests, the environment variable ``ASYNCIDEM_DISABLED`` (1, true, yes or on) lets every operation run
    unprotected, without a key and without the store; the log says so once. It is read here, when the object is made,
    so that calls need not ask for it.

    Args:
        store: where records are kept.
        namespace: put before every key, so that services can share a store.
        lease: how long an owner may be silent before others may take over; renewed at a third of it.
        ttl: how long a record lives, counted anew at completion.
        wait: None raises ``InProgressError`` at once for a duplicate of a running call; else it waits that long for
            the result, and takes over itself if the owner fails or dies.
        renew: whether the lease is renewed while the handler runs.
        on_failure: the handler raised: ``"release"``, nothing was done, so the next call may run at once, ``"keep"``,
            something may have been: only after the lease, with ``attempt`` one higher; or a function of the exception
            that returns one of the two (a declined card is not a provider's time-out).
        on_cancel: the handler was cancelled while it ran: ``"keep"``, because its effect may have happened, or
            ``"release"``. A call that is cancelled before its handler started is always released.
        on_store_error: the store is down before the effect: ``"raise"``, nothing ran, or ``"run"`` unprotected.
        on_completion_error: the store is down after the effect: ``"return"`` the value, or ``"raise"``
            ``CompletionError``. The completion is repeated in the background in both cases.
        missing_key: the key is None, empty, or an empty container: ``"raise"``, or ``"run"`` unprotected.
        replay_exceptions: classes of exceptions that are results: stored, and raised again on replay.
        codec: how results become text.
        local_cache: how many completed results are kept in process; a replay from it costs no command, and does not
            see a record that was deleted meanwhile.
        map_replay: called with ``(result, record)`` at every replay; the caller gets what it returns, or raises.
        fingerprint_secret: makes fingerprints HMACs: the digest of a card number alone can be guessed.
        hooks: called with every :class:`~asyncidem.hooks.Event`.

    Raises:
        ConfigurationError: an option cannot work, or the environment variable has another value.
    """

    __slots__ = ("_engine", "_functions", "_labels", "_namespace", "_options", "_scope", "_secret")

    _engine: Engine
    _functions: Functions
    _labels: dict[str, Any]
    _namespace: str
    _options: Options
    _scope: str
    _secret: bytes | None

    def __init__(
        self,
        store: Store,
        *,
        namespace: str = "",
        lease: Duration = 30,
        ttl: Duration = 86_400,
        wait: Duration | None = None,
        renew: bool = True,
        on_failure: Literal["release", "keep"] | Callable[[Exception], Literal["release", "keep"]] = "release",
        on_cancel: Literal["release", "keep"] = "keep",
        on_store_error: Literal["raise", "run"] = "raise",
        on_completion_error: Literal["return", "raise"] = "return",
        missing_key: Literal["raise", "run"] = "raise",
        replay_exceptions: type[Exception] | tuple[type[Exception], ...] = (),
        codec: Codec = JSONCodec(),  # noqa: B008 - it has no state
        local_cache: int = 0,
        map_replay: Callable[[Any, Record], Any] | None = None,
        fingerprint_secret: str | bytes | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        if not isinstance(store, Store):  # pyright: ignore[reportUnnecessaryIsInstance] - callers without a type checker
            raise ConfigurationError(
                "store must be a Store such as RedisStore.from_url(url), RedisStore(client) or MemoryStore(), not "
                f"{type(store).__name__}"
            )
        if not _is_utf8(namespace):
            raise ConfigurationError(f"namespace must be text, not {namespace!r}")
        if isinstance(local_cache, bool) or not isinstance(local_cache, int) or not 0 <= local_cache <= MAX_LOCAL_CACHE:
            raise ConfigurationError(
                f"local_cache must be a whole number from 0 to {MAX_LOCAL_CACHE}, not {local_cache!r}"
            )
        if not isinstance(hooks, Iterable):
            raise ConfigurationError(f"hooks must be a sequence of hooks, such as [hook], not {hooks!r}")
        hooks = tuple(hooks)
        for hook in hooks:
            if not callable(hook) or is_coroutine_callable(hook):
                raise ConfigurationError(f"a hook must be a plain function of one event, not {hook!r}")
        options = Options.of(
            lease=lease,
            ttl=ttl,
            wait=wait,
            renew=renew,
            on_failure=on_failure,
            on_cancel=on_cancel,
            on_store_error=on_store_error,
            on_completion_error=on_completion_error,
            missing_key=missing_key,
            replay_exceptions=replay_exceptions,
            codec=codec,
            map_replay=map_replay,
        )
        put = functools.partial(object.__setattr__, self)
        disabled = is_disabled()
        put("_engine", Engine(store, hooks, 0 if disabled else local_cache, disabled=disabled))
        put("_functions", Functions())
        put("_labels", {})
        put("_namespace", namespace)
        put("_scope", qualify(namespace, ""))
        put("_options", options)
        put("_secret", _secret(fingerprint_secret))

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: operations that run share it."""
        raise AttributeError(f"an Idempotency is immutable; make another one, or override {name!r} where it is used")

    def __delattr__(self, name: str) -> None:
        """Refuse, as ``__setattr__`` does."""
        raise AttributeError(f"an Idempotency is immutable; {name!r} stays")

    @property
    def store(self) -> Store:
        """Where records are kept."""
        return self._engine.store

    @property
    def namespace(self) -> str:
        """What is put before every key."""
        return self._namespace

    @overload
    def idempotent(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Callable[P, Coroutine[Any, Any, R]]: ...

    @overload
    def idempotent(
        self,
        *,
        key: Selector | None = None,
        payload: Selector | None = None,
        name: str | None = None,
        **options: Unpack[Overrides],
    ) -> Decorator: ...

    def idempotent(  # type: ignore[misc]  # mypy does not see that the overloads share their options
        self,
        fn: Callable[..., Any] | None = None,
        /,
        *,
        key: Selector | None = None,
        payload: Selector | None = None,
        name: str | None = None,
        **options: Unpack[Overrides],
    ) -> Any:
        """Protect a coroutine function; its signature stays what it is.

        It belongs below decorators that register what they find, such as those of routes::

            @idem.idempotent(key="order_id", payload="amount")
            async def charge(order_id: str, amount: int) -> dict[str, str]: ...

        Args:
            fn: the function, where the decorator is used without arguments.
            key: the parameter whose value is the key, several of them, or a callable of the same arguments. Without
                it the key is a digest of all arguments.
            payload: what is fingerprinted, chosen likewise: the same key with another payload is refused.
            name: stands for module and qualified name in the key and in events, so that renaming changes no keys.
            **options: in place of those of the object.

        Raises:
            ConfigurationError: not a coroutine function, a parameter that does not exist, a method without ``key``,
                a return annotation that the codec cannot hold, or an option that cannot work.
        """
        checked = self._options.override(options)
        if fn is not None:
            return self._protect(fn, key, payload, name, checked)

        def decorate(fn: Callable[..., Any], /) -> Callable[..., Any]:
            return self._protect(fn, key, payload, name, checked)

        return decorate

    def operation(
        self, key: str | None, *, payload: object = None, name: str | None = None, **options: Unpack[Overrides]
    ) -> Operation:
        """Return an operation for ``async with``.

        ::

            async with idem.operation("order:42", payload=order) as op:
                if op.replayed:
                    return op.result
                return op.set_result(await charge_card(order))

        A block that ends without ``set_result``, by ``return`` too, completes with None, and that is what duplicates get.

        Args:
            key: the idempotency key, used as it is given behind the namespace, in the key space of ``run``.
            payload: what is fingerprinted; None for nothing.
            name: a label in events.
            **options: in place of those of the object.

        Raises:
            MissingKeyError: the key is None or empty, with ``missing_key="raise"``.
            InvalidKeyError: the key is not text, or the payload has no canonical text.
            ConfigurationError: an option cannot work.
        """
        checked = self._options.override(options)
        full, mark = self._full(key, checked), self._fingerprint(payload)
        return Operation(self._engine, full, name, mark, Any, checked)

    async def run(
        self,
        key: str | None,
        fn: Callable[[*Ts], Awaitable[R]],
        /,
        *args: *Ts,
        payload: object = None,
        name: str | None = None,
        **options: Unpack[Overrides],
    ) -> R:
        """Call ``fn(*args)`` at most once for ``key``, and return its result, or the stored one.

        Args:
            key: the idempotency key, used as it is given behind the namespace, in the key space of ``operation``.
            fn: a coroutine function, or anything that returns an awaitable.
            *args: its positional arguments; keyword arguments go with ``functools.partial``.
            payload: what is fingerprinted; None for nothing.
            name: a label in events; by default the function's name.
            **options: in place of those of the object.

        Raises:
            ConfigurationError: ``fn`` is a plain function, or an option cannot work.
            IdempotencyError: whatever ``async with`` on an operation raises.
        """
        found: Operation | tuple[Any] = self._find(key, fn, payload, name, options)
        del payload, options  # of many thousand waiters each keeps what is still here
        if isinstance(found, tuple):
            return cast("R", found[0])
        return cast("R", await self._engine.call(found, self._functions.handler(fn), args, NO_KEYWORDS))

    def key_for(self, fn: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the key that a call of a decorated function has, as ``store.get`` accepts it.

        Raises:
            ConfigurationError: ``fn`` was not decorated by this object.
            MissingKeyError: these arguments give no key.
            InvalidKeyError: the key, or an argument in it, has no canonical text.
        """
        protected = getattr(fn, "__asyncidem__", None)
        if not isinstance(protected, Protected) or protected.owner is not self:
            raise ConfigurationError(f"{fn!r} was not decorated by this Idempotency")
        bound = (fn.__self__, *args) if inspect.ismethod(fn) else args
        key = protected.key(bound, kwargs)
        if not key:
            raise MissingKeyError(f"the arguments of {protected.label} give no key: it is None or empty")
        return key

    def _find(
        self, key: object, fn: Callable[..., Any], payload: object, name: str | None, overrides: Overrides
    ) -> Operation | tuple[Any]:
        """Return the operation of a run, or its result alone where that takes no operation."""
        options = self._options.override(overrides) if overrides else self._options
        annotation = self._functions.annotation(fn, options.codec)
        full, mark = self._full(key, options), self._fingerprint(payload)
        result = self._engine.kept(full, mark, annotation, options)
        if result is not MISSING:
            return (result,)
        return Operation(self._engine, full, name or getattr(fn, "__qualname__", None), mark, annotation, options)

    def _full(self, key: object, options: Options) -> str:
        """Return ``key`` behind the namespace; empty if it is missing and that is allowed, or if nothing is protected."""
        if self._engine.disabled:
            return ""
        if key_text(key) is not None:
            return self._scope + check_key(key)
        if options.missing_key == "raise":
            raise MissingKeyError(f"the idempotency key is {key!r}; give one, or allow missing_key='run'")
        return ""

    def _fingerprint(self, payload: object) -> str | None:
        return None if payload is None or self._engine.disabled else fingerprint(payload, self._secret)

    def _protect(
        self,
        fn: Callable[..., Any],
        key: Selector | None,
        payload: Selector | None,
        name: str | None,
        options: Options,
    ) -> Callable[..., Any]:
        protected = Protected(self, fn, key, payload, name, options)
        label = protected.label
        code = getattr(fn, "__code__", fn)
        if self._labels.setdefault(label, fn) is not fn:
            kind = "closure of one factory" if getattr(self._labels[label], "__code__", None) is code else "function"
            warnings.warn(
                f"a second {kind} is protected under the name {label!r}: equal keys of the two replay each other's "
                f"results; give each its own name=",
                UserWarning,
                stacklevel=3,
            )
        find = protected.find

        @functools.wraps(fn)
        async def protect(*args: Any, **kwargs: Any) -> Any:
            found = find(args, kwargs)
            if isinstance(found, tuple):
                return found[0]
            if not kwargs:
                kwargs = NO_KEYWORDS  # of many thousand waiters none need keep an empty one of its own
            return await self._engine.call(found, fn, args, kwargs)

        protect.__asyncidem__ = protected  # type: ignore[attr-defined]  # where key_for finds it
        return protect


class Protected:
    """How the calls of one decorated function become operations.

    Args:
        owner: whose function it is.
        fn: the function.
        key: chooses the key.
        payload: chooses the payload.
        name: stands for the function's name.
        options: checked options.
    """

    __slots__ = (
        "_annotation",
        "_fn",
        "_key",
        "_options",
        "_payload",
        "_scope",
        "_several",
        "_signature",
        "label",
        "owner",
    )

    def __init__(
        self,
        owner: Idempotency,
        fn: Callable[..., Any],
        key: Selector | None,
        payload: Selector | None,
        name: str | None,
        options: Options,
    ) -> None:
        refuse_undecorable(fn)
        self.owner = owner
        if name is not None and (not _is_utf8(name) or not name):
            raise ConfigurationError(f"name must be text, not {name!r}")
        self.label: str = name or f"{fn.__module__}.{fn.__qualname__}"
        self._fn = fn
        self._options = options
        self._signature = inspect.signature(fn)
        if key is None:
            refuse_method(fn, self._signature)
        self._scope = qualify(owner.namespace, qualify(self.label, ""))
        self._key = None if key is None else selector("key", key, self._signature)
        self._payload = None if payload is None else selector("payload", payload, self._signature)
        self._several = key is not None and not isinstance(key, str) and not callable(key)
        self._annotation = return_annotation(fn)
        options.codec.check(self._annotation)

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return the full key of a call; empty if it is missing."""
        if self._key is None:
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return self._scope + digest(canonical(bound.arguments))
        value = self._key(args, kwargs)
        if self._several and any(key_text(part) is None for part in value):
            return ""
        text = key_text(value)
        if text is None:
            return ""
        return self._scope + (text if text.isascii() else check_key(text))

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | tuple[Any]:
        """Return the operation of a call, or its result alone where that takes no operation.

        Raises:
            MissingKeyError: the arguments give no key.
            InvalidKeyError: the key or the payload has no canonical text.
            ConfigurationError: the return annotation still names what does not exist.
        """
        if self._annotation is UNRESOLVED:
            self._annotation = annotation_for(self._fn, self._options.codec)
        if self.owner._engine.disabled:  # what is called in a test may have nothing to make a key of
            return Operation(self.owner._engine, "", self.label, None, self._annotation, self._options)
        key = self.key(args, kwargs)
        if not key and self._options.missing_key == "raise":
            raise MissingKeyError(f"the arguments of {self.label} give no key: it is None or empty")
        mark = None if self._payload is None else fingerprint(self._payload(args, kwargs), self.owner._secret)
        engine, options = self.owner._engine, self._options
        result = engine.kept(key, mark, self._annotation, options)
        if result is not MISSING:
            return (result,)
        return Operation(engine, key, self.label, mark, self._annotation, options)


def _is_utf8(text: Any) -> bool:
    """Say whether ``text`` is text that a store can hold."""
    return isinstance(text, str) and text.encode("utf-8", "replace") == text.encode("utf-8", "surrogatepass")


def _secret(secret: Any) -> bytes | None:
    if secret is None or (isinstance(secret, bytes) and secret):
        return secret
    if isinstance(secret, str) and secret:
        return secret.encode()
    raise ConfigurationError("fingerprint_secret must be text or bytes, and not empty")
