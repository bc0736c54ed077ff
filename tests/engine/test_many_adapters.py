"""Many more adapters than fit, under random traffic, and names that get other weights."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch
from gate_helpers import RECIPES, save_adapter, tiny_config, tiny_weights
from helpers import random_tokens, tiny_model
from safetensors.torch import save_file

from polybatch.adapters.store import AdapterStore
from polybatch.config import PoolSpec, SchedulerConfig
from polybatch.engine.config import ResolvedConfig
from polybatch.engine.core import EngineCore
from polybatch.engine.door import Door
from polybatch.engine.equivalence import LogitRecorder, answer_alone
from polybatch.engine.executors import build_executor, page_bytes
from polybatch.engine.llm import LLM
from polybatch.request import FinishReason, SamplingParams
from polybatch.scheduling.scheduler import Scheduler

BLOCKS = {"q_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn", "gate_proj": "mlp",
          "down_proj": "mlp"}  # fmt: skip
LIMITS = SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=24, max_model_len=64)
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def write_adapter(spec, folder, rank, seed):
    """A PEFT directory with a pair of this rank on one to three modules of every layer."""
    chosen = random.Random(seed).sample(list(BLOCKS), 1 + seed % 3)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(spec.num_layers):
        for module in chosen:
            num_out, num_in = spec.linear_shapes[module]
            prefix = f"base_model.model.model.layers.{layer}.{BLOCKS[module]}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, num_in, generator=generator) / num_in**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(num_out, rank, generator=generator) / rank
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": chosen}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def build(name, num_pages):
    weights = tiny_weights("llama")
    config = tiny_config(executor=name)
    pool = PoolSpec(num_pages, 16, page_bytes(config, weights.spec), weights.spec.num_layers)
    return build_executor(weights, ResolvedConfig("float32", "cpu", None, name, 1, 0, pool, LIMITS))


@pytest.mark.parametrize("name", ["cpu", pytest.param("eager", marks=pytest.mark.slow)])
def test_five_hundred_adapters_in_room_for_twenty_answer_as_each_alone(name, tmp_path):
    weights, traffic = tiny_weights("llama"), random.Random(1)
    probe = build(name, 1)
    store = AdapterStore(weights, probe.adapter_pages)
    for i in range(500):
        store.register(f"a{i}", write_adapter(weights.spec, tmp_path / f"a{i}", 4 + i * 17 % 61, i))
    sizes = [ref.num_pages for ref in store.list()]
    num_pages = 20 * sum(sizes) // len(sizes)
    assert max(sizes) + 2 < num_pages
    executor = LogitRecorder(build(name, num_pages))
    core = EngineCore(executor, Scheduler(LIMITS, executor.pool), None, store, max_model_len=64)

    # Every adapter once, every third again much later, base rows between them, in random order.
    names = [f"a{i}" for i in range(500)] + [f"a{i}" for i in range(0, 500, 3)] + [None] * 60
    traffic.shuffle(names)
    prefix, door = random_tokens(16, seed=1), Door(weights.spec, 64, None, store)
    requests, finished, most_resident = {}, {}, 0
    while names or core.has_work():
        for _ in range(min(len(names), traffic.choice([0, 1, 2, 5]))):
            prompt = prefix * traffic.randint(0, 1) + random_tokens(traffic.randint(1, 20), seed=len(names))
            request = door.prepare(f"r{len(requests)}", prompt, GREEDY, names.pop())
            requests[request.request_id] = request
            core.submit(request)
        for output in core.step():
            finished[output.request_id] = output
        most_resident = max(most_resident, core.scheduler.stats().num_resident_adapters)
    core.scheduler.check()

    stats = core.scheduler.stats()
    assert finished.keys() == requests.keys()
    assert all(output.outputs[0].finish_reason is FinishReason.LENGTH for output in finished.values())
    assert stats.num_adapter_loads > 500
    assert 10 < most_resident < 60
    distinct = {tuple(rows[0].tolist()) for rows in executor.logits.values()}
    assert len(distinct) == len(requests)
    alone = build(name, max(sizes) + 8)
    for request_id, request in requests.items():
        expected = answer_alone(alone, request, store, LIMITS)
        got = torch.stack(executor.logits[request_id])
        assert finished[request_id].outputs[0].token_ids == expected.tokens
        if name == "cpu":
            assert torch.equal(got, expected.logits)
        else:
            torch.testing.assert_close(got, expected.logits, rtol=1e-4, atol=1e-4)
    for built in (probe, executor, alone):
        built.close()


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny model and two adapters for it that differ only in their values."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    first, second = (
        save_adapter(model, tmp_path / name, RECIPES["dora"], seed)
        for seed, name in enumerate(["first", "second"])
    )
    return tmp_path / "model", first, second


def open_llm(checkpoint, executor, **adapters):
    config = dataclasses.asdict(tiny_config(executor=executor))
    return LLM(str(checkpoint[0]), adapters=adapters, **config)


@pytest.mark.parametrize("executor", ["cpu", "eager"])
def test_a_name_with_other_weights_never_meets_old_keys_and_values(checkpoint, executor):
    _, first, second = checkpoint
    prompt, params = (
        random_tokens(50),
        SamplingParams(temperature=0, max_tokens=6, logprobs=5, ignore_eos=True),
    )

    def answer(llm):
        output = llm.generate(prompt, params, adapter="x")[0]
        return output.outputs[0], output.num_cached_tokens

    def close(got, expected):
        return got.token_ids == expected.token_ids and got.cumulative_logprob == pytest.approx(
            expected.cumulative_logprob, abs=1e-4
        )

    with open_llm(checkpoint, executor, x=first) as llm:
        of_first, _ = answer(llm)
    with open_llm(checkpoint, executor, x=second) as llm:
        of_second, _ = answer(llm)
    assert not close(of_first, of_second)

    with open_llm(checkpoint, executor, x=first) as llm:
        assert answer(llm)[1] == 0
        got, num_cached = answer(llm)
        assert num_cached >= 48
        assert close(got, of_first)
        llm.add_adapter("x", second)
        got, num_cached = answer(llm)
        assert num_cached == 0
        assert close(got, of_second)
        # The old weights under the name again are the old content: their KV is right, and may be met.
        llm.add_adapter("x", first)
        got, num_cached = answer(llm)
        assert num_cached >= 48
        assert close(got, of_first)


@pytest.mark.parametrize("executor", ["cpu", "eager"])
def test_a_running_request_keeps_the_weights_that_its_name_had(checkpoint, executor):
    _, first, second = checkpoint
    prompt, params = random_tokens(40), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = []
    for path in (first, second):
        with open_llm(checkpoint, executor, x=path) as llm:
            expected.append(llm.generate(prompt, params, adapter="x")[0].outputs[0].token_ids)
    assert expected[0] != expected[1]
    with open_llm(checkpoint, executor, x=first) as llm:
        stream = llm.stream(prompt, params, adapter="x")
        assert not next(stream).finished
        llm.add_adapter("x", second)
        # Both run in the same batch from here on.
        assert llm.generate(prompt, params, adapter="x")[0].outputs[0].token_ids == expected[1]
        assert list(stream)[-1].outputs[0].token_ids == expected[0]
