"""Batches of SQS messages: side by side and in order, cut off, on the wire."""

import asyncio
import contextlib
import functools
from typing import Any

import pytest

from asyncidem import (
    ConfigurationError,
    Idempotency,
    MemoryStore,
    RedisStore,
    current_operation,
)
from asyncidem.integrations.aws_lambda import lambda_handler, process_sqs
from asyncidem.testing import FaultyStore

from invocations import Context, Handler, failed, sqs_event
from proxy import Proxy
from servers import HOST, Server


async def forever() -> None:
    """Run until it is cancelled."""
    await asyncio.Event().wait()


class TestOrder:
    """Side by side, or one after the other."""

    async def test_so_many_run_side_by_side(self, idem: Idempotency) -> None:
        """Ten by default, or as many as are asked for."""
        running, most = 0, 0

        async def handler(message: Any) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.01)
            running -= 1

        names = [f"m-{number}" for number in range(25)]
        for concurrency, expected in ((None, 10), (3, 3), (100, 25)):
            most = 0
            options: dict[str, Any] = {} if concurrency is None else {"concurrency": concurrency}
            event = sqs_event(*(f"{concurrency}-{name}" for name in names))
            assert failed(await process_sqs(event, Context(), handler, idem=idem, **options)) == []
            assert most == expected

    async def test_a_group_of_a_fifo_queue_keeps_its_order(
        self, idem: Idempotency, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Members run one after the other, groups side by side; after a failure the rest of its group fails unrun."""
        began = asyncio.Event()
        ran: list[str] = []

        async def handler(message: Any) -> None:
            name = message["messageId"]
            ran.append(name)
            if name == "a1":
                await began.wait()  # for the other group
            if name == "b1":
                began.set()
            if name == "b2":
                raise ValueError

        event = sqs_event("a1", "b1", "a2", "b2", "b3", "a3", queue="q.fifo", groups=("A", "B", "A", "B", "B", "A"))
        assert failed(await process_sqs(event, Context(), handler, idem=idem)) == ["b2", "b3"]
        assert [name for name in ran if name[0] == "a"] == ["a1", "a2", "a3"]
        assert [name for name in ran if name[0] == "b"] == ["b1", "b2"]
        assert [record.message for record in caplog.records] == ["batch_item_failed", "batch_items_left"]

    async def test_one_group_at_a_time_if_so_asked(self, idem: Idempotency) -> None:
        """`concurrency` counts groups there; a message without one is of a group of its own sort."""
        handler = Handler()
        event = sqs_event("a1", "b1", "a2", queue="q.fifo", groups=("A", "B", "A"))
        assert failed(await process_sqs(event, Context(), handler, idem=idem, concurrency=1)) == []
        assert handler.ran == ["a1", "a2", "b1"]
        event = sqs_event("c1", "c2", queue="q.fifo")
        event["Records"][0]["attributes"] = None
        assert failed(await process_sqs(event, Context(), Handler("c1"), idem=idem)) == ["c1", "c2"]

    async def test_one_key_in_two_groups_is_run_once(self, idem: Idempotency) -> None:
        """The group that comes second waits for the outcome, and goes on with it."""
        handler = Handler("bad")
        event = sqs_event("a1", "b1", "bad", "c", "d", queue="q.fifo", groups=("A", "B", "A", "B", "B"))

        def key(message: Any) -> str:
            name: str = message["messageId"]
            return {"a1": "1", "b1": "1", "bad": "2", "c": "2"}.get(name, name)

        assert failed(await process_sqs(event, Context(), handler, idem=idem, key=key)) == ["bad", "c", "d"]
        assert handler.ran == ["a1", "bad"]

    async def test_an_empty_batch_has_no_failures(self, idem: Idempotency) -> None:
        """Nor does anything run."""
        assert failed(await process_sqs({"Records": []}, Context(), Handler(), idem=idem)) == []


class TestDeadline:
    """The invocation ends before the batch does."""

    async def test_what_is_done_stays_done_and_the_rest_fails(
        self, idem: Idempotency, store: MemoryStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An answer, not an error, in time; what was running has an unknown outcome, and what waited never ran."""
        ran: list[str] = []

        async def handler(message: Any) -> None:
            ran.append(message["messageId"])
            if message["messageId"] == "b":
                await forever()

        context = Context(0.5)
        names = ["a", "b", "c", "d"]
        response = await process_sqs(sqs_event(*names), context, handler, idem=idem, concurrency=1, reserve=0.3)
        assert failed(response) == ["b", "c", "d"]
        assert context.get_remaining_time_in_millis() > 250
        assert ran == ["a", "b"]
        states = [(record and record.state) for record in [await store.get(name) for name in names]]
        assert states == ["COMPLETED", "INPROGRESS", None, None]
        assert [(record.message, record.__dict__["messages"]) for record in caplog.records] == [("batch_items_left", 3)]

    @pytest.mark.parametrize("outer", [0.3, 0.5, 0.2])
    async def test_under_the_entry_point_it_is_an_answer_too(self, idem: Idempotency, outer: float) -> None:
        """Whichever of the two has the greater reserve."""

        async def one(message: Any) -> None:
            await forever()

        @lambda_handler(reserve=outer)
        async def handler(event: Any, context: Any) -> Any:
            return await process_sqs(event, context, one, idem=idem, reserve=0.3)

        context = Context(0.6)
        assert failed(await handler.aio(sqs_event("a"), context)) == ["a"]
        assert context.get_remaining_time_in_millis() > max(outer, 0.3) * 1000 - 30

    async def test_a_message_that_settles_slowly_does_not_hold_up_the_answer(self) -> None:
        """Under the entry point its cancellation is taken for what it is: the deadline."""
        faulty = FaultyStore(MemoryStore())
        faulty.fault("remove", before=60.0, times=None)
        idem = Idempotency(faulty, on_cancel="release")

        async def one(message: Any) -> None:
            await forever()

        @lambda_handler(reserve=0.3)
        async def handler(event: Any, context: Any) -> Any:
            return await process_sqs(event, context, one, idem=idem)

        context = Context(0.6)
        assert failed(await handler.aio(sqs_event("a"), context)) == ["a"]
        assert context.get_remaining_time_in_millis() > 150

    async def test_a_handler_that_swallows_its_cancellation_is_the_last_one(self, idem: Idempotency) -> None:
        """It may complete; no other message is begun after that."""
        ran: list[str] = []

        async def handler(message: Any) -> None:
            ran.append(message["messageId"])
            with contextlib.suppress(asyncio.CancelledError):
                await forever()
            await asyncio.sleep(0)  # it goes on

        for event in (sqs_event("a", "b"), sqs_event("c", "d", queue="q.fifo", groups=("A", "A"))):
            ran.clear()
            response = await process_sqs(event, Context(0.45), handler, idem=idem, concurrency=1)
            assert len(ran) == 1
            assert len(failed(response)) == 1

    async def test_a_handler_that_does_not_end_does_not_hold_up_the_answer(self, idem: Idempotency) -> None:
        """It goes on without it, as far as Lambda lets it."""
        go_on, ended = asyncio.Event(), asyncio.Event()

        async def handler(message: Any) -> None:
            try:
                await forever()
            except asyncio.CancelledError:
                await go_on.wait()
                ended.set()

        context = Context(0.6)
        assert failed(await process_sqs(sqs_event("a"), context, handler, idem=idem)) == ["a"]
        assert context.get_remaining_time_in_millis() > 0
        go_on.set()
        await ended.wait()

    async def test_who_waits_for_another_message_is_cancelled_alone(self, idem: Idempotency) -> None:
        """The outcome that it shares is the other one's, which completes."""

        async def handler(message: Any) -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await forever()
            await asyncio.sleep(0)  # it goes on

        response = await process_sqs(sqs_event("a", "b"), Context(0.45), handler, idem=idem, key=lambda _: "k")
        assert failed(response) == ["b"]

    async def test_without_time_nothing_is_begun(self, idem: Idempotency) -> None:
        """All are failures."""
        handler = Handler()
        assert failed(await process_sqs(sqs_event("a", "b"), Context(0.3), handler, idem=idem)) == ["a", "b"]
        assert handler.ran == []

    @pytest.mark.parametrize("make_context", [lambda: None, Context], ids=["without", "with a deadline"])
    async def test_cancelled_from_outside_it_ends(self, idem: Idempotency, make_context: Any) -> None:
        """That is no deadline: the messages are cancelled, and so is the batch."""
        cancelled: list[str] = []
        began = asyncio.Event()

        async def handler(message: Any) -> None:
            began.set()
            try:
                await forever()
            finally:
                cancelled.append(message["messageId"])

        task = asyncio.create_task(process_sqs(sqs_event("a"), make_context(), handler, idem=idem))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cancelled == ["a"]


class TestArguments:
    """What it is called with."""

    async def test_a_handler_may_take_the_context(self, idem: Idempotency) -> None:
        """Where it needs a second argument, or has one of that name."""
        seen: list[Any] = []

        async def needs(message: Any, other: Any) -> None:
            seen.append(other)

        async def names(message: Any, context: Any = None) -> None:
            seen.append(context)

        async def has(message: Any, retries: int = 3) -> None:
            seen.append(retries)

        async def prefixed(prefix: str, message: Any) -> None:
            seen.append(prefix)

        context = Context()
        for number, handler in enumerate((needs, names, has, functools.partial(prefixed, "p"))):
            await process_sqs(sqs_event(str(number)), context, handler, idem=idem)
        assert seen == [context, context, 3, "p"]

    async def test_the_handler_knows_its_operation(self, idem: Idempotency) -> None:
        """Its name labels it, and its attempt and downstream key are there."""
        seen: list[Any] = []

        async def one(message: Any) -> None:
            op = current_operation()
            assert op is not None
            seen.append((op.key, op.name, op.attempt))

        await process_sqs(sqs_event("a"), Context(), one, idem=idem)
        assert seen == [("a", one.__qualname__, 1)]

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"handler": lambda _: None}, "takes a coroutine function of a message"),
            ({"handler": "name"}, "takes a coroutine function of a message"),
            ({"handler": forever}, "a function of a message, or of message and context"),
            ({"idem": MemoryStore()}, "idem must be an Idempotency, not MemoryStore"),
            ({"key": "order_id"}, "key must be a plain function of a message, not 'order_id'"),
            ({"key": forever}, "key must be a plain function"),
            ({"concurrency": 0}, "concurrency must be a whole number from 1, not 0"),
            ({"concurrency": True}, "concurrency must be"),
            ({"concurrency": 1.5}, "concurrency must be"),
            ({"reserve": 0}, "reserve must be greater than zero"),
            ({"event": None}, "has no list of Records"),
            ({"event": {"Records": {}}}, "has no list of Records"),
            ({"event": {"Records": ["a"]}}, "a record has no messageId"),
            ({"event": {"Records": [{"messageId": ""}]}}, "a record has no messageId"),
        ],
    )
    async def test_what_cannot_work_is_refused(self, idem: Idempotency, change: dict[str, Any], error: str) -> None:
        """Nothing runs, and the whole batch is delivered again."""
        given = {"event": sqs_event("a"), "handler": Handler(), "idem": idem} | change
        event, handler = given.pop("event"), given.pop("handler")
        with pytest.raises(ConfigurationError, match=error):
            await process_sqs(event, Context(), handler, **given)


