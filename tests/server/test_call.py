"""Bodies become calls; what only a server knows is taken out first."""

from __future__ import annotations

from typing import Any

import pytest

from polybatch.errors import RequestError
from polybatch.jobs.schema import Endpoint
from polybatch.server.call import parse_server_call
from polybatch.server.config import ServerConfig
from polybatch.server.errors import HttpError
from polybatch.server.names import adapter_of

CONFIG = ServerConfig(served_model_names=("base",))
CHAT = {"model": "base", "messages": [{"role": "user", "content": "x"}]}


def parse(body: dict[str, Any], endpoint: Endpoint = Endpoint.CHAT, policy: str = "fcfs") -> Any:
    return parse_server_call(endpoint, body, CONFIG, policy)


def test_null_means_absent() -> None:
    names = ("stream", "stream_options", "priority", "cache_salt", "request_id", "adapter_id", "lora", "stop",
             "truncate_prompt_tokens", "chat_template_kwargs", "add_generation_prompt")  # fmt: skip
    assert parse(CHAT | dict.fromkeys(names)) == parse(CHAT)


def test_a_priority_is_taken_where_it_is_honoured_and_refused_where_not() -> None:
    assert parse(CHAT | {"priority": -3}, policy="priority").priority == -3
    assert parse(CHAT | {"priority": 0}).priority == 0
    with pytest.raises(RequestError, match="--scheduling-policy priority"):
        parse(CHAT | {"priority": -3})


def test_template_variables_are_scalars_and_leave_the_conversation_alone() -> None:
    body = CHAT | {"chat_template_kwargs": {"enable_thinking": False}, "add_generation_prompt": False}
    assert parse(body).template == {"enable_thinking": False, "add_generation_prompt": False}


def test_parsing_leaves_the_body_as_it_was() -> None:
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    parse(body)
    assert body == CHAT | {"stream": True, "stream_options": {"include_usage": True}}


def test_continuous_usage_needs_usage() -> None:
    call = parse(CHAT | {"stream": True, "stream_options": {"continuous_usage_stats": True}})
    assert (call.include_usage, call.continuous_usage) == (False, False)


@pytest.mark.parametrize("base", ["base", "org/model", "with:colon"])
def test_an_adapter_may_follow_any_base_name(base: str) -> None:
    names = {"base_names": ("base", "org/model", "with:colon"), "adapters": {"sql", "a:b"}}
    assert adapter_of(base, None, None, **names) is None
    assert adapter_of(f"{base}:sql", None, None, **names) == "sql"
    assert adapter_of("a:b", None, None, **names) == "a:b"
    assert adapter_of(f"{base}:a:b", None, [], **names) == "a:b"
    with pytest.raises(HttpError, match="not served"):
        adapter_of("sql:base", None, None, **names)
