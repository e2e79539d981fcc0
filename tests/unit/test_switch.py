"""``ASYNCIDEM_DISABLED``: for local tests every operation runs unprotected, and the log says so once."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from asyncidem import ConfigurationError, Event, Idempotency, MemoryStore, current_operation, switch
from asyncidem.testing import use_store


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was logged yet, and the variable is not set."""
    monkeypatch.setattr(switch, "_warned", [])
    monkeypatch.delenv("ASYNCIDEM_DISABLED", raising=False)


@pytest.fixture
def disabled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set it."""
    monkeypatch.setenv("ASYNCIDEM_DISABLED", "1")
    return


class Handler:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, *args: Any) -> int:
        self.calls += 1
        return self.calls


async def test_every_form_runs_each_time(disabled: None, caplog: pytest.LogCaptureFixture) -> None:
    """No key is asked for, the store is not touched, nothing is kept in the cache, and there is one warning."""
    store = MemoryStore()
    seen: list[Event] = []
    idem = Idempotency(store, local_cache=8, hooks=[seen.append])
    handler = Handler()

    @idem.idempotent(key="order_id", payload="amount")
    async def charge(order_id: str | None, amount: object = 1) -> int:
        op = current_operation()
        assert op is not None
        assert (op.key, op.attempt, op.replayed) == ("", 1, False)
        return await handler()

    assert [await charge("a"), await charge("a", 2), await charge(None), await charge("a", object())] == [1, 2, 3, 4]
    for key in ("a", "a", None):
        await idem.run(key, handler, payload=object())
        async with idem.operation(key, payload=object()) as op:
            op.set_result(await handler())
    assert handler.calls == 10
    assert store._values == {}
    assert [record.getMessage() for record in caplog.records] == [
        "disabled: ASYNCIDEM_DISABLED=1, every operation runs unprotected"
    ]
    assert caplog.records[0].levelno == logging.WARNING
    assert {event.name for event in seen} == {"ran_unprotected"}


async def test_the_log_says_it_once_for_all_objects(disabled: None, caplog: pytest.LogCaptureFixture) -> None:
    """Another object, and another store under one, say nothing more."""
    idem = Idempotency(MemoryStore())
    Idempotency(MemoryStore())
    handler = Handler()
    with use_store(idem, MemoryStore()) as store:
        assert [await idem.run("a", handler), await idem.run("a", handler)] == [1, 2]
        assert await store.get("a") is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "yes", " on "])
async def test_words_that_set_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1, true, yes and on, in any case."""
    monkeypatch.setenv("ASYNCIDEM_DISABLED", value)
    handler, idem = Handler(), Idempotency(MemoryStore())
    assert [await idem.run("a", handler), await idem.run("a", handler)] == [1, 2]


@pytest.mark.parametrize("value", [None, "", "0", "false", "no", "Off"])
async def test_words_that_do_not(
    value: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Unset, empty, 0, false, no and off protect as ever."""
    if value is not None:
        monkeypatch.setenv("ASYNCIDEM_DISABLED", value)
    handler, idem = Handler(), Idempotency(MemoryStore())
    assert [await idem.run("a", handler), await idem.run("a", handler)] == [1, 1]
    assert caplog.records == []


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sets it wants to know that it does nothing."""
    monkeypatch.setenv("ASYNCIDEM_DISABLED", "ture")
    with pytest.raises(ConfigurationError, match=r"ASYNCIDEM_DISABLED must be one of 1, true, yes, on.*'ture'"):
        Idempotency(MemoryStore())


async def test_it_is_read_when_the_object_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later changes of the environment change no object: calls do not ask for it."""
    handler, idem = Handler(), Idempotency(MemoryStore())
    monkeypatch.setenv("ASYNCIDEM_DISABLED", "1")
    other = Idempotency(MemoryStore())
    monkeypatch.delenv("ASYNCIDEM_DISABLED")
    assert [await idem.run("a", handler), await idem.run("a", handler)] == [1, 1]
    assert [await other.run("a", handler), await other.run("a", handler)] == [2, 3]
