"""The seam that commands pass: what is repeated, until when, and what a caller is told."""

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis import exceptions

from asyncidem import Claimed, ConfigurationError, MemoryStore, State, StoreError, StoreUnavailableError
from asyncidem.model import Stored, Swap
from asyncidem.stores.link import Link, Progress
from asyncidem.stores.primitives import Within

from loops import run_virtual


class Sender:
    """Does what a command does: raises these errors in turn, having sent something or not, and then answers."""

    def __init__(self, *errors: Exception, sent: bool = True) -> None:
        self.errors = list(errors)
        self.sent = sent
        self.tries = 0

    async def __call__(self, progress: Progress) -> str:
        self.tries += 1
        progress.sent = self.sent
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


LOST = exceptions.ConnectionError("Connection closed by server.")
OOM = exceptions.OutOfMemoryError("used memory > 'maxmemory'")


@pytest.mark.parametrize(
    "error",
    [
        LOST,
        OSError("reset"),
        KeyError("whatever a client throws"),
        exceptions.ReadOnlyError("replica"),
        exceptions.BusyLoadingError("loading"),
        exceptions.TryAgainError("try again"),
        exceptions.MasterDownError("down"),
        exceptions.ClusterDownError("down"),
        exceptions.ResponseError("BUSY Redis is busy running a script."),
    ],
    ids=repr,
)
async def test_what_passes_is_repeated(error: Exception) -> None:
    """Errors of a connection, and refusals that pass, are repeated until there is an answer."""
    send = Sender(error, error, error)
    assert await Link(1).step(send) == "answer"
    assert send.tries == 4


@pytest.mark.parametrize(
    ("error", "kind", "hint"),
    [
        (OOM, StoreUnavailableError, "maxmemory"),
        (exceptions.ResponseError("MISCONF cannot persist"), StoreUnavailableError, "MISCONF"),
        (exceptions.ResponseError("NOREPLICAS not enough"), StoreUnavailableError, "NOREPLICAS"),
        (exceptions.NoPermissionError("no permissions"), StoreError, "EVALSHA on the keys of the prefix"),
        (exceptions.ResponseError("WRONGTYPE wrong kind"), StoreError, "another Redis type"),
        (exceptions.AuthenticationError("WRONGPASS"), StoreError, "check the user name and the password"),
        (exceptions.ResponseError("value is not an integer"), StoreError, "not an integer$"),
    ],
    ids=repr,
)
async def test_what_lasts_is_not_repeated(error: Exception, kind: type[StoreError], hint: str) -> None:
    """A refusal that lasts is told at once, with its cause and what to do; nothing was written."""
    send = Sender(error)
    with pytest.raises(StoreError, match=hint) as raised:
        await Link(5).step(send)
    assert type(raised.value) is kind
    assert raised.value.__cause__ is error
    assert not raised.value.outcome_unknown
    assert send.tries == 1


async def test_refusal_after_a_lost_reply() -> None:
    """A refusal tells nothing of an earlier try whose reply was lost: that one may have written."""
    denied = exceptions.NoPermissionError("no")
    with pytest.raises(StoreUnavailableError) as raised:
        await Link(5).step(Sender(LOST, denied))
    assert raised.value.outcome_unknown
    assert raised.value.__cause__ is denied


async def test_refusal_after_a_failed_connection() -> None:
    """A refusal after a try that had sent nothing is still one that is known."""
    with pytest.raises(StoreError) as raised:
        await Link(5).step(Sender(LOST, OOM, sent=False))
    assert not raised.value.outcome_unknown


@pytest.mark.parametrize(
    ("errors", "sent", "unknown"),
    [
        ([LOST] * 1000, True, True),
        ([LOST] * 1000, False, False),
        ([exceptions.ReadOnlyError("replica")] * 1000, True, False),
        ([LOST, *[exceptions.ReadOnlyError("replica")] * 1000], True, True),
    ],
    ids=["lost", "not sent", "refused", "lost, then refused"],
)
async def test_deadline(errors: list[Exception], sent: bool, unknown: bool) -> None:
    """At the deadline the caller is told what the last error was, and whether something may have been written."""
    began = time.monotonic()
    with pytest.raises(StoreUnavailableError, match=r"within 0\.05 s") as raised:
        await Link(0.05).step(Sender(*errors, sent=sent))
    assert time.monotonic() - began < 0.5
    assert raised.value.outcome_unknown == unknown
    assert raised.value.__cause__ is errors[-1]


async def test_deadline_of_the_call() -> None:
    """The primitives of one call share its deadline, however short it has become."""
    link = Link(60)
    with Within(0.05), Within(60):
        began = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            await link.step(Sender(*[LOST] * 1000))
    assert time.monotonic() - began < 1


