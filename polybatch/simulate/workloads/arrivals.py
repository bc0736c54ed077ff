"""Times of arrival and lengths that several workloads share. No torch."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from polybatch.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_Z90 = 1.2815515655446004
"""Standard normal quantile of 0.9."""


def gamma_arrivals(rng: np.random.RandomState, num: int, rate: float, cv: float = 1.0) -> Floats:
    """[num] times in seconds, ascending; gaps Gamma with shape 1/cv^2 and mean 1/rate. cv 1 is Poisson.

    Raises ConfigError for a rate or cv that is not positive.
    """
    for name, value in (("rate", rate), ("cv", cv)):
        if not value > 0:
            raise ConfigError(f"{name} is {value}; it must be a positive number")
    return np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, num))


def lengths_by_quantiles(
    rng: np.random.RandomState, num: int, median: float, p90: float, largest: float
) -> Ints:
    """[num] lengths, log-normal up to the 90th percentile, then geometric up to `largest`.

    So median and 90th percentile are those of the description, and nothing is above the limit.
    """
    u = rng.random_sample(num)
    sigma = math.log(p90 / median) / _Z90
    below = median * np.exp(sigma * _normal_quantile(np.minimum(u, 0.9)))
    beyond = p90 * (largest / p90) ** ((u - 0.9) / 0.1)
    return np.maximum(1, np.where(u <= 0.9, below, beyond)).astype(np.int64)


def lengths_by_mean(
    rng: np.random.RandomState, num: int, mean: float, sigma: float, largest: float | Ints
) -> Ints:
    """[num] lengths, log-normal with spread `sigma`, none above `largest`, whose mean is `mean`.

    largest: one for all, or [num]. The mean is that of these very lengths, as far as the limits allow.
    """
    drawn = np.exp(sigma * rng.standard_normal(num))
    low, high = 0.0, 1e9
    for _ in range(100):
        scale = (low + high) / 2
        low, high = (scale, high) if np.minimum(drawn * scale, largest).mean() < mean else (low, scale)
    return np.maximum(1, np.rint(np.minimum(drawn * low, largest))).astype(np.int64)


def _normal_quantile(u: Floats) -> Floats:
    """Inverse of the standard normal distribution, from a table that is fine enough for lengths."""
    z = np.linspace(-6, 6, 24_001)
    cdf = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z[::10]])
    return np.interp(u, np.interp(z, z[::10], cdf), z)
