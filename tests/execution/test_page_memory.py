"""The arena's bytes: pages hold what they must, and views of one page never reach another."""

import pytest
import torch
from helpers import HFWeights, tiny_model

from polybatch.config import PoolSpec
from polybatch.execution.page_memory import TORCH_DTYPES, PageMemory, page_bytes


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_a_page_holds_its_tokens_and_the_longest_row_of_the_model(name, page_size, dtype):
    spec = HFWeights(tiny_model(name)).spec
    size, itemsize = page_bytes(spec, page_size, dtype), TORCH_DTYPES[dtype].itemsize
    kv_bytes = 2 * page_size * spec.kv_size * itemsize
    row_bytes = max(spec.hidden_size, spec.intermediate_size, spec.q_size) * itemsize
    assert size % 64 == 0
    assert max(kv_bytes, row_bytes) <= size < max(kv_bytes, row_bytes) + 64


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_views_write_only_their_own_page_and_layer(dtype):
    spec = HFWeights(tiny_model("mistral")).spec
    pool = PoolSpec(5, 3, page_bytes(spec, 3, dtype), spec.num_layers)
    memory = PageMemory(spec, pool, dtype)
    memory.arena.fill_(7)
    memory.kv(1)[2] = 1.0
    changed = (memory.arena != 7).any(dim=2)
    assert changed.nonzero().tolist() == [[1, 2]]
    elements = pool.page_bytes // TORCH_DTYPES[dtype].itemsize
    start = 2 * elements
    assert torch.equal(
        memory.rows(1)[start : start + spec.kv_size], torch.ones(spec.kv_size).to(memory.dtype)
    )
    memory.copy_page(2, 4)
    assert torch.equal(memory.arena[:, 4], memory.arena[:, 2])
    assert bool((memory.arena[:, [0, 1, 3]] == 7).all())
