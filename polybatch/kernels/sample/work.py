"""What the host prepares for sampling on the device: five numbers per row, in arrays that are kept."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import numpy.typing as npt

from polybatch.sampling.random import uniforms
from polybatch.sampling.state import SamplingState

Array = npt.NDArray[Any]


def is_device_samplable(state: SamplingState) -> bool:
    """Whether the device can choose this row's tokens, now and later.

    Rows with penalties, bias, min_tokens or log-probabilities need the logits on the host's path.
    """
    return not state.edits and state.params.logprobs is None


def arrays(max_rows: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Arrays of `fill`: name -> (shape, dtype). The float64 ones want 8-byte alignment."""
    return {
        "temperature": ((max_rows,), np.float32),
        "top_k": ((max_rows,), np.int32),
        "top_p": ((max_rows,), np.float64),
        "min_p": ((max_rows,), np.float64),
        "uniform": ((max_rows,), np.float64),
    }


def fill(
    views: Mapping[str, Array],
    states: SequenceOf[SamplingState],
    positions: SequenceOf[int],
    vocab_size: int,
) -> bool:
    """Write the rows' parameters; rows beyond become greedy. Returns whether any row is truncated.

    states: one per row, all of them `is_device_samplable`. positions: of the token that each row chooses,
    which keys its random number; where a step is planned ahead, one more than the sequence's length.
    """
    count = len(states)
    temperature = views["temperature"]
    temperature[:] = 0.0
    drawn = [row for row, state in enumerate(states) if not state.is_greedy]
    if not drawn:
        return False
    params = [state.params for state in states]
    temperature[:count] = [0.0 if s.is_greedy else p.temperature for s, p in zip(states, params, strict=True)]
    top_k = np.array([p.top_k for p in params], dtype=np.int64)
    views["top_k"][:count] = np.where(top_k < vocab_size, top_k, 0)
    views["top_p"][:count] = [p.top_p for p in params]
    views["min_p"][:count] = [p.min_p for p in params]
    views["uniform"][:count] = uniforms([s.key for s in states], list(positions))
    return any(params[row].top_k or params[row].top_p < 1.0 or params[row].min_p > 0.0 for row in drawn)
