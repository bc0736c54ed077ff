"""Row-wise operations against torch's own, with ties and odd sizes."""

from __future__ import annotations

import pytest
import torch
from sampling_helpers import random_logits

from polybatch.sampling import rows


@pytest.mark.parametrize("vocab", [1, 7, 64, 65, 500, 4099])
@pytest.mark.parametrize("k", [1, 3, 20, 64])
def test_top_candidates_are_sorted_with_ties_by_lower_id(vocab: int, k: int) -> None:
    # Few distinct values, both zeros and an infinity: ties everywhere, at the cut as well.
    logits = (random_logits(5, vocab, k) * 0.7).round()
    logits[:, :: max(1, vocab // 3)] = -torch.inf
    values, ids = rows.top_candidates(logits, k)
    expected = (logits + 0.0).sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, expected.indices[:, :k])
    assert torch.equal(values, expected.values[:, :k])


def test_argmax_takes_the_first_of_ties_and_shows_nan() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, float("nan"), 9.0]])
    values, ids = rows.argmax(logits)
    assert ids.tolist() == [1, 1]
    assert values[0] == 3.0
    assert values[1].isnan()


def test_log_normalizer_is_logsumexp() -> None:
    logits = random_logits(9, 5000)
    logits[:, ::2] = -torch.inf
    torch.testing.assert_close(rows.log_normalizer(logits), logits.logsumexp(1), atol=1e-5, rtol=0)


def test_sample_from_hits_each_weight_in_proportion_and_never_a_zero() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]], dtype=torch.float64).expand(4, -1)
    numbers = torch.tensor([0.0, 0.2499, 0.25, 1 - 2.0**-53], dtype=torch.float64)
    assert rows.sample_from(weights, numbers).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("vocab", [5, 64, 130, 3000])
def test_sample_softmax_inverts_the_distribution_function(vocab: int) -> None:
    logits = random_logits(1, vocab, 3).expand(401, -1).contiguous()
    numbers = torch.linspace(0, 1, 402, dtype=torch.float64)[:-1]
    found = rows.sample_softmax(logits, numbers)
    sums = logits[0].double().softmax(0).cumsum(0)
    low, high = sums[found] - logits[0].double().softmax(0)[found], sums[found]
    assert (numbers >= low - 1e-6).all()
    assert (numbers <= high + 1e-6).all()
