"""LLM over the stub model: broadcasting, order, streaming, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
from engine_helpers import make_core

from polybatch.engine.llm import LLM
from polybatch.errors import ConfigError, EngineError, RequestError
from polybatch.request import FinishReason, RequestOutput, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def make_llm(**settings: Any) -> LLM:
    return LLM.from_core(make_core(**settings))


def is_idle(llm: LLM) -> bool:
    stats = llm.core.stats()
    return not llm.core.has_work() and stats.scheduler.num_running == stats.scheduler.num_waiting == 0


def test_results_come_in_the_order_of_the_prompts() -> None:
    llm = make_llm()
    params = [SamplingParams(max_tokens=30 - i, temperature=0, ignore_eos=True) for i in range(20)]
    outputs = llm.generate([[i] for i in range(20)], params)
    assert [o.prompt_token_ids for o in outputs] == [[i] for i in range(20)]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [30 - i for i in range(20)]


@pytest.mark.parametrize("prompt", ["hello", [104, 101, 108, 108, 111], (104, 101, 108, 108, 111)])
def test_a_single_prompt_is_text_or_ids_and_gives_one_output(prompt: Any) -> None:
    outputs = make_llm().generate(prompt, GREEDY)
    assert [o.prompt_token_ids for o in outputs] == [[104, 101, 108, 108, 111]]
    assert outputs[0].prompt == (prompt if isinstance(prompt, str) else None)


def test_no_prompts_give_no_outputs() -> None:
    assert make_llm().generate([], GREEDY) == []


def test_prompts_of_both_kinds_and_adapters_mix_in_one_call() -> None:
    llm = make_llm(adapters=["a", "b"])
    outputs = llm.generate(["x", [120], "x", "x"], GREEDY, adapter=[None, None, "a", "b"])
    texts = [o.outputs[0].token_ids for o in outputs]
    assert texts[0] == texts[1]
    assert len({str(t) for t in texts}) == 3
    assert [o.adapter for o in outputs] == [None, None, "a", "b"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling_params": [GREEDY]}, "sampling_params has 1 entries for 2 prompts"),
        ({"adapter": ["a", None, None]}, "adapter has 3 entries for 2 prompts"),
        ({"sampling_params": {"max_tokens": 3}}, "sampling_params is"),
        ({"adapter": [1, 2]}, "adapter is"),
    ],
)
def test_lists_must_have_one_entry_per_prompt(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_llm(adapters=["a"]).generate(["x", "y"], **settings)


def test_a_bad_prompt_among_many_is_named_before_anything_runs() -> None:
    llm = make_llm()
    with pytest.raises(RequestError, match=r"prompt 2 of 4: prompt has 500 tokens") as caught:
        llm.generate(["a", "b", "c" * 500, "d"], GREEDY)
    assert caught.value.field == "prompt"
    assert llm.stats().times.num_steps == 0
    assert is_idle(llm)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("broken"), EngineError("broken")])
def test_nothing_stays_in_the_engine_after_an_exception(
    failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(adapters=["a"])
    expected = llm.generate("x", GREEDY, "a")[0].outputs
    forward, calls = llm.core.executor.forward, []

    def failing(plan: Any, adapters: Any) -> Any:
        calls.append(plan)
        if len(calls) == 3:
            raise failure
        return forward(plan, adapters)

    monkeypatch.setattr(llm.core.executor, "forward", failing)
    with pytest.raises((type(failure), EngineError)):
        llm.generate(["x", "y", "z"], GREEDY, ["a", None, None])
    assert is_idle(llm)
    assert llm.generate("x", GREEDY, "a")[0].outputs == expected


def test_chat_renders_the_template_once_with_its_own_special_tokens() -> None:
    llm = make_llm()
    messages = [{"role": "user", "content": "hi"}]
    one = llm.chat(messages, GREEDY)
    assert one[0].prompt == "user: hi\nassistant:"
    many = llm.chat([messages, [*messages, {"role": "assistant", "content": "yo"}]], GREEDY)
    assert many[0].outputs == one[0].outputs
    assert many[1].prompt == "user: hi\nassistant: yo\nassistant:"


def test_a_stream_grows_to_what_generate_gives() -> None:
    llm = make_llm()
    steps = list(llm.stream("x", GREEDY))
    assert [o.finished for o in steps] == [False] * 5 + [True]
    assert [len(o.outputs[0].token_ids) for o in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1].outputs == llm.generate("x", GREEDY)[0].outputs


def test_leaving_a_stream_aborts_it() -> None:
    llm = make_llm()
    stream = llm.stream("x", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    assert is_idle(llm)


def test_generate_may_be_called_while_a_stream_is_read() -> None:
    llm = make_llm()
    alone = [o.outputs for o in llm.stream("x", GREEDY)]
    inner: list[RequestOutput] = []
    outer = []
    for output in llm.stream("x", GREEDY):
        outer.append(output.outputs)
        if len(outer) == 2:
            inner = llm.generate(["y", "z"], GREEDY)
    assert outer == alone
    assert all(o.outputs[0].finish_reason is FinishReason.LENGTH for o in inner)


def test_a_stream_refuses_bad_requests_at_once() -> None:
    with pytest.raises(RequestError, match="no tokens"):
        make_llm().stream("", GREEDY)


def test_a_closed_llm_says_so() -> None:
    with make_llm() as llm:
        llm.generate("x", GREEDY)
    llm.close()
    with pytest.raises(ConfigError, match="closed"):
        llm.generate("x", GREEDY)


def test_progress_shows_a_bar_and_changes_nothing() -> None:
    assert (
        make_llm().generate("x", GREEDY, progress=True)[0].outputs
        == make_llm().generate("x", GREEDY)[0].outputs
    )


def grouped_prompts() -> list[list[int]]:
    prompts = [[group] * 9 + [group, row, row + 1] for row in range(5) for group in range(4)]
    return [*prompts, [9], [1] * 9]


@pytest.mark.parametrize("num_pages", [16, 400])
def test_a_list_planned_as_a_job_gives_the_same_outputs_and_computes_no_more(num_pages: int) -> None:
    """The stub's logits hash the whole history of each token out of the pages."""
    params = [SamplingParams(max_tokens=3 + i % 9, seed=i, ignore_eos=True) for i in range(22)]
    adapter = [None, None, "a", "b"] * 5 + [None, "a"]
    results, computed = [], []
    for policy in ("prefix_groups", "fcfs"):
        llm = make_llm(num_pages=num_pages, policy=policy, adapters=["a", "b"], max_num_seqs=6)
        results.append([o.outputs[0].token_ids for o in llm.generate(grouped_prompts(), params, adapter)])
        computed.append(llm.stats().scheduler.num_prefill_tokens)
        assert is_idle(llm)
    assert results[0] == results[1]
    assert computed[0] < computed[1] or (num_pages == 400 and computed[0] == computed[1])


def test_a_stream_goes_before_a_list_that_is_planned() -> None:
    llm = make_llm(policy="prefix_groups", max_num_seqs=2)
    order: list[str] = []
    for output in llm.stream([5, 6], SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)):
        if not order:
            outputs = llm.generate([[1, 2], [3, 4], [5, 6]], GREEDY)
            order = ["stream", "list"]
        last = output
    assert all(len(o.outputs[0].token_ids) == 6 for o in outputs)
    assert len(last.outputs[0].token_ids) == 20
