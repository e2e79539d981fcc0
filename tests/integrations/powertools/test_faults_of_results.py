"""What Powertools 3.37 does wrong with functions, payloads and results, shown on it, and what asyncidem does instead.

The first half of a test is evidence for what the guide says of that version; the second is the promise.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel

from asyncidem import (
    Claimed,
    CodecError,
    Idempotency,
    PydanticCodec,
    RedisStore,
    ResultUnavailableError,
    StoreUnavailableError,
)
from asyncidem.testing import FaultyStore

from powertools import (
    KEY,
    ORDER,
    TAMPERED,
    DataclassSerializer,
    Peer,
    PydanticSerializer,
    async_handler_of,
    before,
    exceptions,
    handler_of,
    key_of,
    mark_of,
)
from servers import Server

LOCK = f"{KEY}:lock"


# -- functions and payloads --------------------------------------------------------------------------------------------


async def test_two_functions_on_one_store(idem: Idempotency, peer: Peer) -> None:
    """Functions that share a store write under their own keys, and each has its own options."""
    layer = peer.layer()
    inner = peer.function(handler_of("inner")[1], prefix="inner", layer=layer, expires_after_seconds=60)
    outer = peer.function(inner, prefix="outer", layer=layer)
    assert outer(ORDER) == "inner"
    wanted = {name: key_under(name) for name in ("inner", "outer")}
    assert peer.record(wanted["outer"])["status"] == "INPROGRESS"  # its result went where inner's is
    assert peer.record(wanted["inner"])["status"] == "COMPLETED"
    assert peer.client.ttl(wanted["inner"]) > 60  # the options of the first call are everybody's

    peer.client.flushdb()

    async def outer_of_ours(order: Any) -> Any:
        return await idem.run(wanted["inner"], async_handler_of("inner")[1], order, ttl=60)

    assert await idem.run(wanted["outer"], outer_of_ours, ORDER) == "inner"
    for name, ttl in (("outer", 3_600), ("inner", 60)):
        assert peer.record(wanted[name])["status"] == "COMPLETED"
        assert ttl - 10 < peer.client.ttl(wanted[name]) <= ttl


def key_under(prefix: str) -> str:
    """Return the key of the order for a function of this prefix."""
    return KEY.replace("charge", prefix, 1)


async def test_validation_of_a_replay(idem: Idempotency, peer: Peer) -> None:
    """The same payload is the same when its operation has completed: the completed record keeps the hash."""
    theirs = peer.function(handler_of("result")[1], payload_validation_jmespath="amount")
    theirs(ORDER)
    with pytest.raises(exceptions.IdempotencyValidationError):
        theirs(ORDER)

    peer.client.flushdb()
    ran, ours = async_handler_of("result")
    for _ in range(2):
        assert await idem.run(KEY, ours, ORDER, payload=mark_of(ORDER)) == "result"
    assert ran == [ORDER]
    assert peer.record(KEY)["validation"] == mark_of(ORDER) != mark_of(TAMPERED)


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [{}, [], 0, False, ""], ids=repr)
async def test_empty_results(idem: Idempotency, peer: Peer, result: Any) -> None:
    """An empty result is replayed as what it is, not as None."""
    theirs = peer.function(handler_of(result)[1])
    assert theirs(ORDER) == result
    assert theirs(ORDER) is None

    peer.client.flushdb()
    for _ in range(2):
        found = await idem.run(KEY, async_handler_of(result)[1], ORDER)
        assert (found, type(found)) == (result, type(result))


async def test_a_result_that_cannot_be_stored(idem: Idempotency, peer: Peer) -> None:
    """An operation whose result has no text does not run a second time."""
    ran, handler = handler_of({1, 2})
    theirs = peer.function(handler, remaining_ms=-2_000)
    for _ in range(2):
        with pytest.raises(exceptions.IdempotencyPersistenceLayerError):
            theirs(ORDER)
        peer.client.delete(LOCK)
    assert ran == [ORDER, ORDER]

    peer.client.flushdb()
    async_ran, ours = async_handler_of({1, 2})
    with pytest.raises(CodecError) as refused:
        await idem.run(KEY, ours, ORDER)
    assert refused.value.result == {1, 2}
    with pytest.raises(ResultUnavailableError):
        await idem.run(KEY, ours, ORDER)
    assert async_ran == [ORDER]


@dataclass
class Line:
    sku: str


@dataclass
class Cart:
    lines: list[Line]


class Item(BaseModel):
    sku: str


CART = Cart([Line("a")])
ITEMS = [Item(sku="a"), Item(sku="b")]


async def test_typed_results(idem: Idempotency, peer: Peer) -> None:
    """Nested dataclasses, lists of models and annotations that are text come back as what they were."""

    def cart(order: Any) -> Cart:
        return CART

    theirs = peer.function(cart, serializer=DataclassSerializer)
    assert theirs(ORDER) == CART
    assert theirs(ORDER).lines == [{"sku": "a"}]

    def text(order: Any) -> "Cart":
        return CART

    def items(order: Any) -> list[Item]:
        return ITEMS

    with pytest.raises(exceptions.IdempotencyModelTypeError):
        peer.function(text, serializer=DataclassSerializer)
    with pytest.raises((TypeError, exceptions.IdempotencyModelTypeError)):  # below Python 3.12 list[Item] is a class
        peer.function(items, serializer=PydanticSerializer)

    async def our_cart(order: Any) -> "Cart":
        return CART

    async def our_items(order: Any) -> list[Item]:
        return ITEMS

    pairs: list[tuple[Callable[[Any], Any], Any]] = [(our_cart, CART), (our_items, ITEMS)]
    for number, (handler, result) in enumerate(pairs):
        for _ in range(2):
            assert await idem.run(key_of({"order_id": number}), handler, ORDER, codec=PydanticCodec()) == result


async def test_async_handlers(idem: Idempotency, peer: Peer) -> None:
    """Coroutine functions are what asyncidem protects."""
    coroutines: list[Any] = []
    ran, handler = async_handler_of("result")
    with pytest.raises(exceptions.IdempotencyPersistenceLayerError):
        peer.function(lambda order: coroutines.append(handler(order)) or coroutines[0])(ORDER)
    coroutines[0].close()
    assert ran == []

    peer.client.flushdb()
    assert await idem.run(KEY, handler, ORDER) == "result"


# -- Redis -------------------------------------------------------------------------------------------------------------


async def test_a_record_that_vanishes(store: RedisStore, peer: Peer) -> None:
    """A record that goes between a claim that met it and the look at it leaves the key free, and is no error."""

    def running(order: Any) -> None:
        before(peer.client, "get", lambda: peer.client.delete(KEY))  # its owner fails meanwhile
        with pytest.raises(exceptions.IdempotencyPersistenceLayerError):
            peer.function(handler_of("result")[1])(order)

    peer.function(running)(ORDER)

    peer.client.flushdb()
    assert isinstance(await store.claim(KEY), Claimed)
    other = FaultyStore(store)
    fault = other.fault("read", before=lambda: peer.client.delete(KEY))
    claim = await other.claim(KEY)
    assert fault.reached.is_set()
    assert isinstance(claim, Claimed)
    assert claim.attempt == 1


async def test_a_failed_release(store: RedisStore, peer: Peer) -> None:
    """A handler's exception comes out of its call, whatever becomes of the release."""

    def raises(order: Any) -> None:
        raise ValueError("declined")

    async def raises_here(order: Any) -> None:
        raise ValueError("declined")

    def down() -> None:
        raise ConnectionError("down")

    before(peer.client, "delete", down)
    with pytest.raises(exceptions.IdempotencyPersistenceLayerError, match="down"):
        peer.function(raises)(ORDER)

    peer.client.flushdb()
    other = FaultyStore(store)
    other.fault("remove", before=StoreUnavailableError("down"))
    with pytest.raises(ValueError, match="declined"):
        await Idempotency(other).run(KEY, raises_here, ORDER)
    await other.aclose()


async def test_the_commands_of_a_replay(idem: Idempotency, peer: Peer, server: Server) -> None:
    """A replay costs one command, not three."""

    def commands() -> int:
        line = server.text("INFO", "stats").partition("total_commands_processed:")[2]
        return int(line.partition("\r")[0])

    async def cost(call: Callable[[], Any]) -> int:
        first = commands()
        unaided = commands() - first  # of the question itself
        first = commands()
        result = call()
        assert (await result if asyncio.iscoroutine(result) else result) == "result"
        return commands() - first - unaided

    theirs = peer.function(handler_of("result")[1])
    peer.client.ping()  # a connection
    assert await cost(lambda: theirs(ORDER)) == 2
    assert await cost(lambda: theirs(ORDER)) == 3

    ours = async_handler_of("another")[1]
    assert await idem.run(KEY, ours, ORDER) == "result"  # over a new connection
    assert await cost(lambda: idem.run(KEY, ours, ORDER)) == 1
