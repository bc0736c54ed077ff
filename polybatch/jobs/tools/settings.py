"""`tools`, `tool_choice` and `parallel_tool_calls` of a chat body, checked.

Source: OpenAI's API reference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polybatch.errors import RequestError

MAX_TOOLS = 128
TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolSettings:
    """tools: as sent, for the chat template. schemas: function's name -> JSON schema of its arguments.

    forced: names of which one must be called; empty where the model may choose. is_parallel: whether it may
    make several calls.
    """

    tools: list[dict[str, Any]]
    schemas: dict[str, dict[str, Any]]
    forced: tuple[str, ...] = ()
    is_parallel: bool = True


def take_tools(fields: dict[str, Any]) -> ToolSettings | None:
    """Take the fields of tools out of a body; None where no tool may be called.

    Raises RequestError that names the field.
    """
    tools, choice, parallel = (fields.pop(name, None) for name in TOOL_FIELDS)
    if parallel is not None and not isinstance(parallel, bool):
        raise _bad("parallel_tool_calls", parallel, "true or false")
    if tools is None or tools == []:
        if choice not in (None, "none", "auto"):
            raise _bad("tool_choice", choice, "none or auto where there are no tools")
        return None
    if not isinstance(tools, list):
        raise _bad("tools", tools, "a list")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)} entries; the limit is {MAX_TOOLS}", field="tools")
    schemas: dict[str, dict[str, Any]] = {}
    for index, tool in enumerate(tools):
        name, schema = _function(tool, f"tools[{index}]")
        if name in schemas:
            raise RequestError(f"tools has {name!r} twice: choose another name", field=f"tools[{index}]")
        schemas[name] = schema
    forced = _forced(choice, schemas)
    if choice == "none":
        return None
    is_parallel = parallel is not False and (choice is None or isinstance(choice, str))
    return ToolSettings(tools, schemas, forced, is_parallel)


def _function(tool: Any, where: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise _bad(where, tool, '{"type": "function", "function": {...}}')
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise _bad(f"{where}.function", function, "an object with a name")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _bad(f"{where}.function.name", name, "1 to 64 letters, digits or _.-")
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise _bad(f"{where}.function.description", description, "a string")
    schema = function.get("parameters")
    if schema is None:
        # No parameters are an empty list of them.
        schema = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(schema, dict):
        raise _bad(f"{where}.function.parameters", schema, "a JSON schema")
    return name, schema


def _forced(choice: Any, schemas: Mapping[str, Any]) -> tuple[str, ...]:
    if choice in (None, "auto", "none"):
        return ()
    if choice == "required":
        return tuple(schemas)
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name is None:
        raise _bad(
            "tool_choice", choice, 'none, auto, required or {"type": "function", "function": {"name": ...}}'
        )
    if name not in schemas:
        raise RequestError(
            f"tool_choice names {str(name)[:80]!r}, which is not among the tools", field="tool_choice"
        )
    return (name,)


def _bad(field: str, value: object, wanted: str) -> RequestError:
    return RequestError(f"{field} is {str(value)[:80]!r}; it must be {wanted}", field=field)
