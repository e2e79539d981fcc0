"""The entry point over an asynchronous handler, called as the runtime client calls it."""

import asyncio
import contextlib
import contextvars
import gc
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest

from asyncidem import ConfigurationError, Idempotency, MemoryStore, RedisStore, StoreUnavailableError, current_operation
from asyncidem.cutoffs import cutoff
from asyncidem.integrations.aws_lambda import DeadlineExceededError, HandlerCancelledError, lambda_handler, runtime
from asyncidem.stores.primitives import call_deadline
from asyncidem.testing import FaultyStore

from invocations import Context
from proxy import Proxy
from servers import HOST, Server


@pytest.fixture(autouse=True)
def own_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin without a loop, and leave none behind."""
    monkeypatch.setattr(runtime, "_runners", {})
    monkeypatch.setattr(runtime, "_hooked", [])
    yield
    runtime._end_loop()


async def forever() -> None:
    """Run until it is cancelled."""
    await asyncio.Event().wait()


class TestLoop:
    """One for the process."""

    def test_it_is_kept(self) -> None:
        """Invocations of all handlers of a process share a loop."""

        @lambda_handler
        async def one(event: Any, context: Any) -> Any:
            return asyncio.get_running_loop(), event, context

        @lambda_handler()
        async def two(event: Any, context: Any) -> Any:
            return asyncio.get_running_loop(), event, context

        context = Context()
        results = [one({"a": 1}, context), one({"a": 2}, context), two(None, context)]
        assert len({id(loop) for loop, _, _ in results}) == 1
        assert [(event, given) for _, event, given in results] == [
            ({"a": 1}, context),
            ({"a": 2}, context),
            (None, context),
        ]

    def test_nothing_that_an_invocation_sets_is_seen_by_the_next(self) -> None:
        """Each has a fresh copy of the context: of the caller's, and of no other invocation's."""
        var = contextvars.ContextVar("var", default="")
        var.set("import")

        @lambda_handler
        async def handler(event: Any, context: Any) -> Any:
            before = var.get()
            var.set("leaked")
            return before

        assert [handler(None, Context()) for _ in range(2)] == ["import", "import"]
        assert var.get() == "import"
        assert cutoff.get() is None

    async def test_a_running_loop_is_refused(self) -> None:
        """The error says what to do instead, which works."""

        @lambda_handler
        async def handler(event: Any, context: Any) -> Any:
            return event

        with pytest.raises(ConfigurationError, match=r"await handler\.aio\(event, context\) instead"):
            handler(1, Context())
        assert await handler.aio(1, Context()) == 1
        assert runtime._runners == {}

    def test_another_thread_is_refused_meanwhile(self) -> None:
        """A process runs one invocation at a time."""
        refused: list[BaseException] = []

        @lambda_handler
        async def handler(event: Any, context: Any) -> None:
            def call() -> None:
                with pytest.raises(ConfigurationError, match="another thread") as raised:
                    handler(event, context)
                refused.append(raised.value)

            thread = threading.Thread(target=call)
            thread.start()
            thread.join()

        handler(None, Context())
        assert len(refused) == 1

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    def test_a_forked_process_has_one_of_its_own(self) -> None:
        """The parent's loop is not touched by the child, and goes on."""

        @lambda_handler
        async def handler(event: Any, context: Any) -> Any:
            await asyncio.sleep(0.001)
            await asyncio.to_thread(lambda: None)  # it wakes the loop through its own socket
            return id(asyncio.get_running_loop())

        loop = handler(None, None)
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # on its parent's loop it would wait for ever
            status = 1
            with contextlib.suppress(BaseException):
                status = 0 if handler(None, None) != loop and len(runtime._runners) == 2 else 2
                runtime._end_loop()
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert handler(None, None) == loop

    def test_a_snapshot_holds_no_loop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before it, the loop and the connections in it end; after it the next invocation makes others. Hooked once."""
        hooks: list[Any] = []
        library: Any = types.ModuleType("snapshot_restore_py")
        library.register_before_snapshot = hooks.append
        monkeypatch.setitem(sys.modules, "snapshot_restore_py", library)

        async def handler(event: Any, context: Any) -> Any:
            return asyncio.get_running_loop()

        entry = lambda_handler(handler)
        lambda_handler(handler)
        loop = entry(None, None)
        (hook,) = hooks
        hook()
        assert loop.is_closed()
        hook()
        assert not entry(None, None).is_closed()

    def test_without_snapshots_nothing_is_missed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Elsewhere than on Lambda there is no such module."""
        monkeypatch.setitem(sys.modules, "snapshot_restore_py", None)
        assert lambda_handler(forever)  # type: ignore[arg-type]


