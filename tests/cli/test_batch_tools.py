"""Tools in files that an engine here answers: as a server would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from server.server_helpers import RunningServer

from polybatch.cli.main import main

SCHEMA = {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"],
    "additionalProperties": False,
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
SCRIPT = 'Wait. <tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "weather"}}
BODIES: list[dict[str, Any]] = [
    {"tools": TOOLS},
    {"tools": TOOLS, "tool_choice": "none"},
    {"tools": TOOLS, "tool_choice": "required", "seed": 1},
    {"tools": TOOLS, "tool_choice": NAMED, "parallel_tool_calls": False, "seed": 2},
    {"tools": [], "tool_choice": "auto"},
    {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nobody"}}},
    {"tools": [{"type": "function"}]},
]


def body(number: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"\2{SCRIPT}\3"}]
    return {"model": "base", "messages": messages, "temperature": 0, "max_tokens": 300} | BODIES[number]


def answers(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """Bodies of the answers to a file of all requests, in its order."""
    rows = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body(i)}
        for i in range(len(BODIES))
    ]
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as ended:
        main(["batch", "-i", str(source), "-o", str(out), "--quiet", "--served-model-name", "base", *flags])
    assert ended.value.code in (0, None)
    found = {line["custom_id"]: line for line in map(json.loads, out.read_text().splitlines())}
    return [found[str(i)]["response"]["body"] for i in range(len(BODIES))]


def essence(answer: dict[str, Any]) -> Any:
    """What does not differ from one time to the next."""
    if "error" in answer:
        return answer["error"]["param"]
    (choice,) = answer["choices"]
    calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
    return choice["message"]["content"], calls, choice["finish_reason"], answer["usage"]["completion_tokens"]


def test_calls_in_a_file_are_those_of_a_server(tmp_path: Path) -> None:
    here = answers(tmp_path, "--model", "stub:script=1", "--tool-call-parser", "hermes")
    found = [essence(answer) for answer in here]
    assert found[0][:3] == ("Wait. ", [{"name": "weather", "arguments": '{"city": "Paris"}'}], "tool_calls")
    assert found[1][:3] == (SCRIPT, [], "stop")
    assert found[2][1][0]["name"] == found[3][1][0]["name"] == "weather"
    assert set(json.loads(found[3][1][0]["arguments"])) == {"city"}
    assert len(found[3][1]) == 1
    assert found[5:] == ["tool_choice", "tools[0].function"]
    config = {"tool_call_parser": "hermes"}
    with RunningServer("stub:script=1", config=config, max_model_len=4000) as server:
        sent = [server.client.post("/v1/chat/completions", json=body(i)).json() for i in range(len(BODIES))]
    assert found == [essence(answer) for answer in sent]


def test_a_model_without_tools_says_so_and_how_to_have_them(tmp_path: Path) -> None:
    refused, told_not_to, *_ = answers(tmp_path, "--model", "stub:script=1")
    assert refused["error"]["param"] == "tools"
    assert "--tool-call-parser" in refused["error"]["message"]
    assert essence(told_not_to)[1:3] == ([], "stop")
