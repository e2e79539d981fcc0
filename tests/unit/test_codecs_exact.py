"""How the JSON codecs see, level by level and without a look at each part, whether a result is plain JSON."""

import gc
import json
from typing import Any

import pytest

from asyncidem import JSONCodec, codecs
from asyncidem.errors import CodecError


class Thing:
    """An object whose attributes are the result."""


class Text(str):
    """Text that would come back as ``str``."""

    __slots__ = ()


def attributes(**values: Any) -> dict[str, Any]:
    """Return the ``__dict__`` of an object that is kept alive by it."""
    thing = Thing()
    KEPT.append(thing)
    for name, value in values.items():
        setattr(thing, name, value)
    return vars(thing)


KEPT: list[Thing] = []


@pytest.mark.parametrize(
    "value",
    [attributes(a=1, b="x"), [attributes(a=[1.5, None])], {"a": attributes(b={"c": [True, {}]}), "d": [], "e": [[]]}],
)
def test_attributes_of_objects_are_plain_json(value: Any) -> None:
    """The ``__dict__`` of an object is stored like any other dict."""
    assert json.loads(JSONCodec().encode(value)) == value


@pytest.mark.parametrize("codec", [codecs.JSONCodec, codecs.MsgspecCodec])
@pytest.mark.parametrize(
    "value",
    [
        attributes(a=(1, 2)),
        {"a": attributes(b=Text("x"))},
        # What an object's attributes hide from the collector, the keys of the dict beside it would make up for.
        [attributes(a=(1, 2)), {"k": 0, 1: "x"}, attributes(b=0)],
        [attributes(a=(1, 2)), {1: "x"}],
        [attributes(), {None: "x"}],
        [[1], {"a": {Text("k"): 1}}],
        [{"a": [(1,)]}],
        {"a": {"b": {1.5: 2}}},
    ],
)
def test_what_json_would_change_is_refused_at_any_depth(codec: type[codecs.Codec], value: Any) -> None:
    """Tuples, keys that are no text and subclasses are refused, wherever they are and whatever hides them."""
    with pytest.raises(CodecError):
        codec().encode(value)


@pytest.mark.parametrize("gives", [None, lambda *_: [], lambda *many: [one for part in many for one in part]])
def test_another_collector_is_not_relied_on(monkeypatch: pytest.MonkeyPatch, gives: Any) -> None:
    """Where the collector does not tell what is in a dict, each part is looked at, and the same is refused."""
    if gives is None:
        monkeypatch.delattr(gc, "get_referents")
    else:
        monkeypatch.setattr(gc, "get_referents", gives)
    assert not codecs._referents_tell()
    monkeypatch.setattr(codecs, "_REFERENTS_TELL", False)
    assert JSONCodec().encode({"a": [1, {"b": None}]}) == '{"a": [1, {"b": null}]}'
    with pytest.raises(CodecError, match="tuple"):
        JSONCodec().encode({"a": [(1, 2)]})
