"""Tool calls in requests and answers: what runs calls, here or in a server, needs of this folder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from polybatch.engine.ports import TextTokenizer
from polybatch.errors import RequestError
from polybatch.jobs.schema import Call
from polybatch.jobs.tools.grammar import forced_calls
from polybatch.jobs.tools.parser import ToolParser
from polybatch.jobs.tools.scanner import Arguments, CallStart, Content, Event
from polybatch.jobs.tools.settings import ToolSettings
from polybatch.jobs.tools.styles import STYLES, ToolStyle, style_of

FINISH_REASON = "tool_calls"


def with_tools(call: Call, override: str | None, tokenizer: TextTokenizer | None) -> Call:
    """The call with the style in which it is answered, and its output held to its tools where that is asked.

    override: a style's name, None to go by the chat template. Raises RequestError for a model without tools.
    """
    settings = call.tools
    if settings is None:
        return call
    style = style_of(override, getattr(tokenizer, "chat_template", None))
    if style is None:
        raise RequestError(
            "tools are not supported by this model: its chat template has no place for them, or writes calls "
            f"in an unknown style; leave tools out, or give --tool-call-parser ({', '.join(STYLES)})",
            field="tools",
        )
    # Marks of calls may be special tokens, and have to be seen.
    params = replace(call.params, skip_special_tokens=False)
    if settings.forced:
        if params.structured is not None:
            raise RequestError(
                "tool_choice forces a call, and response_format another output: use one", field="tool_choice"
            )
        params = replace(params, structured=forced_calls(style, settings, tokenizer))
    return replace(call, params=params, tool_style=style)


def template_variables(call: Call) -> dict[str, Any]:
    """What the chat template is to know of tools."""
    return {} if call.tools is None else {"tools": call.tools.tools}


class ToolStream:
    """One completion's text to deltas of a chat message."""

    def __init__(self, style: ToolStyle, settings: ToolSettings) -> None:
        self._style, self._is_parallel = style, settings.is_parallel
        self._parser = ToolParser(style, settings.schemas)
        self.num_calls = 0

    def delta(self, text: str, is_last: bool) -> dict[str, Any]:
        """Content and calls that became certain; empty where nothing did."""
        events = self._parser.push(text)
        if is_last:
            events += self._parser.close()
        delta: dict[str, Any] = {}
        for event in events:
            self._add(event, delta)
        return delta

    def _add(self, event: Event, delta: dict[str, Any]) -> None:
        if isinstance(event, Content):
            delta["content"] = delta.get("content", "") + event.text
            return
        if isinstance(event, CallStart):
            self.num_calls += 1
        if self.num_calls > 1 and not self._is_parallel:
            return
        calls = delta.setdefault("tool_calls", [])
        index = self.num_calls - 1
        if isinstance(event, CallStart):
            function = {"name": event.name, "arguments": ""}
            calls.append(
                {"index": index, "id": self._style.make_id(), "type": "function", "function": function}
            )
        elif isinstance(event, Arguments):
            if not calls or calls[-1]["index"] != index:
                calls.append({"index": index, "function": {"arguments": ""}})
            calls[-1]["function"]["arguments"] += event.text


def tool_stream(call: Call) -> ToolStream | None:
    """A fresh one for a completion of a call whose answer may hold tool calls."""
    if call.tool_style is None or call.tools is None:
        return None
    return ToolStream(call.tool_style, call.tools)


def finish_reason(reason: str | None, stream: ToolStream | None) -> str | None:
    """A completion that ended by itself with calls in it waits for their results."""
    return FINISH_REASON if reason == "stop" and stream is not None and stream.num_calls else reason


def add_tool_calls(answer: dict[str, Any], call: Call) -> None:
    """Take the calls out of the messages of a whole answer."""
    for choice in answer["choices"]:
        stream = tool_stream(call)
        if stream is None:
            return
        message = choice["message"]
        delta = stream.delta(message["content"], is_last=True)
        calls = [{k: v for k, v in entry.items() if k != "index"} for entry in delta.get("tool_calls", ())]
        message["content"] = delta.get("content") or (None if calls else "")
        if calls:
            message["tool_calls"] = calls
        choice["finish_reason"] = finish_reason(choice["finish_reason"], stream)
