"""The GPU's workloads as token-id requests: G1, G3, G4, G5, decode batches and timed traffic. No torch.

    G1         plain            256 requests, 128-512 in, 128 out
    G3         prefill          128 requests, 512 in, 1 out
    G4         shared prefix    256 requests, 2048 in common + 64 of their own, 64 out
    G5-1       as G1, every request with the same LoRA of rank 16
    G5-8       as G1, 8 LoRAs of rank 16 in turn
    G5-64      as G1, 64 LoRAs of rank 16 in turn
    G5-64zipf  as G1, 64 LoRAs of rank 16 with Zipf popularity (s = 1)
    G5-half    as G5-64, but every second request has none

`decode` gives the equal requests of which two runs of different lengths tell a decode step's time. `traffic`
gives requests with arrival times as in S-LoRA's experiments (Sheng et al. 2023, section 7, setting S2).
As for `polybatch.bench.workloads`, token ids are drawn anew for every run and nothing else depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from polybatch.bench.workloads import BenchRequest, Workload
from polybatch.errors import ConfigError

ADAPTER_RANK = 16
TRAFFIC_RANKS = (64, 32, 16, 8)
TRAFFIC_TOKENS = (8, 512)
DECODE_INPUT_TOKENS = 448
DECODE_OUTPUT_TOKENS = (32, 96)
MIXES = ("1", "8", "64", "64zipf", "half")

FIRST_TOKEN_ID = 100
"""The lowest ids, where special tokens often are, are left out."""


@dataclass(frozen=True, slots=True)
class _Shape:
    num_requests: int
    input_tokens: tuple[int, int]
    output_tokens: int
    prefix_tokens: int = 0
    mix: str | None = None


_SHAPES = {
    "G1": _Shape(256, (128, 512), 128),
    "G3": _Shape(128, (512, 512), 1),
    "G4": _Shape(256, (64, 64), 64, prefix_tokens=2048),
} | {f"G5-{mix}": _Shape(256, (128, 512), 128, mix=mix) for mix in MIXES}
NAMES = tuple(_SHAPES)


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """A request and when it arrives, in seconds from the start."""

    at_s: float
    request: BenchRequest


def make(name: str, run: int = 0, vocab_size: int = 128256, shrink: int = 1) -> Workload:
    """The requests of a workload for one run.

    run: index that the token ids depend on, and nothing else does. shrink: divides the number of requests
    and their lengths, for trials on small machines. Raises ConfigError for an unknown name.
    """
    if name not in _SHAPES:
        raise ConfigError(f"workload is {name!r}; it must be one of {', '.join(NAMES)}")
    shape = _SHAPES[name]
    low, high = (max(1, n // shrink) for n in shape.input_tokens)
    count = max(1, shape.num_requests // shrink)
    lengths = np.random.default_rng(0).integers(low, high, count, endpoint=True)
    tokens = _Tokens(run, vocab_size)
    prefix = tokens.draw(shape.prefix_tokens // shrink)
    adapters, chosen = assign(shape.mix, count)
    output_tokens = max(1, shape.output_tokens // shrink)
    requests = tuple(
        BenchRequest(prefix + tokens.draw(int(length)), output_tokens, adapter)
        for length, adapter in zip(lengths, chosen, strict=True)
    )
    return Workload(name, requests, adapters, len(prefix))


def decode(
    batch: int,
    output_tokens: int,
    run: int = 0,
    vocab_size: int = 128256,
    mix: str | None = None,
    input_tokens: int = DECODE_INPUT_TOKENS,
) -> Workload:
    """`batch` requests of equal lengths; mix: which adapters they have, one of MIXES or None."""
    tokens = _Tokens(run, vocab_size)
    adapters, chosen = assign(mix, batch)
    requests = tuple(BenchRequest(tokens.draw(input_tokens), output_tokens, name) for name in chosen)
    return Workload(f"decode-{mix or 'plain'}-{batch}", requests, adapters)


def assign(mix: str | None, count: int) -> tuple[dict[str, int], list[str | None]]:
    """Ranks by adapter name, and which adapter each of `count` requests uses."""
    if mix is None:
        return {}, [None] * count
    names = [f"lora-{i:02d}" for i in range({"1": 1, "8": 8}.get(mix, 64))]
    chosen: list[str | None] = [names[i % len(names)] for i in range(count)]
    if mix == "64zipf":
        weights = np.array(list(accumulate(1 / (i + 1) for i in range(len(names)))))
        drawn = np.searchsorted(weights / weights[-1], np.random.default_rng(5).random(count), side="right")
        chosen = [names[i] for i in drawn]
    if mix == "half":
        # Adapters go on in turn among those that have one, so that as many differ as there can be.
        chosen = [names[i // 2 % len(names)] if i % 2 else None for i in range(count)]
    return dict.fromkeys(names, ADAPTER_RANK), chosen


def traffic_adapters(num_adapters: int) -> dict[str, int]:
    """Ranks by name of the adapters of `traffic`: 64, 32, 16, 8 in turn."""
    return {f"s2-{i:04d}": TRAFFIC_RANKS[i % len(TRAFFIC_RANKS)] for i in range(num_adapters)}


def traffic(
    num_adapters: int,
    rate: float,
    duration_s: float,
    *,
    run: int = 0,
    vocab_size: int = 128256,
    seed: int = 42,
    alpha: float = 1.0,
    cv: float = 1.0,
    tokens: tuple[int, int] = TRAFFIC_TOKENS,
) -> list[TimedRequest]:
    """rate * duration_s requests: Gamma inter-arrival times, adapters by a power law, uniform lengths.

    rate: requests per second. cv: coefficient of variation of the inter-arrival times, 1 being Poisson.
    alpha: adapter floor(n * U) with U of density alpha * u**(alpha - 1); 1, the setting of the experiments,
    is uniform popularity, under which no cache can guess, and less is more skewed.
    tokens: lengths of inputs and of outputs are drawn from [first, second). run: as for `make`.
    """
    rng = np.random.default_rng(seed)
    count = max(1, int(rate * duration_s))
    names = list(traffic_adapters(num_adapters))
    chosen = (num_adapters * rng.power(alpha, count)).astype(int)
    inputs, outputs = rng.integers(*tokens, count), rng.integers(*tokens, count)
    arrivals = np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, count))
    drawn = _Tokens(run, vocab_size)
    return [
        TimedRequest(float(at), BenchRequest(drawn.draw(int(length)), int(output), names[adapter]))
        for at, length, output, adapter in zip(arrivals, inputs, outputs, chosen, strict=True)
    ]


class _Tokens:
    """Random token ids of one run, drawn in one stream."""

    def __init__(self, run: int, vocab_size: int) -> None:
        self._rng = np.random.default_rng(1000 + run)
        self._low = min(FIRST_TOKEN_ID, vocab_size // 2)
        # Llama 3 keeps its special tokens at the end of the vocabulary.
        self._high = vocab_size - 256 if vocab_size > 100_000 else vocab_size

    def draw(self, length: int) -> tuple[int, ...]:
        drawn: list[int] = self._rng.integers(self._low, self._high, length).tolist()
        return tuple(drawn)
