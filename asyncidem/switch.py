"""The switch that lets operations run unprotected, for local tests: the environment variable ``ASYNCIDEM_DISABLED``."""

from __future__ import annotations

import os
from typing import Final

from .errors import ConfigurationError
from .hooks import logger

__all__ = ["is_disabled"]

VARIABLE: Final = "ASYNCIDEM_DISABLED"

ON: Final = ("1", "true", "yes", "on")
OFF: Final = ("", "0", "false", "no", "off")

_warned: list[bool] = []


def is_disabled() -> bool:
    """Say whether the environment asks for operations without protection; the first yes of a process is logged.

    Raises:
        ConfigurationError: the variable has another value.
    """
    value = os.environ.get(VARIABLE, "")
    word = value.strip().lower()
    if word not in (*ON, *OFF):
        raise ConfigurationError(f"{VARIABLE} must be one of {', '.join(ON)}, or unset, not {value!r}")
    if word not in ON:
        return False
    if not _warned:
        _warned.append(True)
        logger.warning("disabled: %s=%s, every operation runs unprotected", VARIABLE, word)
    return True
