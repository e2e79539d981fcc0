"""How the command line reads and writes durations, ages, sizes, keys and secrets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncidem.cli.words import age, duration, glob, plain, printable, scrub, size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("0.5", 0.5), ("90s", 90), ("15m", 900), ("1h30m", 5400), ("7d", 604_800), ("250ms", 0.25)],
)
def test_durations(text: str, seconds: float) -> None:
    """Seconds, or numbers with units."""
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "-1", "5 m", "m5", "1h-30m", "1e3", "nan", "inf"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    """The error names the text and shows what to write."""
    with pytest.raises(ValueError, match="is no duration; write 90, 90s, 15m, 1h30m or 7d"):
        duration(text)


@pytest.mark.parametrize("text", ["0", "0s", "0h0m", "99999999d"])
def test_durations_out_of_range_are_refused(text: str) -> None:
    """Nothing is older than nothing, and a century is a unit mistaken for another."""
    with pytest.raises(ValueError, match="must be more than zero and at most a century"):
        duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-0.2, "0.0s"),
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.7, "1m"),
        (61, "1m1s"),
        (3600, "1h"),
        (3660, "1h1m"),
        (3659, "1h"),
        (86_400 * 2 + 7200, "2d2h"),
    ],
)
def test_ages(seconds: float | None, text: str) -> None:
    """Two units at the most, cut off."""
    assert age(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.0 GiB"), (2 << 40, "2.0 TiB")],
)
def test_sizes(count: int, text: str) -> None:
    """Bytes in the largest unit."""
    assert size(count) == text


@given(st.text())
def test_nothing_reaches_the_terminal_but_what_it_prints(text: str) -> None:
    """Control characters of a key are escaped, what can be printed is left as it is."""
    shown = printable(text)
    assert shown.isprintable()
    assert not text.isprintable() or shown == text


def test_escapes_are_readable() -> None:
    """A key that would clear the screen is shown as what it is."""
    assert printable("a\x1b[2Jé\n") == "a\\x1b[2Jé\\n"


def test_keys_that_are_not_utf8_are_shown_and_told_apart() -> None:
    """Their text is not the key."""
    assert plain("é".encode()) == ("é", True)
    assert plain(b"a\xff") == ("a\\xff", False)


def test_patterns_match_a_beginning_literally() -> None:
    """What means something to SCAN is escaped."""
    assert glob("a*b?[c]^\\:") == "a\\*b\\?\\[c\\]\\^\\\\:*"


@pytest.mark.parametrize(
    ("url", "text", "shown"),
    [
        (None, "s3cret", "s3cret"),
        ("redis://h:1", "s3cret", "s3cret"),
        ("redis://u:s3cret@h", "no s3cret here", "no *** here"),
        ("redis://u:s%20t@h", "'s t' or s%20t", "'***' or ***"),
        ("redis://h?password=s3cret&db=1", "no s3cret here", "no *** here"),
        ("redis://[", "text", "text"),
    ],
)
def test_passwords_are_taken_out(url: str | None, text: str, shown: str) -> None:
    """As they stand in the URL, and as they are sent."""
    assert scrub(text, url) == shown
