"""The commands: what they take, what they print, how they end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn

import click

from ..durations import to_ms
from ..errors import IdempotencyError, StoreError
from .changes import PURGED, Purge
from .changes import release as release_seen
from .diagnosis import Level, diagnose
from .entries import Filter, Status, release_of
from .examination import examine
from .figures import Figures
from .keyspace import Keyspace
from .options import Target, duration_option, store_options
from .output import HEADER, document, findings, listed, progress_bar, say, shown, statistics
from .words import scrub, size

__all__ = ["cli"]

NOT_FOUND, MISUSED, UNAVAILABLE, LEFT_ALONE, PROBLEMS, INTERRUPTED = 1, 2, 3, 4, 5, 130

EXIT_CODES: Final = """
\b
Exit codes:
  0    done; also: an empty list, nothing to purge
  1    nothing is stored under the key
  2    the command, its options or the key cannot be used
  3    the store does not answer, or refuses
  4    left alone: it needs --force, changed meanwhile, or was not confirmed
  5    doctor found a problem
  130  interrupted
"""

Work = Callable[[Keyspace], Awaitable[int]]

json_option = click.option("--json", "as_json", is_flag=True, help="JSON for scripts, one document a line.")
data_option = click.option("--data", is_flag=True, help="Show payloads too: results, and what exceptions say.")
ttl_option = duration_option(
    "--ttl",
    help="The ttl of the workers: completed records do not say their age, which is this less the time they have left.",
)
older_option = duration_option("--older-than", metavar="AGE", help="Last written longer ago than this: 90s, 15m, 7d.")
beginning_option = click.option(
    "--starting-with", default="", metavar="TEXT", help="Keys with this beginning, such as a namespace and its colon."
)


def _statuses(allowed: frozenset[Status]) -> Callable[[Any], Any]:
    return click.option(
        "--status",
        "statuses",
        multiple=True,
        type=click.Choice([status.value for status in Status if status in allowed]),
        help="Of this status; may be repeated.",
    )


orphaned_option = click.option(
    "--orphaned", is_flag=True, help="The same as --status orphan: in progress, and the lease is over."
)


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="asyncidem", prog_name="asyncidem")
def cli() -> None:
    """See what asyncidem keeps on Redis or Valkey, find what is stuck, and free it.

    The store is given by --url or REDIS_URL, with --cluster, or by --sentinel and --service. Keys are what `store.get`
    accepts, and what `list` prints. Nothing is changed without --apply, no payload is shown without --data.
    """


@cli.command(epilog=EXIT_CODES)
@click.argument("key")
@store_options
@ttl_option
@data_option
@json_option
def inspect(target: Target, key: str, ttl: float | None, *, data: bool, as_json: bool) -> None:
    """Show what is stored under KEY."""

    async def work(keyspace: Keyspace) -> int:
        entry = await keyspace.find(key)
        if entry is None:
            say(f"nothing is stored under {key!r}")
            return NOT_FOUND
        if as_json:
            document(entry.document(data=data))
            return 0
        shown(entry, data=data)
        release = release_of(entry)
        if release is not None:
            say(f"{'release':<12} {release.does}")
        return 0

    _run(target, work, ttl)


@cli.command("list", epilog=EXIT_CODES)
@store_options
@_statuses(frozenset(Status))
@orphaned_option
@older_option
@ttl_option
@beginning_option
@data_option
@json_option
def list_(
    target: Target,
    statuses: tuple[str, ...],
    older_than: float | None,
    ttl: float | None,
    starting_with: str,
    *,
    orphaned: bool,
    data: bool,
    as_json: bool,
) -> None:
    """List keys as they are found, in no order.

    A key that is written meanwhile may be missing or come twice.
    """
    wanted = _filter(statuses, older_than, orphaned=orphaned)

    async def work(keyspace: Keyspace) -> int:
        undecided = 0
        if not as_json:
            click.echo(HEADER)
        async for page in keyspace.entries(starting_with):
            undecided += sum(map(wanted.undecided, page))
            for entry in filter(wanted.meets, page):
                if as_json:
                    document(entry.document(data=data))
                    continue
                click.echo(listed(entry))
                if data:
                    shown(entry, data=True)
        _say_undecided(undecided)
        return 0

    _run(target, work, ttl)


@cli.command(epilog=EXIT_CODES)
@store_options
@ttl_option
@beginning_option
@click.option("--top", type=click.IntRange(0, 1000), default=5, show_default=True, help="How many biggest and oldest.")
@json_option
def stats(target: Target, ttl: float | None, starting_with: str, top: int, *, as_json: bool) -> None:
    """Count keys by status, age and size, and name the biggest and the oldest."""

    async def work(keyspace: Keyspace) -> int:
        figures = Figures(top)
        async for page in keyspace.entries(starting_with):
            for entry in page:
                figures.add(entry)
        (document if as_json else statistics)(figures.document())
        return 0

    _run(target, work, ttl)


@cli.command(epilog=EXIT_CODES)
@click.argument("key")
@store_options
@click.option("--force", is_flag=True, help="Also what is live or completed; without it the risk is told.")
@click.option("--apply", is_flag=True, help="Do it; without it only what would be done is told.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def release(target: Target, key: str, *, force: bool, apply: bool, yes: bool, as_json: bool) -> None:
    """Free KEY, so that its next call runs at once. Only told, without --apply.

    An orphan is free already. A live operation (its lease lasts) needs --force: its owner is fenced off, and gets
    LeaseLostError if it still lives, but its effect may then happen twice. A completed one needs --force too: its record
    is deleted, and the next call runs it again. What changed since it was read is left alone.
    """

    async def work(keyspace: Keyspace) -> int:
        entry = await keyspace.find(key)
        if entry is None:
            say(f"nothing is stored under {key!r}: its next call runs at once")
            return NOT_FOUND
        plan = release_of(entry)
        if plan is None:
            say(f"{entry.key!r} holds {entry.note}")
            return LEFT_ALONE

        def tell(code: int, said: str, *, released: bool = False) -> int:
            if as_json:
                document({**entry.document(), "does": plan.does, "risk": plan.risk or None, "released": released})
            say(said)
            return code

        if plan.free:
            return tell(0, plan.does)
        if not as_json:
            shown(entry, data=False)
        if not force:
            return tell(LEFT_ALONE, f"left alone: {plan.risk}.\nWith --force, release {plan.does}")
        if not apply:
            return tell(0, f"dry run: release {plan.does}.\nThe risk: {plan.risk}.\nAdd --apply to do it")
        if not yes and not _confirmed(f"Release {plan.does}.\nThe risk: {plan.risk}.\nDo it?"):
            return tell(LEFT_ALONE, "not confirmed: nothing was changed")
        if await release_seen(keyspace, entry):
            return tell(0, "released", released=True)
        return tell(LEFT_ALONE, "left alone: it changed since it was read")

    _run(target, work)


@cli.command(epilog=EXIT_CODES)
@store_options
@_statuses(PURGED)
@orphaned_option
@older_option
@ttl_option
@beginning_option
@click.option("--apply", is_flag=True, help="Delete them; without it they are only counted.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def purge(
    target: Target,
    statuses: tuple[str, ...],
    older_than: float | None,
    ttl: float | None,
    starting_with: str,
    *,
    orphaned: bool,
    apply: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete keys of some status. Only counted, without --apply.

    An operation whose record is deleted runs again at its next call, as attempt 1, and is not told that somebody was
    there before. Live operations are never purged: release them one by one. What changes meanwhile is left alone.
    """
    wanted = _filter(statuses, older_than, orphaned=orphaned)
    if not wanted.statuses:
        raise click.UsageError("say what to purge: --status … or --orphaned")

    async def work(keyspace: Keyspace) -> int:
        count = Purge(keyspace, wanted, apply=False)
        await count.run(starting_with, lambda _: None)
        found = f"{count.matched} keys of {size(count.matched_bytes)}"
        if not as_json:
            for entry in count.examples:
                say(listed(entry))
            if count.matched > len(count.examples):
                say("…")
        if apply and count.matched and not yes and not _confirmed(f"Delete {found}?"):
            say("not confirmed: nothing was changed")
            return LEFT_ALONE
        deleting = Purge(keyspace, wanted, apply=True)
        try:
            if apply and count.matched:
                with progress_bar(quiet=as_json) as bar:
                    task = bar.add_task("deleting", total=count.matched)
                    await deleting.run(starting_with, lambda matched: bar.advance(task, matched))
        finally:
            if as_json:
                document(
                    {
                        "matched": count.matched,
                        "bytes": count.matched_bytes,
                        "applied": apply,
                        "removed": deleting.removed,
                        "changed": deleting.changed,
                        "unknown_age": count.unknown_age,
                        "not_utf8": count.unreadable,
                    }
                )
            elif apply:
                say(f"deleted {deleting.removed} keys; {deleting.changed} changed meanwhile and were left alone")
            else:
                say(f"dry run: {found} would be deleted. Add --apply to do it")
        _say_undecided(count.unknown_age)
        if count.unreadable:
            say(f"{count.unreadable} keys are not UTF-8, and were left alone: no store of asyncidem wrote them")
        return 0

    _run(target, work, ttl)


