"""Several ranks compute what one does: two processes over gloo, their kernels in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from types import MappingProxyType

import pytest
import torch
from helpers import MODULES, Driver, HFWeights, random_adapter, random_tokens, spec_of, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.adapters.store import AdapterStore
from polybatch.adapters.weights import VocabularyDelta
from polybatch.config import SchedulerConfig
from polybatch.engine.core import EngineCore
from polybatch.engine.llm import LLM
from polybatch.errors import ConfigError, EngineError, ModelError
from polybatch.execution import team
from polybatch.execution.cuda import CudaExecutor
from polybatch.execution.parallel import ParallelExecutor
from polybatch.execution.sharding import Shard, ShardedWeights, shard_adapter, shard_spec
from polybatch.execution.team import Team
from polybatch.kernels.lora.work import WIDE_TOKENS
from polybatch.request import SamplingParams
from polybatch.scheduling.plan import LogitRows, PageCopy
from polybatch.scheduling.scheduler import Scheduler

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="benchmarks/cuda/parallel_check.py is for GPUs"
)

LIMITS = {
    "num_pages": 400, "max_num_tokens": 96, "max_num_seqs": 8, "max_model_len": 64, "max_num_logits": 96,
    "dtype": "float32", "device": "cpu",
}  # fmt: skip
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


class Pair:
    """The same tiny model on one rank and on two."""

    def __init__(self, folder, name, limits=MappingProxyType({}), **overrides):
        limits = LIMITS | limits
        model = tiny_model(name, **overrides)
        model.save_pretrained(folder)
        self.weights = HFWeights(model)
        self.one = CudaExecutor(self.weights, **limits)
        self.two = ParallelExecutor(self.weights, model=str(folder), size=2, **limits)

    def close(self):
        self.one.close()
        self.two.close()


def pairs(tmp_path_factory, name, **overrides):
    pair = Pair(tmp_path_factory.mktemp(name), name, **overrides)
    yield pair
    pair.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    yield from pairs(tmp_path_factory, "llama")


def adapters(spec):
    """None, and ranks that two divides and that it does not, on all modules and on some, with and without
    what DoRA and trained biases add."""
    return [
        None,
        random_adapter(spec, dict.fromkeys(MODULES, 1), seed=1),
        random_adapter(spec, dict.fromkeys(MODULES, 5), seed=2, dense=True),
        random_adapter(spec, {"q_proj": 4, "down_proj": 7}, seed=3, layers=[1]),
        random_adapter(spec, {"o_proj": 0, "down_proj": 0}, seed=4, dense=True),
    ]


def logits_of(executor, choices, lengths, schedule, seed=5):
    driver = Driver(executor, seed)
    seqs = [
        driver.add(random_tokens(n, seed=n), adapter) for n, adapter in zip(lengths, choices, strict=True)
    ]
    return driver.run(seqs, schedule)


def check_same(pair, *args):
    for expected, got in zip(logits_of(pair.one, *args), logits_of(pair.two, *args), strict=True):
        torch.testing.assert_close(got, expected, **TOLERANCE)


def test_two_ranks_give_one_ranks_logits_in_mixed_steps(llama):
    check_same(llama, adapters(llama.weights.spec), [6, 3, 5, 4, 3], [[5, 2, 3, 0, 2]])


@pytest.mark.slow
def test_a_prompt_on_the_matrix_unit_with_an_adapter_gives_one_ranks_logits(llama):
    check_same(llama, adapters(llama.weights.spec)[3:4], [WIDE_TOKENS], [])


@pytest.mark.slow
def test_prompts_of_16_bits_on_the_matrix_unit_give_one_ranks_logits(tmp_path):
    """float16, because the interpreter cannot multiply matrices of bfloat16."""
    limits = {"dtype": "float16", "max_num_tokens": 160, "max_num_logits": 160}
    pair = Pair(tmp_path, "llama", limits, num_hidden_layers=1)
    args = adapters(pair.weights.spec)[1:3], [WIDE_TOKENS, WIDE_TOKENS], []
    try:
        for expected, got in zip(logits_of(pair.one, *args), logits_of(pair.two, *args), strict=True):
            assert (got - expected).norm() < 4e-3 * expected.norm()
    finally:
        pair.close()


def test_a_rank_holds_its_part_of_pages_and_adapters(llama):
    assert 2 * llama.two.pool.page_bytes == llama.one.pool.page_bytes
    adapter = random_adapter(llama.weights.spec, dict.fromkeys(MODULES, 5), seed=2)
    assert llama.two.adapter_pages(adapter) == llama.one.adapter_pages(adapter)
    assert llama.two.spec == llama.weights.spec


def test_copied_pages_are_copied_on_every_rank(llama):
    tokens, rows = random_tokens(20, seed=8), []
    for executor in (llama.one, llama.two):
        driver = Driver(executor, seed=3)
        first, second = driver.add(tokens), driver.add(tokens)
        driver.step([(first, 18)], LogitRows.NONE)
        copies = [PageCopy(src, dst) for src, dst in zip(first.pages, second.pages, strict=True)]
        second.num_computed = 18
        rows.append(driver.step([(second, 2)], copies=copies))
        for seq in (first, second):
            executor.release(seq)
    torch.testing.assert_close(rows[1], rows[0], **TOLERANCE)


def test_adapters_of_the_vocabulary_stay_on_rank_0(llama):
    spec, tables = llama.weights.spec, torch.Generator().manual_seed(3)
    shape = (spec.vocab_size, spec.hidden_size)
    full = VocabularyDelta(full=torch.randn(shape, generator=tables))
    pair = VocabularyDelta(
        left=torch.randn(shape[0], 3, generator=tables), right=torch.randn(3, shape[1], generator=tables)
    )
    adapter = random_adapter(spec, {"v_proj": 3}, seed=6)
    adapter = dataclasses.replace(adapter, digest="vocabulary", embedding=full, lm_head=pair)
    check_same(llama, [adapter, None], [6, 4], [[2, 3]])


def generate(executor, weights, prompts, choices, params):
    scheduler = SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=4, max_model_len=64)
    store = AdapterStore(weights, executor.adapter_pages)
    for adapter in choices:
        if adapter is not None:
            store.add_weights(adapter.digest, adapter)
    core = EngineCore(executor, Scheduler(scheduler, executor.pool, "model"), store=store, max_model_len=64)
    names = [None if adapter is None else adapter.digest for adapter in choices]
    outputs = LLM.from_core(core).generate(prompts, params, names)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    ("lengths", "temperatures"),
    [((4, 2), (0.0, 0.7)), pytest.param((20, 21, 26, 5), (0.0, 0.0, 0.7, 0.0), marks=pytest.mark.slow)],
)
def test_generation_a_step_ahead_gives_one_ranks_tokens(llama, lengths, temperatures):
    """Sampled tokens reach the next step on the device; prompts are cut, shared and mixed with decoding."""
    start = random_tokens(17, seed=1)
    prompts = [start[: n - 1] + random_tokens(max(1, n - 17), seed=n) for n in lengths]
    choices = adapters(llama.weights.spec)[: len(lengths)]
    params = [SamplingParams(temperature=t, seed=7, max_tokens=3, ignore_eos=True) for t in temperatures]
    one, two = (generate(x, llama.weights, prompts, choices, params) for x in (llama.one, llama.two))
    assert two == one
    assert all(len(tokens) == 3 for tokens in two)


def test_a_step_refused_before_it_is_announced_changes_no_rank(llama):
    driver = Driver(llama.two, seed=9)
    seqs = [driver.add(random_tokens(60, seed=seed)) for seed in range(2)]
    with pytest.raises(EngineError, match="max_num_tokens"):
        driver.step([(seq, 60) for seq in seqs])
    for seq in seqs:
        llama.two.release(seq)
    check_same(llama, adapters(llama.weights.spec)[:2], [4, 3], [])


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_two_ranks_give_one_ranks_logits_in_random_traffic(llama, data):
    choices = adapters(llama.weights.spec)
    lengths = data.draw(st.lists(st.integers(1, 15), min_size=1, max_size=5), label="lengths")
    chosen = [choices[data.draw(st.integers(0, len(choices) - 1), label="adapter")] for _ in lengths]
    counts = st.lists(st.integers(0, 6), min_size=len(lengths), max_size=len(lengths))
    check_same(llama, chosen, lengths, data.draw(st.lists(counts, max_size=4), label="schedule"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {"num_key_value_heads": 2}),
        ("llama-tied-biased", {}),
        ("llama", {"num_hidden_layers": 3, "intermediate_size": 70}),
    ],
)
def test_two_ranks_serve_every_family(tmp_path_factory, name, overrides):
    for pair in pairs(tmp_path_factory, name, **overrides):
        schedule = [[3, 2, 8, 0, 5], [1, 1, 0, 6, 1], [1, 1, 1, 1, 1]]
        check_same(pair, adapters(pair.weights.spec), [9, 5, 8, 7, 6], schedule)


def test_a_dead_rank_is_named_and_nothing_hangs(tmp_path):
    pair = Pair(tmp_path, "llama", num_hidden_layers=1)
    worker = pair.two._team._workers[0]
    check_same(pair, [None], [3], [])
    os.kill(worker.process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="rank 1"):
        logits_of(pair.two, [None], [3], [])
    with pytest.raises(EngineError, match="rank 1"):
        logits_of(pair.two, [None], [3], [])
    pair.close()
    pair.close()
    assert worker.process.returncode == -signal.SIGKILL


def test_closing_ends_every_process(tmp_path, monkeypatch):
    pair = Pair(tmp_path, "llama", num_hidden_layers=1)
    folder = os.path.dirname(pair.two._team.store)
    assert os.stat(folder).st_mode & 0o777 == 0o700
    leave, found = pair.two._group.close, []
    monkeypatch.setattr(pair.two._group, "close", lambda: [found.append(os.path.exists(folder)), leave()])
    pair.close()
    assert found == [True], "the group of ranks ends before the folder over which they met"
    assert [worker.process.returncode for worker in pair.two._team._workers] == [0]
    assert not os.path.exists(folder)


def test_a_start_in_which_no_rank_gets_on_ends_and_says_where_each_stands(monkeypatch):
    """Rank 1 is never told what to load, and rank 0 waits for it in what cannot be interrupted."""
    monkeypatch.setattr(team, "SILENCE_S", 0.5)
    ranks, never = Team(2), threading.Event()
    aborted = threading.Event()
    ranks.on_failure = aborted.set
    try:
        ranks.enter("it meets the other ranks")
        with pytest.raises(EngineError, match=r"rank 0 it meets the other ranks, of rank 1 its interpreter"):
            ranks.run(never.wait)
        with pytest.raises(EngineError, match="rank 1"):
            ranks.await_phase("it takes part in steps")
        assert aborted.wait(10.0)
    finally:
        never.set()
        ranks.close()


def test_a_step_that_does_not_end_fails(monkeypatch):
    ranks = Team(2)
    ranks._is_started = True
    try:
        assert ranks.run(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            ranks.run(lambda: 1 // 0)
        ranks.wait(iter([False, True]).__next__, "nothing")
        monkeypatch.setattr(team, "SILENCE_S", 0.05)
        with pytest.raises(EngineError, match=r"0\.05 s: this step"):
            ranks.wait(lambda: False, "this step")
    finally:
        ranks.close()


def test_a_rank_that_cannot_load_says_why(tmp_path):
    weights = HFWeights(tiny_model("llama"))
    with pytest.raises(ModelError, match=r"rank 1: .*no existing path"):
        ParallelExecutor(weights, model=str(tmp_path / "nowhere"), size=2, **LIMITS)


@pytest.mark.parametrize(
    ("field", "overrides"),
    [("num_heads", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}),
     ("num_kv_heads", {"num_key_value_heads": 1}), ("intermediate_size", {"intermediate_size": 97})],
)  # fmt: skip
def test_a_model_that_cannot_be_cut_is_refused_before_anything_starts(field, overrides):
    with pytest.raises(ConfigError, match=f"tensor_parallel_size is 2.*{field}"):
        ParallelExecutor(HFWeights(tiny_model("llama", **overrides)), model="unused", size=2, **LIMITS)


def test_parts_of_weights_and_adapters_make_the_whole_and_repeat_nothing():
    model = tiny_model("llama-tied-biased")
    weights, spec = HFWeights(model), spec_of(model.config)
    parts = [ShardedWeights(weights, Shard(rank, 2)) for rank in range(2)]
    assert parts[0].spec == shard_spec(spec, 2)
    for module, (out, into) in spec.linear_shapes.items():
        axis = 1 if module in ("o_proj", "down_proj") else 0
        joined = torch.cat([part.linear(1, module) for part in parts], axis)
        assert torch.equal(joined, weights.linear(1, module))
        layer = [getattr(part.layer(1), module.removesuffix("_proj")) for part in parts]
        assert torch.equal(torch.cat(layer, axis), joined)
        assert parts[0].spec.linear_shapes[module] == ((out, into // 2) if axis else (out // 2, into))
    assert len(parts[1].embedding()) == 0
    assert len(parts[1].lm_head()) == 0
    whole = random_adapter(spec, dict.fromkeys(MODULES, 3), seed=1, dense=True)
    cut = [shard_adapter(whole, Shard(rank, 2)) for rank in range(2)]
    for module, delta in whole.layers[0].items():
        held = [part.layers[0][module] for part, _ in cut]
        assert torch.equal(torch.cat([d.a for d in held], 1), delta.a)
        assert torch.equal(torch.cat([d.b for d in held], 1), delta.b)
        gains = [d.gain if d.gain is not None else scales[0][module].gain
                 for d, (_, scales) in zip(held, cut, strict=True)]  # fmt: skip
        assert torch.equal(torch.cat(gains), delta.gain)
