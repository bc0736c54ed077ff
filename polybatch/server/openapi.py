"""What the OpenAPI document says of bodies that routes decode themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec


def json_body(required: Sequence[str]) -> dict[str, Any]:
    """An object of which only the required fields are spelled out."""
    schema = {"type": "object", "required": list(required), "properties": {name: {} for name in required}}
    return _body(schema)


def struct_body(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The fields of a struct."""
    (schema,), components = msgspec.json.schema_components((kind,))
    return _body(components.get(kind.__name__, schema))


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
