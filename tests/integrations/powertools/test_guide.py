"""The guide for those who come from Powertools leaves out nothing that it has."""

import inspect
import re
from pathlib import Path

import pytest

from powertools import cache, exceptions, utility

GUIDE = Path(__file__).parents[3] / "examples" / "powertools" / "README.md"
FIRST_CELLS = " ".join(re.findall(r"^\| ([^|]*) \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE))
CLASSES = {*utility.__all__, *cache.__all__, "PydanticSerializer", "DataclassSerializer", "CustomDictSerializer"}
ERRORS = {name for name in vars(exceptions) if name.startswith("Idempotency") and name.endswith("Error")}
PARAMETERS = {
    name
    for fn in (utility.IdempotencyConfig.__init__, cache.CachePersistenceLayer.__init__, utility.idempotent_function)
    for name in inspect.signature(fn).parameters
} - {"self", "function", "kwargs"}


@pytest.mark.parametrize("name", sorted(CLASSES | ERRORS | PARAMETERS))
def test_every_name_is_in_a_table(name: str) -> None:
    """Each class, option and error of theirs stands in the first column of a table."""
    assert re.search(rf"`{name}(=[^`]*)?`", FIRST_CELLS)


def test_they_are_found() -> None:
    """What is looked for is what they have."""
    assert len(ERRORS) >= 13
    assert {"event_key_jmespath", "db_index", "data_keyword_argument"} <= PARAMETERS
    assert {"BasePersistenceLayer", "DynamoDBPersistenceLayer", "CachePersistenceLayer", "idempotent"} <= CLASSES
