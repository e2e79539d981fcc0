"""What the OpenAPI document says of guarded operations, and of them only."""

from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Header
from hypothesis import given
from hypothesis import strategies as st

from asyncidem.integrations.fields import parse_key
from asyncidem.integrations.openapi import PATTERN, STRING

from shop_app import Payment, Till

PROBLEMS = {"400", "403", "409", "413", "422", "503"}
PROBLEM = "application/problem+json"


def application(**options: Any) -> FastAPI:
    """Return an application with guarded and open operations."""
    till = Till()
    app = FastAPI()
    guard = till.guard(app, **options)
    router = APIRouter(prefix="/r", dependencies=[Depends(guard)])

    @router.post("/{item}", responses={503: {"description": "mine", "content": {"text/plain": {}}}})
    @router.get("/{item}")
    async def item(item: str) -> None:
        raise NotImplementedError

    @router.post("/hidden", include_in_schema=False)
    async def hidden() -> None:
        raise NotImplementedError

    app.include_router(router, prefix="/a")

    @app.post("/open")
    async def unguarded(payment: Payment) -> None:
        raise NotImplementedError

    async def nested(op: Annotated[Any, Depends(guard)]) -> None:
        raise NotImplementedError

    @app.post("/nested", dependencies=[Depends(nested)])
    async def behind_another() -> None:
        raise NotImplementedError

    @app.patch("/pay", dependencies=[Depends(guard)])
    async def pay(payment: Payment, idempotency_key: Annotated[str | None, Header()] = None) -> None:
        raise NotImplementedError

    return app


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_guarded_operations_show_the_header_and_its_problems(required: bool, strict: bool) -> None:
    """With whether it is required and what it may be; the schema of a problem is there once."""
    document = application(required=required, strict=strict).openapi()
    operation = document["paths"]["/a/r/{item}"]["post"]
    (header,) = [one for one in operation["parameters"] if one["in"] == "header"]
    assert (header["name"], header["required"]) == ("Idempotency-Key", required)
    assert header["schema"] == {"type": "string", "pattern": f"^{STRING}$" if strict else PATTERN}
    assert document["paths"]["/nested"]["post"]["parameters"] == operation["parameters"][1:]
    for status in PROBLEMS:
        response = operation["responses"][status]
        assert response["content"][PROBLEM]["schema"] == {"$ref": "#/components/schemas/IdempotencyProblem"}
        assert response["description"]
        assert ("Retry-After" in response.get("headers", {})) is (status in ("409", "503"))
    assert document["components"]["schemas"]["IdempotencyProblem"]["required"] == ["type", "title", "status", "detail"]


def test_what_is_there_already_stays() -> None:
    """A header that the endpoint declares itself, its own answers, and FastAPI's 422."""
    app = application()
    document = app.openapi()
    responses = document["paths"]["/a/r/{item}"]["post"]["responses"]
    assert responses["503"]["description"] == "mine"
    assert set(responses["503"]["content"]) == {"text/plain", PROBLEM}
    assert set(responses["422"]["content"]) == {"application/json", PROBLEM}
    pay = document["paths"]["/pay"]["patch"]
    assert [one["name"].lower() for one in pay["parameters"]] == ["idempotency-key"]
    assert app.openapi() is document


def test_open_operations_are_as_they_were() -> None:
    """Other methods of a guarded path, and paths without a guard; what is hidden stays hidden."""
    document = application().openapi()
    for operation in (document["paths"]["/a/r/{item}"]["get"], document["paths"]["/open"]["post"]):
        assert not [one for one in operation.get("parameters", []) if one["in"] == "header"]
        assert not (PROBLEMS - {"422"}) & set(operation["responses"])
        assert PROBLEM not in operation["responses"]["422"]["content"]
    assert "/a/r/hidden" not in document["paths"]


def test_a_document_that_is_made_anew_is_described_anew() -> None:
    """As FastAPI does for routes that are added, and whoever empties its cache."""
    app = application()
    app.openapi()
    app.openapi_schema = None
    assert "409" in app.openapi()["paths"]["/pay"]["patch"]["responses"]


@given(st.from_regex(PATTERN.replace("$", r"\Z")))
def test_keys_of_the_pattern_are_keys(value: str) -> None:
    """What the document allows is not malformed."""
    assert parse_key([value], strict=False)