async def test_deadline_that_has_come() -> None:
    """A step that begins after the deadline sends nothing."""
    send = Sender()
    with Within(-1), pytest.raises(StoreUnavailableError) as raised:
        await Link(60).step(send)
    assert (send.tries, raised.value.outcome_unknown, raised.value.__cause__) == (0, False, None)


async def test_silence() -> None:
    """A try that gets no answer for a third of the time is given up and repeated."""
    tries: list[bool] = []

    async def send(progress: Progress) -> str:
        progress.sent = True
        tries.append(True)
        if len(tries) == 1:
            await asyncio.Event().wait()
        return "answer"

    began = time.monotonic()
    assert await Link(0.6).step(send) == "answer"
    assert len(tries) == 2
    assert 0.19 < time.monotonic() - began < 0.6


async def test_our_own_errors_pass() -> None:
    """An error of ours is no trouble of the server's: it is raised as it is."""
    error = ConfigurationError("must be a coroutine method")
    send = Sender(error)
    with pytest.raises(ConfigurationError) as raised:
        await Link(5).step(send)
    assert raised.value is error
    assert send.tries == 1


async def test_command_outlives_its_caller() -> None:
    """A command goes on when its caller is cancelled, and the next one on its key waits for its end."""
    link, go, order = Link(5), asyncio.Event(), list[str]()

    def work(name: str) -> Callable[[], Awaitable[str]]:
        async def run() -> str:
            if name == "first":
                await go.wait()
            order.append(name)
            return name

        return run

    loop = asyncio.get_running_loop()
    first = loop.create_task(link.detached("k", work("first")))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    second = loop.create_task(link.detached("k", work("second")))  # type: ignore[arg-type]
    assert await link.detached("other", work("other")) == "other"  # type: ignore[arg-type]
    assert not second.done()
    go.set()
    assert await second == "second"
    assert order == ["other", "first", "second"]
    assert not link._abandoned


async def test_commands_of_one_key_abandoned_together() -> None:
    """A command waits for the end of every earlier one on its key whose caller is gone, not only of the last."""
    link, go, ended = Link(5), asyncio.Event(), list[str]()

    async def slow() -> None:
        await go.wait()
        ended.append("slow")

    async def quick() -> None:
        await asyncio.sleep(0)
        ended.append("quick")

    async def undo() -> None:
        ended.append("undo")

    loop = asyncio.get_running_loop()
    calls = [loop.create_task(link.detached("k", work)) for work in (slow, quick)]
    await asyncio.sleep(0)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    last = loop.create_task(link.detached("k", undo))
    for _ in range(10):
        await asyncio.sleep(0)
    go.set()
    await last
    assert ended == ["quick", "slow", "undo"]


async def test_aclose_waits_for_commands() -> None:
    """Closing waits for the commands whose callers are gone, whatever becomes of them."""
    link, go, ended = Link(5), asyncio.Event(), list[bool]()

    async def work() -> None:
        await go.wait()
        ended.append(True)
        raise StoreError("nobody hears of it")

    loop = asyncio.get_running_loop()
    call = loop.create_task(link.detached("k", work))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait([call])
    loop.call_soon(go.set)
    await link.aclose()
    assert ended == [True]
    await link.aclose()


async def test_command_cancelled_from_outside() -> None:
    """A command that somebody else cancels, as `asyncio.run` does at its end, is an outcome that is not known."""
    link, inside = Link(5), list[asyncio.Task[None]]()

    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        inside.append(task)
        await asyncio.Event().wait()

    call = asyncio.get_running_loop().create_task(link.detached("k", work))
    while not inside:
        await asyncio.sleep(0)
    inside[0].cancel()
    with pytest.raises(StoreUnavailableError, match="cancelled") as raised:
        await call
    assert raised.value.outcome_unknown


async def test_pause_ends_with_the_call() -> None:
    """Waiting for what is taken ends with the call's deadline: nothing was written."""
    link = Link(5)
    with Within(5):
        await link.pause(0, "taken")
    with Within(-1), pytest.raises(StoreUnavailableError, match="stays taken") as raised:
        await link.pause(0, "the lock stays taken")
    assert not raised.value.outcome_unknown


def test_call_closed_in_another_context() -> None:
    """A call whose coroutine is closed as garbage, in a context that is not its own, ends quietly."""

    class Hung(MemoryStore):
        async def read(self, key: str) -> Stored | None:
            return await Never()

    call = Hung().get("k")
    contextvars.copy_context().run(call.send, None)
    call.close()
    assert call.cr_frame is None


