"""How families of models write tool calls, told by their chat templates.

hermes        <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>       Qwen2.5, Qwen3, Hermes
llama3_json   {"name": ..., "parameters": {...}}, <|python_tag|> before it      Llama 3.1, 3.2, 3.3
mistral       [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]              Mistral, Nemo, Ministral
              [TOOL_CALLS]name[ARGS]{...}                                       newer ones
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from polybatch.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """start, end: marks around calls, which may be special tokens. separators: characters between calls.

    is_bare: a call may begin the output without a mark. argument_key: of a call's object. Of an output that
    has to be a call, opening, separator and closing stand around and between the calls, at most max_calls.
    has_named_calls: a name may stand in front of its arguments, before [ARGS].
    """

    name: str
    start: str
    end: str
    separators: str
    is_bare: bool
    argument_key: str
    opening: str
    separator: str
    closing: str
    max_calls: int
    has_named_calls: bool
    make_id: Callable[[], str]


def _openai_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _mistral_id() -> str:
    """Nine letters and digits, which their templates insist on."""
    return "".join(random.SystemRandom().choices(string.ascii_letters + string.digits, k=9))


MAX_CALLS = 16

STYLES = {
    style.name: style
    for style in (
        ToolStyle(
            "hermes", "<tool_call>", "</tool_call>", " \n\r\t", False, "arguments",
            "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", MAX_CALLS, False, _openai_id,
        ),
        ToolStyle(
            "llama3_json", "<|python_tag|>", "", " \n\r\t;,", True, "parameters",
            "", "; ", "", 1, False, _openai_id,
        ),
        ToolStyle(
            "mistral", "[TOOL_CALLS]", "", " \n\r\t[,]", False, "arguments",
            "[TOOL_CALLS][", ", ", "]", MAX_CALLS, True, _mistral_id,
        ),
    )
}  # fmt: skip


def style_of(override: str | None, chat_template: str | None) -> ToolStyle | None:
    """The style that is asked for, else that of the template; None for a model without tools."""
    if override is not None:
        check_style(override)
        return STYLES[override]
    template = chat_template or ""
    if "tools" not in template or "<function=" in template:
        return None
    for name, mark in (("mistral", "[TOOL_CALLS]"), ("hermes", "<tool_call>")):
        if mark in template:
            return STYLES[name]
    is_llama = "<|start_header_id|>" in template and (
        '"parameters"' in template or "<|python_tag|>" in template
    )
    return STYLES["llama3_json"] if is_llama else None


def check_style(name: str) -> None:
    """Raises ConfigError for a style that there is not."""
    if name not in STYLES:
        raise ConfigError(f"tool_call_parser is {name!r}; it must be one of {', '.join(STYLES)}")
