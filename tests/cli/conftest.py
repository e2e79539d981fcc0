"""A server with a key of each status."""

import pytest

from commandline import fill, store_do
from servers import Server


@pytest.fixture
def url(redis_url: str, server: Server) -> str:
    """A server with a key of each status under the prefix, and one of another prefix."""
    store_do(redis_url, fill)
    for words in (
        ("SET", "asyncidem:odd", "s3cret"),
        ("SET", "asyncidem:new", '{"owner": "x", "status": "PAUSED"}'),
        ("RPUSH", "asyncidem:list", "s3cret"),
        ("SET", "asyncidem:k:lock", "token", "PX", "10000"),
        ("SET", "else:where", "s3cret"),
    ):
        assert not server.command(*words).startswith("-")
    return redis_url
