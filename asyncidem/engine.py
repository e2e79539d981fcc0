"""The order of an operation: claim, run, renew, complete or release. The only place that knows it.

What each await leaves behind when its task is cancelled, or its process killed:

- while claiming: nothing, or after a kill a record that is an orphan when its lease is over; a cancelled claim is
  undone (:mod:`asyncidem.stores.base`);
- between the claim and the handler there is no await;
- while the handler runs: a record in progress. ``on_cancel`` decides about a cancellation, the lease about a kill;
- between the handler's end and the completion there is no await;
- while completing: the completion is repeated in the background; nothing releases any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

from .cache import Cache
from .codecs import JSONCodec
from .cutoffs import cutoff
from .errors import (
    CodecError,
    CompletionError,
    FingerprintMismatchError,
    IdempotencyError,
    InProgressError,
    LeaseLostError,
    ResultUnavailableError,
    StoreError,
    StoreUnavailableError,
)
from .hooks import Event, EventName, Hook, emit, logger, warn
from .model import MIN_TTL_MS, Claimed, InProgress, Mismatch, Outcome, Record, Replay, State, decide
from .operation import Operation, Phase, current
from .options import Options
from .renewal import Renewer
from .replay import describe, rebuild
from .stores.base import Store
from .waiting import StillRunningError, Waited, Watches, differs

__all__ = ["MISSING", "Engine"]


class Local:
    """What the operations of one store on one event loop share.

    Args:
        store: the store.
        loop: the event loop.
    """

    def __init__(self, store: Store, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.renewer = Renewer(store.renew, loop)
        self.watches = Watches(store, loop)

    @classmethod
    def of(cls, store: Store) -> Local:
        """Return that of the running loop. Those of loops that have ended are dropped with their first successor."""
        loop = asyncio.get_running_loop()
        local: Any = store.companions.get(loop)
        if local is None:
            for ended in [other for other in list(store.companions) if other.is_closed()]:
                store.companions.pop(ended, None)  # another thread may do the same
            local = store.companions[loop] = cls(store, loop)
        return local  # type: ignore[no-any-return]  # nothing else is put there under a loop

    async def aclose(self) -> None:
        """Stop renewing and polling; leave no task behind."""
        if self.loop is asyncio.get_running_loop():
            await self.watches.aclose()
            await self.renewer.aclose()


Outcomes: TypeAlias = Claimed | Replay | InProgress | Mismatch | Waited
Handler: TypeAlias = Callable[..., Awaitable[Any]]

PLAIN: Final = JSONCodec()
MISSING: Final = object()


class Engine:
    """Runs operations against a store.

    Args:
        store: where records are.
        hooks: who is told.
        local_cache: how many completed records are kept in process.
        disabled: whether operations are made without a key, and so run unprotected; the log has been told.
    """

    __slots__ = ("_cache", "_hooks", "disabled", "store")

    def __init__(self, store: Store, hooks: tuple[Hook, ...], local_cache: int, *, disabled: bool = False) -> None:
        self.store = store
        self.disabled = disabled
        self._hooks = hooks
        self._cache = Cache(local_cache, store.clock) if local_cache else None

    def over(self, store: Store) -> Engine:
        """Return an engine like this one over another store, with a cache of its own. What runs here, ends here."""
        size = 0 if self._cache is None else self._cache.size
        return Engine(store, self._hooks, size, disabled=self.disabled)

    def kept(self, key: str, fingerprint: str | None, annotation: Any, options: Options) -> Any:
        """Return the result that the local cache has, where there is no more to it than that; else ``MISSING``.

        It is what ``call`` would return. Whatever has to be told or refused is left to an operation.
        """
        if self._cache is None or self._hooks:
            return MISSING
        record = self._cache.get(key)
        if record is None or record.data is None or record.outcome is not None or differs(record, fingerprint):
            return MISSING
        if (outer := current.get()) is not None:
            self._refuse_nesting(key, outer)
        return _result(record, annotation, options)

    async def call(self, op: Operation, fn: Handler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``fn`` as ``op``, or return the stored result."""
        claiming = self._approach(op)
        if claiming is not None:
            try:
                outcome = await claiming
            except (StoreError, InProgressError) as error:
                self._refused(op, error)
            else:
                self._settle(op, outcome)
        if op._phase is Phase.REPLAYED:
            op._phase = Phase.ENDED
            return op._result
        try:
            result = await fn(*args, **kwargs)
        except BaseException as error:
            await self.fail(op, error)
            raise
        completing = self._returned(op, result)
        if completing is not None:
            await completing
        return result

    async def begin(self, op: Operation) -> None:
        """Bring ``op`` to run, or to its replay; raise why it does neither."""
        # The same lines as in `call`, where another coroutine would cost each of many waiters its frame; so in `finish`.
        claiming = self._approach(op)
        if claiming is not None:
            try:
                outcome = await claiming
            except (StoreError, InProgressError) as error:
                self._refused(op, error)
            else:
                self._settle(op, outcome)

    async def finish(self, op: Operation, result: Any) -> None:
        """Store the result of a handler that returned; raise what its caller must know instead of it."""
        completing = self._returned(op, result)
        if completing is not None:
            await completing

    def _returned(self, op: Operation, result: Any) -> Awaitable[None] | None:
        """Do what ``finish`` does as far as nothing need be awaited; return what must be, or None if nothing is stored."""
        phase = op._phase
        self._leave(op)
        if phase is Phase.REPLAYED and not op._looked:
            raise IdempotencyError(
                f"the block of the operation {op.key!r} ran again for a replay; return op.result if op.replayed"
            )
        if phase is not Phase.RUNNING:
            return None
        refused: CodecError | None = None
        data: str | None = None
        codec = op._options.codec
        try:
            if codec.needs_annotation and op._annotation is Any:
                codec = PLAIN  # nothing says what would come back: then only what comes back as itself
            data = codec.encode(result)
            if not isinstance(data, str):  # orjson.dumps gives bytes
                refused = CodecError(f"the codec returned {type(data).__name__}, not text")
        except CodecError as error:
            refused = error
        except Exception as error:  # noqa: BLE001 - a codec of the user's may raise anything: whatever it is, there is no text
            refused = CodecError(f"the codec failed to encode the result: {error!r}")
            refused.__cause__ = error
        if refused is None:
            return self._complete(op, data, None, None, result)
        return self._complete_without(op, result, refused)

    async def _complete_without(self, op: Operation, result: Any, refused: CodecError) -> None:
        refused.result = result
        await self._complete(op, None, "unavailable", None, result, refused)
        raise refused

    async def fail(self, op: Operation, error: BaseException) -> None:
        """Settle the claim of a handler that raised ``error``, which the caller raises when this returns."""
        phase = op._phase
        self._leave(op)
        if phase is not Phase.RUNNING:
            return
        if isinstance(error, GeneratorExit):
            self._ended(op, None)
            if op._options.on_cancel == "release" and op._claim is not None:
                self.store.release_soon(op._claim)  # a closed coroutine cannot await
            return
        options = op._options
        if op._lost is not None:
            self._ended(op, None)
            if isinstance(error, asyncio.CancelledError) and self._cancelled_by_others(op):
                return
            op._lost.result = op._given
            raise op._lost from error
        if isinstance(error, options.replay_exceptions):
            await self._complete(op, None, "exception", describe(error), None, error)
        elif _choice(options, error) == "release":
            await self._release(op, cancelled=not isinstance(error, Exception))
        else:
            self._ended(op, None)

    def tell(
        self, name: EventName, op: Operation, error: BaseException | None = None, *, warning: bool = False, **more: Any
    ) -> None:
        """Give an event of ``op`` to the hooks, and to the log if it is a warning."""
        if not self._hooks and not warning:
            return
        event = Event(
            name=name,
            key=op.key,
            operation=op.name,
            attempt=None if op._claim is None and op._record is None else op.attempt,
            elapsed=time.monotonic() - op._started,
            error=error,
            **more,
        )
        if warning:
            warn(event)
        emit(self._hooks, event)

    # -- begin ----------------------------------------------------------------------------------------------------------

    def _refuse_nesting(self, key: str, inner: Operation) -> None:
        """Refuse ``key`` inside of its own operation, ``inner`` or one around that."""
        outer: Operation | None = inner
        while outer is not None:
            if outer.key == key and outer._phase is Phase.RUNNING and outer._engine.store is self.store:
                claim = outer._claim
                left = 0.0 if claim is None else max(0.0, claim._deadline - self.store.clock())
                raise InProgressError(
                    key, left, f"the operation {key!r} is called inside itself: it would wait for its own end"
                )
            outer = outer._outer

    def _approach(self, op: Operation) -> Awaitable[Outcomes] | None:
        """Begin ``op`` as far as nothing need be awaited; return the claim that must be, or None if there is none."""
        if op._started:
            raise IdempotencyError(f"the operation {op.key!r} was entered before; make a new one for each call")
        op._started = time.monotonic()
        op._outer = outer = current.get()
        key, options, cache = op.key, op._options, self._cache
        if not key:
            self.tell("ran_unprotected", op, warning=not self.disabled)
            self._enter(op, Phase.UNPROTECTED)
            return None
        if outer is not None:
            self._refuse_nesting(key, outer)
        if cache is not None:
            if (record := cache.get(key)) is not None:
                self._judge_cached(op, record)
                return None
            op._asked = self.store.clock()
        if options.wait is None:
            return self.store.acquire(key, options.lease_now(), options.ttl_ms, op._fingerprint, aged=cache is not None)
        return Local.of(self.store).watches.acquire(key, op._fingerprint, options, aged=cache is not None)

    def _settle(self, op: Operation, outcome: Outcomes) -> None:
        """Bring ``op`` to run, or to its replay, as its claim came out."""
        if isinstance(outcome, Claimed):
            self._start(op, outcome)
        elif isinstance(outcome, Replay):
            if self._cache is not None:
                self._cache.put(outcome.record, self.store.clock() - op._asked)
            self._replay(op, outcome.record, "store")
        elif isinstance(outcome, Waited):
            self.tell("waited", op)
            self._settle(op, outcome.outcome)
        elif isinstance(outcome, Mismatch):
            raise self._mismatch(op, outcome)
        else:
            error = InProgressError(op.key, outcome.retry_after)
            self.tell("in_progress", op, error)
            raise error

    def _refused(self, op: Operation, error: StoreError | InProgressError) -> None:
        """Bring ``op`` to run although it could not be claimed, if it may; else raise why."""
        if isinstance(error, InProgressError):
            self.tell("in_progress", op, error)
            raise error
        self.tell("store_error", op, error)
        down = isinstance(error, StoreUnavailableError) and not isinstance(error, StillRunningError)
        if op._options.on_store_error == "raise" or not down:
            raise error
        self.tell("ran_unprotected", op, error, warning=True)
        self._enter(op, Phase.UNPROTECTED)

    def _start(self, op: Operation, claim: Claimed) -> None:
        op._claim = claim
        local = op._local = Local.of(self.store)
        # First the hooks: whatever interrupts one leaves a claim that nobody renews, and that ends with its lease.
        if self._hooks:
            self.tell("claimed" if claim.attempt == 1 else "taken_over", op)
        if op._options.renew and cutoff.get() is None:
            local.renewer.hold(claim, op)
        self._enter(op, Phase.RUNNING)

    def _judge_cached(self, op: Operation, record: Record) -> None:
        decision = decide(record, None, owner=None, fingerprint=op._fingerprint, now_ms=0, aged=False)
        if isinstance(decision, Mismatch):
            raise self._mismatch(op, decision)
        self._replay(op, record, "local_cache")

    def _replay(self, op: Operation, record: Record, source: str) -> None:
        options = op._options
        op._record = record
        if record.outcome == "exception":
            self.tell("replayed", op, source=source)
            raise rebuild(record.error, options.replay_exceptions, op.key)
        if record.outcome is not None or record.data is None:
            error = ResultUnavailableError(op.key, record.outcome or "unavailable")
            self.tell("result_unavailable", op, error)
            raise error
        op._result = _result(record, op._annotation, options)
        if self._hooks:
            self.tell("replayed", op, source=source)
        op._phase = Phase.REPLAYED

    def _mismatch(self, op: Operation, mismatch: Mismatch) -> FingerprintMismatchError:
        op._record = mismatch.record
        error = FingerprintMismatchError(op.key)
        self.tell("mismatch", op, error)
        return error

    def _enter(self, op: Operation, phase: Phase) -> None:
        op._phase = phase
        op._task = task = asyncio.current_task()
        if task is not None:
            op._cancelling = task.cancelling()
        current.set(op)

    # -- finish and fail ------------------------------------------------------------------------------------------------

    def _leave(self, op: Operation) -> None:
        """End ``op``: from here on nothing renews its claim, and no loss cancels its task."""
        if op._phase is Phase.ENDED or op._phase is Phase.NEW:
            raise IdempotencyError(f"the operation {op.key!r} is {op._phase.value}, not running")
        op._phase = Phase.ENDED
        if op._claim is not None and op._local is not None:
            op._local.renewer.drop(op._claim)
            if op._lost is not None and op._task is not None:
                op._task.uncancel()  # the cancellation was ours, and ends here
        if current.get() is op:  # else this is another context, or operations that overlap in one
            outer = op._outer
            while outer is not None and outer._phase is Phase.ENDED:
                outer = outer._outer
            current.set(outer)

    def _ended(self, op: Operation, record: Record | None, *, free: bool = False) -> None:
        assert op._local is not None
        op._local.watches.ended(op.key, record, free=free)

    def _cancelled_by_others(self, op: Operation) -> bool:
        return op._task is not None and op._task.cancelling() > op._cancelling

    async def _complete(
        self,
        op: Operation,
        data: str | None,
        outcome: Outcome | None,
        error: str | None,
        result: Any,
        instead: Exception | None = None,
    ) -> None:
        """Record the end; ``instead`` is what the caller is about to raise.

        The store comes first, then hooks and log: what interrupts one of those leaves nothing to be run again.
        """
        claim, local = op._claim, op._local
        assert claim is not None
        assert local is not None
        stored = False
        record: Record | None = None
        sent = self.store.clock()  # the ttl counts from the write, which is not before this
        try:
            try:
                await self.store.finish(claim, data, op._options.ttl_ms, outcome, error)
            except StoreUnavailableError:
                raise
            except StoreError as refusal:
                # Refused, and nothing was written: by far the likeliest reason is the size of the result.
                data, outcome, error = None, "too_large", None
                await self.store.finish(claim, None, op._options.ttl_ms, outcome, None)
                self.tell("result_unavailable", op, refusal, warning=True)
            stored = True
            if self._cache is not None or local.watches.waits(op.key):  # else nobody would look at it
                record = Record(
                    key=op.key,
                    state=State.COMPLETED,
                    owner=claim.owner,
                    attempt=claim.attempt,
                    data=data,
                    fingerprint=claim._fingerprint,
                    outcome=outcome,
                    expires_in=max(op._options.ttl_ms, MIN_TTL_MS) / 1000 - (self.store.clock() - sent),
                    error=error,
                )
        except LeaseLostError as lost:
            lost.result = result
            if op._lost is None:
                self.tell("lease_lost", op, lost, warning=True)
            raise lost from instead
        except StoreError as trouble:
            self.tell("completion_failed", op, trouble, warning=True)
            if op._options.on_completion_error == "raise" and not isinstance(instead, CodecError):
                raise CompletionError(op.key, result) from trouble
        finally:
            local.watches.ended(op.key, record, free=False)
            if isinstance(instead, CodecError):
                self.tell("result_unavailable", op, instead)
        if record is not None and self._cache is not None:
            self._cache.put(record)
        if stored and self._hooks:
            self.tell("completed", op)

    async def _release(self, op: Operation, *, cancelled: bool) -> None:
        assert op._claim is not None
        free = False
        try:
            if cancelled:
                free = await self.store.release_cancelled(op._claim)
                if not free:
                    self.tell("release_failed", op, warning=True)
            else:
                await self.store.release(op._claim)
                free = True
        except StoreError as trouble:  # the handler's own exception says more; the lease frees the key
            self.tell("release_failed", op, trouble, warning=True)
        finally:
            self._ended(op, None, free=free)
        if free:
            self.tell("released", op)


