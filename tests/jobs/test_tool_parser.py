"""Calls are read the same however their text is cut, and what is none stays text."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.errors import ConfigError, RequestError
from polybatch.jobs.tools.answer import ToolStream
from polybatch.jobs.tools.grammar import forced_calls
from polybatch.jobs.tools.parser import ToolParser
from polybatch.jobs.tools.scanner import Arguments, CallStart, Content
from polybatch.jobs.tools.settings import ToolSettings, take_tools
from polybatch.jobs.tools.styles import STYLES, check_style, style_of
from polybatch.models.loader import load_model
from polybatch.structured.grammar import GrammarCompiler, fill_masks
from polybatch.structured.vocabulary import vocabulary_of

NAMES = {"get_weather", "add"}
WEATHER = '{"city": "Paris }\\" {", "days": [1, {"x": null}]}'


def read(style: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls of an output."""
    parser = ToolParser(STYLES[style], NAMES)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.close()
    content, calls = "", []
    for event in events:
        match event:
            case Content(text):
                content += text
            case CallStart(name):
                calls.append((name, ""))
            case Arguments(text):
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return content, calls


ONE = [("get_weather", WEATHER)]
TWO = [*ONE, ("add", '{"a": 1}')]
CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>', "", ONE),
    (
        "hermes",
        f'Let me see.\n<tool_call>{{"name": "get_weather", "arguments": {WEATHER}}}</tool_call>\n'
        '<tool_call>\n{"arguments": {"a": 1}, "name": "add"}\n</tool_call>\n',
        "Let me see.",
        TWO,
    ),
    ("hermes", '<tool_call>{"name": "add"}</tool_call> done', "done", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}', "", [("add", '{"a": 1}')]),
    ("hermes", "1 < 2 <tool and\n\nmore\n", "1 < 2 <tool and\n\nmore\n", []),
    ("hermes", '<tool_call>{"name": "evil"}</tool_call>', '<tool_call>{"name": "evil"}</tool_call>', []),
    ("hermes", "<tool_call>what?</tool_call>", "<tool_call>what?</tool_call>", []),
    ("hermes", '<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
    ("llama3_json", f'{{"name": "get_weather", "parameters": {WEATHER}}}', "", ONE),
    (
        "llama3_json",
        f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {WEATHER}}}; '
        '{"name": "add", "parameters": {"a": 1}}',
        "",
        TWO,
    ),
    ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("llama3_json", ' Hello {"name": "add"}', ' Hello {"name": "add"}', []),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {WEATHER}}}, {{"name": "add", "arguments": '
        '{"a": 1}}]',
        "",
        TWO,
    ),
    ("mistral", f'[TOOL_CALLS]get_weather[ARGS]{WEATHER}[TOOL_CALLS]add[ARGS]{{"a": 1}}', "", TWO),
    ("mistral", f"Well [TOOL_CALLS]get_weather{WEATHER}", "Well ", ONE),
    ("mistral", "[TOOL_CALLS]evil[ARGS]{}", "[TOOL_CALLS]evil[ARGS]{}", []),
    ("mistral", "[TOOL] [1, 2]", "[TOOL] [1, 2]", []),
]


@pytest.mark.parametrize(("style", "text", "content", "calls"), CASES)
def test_calls_are_told_from_text(style: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(style, [text]) == (content, calls)
    assert read(style, list(text)) == (content, calls)


@settings(max_examples=60, deadline=None)
@given(case=st.sampled_from(CASES), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_where_an_output_is_cut_changes_nothing(case: tuple[str, str, str, Any], cuts: list[int]) -> None:
    style, text, content, calls = case
    marks = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(marks)]
    assert read(style, pieces) == (content, calls)


@settings(max_examples=100, deadline=None)
@given(style=st.sampled_from(sorted(STYLES)), pieces=st.lists(
    st.sampled_from(["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "{", "}", "[",
                     "]", '"name"', ":", '"add"', "add", '"arguments"', ",", "\n", " ", "\\", '"', "x", "1"]),
    max_size=14))  # fmt: skip
def test_no_output_breaks_the_parser_nor_depends_on_its_cuts(style: str, pieces: list[str]) -> None:
    assert read(style, pieces) == read(style, list("".join(pieces)))


def test_the_name_comes_before_the_arguments_and_both_as_they_arrive() -> None:
    stream = ToolStream(STYLES["hermes"], ToolSettings([], {"add": {}}))
    assert stream.delta('<tool_call>{"name": "add"', False)["tool_calls"][0]["function"]["name"] == "add"
    assert stream.delta(', "arguments": {"a": ', False) == {
        "tool_calls": [{"index": 0, "function": {"arguments": '{"a": '}}]
    }
    assert stream.delta("1", False) == {"tool_calls": [{"index": 0, "function": {"arguments": "1"}}]}


def test_without_parallel_calls_only_the_first_counts() -> None:
    text = "".join(f'<tool_call>{{"name": "add", "arguments": {{"a": {i}}}}}</tool_call>' for i in range(3))
    stream = ToolStream(STYLES["hermes"], ToolSettings([], {"add": {}}, is_parallel=False))
    (call,) = stream.delta(text, True)["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": 0}


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{% if tools %}<tool_call>{{ tools }}{% endif %}", "hermes"),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", "mistral"),
        ('{{ tools }}<|start_header_id|>{"name": x, "parameters": y}', "llama3_json"),
        ("{{ tools }}<tool_call><function=name>", None),
        ("{{ messages }}<tool_call>", None),
        ("{{ tools }}", None),
        (None, None),
    ],
)
def test_styles_are_told_by_templates(template: str | None, style: str | None) -> None:
    found = style_of(None, template)
    assert (found and found.name) == style


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ConfigError, match="hermes, llama3_json, mistral"):
        check_style("own")


TOOL = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
         "tools[0].function.parameters"),
        ({"tools": [TOOL, TOOL]}, "tools[1]"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
)  # fmt: skip
def test_malformed_tools_are_refused_by_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        take_tools(dict(fields))
    assert caught.value.field == field


def test_tool_choice_says_what_has_to_be_called() -> None:
    def forced(**fields: Any) -> Any:
        settings = take_tools({"tools": [TOOL], **fields})
        return settings and (settings.forced, settings.is_parallel)

    assert forced() == forced(tool_choice="auto") == ((), True)
    assert forced(tool_choice="none") is None
    assert forced(tool_choice="required") == (("add",), True)
    assert forced(tool_choice={"type": "function", "function": {"name": "add"}}) == (("add",), False)
    assert forced(parallel_tool_calls=False) == ((), False)


@pytest.mark.parametrize("mark", ["<|im_start|>", "<mark>"])
def test_a_forced_call_begins_with_its_mark_be_it_a_token_or_text(real_model: Path, mark: str) -> None:
    loaded = load_model(str(real_model))
    spec = loaded.spec
    compiler = GrammarCompiler(lambda: vocabulary_of(loaded.tokenizer, spec.vocab_size, spec.eos_token_ids))
    style = replace(STYLES["mistral"], start=mark, opening=f"{mark}[")
    settings = ToolSettings([], {"add": {"type": "object"}}, ("add",))
    matcher = compiler.compile(forced_calls(style, settings, loaded.tokenizer)).matcher()
    masks = np.zeros((1, -(-spec.vocab_size // 32)), dtype=np.int32)
    fill_masks([matcher], masks)
    allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little"))
    texts = {loaded.tokenizer.token_text(token) for token in allowed.tolist()}
    assert texts
    assert all(mark.startswith(text) for text in texts)
    assert (texts == {mark}) == (mark == "<|im_start|>")
