"""JMESPath expressions: what they choose, and what their errors say and do not say."""

import base64
import gzip
import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncidem import ConfigurationError, InvalidKeyError
from asyncidem.integrations.expressions import evaluator

BODY = json.dumps({"order_id": "42", "é": [1, 2]})


def encoded(text: str, *, zipped: bool = False) -> str:
    """Return text in Base64, as events hold it."""
    data = text.encode()
    return base64.b64encode(gzip.compress(data, mtime=0) if zipped else data).decode()


@pytest.mark.parametrize(
    ("expression", "chosen"),
    [
        ("body", BODY),
        ("powertools_json(body).order_id", "42"),
        ("powertools_json(body).[order_id, nothing]", ["42", None]),
        ('powertools_json(powertools_base64(encoded))."é"[1]', 2),
        ("powertools_json(powertools_base64_gzip(zipped)).order_id", "42"),
        ("records[*].powertools_json(body).id", [1, 2]),
        ("length(records)", 2),
        ("nothing", None),
        ("nothing.more", None),
    ],
)
def test_what_is_chosen(expression: str, chosen: Any) -> None:
    """JMESPath's functions and the three for encoded text choose parts of an event."""
    event = {
        "body": BODY,
        "encoded": encoded(BODY),
        "zipped": encoded(BODY, zipped=True),
        "records": [{"body": '{"id": 1}'}, {"body": '{"id": 2}'}],
    }
    assert evaluator(expression)(event) == chosen


def test_a_compiled_expression_is_kept() -> None:
    """Asking for the same expression again compiles nothing."""
    assert evaluator("a.b.c") is evaluator("a.b.c")


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("", "'' is no JMESPath expression: .*empty"),
        ("a[", r"'a\[' is no JMESPath expression: Invalid jmespath expression"),
        ("'a", "Unclosed ' delimiter"),
        ("a ~ b", "'a ~ b' is no JMESPath"),
        ("(" * 5_000, "is no JMESPath expression"),
        (None, "must be text, not NoneType"),
        (b"a", "must be text, not bytes"),
    ],
    ids=lambda value: None if value is None else str(value)[:30],
)
def test_no_expressions(expression: Any, reason: str) -> None:
    """What is no expression is refused before there is a value."""
    with pytest.raises(ConfigurationError, match=reason) as refused:
        evaluator(expression)
    assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # jmespath's, of literals that are no JSON
@given(st.text(alphabet="ab.[]()*@|&`'\"\\{}:,?!=<>1-#", max_size=12) | st.text(max_size=8))
def test_any_text_compiles_or_is_refused(expression: str) -> None:
    """No text ends in another error, compiled or evaluated."""
    try:
        evaluate = evaluator(expression)
        evaluate({"a": [{"b": "secret"}], "b": None})
    except (ConfigurationError, InvalidKeyError) as error:
        assert "secret" not in str(error) or "secret" in expression  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize(
    ("expression", "reason"),
    [("powertools_jsn(body)", r"Unknown function: powertools_jsn\(\)"), ("powertools_json(body, body)", "1 argument")],
)
def test_functions_that_no_value_has(expression: str, reason: str) -> None:
    """A function that does not exist, or is called wrongly, is a mistake of the expression, whatever the value."""
    with pytest.raises(ConfigurationError, match=reason):
        evaluator(expression)({"body": "secret"})


@pytest.mark.parametrize(
    ("expression", "body", "reason"),
    [
        ("powertools_json(body)", None, r"powertools_json\(\) was given a value of JSON's type null"),
        ("powertools_json(body)", {"secret": 1}, "type object"),
        ("powertools_json(body)", "secret", "ends in JSONDecodeError"),
        ("powertools_json(body)", "[" * 100_000, "ends in RecursionError"),
        ("powertools_base64(body)", "secret!", "ends in "),
        ("powertools_base64(body)", base64.b64encode(b"\xffsecret").decode(), "ends in UnicodeDecodeError"),
        ("powertools_base64_gzip(body)", encoded("secret"), "ends in BadGzipFile"),
        ("powertools_base64_gzip(body)", encoded("secret", zipped=True)[:24], "ends in EOFError"),
        ("sum(body)", ["secret"], r"sum\(\) was given"),
    ],
)
def test_values_that_an_expression_does_not_take(expression: str, body: Any, reason: str) -> None:
    """An error names the expression and what went wrong, and nothing of the value, in its causes neither."""
    with pytest.raises(InvalidKeyError, match=reason) as refused:
        evaluator(expression)({"body": body})
    assert repr(expression) in str(refused.value)
    assert "secret" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None


WITHOUT = """
import sys
sys.modules["jmespath"] = None
from asyncidem.integrations.powertools import powertools_key
assert powertools_key("abc", key_prefix="p").startswith("p#")
powertools_key({"a": 1}, key_prefix="p", jmespath="a")
"""


def test_a_missing_extra_says_what_to_install() -> None:
    """Without jmespath keys of whole payloads are made, and an expression is an error that names the remedy."""
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False, timeout=50)
    assert 'ConfigurationError: JMESPath expressions need jmespath: pip install "asyncidem[jmespath]"' in run.stderr


def test_jmespath_is_loaded_late() -> None:
    """Neither importing the integration nor a key of a whole payload loads jmespath."""
    assert importlib.util.find_spec("jmespath") is not None
    code = (
        "import sys; from asyncidem.integrations.powertools import powertools_key; powertools_key(1, key_prefix='p'); "
        "print(sorted({'jmespath', 'redis', 'aws_lambda_powertools'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert run.stdout == "[]\n"
