"""The clients that a store makes for itself, for a cluster and behind Sentinel."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterable
from typing import Any, Final, cast

import redis.asyncio
from redis import exceptions
from redis.asyncio.connection import parse_url
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool

from ..errors import ConfigurationError

__all__ = ["OwnCluster", "OwnSentinel", "danger_of", "refuse_database", "sentinel_addresses"]

SENTINEL_PORT: Final = 26379


class OwnCluster(redis.asyncio.RedisCluster):
    """A cluster client of which the store uses nothing but the topology, and closes that.

    redis-py's own closes what ``initialize`` began, which also reads the table of all commands: a permission more, and
    many times the bytes of the topology.
    """

    async def aclose(self) -> None:
        """Close the connections of all nodes."""
        await super().aclose()
        await self.nodes_manager.aclose()
        await self.nodes_manager.aclose("startup_nodes")


class OwnSentinel(Sentinel):
    """Asks all sentinels at once: one that hangs holds up nobody.

    redis-py's own asks one after the other, in an order that concurrent searches rewrite, and may lose one of them by.
    """

    def __init__(self, sentinels: list[tuple[str, int]], *, force_master_ip: str | None = None, **options: Any) -> None:
        super().__init__(sentinels, **options)  # type: ignore[no-untyped-call]
        self._forced_host = force_master_ip  # older versions of redis-py know no such option
        for sentinel in self.sentinels:
            sentinel.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # options are looked at here

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Return host and port of the master.

        Raises:
            MasterNotFoundError: no sentinel answers, knows the name, or holds its master for up.
        """
        asking = [asyncio.ensure_future(sentinel.sentinel_masters()) for sentinel in self.sentinels]
        failures: list[str] = []
        known: set[str] = set()
        try:
            for answer in asyncio.as_completed(asking):
                try:
                    masters: Any = await answer
                except exceptions.RedisError as error:
                    failures.append(f"{type(error).__name__}: {error}")
                    continue
                state: Any = masters.get(service_name)
                if state is not None and self.check_master_state(state, service_name):
                    return self._forced_host or state["ip"], state["port"]
                known.update(masters)
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        if service_name in known:
            raise MasterNotFoundError(f"the sentinels say that the master of {service_name!r} is down")
        if len(failures) < len(asking):
            names = ", ".join(sorted(map(repr, known))) or "none"
            raise MasterNotFoundError(f"the sentinels watch no {service_name!r}, but {names}: correct service=")
        raise MasterNotFoundError(f"no sentinel answers; check their addresses: {'; '.join(sorted(set(failures)))}")

    async def aclose(self) -> None:
        """Close the connections to the sentinels; those to the master are the client's."""
        for sentinel in self.sentinels:
            await sentinel.aclose()


def sentinel_addresses(sentinels: Any) -> list[tuple[str, int]]:
    """Return host and port of each of the sentinels, which are given so or as text.

    Raises:
        ConfigurationError: there is none, or what there is is no address.
    """
    if isinstance(sentinels, str | bytes) or not isinstance(sentinels, Iterable):
        raise ConfigurationError(f"sentinels must be a list such as ['sentinel-1:26379'], not {sentinels!r}")
    addresses = [_address(sentinel) for sentinel in sentinels]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if not addresses:
        raise ConfigurationError("sentinels is empty: give the host and port of each sentinel")
    return addresses


def _address(sentinel: Any) -> tuple[str, int]:
    try:
        if isinstance(sentinel, str):
            parts = re.fullmatch(r"(\[[^\[\]]+\]|[^:/@\s\[\]]+)(?::([0-9]{1,5}))?", sentinel)
            host, port = ("", 0) if parts is None else (parts[1].strip("[]"), int(parts[2] or SENTINEL_PORT))
        else:
            host, port = sentinel
    except (TypeError, ValueError):
        host, port = "", 0
    if not (isinstance(host, str) and host and type(port) is int and 0 < port < 65536):
        raise ConfigurationError(
            f"a sentinel must be 'host:port' or (host, port), with a port up to 65535, not {sentinel!r}"
        )
    return host, port


def danger_of(client: Any, silence: float) -> str | None:
    """Return what of a client's own options would harm a store, if anything does.

    redis-py's retries and ``reinitialize_steps`` do not: the store's commands pass by them.

    Args:
        client: a client that was brought.
        silence: seconds that making a connection may take.

    Raises:
        ConfigurationError: it is a client for replicas.
    """
    if isinstance(client, redis.asyncio.RedisCluster):
        if client.read_from_replicas or client.load_balancing_strategy:
            return (
                "this cluster client reads from replicas: after a failover the store would read what the old master has; "
                "leave out read_from_replicas and load_balancing_strategy"
            )
        return None
    pool: Any = getattr(client, "connection_pool", None)
    if not isinstance(pool, SentinelConnectionPool):
        return None
    if not pool.is_master:
        raise ConfigurationError("this client is for the replicas of a service, which cannot write: use master_for")
    sentinels: list[Any] = cast("Any", pool).sentinel_manager.sentinels
    if len(sentinels) > 1 and max(map(_patience, sentinels)) >= silence:
        return (
            f"a sentinel that hangs keeps this client from asking the next for longer than the {silence:.2g} s that a "
            f"connection may take; use RedisStore.from_sentinel, or give Sentinel a shorter socket_timeout and no retry"
        )
    return None


def _patience(sentinel: Any) -> float:
    """Return how long redis-py waits for a sentinel that hangs, in seconds."""
    options = sentinel.connection_pool.connection_kwargs
    longest = max(options.get(name) or math.inf for name in ("socket_timeout", "socket_connect_timeout"))
    tries = 1 + getattr(options.get("retry"), "_retries", 0)
    return float(longest * tries if tries > 0 else math.inf)  # -1 retries are endless ones


def refuse_database(url: str, options: dict[str, Any]) -> None:
    """Refuse the number of a database for a cluster, in a URL or beside it."""
    if number := {**options, **parse_url(url)}.get("db"):
        raise ConfigurationError(f"a cluster has only the database 0, not {number!r}: leave the number out of the URL")
