"""Batches of SQS messages: one operation for each message, and the answer that names those to be delivered again.

What each await leaves behind: a message whose operation completed is a success, whatever happens to the batch after
that; every other one is a failure, and is delivered again when its visibility time-out is over. So a batch that is cut
off in the middle loses nothing, and repeats nothing that was done.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias, TypedDict, cast

from ...cancellation import LINGER
from ...codecs import JSONCodec
from ...cutoffs import bounded
from ...durations import Duration, to_ms
from ...errors import (
    CodecError,
    CompletionError,
    ConfigurationError,
    IdempotencyError,
    ReplayedError,
    ResultUnavailableError,
)
from ...hooks import logger
from ...idempotency import Idempotency
from ...keys import key_text
from ...options import is_coroutine_callable
from .runtime import RESERVE, limited

__all__ = ["BatchResponse", "process_sqs"]

MESSAGES: Final = 10
"""How many run side by side: the batch of a queue, unless it is told to wait for more."""

PLAIN: Final = JSONCodec()

DONE_BEFORE: Final = (ResultUnavailableError, ReplayedError, CodecError)
"""What a claim ends in if the effect has happened, and its result cannot be had. Nobody asks for it."""

Message: TypeAlias = Mapping[str, Any]
Handler: TypeAlias = Callable[..., Awaitable[object]]


class Failure(TypedDict):
    """A message that is to be delivered again, by its ``messageId``."""

    itemIdentifier: str


class BatchResponse(TypedDict):
    """What Lambda takes for the answer of a batch, where its event source has ``ReportBatchItemFailures``."""

    batchItemFailures: list[Failure]


async def process_sqs(
    event: Any,
    context: object,
    handler: Handler,
    /,
    *,
    idem: Idempotency,
    key: Callable[[Any], object] | None = None,
    concurrency: int = MESSAGES,
    reserve: Duration = RESERVE,
) -> BatchResponse:
    """Run ``handler`` once for each message of a batch, and say which have to be delivered again.

    ::

        @lambda_handler
        async def consume(event, context):
            return await process_sqs(event, context, one, idem=idem)

    A message whose operation has completed, in this batch or before, is a success, and so is one that completed with
    an exception of ``replay_exceptions``. One that is in progress elsewhere, that failed, or that there was no time
    for, is a failure, and so delivered again. No failure keeps others from running, but in a FIFO queue (its ARN ends
    in ``.fifo``): there the groups run side by side and the messages of a group in their order, and after its first
    failure the rest of it fails too. Messages with the same key in one batch are one, and share its outcome.

    The event source must have ``ReportBatchItemFailures``, or Lambda takes every answer for a success of all.

    Args:
        event: of an SQS trigger.
        context: of the invocation, for the time that it has left.
        handler: a coroutine function of one message of ``event["Records"]``, or of message and context. What it
            returns is not kept.
        idem: where the operations run.
        key: gives a message's key; None is its ``messageId``. Messages are not fingerprinted: what SQS adds to one
            changes with each delivery.
        concurrency: how many messages (in a FIFO queue, groups) run side by side.
        reserve: seconds before the end of the invocation at which the batch stops, and answers: what has completed
            stays so, the rest are failures. Under ``lambda_handler`` the greater of the two counts.

    Raises:
        ConfigurationError: no event of SQS, or an argument that cannot work.
    """
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(f"concurrency must be a whole number from 1, not {concurrency!r}")
    if not isinstance(idem, Idempotency):  # pyright: ignore[reportUnnecessaryIsInstance] - callers without a type checker
        raise ConfigurationError(f"idem must be an Idempotency, not {type(idem).__name__}")
    if key is not None and (not callable(key) or is_coroutine_callable(key)):
        raise ConfigurationError(f"key must be a plain function of a message, not {key!r}")
    messages = _messages(event)
    batch = _Batch(messages, _with_context(handler, context), idem, key)
    with limited(context, to_ms(reserve, "reserve") / 1000) as left:
        await batch.run(concurrency, None if left is None else left.stop)
    names = dict.fromkeys(message["messageId"] for message in messages)
    failed = [name for name in names if name not in batch.done]
    if left_over := sum(name not in batch.told for name in failed):
        logger.warning("batch_items_left", extra={"operation": batch.name, "messages": left_over})
    return {"batchItemFailures": [{"itemIdentifier": name} for name in failed]}


class _Batch:
    """One batch.

    Args:
        messages: all of them.
        handler: of a message.
        idem: where the operations run.
        key: gives a message's key.

    Attributes:
        done: the ``messageId`` of those that have completed.
        told: that of those whose failure was logged; the others were cut off, share its key, or stand behind it.
        name: of the handler.
    """

    def __init__(
        self, messages: Sequence[Message], handler: Handler, idem: Idempotency, key: Callable[[Any], object] | None
    ) -> None:
        self.done: set[str] = set()
        self.told: set[str] = set()
        self.name = getattr(handler, "__qualname__", None)
        self._handler = handler
        self._idem = idem
        self._key = key
        self._groups = _groups(messages)
        self._outcomes: dict[str, asyncio.Future[bool]] = {}
        self._stopped = False

    async def run(self, concurrency: int, seconds: float | None) -> None:
        """Run all, or what there is time for."""
        ends = None if seconds is None else time.monotonic() + seconds
        if not self._groups or (seconds is not None and seconds <= 0):
            return
        groups = iter(self._groups)
        workers = [asyncio.create_task(self._work(groups)) for _ in range(min(concurrency, len(self._groups)))]
        try:
            try:
                await asyncio.wait(workers, timeout=seconds)
            finally:
                self._stopped = True
                late = [worker for worker in workers if not worker.done()]
                for worker in late:
                    worker.cancel()
                if late:  # a moment to store what was done, and to give back what was not
                    await asyncio.wait(late, timeout=bounded(LINGER))
        except asyncio.CancelledError:
            # The deadline is a reason to answer: the cancellation is that of `lambda_handler`, which ends with it.
            if ends is None or time.monotonic() < ends:
                raise

    async def _work(self, groups: Iterator[Sequence[Message]]) -> None:
        for group in groups:
            for message in group:
                # A handler may swallow the cancellation that ends the batch.
                if self._stopped or not await self._outcome(message):
                    break  # the rest of a FIFO group; elsewhere each message is a group of its own
                self.done.add(message["messageId"])

    async def _outcome(self, message: Message) -> bool:
        """Run a message, or wait for another one with its key that runs or has run; say whether it has completed."""
        try:
            key = self._key_of(message)
        except Exception as error:  # noqa: BLE001 - the user's function: it must not fail the other messages
            self._tell(message, error, unexpected=True)
            return False
        if key is None:
            return await self._run(message, None)
        known = self._outcomes.get(key)
        if known is not None:
            await asyncio.wait((known,))  # it is the other one's: a cancellation of this one must not reach it
            return known.result()
        mine = self._outcomes[key] = asyncio.get_running_loop().create_future()
        completed = False
        try:
            completed = await self._run(message, key)
        finally:
            mine.set_result(completed)
        return completed

    def _key_of(self, message: Message) -> str | None:
        if self._idem._engine.disabled:  # as in `Idempotency`
            return None
        return key_text(message["messageId"] if self._key is None else self._key(message))

    async def _run(self, message: Message, key: str | None) -> bool:
        """Run a message as an operation; say whether it has completed, now or before."""
        results = self._idem._options.replay_exceptions
        completing: tuple[type[Exception], ...] = (*DONE_BEFORE, *results)
        running = False
        try:
            # What is stored is that it is done.
            async with self._idem.operation(key, name=self.name, codec=PLAIN, map_replay=None) as op:
                if op.replayed:
                    return True
                completing, running = results, True
                await self._handler(message)
                completing, running = (CompletionError,), False
            return True
        except (SystemExit, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            if isinstance(error, completing):
                return True
            self._tell(message, error, unexpected=running)
            return False

    def _tell(self, message: Message, error: BaseException, *, unexpected: bool) -> None:
        """Log a failure, for nobody else will; with the traceback of what is not ours, as Lambda does of a handler's."""
        self.told.add(message["messageId"])
        extra = {"operation": self.name, "message_id": message["messageId"], "error": type(error).__name__}
        trace = error if unexpected and not isinstance(error, IdempotencyError) else None
        logger.warning("batch_item_failed", extra=extra, exc_info=trace)


