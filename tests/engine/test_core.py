"""The engine over the stub model: every request ends as it should, alone or among others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_helpers import make_core, run, run_one
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.config import PoolSpec
from polybatch.engine.core import EngineCore
from polybatch.engine.door import Door
from polybatch.errors import EngineError, RequestError
from polybatch.execution.fake import ByteTokenizer, FakeAheadExecutor, FakeExecutor, fake_spec
from polybatch.request import FinishReason, RequestOutput, SamplingParams

pytestmark = pytest.mark.usefixtures("stub")


class Breakable:
    """A stub that fails, or spoils one sequence's logits, when told to."""

    failure: BaseException | None = None
    spoiled: str | None = None

    def forward(self, plan: Any, adapters: Any) -> torch.Tensor:
        if self.failure is not None:
            raise self.failure
        logits: torch.Tensor = super().forward(plan, adapters)  # type: ignore[misc]
        for row, chunk in enumerate(plan.chunks):
            if chunk.seq.request.request_id == self.spoiled:
                logits[row] = float("nan")
        return logits


def breakable(stub: type[FakeExecutor]) -> Any:
    return type("BreakableExecutor", (Breakable, stub), {})(pool=PoolSpec(256, 4, 32, 1))


def answers(outputs: dict[str, RequestOutput]) -> dict[str, list[list[int]]]:
    return {key: [c.token_ids for c in output.outputs] for key, output in outputs.items()}


def test_length_ends_a_request_with_exactly_max_tokens() -> None:
    output = run_one(make_core(), [1, 2, 3], max_tokens=9, ignore_eos=True)
    assert len(output.outputs[0].token_ids) == 9
    assert output.outputs[0].finish_reason is FinishReason.LENGTH
    assert output.finished
    assert output.prompt_token_ids == [1, 2, 3]


def test_max_tokens_none_fills_the_model() -> None:
    output = run_one(make_core(max_model_len=40), [1, 2, 3], max_tokens=None, ignore_eos=True)
    assert len(output.outputs[0].token_ids) == 37


def test_a_stop_token_ends_the_output_and_stays_out_of_the_text() -> None:
    free = run_one(make_core(), [5], max_tokens=30, temperature=0, ignore_eos=True).outputs[0].token_ids
    stop = next(t for i, t in enumerate(free) if i >= 5 and t < 128 and free.index(t) == i)
    found = run_one(make_core(), [5], max_tokens=30, temperature=0, stop_token_ids=[stop]).outputs[0]
    assert found.token_ids == free[: free.index(stop) + 1]
    assert (found.finish_reason, found.stop_reason) == (FinishReason.STOP, stop)
    assert found.text == bytes(t for t in found.token_ids[:-1] if t < 256).decode(errors="replace")
    kept = run_one(
        make_core(), [5], max_tokens=30, temperature=0, stop_token_ids=[stop], include_stop_str_in_output=True
    )
    assert kept.outputs[0].text == found.text + chr(stop)


def test_end_of_sequence_stops_unless_ignored() -> None:
    core = make_core()
    for i in range(40):
        core.add_request(f"{i}", [i], SamplingParams(max_tokens=150, logit_bias={256: 5.0}, seed=i))
        core.add_request(
            f"{i}+", [i], SamplingParams(max_tokens=150, logit_bias={256: 5.0}, seed=i, ignore_eos=True)
        )
    found = run(core)
    stopped = [k for k in found if found[k].outputs[0].finish_reason is FinishReason.STOP]
    assert len(stopped) > 20
    for key in stopped:
        tokens = found[key].outputs[0].token_ids
        assert not key.endswith("+")
        assert tokens.index(256) == len(tokens) - 1
        assert found[key].outputs[0].stop_reason is None
        assert found[key + "+"].outputs[0].token_ids[: len(tokens)] == tokens


