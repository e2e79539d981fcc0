"""The store on Redis or Valkey, through ``redis.asyncio``."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Self, Unpack

import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException

from ..durations import Duration, to_ms
from ..errors import ConfigurationError, StoreError
from ..hooks import logger
from ..keys import is_lock
from ..model import LARGE, LEFT_UNKNOWN, Stored, Swap
from .base import Store
from .clients import OwnCluster, OwnSentinel, danger_of, refuse_database, sentinel_addresses
from .durable import Replicas, check_wait_replicas, refuse_without_wait, warn_of_eviction
from .link import Command, Link, PoolLink, Script, WireLink
from .multiplex import MultiplexedLink
from .ownership import RecordOptions, StoreOptions
from .primitives import NotReplicatedError
from .refusals import refusal
from .routes import routes_of

if TYPE_CHECKING:
    from .guarded import Guarded, RedisClientProtocol

__all__ = ["RedisStore"]

FELL_BACK: Final = object()
PROBE: Final[Command] = "", "", 2
"""Arguments of ``lua/put.lua`` with which it does nothing."""

CLUSTER_DEFAULTS: Final[dict[str, Any]] = {"reinitialize_steps": 0, "require_full_coverage": False}
"""Where the client's own commands are used, a MOVED closes no connection; a slot that nobody serves is its keys'
trouble."""

STORE_OPTIONS: Final = frozenset({*StoreOptions.__annotations__, "multiplex", "wait_replicas"})


class RedisStore(Store):
    """An idempotency store on Redis or Valkey, or on any client that offers ``get``, ``set`` and ``delete``.

    On Redis 7.0+ and Valkey a first call costs two round trips (claim and completion), a replay one, a duplicate of a
    running call at most two. Below 7.0 a script stands in for ``SET NX GET``. A server without scripts and a client
    that is not redis-py's get the same primitives guarded by a lock (:mod:`asyncidem.stores.guarded`); a log line says
    so once.

    All commands for a node go over one connection, made as the client makes its own, and large results are written over
    a second one (:mod:`asyncidem.stores.multiplex`). They are no part of the client's pool.

    Permissions: an ACL user needs SET, GET, PTTL, DEL, EVAL and EVALSHA on the keys of the prefix, SELECT for another
    database than 0, and in a cluster CLUSTER SLOTS and ASKING (for a client that was brought, COMMAND too), with
    ``wait_replicas`` WAIT and PEXPIRE, and INFO for the warning about eviction. The first claim needs SET, GET, EVAL and
    EVALSHA: one that is missing is refused before any effect. PTTL is missed by the first duplicate or takeover, DEL by
    the first release.

    A store belongs to one event loop at a time. Used from the next one after that has ended, or after a fork, it drops
    the connections of the old before it sends anything.

    With ``wait_replicas`` a claim that too few replicas acknowledge within a fifth of ``timeout`` is undone and raises
    ``StoreUnavailableError``; a completion is reported (``on_completion_error``) and repeated in the background. Each
    of them costs a round trip more, on a connection of the client's pool, and what the replicas take. Where the master
    changes meanwhile, its successor is asked, and replicas have time to follow it, until ``timeout``. A replay is not
    waited for: a duplicate may see a completion that the replicas do not have yet. Nor does a replica's word outlast
    the loss of that replica: ``n`` survives the loss of the master and of any ``n - 1`` replicas, if what is promoted
    then is one that has the write, as Sentinel and Cluster prefer but do not promise.

    The first claim also finds out whether the server's ``maxmemory-policy`` may evict records; a log line says so then.

    Args:
        client: a ``redis.asyncio`` client (``Redis`` or ``RedisCluster``) or a :class:`RedisClientProtocol`. The caller
            owns it, and closes it.
        prefix: put before every key.
        timeout: seconds that one call of the store may take; a third of silence drops a connection and repeats.
        wait_replicas: how many replicas must have a claim, a renewal and a completion for it to count; 0 trusts the
            master alone, and a failover may then lose what it has acknowledged. See above.
        multiplex: False takes a connection of the client's pool for every command instead.
        **options: the further options of :class:`~asyncidem.stores.base.Store`: the names of the record's attributes
            (``status_attr`` and so on), and clocks for tests.

    Raises:
        ConfigurationError: the client cannot be used, or an option is not known.

    Warns:
        UserWarning: an option of the client would harm the store.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis | redis.asyncio.RedisCluster | RedisClientProtocol,
        *,
        prefix: str = "asyncidem:",
        timeout: Duration = 5,
        wait_replicas: int = 0,
        multiplex: bool = True,
        **options: Unpack[RecordOptions],
    ) -> None:
        unknown = sorted(set(options) - STORE_OPTIONS)
        if unknown:
            raise ConfigurationError(
                f"unknown option {unknown[0]!r}; connection options go with RedisStore.from_url or RedisStore.connect, "
                f"not with a client"
            )
        super().__init__(prefix=prefix, timeout=timeout, **options)
        _check_client(client)
        check_wait_replicas(wait_replicas)
        if danger := danger_of(client, self.timeout / 3):
            warnings.warn(danger, UserWarning, stacklevel=2)
        self._client = client
        self._owned: tuple[Any, ...] = ()
        self._put_script, self._swap_script, self._remove_script = _scripts()
        self._set_get = True  # whether SET takes NX and GET together
        self._direct: WireLink | None = None  # for claims without a script, once the first claim has run one
        self._wire: WireLink | None = None
        self._plain: Guarded | None = None
        self._replicas: Replicas | None = None
        self._wait_replicas = wait_replicas
        self._first = True  # whether no claim has come through yet
        self._link: Link
        routes = routes_of(client)
        if routes is not None:
            self._link = self._wire = (MultiplexedLink if multiplex else PoolLink)(routes, self.timeout)
            if wait_replicas:
                self._replicas = Replicas(self._wire, wait_replicas)
        else:
            self._link = Link(self.timeout)
            self._fall_back(f"{type(client).__name__} is no client of redis-py: its get, set and delete are used")

    @classmethod
    def from_url(cls, url: str, *, cluster: bool = False, **options: Any) -> Self:
        """Make a store with a client of its own.

        Args:
            url: ``redis://``, ``rediss://`` or ``unix://``.
            cluster: whether it is a node of a Redis Cluster. Its client then has ``reinitialize_steps=0`` and
                ``require_full_coverage=False``, unless ``options`` say otherwise.
            **options: those of :class:`RedisStore`, and redis-py's own for connections.

        Raises:
            ConfigurationError: an option is not known to either, the URL is none, or a cluster's has a database.
        """
        if not isinstance(url, str):  # pyright: ignore[reportUnnecessaryIsInstance] - callers without a type checker
            raise ConfigurationError(f"url must be text such as 'redis://localhost:6379', not {type(url).__name__}")
        if cluster:

            def make(**options: Any) -> OwnCluster:
                refuse_database(url, options)
                return OwnCluster.from_url(url, **CLUSTER_DEFAULTS | options)  # type: ignore[return-value]

            return cls._own(make, options)
        return cls._own(functools.partial(redis.asyncio.Redis.from_url, url), options)

    @classmethod
    def connect(
        cls,
        host: str,
        port: int = 6379,
        *,
        username: str | None = None,
        password: str | None = None,
        db: int = 0,
        cluster: bool = False,
        ssl: bool = True,
        **options: Any,
    ) -> Self:
        """Make a store with a client of its own, from the parts of an address.

        Args:
            host: the server's name or address.
            port: its TCP port.
            username: of the ACL user.
            password: of the user.
            db: the database's number; a cluster has only 0.
            cluster: whether it is a node of a Redis Cluster.
            ssl: whether to use TLS.
            **options: those of :class:`RedisStore`, and redis-py's own for connections.

        Raises:
            ConfigurationError: an option is not known to either.
        """
        address: dict[str, Any] = {"host": host, "port": port, "username": username, "password": password, "ssl": ssl}
        if not cluster:
            return cls._own(functools.partial(redis.asyncio.Redis, **address, db=db), options)
        if db != 0:
            raise ConfigurationError(f"a cluster has only the database 0, not {db!r}; leave db out")
        return cls._own(functools.partial(OwnCluster, **CLUSTER_DEFAULTS | address), options)

    @classmethod
    def from_sentinel(
        cls,
        sentinels: Iterable[str | tuple[str, int]],
        *,
        service: str,
        sentinel_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """Make a store with a client of its own for the master that sentinels name.

        Each new connection asks all of them, and takes the first master that one names. A failover is waited for
        within ``timeout``. An ACL user of the sentinels needs SENTINEL MASTERS.

        Args:
            sentinels: each one's ``"host:port"`` or ``(host, port)``.
            service: the name by which they know the master.
            sentinel_kwargs: redis-py's options for connections to the sentinels, such as their ``password`` or ``ssl``.
            **options: those of :class:`RedisStore`, and redis-py's own for connections to the master (``ssl=True``,
                ``password``, ``db`` and so on).

        Raises:
            ConfigurationError: an option is not known to either, or a sentinel has no address.
        """
        if not isinstance(service, str) or not service:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"service must be the name that the sentinels know the master by, not {service!r}")
        addresses = sentinel_addresses(sentinels)
        # They must have failed, and said why, before the time for a connection is over.
        patience = to_ms(options.get("timeout", 5), "timeout") / 6000
        asking = {"retry": Retry(NoBackoff(), 0), "socket_timeout": patience, "socket_connect_timeout": patience}
        made: list[OwnSentinel] = []

        def make(**options: Any) -> redis.asyncio.Redis:
            made.append(OwnSentinel(addresses, sentinel_kwargs={**asking, **(sentinel_kwargs or {})}, **options))
            return made[0].master_for(service)  # type: ignore[no-any-return]

        self = cls._own(make, options)
        self._owned += tuple(made)
        return self

    @classmethod
    def _own(cls, make: Callable[..., Any], options: dict[str, Any]) -> Self:
        if "client" in options:
            raise ConfigurationError("a client has its address already; pass it to RedisStore(client) instead")
        store = {name: options.pop(name) for name in list(options) if name in STORE_OPTIONS}
        silence = to_ms(store.get("timeout", 5), "timeout") / 3000
        # Retries and time-outs belong to the store: redis-py's own ten retries would outlast any deadline.
        options.setdefault("retry", Retry(NoBackoff(), 0))
        options.setdefault("socket_timeout", silence)
        options.setdefault("socket_connect_timeout", silence)
        try:
            client = make(**options)
            if isinstance(client, redis.asyncio.Redis):
                client.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # options are looked at here, not at the first command
        except ConfigurationError:
            raise
        except (TypeError, ValueError, AttributeError, redis.RedisError, RedisClusterException) as error:
            raise ConfigurationError(f"redis-py does not take these options: {error}") from error
        self = cls(client, **store)
        self._owned = (client,)
        return self

    async def aclose(self) -> None:
        """Close the store, and the client if the store made it. Used again, it makes new connections."""
        await super().aclose()
        await self._link.aclose()
        for owned in self._owned:
            await owned.aclose()

    # -- the primitives -----------------------------------------------------------------------------------------------

    async def put_if_absent(self, key: str, value: bytes, ttl_ms: int) -> bytes | None:
        """``SET key value NX GET PX ttl_ms``; see :meth:`Store.put_if_absent`."""
        if self._direct is not None:
            try:
                (found,) = await self._direct.exchange(key, ("SET", key, value, "NX", "GET", "PX", ttl_ms))
            except StoreError as error:
                self._expect_old_server(error)
            else:
                if found is None and self._replicas is not None:
                    await self._put_counts(self._replicas, key, value)
                return found  # type: ignore[no-any-return]
        stored = await self._put_by_script(key, value, ttl_ms)
        return None if stored is None else stored.value

    async def put_or_read(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        """The same with ``PTTL`` in one round trip; see :meth:`Store.put_or_read`."""
        if self._direct is not None:
            try:
                put = ("SET", key, value, "NX", "GET", "PX", ttl_ms)
                found, left_ms = await self._direct.exchange(key, put, ("PTTL", key))
            except StoreError as error:
                self._expect_old_server(error)
            else:
                if found is not None:
                    return Stored(found, None if left_ms == -1 else max(left_ms, 0))
                if self._replicas is not None:
                    await self._put_counts(self._replicas, key, value)
                return None
        return await self._put_by_script(key, value, ttl_ms)

    async def _put_by_script(self, key: str, value: bytes, ttl_ms: int) -> Stored | None:
        # Without scripts no completion could be written: the first claim shows it, before the effect. By the digest too,
        # which the second completion goes by: where that alone is refused, the claim is undone.
        first = self._first
        found = await self._run(self._put_script, key, value, ttl_ms, int(first), probe=PROBE if first else ())
        if found is FELL_BACK:
            return await self._guarded.put_or_read(key, value, ttl_ms)
        if self._set_get:
            self._direct = self._wire
        if first:
            found, *limits = found
            if self._first:  # of several at once, one says so
                self._first = False
                warn_of_eviction(*limits)
        if found is not None:
            return Stored(found, LEFT_UNKNOWN)
        if self._replicas is not None:
            await self._put_counts(self._replicas, key, value)
        return None

    async def _put_counts(self, replicas: Replicas, key: str, value: bytes) -> None:
        if is_lock(key):
            return  # lost, it costs nobody more than the swap behind it, which is waited for
        try:
            await replicas.confirm(key, value)
        except NotReplicatedError as error:
            refuse_without_wait(error)
            raise

    def _expect_old_server(self, error: StoreError) -> None:
        """Let scripts stand in for what ``error`` says is missing; raise it if it says anything else."""
        if refusal(error.__cause__) != "syntax error":
            raise error
        self._direct = None
        if self._set_get:  # of several calls that meet it at once, one says so
            self._set_get = False
            missing = "SET with NX and GET (Redis 7.0)"
            extra = {"mode": "scripts", "missing": missing}
            logger.info("fallback_mode: scripts stand in for %s", missing, extra=extra)

    async def _run(
        self, script: Script, key: str, *args: bytes | str | int, large: bool = False, probe: Command = ()
    ) -> Any:
        """Run a script; ``FELL_BACK`` if there are none to run."""
        if self._wire is None or self._plain is not None:
            return FELL_BACK
        try:
            return await self._wire.run(script, key, *args, large=large, probe=probe)
        except StoreError as error:
            return self._without_scripts(error)

    def _without_scripts(self, error: StoreError) -> object:
        """Fall back if ``error`` says that the server runs no scripts; raise it if it says anything else."""
        if not refusal(error.__cause__).startswith("unknown command"):
            raise error
        self._fall_back("the server runs no scripts")
        return FELL_BACK

    async def read(self, key: str) -> Stored | None:
        """``GET`` and ``PTTL`` in one round trip; see :meth:`Store.read`."""
        if self._wire is None or self._plain is not None:
            return await self._guarded.read(key)
        found, left_ms = await self._wire.exchange(key, ("GET", key), ("PTTL", key))
        if found is None or left_ms == -2:  # it may expire between the two
            return None
        return Stored(found, None if left_ms == -1 else left_ms)

    async def swap(
        self,
        key: str,
        expected: bytes,
        value: bytes,
        ttl_ms: int,
        *,
        exact: bool,
        or_absent: bool,
        left_ms: int | None = None,
    ) -> Swap:
        """``lua/swap.lua``; see :meth:`Store.swap`."""
        left = "" if left_ms is None else left_ms
        args = (expected, value, ttl_ms, int(exact), int(or_absent), left)
        # Only what an owner completes with is large; all else of a key goes over one connection, in its order.
        large = len(value) >= LARGE
        reply: Any
        if self._direct is None:
            reply = await self._run(self._swap_script, key, *args, large=large)
        else:  # the same, and a coroutine less on the way of every call
            try:
                reply = await self._direct.run(self._swap_script, key, *args, large=large)
            except StoreError as error:
                reply = self._without_scripts(error)
        if reply is FELL_BACK:
            return await self._guarded.swap(
                key, expected, value, ttl_ms, exact=exact, or_absent=or_absent, left_ms=left_ms
            )
        swap = Swap(reply[0] == 1, reply[1] if len(reply) > 1 else None)
        # Not a release: lost, it costs a lease. Nor a renewal, whose bytes begin like those that it replaces: see
        # `confirm`.
        counts = exact or (or_absent and not value.startswith(expected))
        # A repetition that finds what it wants to write counts no sooner.
        if self._replicas is not None and counts and (swap.written or swap.found == value):
            await self._replicas.confirm(key, value)
        return swap

    async def confirm(self, key: str, value: bytes) -> None:
        """Wait for the replicas, with ``wait_replicas``; see :meth:`Store.confirm`."""
        if self._replicas is not None:
            await self._replicas.confirm(key, value)

    async def remove(self, key: str, expected: bytes, *, exact: bool) -> bool:
        """``lua/remove.lua``; see :meth:`Store.remove`."""
        reply = await self._run(self._remove_script, key, expected, int(exact))
        if reply is FELL_BACK:
            return await self._guarded.remove(key, expected, exact=exact)
        return bool(reply)

    @property
    def _guarded(self) -> Guarded:
        assert self._plain is not None
        return self._plain

    def _fall_back(self, why: str) -> None:
        if self._wait_replicas:
            raise ConfigurationError(f"wait_replicas needs Redis or Valkey with scripts: {why}")
        if self._plain is None:
            from .guarded import Guarded  # noqa: PLC0415 - few need it, and all would wait for its import

            self._plain = Guarded(self._client, self._link)
            self._direct = None
            self.lock_blocks_writes = True
            missing = "atomic compare-and-set" + ("" if self._plain.has_pttl else ", pttl")
            extra = {"mode": "lock", "missing": missing, "why": why}
            logger.warning("fallback_mode: a lock stands in for %s, because %s", missing, why, extra=extra)


def _check_client(client: Any) -> None:
    if isinstance(client, str):
        raise ConfigurationError("client must be a client, not text; with a URL use RedisStore.from_url")
    if isinstance(client, redis.Redis | redis.RedisCluster):
        raise ConfigurationError("this is the synchronous client; use redis.asyncio.Redis")
    for method in ("get", "set", "delete"):
        if not callable(getattr(client, method, None)):
            raise ConfigurationError(f"the client {type(client).__name__} has no method {method!r}")


@functools.cache
def _scripts() -> tuple[Script, Script, Script]:
    return Script("put"), Script("swap"), Script("remove")