async def test_a_batch_of_ten_costs_one_pipeline_of_claims(redis_url: str, server: Server) -> None:
    """The claims of ten messages are written before one of them is answered, and so are their completions."""
    together = asyncio.Barrier(10)

    async def handler(message: Any) -> None:
        async with asyncio.timeout(5):
            await together.wait()

    async with Proxy(HOST, server.port) as proxy, RedisStore.from_url(proxy.url) as store:
        idem = Idempotency(store)
        await idem.run("warm", asyncio.sleep, 0)
        for batch in range(3):
            proxy.reset_counters()
            names = [f"{batch}-{number}" for number in range(10)]
            assert failed(await process_sqs(sqs_event(*names), Context(), handler, idem=idem)) == []
            kinds = [
                b"EVALSHA" if b"\r\nEVALSHA\r\n" in request else request.split(b"\r\n")[2] for request in proxy.requests
            ]
            assert kinds == [b"SET"] * 10 + [b"EVALSHA"] * 10
            # Of each ten the first is written at once, the others together at the end of the turn.
            assert proxy.round_trips <= 4
            assert proxy.connections == 0


async def test_claims_are_written_in_one_turn(redis_url: str, server: Server) -> None:
    """All ten reach the server although it has answered none of them."""
    async with Proxy(HOST, server.port) as proxy, RedisStore.from_url(proxy.url) as store:
        idem = Idempotency(store)
        await idem.run("warm", asyncio.sleep, 0)
        proxy.reset_counters()
        proxy.hold_replies()
        names = [f"m-{number}" for number in range(10)]
        batch = asyncio.create_task(process_sqs(sqs_event(*names), Context(), Handler(), idem=idem))
        async with asyncio.timeout(5):
            while len(proxy.requests) < 10:
                await asyncio.sleep(0.001)
        proxy.heal()
        assert failed(await batch) == []
