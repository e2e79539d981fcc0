"""The peers, each through its own decorator, as its documentation shows it, with its defaults."""

import asyncio
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any, Final

from benchmarks.sides import BlockingSide, Calls, Side, Target

DISTRIBUTIONS: Final = ("idemkit", "idempotency-kit", "exactly-once", "pyidempotent", "aws-lambda-powertools")


class Idemkit(Side):
    """``idemkit``: a claim and a completion in Lua that parses the record; publishes every completion."""

    name = "idemkit"

    async def open(self, target: Target, tasks: int) -> None:
        """Give it the client that bare commands have."""
        from idemkit import RedisBackend

        self._client = target.client(tasks)
        self._backend = RedisBackend(self._client)

    def calls(self, result: dict[str, Any]) -> Calls:
        """Return the decorated function."""
        from idemkit import MethodConfig, idempotent

        @idempotent(backend=self._backend, config=MethodConfig(key_fields=["order"], scope=lambda _: "bench"))
        async def charge(order: str) -> dict[str, Any]:
            return result

        return Calls(charge, charge)

    async def close(self) -> None:
        """Close its subscriber, then the client."""
        await self._backend.aclose()
        await self._client.aclose()


class IdempotencyKit(Side):
    """``idempotency-kit``: a reservation, then the result over it; records are pydantic models."""

    name = "idempotency-kit"

    async def open(self, target: Target, tasks: int) -> None:
        """Give it the client that bare commands have."""
        from idempotency_kit import AsyncIdempotencyCoordinator, IdempotencyDomainService
        from idempotency_kit.infra.storage.redis.aio.repository import RedisAsyncIdempotencyRepository

        self._client = target.client(tasks)
        repository = RedisAsyncIdempotencyRepository(self._client)
        self._coordinator = AsyncIdempotencyCoordinator(repository, IdempotencyDomainService())

    def calls(self, result: dict[str, Any]) -> Calls:
        """Return the decorated function."""
        from idempotency_kit import AsyncIdempotencyCoordinator, JsonResultAdapter, async_idempotent

        @async_idempotent(operation="bench", adapter=JsonResultAdapter())
        async def charge(coordinator: AsyncIdempotencyCoordinator, idempotency_key: str) -> dict[str, Any]:
            return result

        coordinator = self._coordinator

        def call(key: str) -> Any:
            return charge(coordinator, key)

        return Calls(call, call)

    async def close(self) -> None:
        """Close the client."""
        await self._client.aclose()


class ExactlyOnce(Side):
    """``exactly-once``: a claim and a commit in Lua over a hash; it makes its client itself."""

    name = "exactly-once"

    async def open(self, target: Target, tasks: int) -> None:
        """Give it the URL."""
        from exactly_once import Store

        self._store = Store.redis(target.url)

    def calls(self, result: dict[str, Any]) -> Calls:
        """Return the decorated function."""
        from exactly_once import once

        @once(self._store, key=lambda order: order)
        async def charge(order: str) -> dict[str, Any]:
            return result

        return Calls(charge, charge)

    async def close(self) -> None:
        """Close both its clients."""
        await self._store.aclose()
        self._store.close()


class Pyidempotent(Side):
    """``pyidempotent``: reads, claims with ``SET NX``, and writes the result blindly."""

    name = "pyidempotent"

    async def open(self, target: Target, tasks: int) -> None:
        """Give it the client that bare commands have."""
        from pyidempotent.backends.redis import RedisBackend

        self._client = target.client(tasks)
        self._backend = RedisBackend(self._client)

    def calls(self, result: dict[str, Any]) -> Calls:
        """Return the decorated function."""
        from pyidempotent import idempotent

        @idempotent(backend=self._backend, key_extractor=lambda order, **_: order)
        async def charge(order: str) -> dict[str, Any]:
            return result

        return Calls(charge, charge)

    async def close(self) -> None:
        """Close the client."""
        await self._client.aclose()


class Powertools(BlockingSide):
    """Powertools for AWS Lambda: synchronous, so that a call blocks its thread."""

    name = "powertools (synchronous)"

    async def open(self, target: Target, tasks: int) -> None:
        """Give it a synchronous client, decoding as its layer wants it."""
        import redis
        from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig
        from aws_lambda_powertools.utilities.idempotency.persistence.cache import CachePersistenceLayer

        self._client = redis.Redis.from_url(target.url, decode_responses=True, max_connections=max(tasks, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a deprecation of its own
            self._layer = CachePersistenceLayer(client=self._client)
        self._config = IdempotencyConfig()
        self._config.register_lambda_context(_Context())

    def calls(self, result: dict[str, Any]) -> Calls:
        """Return the decorated function."""
        from aws_lambda_powertools.utilities.idempotency import idempotent_function

        @idempotent_function(data_keyword_argument="order", persistence_store=self._layer, config=self._config)
        def charge(order: str) -> dict[str, Any]:
            return result

        def call(key: str) -> Any:
            return charge(order=key)

        return Calls(call, call)

    async def close(self) -> None:
        """Close the client."""
        await asyncio.to_thread(self._client.close)


class _Context:
    """As much of a Lambda context as the layer asks for."""

    def get_remaining_time_in_millis(self) -> int:
        """Return milliseconds until the time-out of the function: its lease."""
        return 30_000


PEERS: Final[tuple[Callable[[], Side], ...]] = (Idemkit, IdempotencyKit, ExactlyOnce, Pyidempotent, Powertools)


def versions() -> dict[str, str]:
    """Return what is installed of the peers."""
    found: dict[str, str] = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
