"""What request bodies may say, and that nothing in them is silently ignored."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.errors import RequestError
from polybatch.jobs.schema import Call, Endpoint, parse_call

CHAT, COMPLETIONS = Endpoint.CHAT, Endpoint.COMPLETIONS
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Call:
    return parse_call(CHAT, {"model": "m", "messages": HELLO, **fields})


def complete(**fields: Any) -> Call:
    return parse_call(COMPLETIONS, {"model": "m", "prompt": "hello", **fields})


def test_defaults_are_those_of_openai() -> None:
    assert chat().params.max_tokens is None
    assert complete().params.max_tokens == 16
    assert chat().params.temperature == complete().params.temperature == 1.0
    assert chat().params.logprobs is None


def test_every_sampling_field_reaches_the_engine() -> None:
    fields = {
        "n": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": -0.4, "seed": 11, "stop": ["x", "y"],
        "stop_token_ids": [5], "min_tokens": 2, "prompt_logprobs": 1, "ignore_eos": True,
        "include_stop_str_in_output": True, "skip_special_tokens": False, "max_tokens": 9,
    }  # fmt: skip
    for call in (chat(**fields), complete(**fields)):
        for name, value in fields.items():
            got = getattr(call.params, name)
            assert (list(got) if isinstance(got, tuple) else got) == value, name


def test_null_means_absent() -> None:
    assert chat(temperature=None, stop=None, tools=None, audio=None, seed=None) == chat()


def test_max_completion_tokens_is_max_tokens_and_they_must_agree() -> None:
    assert chat(max_completion_tokens=5).params.max_tokens == 5
    assert chat(max_completion_tokens=5, max_tokens=5).params.max_tokens == 5
    with pytest.raises(RequestError, match="give one of them"):
        chat(max_completion_tokens=5, max_tokens=6)


def test_log_probabilities_are_asked_for_as_each_endpoint_does() -> None:
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).params.logprobs == 4
    assert chat(logprobs=False).params.logprobs is None
    assert complete(logprobs=3).params.logprobs == 3


def test_logit_bias_has_string_keys_in_json() -> None:
    assert chat(logit_bias={"12": -100, "3": 1.5}).params.logit_bias == {12: -100, 3: 1.5}


def test_harmless_labels_are_accepted() -> None:
    assert chat(user="u", metadata={"a": "b"}, store=True, service_tier="auto") == chat()


def test_fields_that_ask_for_what_happens_anyway_are_accepted() -> None:
    same = {"stream": False, "response_format": {"type": "text"}, "tools": [], "echo": False, "best_of": 1}
    assert chat(**same) == chat()


@pytest.mark.parametrize(
    ("endpoint", "fields", "name"),
    [
        (CHAT, {"stream": True}, "stream"),
        (CHAT, {"stream": 0}, "stream"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (CHAT, {"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
        (COMPLETIONS, {"guided_regex": "a{1,100000}"}, "guided_regex"),
        (COMPLETIONS, {"guided_choice": []}, "guided_choice"),
        (COMPLETIONS, {"guided_regex": "a", "min_tokens": 2}, "min_tokens"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function"),
        (CHAT, {"audio": {"voice": "x"}}, "audio"),
        (CHAT, {"structured_outputs": {"yaml": {}}}, "structured_outputs.yaml"),
        (CHAT, {"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        (CHAT, {"temprature": 1}, "temprature"),
        (CHAT, {"prompt": "x"}, "prompt"),
        (CHAT, {"temperature": "hot"}, "temperature"),
        (CHAT, {"temperature": True}, "temperature"),
        (CHAT, {"top_p": 1.5}, "top_p"),
        (CHAT, {"n": 0}, "n"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_tokens": 2.5}, "max_tokens"),
        (CHAT, {"stop": [1]}, "stop"),
        (CHAT, {"expected_tokens": 0}, "expected_tokens"),
        (CHAT, {"expected_tokens": True}, "expected_tokens"),
        (COMPLETIONS, {"expected_tokens": 2.5}, "expected_tokens"),
        (CHAT, {"ignore_eos": "yes"}, "ignore_eos"),
        (CHAT, {"logprobs": 3}, "logprobs"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"1": 101}}, "logit_bias"),
        (CHAT, {"logit_bias": [1]}, "logit_bias"),
        (CHAT, {"model": None}, "model"),
        (CHAT, {"model": 3}, "model"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": ["hi"]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [*HELLO, {**HELLO[0], "tool_call_id": "1"}]}, "messages[1].tool_call_id"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0]",
        ),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages[0].tool_calls"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        (COMPLETIONS, {"messages": HELLO}, "messages"),
        (COMPLETIONS, {"max_completion_tokens": 3}, "max_completion_tokens"),
        (COMPLETIONS, {"echo": True}, "echo"),
        (COMPLETIONS, {"suffix": "end"}, "suffix"),
        (COMPLETIONS, {"best_of": 2}, "best_of"),
        (COMPLETIONS, {"logprobs": True}, "logprobs"),
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [True]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt"),
        (COMPLETIONS, {"prompt": [[1, 2], "a"]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt"),
    ],
)
def test_what_is_wrong_or_unsupported_is_refused_by_name(
    endpoint: Endpoint, fields: dict[str, Any], name: str
) -> None:
    body = {"model": "m", **({"messages": HELLO} if endpoint is CHAT else {"prompt": "x"}), **fields}
    with pytest.raises(RequestError, match=name.split("[")[0]) as caught:
        parse_call(endpoint, body)
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("name", "value"), [("deadlines", {"e2e_ms": 500}), ("workflow", {"id": "w"}), ("deadlines", {})]
)
def test_a_row_has_no_deadline_but_its_batchs_window_and_says_so(name: str, value: Any) -> None:
    with pytest.raises(
        RequestError, match=f"{name} is for live requests.*completion_window: remove it"
    ) as caught:
        chat(**{name: value})
    assert caught.value.field == name
    assert chat(**{name: None}).expected_tokens is None


def test_a_misspelt_field_is_met_with_the_right_name() -> None:
    with pytest.raises(RequestError, match="did you mean temperature"):
        chat(temprature=1)


def test_text_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = chat(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    assert call.messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
    )


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("x", ("x",)), ([1, 2], ((1, 2),)), (["x", "y"], ("x", "y")), ([[1], [2, 3]], ((1,), (2, 3)))],
)
def test_a_prompt_is_text_or_ids_or_a_list_of_them(prompt: object, prompts: tuple[object, ...]) -> None:
    call = complete(prompt=prompt, n=2)
    assert call.prompts == prompts
    assert call.num_sequences == 2 * len(prompts)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_fields = ["model", "messages", "prompt", "n", "stop", "logit_bias", "logprobs", "top_logprobs", "seed",
           "stop_token_ids", "max_tokens", "ignore_eos", "tools", "top_k", "user"]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(Endpoint)), st.dictionaries(st.sampled_from(_fields), _json, max_size=4) | _json)
def test_any_json_is_accepted_or_refused_but_never_breaks_the_parser(
    endpoint: Endpoint, body: object
) -> None:
    if isinstance(body, dict):
        body = {"model": "m", "messages" if endpoint is CHAT else "prompt": HELLO, **body}
    with contextlib.suppress(RequestError):
        call = parse_call(endpoint, json.loads(json.dumps(body)))
        assert call.messages or call.prompts