@cli.command(epilog=EXIT_CODES)
@click.argument("address", metavar="[URL]", required=False)
@store_options
@json_option
def doctor(target: Target, address: str | None, *, as_json: bool) -> None:
    """Examine the server at URL (or --url): what would break a promise, and what to change.

    It writes one record of its own under the prefix, which shows what the user may do, and deletes it.
    """
    if address is not None:
        target = target._replace(url=address)

    async def work(keyspace: Keyspace) -> int:
        found = diagnose(await examine(keyspace, target.mode))
        if as_json:
            document({"findings": [finding._asdict() for finding in found]})
        else:
            findings(found)
        return PROBLEMS if any(finding.level is Level.PROBLEM for finding in found) else 0

    _run(target, work)


def _filter(statuses: tuple[str, ...], older_than: float | None, *, orphaned: bool) -> Filter:
    return Filter(frozenset(map(Status, statuses)) | ({Status.ORPHAN} if orphaned else frozenset()), older_than)


def _say_undecided(count: int) -> None:
    if count:
        say(f"{count} keys are left out: their age is not known; completed records need --ttl, that of the workers")


def _confirmed(question: str) -> bool:
    """Ask; no answer, as where standard input is empty, is no.

    Click's own question, even on standard error, writes a space to standard output, where ``--json`` is.
    """
    click.echo(f"{question} [y/N] ", err=True, nl=False)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _run(target: Target, work: Work, ttl: float | None = None) -> NoReturn:
    """Do the work on the store, and end with its exit code. No error is a traceback, and none holds a password."""
    # What the library logs, doctor and the errors say; without a handler it would go to standard error.
    logging.getLogger("asyncidem").addHandler(logging.NullHandler())

    streams: tuple[Any, ...] = (sys.stdout, sys.stderr)
    for stream in streams:
        with contextlib.suppress(AttributeError):  # whoever put another there knows what it can show
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding does not have is escaped

    async def opened() -> int:
        store = target.open()
        try:
            return await work(Keyspace(store, None if ttl is None else to_ms(ttl, "ttl")))
        finally:
            await store.aclose()

    try:
        code = asyncio.run(opened())
    except StoreError as error:
        say(f"error: {scrub(str(error), target.url)}")
        code = UNAVAILABLE
    except IdempotencyError as error:
        say(f"error: {scrub(str(error), target.url)}")
        code = MISUSED
    except KeyboardInterrupt:
        code = INTERRUPTED
    raise click.exceptions.Exit(code)