class TestErrors:
    """What reaches the runtime client."""

    @pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), KeyboardInterrupt()])
    def test_what_it_takes_passes(self, error: BaseException) -> None:
        """Exceptions, and the two that are to end the process; the next invocation works."""

        @lambda_handler
        async def handler(event: Any, context: Any) -> Any:
            if event:
                raise event
            return "fine"

        with pytest.raises(type(error)) as raised:
            handler(error, Context())
        assert raised.value is error
        assert handler(None, Context()) == "fine"

    @pytest.mark.parametrize(
        "error",
        [asyncio.CancelledError("x"), type("Own", (BaseException,), {})(), BaseExceptionGroup("x", [GeneratorExit()])],
    )
    def test_what_would_end_the_process_does_not(self, error: BaseException) -> None:
        """It is the cause of an Exception, and the next invocation works."""

        @lambda_handler
        async def handler(event: Any, context: Any) -> Any:
            if event:
                raise event
            return "fine"

        with pytest.raises(HandlerCancelledError, match=f"ended in {type(error).__name__}") as raised:
            handler(error, Context())
        assert isinstance(raised.value.__cause__, type(error))
        assert handler(None, Context()) == "fine"

    async def test_awaited_a_cancellation_stays_one(self) -> None:
        """`aio` is cancelled as any coroutine."""

        @lambda_handler
        async def handler(event: Any, context: Any) -> None:
            await forever()

        task = asyncio.create_task(handler.aio(None, Context()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    @pytest.mark.parametrize("fn", [print, lambda *_: None, "name", None.__class__])
    def test_only_coroutine_functions_are_taken(self, fn: Any) -> None:
        """All else is refused at decoration."""
        with pytest.raises(ConfigurationError, match="takes a coroutine function of event and context"):
            lambda_handler(fn)

    @pytest.mark.parametrize("reserve", [0, -1, True, "1"])
    def test_a_reserve_is_a_duration(self, reserve: Any) -> None:
        """All else is refused at decoration."""
        with pytest.raises(ConfigurationError, match="reserve"):
            lambda_handler(reserve=reserve)

    def test_it_looks_like_its_handler(self) -> None:
        """Name, module and documentation are those of the function."""

        @lambda_handler
        async def handler(event: Any, context: Any) -> None:
            """Do it."""

        assert (handler.__name__, handler.__module__, handler.__doc__) == ("handler", __name__, "Do it.")  # type: ignore[attr-defined]


class TestDeadline:
    """Lambda kills an invocation at an instant that its context says."""

    def test_the_handler_is_cancelled_before_it(self) -> None:
        """It can clean up; its caller gets `DeadlineExceededError`, and the next invocation works."""
        cancelled: list[bool] = []

        @lambda_handler(reserve=0.2)
        async def handler(event: Any, context: Any) -> Any:
            if event:
                return event
            try:
                await forever()
            finally:
                cancelled.append(context.get_remaining_time_in_millis() > 100)

        with pytest.raises(DeadlineExceededError, match=r"cancelled 0\.2 s before") as raised:
            handler(None, Context(0.25))
        assert isinstance(raised.value, TimeoutError)
        assert cancelled == [True]
        assert handler(1, Context()) == 1

    def test_without_time_it_is_not_begun(self) -> None:
        """The error says what is left and what is reserved."""

        @lambda_handler
        async def handler(event: Any, context: Any) -> None:
            pytest.fail("it ran")

        with pytest.raises(DeadlineExceededError, match=r"0\.2\d\d s are left, and 0\.3 s are reserved"):
            handler(None, Context(0.25))

    def test_a_time_out_of_the_handlers_own_is_its_own(self) -> None:
        """It passes as it is, before the deadline and after it."""

        @lambda_handler(reserve=0.01)
        async def handler(event: Any, context: Any) -> None:
            if event == "before":
                async with asyncio.timeout(0):
                    await forever()
            try:
                await forever()
            except asyncio.CancelledError:
                raise TimeoutError("own") from None

        with pytest.raises(TimeoutError) as raised:
            handler("before", Context())
        assert not isinstance(raised.value, DeadlineExceededError)
        with pytest.raises(TimeoutError, match="own") as raised:
            handler("after", Context(0.05))
        assert not isinstance(raised.value, DeadlineExceededError)

    def test_an_answer_in_spite_of_it_is_an_answer(self) -> None:
        """A handler may take the cancellation for a reason to return what it has."""

        @lambda_handler(reserve=0.01)
        async def handler(event: Any, context: Any) -> Any:
            with contextlib.suppress(asyncio.CancelledError):
                await forever()
            return "partial"

        assert handler(None, Context(0.05)) == "partial"

    @pytest.mark.parametrize("on_cancel", ["keep", "release"])
    async def test_on_cancel_decides_about_the_key(self, on_cancel: Any) -> None:
        """A kept one is an orphan half a second after the kill."""
        store = MemoryStore()
        idem = Idempotency(store, on_cancel=on_cancel)

        @lambda_handler(reserve=0.2)
        @idem.idempotent(key=lambda *_: "k")
        async def handler(event: Any, context: Any) -> int:
            op = current_operation()
            assert op is not None
            if event is None:
                await forever()
            return op.attempt

        with pytest.raises(DeadlineExceededError):
            await handler.aio(None, Context(0.25))
        if on_cancel == "release":
            assert await handler.aio(1, Context()) == 1
            return
        await asyncio.sleep(0.75)
        assert await handler.aio(1, Context()) == 2

    async def test_a_lease_is_the_remaining_time_and_half_a_second(self) -> None:
        """Whatever `lease` says, and it is not renewed; `cutoff` is gone behind the invocation."""
        idem = Idempotency(MemoryStore(), lease=1)

        @lambda_handler
        @idem.idempotent(key=lambda *_: "k")
        async def handler(event: Any, context: Any) -> int:
            op = current_operation()
            assert op is not None
            assert op._claim is not None
            assert op._local is not None
            assert op._local.renewer._delays == {}  # type: ignore[attr-defined]
            return op._claim._lease_ms

        assert await handler.aio(None, Context(60)) == pytest.approx(60_500, abs=100)
        assert cutoff.get() is None

    async def test_without_a_context_there_is_no_deadline(self) -> None:
        """As in a test that passes none: the options hold."""
        idem = Idempotency(MemoryStore(), lease=1)

        @lambda_handler
        @idem.idempotent(key=lambda *_: "k")
        async def handler(event: Any, context: Any) -> int:
            op = current_operation()
            assert op is not None
            assert op._claim is not None
            return op._claim._lease_ms

        assert await handler.aio(None, None) == 1_000

    async def test_a_block_that_is_collected_elsewhere_leaves_the_context_alone(self) -> None:
        """A coroutine that nobody awaits to its end is closed in another context."""

        @lambda_handler
        async def handler(event: Any, context: Any) -> None:
            await forever()

        coroutine = handler.aio(None, Context())
        contextvars.copy_context().run(coroutine.send, None)
        coroutine.close()
        gc.collect()
        assert cutoff.get() is None


async def test_a_silent_store_is_an_error_and_not_a_kill(redis_url: str, server: Server) -> None:
    """Before the handler it is `StoreUnavailableError`, in time; nothing ran."""
    ran: list[Any] = []
    async with Proxy(HOST, server.port) as proxy, RedisStore.from_url(proxy.url, timeout=5) as store:
        await store.get("warm")
        idem = Idempotency(store)

        @lambda_handler
        @idem.idempotent(key=lambda *_: "k")
        async def handler(event: Any, context: Any) -> None:
            ran.append(event)

        proxy.black_hole()
        context = Context(1)
        with pytest.raises(StoreUnavailableError):
            await handler.aio(None, context)
        assert context.get_remaining_time_in_millis() > 300
        assert ran == []
        proxy.heal()


async def test_a_completion_that_comes_late_has_the_time_that_was_reserved() -> None:
    """What the handler returns when it has been cut off is still stored, in the time before the kill."""
    faulty = FaultyStore(MemoryStore())
    left: list[float] = []
    faulty.fault("swap", before=lambda: left.append((call_deadline.get() or 0.0) - time.monotonic()))
    idem = Idempotency(faulty)

    @idem.idempotent(key=lambda *_: "k")
    async def late(event: Any, context: Any) -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await forever()
        return "late"

    assert await lambda_handler(reserve=0.3)(late).aio(None, Context(0.35)) == "late"
    record = await faulty.get(idem.key_for(late, None, None))
    assert record is not None
    assert record.data == '"late"'
    assert left == [pytest.approx(0.25, abs=0.04)]
