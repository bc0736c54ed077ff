"""Messages about tool calls: an assistant's calls and the results that tools gave."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from polybatch.errors import RequestError

MAX_CALLS = 128


def tool_fields(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`tool_calls` and `tool_call_id` of a message as chat templates take them: arguments as objects.

    Raises RequestError that names the field.
    """
    fields: dict[str, Any] = {}
    role = message.get("role")
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if role != "assistant" or not isinstance(calls, list) or not 0 < len(calls) <= MAX_CALLS:
            raise RequestError(
                f"{where}.tool_calls must be a list of 1 to {MAX_CALLS} calls in an assistant's message",
                field=f"{where}.tool_calls",
            )
        fields["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    if "tool_call_id" in message:
        value = message["tool_call_id"]
        if role != "tool" or not isinstance(value, str):
            raise RequestError(
                f"{where}.tool_call_id must be a string in a tool's message", field=f"{where}.tool_call_id"
            )
        fields["tool_call_id"] = value
    return fields


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if function is None or not isinstance(name, str) or not isinstance(call.get("id", ""), str):
        raise RequestError(
            f'{where} is {str(call)[:80]}; it must be {{"id": ..., "type": "function", "function": {{...}}}}',
            field=where,
        )
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            # A model's own mistake, sent back to it.
            arguments = {"arguments": arguments}
    result = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return ({"id": call["id"]} if "id" in call else {}) | result