class Never:
    """Awaited, it suspends once and for all."""

    def __await__(self):  # type: ignore[no-untyped-def]  # noqa: ANN204
        """Suspend."""
        yield


class Failing(MemoryStore):
    """A store whose writes after the claim fail, or hang, until they are let through."""

    def __init__(self, how: str) -> None:
        super().__init__(timeout=5)
        self.how = how
        self.tries = 0

    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        self.tries += 1
        if self.how == "fail":
            raise KeyError("whatever a client throws")
        if self.how == "hang":
            await asyncio.Event().wait()
        if self.how == "refuse":
            raise StoreError("refused")
        return await super().remove(key, expected, exact=exact)


async def failed_release(store: Failing) -> Claimed:
    """Claim for thirty seconds and fail to release."""
    claim = await store.claim("k", lease=30)
    assert isinstance(claim, Claimed)
    how, store.how = store.how, "fail"
    with pytest.raises(StoreUnavailableError) as raised:
        await store.release(claim)
    assert raised.value.outcome_unknown
    assert isinstance(raised.value.__cause__, KeyError)
    store.how, store.tries = how, 0
    return claim


@pytest.mark.parametrize("how", ["fail", "hang"])
def test_repetition_ends_with_the_lease(how: str) -> None:
    """What is repeated in the background is given up when the lease is over: nothing more is owed then."""

    async def main() -> float:
        store = Failing(how)
        await failed_release(store)
        await asyncio.wait(store._background)
        assert not store._background
        assert store.tries == (1 if how == "hang" else store.tries)
        assert store.tries < 40
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == pytest.approx(30, abs=0.1)


def test_completion_that_is_refused_for_a_while() -> None:
    """A completion that the server cannot take now is repeated as it was, though its caller knows that nothing is there."""

    class Full(MemoryStore):
        full = True

        async def swap(self, *args: Any, **options: Any) -> Swap:
            if self.full:
                raise StoreUnavailableError("used memory > 'maxmemory'", outcome_unknown=False)
            return await super().swap(*args, **options)

    async def main() -> None:
        store = Full()
        claim = await store.claim("k", lease=30)
        assert isinstance(claim, Claimed)
        with pytest.raises(StoreUnavailableError):
            await store.complete(claim, "1")
        store.full = False
        await asyncio.wait(store._background)
        record = await store.get("k")
        assert record is not None
        assert (record.state, record.data) == (State.COMPLETED, "1")

    run_virtual(main())


@pytest.mark.parametrize("how", ["pass", "refuse"])
def test_repetition_ends_with_an_answer(how: str) -> None:
    """What is repeated ends with the first answer, be it a refusal."""

    async def main() -> int:
        store = Failing(how)
        await failed_release(store)
        await asyncio.wait(store._background)
        assert asyncio.get_running_loop().time() < 1
        assert (await store.get("k") is None) == (how == "pass")
        return store.tries

    assert run_virtual(main()) == 1


def test_cancelled_repetition_goes_on_for_a_moment() -> None:
    """A repetition that is cancelled, as `asyncio.run` does at its end, goes on for half a second; cancelled again, it ends."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for how, again, seconds in (
            ("fail", False, 0.5),
            ("hang", False, 0.5),
            ("hang", True, 0.1),
            ("pass", False, 0),
        ):
            store = Failing("hang")
            await failed_release(store)
            (task,) = store._background
            await asyncio.sleep(0.01)
            assert store.tries == 1
            began, store.how = loop.time(), how
            task.cancel()
            if again:
                await asyncio.sleep(0.1)
                task.cancel()
            await asyncio.wait([task])
            assert loop.time() - began == pytest.approx(seconds, abs=0.05)
            assert task.cancelled() == again
            assert (await store.get("k") is None) == (how == "pass")

    run_virtual(main())


def test_aclose_ends_repetitions() -> None:
    """Closing gives what is still repeated the store's time, and stops it then: no task is left behind."""

    async def main() -> float:
        store = Failing("hang")
        await failed_release(store)
        await store.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return asyncio.get_running_loop().time()

    assert 5 <= run_virtual(main()) <= 5.6


def test_background_of_another_loop() -> None:
    """What was repeated on a loop that is gone died with it: closing on the next loop does not wait for it."""
    store = Failing("hang")
    loop = asyncio.new_event_loop()
    loop.run_until_complete(failed_release(store))
    (task,) = store._background
    asyncio.run(store.aclose())
    assert not task.done()
    task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    task.cancel()
    loop.run_until_complete(asyncio.wait([task]))
    loop.close()
    assert not store._background
