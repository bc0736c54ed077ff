"""`--chat-template`: the operator's template renders live conversations; a request brings none."""

from __future__ import annotations

import asyncio

import pytest
from server_helpers import RunningServer
from tokenizer_helpers import byte_level

from polybatch.engine.async_llm import AsyncLLM
from polybatch.errors import ConfigError

OWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\\n{% endfor %}"
HI = [{"role": "user", "content": "the dog"}]


def test_conversations_are_rendered_by_the_template_of_the_command_line() -> None:
    tokenizer = byte_level()
    with RunningServer("stub", tokenizer=tokenizer, chat_template=OWN) as server:
        found = server.client.post("/tokenize", json={"model": "base", "messages": HI})
        assert found.status_code == 200, found.text
        assert tokenizer.decode(found.json()["tokens"]) == "<user>the dog\n"
        brought = server.client.post(
            "/v1/chat/completions", json={"model": "base", "messages": HI, "chat_template": OWN}
        )
        assert brought.status_code == 400
        assert brought.json()["error"]["param"] == "chat_template"


def test_a_template_that_does_not_parse_keeps_the_server_from_starting() -> None:
    async def start() -> None:
        await AsyncLLM("stub", tokenizer=byte_level(), chat_template="{% for %}").start()

    with pytest.raises(ConfigError, match="does not parse"):
        asyncio.run(start())
