"""Batches of SQS messages: each message once, and an answer that names those to be delivered again."""

import asyncio
import logging
from typing import Any

import pytest

from asyncidem import (
    Idempotency,
    MemoryStore,
    MsgspecCodec,
    PydanticCodec,
    StoreUnavailableError,
)
from asyncidem.errors import CodecError, CompletionError, ReplayedError, ResultUnavailableError
from asyncidem.integrations.aws_lambda import jmespath_key, process_sqs
from asyncidem.testing import FaultyStore

from invocations import Context, Handler, failed, sqs_event


class TestOutcomes:
    """What is a success, and what is delivered again."""

    async def test_completed_is_success_and_a_failure_fails_alone(self, idem: Idempotency) -> None:
        """Delivered again, only what failed runs again; what it returns is of no interest."""
        handler = Handler("b")
        event = sqs_event("a", "b", "c")
        assert failed(await process_sqs(event, Context(), handler, idem=idem)) == ["b"]
        assert sorted(handler.ran) == ["a", "b", "c"]
        handler.failing.clear()
        assert failed(await process_sqs(event, Context(), handler, idem=idem)) == []
        assert sorted(handler.ran) == ["a", "b", "b", "c"]

    async def test_the_key_is_the_message_id(self, idem: Idempotency, store: MemoryStore) -> None:
        """In the key space of `run`, without a fingerprint; what changes with a delivery changes nothing."""
        await process_sqs(sqs_event("a"), Context(), Handler(), idem=idem)
        record = await store.get("a")
        assert record is not None
        assert (record.state, record.data, record.fingerprint) == ("COMPLETED", "null", None)

    async def test_in_progress_elsewhere_is_a_failure(
        self, idem: Idempotency, store: MemoryStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A success would delete the message although its effect may never come."""
        handler = Handler()
        await store.claim("b")
        assert failed(await process_sqs(sqs_event("a", "b"), Context(), handler, idem=idem)) == ["b"]
        assert handler.ran == ["a"]
        (record,) = caplog.records
        assert (record.message, record.__dict__["message_id"], record.__dict__["error"]) == (
            "batch_item_failed",
            "b",
            "InProgressError",
        )
        assert record.exc_info is None

    async def test_a_failure_is_logged_with_its_traceback(
        self, idem: Idempotency, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nobody else would say what went wrong."""
        handler = Handler("b")
        await process_sqs(sqs_event("b"), Context(), handler, idem=idem)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.exc_info is not None
        assert isinstance(record.exc_info[1], ValueError)

    @pytest.mark.parametrize("error", [asyncio.CancelledError(), type("Own", (BaseException,), {})()])
    async def test_whatever_a_handler_raises_fails_its_message(self, idem: Idempotency, error: BaseException) -> None:
        """A cancellation of its own, or a BaseException, ends neither the batch nor the others."""

        async def handler(message: Any) -> None:
            if message["messageId"] == "a":
                raise error

        assert failed(await process_sqs(sqs_event("a", "b"), Context(), handler, idem=idem)) == ["a"]

    def test_what_ends_the_process_does(self, idem: Idempotency) -> None:
        """SystemExit is no failure of a message."""

        async def handler(message: Any) -> None:
            raise SystemExit(3)

        with pytest.raises(SystemExit):
            asyncio.run(process_sqs(sqs_event("a"), Context(), handler, idem=idem))

    async def test_a_store_that_is_down_fails_them_all(self) -> None:
        """None has run."""
        faulty = FaultyStore(MemoryStore())
        faulty.fault("put_if_absent", before=StoreUnavailableError("down"), times=None)
        handler = Handler()
        assert failed(await process_sqs(sqs_event("a", "b"), Context(), handler, idem=Idempotency(faulty))) == [
            "a",
            "b",
        ]
        assert handler.ran == []

    @pytest.mark.parametrize("on_completion_error", ["return", "raise"])
    async def test_an_effect_that_could_not_be_stored_is_a_success(self, on_completion_error: Any) -> None:
        """It has happened; what stores it goes on in the background."""
        faulty = FaultyStore(MemoryStore())
        faulty.fault("swap", before=StoreUnavailableError("down"))
        idem = Idempotency(faulty, on_completion_error=on_completion_error)
        assert failed(await process_sqs(sqs_event("a"), Context(), Handler(), idem=idem)) == []

    async def test_an_exception_that_is_a_result_is_one(self, store: MemoryStore) -> None:
        """The operation has completed with it, now and when it is delivered again."""
        idem = Idempotency(store, replay_exceptions=ValueError)
        handler = Handler("a")
        for _ in range(2):
            assert failed(await process_sqs(sqs_event("a"), Context(), handler, idem=idem)) == []
        assert handler.ran == ["a"]

    @pytest.mark.parametrize(
        "data",
        [('"!"', "unavailable", None), ('"!"', "exception", '{"type": "gone:Error", "args": []}'), ("{", None, None)],
    )
    async def test_what_completed_without_a_result_is_a_success(self, store: MemoryStore, data: Any) -> None:
        """Nobody asks for it: too large, of a class that is gone, or written by another codec."""
        claim: Any = await store.claim("a")
        text, outcome, error = data
        await store.finish(claim, None if outcome else text, None, outcome, error)
        handler = Handler()
        assert failed(await process_sqs(sqs_event("a"), Context(), handler, idem=Idempotency(store))) == []
        assert handler.ran == []

    @pytest.mark.parametrize(
        "error",
        [
            ResultUnavailableError("k", "unavailable"),
            ReplayedError("k", "Error", "x"),
            CodecError("x"),
            CompletionError("k", 1),
        ],
        ids=lambda error: type(error).__name__,
    )
    async def test_such_an_error_of_the_handlers_own_is_a_failure(self, idem: Idempotency, error: Exception) -> None:
        """It tells of an operation within; this one has not completed."""

        async def handler(message: Any) -> None:
            raise error

        assert failed(await process_sqs(sqs_event("a"), Context(), handler, idem=idem)) == ["a"]

    @pytest.mark.parametrize("codec", [PydanticCodec(dict[str, int]), MsgspecCodec()])
    async def test_options_that_have_to_do_with_results_have_no_part(self, store: MemoryStore, codec: Any) -> None:
        """Neither the codec nor `map_replay` is asked."""
        idem = Idempotency(store, codec=codec, map_replay=lambda *_: pytest.fail("asked"))
        for _ in range(2):
            assert failed(await process_sqs(sqs_event("a"), Context(), Handler(), idem=idem)) == []

    async def test_without_protection_each_runs(
        self, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """With `ASYNCIDEM_DISABLED` no key is asked for."""
        monkeypatch.setenv("ASYNCIDEM_DISABLED", "1")
        handler, idem = Handler(), Idempotency(store)
        key = jmespath_key("powertools_json(nothing)")
        for _ in range(2):
            assert failed(await process_sqs(sqs_event("a"), Context(), handler, idem=idem, key=key)) == []
        assert handler.ran == ["a", "a"]


class TestKeys:
    """Keys of one's own, and messages that have the same."""

    async def test_a_key_of_the_business(self, idem: Idempotency) -> None:
        """Two messages with the same are one effect, in one batch or in two, and share its outcome."""
        handler = Handler("a")
        key = jmespath_key("powertools_json(body).order_id")
        event = sqs_event("a", "b")
        event["Records"][1]["body"] = event["Records"][0]["body"]
        assert failed(await process_sqs(event, Context(), handler, idem=idem, key=key)) == ["a", "b"]
        assert handler.ran == ["a"]
        handler.failing.clear()
        assert failed(await process_sqs(event, Context(), handler, idem=idem, key=key)) == []
        assert failed(await process_sqs(event, Context(), handler, idem=idem, key=key)) == []
        assert handler.ran == ["a", "a"]

    async def test_a_message_that_is_twice_in_a_batch_is_one(self, idem: Idempotency) -> None:
        """One effect, one outcome, named once."""
        handler = Handler("b")
        assert failed(await process_sqs(sqs_event("a", "a", "b", "b"), Context(), handler, idem=idem)) == ["b"]
        assert sorted(handler.ran) == ["a", "b"]

    @pytest.mark.parametrize("missing_key", ["raise", "run"])
    async def test_a_missing_key_is_what_the_option_decides_about(self, store: MemoryStore, missing_key: Any) -> None:
        """Refused, its message fails alone."""
        handler = Handler()
        idem = Idempotency(store, missing_key=missing_key)
        response = await process_sqs(
            sqs_event("a", "b"),
            Context(),
            handler,
            idem=idem,
            key=lambda message: "k" if message["messageId"] == "b" else "",
        )
        assert failed(response) == (["a"] if missing_key == "raise" else [])

    async def test_a_key_that_cannot_be_made_fails_its_message_alone(
        self, idem: Idempotency, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Whatever the function raises."""

        def key(message: Any) -> Any:
            return {"a": 1}[message["messageId"]]

        assert failed(await process_sqs(sqs_event("a", "b"), Context(), Handler(), idem=idem, key=key)) == ["b"]
        assert [record.__dict__["error"] for record in caplog.records] == ["KeyError"]

    async def test_numbers_are_keys(self, idem: Idempotency, store: MemoryStore) -> None:
        """As for a decorated function: their canonical text."""
        await process_sqs(sqs_event("a"), Context(), Handler(), idem=idem, key=lambda _: 7)
        assert await store.get("7") is not None
