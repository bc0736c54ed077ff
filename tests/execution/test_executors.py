"""The contract of every executor: one suite, run over each of them.

To add an executor, add a line to EXECUTORS. It must show its pool's memory as `arena`, which is filled
with NaN here, so that memory nobody wrote shows in the logits. One that sets `batch_invariant` owes the
same bits whatever the batch, the chunks and the pages; others owe equality within rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import helpers
import pytest
import torch
from helpers import Driver, HFWeights, random_adapter, random_tokens, run_alone, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.adapters.weights import VocabularyDelta
from polybatch.errors import EngineError
from polybatch.execution.cpu import CpuExecutor
from polybatch.execution.cuda import CudaExecutor
from polybatch.execution.eager import EagerExecutor
from polybatch.execution.executor import Executor
from polybatch.kernels.linear import dequantize, quantize_int4, quantize_int8
from polybatch.scheduling.plan import Chunk, LogitRows, PageCopy, StepPlan

CUDA_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Without a GPU the kernels run in Triton's interpreter."""

PAGE_SIZE = {"eager": 4, "cpu": 16, "cuda": 16}
LIMITS = {"num_pages": 700, "max_num_tokens": 256, "max_num_seqs": 16, "max_model_len": 128}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

EXECUTORS: dict[str, Callable[..., Executor]] = {
    "eager": EagerExecutor,
    "cpu": CpuExecutor,
    "cuda": functools.partial(CudaExecutor, device=CUDA_DEVICE, max_num_logits=256),
}
"""Name -> constructor with the arguments of EagerExecutor, but for its device."""

NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name == "cuda" and CUDA_DEVICE == "cpu" else ())
    for name in EXECUTORS
]
"""The interpreter takes minutes; `test_cuda.py` holds that executor to the reference in seconds."""

MODELS = ["llama", "mistral", "qwen2", "qwen3"]

cheap = pytest.mark.parametrize(
    ("executor", "model_name"),
    [
        pytest.param(*param.values, model, marks=param.marks if model != "qwen3" else ())
        for param in NAMES
        for model in MODELS
    ],
    indirect=["executor"],
)
"""For tests that take about a second even in the interpreter: there one family runs them each time."""

PRECISIONS: dict[str, dict[str, str]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int8-bfloat16": {"quantization": "int8", "dtype": "bfloat16"},
    "int4": {"quantization": "int4"},
    "int4-bfloat16": {"quantization": "int4", "dtype": "bfloat16"},
}


def build(name, model_name, **options):
    """An executor in float32 unless the options say otherwise, its pool filled with NaN."""
    built = EXECUTORS[name](
        weights(model_name), **{"dtype": "float32", **LIMITS, "page_size": PAGE_SIZE[name], **options}
    )
    torch.as_tensor(built.arena).fill_(0xFF)
    return built


@functools.cache
def weights(name: str) -> HFWeights:
    return HFWeights(tiny_model(name))


@pytest.fixture(params=MODELS)
def model_name(request):
    return request.param


@pytest.fixture(params=NAMES)
def executor(request, model_name):
    built = build(request.param, model_name)
    yield built
    built.close()


def adapters(spec):
    """Ranks 0, 4, 17 and 64 on different modules and layers."""
    return {
        0: random_adapter(spec, {"q_proj": 0, "down_proj": 0}, seed=10, dense=True),
        4: random_adapter(spec, {"q_proj": 4, "v_proj": 4}, seed=11),
        17: random_adapter(
            spec, {"k_proj": 17, "o_proj": 3, "gate_proj": 17, "up_proj": 1}, seed=12, layers=[1]
        ),
        64: random_adapter(spec, dict.fromkeys(helpers.MODULES, 64), seed=13, dense=True),
    }


def mixed_batch(driver, choices, lengths, seed):
    prompts = [random_tokens(length, seed=seed + i) for i, length in enumerate(lengths)]
    return prompts, [driver.add(prompt, adapter) for prompt, adapter in zip(prompts, choices, strict=True)]


