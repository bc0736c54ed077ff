"""What the CPU's executor promises beyond the contract: any number of threads, the same bits."""

import pytest
import torch
from helpers import Driver, HFWeights, random_adapter, random_tokens, tiny_model

from polybatch.errors import ConfigError
from polybatch.execution.cpu import CpuExecutor

LIMITS = {"num_pages": 64, "max_num_tokens": 64, "max_num_seqs": 4, "max_model_len": 64}


def logits_with(threads):
    executor = CpuExecutor(HFWeights(tiny_model("llama")), dtype="float32", threads=threads, **LIMITS)
    adapter = random_adapter(executor.spec, {"q_proj": 4, "v_proj": 4}, seed=11)
    driver = Driver(executor, seed=5)
    seqs = [driver.add(random_tokens(19, seed=1)), driver.add(random_tokens(7, seed=2), adapter)]
    logits = torch.cat(driver.run(seqs, [[9, 3], [1, 1]]))
    executor.close()
    executor.close()
    return logits


def test_one_thread_and_more_threads_than_processors_give_the_same_bits():
    assert torch.equal(logits_with(1), logits_with(3))


def test_fewer_than_one_thread_is_refused_at_the_door():
    with pytest.raises(ConfigError, match="threads is 0"):
        CpuExecutor(HFWeights(tiny_model("llama")), threads=0, **LIMITS)
