"""A step's only adapter in the base model's products, held to the reference; which adapters go there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import Driver, HFWeights, Replays, random_adapter, random_tokens, tiny_model

from polybatch.adapters.weights import AdapterWeights
from polybatch.execution.cuda import CudaExecutor
from polybatch.execution.cuda_graphs import Variant
from polybatch.execution.eager import EagerExecutor
from polybatch.kernels.lora import carried, cuda_carried
from polybatch.kernels.lora.cuda_carried import Carrier

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS: dict[str, Any] = {
    "dtype": "float32", "num_pages": 96, "page_size": 16, "max_num_tokens": 96, "max_num_seqs": 4,
    "max_model_len": 256,
}  # fmt: skip
PROMPTS = [random_tokens(9, seed=1), random_tokens(5, seed=2), random_tokens(20, seed=3)]
# All together, then single tokens beside a chunk.
STEPS = [[8, 4, 8], [1, 1, 12]]


@pytest.fixture(scope="module")
def weights() -> HFWeights:
    return HFWeights(tiny_model("llama"))


@pytest.fixture(scope="module", autouse=True)
def few_rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(carried, "MIN_ROWS", 1)
        yield


@pytest.fixture(scope="module")
def executor(weights: HFWeights) -> CudaExecutor:
    return CudaExecutor(weights, **LIMITS, device=DEVICE, max_num_logits=96)


def run(executor: Any, adapters: list[AdapterWeights | None]) -> list[torch.Tensor]:
    driver = Driver(executor)
    seqs = [driver.add(prompt, adapter) for prompt, adapter in zip(PROMPTS, adapters, strict=True)]
    logits: list[torch.Tensor] = driver.run(seqs, STEPS)
    return logits


def held(executor: CudaExecutor) -> object:
    carrier = executor._shared.carrier
    assert carrier is not None
    return carrier.held


@pytest.mark.parametrize(
    "ranks",
    [
        {"q_proj": 3, "down_proj": 5},
        dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 20),
        {"o_proj": 64, "k_proj": 33, "gate_proj": 17},
    ],
)
def test_a_carried_adapter_of_any_rank_gives_the_reference_logits(
    weights: HFWeights, executor: CudaExecutor, ranks: dict[str, int]
) -> None:
    adapter = random_adapter(weights.spec, ranks, name=f"{ranks}")
    executor.arena.fill_(0xFF)
    adapters = [None, adapter, adapter]
    found = run(EagerExecutor(weights, **LIMITS), adapters), run(executor, adapters)
    assert held(executor) == adapter.digest
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_adapters_take_turns_in_the_columns_and_leave_nothing_there(
    weights: HFWeights, executor: CudaExecutor
) -> None:
    ranks = {name: {"q_proj": rank, "up_proj": rank} for name, rank in (("large", 60), ("small", 2))}
    large, small = (random_adapter(weights.spec, held, name=name) for name, held in ranks.items())
    for adapters in ([large] * 3, [small, None, small]):
        executor.arena.fill_(0xFF)
        found = run(EagerExecutor(weights, **LIMITS), adapters), run(executor, adapters)
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_without_the_adapter_are_spared_its_infinities(
    weights: HFWeights, executor: CudaExecutor
) -> None:
    executor.arena.fill_(0xFF)
    wild = random_adapter(weights.spec, {"q_proj": 4, "o_proj": 4}, name="wild")
    for layer in wild.layers:
        for delta in layer.values():
            delta.b.fill_(torch.inf)
    expected = run(executor, [None, None, None])
    got = run(executor, [None, wild, wild])
    assert held(executor) == wild.digest
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)


def step(executor: CudaExecutor, adapters: list[AdapterWeights]) -> None:
    """One token of a sequence with each."""
    driver = Driver(executor)
    seqs = [driver.add([1], adapter) for adapter in adapters]
    driver.run(seqs, [])


def test_what_the_columns_cannot_hold_is_added_as_ever(weights: HFWeights, executor: CudaExecutor) -> None:
    wide = random_adapter(weights.spec, dict.fromkeys(("q_proj", "k_proj", "v_proj"), 43), name="wide")
    long = random_adapter(weights.spec, {"o_proj": 65}, name="long")
    scaled = random_adapter(weights.spec, {"q_proj": 4}, dense=True, name="scaled")
    one, other = (random_adapter(weights.spec, {"q_proj": 4}, name=name) for name in ("one", "other"))
    executor.arena.fill_(0xFF)
    step(executor, [one])
    for adapters in ([wide], [long], [scaled], [other, wide]):
        step(executor, adapters)
        assert held(executor) == one.digest


def test_graphs_carry_whichever_adapter_a_step_has(weights: HFWeights) -> None:
    graphed = CudaExecutor(weights, **LIMITS, device=DEVICE, max_num_logits=96)
    graphed.arena.fill_(0xFF)
    mixed = graphed._mixed_graphs = Replays([8, 16], graphed._run_mixed)
    decode = graphed._graphs = Replays([3], graphed._run_decode)
    one, other = (random_adapter(weights.spec, {"q_proj": 4, "down_proj": 9}, seed=i) for i in range(2))
    for adapters in ([None, one, one], [other, None, other]):
        found = []
        for executor in (EagerExecutor(weights, **LIMITS), graphed):
            driver = Driver(executor)
            seqs = [driver.add(random_tokens(5, seed=i), adapter) for i, adapter in enumerate(adapters)]
            found.append(driver.run(seqs, [[4, 2, 4], [0, 2, 0], [1, 1, 1]]))
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)
    carries = Variant.CARRIED | Variant.SHARED
    assert mixed.replayed == [(16, carries), (8, carries), (16, carries), (8, Variant.SHARED)]
    assert decode.replayed == [(3, Variant.CARRIED)] * 2


def test_graphs_of_any_size_are_for_adapters_of_any_rank(
    weights: HFWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `silu_mul` leaves is for few rows of A, and which adapter comes is not known at capture."""
    monkeypatch.setattr(cuda_carried, "SILU_ROWS", 1)
    left: list[int] = []
    silu_mul = Carrier.silu_mul

    def told(self: Carrier, layer: int, *given: Any) -> None:
        left.append(layer)
        silu_mul(self, layer, *given)

    monkeypatch.setattr(Carrier, "silu_mul", told)
    executor = CudaExecutor(weights, **LIMITS | {"dtype": "float16"}, device=DEVICE)
    executor.arena.fill_(0)
    adapter = random_adapter(weights.spec, {"down_proj": 5}, name="few rows of A")
    step(executor, [adapter])
    assert held(executor) == adapter.digest
    assert left == list(range(weights.spec.num_layers))
    left.clear()
    executor._graphs = Replays([2], executor._run_decode)
    step(executor, [adapter])
    assert left == []


def test_columns_that_were_not_filled_hold_no_adapter(
    weights: HFWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = CudaExecutor(weights, **LIMITS, device=DEVICE, max_num_logits=96)
    executor.arena.fill_(0xFF)
    adapter = random_adapter(weights.spec, {"q_proj": 4, "down_proj": 4}, name="late")
    with monkeypatch.context() as patch:
        patch.setattr(cuda_carried, "_record", Failing(cuda_carried._record))
        with pytest.raises(MemoryError):
            step(executor, [adapter])
    assert held(executor) is None
    step(executor, [adapter])
    assert held(executor) == adapter.digest


class Failing:
    """A function whose second call fails."""

    def __init__(self, function: Any) -> None:
        self._function, self._num_calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self._num_calls += 1
        if self._num_calls == 2:
            raise MemoryError
        return self._function(*args)


def test_few_rows_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "MIN_ROWS", 96)
    assert carried.pays(256, 96)
    assert not carried.pays(95, 95)
    assert carried.pays(8192, 2048)
    assert not carried.pays(8192, 2047)
