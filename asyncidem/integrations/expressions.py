"""JMESPath expressions that choose a part of an event, with the functions that Powertools for AWS Lambda adds.

jmespath is an extra: it is imported when the first expression is compiled.
"""

from __future__ import annotations

import base64
import functools
import gzip
import importlib
import json
from collections.abc import Callable
from typing import Any

from ..errors import ConfigurationError, InvalidKeyError

__all__ = ["evaluator"]


def evaluator(expression: str) -> Callable[[object], Any]:
    """Return a function of a value that returns the part of it which ``expression`` chooses; None if it has none.

    Compiled expressions are kept: asking again costs a look-up. JMESPath's own functions are there, and

    ================================  ================================================
    function of text                  returns
    ================================  ================================================
    ``powertools_json``               the value of its JSON
    ``powertools_base64``             the UTF-8 text that it encodes
    ``powertools_base64_gzip``        the UTF-8 text that it encodes, decompressed
    ================================  ================================================

    The function that is returned raises ``InvalidKeyError`` where the expression cannot be evaluated on a value (JSON
    that is none, a function of text on what is no text), and ``ConfigurationError`` where it can on no value: a
    function that does not exist, or takes another number of arguments.

    Raises:
        ConfigurationError: jmespath is missing, or ``expression`` is none.
    """
    if not isinstance(expression, str):  # pyright: ignore[reportUnnecessaryIsInstance] - callers without a type checker
        raise ConfigurationError(f"a JMESPath expression must be text, not {type(expression).__name__}")
    return _evaluator(expression)


@functools.lru_cache(maxsize=256)
def _evaluator(expression: str) -> Callable[[object], Any]:
    library = _library()
    try:
        search: Callable[..., Any] = library.compile(expression).search
    except (library.exceptions.JMESPathError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigurationError(f"{expression!r} is no JMESPath expression: {reason}") from None
    options = library.Options(custom_functions=_functions())

    def evaluate(value: object) -> Any:
        try:
            return search(value, options=options)
        except (library.exceptions.UnknownFunctionError, library.exceptions.ArityError) as error:
            raise ConfigurationError(f"the JMESPath expression {expression!r} can choose nothing: {error}") from None
        except library.exceptions.JMESPathTypeError as error:
            reason = f"{error.function_name}() was given a value of JSON's type {error.actual_type}"
        except Exception as error:  # noqa: BLE001 - the functions decode what clients sent: whatever it is, there is no value
            reason = f"it ends in {type(error).__name__}"
        # outside of "except": the error that is cut off holds parts of the value, which may be secret
        raise InvalidKeyError(f"the JMESPath expression {expression!r} cannot be evaluated on this value: {reason}")

    return evaluate


@functools.cache
def _library() -> Any:
    try:
        return importlib.import_module("jmespath")  # an extra: whoever does not use it need not have it
    except ImportError as error:
        raise ConfigurationError('JMESPath expressions need jmespath: pip install "asyncidem[jmespath]"') from error


@functools.cache
def _functions() -> Any:
    base: Any = _library().functions

    def from_json(_: object, text: str) -> Any:
        return json.loads(text)

    def from_base64(_: object, text: str) -> str:
        return base64.b64decode(text).decode()

    def from_base64_gzip(_: object, text: str) -> str:
        return gzip.decompress(base64.b64decode(text)).decode()

    of_text = base.signature({"types": ["string"]})
    # Its metaclass finds functions by their names.
    members = {
        "_func_powertools_json": of_text(from_json),
        "_func_powertools_base64": of_text(from_base64),
        "_func_powertools_base64_gzip": of_text(from_base64_gzip),
    }
    return type(base.Functions)("Functions", (base.Functions,), members)()
