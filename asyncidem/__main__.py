"""``python -m asyncidem``: the command line, :mod:`asyncidem.cli`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
