"""The standard workloads W1 to W5 as lists of token-id requests, the same for every engine. No torch.

Decoding is greedy, end-of-sequence is ignored and output lengths are forced, so that all engines do the
same work. Lengths and adapters of a workload never change; token ids are drawn anew for every run, so that
no prefix cache can profit from an earlier run.

    W1      single stream      1 request,   128 in,                         128 out
    W2      offline batch     64 requests,  32-256 in,                       64 out
    W3      shared prefix     64 requests,  512 in common + 16-48 of its own, 32 out
    W4      many adapters     64 requests,  64 in, 32 out; 16 LoRAs of rank 8 in turn
    W4base  as W4 without adapters: what the adapters cost
    W5      mixed ranks       64 requests,  32-256 in, 64 out; 48 LoRAs of ranks 4, 8, 16, 64 with
                              Zipf popularity (s = 1); every third request has none
    W5base  as W5 without adapters
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from polybatch.errors import ConfigError

NUM_REQUESTS = 64
SHARED_PREFIX_TOKENS = 512
W5_RANKS = (4, 8, 16, 64)

SANITY_PROMPT = (504, 3575, 282, 4649, 314)
"""SmolLM2's tokens of "The capital of France is"."""
SANITY_NEXT = 7042
"""SmolLM2's token of " Paris", which every engine must choose after SANITY_PROMPT."""
SANITY_VOCAB_SIZE = 49152


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request of a workload. adapter: a key of the workload's `adapters`, or None for the base."""

    token_ids: tuple[int, ...]
    max_tokens: int
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """A named set of requests.

    adapters: name -> rank of every registered LoRA, whether a request uses it or not.
    shared_prefix_tokens: leading tokens that all requests have in common.
    is_stream: a single request whose tokens are timed one by one.
    """

    name: str
    requests: tuple[BenchRequest, ...]
    adapters: Mapping[str, int] = field(default_factory=dict)
    shared_prefix_tokens: int = 0
    is_stream: bool = False

    @property
    def num_input_tokens(self) -> int:
        return sum(len(request.token_ids) for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        return sum(request.max_tokens for request in self.requests)

    @property
    def max_model_len(self) -> int:
        """The longest prompt with its output, rounded up to whole pages of any usual size, in tokens."""
        longest = max(len(request.token_ids) + request.max_tokens for request in self.requests)
        return -(-longest // 64) * 64

    def head(self, num_requests: int) -> Workload:
        """The first requests alone, for warming up."""
        return Workload(
            self.name, self.requests[:num_requests], self.adapters, self.shared_prefix_tokens, self.is_stream
        )


@dataclass(frozen=True, slots=True)
class _Shape:
    input_tokens: tuple[int, int]
    max_tokens: int
    num_requests: int = NUM_REQUESTS
    prefix_tokens: int = 0
    adapters: str | None = None
    is_stream: bool = False


_SHAPES = {
    "W1": _Shape((128, 128), 128, num_requests=1, is_stream=True),
    "W2": _Shape((32, 256), 64),
    "W3": _Shape((16, 48), 32, prefix_tokens=SHARED_PREFIX_TOKENS),
    "W4": _Shape((64, 64), 32, adapters="round_robin"),
    "W4base": _Shape((64, 64), 32),
    "W5": _Shape((32, 256), 64, adapters="zipf"),
    "W5base": _Shape((32, 256), 64),
}
NAMES = tuple(_SHAPES)


def make(
    name: str, run: int = 0, vocab_size: int = SANITY_VOCAB_SIZE, num_requests: int | None = None
) -> Workload:
    """The requests of a workload for one run; equal arguments give equal requests.

    run: index that the token ids depend on, and nothing else does.
    vocab_size: token ids stay below it; the lowest, where special tokens usually are, are left out.
    num_requests: fewer (or more) requests than the workload's own number, for trials; a stream stays one.
    Raises ConfigError for an unknown name.
    """
    shape = _SHAPES.get(name)
    if shape is None:
        raise ConfigError(f"workload is {name!r}; it must be one of {', '.join(NAMES)}")
    lengths = random.Random(0)
    tokens = random.Random(1000 + run)
    low, high = min(100, vocab_size // 2), min(49000, vocab_size)
    count = shape.num_requests if num_requests is None or shape.is_stream else num_requests

    def draw(length: int) -> tuple[int, ...]:
        return tuple(tokens.randrange(low, high) for _ in range(length))

    prefix = draw(shape.prefix_tokens)
    adapters, chosen = _assign(shape.adapters, count)
    requests = tuple(
        BenchRequest(prefix + draw(lengths.randint(*shape.input_tokens)), shape.max_tokens, chosen[i])
        for i in range(count)
    )
    return Workload(name, requests, adapters, shape.prefix_tokens, shape.is_stream)


def _assign(kind: str | None, count: int) -> tuple[dict[str, int], list[str | None]]:
    """Adapters by name -> rank, and which of them each request uses."""
    if kind is None:
        return {}, [None] * count
    if kind == "round_robin":
        ranks = {f"r8-{i:02d}": 8 for i in range(16)}
        names = list(ranks)
        return ranks, [names[i % len(names)] for i in range(count)]
    ranks = {f"mixed-{i:02d}": W5_RANKS[i % len(W5_RANKS)] for i in range(48)}
    names = list(ranks)
    popularity = list(accumulate(1 / (i + 1) for i in range(len(names))))
    choice = random.Random(5)
    drawn = choice.choices(names, cum_weights=popularity, k=count)
    return ranks, [None if i % 3 == 2 else drawn[i] for i in range(count)]
