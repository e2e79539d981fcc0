"""The value of an Idempotency-Key: what it may be, and that it is read as the reference parser reads it."""

import string

import http_sf
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from asyncidem.integrations.fields import MAX_KEY, MalformedKeyError, parse_key

PRINTABLE = "".join(map(chr, range(0x20, 0x7F)))
RAW = string.ascii_letters + string.digits + "._~:/+=@-"


def parse(value: str, *, strict: bool = True) -> str | None:
    """Parse a field of one line."""
    return parse_key([value], strict=strict)


def quoted(key: str) -> str:
    """Return a key as a string of a structured field."""
    return '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'


def test_no_line_is_no_key() -> None:
    """A request without the header has no key, which is no mistake yet."""
    assert parse_key([], strict=True) is None
    assert parse_key([], strict=False) is None


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ('"8e03978e-40d5-43dd-bc93-6894a57f9324"', "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        ('"a"', "a"),
        (' \t"a"\t ', "a"),
        ('" "', " "),
        (r'"a\"b\\c"', r'a"b\c'),
        ('"a";b', "a"),
        ('"a";b;b=1', "a"),
        ('"a";  b=?0;c=tok/en:1;d=:aGk=:;e="x; y";f=@-1;g=1.5;h=%"%c3%a9";*i.-_*=*', "a"),
        ('"a";b=:aGk:', "a"),
        ('"a";b=%""', "a"),
        (quoted("k" * MAX_KEY), "k" * MAX_KEY),
        ('"' + r"\\" * MAX_KEY + '"', "\\" * MAX_KEY),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_strings_are_decoded(value: str, key: str, strict: bool) -> None:
    """The key is the string's content; parameters are ignored, and so are spaces and tabs around the value."""
    assert parse(value, strict=strict) == key


@pytest.mark.parametrize("key", ["a", RAW[:36], "k" * MAX_KEY, "8e03978e-40d5-43dd-bc93-6894a57f9324"])
def test_raw_text_is_the_same_key_as_the_string(key: str) -> None:
    """What the industry sends without quotes is taken, unless strings are asked for."""
    assert parse(key, strict=False) == parse(f"\t {key} ", strict=False) == parse(quoted(key)) == key
    with pytest.raises(MalformedKeyError, match=r"the value must be a string in double quotes$"):
        parse(key)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "\t"),
        *('"a', 'a"', '"a"b', '"a" b', '"a""b"', r'"a\b"', '"a\\', "'a'", "“a”"),
        *('"a", "b"', "a, b", "a,b", '("a")', '"a";', '"a";B', '"a" ;b', '"a";b=', '"a";b="', '"a";b=1.', '"a";1'),
        *('"a";b=1234567890123.1', '"a";b=1234567890123456', '"a";b=?2', '"a";b=:a:', '"a";b=@1.5', '"a";b\tc'),
        *('"a";b=%"%ff"', '"a";b=%"%C3%A9"', '"a";b=%"%c3"', '"a";b=-', '"a";b=?0x', '"a";\tb', '"a";b=:=:'),
        *('"a\x00"', '"a\tb"', '"a\n"', '"\x7f"', '"é"', "é", "a\x00", "a b", "a;b=1", "a\n", '"a"\n', '"a";b\n'),
        *(":YQ==:,", "%41,", "{a}", "a?", "a#b"),
    ],
)
def test_anything_else_is_malformed(value: str, strict: bool) -> None:
    """Neither a string nor raw text: a list, something unfinished, parameters that are none, controls, non-ASCII."""
    with pytest.raises(MalformedKeyError) as caught:
        parse(value, strict=strict)
    if len(value.strip()) > 3:
        assert value.strip() not in str(caught.value)  # it may be in somebody's log


@pytest.mark.parametrize("key", ["", "k" * (MAX_KEY + 1), "\\" * (MAX_KEY + 1)])
def test_keys_have_1_to_255_characters(key: str) -> None:
    """The decoded content counts, and the error says how many it has."""
    with pytest.raises(MalformedKeyError, match=f"1 to 255 characters, not {len(key)}$"):
        parse(quoted(key))