def _result(record: Record, annotation: Any, options: Options) -> Any:
    """Return what a replay of ``record`` gives: a value of its own, for the caller may change it."""
    assert record.data is not None
    try:
        result = options.codec.decode(record.data, annotation)
    except CodecError:
        raise
    except Exception as error:  # a codec of the user's may raise anything: the stored text is not for it
        raise CodecError(f"the codec failed to decode the stored result: {error!r}") from error
    return result if options.map_replay is None else options.map_replay(result, record)


def _choice(options: Options, error: BaseException) -> str:
    """Say what becomes of the key of a handler that raised ``error``: ``"release"`` or ``"keep"``."""
    if not isinstance(error, Exception):
        return options.on_cancel
    if not callable(options.on_failure):
        return options.on_failure
    try:
        choice = options.on_failure(error)
    except Exception as broken:  # noqa: BLE001 - the user's function: it must not hide what the handler raised
        broken.__context__ = None  # what the handler raised is not for the log
        with contextlib.suppress(Exception):  # nor must a filter of the user's hide it
            logger.exception("on_failure_failed")
        return "keep"
    if choice not in ("release", "keep"):
        with contextlib.suppress(Exception):
            logger.error("on_failure_failed", extra={"returned": repr(choice)})
        return "keep"  # of the two it is the one that cannot run an effect twice
    return choice