def _messages(event: Any) -> list[Message]:
    records = cast("Mapping[str, Any]", event).get("Records") if isinstance(event, Mapping) else None
    if not isinstance(records, list):
        raise ConfigurationError("process_sqs takes the event of an SQS trigger, and this one has no list of Records")
    for record in cast("Any", records):
        name = cast("Mapping[str, Any]", record).get("messageId") if isinstance(record, Mapping) else None
        if not isinstance(name, str) or not name:
            raise ConfigurationError("process_sqs takes the event of an SQS trigger, and a record has no messageId")
    return cast("list[Message]", records)


def _groups(messages: Sequence[Message]) -> list[list[Message]]:
    """Return what runs in order: the groups of a FIFO queue, elsewhere each message on its own."""
    groups: dict[Any, list[Message]] = {}
    for number, message in enumerate(messages):
        fifo = str(message.get("eventSourceARN", "")).endswith(".fifo")
        attributes: Any = message.get("attributes") or {}
        group = attributes.get("MessageGroupId", "") if fifo else number
        groups.setdefault(group, []).append(message)
    return list(groups.values())


def _with_context(handler: Handler, context: object) -> Handler:
    """Return a function of a message alone.

    Raises:
        ConfigurationError: no coroutine function, or one that takes neither a message nor message and context.
    """
    if not is_coroutine_callable(handler):
        raise ConfigurationError(f"process_sqs takes a coroutine function of a message, not {handler!r}")
    signature = inspect.signature(handler)
    second = [*signature.parameters.values()][1:2]
    if not _takes(signature, 1) or (second and second[0].name == "context"):
        if not _takes(signature, 2):
            raise ConfigurationError(
                f"process_sqs calls a function of a message, or of message and context, not {handler!r}"
            )

        @functools.wraps(handler)
        async def with_context(message: Message) -> object:
            return await handler(message, context)

        return with_context
    return handler


def _takes(signature: inspect.Signature, arguments: int) -> bool:
    try:
        signature.bind(*(None,) * arguments)
    except TypeError:
        return False
    return True
