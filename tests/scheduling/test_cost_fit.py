"""A fit finds the model behind its steps, whatever a few of them say."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.errors import ConfigError
from polybatch.scheduling.cost_fit import Sample, fit, non_negative_least_squares, quantile, relative_errors
from polybatch.scheduling.costs import CostModel, StepShape

TRUTH = CostModel(
    base=0.004, per_token=1e-4, hinge=64, per_token_beyond=2e-4, per_context=1e-6, per_pair=2e-7,
    per_head=5e-4, per_logit=5e-5, per_adapter_page=1e-5, per_adapter_work=1e-6, per_load_page=3e-5,
    per_mixed=1e-3,
)  # fmt: skip


def random_shape(rng: random.Random) -> StepShape:
    decodes, chunks = rng.randrange(0, 64), rng.choice((0, 0, 1, 3))
    tokens = sum(rng.randrange(2, 300) for _ in range(chunks))
    pages = rng.choice((0, 0, 50, 200))
    rows = max(1, decodes + tokens)
    return StepShape(
        num_tokens=rows, num_decodes=rows - tokens, num_prefill_tokens=tokens, num_prefills=chunks,
        decode_context=(rows - tokens) * rng.randrange(1, 2000), prefill_pairs=tokens * rng.randrange(1, 400),
        prefill_context=tokens, num_logits=rows - tokens, num_adapters=pages // 50, adapter_pages=pages,
        adapter_tokens=rows if pages else 0, adapter_work=50 * rows if pages else 0,
        load_pages=rng.choice((0, 0, 0, 40)),
    )  # fmt: skip


def samples(seed: int, count: int, noise: float = 0.0) -> list[Sample]:
    rng = random.Random(seed)
    shapes = [random_shape(rng) for _ in range(count)]
    return [Sample(shape, TRUTH.predict(shape) * (1 + noise * rng.uniform(-1, 1))) for shape in shapes]


def test_an_exact_model_is_found_with_its_hinge() -> None:
    model = fit(samples(0, 120))
    assert model.hinge == TRUTH.hinge
    assert max(relative_errors(model, samples(1, 50))) < 1e-3


def test_noise_is_averaged_away() -> None:
    errors = relative_errors(fit(samples(0, 120, noise=0.1)), samples(1, 50))
    assert quantile(errors, 0.95) < 0.06


def test_a_tenth_of_wild_outliers_changes_little() -> None:
    rng = random.Random(7)
    dirty = [
        Sample(s.shape, s.seconds * (rng.uniform(3, 8) if i % 10 == 0 else 1))
        for i, s in enumerate(samples(0, 120, noise=0.03))
    ]
    assert quantile(relative_errors(fit(dirty), samples(1, 50)), 0.95) < 0.1


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_least_squares_keep_the_optimality_conditions(seed: int) -> None:
    """Karush, Kuhn and Tucker's: no gradient at what is free, none that would help at what is bound."""
    rng = np.random.default_rng(seed)
    rows = rng.random((12, 5)) * 10.0 ** rng.integers(-3, 4, 5)
    rows[:, 2] *= rng.integers(0, 2)
    found = np.array(non_negative_least_squares(rows.tolist()))
    assert (found >= 0).all()
    scale = np.linalg.norm(rows, axis=0) + 1e-30
    gradient = rows.T @ (1 - rows @ found) / scale
    assert (gradient <= 1e-5).all()
    assert (np.abs(gradient[found > 0]) <= 1e-5).all()


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_a_prediction_never_shrinks_when_a_step_grows(seed: int) -> None:
    rng = random.Random(seed)
    model = fit([Sample(random_shape(rng), rng.uniform(0.001, 1)) for _ in range(30)], hinges=(32,))
    shape = random_shape(rng)
    small = StepShape(num_tokens=1, num_decodes=1, decode_context=1, num_logits=1)
    assert 0 <= model.predict(small) <= model.predict(
        StepShape(**{
            name: getattr(shape, name) + getattr(small, name) for name in StepShape.__slots__
        })
    )  # fmt: skip


@pytest.mark.parametrize("bad", [[], [Sample(StepShape(num_tokens=1), 0.0)]])
def test_nothing_to_fit_is_refused(bad: list[Sample]) -> None:
    with pytest.raises(ConfigError, match="measured steps"):
        fit(bad)


def test_quantiles_lie_between_neighbours() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 1.0], 0.95) == pytest.approx(0.95)
    assert quantile([], 0.5) == 0.0
