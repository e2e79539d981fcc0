"""The command line for operators: ``asyncidem``, or ``python -m asyncidem``. It needs the extra ``cli``.

The law is at the bottom and what prints is at the top: ``words``, ``entries``, ``figures`` and ``diagnosis`` decide
without I/O, ``keyspace``, ``changes`` and ``examination`` read and write, ``output``, ``options`` and ``commands``
speak with the operator. None of it is public but the commands, their options, their exit codes and what ``--json``
prints.

Click and Rich, and no Typer above them: Click is typed throughout and has no dependencies, Rich draws the tables and
the progress bar; a layer more would save a few lines and, with its own tracebacks, can show local variables, of which
one is a URL with a password.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line on the arguments of the process; end it with the command's exit code."""
    try:
        from .commands import cli  # noqa: PLC0415 - or there would be a traceback where the extra is missing
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("click", "rich"):
            raise
        sys.stderr.write(f"the command line needs {error.name}: pip install 'asyncidem[cli]'\n")
        sys.exit(2)
    cli(prog_name="asyncidem")
