"""What is printed: lines and tables for people, JSON for scripts. What was stored is data here, never markup."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any, Final

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .diagnosis import Finding, Level
from .entries import Entry
from .words import age, printable, size

__all__ = [
    "HEADER",
    "document",
    "findings",
    "listed",
    "progress_bar",
    "say",
    "shown",
    "statistics",
]

HEADER: Final = f"{'STATUS':<10} {'ATTEMPT':>7} {'AGE':>8} {'EXPIRES':>8} {'SIZE':>10}  KEY"

STYLES: Final = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}


def say(text: str) -> None:
    """Tell the operator, on standard error: what a script reads is on standard output."""
    click.echo(printable_lines(text), err=True)


def printable_lines(text: str) -> str:
    """Return text of several lines without what a terminal would act on."""
    return "\n".join(printable(line) for line in text.split("\n"))


def document(found: dict[str, Any]) -> None:
    """Print one line of JSON."""
    click.echo(json.dumps(found))


def listed(entry: Entry) -> str:
    """Return an entry as a line of ``list``."""
    attempt = "-" if entry.record is None else str(entry.record.attempt)
    return (
        f"{entry.status.value:<10} {attempt:>7} {age(entry.age):>8} {age(entry.expires_in):>8} "
        f"{size(entry.seen.size):>10}  {printable(entry.key)}"
    )


def shown(entry: Entry, *, data: bool) -> None:
    """Print an entry, a line for each thing that is known of it."""
    found = entry.document(data=data)
    found["size"] = size(entry.seen.size)
    for name in ("age", "lease_left"):
        found[name] = age(found[name]) if found[name] is not None else None
    found["expires_in"] = "never" if entry.expires_in is None else age(entry.expires_in)
    for name, value in found.items():
        if value is not None:
            click.echo(f"{name.replace('_', ' '):<12} {printable(str(value))}")


def statistics(found: dict[str, Any]) -> None:
    """Print the document of ``stats`` as tables."""
    console = _console()
    table = _table("status", "keys", "bytes")
    for status, counts in found["status"].items():
        table.add_row(status, str(counts["keys"]), size(counts["bytes"]))
    table.add_row("all", str(found["keys"]), size(found["bytes"]))
    console.print(table)
    for name in ("age", "size"):
        table = _table(name, "keys")
        for band, count in found[name].items():
            table.add_row(band, str(count))
        console.print(table)
    for name in ("biggest", "oldest"):
        if found[name]:
            table = _table(name, "age", "status", "key", right=("age",))
            for entry in found[name]:
                table.add_row(size(entry["size"]), age(entry["age"]), entry["status"], Text(printable(entry["key"])))
            console.print(table)
    if found["without_expiry"]:
        click.echo(f"{found['without_expiry']} keys never expire: no store of asyncidem wrote them so")


def findings(found: Iterable[Finding]) -> None:
    """Print what ``doctor`` found."""
    table = _table("", "topic", "found", "what to change", right=())
    for finding in found:
        where = f"{finding.topic} ({finding.node})" if finding.node else finding.topic
        table.add_row(
            Text(finding.level.value, STYLES[finding.level]),
            where,
            Text(printable(finding.found)),
            Text(printable(finding.remedy)),
        )
    _console().print(table)


def progress_bar(*, quiet: bool) -> Progress:
    """Return a progress bar on standard error, which is not drawn where nobody looks."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


def _console() -> Console:
    # Into a file or a pipe nothing is wrapped or cut.
    return Console() if sys.stdout.isatty() else Console(width=10_000)


def _table(*columns: str, right: tuple[str, ...] = ("keys", "bytes")) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table
