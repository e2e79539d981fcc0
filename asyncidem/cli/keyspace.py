"""Reads what is stored under a prefix: one key, or all of them, a page at a time. It writes nothing.

The keys come from SCAN on every master, never from KEYS, and no page is larger than what the server returns for one
step. So memory does not grow with the keyspace: a page is read in one pipeline, of each value the first bytes, which
tell what it is; the few others are read whole, one after the other.

SCAN returns every key that is there from its beginning to its end at least once. One that comes or goes meanwhile may be
missing, and one may come twice where the server's table grows, or a slot moves. What a key holds is true of the moment
at which it was read: whoever changes it later compares first (:mod:`asyncidem.cli.changes`). The time left is read
behind the value: written in between, the bytes are the old ones, and nothing that compares them touches the new.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import redis.asyncio
from redis import exceptions

from ..errors import ConfigurationError, StoreError
from ..keys import check_key
from ..model import Stored
from ..stores.link import Command, Progress
from ..stores.primitives import Within
from ..stores.redis import RedisStore
from ..stores.refusals import refusal
from ..stores.routes import ClusterRoutes, Node
from .entries import Entry, Seen, classify, shortened
from .words import glob, plain

__all__ = ["PAGE", "Keyspace"]

PAGE: Final = 500
"""Keys that one step of SCAN looks at."""

HEAD: Final = 4096
"""Bytes of a value that are read at first: all of a record in progress, and of most completed ones."""

ELSEWHERE: Final = frozenset({"MOVED", "ASK", "TRYAGAIN"})
"""A slot that moves: the key is read as the store reads keys, which follows redirections."""


class Keyspace:
    """What is stored under the prefix of a store.

    Args:
        store: on a client of redis-py.
        ttl_ms: how long its workers write completed records for, if that is known; their age follows from it.
    """

    def __init__(self, store: RedisStore, ttl_ms: int | None = None) -> None:
        assert store._wire is not None
        self.store = store
        self._wire = store._wire
        self._ttl_ms = ttl_ms

    async def find(self, key: str) -> Entry | None:
        """Return what is stored under a key: one that ``store.get`` takes, or a stored one, with or without its prefix.

        Raises:
            MissingKeyError: the key is empty.
            InvalidKeyError: it is no text.
            StoreError: the server refused.
            StoreUnavailableError: it did not answer in time.
        """
        prefix = self.store.prefix
        forms = [self.store._stored(check_key(key)), prefix + key]
        if key.startswith(prefix):
            forms.append(key)
        for stored_key in dict.fromkeys(forms):
            entry = await self.read(stored_key)
            if entry is not None:
                return entry
        return None

    async def read(self, stored_key: str) -> Entry | None:
        """Return what is stored under a stored key, read whole. Raises what :meth:`find` raises."""
        kind, stored = "string", None
        try:
            with Within(self.store.timeout):
                stored = await self.store._call(self.store.read(stored_key))
        except StoreError as error:
            if refusal(error.__cause__) != "WRONGTYPE":
                raise
            kind = "value of another type than a string"
        if stored is None:
            return None if kind == "string" else self._classify(Seen(stored_key, None, None, 0, kind=kind))
        return self._classify(Seen(stored_key, stored.value, stored.left_ms, len(stored.value)))

    async def entries(self, beginning: str = "") -> AsyncIterator[list[Entry]]:
        """Yield pages of all keys whose part behind the prefix has this beginning.

        Raises:
            StoreError: the server refused.
            StoreUnavailableError: a node did not answer in time.
        """
        pattern = glob(self.store.prefix + beginning)
        for node in await self.masters():
            cursor = b"0"
            while True:
                cursor, keys = (await self.ask(node, ("SCAN", cursor, "MATCH", pattern, "COUNT", PAGE), strict=True))[0]
                if keys:
                    yield await self._page(node, list(dict.fromkeys(keys)))
                if cursor == b"0":
                    break

    async def masters(self, *, checked: bool = True) -> list[Node]:
        """Return the nodes that hold keys: the only one, or each master of a cluster.

        Args:
            checked: refuse one node of a cluster that was given as if it were alone.

        Raises:
            ConfigurationError: it is one.
            StoreUnavailableError: the topology cannot be read.
        """
        routes = self._wire._routes
        if not isinstance(routes, ClusterRoutes):
            node = routes.find("")
            assert node is not None
            if checked and isinstance((await self.ask(node, ("CLUSTER", "INFO")))[0], bytes):
                # It would tell of its own slots alone, as if they were all.
                raise ConfigurationError("this server is a node of a cluster: add --cluster")
            return [node]

        async def read_topology(progress: Progress) -> None:
            progress.sent = False
            await routes.refresh(self.store.timeout / 3)

        await self._wire.step(read_topology)
        client: redis.asyncio.RedisCluster = routes._client
        return [routes._wrap(node) for node in client.get_primaries()]

    async def ask(self, node: Node, *commands: Command, strict: bool = False) -> list[Any]:
        """Send commands to a node in one write, over a connection of the client's pool, and return their replies.

        Args:
            node: one of :meth:`masters`.
            commands: what only reads, for it may be repeated.
            strict: raise an error reply instead of returning it.

        Raises:
            StoreError: with ``strict``, a command was refused.
            StoreUnavailableError: no answer in time.
        """
        try:
            return await self._wire.step(functools.partial(self._talk, node, commands, strict))
        except StoreError as error:
            raise _explained(error)  # noqa: B904 - its cause is set

    async def _talk(self, node: Node, commands: Sequence[Command], strict: bool, progress: Progress) -> list[Any]:  # noqa: FBT001 - called by `ask` alone
        progress.node = node
        # Silence is bounded by the socket's time-out, as the store's client has it: a large page on a slow line is none.
        connection = await node.lend()
        try:
            await connection.send_packed_command(connection.pack_commands(commands))
            progress.sent = True
            replies: list[Any] = []
            for _ in commands:
                try:
                    replies.append(await connection.read_response(disable_decoding=True))
                except exceptions.ResponseError as error:
                    replies.append(error)
        finally:  # whatever broke off a reading has disconnected it: nothing is left over for the next command
            await node.take_back(connection)
        for reply in replies:
            if strict and isinstance(reply, exceptions.ResponseError):
                raise reply
        return replies

    async def _page(self, node: Node, keys: list[bytes]) -> list[Entry]:
        reads = [
            command for key in keys for command in (("GETRANGE", key, 0, HEAD - 1), ("STRLEN", key), ("PTTL", key))
        ]
        replies = iter(await self.ask(node, *reads))
        entries: list[Entry] = []
        for key, value, size, left_ms in zip(keys, replies, replies, replies, strict=True):
            entry = await self._entry(node, key, value, size, left_ms)
            if entry is not None:
                entries.append(entry)
        return entries

    async def _entry(self, node: Node, key: bytes, value: Any, size: Any, left_ms: Any) -> Entry | None:
        stored_key, exact = plain(key)
        refused = next((reply for reply in (value, size, left_ms) if isinstance(reply, Exception)), None)
        if refused is not None:
            code = refusal(refused)
            if code in ELSEWHERE and exact:
                return await self.read(stored_key)
            if code != "WRONGTYPE":
                unread = StoreError(f"the server refused to read {stored_key!r}: {refused}")
                unread.__cause__ = refused
                raise _explained(unread)
            (kind,) = await self.ask(node, ("TYPE", key), strict=True)
            left = None if left_ms == -1 else left_ms
            return self._classify(Seen(stored_key, None, left, 0, exact, kind.decode()))
        if left_ms == -2:
            return None  # it expired, or was deleted, meanwhile
        left_ms = None if left_ms == -1 else left_ms
        entry = classify(
            Seen(stored_key, value, left_ms, size, exact),
            self.store.prefix,
            self.store.format,
            now_ms=self.store._now_ms(),
            ttl_ms=self._ttl_ms,
        )
        if entry is not None:
            return entry
        # Large, and none of ours, or written in between: only the whole of it can tell.
        whole, left_ms = await self.ask(node, ("GET", key), ("PTTL", key), strict=True)
        if whole is None or left_ms == -2:
            return None
        seen = Seen(stored_key, whole, None if left_ms == -1 else left_ms, len(whole), exact)
        return shortened(self._classify(seen), HEAD)

    def _classify(self, seen: Seen) -> Entry:
        entry = classify(seen, self.store.prefix, self.store.format, now_ms=self.store._now_ms(), ttl_ms=self._ttl_ms)
        assert entry is not None  # what was read whole always tells
        return entry

    def stored(self, entry: Entry) -> Stored:
        """Return an entry as the store's primitives take it."""
        assert entry.seen.value is not None
        return Stored(entry.seen.value, entry.seen.left_ms)


def _explained(error: StoreError) -> StoreError:
    """Name the permissions that the command line needs where one is missing; the store's own hint names fewer."""
    if refusal(error.__cause__) != "NOPERM":
        return error
    explained = StoreError(
        f"the server refused: {error.__cause__}; to read all keys the user needs SCAN, GETRANGE, STRLEN, PTTL, GET and "
        f"TYPE, in a cluster also CLUSTER SLOTS"
    )
    explained.__cause__ = error.__cause__
    return explained