def same(executor, got, expected):
    """Equal bits from executors that promise them, else equal within rounding."""
    if getattr(executor, "batch_invariant", False):
        return torch.equal(got, expected)
    return torch.allclose(got, expected, **TOLERANCE)


SCHEDULES = {
    "whole prompts": [],
    "small chunks": [[3, 1, 2, 5, 4]] * 7,
    "decode beside prefill": [[9, 0, 0, 0, 0]] + [[1, 4, 0, 3, 0]] * 3 + [[1, 1, 1, 1, 1]] * 12,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logits_do_not_depend_on_batch_chunks_or_pages(executor, schedule):
    rank = adapters(executor.spec)
    choices = [None, rank[4], rank[64], rank[17], rank[0]]
    driver = Driver(executor, seed=5)
    prompts, seqs = mixed_batch(driver, choices, [23, 17, 9, 30, 21], seed=40)
    mixed = driver.run(seqs, SCHEDULES[schedule])
    for prompt, adapter, got in zip(prompts, choices, mixed, strict=True):
        assert same(executor, got, run_alone(executor, prompt, adapter))


@functools.cache
def shared_llama(name):
    return build(name, "llama")


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_logits_do_not_depend_on_random_traffic(name, data):
    executor = shared_llama(name)
    choices = [None, *adapters(executor.spec).values()]
    lengths = data.draw(st.lists(st.integers(1, 25), min_size=1, max_size=5), label="lengths")
    chosen = [choices[data.draw(st.integers(0, len(choices) - 1), label="adapter")] for _ in lengths]
    counts = st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths))
    schedule = data.draw(st.lists(counts, max_size=6), label="schedule")
    driver = Driver(executor, seed=data.draw(st.integers(0, 1000), label="pages"))
    prompts, seqs = mixed_batch(driver, chosen, lengths, seed=sum(lengths))
    mixed = driver.run(seqs, schedule)
    for prompt, adapter, got in zip(prompts, chosen, mixed, strict=True):
        assert same(executor, got, run_alone(executor, prompt, adapter))


def rounded_model(model_name, quantization=None, **_):
    """The transformers model with the weights that a quantised executor has, as floats."""
    model = tiny_model(model_name)
    with torch.no_grad():
        for name, module in model.named_modules():
            if quantization is None or not isinstance(module, torch.nn.Linear):
                continue
            to_int8 = quantization == "int8" or name == "lm_head"
            rounded = dequantize((quantize_int8 if to_int8 else quantize_int4)(module.weight))
            # A new parameter: with tied embeddings only the head is rounded.
            module.weight = torch.nn.Parameter(rounded)
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_low_precision_stays_close_to_its_rounded_weights(name, precision, model_name):
    options = PRECISIONS[precision]
    if name == "cuda" and (CUDA_DEVICE == "cpu" or "quantization" in options):
        pytest.skip("its interpreter rounds bfloat16 otherwise, and its 4 bits have groups of their own")
    executor = build(name, model_name, **options)
    adapter = adapters(executor.spec)[17]
    driver = Driver(executor, seed=12)
    prompts, seqs = mixed_batch(driver, [None, adapter, None], [19, 11, 6], seed=130)
    mixed = driver.run(seqs, [[5, 2, 6], [1, 1, 0], [8, 3, 0]])
    base = rounded_model(model_name, **options)
    models = [base, helpers.merged_model(base, adapter), base]
    for prompt, choice, model, got in zip(prompts, [None, adapter, None], models, mixed, strict=True):
        assert got.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(got, helpers.hf_logits(model, prompt), dim=-1)
        # 4 bits group whole vectors of a head, so heads of odd sizes round otherwise than the reference
        assert float(cosine.min()) > (0.98 if "int4" in precision else 0.995)
        if getattr(executor, "batch_invariant", False):
            assert torch.equal(got, run_alone(executor, prompt, choice))
    executor.close()


