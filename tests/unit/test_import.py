"""Import: `import asyncidem` brings in nothing that its user may not want."""

import json
import subprocess
import sys

import pytest

HEAVY = {
    "aiohttp",
    "anyio",
    "aws_lambda_powertools",
    "click",
    "django",
    "fastapi",
    "fakeredis",
    "flask",
    "opentelemetry",
    "pydantic",
    "pydantic_core",
    "redis",
    "hiredis",
    "rich",
    "starlette",
    "typing_extensions",
}


USED = """
import asyncio, asyncidem
@asyncidem.Idempotency(asyncidem.MemoryStore()).idempotent
async def handler() -> None: ...
asyncio.run(handler())
"""


def loaded(code: str) -> set[str]:
    """Return the top-level modules that are there after `code` ran in an interpreter of its own."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    assert run.stderr == ""
    names: list[str] = json.loads(run.stdout)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    "code",
    [
        "import asyncidem",
        "from asyncidem import Idempotency, MemoryStore, JSONCodec, current_operation, StoreError",
        "import asyncidem; asyncidem.Idempotency(asyncidem.MemoryStore())",
        "import asyncidem; asyncidem.PydanticCodec; dir(asyncidem)",
        USED,
    ],
)
def test_the_package_is_light(code: str) -> None:
    """Neither the import nor work in memory loads a framework, pydantic, redis or anyio."""
    modules = loaded(code)
    assert "asyncidem" in modules
    assert modules & HEAVY == set()


@pytest.mark.parametrize("name", ["RedisStore", "RedisClientProtocol"])
def test_redis_is_loaded_late_and_alone(name: str) -> None:
    """What needs redis-py loads it when it is touched, and neither pydantic nor a framework."""
    alone = loaded("import redis.asyncio") & HEAVY
    assert loaded(f"import asyncidem; asyncidem.{name}") & HEAVY <= alone | {"redis", "hiredis"}
    if name == "RedisStore":
        assert "redis" in loaded("import asyncidem; asyncidem.RedisStore")


def test_lambda_loads_what_is_used() -> None:
    """A cold start pays for the entry point and keys; for batches and HTTP when they are asked for, and never for AWS."""
    lean = loaded("from asyncidem.integrations.aws_lambda import lambda_handler, event_key, jmespath_key")
    assert lean & (HEAVY | {"jmespath", "boto3"}) == set()
    batches = loaded("from asyncidem.integrations.aws_lambda import process_sqs, BatchResponse")
    assert batches & (HEAVY | {"jmespath", "boto3"}) == set()
    assert "anyio" in loaded("from asyncidem.integrations.aws_lambda import idempotent_api, HTTPFailure")


def test_lambda_has_the_names_that_it_says() -> None:
    """Those that are imported late too, and no others."""
    from asyncidem.integrations import aws_lambda

    assert dir(aws_lambda) == sorted(aws_lambda.__all__)
    for name in aws_lambda.__all__:
        assert getattr(aws_lambda, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = aws_lambda.nothing


def test_pydantic_is_loaded_by_its_codec() -> None:
    """Making a PydanticCodec is what loads pydantic."""
    assert "pydantic" in loaded("import asyncidem; asyncidem.PydanticCodec()")
