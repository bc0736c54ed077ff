"""Capacity search: the highest rate of arrivals that still meets a condition. No torch.

Source: Sarathi-Serve's metric (P99 TBT within its limit, median scheduling delay at most 2 s) and search;
with `keeps_attainment` it is DistServe's goodput.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from polybatch.errors import ConfigError
from polybatch.simulate.report import Report

MAX_DELAY_S = 2.0


@dataclass(frozen=True, slots=True)
class Capacity:
    """The highest rate found that is good, its report, and every trial as (rate, whether good)."""

    rate: float
    report: Report | None
    trials: tuple[tuple[float, bool], ...]


def keeps_pace(tbt_slo_s: float) -> Callable[[Report], bool]:
    """Sarathi-Serve's condition. There is no limit on TTFT."""

    def is_good(report: Report) -> bool:
        tbt, delay = report.tbt.p99, report.scheduling_delay.p50
        return (tbt is None or tbt <= tbt_slo_s) and delay is not None and delay <= MAX_DELAY_S

    return is_good


def keeps_attainment(share: float = 0.9) -> Callable[[Report], bool]:
    """DistServe's condition: so many requests meet all their limits."""
    return lambda report: report.attainment is not None and report.attainment >= share


def search_capacity(
    trial: Callable[[float], Report],
    is_good: Callable[[Report], bool],
    start_rate: float,
    *,
    granularity: float = 0.025,
    max_trials: int = 20,
) -> Capacity:
    """Bisect the rate: doubled while it is good, halved while it is not, then between the two.

    granularity: stop when good and bad rates differ by this share of the good one.
    A rate of 0 means that no trial was good.
    """
    if not start_rate > 0:
        raise ConfigError(f"start_rate is {start_rate}; it must be a positive number of requests per second")
    good, bad = 0.0, float("inf")
    best: Report | None = None
    trials: list[tuple[float, bool]] = []
    rate = 2 * start_rate
    while len(trials) < max_trials:
        result = trial(rate)
        is_fine = is_good(result)
        trials.append((rate, is_fine))
        if is_fine:
            good, best = rate, result
        else:
            bad = rate
        if bad < float("inf") and bad - good <= granularity * max(good, 1e-9):
            break
        if bad == float("inf"):
            rate = 2 * good
        elif good == 0:
            rate = bad / 2
        else:
            rate = (good + bad) / 2
    return Capacity(good, best, tuple(trials))