def test_raw_keys_have_1_to_255_characters() -> None:
    """A longer raw text is none, and the error says what one is."""
    with pytest.raises(MalformedKeyError, match="1 to 255 of A-Za-z0-9"):
        parse("k" * (MAX_KEY + 1), strict=False)


@pytest.mark.parametrize("lines", [["a", "a"], ['"a"', '"b"'], ["", ""]])
@pytest.mark.parametrize("strict", [True, False])
def test_several_lines_are_malformed(lines: list[str], strict: bool) -> None:
    """Equal ones too: frameworks take the first, proxies join them."""
    with pytest.raises(MalformedKeyError, match="more than once"):
        parse_key(lines, strict=strict)


# -- as the reference parser reads it ------------------------------------------------------------------------------------

digits = st.text(string.digits, max_size=17)
bare = st.one_of(
    st.text(PRINTABLE, max_size=12).map(quoted),
    st.builds("{}{}".format, st.sampled_from(["", "-", "@", "@-"]), digits),
    st.builds("{}{}.{}".format, st.sampled_from(["", "-"]), digits, st.text(string.digits, max_size=4)),
    st.text(string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~:/", max_size=8),
    st.builds(":{}{}:".format, st.text("ABZaz09+/", max_size=9), st.text("=", max_size=3)),
    st.sampled_from(["?0", "?1", "?", "?2"]),
    st.builds('%"{}"'.format, st.text(st.sampled_from("a %c3%a9%ff0"), max_size=9)),
)
parameter = st.builds(
    ";{}{}{}".format,
    st.text(" ", max_size=2),
    st.text(string.ascii_lowercase[:3] + "*1_-.", min_size=0, max_size=4),
    st.one_of(st.just(""), bare.map("={}".format)),
)
fields = st.builds(
    "{}{}{}{}".format,
    st.text(" ", max_size=2),
    st.text(PRINTABLE, max_size=20).map(quoted),
    st.lists(parameter, max_size=3).map("".join),
    st.text(" ", max_size=2),
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """Draw a field in which a few characters are others, gone, or doubled."""
    value = draw(fields)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(value)))
        instead = draw(
            st.one_of(st.just(""), st.sampled_from('"\\;=:%@?-. \t\n\x00aB1,('), st.characters(max_codepoint=0xFF))
        )
        value = value[:at] + instead + value[at + draw(st.integers(0, 1)) :]
    return value


def agrees(value: str) -> None:
    """Hold what is read of a value against the reference parser."""
    try:
        read = parse(value)
    except MalformedKeyError as error:
        read = None
        assume("1 to 255" not in str(error))  # a limit of ours
    try:
        content, _ = http_sf.parse(value.strip(" \t").encode("latin-1"), tltype="item")  # the stripping is ours, too
    except http_sf.StructuredFieldError as error:
        assume("out of range" not in str(error))  # of datetime, which is Python's limit and not the field's
        expected = None
    else:
        expected = str(content) if type(content) is str else None  # tokens and display strings are of other types
    assert read == expected


@given(fields)
@example('"a";b=:AA=:')
@example('"a";b=:AAA==:')
@example('"a";b=:AAAA==:')
def test_fields_are_read_as_the_reference_parser_does(value: str) -> None:
    """A string with parameters, most of which are right."""
    agrees(value)


@given(mutated())
def test_mutated_fields_are_read_as_the_reference_parser_does(value: str) -> None:
    """Nearly a string with parameters."""
    agrees(value)


@given(st.text(PRINTABLE, min_size=1, max_size=MAX_KEY))
def test_every_printable_key_can_be_sent(key: str) -> None:
    """What a client's library of structured fields makes of a key comes back as the key."""
    assert parse(http_sf.ser(key)) == key


@given(st.text(st.characters(max_codepoint=0x2FF), max_size=300))
def test_any_text_is_a_key_or_malformed(value: str) -> None:
    """Nothing else is raised, and a key is 1 to 255 printable characters."""
    for strict in (True, False):
        try:
            key = parse(value, strict=strict)
        except MalformedKeyError:
            continue
        assert key is not None
        assert 1 <= len(key) <= MAX_KEY
        assert set(key) <= set(PRINTABLE)
