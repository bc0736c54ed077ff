"""What the sampler keeps for one sequence: its parameters ready for use, and token counts.

Counts are brought up to date from the sequence's new tokens each time it samples, so a step costs
the tokens it added and not the length of the history. Preemption changes nothing here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polybatch.request import Sequence
from polybatch.sampling.random import stream
from polybatch.structured.grammar import Matcher

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow."""


class TokenCounts:
    """Distinct tokens seen so far and how often each was output; append-only arrays."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._outputs = np.zeros(64, dtype=np.float32)

    def add(self, token: int, is_output: bool) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.resize(self._ids, 2 * slot)
            self._outputs = np.concatenate([self._outputs, np.zeros(slot, dtype=np.float32)])
        self._ids[slot] = token
        self._outputs[slot] += is_output

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return self._ids[: len(self._slots)]

    @property
    def outputs(self) -> npt.NDArray[np.float32]:
        return self._outputs[: len(self._slots)]


class SamplingState:
    """One sequence as the sampler sees it. Create it once per sequence, drop it when that ends.

    is_plain: the best raw logit is the token and nothing else is asked, now and later.
    matcher: where the output must follow a grammar, this sequence's own.
    """

    __slots__ = ("_num_counted", "counts", "edits", "has_penalty", "is_greedy", "is_plain", "key",
                 "matcher", "params", "seq")  # fmt: skip

    def __init__(self, seq: Sequence, matcher: Matcher | None = None) -> None:
        params = seq.request.params
        self.seq = seq
        self.params = params
        self.matcher = matcher
        self.key = stream(seq.request.seed, seq.index)
        self.is_greedy = params.temperature < GREEDY_BELOW
        self.has_penalty = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        self.edits = (
            self.has_penalty or bool(params.logit_bias) or params.min_tokens > 0 or matcher is not None
        )
        self.is_plain = self.is_greedy and not self.edits and params.logprobs is None
        self.counts = TokenCounts()
        # Only the repetition penalty looks at the prompt.
        self._num_counted = 0 if params.repetition_penalty != 1.0 else seq.num_prompt

    def count_new_tokens(self) -> TokenCounts:
        """Counts of all tokens of the sequence; adds those that came since the last call."""
        seq = self.seq
        for position in range(self._num_counted, len(seq.tokens)):
            self.counts.add(seq.tokens[position], position >= seq.num_prompt)
        self._num_counted = len(seq.tokens)
        return self.counts

    @property
    def masked_ids(self) -> frozenset[int]:
        """Tokens that may not come yet: those that would stop before min_tokens."""
        if self.seq.num_output < self.params.min_tokens:
            return self.seq.request.stop_token_ids
        return frozenset()