def test_min_tokens_holds_off_every_kind_of_stop() -> None:
    core = make_core()
    for i in range(20):
        params = SamplingParams(
            max_tokens=60,
            min_tokens=12,
            seed=i,
            logit_bias={256: 8.0, 65: 8.0},
            stop=["A"],
            stop_token_ids=[66],
        )
        core.add_request(str(i), [i], params)
    lengths = [len(output.outputs[0].token_ids) for output in run(core).values()]
    assert min(lengths) >= 12
    assert max(lengths) < 60


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 50), st.integers(1, 3), st.booleans(), st.booleans())
def test_stop_strings_cut_the_text_where_they_first_appear(
    seed: int, width: int, include: bool, stream: bool
) -> None:
    # Letters only, so that any slice of the free text can be a stop string.
    bias = dict.fromkeys(range(97, 105), 100.0)
    params: dict[str, Any] = {"max_tokens": 24, "seed": seed, "logit_bias": bias}
    free = run_one(make_core(), [seed], **params).outputs[0].text
    stop = free[10 : 10 + width]
    core = make_core()
    core.add_request(
        "s",
        [seed],
        SamplingParams(stop=[stop, "never"], include_stop_str_in_output=include, **params),
        stream=stream,
    )
    seen, output = "", None
    while core.has_work():
        for output in core.step():
            assert output.outputs[0].text.startswith(seen)
            seen = output.outputs[0].text
    assert output is not None
    at = free.index(stop)
    assert seen == free[: at + (len(stop) if include else 0)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (FinishReason.STOP, stop)
    assert len(output.outputs[0].token_ids) == at + len(stop)


def test_a_stop_string_in_the_last_allowed_token_is_a_stop() -> None:
    bias = dict.fromkeys(range(97, 123), 100.0)
    free = run_one(make_core(), [9], max_tokens=6, logit_bias=bias, seed=3).outputs[0].text
    found = run_one(make_core(), [9], max_tokens=6, logit_bias=bias, seed=3, stop=free[-2:]).outputs[0]
    assert (found.text, found.finish_reason, found.stop_reason) == (free[:-2], FinishReason.STOP, free[-2:])


def test_n_completions_share_the_prompt_and_differ() -> None:
    core = make_core()
    output = run_one(core, list(range(30)), n=5, max_tokens=10, ignore_eos=True)
    assert [c.index for c in output.outputs] == [0, 1, 2, 3, 4]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 5
    assert core.times.num_tokens < 5 * 30


def test_each_completion_of_n_is_what_its_seed_and_index_say() -> None:
    wide = run_one(make_core(), [1, 2], n=3, seed=11, max_tokens=8)
    narrow = run_one(make_core(), [1, 2], n=1, seed=11, max_tokens=8)
    assert wide.outputs[0].token_ids == narrow.outputs[0].token_ids


def test_equal_engine_seeds_repeat_a_run_and_others_do_not() -> None:
    def sampled(seed: int) -> dict[str, list[list[int]]]:
        core = make_core(seed=seed)
        for i in range(6):
            core.add_request(str(i), [1, 2], SamplingParams(max_tokens=8))
        return answers(run(core))

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
    assert len({str(v) for v in sampled(1).values()}) == 6


def mixed_requests(core: EngineCore, keys: list[int]) -> None:
    for i in keys:
        params = SamplingParams(
            n=1 + (i % 5 == 0),
            temperature=(0.0, 1.0, 0.7)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            seed=i,
            max_tokens=10 + 3 * (i % 7),
            repetition_penalty=(1.0, 1.2)[i % 4 == 0],
            logprobs=(None, 2)[i % 3 == 0],
            prompt_logprobs=(None, 1)[i % 6 == 0],
            stop=(["e"] if i % 2 else []),
        )
        prompt = [7] * 10 + [i] * (i % 13 + 1)
        core.add_request(str(i), prompt, params, (None, "a", "b")[i % 3])


def test_results_do_not_depend_on_the_batch_nor_on_preemption_chunking_or_caching() -> None:
    keys = list(range(24))
    alone: dict[str, RequestOutput] = {}
    for key in keys:
        core = make_core(adapters=["a", "b"])
        mixed_requests(core, [key])
        alone |= run(core)
    num_preemptions = 0
    for setting in (
        {},
        {"num_pages": 28, "max_model_len": 60, "max_num_batched_tokens": 7},
        {"num_pages": 28, "max_model_len": 60, "enable_prefix_caching": False, "policy": "priority"},
    ):
        core = make_core(adapters=["a", "b"], **setting)  # type: ignore[arg-type]
        mixed_requests(core, keys[::-1])
        found = run(core)
        num_preemptions += core.stats().scheduler.num_preemptions
        for key, output in alone.items():
            assert found[key].outputs == output.outputs
            assert found[key].prompt_logprobs == output.prompt_logprobs
        assert core.store is not None
        assert not +core.store.held  # type: ignore[attr-defined]
    assert num_preemptions > 0


def test_logprobs_cover_every_output_token_and_add_up() -> None:
    output = run_one(make_core(), "hello", max_tokens=7, logprobs=3, prompt_logprobs=2)
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids) == 7
    chosen = [entry[t] for entry, t in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert completion.cumulative_logprob == pytest.approx(sum(e.logprob for e in chosen))
    assert all(3 <= len(entry) <= 4 for entry in completion.logprobs)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == 5
    for position, token in enumerate(b"hello"[1:], 1):
        entry = output.prompt_logprobs[position]
        assert entry is not None
        assert token in entry


def test_streamed_outputs_grow_to_the_final_one() -> None:
    whole = run_one(make_core(), "abc", max_tokens=40, n=2, seed=4)
    core = make_core()
    core.add_request("one", "abc", SamplingParams(max_tokens=40, n=2, seed=4), stream=True)
    texts, outputs = ["", ""], []
    while core.has_work():
        outputs += core.step()
        for completion in outputs[-1].outputs if outputs else ():
            assert completion.text.startswith(texts[completion.index])
            texts[completion.index] = completion.text
    assert len(outputs) > 30
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].outputs == whole.outputs


