"""A stub model for tests of everything around a model: deterministic, instant, without weights.

Its logits are pseudo-random numbers keyed by (adapter digest, token history). The history is not
read from the sequence but from the page pool, where every slot holds a rolling hash of the tokens
up to its position: a wrong page, a prefix shared across adapters, a missing copy or a page freed
too early changes the output, as it would in a real model. Adapter pages are marked when loaded and
checked when used. `ByteTokenizer` and `FakeAdapters` go with it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from polybatch.adapters.weights import AdapterWeights, ModuleDelta
from polybatch.config import ModelSpec, PoolSpec, RopeSpec
from polybatch.errors import EngineError, RequestError
from polybatch.request import AdapterRef
from polybatch.request import Sequence as RunningSequence
from polybatch.sampling.random import GOLDEN, MASK, mix, mix_array
from polybatch.sampling.sampler import Sampled, Sampler
from polybatch.sampling.state import SamplingState
from polybatch.scheduling.plan import PENDING, Chunk, LogitRows, StepPlan

LOGIT_RANGE = 8.0


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def fake_spec(vocab_size: int = 258, eos_token_ids: tuple[int, ...] = (256,)) -> ModelSpec:
    """Spec of a stub model; only the vocabulary and the end-of-sequence ids mean anything."""
    return ModelSpec(
        family="fake", vocab_size=vocab_size, hidden_size=2, intermediate_size=2, num_layers=1,
        num_heads=1, num_kv_heads=1, head_dim=2, max_position=1 << 20, rms_norm_eps=1e-5,
        rope=RopeSpec(), eos_token_ids=eos_token_ids,
    )  # fmt: skip


class FakeExecutor:
    """An `Executor` without a model. pool: default 1,024 pages of 16 tokens."""

    def __init__(
        self,
        vocab_size: int = 258,
        pool: PoolSpec | None = None,
        eos_token_ids: tuple[int, ...] = (256,),
    ) -> None:
        self.spec = fake_spec(vocab_size, eos_token_ids)
        self.pool = pool or PoolSpec(num_pages=1024, page_size=16, page_bytes=16 * 8, num_layers=1)
        # Fresh memory is garbage, so that reading a slot nobody wrote shows.
        garbage = np.arange(self.pool.num_pages * self.pool.page_size, dtype=np.uint64)
        self._pages = mix_array(garbage).reshape(self.pool.num_pages, self.pool.page_size)
        self._columns = np.arange(vocab_size, dtype=np.uint64) * np.uint64(GOLDEN)
        self.num_steps = 0
        self.num_tokens = 0

    def adapter_pages(self, weights: AdapterWeights) -> int:
        ranks = sum(delta.rank for layer in weights.layers for delta in layer.values())
        return max(1, -(-ranks // self.pool.page_size))

    def forward(self, plan: StepPlan, adapters: Mapping[str, AdapterWeights]) -> torch.Tensor:
        """See `Executor.forward`. Raises EngineError if an adapter's pages were overwritten."""
        for load in plan.loads:
            if load.adapter.digest not in adapters:
                raise EngineError(f"the plan loads adapter {load.adapter.name!r} without host weights")
            for i, page in enumerate(load.pages):
                self._pages[page] = self._mark(load.adapter.digest, i)
        for copy in plan.copies:
            self._pages[copy.dst] = self._pages[copy.src]
        states: list[int] = []
        for chunk in plan.chunks:
            if chunk.seq.adapter is not None:
                self._check_resident(chunk.seq.adapter.digest, plan)
            states += self._run(chunk)
        self.num_steps += 1
        self.num_tokens += plan.num_tokens
        rows = np.array(states, dtype=np.uint64)[:, None] + self._columns
        logits = (mix_array(rows) >> np.uint64(40)).astype(np.float32) * np.float32(LOGIT_RANGE * 2.0**-24)
        return torch.from_numpy(logits)

    def _run(self, chunk: Chunk) -> list[int]:
        """Extend the rolling hash over a chunk; returns its states at the rows that need logits."""
        seq, size = chunk.seq, self.pool.page_size
        if chunk.start == 0:
            state = _hash_text(seq.adapter.digest if seq.adapter else "")
        else:
            last = chunk.start - 1
            state = int(self._pages[seq.pages[last // size], last % size])
        states = []
        for position in range(chunk.start, chunk.start + chunk.n_new):
            state = mix((state ^ (self._token(seq, position) * GOLDEN)) & MASK)
            self._pages[seq.pages[position // size], position % size] = state
            states.append(state)
        if chunk.logits is LogitRows.ALL:
            return states
        return states[-1:] if chunk.logits is LogitRows.LAST else []

    def _token(self, seq: RunningSequence, position: int) -> int:
        return seq.tokens[position]

    def _mark(self, digest: str, index: int) -> np.uint64:
        return np.uint64(mix(_hash_text(digest) ^ index))

    def _check_resident(self, digest: str, plan: StepPlan) -> None:
        pages = plan.resident.get(digest, ())
        if not pages:
            raise EngineError(f"adapter {digest[:12]} has a chunk but is not resident")
        for i, page in enumerate(pages):
            if (self._pages[page] != self._mark(digest, i)).any():
                raise EngineError(f"page {page} of adapter {digest[:12]} was overwritten")

    def release(self, seq: RunningSequence) -> None:
        seq.row = None

    def describe(self) -> dict[str, str]:
        return {"model": "stub, pseudo-random logits"}

    def close(self) -> None:
        """Nothing to stop."""


class FakeAheadExecutor(FakeExecutor):
    """A stub device that samples by itself and keeps its tokens for the step after; an `AheadExecutor`."""

    def __init__(self, *args: Any, max_num_seqs: int = 64, **options: Any) -> None:
        super().__init__(*args, **options)
        self._max_rows = max_num_seqs
        self._rows = list(range(max_num_seqs))
        self._sampler = Sampler(self.spec.vocab_size)
        self._newest: dict[RunningSequence, int] = {}
        self.num_launches = 0

    def can_sample(self, state: SamplingState) -> bool:
        return not state.edits and state.params.logprobs is None

    def launch(
        self,
        plan: StepPlan,
        adapters: Mapping[str, AdapterWeights],
        rows: Sequence[int],
        states: Sequence[SamplingState],
    ) -> FakeLaunch:
        """See `AheadExecutor.launch`."""
        self.num_launches += 1
        for chunk in plan.chunks:
            if chunk.seq.row is None:
                if not self._rows:
                    raise EngineError(f"more than {self._max_rows} sequences run at once")
                chunk.seq.row = self._rows.pop()
        sampled = self._sampler.sample(self.forward(plan, adapters)[list(rows)], states)
        self._newest = {state.seq: token for state, token in zip(states, sampled.tokens, strict=True)}
        return FakeLaunch(sampled)

    def release(self, seq: RunningSequence) -> None:
        if seq.row is not None:
            self._rows.append(seq.row)
            seq.row = None

    def _token(self, seq: RunningSequence, position: int) -> int:
        token = seq.tokens[position]
        return self._newest[seq] if token == PENDING else token


class FakeLaunch:
    """A step of the stub device, done before it is asked for."""

    def __init__(self, sampled: Sampled) -> None:
        self._sampled = sampled

    def sampled(self) -> Sampled:
        return self._sampled


class ByteTokenizer:
    """UTF-8 bytes as token ids 0-255; 256 ends a sequence, 257 is special too."""

    vocab_size = 258
    eos_token_id = 256
    bos_token_id: int | None = None
    all_special_ids: frozenset[int] = frozenset((256, 257))
    byte_scheme = "byte_level"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD, as in byte-level tokenizers."""
        parts: list[str] = []
        plain = bytearray()
        for token in token_ids:
            if token < 256:
                plain.append(token)
            elif not skip_special_tokens:
                parts.append(plain.decode(errors="replace") + self.token_text(token))
                plain.clear()
        return "".join(parts) + plain.decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        """Text of one token alone, special ones by name."""
        if token_id < 256:
            return bytes([token_id]).decode(errors="replace")
        return "<eos>" if token_id == 256 else "<bos>"

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else self.token_text(token_id).encode()

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """A line "role: content" per message, then "assistant:"."""
        lines = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return lines + "assistant:" if add_generation_prompt else lines


class FakeAdapters:
    """Registered stub adapters: `add(name)` makes one whose content follows from (name, version)."""

    def __init__(self, executor: FakeExecutor) -> None:
        self._executor = executor
        self._refs: dict[str, AdapterRef] = {}
        self._weights: dict[str, AdapterWeights] = {}
        self.held: Counter[str] = Counter()

    def add(self, name: str, rank: int = 4, version: int = 0) -> AdapterRef:
        delta = ModuleDelta(torch.ones(rank, 2), torch.ones(rank, 2))
        digest = hashlib.sha256(f"{name}/{version}".encode()).hexdigest()
        weights = AdapterWeights(digest, ({"q_proj": delta},))
        self._weights[digest] = weights
        self._refs[name] = AdapterRef(name, digest, self._executor.adapter_pages(weights))
        return self._refs[name]

    def get(self, name: str) -> AdapterRef:
        if name not in self._refs:
            raise RequestError(f"adapter {name!r} is unknown; known are {list(self._refs)}", field="adapter")
        return self._refs[name]

    def mix(self, ref: AdapterRef) -> AdapterRef:
        parts = [self._weights[digest].layers[0]["q_proj"] for digest, _ in ref.parts]
        delta = ModuleDelta(torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts]))
        weights = self._weights[ref.digest] = AdapterWeights(ref.digest, ({"q_proj": delta},))
        return replace(ref, num_pages=self._executor.adapter_pages(weights))

    def weights(self, digest: str) -> AdapterWeights:
        return self._weights[digest]

    def hold(self, digest: str) -> None:
        self.held[digest] += 1

    def release(self, digest: str) -> None:
        self.held[digest] -= 1