def test_adapters_of_any_rank_equal_merged_weights(executor, model_name):
    rank = adapters(executor.spec)
    choices = [rank[64], rank[0], None, rank[17], rank[4], rank[64]]
    driver = Driver(executor, seed=6)
    prompts, seqs = mixed_batch(driver, choices, [11, 7, 13, 5, 9, 3], seed=60)
    mixed = driver.run(seqs, [[4, 7, 2, 1, 5, 3]])
    base = tiny_model(model_name)
    for prompt, adapter, got in zip(prompts, choices, mixed, strict=True):
        merged = base if adapter is None else helpers.merged_model(base, adapter)
        torch.testing.assert_close(got, helpers.hf_logits(merged, prompt), rtol=1e-3, atol=1e-3)


def vocabulary_delta(kind, table, seed):
    """A change of an embedding table or head, whole or of rank 3."""
    table = table.detach()
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(table.shape[0], 3, generator=generator)
    right = torch.randn(3, table.shape[1], generator=generator)
    return (
        VocabularyDelta(full=table + left @ right)
        if kind == "full"
        else VocabularyDelta(left=left, right=right)
    )


@pytest.mark.parametrize("kind", ["full", "low rank"])
def test_vocabulary_deltas_touch_only_their_own_rows(executor, model_name, kind):
    base = tiny_model(model_name)
    deltas = [
        vocabulary_delta(kind, t, i)
        for i, t in enumerate((base.model.embed_tokens.weight, base.lm_head.weight))
    ]
    with_rows = dataclasses.replace(
        adapters(executor.spec)[4], digest="both", embedding=deltas[0], lm_head=deltas[1]
    )
    without = dataclasses.replace(random_adapter(executor.spec, {}), digest="head", lm_head=deltas[1])
    choices = [None, with_rows, None, without]
    driver = Driver(executor, seed=14)
    prompts, seqs = mixed_batch(driver, choices, [9, 12, 7, 8], seed=140)
    mixed = driver.run(seqs, [[4, 5, 6, 3]])
    for prompt, adapter, got in zip(prompts, choices, mixed, strict=True):
        merged = base if adapter is None else helpers.merged_model(base, adapter)
        torch.testing.assert_close(got, helpers.hf_logits(merged, prompt), rtol=1e-3, atol=1e-3)
        assert same(executor, got, run_alone(executor, prompt, adapter))


@cheap
def test_an_adapter_of_the_vocabulary_alone_takes_no_pages(executor, model_name):
    delta = vocabulary_delta("full", tiny_model(model_name).lm_head.weight, seed=15)
    adapter = dataclasses.replace(random_adapter(executor.spec, {}), embedding=delta, lm_head=delta)
    assert executor.adapter_pages(adapter) == 0


def test_base_rows_do_not_notice_adapters_beside_them(executor):
    rank = adapters(executor.spec)
    prompt = random_tokens(19, seed=70)

    def base_row(neighbour):
        driver = Driver(executor, seed=7)
        seqs = [driver.add(prompt), driver.add(random_tokens(12, seed=71), neighbour)]
        return driver.run(seqs, [[6, 5], [8, 7]])[0]

    # Same shapes in both batches, so even executors without batch invariance owe the same bits.
    assert torch.equal(base_row(None), base_row(rank[64]))


@cheap
def test_logit_rows_come_in_the_order_of_chunks_and_positions(executor):
    lengths = [6, 9, 4, 8]
    driver = Driver(executor, seed=8)
    prompts, seqs = mixed_batch(driver, [None] * 4, lengths, seed=80)
    wanted = [LogitRows.LAST, LogitRows.NONE, LogitRows.ALL, LogitRows.LAST]
    logits = driver.step(list(zip(seqs, lengths, strict=True)), wanted)
    alone = [run_alone(executor, prompt) for prompt in prompts]
    expected = torch.cat([alone[0][-1:], alone[2], alone[3][-1:]])
    assert logits.shape == (6, executor.spec.vocab_size)
    assert logits.dtype == torch.float32
    assert same(executor, logits, expected)


