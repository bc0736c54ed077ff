"""BatchLLM's micro-benchmark: groups that share a long prefix, shuffled, all there at once. No torch.

Source: BatchLLM (Zheng et al. 2025), the context-sharing test: 6,400 prompts in groups of 16, a shared
prefix of 2,000 tokens, 200 private ones, 100 forced output tokens, order shuffled with seed 42.
"""

from __future__ import annotations

import random

from polybatch.errors import ConfigError
from polybatch.scheduling.policies import BATCH_PRIORITY
from polybatch.simulate.traces import Trace, TraceRequest


def batchllm(
    *,
    seed: int = 42,
    num_requests: int = 6400,
    group_size: int = 16,
    prefix_tokens: int = 2000,
    private_tokens: int = 200,
    output_tokens: int = 100,
) -> Trace:
    """num_requests prompts, the last group perhaps smaller. Raises ConfigError for a size below 1."""
    sizes = (num_requests, group_size, prefix_tokens, private_tokens, output_tokens)
    if min(sizes) < 1 or private_tokens > prefix_tokens:
        raise ConfigError(
            f"sizes are {sizes}; all must be at least 1, and private_tokens at most prefix_tokens"
        )
    order = list(range(num_requests))
    random.Random(seed).shuffle(order)
    return Trace(
        "batchllm",
        tuple(
            TraceRequest(
                request_id=f"batchllm-{i}",
                arrival_s=0.0,
                num_input=prefix_tokens + private_tokens,
                num_output=output_tokens,
                # A block is as long as the prefix: the first is the group's, the second the request's own.
                blocks=(i // group_size, num_requests + i),
                block_tokens=prefix_tokens,
                max_tokens=output_tokens,
                priority=BATCH_PRIORITY,
            )
            for i in order
        ),
    )
