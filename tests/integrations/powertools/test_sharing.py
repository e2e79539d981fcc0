"""One Redis with functions under Powertools: each side replays, refuses and validates what the other one wrote."""

import asyncio
import json
import threading
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel

from asyncidem import (
    Claimed,
    CodecError,
    FingerprintMismatchError,
    Idempotency,
    InProgressError,
    PydanticCodec,
    RedisStore,
    current_operation,
)
from asyncidem.integrations.powertools import powertools_key

from powertools import (
    KEY,
    ORDER,
    TAMPERED,
    DataclassSerializer,
    Peer,
    PydanticSerializer,
    async_handler_of,
    exceptions,
    handler_of,
    key_of,
    mark_of,
)

# -- replays -----------------------------------------------------------------------------------------------------------

RESULTS = [{"receipt": "r-42", "é": [1, None, 2.5, {"deep": True}]}, "text", 'quo"tes', 7, -0.5, True, [1]]
EMPTY = [None, {}, [], "", 0, 0.0, False]


@pytest.mark.parametrize("result", RESULTS, ids=repr)
async def test_they_replay_our_result(idem: Idempotency, peer: Peer, result: Any) -> None:
    """What asyncidem completed is not run again by Powertools, which returns the same."""
    assert await idem.run(KEY, async_handler_of(result)[1], ORDER) == result
    ran, handler = handler_of("another")
    assert peer.function(handler)(ORDER) == result
    assert ran == []


@pytest.mark.parametrize("result", RESULTS + EMPTY, ids=repr)
async def test_we_replay_their_result(idem: Idempotency, peer: Peer, result: Any) -> None:
    """What Powertools completed is not run again by asyncidem, which returns the same, empty results included."""
    assert peer.function(handler_of(result)[1])(ORDER) == result
    ran, handler = async_handler_of("another")
    found = await idem.run(KEY, handler, ORDER)
    assert (found, type(found)) == (result, type(result))
    assert ran == []
    record = await idem.store.get(KEY)
    assert record is not None
    assert record.owner is None
    assert record.expires_in is not None
    assert 3_590 < record.expires_in <= 3_600


