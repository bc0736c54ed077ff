"""Fits a `CostModel` to measured steps: coefficients that are not negative, least relative error. No NumPy.

The least squares are of (predicted - measured) / measured, so that a decode step of 2 ms counts as much as a
prefill of 2 s. Outliers, a step that had to wait for another program, get Huber's weights (1964) in a few
rounds. The hinge is searched. Some twenty unknowns and a hundred steps are so little that plain Python takes
about a second.
Source: Lawson and Hanson, "Solving Least Squares Problems" (1974), chapter 23, on the normal equations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import Any

from polybatch.errors import ConfigError
from polybatch.scheduling.costs import COEFFICIENTS, CostModel, StepCosts, StepShape, amounts

HINGES = tuple(sorted({base << power for base in (8, 12) for power in range(11)}))
"""Where the hinge is searched, in tokens."""

ROUNDS = 4
HUBER = 1.5
"""Residuals beyond so many typical ones count linearly."""

MIN_SCALE = 0.005
"""The least typical relative error that is believed; else a few perfect steps would decide alone."""

RIDGE = 1e-7
"""Against unknowns that the steps cannot tell apart."""

Row = Sequence[float]


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured step. seconds: the median over its repeats."""

    shape: StepShape
    seconds: float


def fit(
    samples: Sequence[Sample],
    row_sizes: tuple[int, ...] = (),
    mixed_sizes: tuple[int, ...] = (),
    *,
    hinges: Iterable[int] = HINGES,
) -> CostModel:
    """The cost model of these steps. row_sizes, mixed_sizes: see `CostModel`. hinges: to try.

    Raises ConfigError without steps, or for one that took no time.
    """
    if not samples or min(sample.seconds for sample in samples) <= 0:
        raise ConfigError("a cost model is fitted to measured steps; there are none, or one took no time")
    most = max(sample.shape.num_tokens for sample in samples)
    frames = [
        CostModel(0.0, hinge=n, row_sizes=row_sizes, mixed_sizes=mixed_sizes)
        for n in (most, *(n for n in hinges if n < most))
    ]
    best: tuple[float, CostModel] | None = None
    for frame in frames:
        model = _solved(samples, frame)
        loss = _loss(relative_errors(model, samples))
        # Another hinge has to be worth it.
        if best is None or loss < 0.98 * best[0]:
            best = loss, model
    assert best is not None
    return _solved(samples, best[1], ROUNDS)


def _solved(samples: Iterable[Sample], frame: CostModel, rounds: int = 0) -> CostModel:
    """The coefficients that go with a hinge."""
    padding = frame.row_sizes, frame.mixed_sizes
    rows = [
        [amount / sample.seconds for amount in amounts(sample.shape, frame.hinge, *padding)]
        for sample in samples
    ]
    found: dict[str, Any] = dict(zip(COEFFICIENTS, _robust(rows, rounds), strict=True))
    return replace(frame, **found)


def _robust(rows: Sequence[Row], rounds: int) -> list[float]:
    """Least squares, then some rounds of it with Huber's weights."""
    found = non_negative_least_squares(rows)
    for _ in range(rounds):
        residuals = [abs(_dot(row, found) - 1.0) for row in rows]
        # The median of absolute normal residuals is 0.6745 standard deviations.
        scale = max(MIN_SCALE, quantile(residuals, 0.5) / 0.6745)
        weights = [min(1.0, HUBER * scale / residual) if residual else 1.0 for residual in residuals]
        found = non_negative_least_squares(rows, weights)
    return found


def relative_errors(costs: StepCosts, samples: Iterable[Sample]) -> list[float]:
    """|predicted - measured| / measured of each step."""
    return [abs(costs.predict(sample.shape) / sample.seconds - 1.0) for sample in samples]


def quantile(values: Iterable[float], q: float) -> float:
    """The value below which a share q lies, straight between neighbours; 0 of none."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def non_negative_least_squares(rows: Sequence[Row], weights: Sequence[float] | None = None) -> list[float]:
    """x >= 0 that minimises sum of w * (row . x - 1)^2.

    Columns that are 0 in all rows get 0. Columns are scaled to length 1 first; amounts differ by a factor of
    a million.
    """
    weights = [1.0] * len(rows) if weights is None else weights
    n = len(rows[0])
    columns = list(zip(*rows, strict=True))
    scales = [sum(w * v * v for w, v in zip(weights, column, strict=True)) ** 0.5 for column in columns]
    used = [i for i in range(n) if scales[i] > 0]
    scaled = [[v / scales[i] for v in columns[i]] for i in used]
    weighted = [list(map(mul, weights, column)) for column in scaled]
    gram = [[_dot(a, b) for b in scaled] for a in weighted]
    for i in range(len(used)):
        gram[i][i] += RIDGE
    solved = _solve_non_negative(gram, [sum(column) for column in weighted])
    found = [0.0] * n
    for i, value in zip(used, solved, strict=True):
        found[i] = value / scales[i]
    return found


def _solve_non_negative(gram: Sequence[Row], moments: Row) -> list[float]:
    """x >= 0 that minimises x' G x / 2 - m' x, for a positive definite G."""
    n = len(moments)
    x = [0.0] * n
    free: list[int] = []
    # Each turn frees one unknown; the loop ends, as no set of free ones comes twice.
    for _ in range(3 * n):
        gradient = [moments[i] - _dot(gram[i], x) for i in range(n)]
        bound = [i for i in range(n) if i not in free and gradient[i] > 1e-9]
        if not bound:
            break
        free.append(max(bound, key=gradient.__getitem__))
        while True:
            solved = _solve([[gram[i][j] for j in free] for i in free], [moments[i] for i in free])
            if min(solved) > 0:
                break
            # Go towards the solution as far as all stay positive; who reaches 0 is bound again.
            step = min(
                x[i] / (x[i] - value) for i, value in zip(free, solved, strict=True) if value <= 0
            )  # fmt: skip
            for i, value in zip(free, solved, strict=True):
                x[i] += step * (value - x[i])
            gone = [i for i, value in zip(free, solved, strict=True) if value <= 0 and x[i] <= 1e-12]
            for i in gone:
                x[i] = 0.0
                free.remove(i)
            if not free:
                break
        for i, value in zip(free, solved, strict=False):
            x[i] = value
    return x


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss's elimination with pivots; changes its arguments."""
    n = len(right)
    for k in range(n):
        pivot = max(range(k, n), key=lambda i: abs(matrix[i][k]))
        matrix[k], matrix[pivot] = matrix[pivot], matrix[k]
        right[k], right[pivot] = right[pivot], right[k]
        for i in range(k + 1, n):
            ratio = matrix[i][k] / matrix[k][k]
            if ratio:
                row, top = matrix[i], matrix[k]
                for j in range(k, n):
                    row[j] -= ratio * top[j]
                right[i] -= ratio * right[k]
    for k in reversed(range(n)):
        right[k] = (right[k] - sum(matrix[k][j] * right[j] for j in range(k + 1, n))) / matrix[k][k]
    return right


def _loss(residuals: Sequence[float]) -> float:
    """Mean of Huber's loss at a tenth: what an outlier adds is bounded by its size, not its square."""
    return sum(r * r if r < 0.1 else 0.2 * r - 0.01 for r in residuals) / len(residuals)


def _dot(a: Row, b: Row) -> float:
    found: float = sum(map(mul, a, b))
    return found
