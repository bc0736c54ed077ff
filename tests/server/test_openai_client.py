"""The official client is content, and what it gets is what the engine made."""

from __future__ import annotations

import openai
import pytest
from server_helpers import RunningServer, events

from polybatch.engine.stub import stub_core
from polybatch.request import SamplingParams

CHAT = [{"role": "user", "content": "hello"}]
PROMPT = "user: hello\nassistant:"


def in_process(prompt: str | list[int], adapter: str | None = None, **params: object) -> list[str]:
    """Texts of the stub engine in this process."""
    core = stub_core(adapters={"red": "red", "blue": "blue"}, max_model_len=1000)
    core.add_request("r", prompt, SamplingParams(**params), adapter)  # type: ignore[arg-type]
    while core.has_work():
        for output in core.step():
            if output.finished:
                return [completion.text for completion in output.outputs]
    raise AssertionError


def test_a_chat_is_answered_as_by_the_engine(server: RunningServer) -> None:
    answer = server.openai.chat.completions.create(model="base", messages=CHAT, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == in_process(PROMPT, max_tokens=12, temperature=0)[0]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 12)
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("adapter", [None, "red"])
def test_a_streamed_chat_is_the_same_text(server: RunningServer, adapter: str | None) -> None:
    stream = server.openai.chat.completions.create(
        model=adapter or "base", messages=CHAT, max_tokens=20, seed=3, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == in_process(PROMPT, adapter, max_tokens=20, seed=3, ignore_eos=True)[0]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("is_streamed", [False, True])
def test_several_prompts_and_completions_are_numbered_prompt_by_prompt(
    server: RunningServer, is_streamed: bool
) -> None:
    prompts = ["one", "two", "three"]
    body = {"model": "base", "prompt": prompts, "n": 2, "max_tokens": 6, "seed": 5, "stream": is_streamed}
    response = server.client.post("/v1/completions", json=body)
    expected = [text for prompt in prompts for text in in_process(prompt, n=2, max_tokens=6, seed=5)]
    if not is_streamed:
        choices = response.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(6))
        assert [choice["text"] for choice in choices] == expected
        return
    texts = [""] * 6
    for chunk in events(response):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == expected


