"""Which store is meant: the options that all commands share, and the store that they describe."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import click
from redis.asyncio.connection import parse_url

from ..errors import ConfigurationError
from ..stores.redis import RedisStore
from .words import duration

__all__ = ["Target", "duration_option", "store_options"]

ATTRIBUTES: Final = ("status_attr", "expiry_attr", "in_progress_expiry_attr", "data_attr", "validation_key_attr")

NOT_A_URL: Final = (
    "the URL is none that redis-py takes: redis://[user:password@]host:port/db, rediss://… for TLS, unix://…; special "
    "characters of a password are percent-encoded"
)


def duration_option(*names: str, help: str, default: str | None = None, metavar: str = "TIME") -> Callable[[Any], Any]:  # noqa: A002 - Click's own word
    """Return an option whose value is a duration such as 90s, 15m or 7d; the command gets seconds."""

    def convert(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
        try:
            return None if value is None else duration(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return click.option(
        *names, callback=convert, default=default, show_default=default is not None, metavar=metavar, help=help
    )


class Target(NamedTuple):
    """The store that is meant.

    Attributes:
        url: of the server, of a node of the cluster, or of what goes for the master that sentinels name.
        cluster: whether it is a cluster.
        sentinels: ``host:port`` each.
        service: the name by which they know the master.
        sentinel_user: of the sentinels' own.
        sentinel_password: likewise.
        options: those of the store.
    """

    url: str | None
    cluster: bool
    sentinels: tuple[str, ...]
    service: str | None
    sentinel_user: str | None
    sentinel_password: str | None
    options: dict[str, Any]

    @property
    def mode(self) -> str:
        """How the servers are reached."""
        return "sentinel" if self.sentinels else "cluster" if self.cluster else "standalone"

    def open(self) -> RedisStore:
        """Return the store; nothing is connected yet.

        Raises:
            ConfigurationError: the options do not go together, or redis-py does not take the URL. Of a URL that is cut in
                the wrong place it holds nothing, for that may be a piece of the password, as in redis-py's own error.
        """
        if self.url is None and not self.sentinels:
            raise ConfigurationError("no store is given: use --url or REDIS_URL, or --sentinel")
        if self.cluster and self.sentinels:
            raise ConfigurationError("--cluster and --sentinel exclude each other: a cluster has no sentinels")
        if bool(self.sentinels) != bool(self.service):
            raise ConfigurationError("--sentinel host:port … and --service NAME go together")
        try:
            if not self.sentinels:
                return RedisStore.from_url(str(self.url), cluster=self.cluster, **self.options)
            return self._behind_sentinels()
        except ConfigurationError as error:
            if isinstance(error.__cause__, ValueError):
                raise ConfigurationError(NOT_A_URL) from None
            raise
        except ValueError:
            raise ConfigurationError(NOT_A_URL) from None

    def _behind_sentinels(self) -> RedisStore:
        """Take user, password, database and TLS from the URL; the host is what the sentinels say."""
        options: dict[str, Any] = dict(parse_url(self.url)) if self.url else {}
        for name in ("host", "port", "path"):
            options.pop(name, None)
        tls = options.pop("connection_class", None) is not None
        credentials = {"username": self.sentinel_user, "password": self.sentinel_password}
        asking: dict[str, Any] = {name: value for name, value in credentials.items() if value is not None}
        if tls:  # for the sentinels too
            options["ssl"] = True
            asking |= {name: value for name, value in options.items() if name.startswith("ssl")}
        return RedisStore.from_sentinel(
            self.sentinels, service=str(self.service), sentinel_kwargs=asking, **options, **self.options
        )


def store_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that describe a store; the command gets them as ``target``."""

    @functools.wraps(command)
    def with_target(
        *,
        url: str | None,
        cluster: bool,
        sentinel: tuple[str, ...],
        service: str | None,
        prefix: str,
        timeout: float,
        **options: Any,
    ) -> Any:
        store: dict[str, Any] = {name: options.pop(name) for name in ATTRIBUTES}
        store |= {"prefix": prefix, "timeout": timeout}
        # No options: a password does not belong into a command line.
        user, password = map(os.environ.get, ("ASYNCIDEM_SENTINEL_USER", "ASYNCIDEM_SENTINEL_PASSWORD"))
        target = Target(url, cluster, sentinel, service, user, password, store)
        return command(target=target, **options)

    with_target.__doc__ = command.__doc__
    shared = [
        click.option(
            "--url",
            envvar="REDIS_URL",
            show_envvar=True,
            metavar="URL",
            help="The server, or a node of the cluster. Others on this machine can read a command line: put a URL with "
            "a password into the environment. With --sentinel: user, password, database and TLS; its host is not used.",
        ),
        click.option("--cluster", is_flag=True, help="It is a Redis Cluster: every master is asked."),
        click.option(
            "--sentinel",
            multiple=True,
            metavar="HOST:PORT",
            help="A sentinel; once for each of them. Their own user and password: ASYNCIDEM_SENTINEL_USER and "
            "ASYNCIDEM_SENTINEL_PASSWORD.",
        ),
        click.option("--service", metavar="NAME", help="The name by which the sentinels know the master."),
        click.option("--prefix", default="asyncidem:", show_default=True, help="The prefix of the workers' store."),
        duration_option("--timeout", default="5s", help="How long one step may take until the server is given up."),
        *(
            click.option(f"--{name.replace('_', '-')}", name, default=default, show_default=True, metavar="NAME")
            for name, default in zip(
                ATTRIBUTES, ("status", "expiration", "in_progress_expiration", "data", "validation"), strict=True
            )
        ),
    ]
    for option in reversed(shared):
        with_target = option(with_target)
    return with_target
