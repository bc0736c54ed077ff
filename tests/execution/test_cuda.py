"""The CUDA executor in Triton's interpreter, held to the reference; the whole contract takes minutes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Driver, HFWeights, Replays, random_adapter, random_tokens, tiny_model

from polybatch.config import PoolSpec, SchedulerConfig
from polybatch.engine.core import EngineCore
from polybatch.errors import ConfigError
from polybatch.execution import cuda_memory
from polybatch.execution.cuda import CudaExecutor
from polybatch.execution.cuda_graphs import MAX_MIXED_ROWS, Variant, ladder, mixed_ladder
from polybatch.execution.cuda_step import PageTable
from polybatch.execution.eager import EagerExecutor
from polybatch.models.random_weights import open_random
from polybatch.request import Request, SamplingParams, Sequence
from polybatch.scheduling.plan import LogitRows
from polybatch.scheduling.scheduler import Scheduler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS: dict[str, Any] = {
    "dtype": "float32", "num_pages": 96, "page_size": 16, "max_num_tokens": 64, "max_num_seqs": 4,
    "max_model_len": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> HFWeights:
    return HFWeights(tiny_model("llama"))


def cuda(weights: HFWeights, **options: Any) -> CudaExecutor:
    built = CudaExecutor(weights, **{**LIMITS, "device": DEVICE, **options})
    built.arena.fill_(0xFF)
    return built


def test_a_mixed_batch_of_adapters_and_phases_gives_the_reference_logits(weights: HFWeights) -> None:
    adapters = [None, random_adapter(weights.spec, {"q_proj": 3, "down_proj": 5}, seed=1, dense=True),
                random_adapter(weights.spec, {"o_proj": 17, "up_proj": 1}, seed=2)]  # fmt: skip
    prompts = [random_tokens(19, seed=1), random_tokens(7, seed=2), random_tokens(9, seed=3)]
    found = []
    for executor in (EagerExecutor(weights, **LIMITS), cuda(weights, max_num_logits=64)):
        driver = Driver(executor)
        seqs = [driver.add(p, a) for p, a in zip(prompts, adapters, strict=True)]
        # One prompt in chunks beside the others' whole ones, then single tokens of all.
        found.append(driver.run(seqs, [[8, 6, 8], [10, 1, 1]]))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_what_graphs_capture_gives_the_reference_logits_of_any_step_that_fits(weights: HFWeights) -> None:
    limits, every = LIMITS | {"max_num_tokens": 96}, dict.fromkeys(weights.spec.linear_shapes, 20)
    adapters = [None, random_adapter(weights.spec, {"q_proj": 3, "gate_proj": 5}, seed=1, dense=True),
                random_adapter(weights.spec, every, seed=2)]  # fmt: skip
    prompts = [random_tokens(7, seed=1), random_tokens(8, seed=2), random_tokens(70, seed=3)]
    graphed = cuda(weights, **limits, max_num_logits=96)
    mixed = graphed._mixed_graphs = Replays([16, 72], graphed._run_mixed)
    decode = graphed._graphs = Replays([2, 4], graphed._run_decode)
    found = []
    for executor in (EagerExecutor(weights, **limits), graphed):
        driver = Driver(executor)
        seqs = [driver.add(p, a) for p, a in zip(prompts, adapters, strict=True)]
        # Narrow tiles alone; wide ones of a segment of 66; more rows than any graph has; decode.
        found.append(driver.run(seqs, [[5, 4, 1], [1, 1, 66], [1, 1, 1]]))
        found[-1] += driver.run([driver.add(random_tokens(75, seed=4))], [[75]])
    assert [size for size, _ in mixed.replayed] == [16, 72, 16]
    assert all(variant == Variant.ADAPTED | Variant.SHARED for _, variant in mixed.replayed)
    assert decode.replayed == [(4, Variant.ADAPTED)]
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_float16_gives_the_reference_logits_up_to_its_rounding(weights: HFWeights) -> None:
    adapter = random_adapter(weights.spec, {"q_proj": 3, "down_proj": 5}, seed=1, dense=True)
    prompts = [random_tokens(19, seed=1), random_tokens(7, seed=2)]
    found = []
    for executor in (EagerExecutor(weights, **LIMITS), cuda(weights, dtype="float16", max_num_logits=64)):
        driver = Driver(executor)
        seqs = [driver.add(p, a) for p, a in zip(prompts, (None, adapter), strict=True)]
        found.append(driver.run(seqs, [[8, 6], [11, 1]]))
    for expected, got in zip(*found, strict=True):
        error = (got.cpu().float() - expected).norm() / expected.norm()
        assert 0 < float(error) < 5e-3


def test_a_prefix_that_sequences_share_is_attended_once_with_the_same_result(weights: HFWeights) -> None:
    prefix, tails = random_tokens(128, seed=5), [random_tokens(4, seed=6 + i) for i in range(3)]
    found = []
    for executor in (EagerExecutor(weights, **{**LIMITS, "max_num_tokens": 256}),
                     cuda(weights, max_num_tokens=256)):  # fmt: skip
        driver = Driver(executor)
        seqs = [driver.add([*prefix, *tail]) for tail in tails]
        for seq in seqs[1:]:
            seq.pages[:8] = seqs[0].pages[:8]
        driver.step([(seqs[0], 128)], LogitRows.NONE)
        for seq in seqs:
            seq.num_computed = 128
        # Chunks of several tokens, more than a step has room for in groups, and then single ones.
        driver.step([(seq, 3) for seq in seqs], LogitRows.NONE)
        found.append(driver.step([(seq, 1) for seq in seqs], LogitRows.LAST))
    torch.testing.assert_close(found[1].cpu(), found[0], rtol=1e-4, atol=1e-4)


def test_tokens_sampled_ahead_are_those_of_the_hosts_sampler(weights: HFWeights) -> None:
    outputs = []
    for executor in (EagerExecutor(weights, **LIMITS), cuda(weights)):
        core = core_over(executor)
        for row in range(3):
            params = SamplingParams(
                max_tokens=4,
                temperature=(0.0, 0.8, 1.3)[row],
                top_k=(0, 5, 0)[row],
                seed=row,
                ignore_eos=True,
            )
            core.add_request(str(row), random_tokens(5 + row, seed=row), params)
        done = {}
        while core.has_work():
            done |= {output.request_id: output for output in core.step()}
        outputs.append({key: output.outputs[0].token_ids for key, output in done.items()})
    assert outputs[0] == outputs[1]
    assert all(len(tokens) == 4 for tokens in outputs[1].values())


def core_over(executor: Any) -> EngineCore:
    config = SchedulerConfig(max_num_batched_tokens=32, max_num_seqs=4, max_model_len=64)
    return EngineCore(executor, Scheduler(config, executor.pool), max_model_len=64)


def test_a_row_of_the_page_table_follows_its_sequence() -> None:
    table = PageTable(2, 5, torch.device("cpu"))
    seqs = [Sequence(Request(str(i), (1, 2), SamplingParams(), 4, 0)) for i in range(2)]
    seqs[0].pages, seqs[1].pages = [7, 3], [9]
    assert [table.row_of(seq) for seq in seqs] == [0, 1]
    indices, values = table.changes()
    assert dict(zip(indices.tolist(), values.tolist(), strict=True)) == {0: 7, 1: 3, 5: 9}
    seqs[0].pages.append(4)
    assert table.row_of(seqs[0]) == 0
    assert [part.tolist() for part in table.changes()] == [[2], [4]]
    table.release(seqs[0])
    seqs[0].pages = [1]
    assert table.row_of(seqs[0]) == 0
    assert [part.tolist() for part in table.changes()] == [[0], [1]]


@pytest.mark.parametrize("max_rows", [1, 3, 37, 256, 1000])
def test_the_ladder_ends_at_the_largest_step(max_rows: int) -> None:
    sizes = ladder(max_rows)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == max_rows
    mixed = mixed_ladder(max_rows)
    assert mixed == sorted(set(mixed))
    assert mixed[-1:] == ([min(max_rows, MAX_MIXED_ROWS)] if max_rows > 1 else [])


def test_a_gpu_too_small_for_the_model_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = open_random("llama-3.1-8b")[0].spec
    limits = {"max_num_tokens": 8448, "max_num_seqs": 256, "max_num_logits": 1280, "max_model_len": 8192}

    class Properties:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 2**30, 80 * 2**30))
    left = cuda_memory.pool_bytes(spec, "bfloat16", None, "cuda", **limits)
    assert 55 * 2**30 < left < 63 * 2**30
    assert cuda_memory.pool_bytes(spec, "bfloat16", "int4", "cuda", **limits) > left + 9 * 2**30
    fp8 = [cuda_memory.pool_bytes(spec, "bfloat16", "fp8", "cuda", **limits | {"max_num_tokens": n})
           for n in (8448, 16896)]  # fmt: skip
    # A token's inputs and outputs of the widest product, and its share of everything else.
    assert fp8[0] - fp8[1] > 8448 * (14336 + 2 * 28672 + 2 * (28672 + 14336))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 * 2**30, 80 * 2**30))
    with pytest.raises(ConfigError, match=r"16\.0 GiB free; the weights take 15\.2.*use a quantization"):
        cuda_memory.pool_bytes(spec, "bfloat16", None, "cuda", **limits)


def test_a_share_of_a_gpus_memory_is_of_all_of_it_and_must_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = open_random("llama-3.1-8b")[0].spec
    limits = {"max_num_tokens": 8448, "max_num_seqs": 256, "max_num_logits": 1280, "max_model_len": 8192}

    class Properties:
        multi_processor_count = 132

    def pool(utilization: float) -> int:
        return cuda_memory.pool_bytes(spec, "bfloat16", None, "cuda", utilization=utilization, **limits)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 80 * 2**30))
    assert pool(0.75) - pool(0.5) == 20 * 2**30
    with pytest.raises(ConfigError, match=r"is 0\.8, 64\.0 GiB .*only 60\.0 GiB are free: lower it"):
        pool(0.8)
    with pytest.raises(ConfigError, match=r"60\.0 GiB free, 16\.0 of them by gpu_memory_utilization"):
        pool(0.2)


def test_the_pool_is_what_the_executor_reports(weights: HFWeights) -> None:
    executor = cuda(weights)
    assert executor.pool == PoolSpec(96, 16, executor.pool.page_bytes, weights.spec.num_layers)
    assert executor.arena.nbytes == executor.pool.total_bytes
