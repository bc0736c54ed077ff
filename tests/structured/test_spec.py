"""Specs are checked for what can be seen by looking at them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from polybatch.errors import RequestError
from polybatch.structured.spec import MAX_SPEC_BYTES, StructuredSpec


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({}, "structured", "give one of"),
        ({"regex": "a", "choice": ["b"]}, "choice", "regex and choice"),
        ({"regex": ""}, "regex", "not empty"),
        ({"regex": "a{100000}"}, "regex", "10,000"),
        ({"regex": "a{2, 99999999999999999999}"}, "regex", "10,000"),
        ({"json_schema": {"properties": {"a": {"pattern": "x{0,20000}"}}}}, "json_schema", "10,000"),
        ({"json_schema": {"patternProperties": {"x{20000}": {}}}}, "json_schema", "10,000"),
        ({"json_schema": nested(100)}, "json_schema", "64 levels"),
        ({"json_schema": nested(50_000)}, "json_schema", "JSON"),
        ({"json_schema": "{"}, "json_schema", "not valid JSON"),
        ({"json_schema": "[1]"}, "json_schema", "must be an object"),
        ({"json_schema": {"enum": ["x" * MAX_SPEC_BYTES]}}, "json_schema", "limit is 262,144"),
        ({"choice": []}, "choice", "list of strings"),
        ({"choice": [""]}, "choice", "list of strings"),
        ({"choice": ["x"] * 5000}, "choice", "4,096"),
        ({"grammar": 3}, "grammar", "string"),
    ],
)
def test_limits_are_named(fields: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        StructuredSpec(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "spec",
    [
        StructuredSpec(json_schema={"type": "object", "title": "ü"}),
        StructuredSpec(regex="a+"),
        StructuredSpec(choice=["b", "c"]),
        StructuredSpec(grammar='start: "a"'),
    ],
)
def test_a_spec_travels_as_it_is_and_is_a_key(spec: StructuredSpec) -> None:
    data = msgspec.msgpack.encode(spec)
    assert msgspec.msgpack.decode(data, type=StructuredSpec) == spec
    assert len({spec, msgspec.msgpack.decode(data, type=StructuredSpec)}) == 1


def test_a_schema_is_the_same_as_text_and_as_an_object() -> None:
    assert StructuredSpec(json_schema='{"type": "null"}') == StructuredSpec(json_schema={"type": "null"})
