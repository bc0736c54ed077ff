"""The official client gets tool calls and structured answers, from a stub that says what its prompt asks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pydantic
import pytest
from server_helpers import RunningServer, events

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"City": {"type": "string", "maxLength": 20}},
        },
    },
}
ADD = {"type": "function", "function": {"name": "add"}}
ARGUMENTS = '{"city": "Pa\\"ris", "days": 3}'
TWO_CALLS = {
    "hermes": f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>',
    "mistral": f'Let me see.[TOOL_CALLS][{{"name": "get_weather", "arguments": {ARGUMENTS}}}, '
    '{"name": "add", "arguments": {}}]',
    "llama3_json": f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}; '
    '{"name": "add", "parameters": {}}',
}


@pytest.fixture(scope="module", params=sorted(TWO_CALLS))
def scripted(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    config = {"tool_call_parser": request.param}
    with RunningServer("stub:script=1", config=config, max_model_len=4000) as server:
        server.style = request.param  # type: ignore[attr-defined]
        yield server


def says(text: str) -> list[dict[str, Any]]:
    """A conversation that the stub answers with a text."""
    return [{"role": "user", "content": f"\2{text}\3"}]


def ask(server: RunningServer, text: str, **fields: Any) -> Any:
    return server.openai.chat.completions.create(model="base", messages=says(text), **fields)  # type: ignore[call-overload]


def test_calls_are_parsed_whole_and_streamed_alike(scripted: RunningServer) -> None:
    script = TWO_CALLS[scripted.style]  # type: ignore[attr-defined]
    whole = ask(scripted, script, tools=[WEATHER, ADD]).choices[0]
    assert whole.finish_reason == "tool_calls"
    calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    assert calls == [("get_weather", ARGUMENTS), ("add", "{}")]
    assert whole.message.content == (None if script.startswith("{") else "Let me see.")

    chunks = [chunk.choices[0] for chunk in ask(scripted, script, tools=[WEATHER, ADD], stream=True)]
    deltas = [call for choice in chunks for call in choice.delta.tool_calls or ()]
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for call in deltas:
        if call.function.name:
            assert call.index == len(names)
            assert call.id
            names[call.index] = call.function.name
        arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
    assert list(zip(names.values(), arguments.values(), strict=True)) == calls
    assert "".join(choice.delta.content or "" for choice in chunks) == (whole.message.content or "")
    assert chunks[-1].finish_reason == "tool_calls"
    # As they come: a token is a byte here, so long arguments are many deltas.
    assert len(deltas) > len(ARGUMENTS) // 2


def test_the_client_accumulates_a_stream_into_the_same_message(scripted: RunningServer) -> None:
    script = TWO_CALLS[scripted.style]  # type: ignore[attr-defined]
    with scripted.openai.chat.completions.stream(
        model="base",
        messages=says(script),
        tools=[WEATHER, ADD],  # type: ignore[list-item]
    ) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert [call.function.name for call in message.tool_calls or ()] == ["get_weather", "add"]


def test_text_beside_tools_stays_text(scripted: RunningServer) -> None:
    answer = ask(scripted, "It is 3 < 4.", tools=[WEATHER]).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("It is 3 < 4.", "stop")
    assert answer.message.tool_calls is None


def test_tool_choice_none_leaves_the_output_alone(scripted: RunningServer) -> None:
    script = TWO_CALLS[scripted.style]  # type: ignore[attr-defined]
    answer = ask(scripted, script, tools=[WEATHER, ADD], tool_choice="none").choices[0]
    assert (answer.message.content, answer.finish_reason) == (script, "stop")


def test_without_parallel_calls_there_is_one(scripted: RunningServer) -> None:
    script = TWO_CALLS[scripted.style]  # type: ignore[attr-defined]
    answer = ask(scripted, script, tools=[WEATHER, ADD], parallel_tool_calls=False).choices[0]
    assert len(answer.message.tool_calls) == 1


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["any", "named"]
)
def test_a_forced_call_comes_whatever_the_model_wants(scripted: RunningServer, choice: Any) -> None:
    for seed in range(3):
        answer = ask(
            scripted, "I would rather talk.", tools=[WEATHER, ADD], tool_choice=choice, seed=seed,
            parallel_tool_calls=False, max_tokens=600,
        ).choices[0]  # fmt: skip
        (call,) = answer.message.tool_calls
        assert (answer.message.content, answer.finish_reason) == (None, "tool_calls")
        if choice != "required":
            assert call.function.name == "get_weather"
        if call.function.name == "get_weather":
            jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])  # type: ignore[arg-type,index]


def test_calls_cut_by_the_length_say_so(scripted: RunningServer) -> None:
    script = TWO_CALLS[scripted.style]  # type: ignore[attr-defined]
    answer = ask(scripted, script, tools=[WEATHER, ADD], max_tokens=script.index("ris") + 1).choices[0]
    assert answer.finish_reason == "length"
    assert ARGUMENTS.startswith(answer.message.tool_calls[0].function.arguments)


def test_results_of_tools_reach_the_template(scripted: RunningServer) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "\0023\3"},
    ]
    answer = scripted.openai.chat.completions.create(model="base", messages=messages, tools=[ADD])  # type: ignore[arg-type,list-item]
    assert answer.choices[0].message.content == "3"


def test_a_model_without_tools_says_so(server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError, match="--tool-call-parser") as caught:
        ask(server, "x", tools=[ADD])
    assert caught.value.param == "tools"


class Person(pydantic.BaseModel):
    name: str
    ages: list[int]


def test_the_client_parses_an_answer_into_its_model(scripted: RunningServer) -> None:
    wish = '{"name": "Ada", "ages": [1, 2]}'
    answer = scripted.openai.chat.completions.parse(
        model="base",
        messages=says(wish),
        response_format=Person,  # type: ignore[arg-type]
    )
    assert answer.choices[0].message.parsed == Person(name="Ada", ages=[1, 2])


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[0-9]{4}"}}, "[0-9]{4}"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"guided_grammar": 'start: "a"~2..4 "b"'}, "a{2,4}b"),
        ({"ebnf": 'root ::= "a" [bc] "d"'}, "a[bc]d"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
        ({"response_format": {"type": "json_object"}, "max_tokens": 800}, r"\{(.|\s)*"),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_forms_hold_in_either_kind_of_answer(
    server: RunningServer, fields: dict[str, Any], pattern: str, is_streamed: bool
) -> None:
    response = server.complete(**({"seed": 3, "max_tokens": 100, "stream": is_streamed} | fields))
    assert response.status_code == 200
    parts = [part["choices"][0] for part in events(response)] if is_streamed else response.json()["choices"]
    assert re.fullmatch(pattern, "".join(part["text"] for part in parts))


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"structured_outputs": {"regex": "("}}, "regex", "unclosed group"),
        ({"guided_json": {"type": "frob"}}, "json_schema", "frob"),
        ({"guided_regex": "a{1,99999}"}, "guided_regex", "10,000"),
        ({"guided_json": {"type": "object", "properties": {f"p{i}": {} for i in range(2000)}}},
         "json_schema", "items"),
        ({"guided_grammar": "start: nowhere"}, "grammar", "nowhere"),
    ],
)  # fmt: skip
def test_a_bad_form_fails_one_request(
    server: RunningServer, fields: dict[str, Any], param: str, message: str, is_streamed: bool
) -> None:
    response = server.complete(**fields, stream=is_streamed)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert server.complete(max_tokens=2).status_code == 200