def test_abort_returns_what_there_is_and_frees_everything() -> None:
    core = make_core(adapters=["a"])
    core.add_request("x", [1, 2, 3], SamplingParams(n=2, max_tokens=50, ignore_eos=True), "a")
    core.add_request("y", [1, 2, 3], SamplingParams(max_tokens=12, ignore_eos=True))
    for _ in range(5):
        core.step()
    aborted = core.abort("x")
    assert aborted is not None
    assert {c.finish_reason for c in aborted.outputs} == {FinishReason.ABORT}
    assert len(aborted.outputs[0].token_ids) >= 4 - (core.executor.__class__ is FakeAheadExecutor)
    assert all(token >= 0 for completion in aborted.outputs for token in completion.token_ids)
    assert core.abort("x") is None
    assert list(run(core)) == ["y"]
    assert core.stats().scheduler.num_kv_pages == 0


def test_a_device_that_samples_gets_the_next_step_before_its_tokens_are_read() -> None:
    executor = FakeAheadExecutor(pool=PoolSpec(256, 4, 32, 1))
    core = make_core(executor=executor)
    for key in range(8):
        core.add_request(str(key), [key], SamplingParams(max_tokens=30, temperature=0.9, seed=key))
    assert core.step() == []
    assert executor.num_launches == 1
    assert core.step() == []
    assert executor.num_launches == 2
    found = run(core)
    longest = max(len(output.outputs[0].token_ids) for output in found.values())
    # Length is known ahead; a stop token is seen when one more step is on its way.
    assert longest <= executor.num_launches <= longest + 1


def test_a_sequence_that_ends_by_its_length_makes_room_for_the_next_at_once() -> None:
    executor = FakeAheadExecutor(pool=PoolSpec(256, 4, 32, 1), max_num_seqs=4)
    core = make_core(executor=executor, max_num_seqs=4)
    for key in range(40):
        params = SamplingParams(max_tokens=key % 5 + 1, temperature=0, ignore_eos=True)
        core.add_request(str(key), [key], params)
    assert all(output.error is None for output in run(core).values())