def test_chat_logprobs_are_those_of_the_tokens(server: RunningServer) -> None:
    def ask(is_streamed: bool) -> object:
        return server.openai.chat.completions.create(
            model="base", messages=CHAT, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2,
            stream=is_streamed,
        )  # fmt: skip

    whole = ask(False).choices[0].logprobs.content  # type: ignore[attr-defined]
    assert len(whole) == 5
    assert all(len(entry.top_logprobs) == 2 for entry in whole)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in whole)
    streamed = [
        entry
        for chunk in ask(True)  # type: ignore[attr-defined]
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == whole


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_echo_has_the_prompt_and_its_logprobs(server: RunningServer, is_streamed: bool) -> None:
    body = {"max_tokens": 3, "echo": True, "logprobs": 1, "temperature": 0, "stream": is_streamed}
    response = server.complete(**body)
    parts = [e["choices"][0] for e in events(response)] if is_streamed else [response.json()["choices"][0]]
    assert "".join(part["text"] for part in parts) == "hi" + in_process("hi", max_tokens=3, temperature=0)[0]
    values = [v for part in parts if part["logprobs"] for v in part["logprobs"]["token_logprobs"]]
    assert values[0] is None
    assert len(values) == 5
    assert all(value < 0 for value in values[1:])
    assert all("prompt_logprobs" not in part for part in parts)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_no_tokens_beside_an_echo_scores_the_prompt_alone(server: RunningServer, is_streamed: bool) -> None:
    response = server.complete(max_tokens=0, echo=True, logprobs=1, stream=is_streamed)
    parts = [e["choices"][0] for e in events(response)] if is_streamed else [response.json()["choices"][0]]
    assert "".join(part["text"] for part in parts) == "hi"
    assert sum(len(part["logprobs"]["tokens"]) for part in parts if part["logprobs"]) == 2


def test_continuous_usage_counts_every_token(server: RunningServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(server.complete(max_tokens=8, ignore_eos=True, stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 8
    assert all(chunk["usage"]["prompt_tokens"] == 2 for chunk in chunks)


def test_fields_of_the_field_reach_the_sampler(server: RunningServer) -> None:
    wanted = in_process("hi", max_tokens=30, seed=1, top_k=5, min_tokens=4, ignore_eos=True)[0]
    body = {"max_tokens": 30, "seed": 1, "top_k": 5, "min_tokens": 4, "ignore_eos": True}
    assert server.complete(**body).json()["choices"][0]["text"] == wanted
    stop = wanted[10]
    cut = server.complete(**body, stop=[stop]).json()["choices"][0]
    assert cut["text"] == in_process("hi", **body, stop=[stop])[0]  # type: ignore[arg-type]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)


@pytest.mark.parametrize(
    "choice",
    [
        {"model": "red"},
        {"model": "base:red"},
        {"adapter_id": "red"},
        {"lora": [{"id": "red", "scale": 1}]},
        {"model": "red", "adapter_id": "red", "lora": [{"id": "red"}]},
    ],
)
def test_an_adapter_is_chosen_in_any_of_four_ways(server: RunningServer, choice: dict[str, object]) -> None:
    body = {"max_tokens": 9, "seed": 2}
    answer = server.complete(**body, **choice).json()["choices"][0]["text"]
    assert answer == in_process("hi", "red", **body)[0]  # type: ignore[arg-type]
    assert answer != server.complete(**body).json()["choices"][0]["text"]


def test_a_mixture_is_an_answer_of_its_own_whatever_its_order(server: RunningServer) -> None:
    mixed = [{"id": "red", "scale": 0.7}, {"id": "blue", "scale": -0.3}]

    def answer(lora: list[dict[str, object]]) -> str:
        response = server.complete(prompt="mix", max_tokens=16, temperature=0, lora=lora)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    texts = [answer([{"id": "red"}]), answer([{"id": "blue"}]), answer([]), answer(mixed)]
    texts += [answer([{"id": "red", "scale": 0.7}, {"id": "blue", "scale": 0.3}])]
    assert len(set(texts)) == len(texts)
    assert answer(mixed[::-1]) == texts[3]
    assert answer([{"id": "red"}, {"id": "blue", "scale": 0}]) == texts[0]


def test_request_ids_come_back(server: RunningServer) -> None:
    response = server.client.post(
        "/v1/completions", json={"model": "base", "prompt": "x"}, headers={"X-Request-Id": "abc-1"}
    )
    assert response.headers["x-request-id"] == "abc-1"
    assert response.json()["id"] == "cmpl-abc-1"
    response = server.complete(request_id="mine", stream=True)
    assert response.headers["x-request-id"] == "mine"
    assert events(response)[0]["id"] == "cmpl-mine"
    odd = server.client.get("/version", headers={"X-Request-Id": "no spaces, please"})
    assert odd.headers["x-request-id"] != "no spaces, please"


def test_models_list_base_and_adapters_with_parents(server: RunningServer) -> None:
    models = {model.id: model for model in server.openai.models.list()}
    assert list(models) == ["base", "blue", "red"]
    assert models["base"].parent is None  # type: ignore[attr-defined]
    assert models["red"].parent == "base"  # type: ignore[attr-defined]
    assert server.openai.models.retrieve("red").root == "red"  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("green")


def test_tokens_and_text_are_inverse(server: RunningServer) -> None:
    asked = server.client.post("/tokenize", json={"prompt": "héllo", "return_token_strs": True}).json()
    assert asked["tokens"] == list("héllo".encode())
    assert asked["count"] == len(asked["token_strs"]) == 6
    text = server.client.post("/detokenize", json={"tokens": asked["tokens"]}).json()["prompt"]
    assert text == "héllo"
    chat = server.client.post("/tokenize", json={"messages": CHAT}).json()
    assert bytes(chat["tokens"]).decode() == PROMPT


def test_a_truncated_prompt_keeps_its_end(server: RunningServer) -> None:
    answer = server.complete(
        prompt="abcdef", truncate_prompt_tokens=2, max_tokens=4, temperature=0, echo=True
    )
    assert answer.json()["usage"]["prompt_tokens"] == 2
    assert answer.json()["choices"][0]["text"].startswith("ef")