@pytest.mark.parametrize("name", ["orders-dev", None])
async def test_the_prefix_by_default(
    idem: Idempotency, peer: Peer, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    """Without `key_prefix` the keys of a function begin with the names of the Lambda function, its module and its own."""
    if name is not None:
        monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", name)
    assert peer.function(handler_of("theirs")[1], prefix=None)(ORDER) == "theirs"
    prefix = f"{name or 'test-func'}.powertools.Peer.function.<locals>.order"
    key = powertools_key(ORDER, key_prefix=prefix, jmespath="order_id")
    assert await idem.run(key, async_handler_of("ours")[1], ORDER) == "theirs"


class Receipt(BaseModel):
    number: str
    amount: int


@dataclass
class Slip:
    number: str
    amount: int


@pytest.mark.parametrize(
    ("result", "serializer"),
    [(Receipt(number="r", amount=3), PydanticSerializer), (Slip("r", 3), DataclassSerializer)],
    ids=["pydantic", "dataclass"],
)
async def test_typed_results(idem: Idempotency, peer: Peer, result: Any, serializer: Any) -> None:
    """A flat model or dataclass is rebuilt from what the other side stored, both ways."""
    ran, handler = handler_of(result)
    handler.__annotations__["return"] = type(result)
    theirs = peer.function(handler, serializer=serializer)
    async_ran, ours = async_handler_of(result)
    codec = PydanticCodec(type(result))
    assert await idem.run(KEY, ours, ORDER, codec=codec) == result
    assert theirs(ORDER) == result
    assert ran == []

    other = {"order_id": "43"}
    assert theirs(other) == result
    key = key_of(other)
    found = await idem.run(key, ours, other, codec=codec)
    assert (found, type(found)) == (result, type(result))
    assert async_ran == [ORDER]


async def test_a_result_that_is_not_there_is_no_success_to_them(idem: Idempotency, peer: Peer) -> None:
    """Where asyncidem completed without a result, Powertools fails: it neither runs nor returns something."""

    async def raises(order: Any) -> None:
        raise KeyError("declined")

    ran, handler = handler_of("another")
    for number, (fn, error) in enumerate([(async_handler_of({1, 2})[1], CodecError), (raises, KeyError)]):
        order = {"order_id": number}
        key = key_of(order)
        with pytest.raises(error):
            await idem.run(key, fn, order, replay_exceptions=KeyError)
        with pytest.raises(json.JSONDecodeError):
            peer.function(handler)(order)
    assert ran == []


# -- conflicts ---------------------------------------------------------------------------------------------------------


async def test_they_refuse_what_we_run(idem: Idempotency, peer: Peer) -> None:
    """While asyncidem runs an operation, and renews its lease, it is in progress to Powertools."""
    ran, handler = handler_of("theirs")
    theirs = peer.function(handler)

    async def ours(order: Any) -> str:
        with pytest.raises(exceptions.IdempotencyAlreadyInProgressError):
            theirs(order)
        first = peer.record(KEY)["in_progress_expiration"]
        renewed = asyncio.get_running_loop().time() + 10
        while peer.record(KEY)["in_progress_expiration"] == first and asyncio.get_running_loop().time() < renewed:
            await asyncio.sleep(0.01)
        assert peer.record(KEY)["in_progress_expiration"] > first
        with pytest.raises(exceptions.IdempotencyAlreadyInProgressError):
            theirs(order)
        return "ours"

    assert await idem.run(KEY, ours, ORDER, lease=1.5) == "ours"
    assert theirs(ORDER) == "ours"
    assert ran == []


@pytest.mark.parametrize("remaining_ms", [30_000, None])
async def test_we_refuse_what_they_run(idem: Idempotency, peer: Peer, remaining_ms: int | None) -> None:
    """While Powertools runs an operation it is in progress to asyncidem, with its remaining time as the lease."""
    ran, ours = async_handler_of("ours")
    loop = asyncio.get_running_loop()
    refusals: list[InProgressError] = []

    async def try_it() -> None:
        with pytest.raises(InProgressError) as refusal:
            await idem.run(KEY, ours, ORDER)
        refusals.append(refusal.value)

    def handler(order: Any) -> str:
        asyncio.run_coroutine_threadsafe(try_it(), loop).result(10)
        return "theirs"

    assert await asyncio.to_thread(peer.function(handler, remaining_ms=remaining_ms), ORDER) == "theirs"
    longest = 3_600 if remaining_ms is None else 31
    assert longest - 5 < refusals[0].retry_after <= longest
    assert await idem.run(KEY, ours, ORDER) == "theirs"
    assert ran == []


async def test_we_wait_for_what_they_run(idem: Idempotency, peer: Peer) -> None:
    """A duplicate with `wait` gets the result of a function under Powertools once that is stored."""
    ran, ours = async_handler_of("ours")
    entered, may_end = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def handler(order: Any) -> str:
        loop.call_soon_threadsafe(entered.set)
        assert may_end.wait(10)
        return "theirs"

    theirs = asyncio.create_task(asyncio.to_thread(peer.function(handler), ORDER))
    await entered.wait()
    waiting = asyncio.create_task(idem.run(KEY, ours, ORDER, wait=20))
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done
    may_end.set()
    assert await waiting == "theirs"
    assert await theirs == "theirs"
    assert ran == []


async def test_a_failure_frees_the_key(idem: Idempotency, peer: Peer) -> None:
    """After an exception of either side the other one may run at once, as a first attempt."""

    async def fails(order: Any) -> None:
        raise ValueError("ours")

    def fails_there(order: Any) -> None:
        raise ValueError("theirs")

    async def runs(order: Any) -> int:
        operation = current_operation()
        assert operation is not None
        return operation.attempt

    with pytest.raises(ValueError, match="ours"):
        await idem.run(KEY, fails, ORDER)
    with pytest.raises(ValueError, match="theirs"):
        peer.function(fails_there)(ORDER)
    assert await idem.run(KEY, runs, ORDER) == 1


# -- payload validation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hash_function", ["md5", "sha512"])
async def test_they_validate_against_our_records(idem: Idempotency, peer: Peer, hash_function: str) -> None:
    """Running or completed here, another payload is refused there, and the same one is not."""
    ran, handler = handler_of("theirs")
    theirs = peer.function(handler, payload_validation_jmespath="amount", hash_function=hash_function)
    key = key_of(ORDER, hash_function=hash_function)

    async def ours(order: Any) -> str:
        with pytest.raises(exceptions.IdempotencyAlreadyInProgressError):
            theirs(ORDER)
        with pytest.raises(exceptions.IdempotencyValidationError):
            theirs(TAMPERED)
        return "ours"

    payload = mark_of(ORDER, hash_function=hash_function)
    assert await idem.run(key, ours, ORDER, payload=payload) == "ours"
    assert theirs(ORDER) == "ours"
    with pytest.raises(exceptions.IdempotencyValidationError):
        theirs(TAMPERED)
    assert ran == []


@pytest.mark.parametrize("hash_function", ["md5", "sha512"])
async def test_we_validate_against_their_records(idem: Idempotency, peer: Peer, hash_function: str) -> None:
    """Running there, another payload is refused here; completed there nothing is known of it, and it is replayed."""
    ran, ours = async_handler_of("ours")
    loop = asyncio.get_running_loop()
    key = key_of(ORDER, hash_function=hash_function)

    async def try_both() -> None:
        with pytest.raises(InProgressError):
            await idem.run(key, ours, ORDER, payload=mark_of(ORDER, hash_function=hash_function))
        with pytest.raises(FingerprintMismatchError):
            await idem.run(key, ours, TAMPERED, payload=mark_of(TAMPERED, hash_function=hash_function))

    def handler(order: Any) -> str:
        asyncio.run_coroutine_threadsafe(try_both(), loop).result(10)
        return "theirs"

    theirs = peer.function(handler, payload_validation_jmespath="amount", hash_function=hash_function)
    assert await asyncio.to_thread(theirs, ORDER) == "theirs"
    for order in (ORDER, TAMPERED):
        assert await idem.run(key, ours, order, payload=mark_of(order, hash_function=hash_function)) == "theirs"
    assert ran == []


async def test_where_one_side_validates(idem: Idempotency, peer: Peer) -> None:
    """Powertools refuses a record without a hash, if it validates; one with a hash is replayed, if it does not."""
    await idem.run(KEY, async_handler_of("ours")[1], ORDER)
    with pytest.raises(exceptions.IdempotencyValidationError):
        peer.function(handler_of("theirs")[1], payload_validation_jmespath="amount")(ORDER)

    peer.client.flushdb()
    await idem.run(KEY, async_handler_of("ours")[1], ORDER, payload=mark_of(ORDER))
    assert peer.function(handler_of("theirs")[1])(TAMPERED) == "ours"


async def test_validation_of_orphans(store: RedisStore, peer: Peer) -> None:
    """Another payload on an orphan of Powertools is a mismatch; the same one takes it over, and stays validated there."""
    peer.die(ORDER, payload_validation_jmespath="amount")
    with pytest.raises(FingerprintMismatchError):
        await Idempotency(store).run(KEY, async_handler_of("")[1], TAMPERED, payload=mark_of(TAMPERED))
    claim = await store.claim(KEY)  # without a payload: the record keeps the hash that it has
    assert isinstance(claim, Claimed)
    await store.complete(claim, '"ours"')
    theirs = peer.function(handler_of("")[1], payload_validation_jmespath="amount")
    assert theirs(ORDER) == "ours"
    with pytest.raises(exceptions.IdempotencyValidationError):
        theirs(TAMPERED)
