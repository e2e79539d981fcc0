"""How the command line writes and reads ages, sizes, keys and addresses. No I/O."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from ..durations import MAX_MS

__all__ = ["age", "duration", "glob", "plain", "printable", "scrub", "size"]

UNITS: Final = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def duration(text: str) -> float:
    """Return the seconds that ``90``, ``90s``, ``15m``, ``1h30m`` or ``7d`` mean.

    Raises:
        ValueError: it is none of that, is zero, or more than a century.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)
    if "".join(number + unit for number, unit in parts) == text and parts:
        seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    elif re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text)
    else:
        raise ValueError(f"{text!r} is no duration; write 90, 90s, 15m, 1h30m or 7d")
    if not 0 < seconds <= MAX_MS / 1000:
        raise ValueError(f"{text!r} must be more than zero and at most a century")
    return seconds


def age(seconds: float | None) -> str:
    """Return seconds in the largest two units; ``-`` where nothing is known."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f}s"
    left = round(seconds)
    for big, small in (("d", "h"), ("h", "m"), ("m", "s")):
        if left >= UNITS[big]:
            whole, rest = divmod(left, int(UNITS[big]))
            rest //= int(UNITS[small])
            return f"{whole}{big}{rest}{small}" if rest else f"{whole}{big}"
    return f"{left}s"


def size(count: int) -> str:
    """Return a number of bytes in the largest unit that leaves a digit before the point."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def printable(text: str) -> str:
    """Return text without what a terminal would act on: a key is what a stranger sent."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def plain(text: bytes) -> tuple[str, bool]:
    """Return bytes as text, and whether the text is the same key as the bytes."""
    try:
        return text.decode(), True
    except UnicodeDecodeError:
        return text.decode(errors="backslashreplace"), False


def glob(beginning: str) -> str:
    """Return the pattern of SCAN for the keys with this beginning."""
    return re.sub(r"([\\*?\[\]^])", r"\\\1", beginning) + "*"


def scrub(text: str, url: str | None) -> str:
    """Return text without the password of a URL, in whichever of the two places it stands."""
    if not url:
        return text
    try:
        parts = urlsplit(url)
    except ValueError:
        return text
    secret = parts.password or ""
    for form in {secret, unquote(secret), *parse_qs(parts.query).get("password", [])} - {""}:
        text = text.replace(form, "***")
    return text
