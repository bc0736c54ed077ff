"""EagerExecutor against transformers and peft, on tiny random models of every family."""

from __future__ import annotations

import helpers
import pytest
import torch
from helpers import Driver, HFWeights, hf_logits, random_adapter, random_tokens, run_alone, tiny_model

from polybatch.errors import ConfigError, EngineError
from polybatch.execution.eager import EagerExecutor
from polybatch.scheduling.plan import LogitRows

LIMITS = {"num_pages": 240, "page_size": 4, "max_num_tokens": 128, "max_num_seqs": 8, "max_model_len": 96}


def eager(model, **options):
    executor = EagerExecutor(HFWeights(model), **{**LIMITS, **options})
    # All bits set is a NaN in every float dtype: whatever is read before it is written shows.
    executor.arena.fill_(0xFF)
    return executor


@pytest.mark.parametrize("name", helpers.TINY_MODELS)
def test_logits_equal_transformers_in_mixed_chunked_batches(name):
    model = tiny_model(name)
    driver = Driver(eager(model), seed=1)
    prompts = [random_tokens(length, seed=i) for i, length in enumerate([40, 13, 1, 22])]
    seqs = [driver.add(prompt) for prompt in prompts]
    # Prefill chunks of odd lengths beside decodes, then everything that is left at once.
    schedule = [[7, 5, 1, 0], [9, 1, 0, 3], [1, 1, 0, 11], [16, 1, 0, 1]]
    for prompt, got in zip(prompts, driver.run(seqs, schedule), strict=True):
        torch.testing.assert_close(got, hf_logits(model, prompt), rtol=1e-4, atol=1e-4)


def test_a_sliding_window_hides_what_lies_behind_it():
    model = tiny_model("mistral", num_hidden_layers=1)
    prompt = random_tokens(20, seed=2)
    changed = [(prompt[0] + 1) % helpers.VOCAB_SIZE, *prompt[1:]]
    first, second = (run_alone(eager(model), tokens) for tokens in (prompt, changed))
    assert torch.equal(first[7:], second[7:])
    assert not torch.allclose(first[6], second[6])


def peft_pair(name, rank, modules, seed):
    """A random peft adapter on a copy of the model, and the same adapter as AdapterWeights."""
    peft = pytest.importorskip("peft")
    model = tiny_model(name)
    config = peft.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=list(modules), lora_dropout=0.0)
    wrapped = peft.get_peft_model(model, config).eval()
    adapter = random_adapter(HFWeights(tiny_model(name)).spec, dict.fromkeys(modules, rank), seed)
    with torch.no_grad():
        for index, deltas in enumerate(adapter.layers):
            layer = wrapped.base_model.model.model.layers[index]
            for module, delta in deltas.items():
                parent = layer.self_attn if module in helpers.SELF_ATTENTION else layer.mlp
                linear = getattr(parent, module)
                linear.lora_A["default"].weight.copy_(delta.a)
                linear.lora_B["default"].weight.copy_(delta.b.T / 3)
    return wrapped, adapter


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_mixed_adapters_equal_peft_and_each_alone(name):
    pairs = [
        peft_pair(name, 2, ["q_proj", "v_proj"], seed=1),
        peft_pair(name, 9, helpers.MODULES, seed=2),
        (tiny_model(name), None),
        peft_pair(name, 33, ["down_proj"], seed=3),
    ]
    executor = eager(tiny_model(name))
    driver = Driver(executor, seed=4)
    prompts = [random_tokens(length, seed=i) for i, length in enumerate([17, 12, 9, 14])]
    seqs = [driver.add(prompt, adapter) for prompt, (_, adapter) in zip(prompts, pairs, strict=True)]
    mixed = driver.run(seqs, [[5, 3, 1, 8], [1, 1, 1, 1], [6, 1, 1, 2]])
    for prompt, (reference, adapter), got in zip(prompts, pairs, mixed, strict=True):
        torch.testing.assert_close(got, hf_logits(reference, prompt), rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(got, run_alone(executor, prompt, adapter), rtol=1e-4, atol=1e-4)


def test_bfloat16_adapter_rows_cost_half_the_pages():
    model = tiny_model("llama", hidden_size=128)
    adapter = random_adapter(HFWeights(model).spec, dict.fromkeys(helpers.MODULES, 32))
    wide, narrow = (eager(model, dtype=dtype, page_size=16) for dtype in ("float32", "bfloat16"))
    assert wide.pool.page_bytes == 2 * narrow.pool.page_bytes
    assert narrow.adapter_pages(adapter) == wide.adapter_pages(adapter)


def test_logits_may_be_edited_by_the_caller():
    driver = Driver(eager(tiny_model("llama")))
    logits = driver.executor.forward(helpers.StepPlan(chunks=()), {})
    assert logits.shape == (0, helpers.VOCAB_SIZE)
    seq = driver.add(random_tokens(3))
    chunk = helpers.Chunk(seq, 0, 3, LogitRows.LAST)
    driver.executor.forward(helpers.StepPlan(chunks=(chunk,)), {}).div_(2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"quantization": "int3"}, "quantization is 'int3'"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        eager(tiny_model("llama"), **options)


def test_steps_beyond_the_limits_are_refused_before_anything_runs():
    driver = Driver(eager(tiny_model("llama"), max_num_tokens=8))
    seq = driver.add(random_tokens(9))
    with pytest.raises(EngineError, match="9 for max_num_tokens"):
        driver.step([(seq, 9)])
    assert bool((driver.executor.arena == 0xFF).all())
