"""A grammar of outputs that have to be tool calls, built from the schemas of the tools."""

from __future__ import annotations

import json
from typing import Any

from polybatch.jobs.tools.settings import ToolSettings
from polybatch.jobs.tools.styles import ToolStyle
from polybatch.structured.grammar import WHITESPACE
from polybatch.structured.spec import StructuredSpec


def forced_calls(style: ToolStyle, settings: ToolSettings, tokenizer: Any) -> StructuredSpec:
    """One call of the forced functions, or several where that is allowed, as the style writes them.

    Raises RequestError for schemas that are too large.
    """
    max_calls = style.max_calls if settings.is_parallel else 1
    more = f" (separator call){{0,{max_calls - 1}}}" if max_calls > 1 else ""
    opening, closing = (_literal(text, style, tokenizer) for text in (style.opening, style.closing))
    rules = [
        f"start: {opening} call{more} {closing}",
        "call: " + " | ".join(f"call_{index}" for index in range(len(settings.forced))),
    ]
    if more:
        rules.append(f"separator: {_literal(style.separator, style, tokenizer)}")
    for index, name in enumerate(settings.forced):
        head = json.dumps(f'{{"name": {json.dumps(name)}, "{style.argument_key}": ')
        rules.append(f'call_{index}: {head} %json {_schema(settings.schemas[name])} "}}"')
    # Checked as a schema too, for its depth and the counts of its patterns.
    for name in settings.forced:
        StructuredSpec(json_schema=settings.schemas[name])
    return StructuredSpec(grammar="\n".join(rules))


def _schema(schema: dict[str, Any]) -> str:
    options = {"whitespace_pattern": WHITESPACE, "whitespace_flexible": True}
    return json.dumps(schema | {"x-guidance": options})


def _literal(text: str, style: ToolStyle, tokenizer: Any) -> str:
    """Text in Lark; a mark that is a special token is named by its id, because no text spells it."""
    if text.startswith(style.start):
        token = special_id(style.start, tokenizer)
        if token is not None:
            rest = text.removeprefix(style.start)
            return f"<[{token}]> {json.dumps(rest)}" if rest else f"<[{token}]>"
    return json.dumps(text) if text else ""


def special_id(text: str, tokenizer: Any) -> int | None:
    """The special token of that text, if it is one."""
    backend = getattr(tokenizer, "backend", None)
    token: int | None = None if backend is None else backend.token_to_id(text)
    return token if token is not None and token in tokenizer.all_special_ids else None