def test_bad_logits_end_their_own_request_only(stub: type[FakeExecutor]) -> None:
    executor = breakable(stub)
    core = make_core(executor=executor)
    for key in "abc":
        core.add_request(key, [ord(key)], SamplingParams(max_tokens=10, temperature=0, ignore_eos=True))
    core.step()
    core.step()
    executor.spoiled = "b"
    found = run(core)
    assert found["b"].outputs[0].finish_reason is FinishReason.ERROR
    assert "not finite" in (found["b"].error or "")
    assert len(found["b"].outputs[0].token_ids) == 2
    for key in "ac":
        alone = run_one(make_core(), [ord(key)], max_tokens=10, temperature=0, ignore_eos=True)
        assert found[key].outputs == alone.outputs
        assert found[key].error is None


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (ValueError("disk on fire"), EngineError),
        (EngineError("a law was broken"), EngineError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failing_step_ends_all_in_flight_and_is_raised(
    failure: BaseException, raised: type[BaseException], stub: type[FakeExecutor]
) -> None:
    executor = breakable(stub)
    core = make_core(executor=executor, adapters=["a"], max_num_seqs=1)
    core.add_request("x", [1], SamplingParams(max_tokens=10), "a")
    core.add_request("waiting", [2], SamplingParams(max_tokens=10))
    executor.failure = failure
    with pytest.raises(raised) as caught:
        core.step()
    assert caught.value is failure or caught.value.__cause__ is failure
    failed = core.drain()
    assert {o.request_id for o in failed} == {"x", "waiting"}
    assert all(o.error and o.outputs[0].finish_reason is FinishReason.ERROR for o in failed)
    assert not core.has_work()
    core.scheduler.check()
    # The adapter's load never happened: the stub would notice if the scheduler believed it had.
    executor.failure = None
    core.add_request("again", [1], SamplingParams(max_tokens=3), "a")
    assert run(core)["again"].error is None


@pytest.mark.parametrize(
    ("prompt", "params", "adapter", "field", "message"),
    [
        ([], {}, None, "prompt", "no tokens"),
        ("", {}, None, "prompt", "no tokens"),
        ([1] * 5120, {}, None, "prompt", "prompt has 5,120 tokens, max_model_len is 200"),
        ([1] * 150, {"max_tokens": 51}, None, "max_tokens", "together 201; max_model_len is 200"),
        ([1] * 199, {"max_tokens": None, "min_tokens": 2}, None, "min_tokens", "only 1 tokens fit"),
        ([300], {}, None, "prompt", "token id 300; the model's vocabulary is 0 to 257"),
        ([-1], {}, None, "prompt", "token id -1"),
        ([1.5], {}, None, "prompt", "token ids are integers"),
        ([1], {"logit_bias": {258: 1}}, None, "logit_bias", "token id 258"),
        ([1], {"stop_token_ids": [999]}, None, "stop_token_ids", "token id 999"),
        ([1], {}, "nobody", "adapter", "'nobody' is unknown"),
    ],
)
def test_the_door_refuses_with_field_value_and_limit(
    prompt: Any, params: dict[str, Any], adapter: str | None, field: str, message: str
) -> None:
    core = make_core(adapters=["a"])
    with pytest.raises(RequestError, match=message) as caught:
        core.add_request("x", prompt, SamplingParams(**params), adapter)
    assert caught.value.field == field
    assert not core.has_work()


def test_a_tokenizer_with_more_tokens_than_the_model_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    Door(fake_spec(vocab_size=258), 200, ByteTokenizer())
    assert not caplog.records
    door = Door(fake_spec(vocab_size=200), 200, ByteTokenizer())
    assert "has 258 tokens, the model only 200" in caplog.text
    door.prepare("ascii", "abc")
    with pytest.raises(RequestError, match="token id 233; the model's vocabulary is 0 to 199"):
        door.prepare("beyond", "\u9f8d")


def test_a_request_id_in_use_is_refused() -> None:
    core = make_core()
    core.add_request("x", [1])
    with pytest.raises(RequestError, match="'x' is in use"):
        core.add_request("x", [2])
    assert list(run(core)) == ["x"]


def test_an_adapter_renamed_meanwhile_does_not_change_running_requests() -> None:
    params: dict[str, Any] = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
    before = run_one(make_core(adapters=["a"]), [1, 2], "a", **params)
    core = make_core(adapters=["a"])
    core.add_request("old", [1, 2], SamplingParams(**params), "a")
    for _ in range(4):
        core.step()
    core.store.add("a", version=1)  # type: ignore[union-attr]
    core.add_request("new", [1, 2], SamplingParams(**params), "a")
    found = run(core)
    assert found["old"].outputs == before.outputs
    assert found["new"].outputs != before.outputs


def test_many_adapters_share_a_pool_with_room_for_few() -> None:
    names = [f"adapter{i}" for i in range(40)]
    alone = {}
    for name in names[:8]:
        alone[name] = run_one(make_core(adapters=names), [3, 4], name, max_tokens=5, seed=1).outputs
    core = make_core(num_pages=12, max_model_len=20, adapters=names)
    for repeat in range(3):
        for name in names:
            core.add_request(f"{name}/{repeat}", [3, 4], SamplingParams(max_tokens=5, seed=1), name)
    found = run(core)
    for name, outputs in alone.items():
        assert all(found[f"{name}/{repeat}"].outputs == outputs for repeat in range(3))


def test_stats_count_requests_tokens_and_time_by_phase(stub: type[FakeExecutor]) -> None:
    core = make_core()
    run_one(core, [1, 2, 3], max_tokens=5, ignore_eos=True)
    stats = core.stats()
    assert (stats.num_requests, stats.num_finished_requests) == (1, 1)
    assert (stats.num_prompt_tokens, stats.num_output_tokens) == (3, 5)
    times = stats.times
    assert times.num_steps == 5
    assert min(times.plan_s, times.forward_s, times.commit_s, times.output_s) > 0
    assert (times.sample_s > 0) == (stub is FakeExecutor)
    assert 0 < times.overhead < 1


def test_a_limit_on_scored_tokens_changes_steps_and_not_scores() -> None:
    found = []
    for limit in (None, 8):
        core = make_core(max_scored_tokens=limit)
        for key in range(3):
            params = SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=1, ignore_eos=True)
            core.add_request(str(key), [key, *range(20 + key)], params)
        outputs = run(core)
        found.append({k: (o.outputs, o.prompt_logprobs) for k, o in outputs.items()})
        assert (core.stats().times.num_steps > 7) == (limit is not None)
    assert found[0] == found[1]