@cheap
def test_a_step_without_logit_rows_still_writes_its_keys_and_values(executor):
    prompt = random_tokens(15, seed=90)
    driver = Driver(executor, seed=9)
    seq = driver.add(prompt)
    nothing = driver.step([(seq, 14)], LogitRows.NONE)
    assert nothing.shape == (0, executor.spec.vocab_size)
    last = driver.step([(seq, 1)], LogitRows.LAST)
    assert same(executor, last[0], run_alone(executor, prompt)[-1])


@cheap
def test_a_step_of_loads_and_copies_alone_returns_no_rows(executor):
    logits = executor.forward(StepPlan(chunks=(), copies=(PageCopy(0, 1),)), {})
    assert logits.shape == (0, executor.spec.vocab_size)


def test_a_copied_page_continues_as_its_original(executor):
    page_size = executor.pool.page_size
    shared = 2 * page_size + page_size // 2
    prompt, tails = random_tokens(shared, seed=100), (random_tokens(5, seed=101), random_tokens(5, seed=102))
    driver = Driver(executor, seed=10)
    first = driver.add(prompt + tails[0])
    driver.step([(first, shared)], LogitRows.NONE)
    # Two full pages are shared, the third is half full and is copied.
    second = helpers.sequence(prompt + tails[1], [*first.pages[:2], *driver.take(2)])
    second.num_computed = shared
    copies = [PageCopy(first.pages[2], second.pages[2])]
    logits = driver.step([(first, 5), (second, 5)], LogitRows.ALL, copies)
    for tail, got in zip(tails, logits.split(5), strict=True):
        assert same(executor, got, run_alone(executor, prompt + tail)[shared:])


@cheap
def test_copies_see_what_loads_of_the_same_step_wrote_or_are_refused(executor):
    adapter = adapters(executor.spec)[4]
    prompt = random_tokens(8, seed=110)
    expected = run_alone(executor, prompt, adapter)
    driver = Driver(executor, seed=11)
    seq = driver.add(prompt, adapter)
    pages, moved = driver.take(seq.adapter.num_pages), driver.take(seq.adapter.num_pages)
    plan = StepPlan(
        chunks=(Chunk(seq, 0, 8, LogitRows.ALL),),
        loads=(helpers.AdapterLoad(seq.adapter, pages),),
        copies=tuple(PageCopy(src, dst) for src, dst in zip(pages, moved, strict=True)),
        resident={adapter.digest: moved},
    )
    if isinstance(executor, CudaExecutor):
        # It knows where it loaded an adapter, and no scheduler moves one.
        with pytest.raises(EngineError, match="not resident"):
            executor.forward(plan, {adapter.digest: adapter})
        return
    assert same(executor, executor.forward(plan, {adapter.digest: adapter}), expected)


def test_an_adapter_loaded_again_elsewhere_gives_the_same_logits(executor):
    adapter = adapters(executor.spec)[64]
    prompt = random_tokens(8, seed=120)
    first = run_alone(executor, prompt, adapter)
    # Other adapters and sequences take the pages in between.
    for seed in (1, 2):
        driver = Driver(executor, seed=seed)
        driver.run([driver.add(random_tokens(30, seed=121), adapters(executor.spec)[17])], [])
    driver = Driver(executor, seed=3)
    assert same(executor, driver.run([driver.add(prompt, adapter)], [])[0], first)


@cheap
def test_an_adapter_that_is_not_resident_is_refused(executor):
    adapter = adapters(executor.spec)[4]
    driver = Driver(executor)
    seq = driver.add(random_tokens(4), adapter)
    plan = StepPlan(chunks=(Chunk(seq, 0, 4, LogitRows.LAST),))
    with pytest.raises(EngineError, match="resident"):
        executor.forward(plan, {adapter.digest: adapter})


@cheap
def test_release_and_close_may_be_called_at_any_time(executor):
    driver = Driver(executor)
    seq = driver.add(random_tokens(4))
    executor.release(seq)
    driver.step([(seq, 4)])
    executor.release(seq)
    executor.release(seq)
    assert seq.row is None
    assert executor.describe()
    executor.close()
    executor.close()
