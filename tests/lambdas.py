"""Functions under AWS's own runtime client, in processes of their own: the local Lambda of the examples."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

__all__ = ["LOCAL", "function", "local_lambda", "require_runtime"]

LOCAL = Path(__file__).parent.parent / "examples" / "lambda" / "local_lambda.py"
FUNCTIONS = Path(__file__).parent / "integrations" / "aws_lambda"


def require_runtime() -> None:
    """Skip the test where the runtime client is missing; continuous integration has it, for it comes from PyPI."""
    if importlib.util.find_spec("awslambdaric") is not None:
        return
    reason = "awslambdaric is not installed"
    if os.environ.get("CI") == "true" and sys.platform == "linux":
        pytest.fail(f"{reason}, and CI=true")
    pytest.skip(reason)


def local_lambda() -> Any:
    """Return the module of the local Lambda."""
    spec = importlib.util.spec_from_file_location("local_lambda", LOCAL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def function(handler: str, url: str, *, env: dict[str, str] | None = None, **options: Any) -> Any:
    """Return one of the functions of the tests, over the server at `url`."""
    require_runtime()
    return local_lambda().LocalLambda(
        f"functions.{handler}", FUNCTIONS, env={"REDIS_URL": url, **(env or {})}, **options
    )
