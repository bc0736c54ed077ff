"""How many machines, used how, for this traffic: a search by simulation. No torch.

    trace, limits, machines -> layouts -> the highest rate that each keeps up -> the best per device

A layout is one way to use a group of devices: engines that do both phases, or some that only prefill and
others that only decode; a tensor-parallel degree, which is a machine of its own; a number of prompt tokens
per step. Its goodput is the highest rate of arrivals at which the wanted share of requests still meets every
limit. A group that is good for r requests per second is repeated ceil(R / r) times for a rate of R.

Colocated chunked prefill is searched first and always stands beside the rest: disaggregation has to beat it.
A layout whose first trial, at the rate of the best of its kind so far, fails is given up: its goodput is
known to be lower, and that is what is reported.
Source: DistServe (Zhong et al. 2024), section 4, with a simulator that runs the real scheduler.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from polybatch.errors import ConfigError
from polybatch.simulate.cluster import simulate
from polybatch.simulate.engine import EngineSettings
from polybatch.simulate.machines import Machine
from polybatch.simulate.report import Report, Slo, report
from polybatch.simulate.traces import Trace

CHUNKS = (512, 2048, 8192)
"""Prompt tokens per step that are tried unless told."""

TARGET = 0.9
"""Share of requests that must meet their limits, as in DistServe."""

GRANULARITY = 0.04
"""Rates are found this closely."""

GROWTH, CLOSE_GROWTH = 2.0, 1.2
"""From a rate to the next that is tried, until one is good and one is not; the latter near a known one."""

MAX_TRIALS = 14
"""Of one layout: a rate that differs from the first guess by more than a factor of 60 is not found."""

MARGIN = 1.02
"""A layout is searched further if it keeps up so much more than the best of its kind."""

TRAFFIC_S = 60.0
"""Arrivals of every trial, in seconds: in a shorter one, empty engines would hide an overload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to use some devices.

    num_engines: all of them on `machine`. num_prefill: 0 for engines that do both phases, or how many only
    prefill, while the others only decode. chunk: prompt tokens per step.
    """

    machine: Machine
    num_engines: int = 1
    num_prefill: int = 0
    chunk: int = 2048

    @property
    def is_colocated(self) -> bool:
        return self.num_prefill == 0

    @property
    def num_devices(self) -> int:
        return self.num_engines * self.machine.num_devices

    @property
    def name(self) -> str:
        """For people: "h100-8b, steps of 2,048" or "1 prefill + 2 decode x h100-8b, steps of 2,048"."""
        engines = "" if self.num_engines == 1 else f"{self.num_engines} x "
        if not self.is_colocated:
            engines = f"{self.num_prefill} prefill + {self.num_engines - self.num_prefill} decode x "
        return f"{engines}{self.machine.name}, steps of {self.chunk:,}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What a layout was found to be good for.

    rate: requests per second that it keeps up; 0 if none was found. is_bound: it was given up after one
    trial, and `rate` is what it does not reach. curve: every trial as (rate, attainment). report: at `rate`.
    """

    layout: Layout
    rate: float
    is_bound: bool = False
    curve: tuple[tuple[float, float], ...] = ()
    report: Report | None = None

    @property
    def per_device(self) -> float:
        """Goodput per device, requests per second."""
        return self.rate / self.layout.num_devices

    def num_groups(self, rate: float) -> int | None:
        """How often the layout is needed for a rate; None if it never suffices."""
        return math.ceil(rate / self.rate - 1e-9) if self.rate > 0 and not self.is_bound else None

    def as_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout.name,
            "num_devices": self.layout.num_devices,
            "rate": self.rate,
            "is_bound": self.is_bound,
            "goodput_per_device": self.per_device,
            "is_estimate": self.layout.machine.is_estimate,
            "curve": [list(point) for point in self.curve],
            "report": None if self.report is None else self.report.as_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The outcome of a search. candidates: in the order they were tried. untried: for want of time.

    rate: what is to be served, None if only the goodput was asked for. asked: what the first layout makes of
    the rate alone, without a search.
    """

    trace: str
    slo: Slo
    target: float
    rate: float | None
    candidates: tuple[Candidate, ...]
    untried: tuple[Layout, ...] = ()
    asked: Report | None = None
    seconds: float = 0.0
    num_trials: int = field(default=0)

    @property
    def best(self) -> Candidate | None:
        """Of all layouts, the one with the highest goodput per device; None if nothing keeps any rate up."""
        return _best(self.candidates)

    @property
    def baseline(self) -> Candidate | None:
        """The best of the colocated ones."""
        return _best(c for c in self.candidates if c.layout.is_colocated)

    @property
    def disaggregated(self) -> Candidate | None:
        """The best of those with the phases apart; None if there are none."""
        return _best(c for c in self.candidates if not c.layout.is_colocated)

    def as_json(self) -> dict[str, Any]:
        best = self.best
        return {
            "trace": self.trace,
            "slo": asdict(self.slo),
            "target": self.target,
            "rate": self.rate,
            "best": None if best is None else best.layout.name,
            "num_devices": None if best is None else num_devices_for(best, self.rate),
            "asked": None if self.asked is None else self.asked.as_json(),
            "candidates": [candidate.as_json() for candidate in self.candidates],
            "untried": [layout.name for layout in self.untried],
            "seconds": self.seconds,
            "num_trials": self.num_trials,
        }


def num_devices_for(candidate: Candidate, rate: float | None) -> int | None:
    """Devices that a rate takes with this layout; None without a rate, or where it never suffices."""
    groups = None if rate is None else candidate.num_groups(rate)
    return None if groups is None else groups * candidate.layout.num_devices


def _best(candidates: Iterable[Candidate]) -> Candidate | None:
    known = [c for c in candidates if c.rate > 0 and not c.is_bound]
    return max(known, key=lambda c: (c.per_device, -c.layout.num_devices)) if known else None


def layouts(
    machines: Sequence[Machine],
    max_devices: int,
    chunks: Sequence[int] = CHUNKS,
    *,
    is_disaggregated: bool = True,
) -> list[Layout]:
    """What is worth trying with at most so many devices, colocated layouts first.

    An engine that does both phases is tried alone: several behind a router are that many groups. With the
    phases apart, every split of two or more engines is, but for those that repeat a smaller one. Decoding
    engines have no prompts to cut and prefilling ones no decodes to hold up: they get the largest steps.
    Raises ConfigError if no machine has few enough devices.
    """
    usable = [machine for machine in machines if machine.num_devices <= max_devices]
    if not usable:
        raise ConfigError(
            f"max_devices is {max_devices} and every machine has more: raise it or name a smaller machine"
        )
    found = [Layout(machine=machine, chunk=chunk) for machine in usable for chunk in sorted(set(chunks))]
    if is_disaggregated:
        for machine in usable:
            for num_engines in range(2, max_devices // machine.num_devices + 1):
                found += [
                    Layout(machine=machine, num_engines=num_engines, num_prefill=split, chunk=max(chunks))
                    for split in range(1, num_engines)
                    if math.gcd(split, num_engines) == 1
                ]
    return found


def search(
    trace: Trace,
    slo: Slo,
    tried: Sequence[Layout],
    settings: EngineSettings | None = None,
    *,
    rate: float | None = None,
    target: float = TARGET,
    traffic_s: float = TRAFFIC_S,
    seconds: float = 50.0,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[Layout], None] = lambda layout: None,
) -> Plan:
    """Find each layout's goodput, the first layout's in any case and others while `seconds` last.

    rate: requests per second to be served. traffic_s: arrivals of a trial. Raises ConfigError if the trace's
    requests all come at once, or if no limit is set.
    """
    if slo == Slo() and not any(request.deadlines for request in trace.requests):
        raise ConfigError(
            "slo is empty and the trace has no deadlines: give limits such as ttft=0.3,tpot=0.05"
        )
    if not tried:
        raise ConfigError("there are no layouts to search: name a machine")
    if not 0 < target <= 1:
        raise ConfigError(f"target is {target}; it must be above 0 and at most 1, a share of the requests")
    settings = settings or EngineSettings()
    if not trace.has_shared_prefixes:
        settings = replace(settings, enable_prefix_caching=False)
    began = clock()
    trials = _Trials(trace, slo, settings, traffic_s)
    asked = None if rate is None else trials.run(tried[0], rate)
    candidates: list[Candidate] = []
    start = rate or trace.rate
    for index, layout in enumerate(tried):
        if index and clock() - began > seconds:
            return _plan(trace, slo, target, rate, candidates, tried[index:], asked, clock() - began, trials)
        progress(layout)
        rival = _best(c for c in candidates if c.layout.is_colocated == layout.is_colocated)
        candidates.append(_candidate(trials, layout, rival, start, target))
        if candidates[-1].rate > 0:
            start = candidates[-1].per_device
    return _plan(trace, slo, target, rate, candidates, (), asked, clock() - began, trials)


class _Trials:
    """Simulations of one trace at many rates, counted."""

    def __init__(self, trace: Trace, slo: Slo, settings: EngineSettings, traffic_s: float) -> None:
        self._trace, self._slo, self._settings, self._traffic_s = trace, slo, settings, traffic_s
        self._last: tuple[Layout, float, Report] | None = None
        self.num_trials = 0

    def run(self, layout: Layout, rate: float) -> Report:
        """The search of the first layout begins where the question was: that run is not repeated."""
        if self._last is not None and self._last[0] is layout and self._last[1] == rate:
            return self._last[2]
        self.num_trials += 1
        settings = replace(self._settings, max_num_batched_tokens=layout.chunk)
        machines = [layout.machine] * layout.num_engines
        traffic = lasting(self._trace, rate, self._traffic_s)
        run = simulate(traffic, machines, settings, router="least-work", num_prefill=layout.num_prefill)
        found = report(run, self._slo)
        self._last = layout, rate, found
        return found


def lasting(trace: Trace, rate: float, seconds: float) -> Trace:
    """The trace at a rate, repeated or cut so that requests arrive for so long, and at least one of them.

    Repetitions share no prefixes with each other. Workflows are kept whole only where nothing is cut.
    """
    wanted = max(1, round(rate * seconds))
    once = trace.at_rate(rate)
    if wanted <= len(once):
        kept = {request.request_id for request in once.requests[:wanted]}
        return once.with_requests(
            replace(r, after=tuple(a for a in r.after if a in kept)) for r in once.requests[:wanted]
        )
    apart = 1 + max((block for r in once.requests for block in r.blocks), default=0)
    gap = once.duration_s + 1 / rate
    return once.with_requests(
        replace(
            request,
            request_id=f"{request.request_id}/{turn}",
            arrival_s=request.arrival_s + turn * gap,
            blocks=tuple(block + turn * apart for block in request.blocks),
            after=tuple(f"{before}/{turn}" for before in request.after),
        )
        for turn in range(-(-wanted // len(once)))
        for request in once.requests[: wanted - turn * len(once)]
    )


def _candidate(
    trials: _Trials, layout: Layout, rival: Candidate | None, start: float, target: float
) -> Candidate:
    curve: list[tuple[float, float]] = []

    def trial(rate: float) -> Report:
        found = trials.run(layout, rate)
        assert found.attainment is not None
        curve.append((rate, found.attainment))
        return found

    rate = start if rival is None else MARGIN * rival.per_device * layout.num_devices
    growth = GROWTH if rival is None else CLOSE_GROWTH
    low, high, best = 0.0, math.inf, None
    while len(curve) < MAX_TRIALS and high > (1 + GRANULARITY) * low:
        found = trial(rate)
        if curve[-1][1] >= target:
            low, best = rate, found
        elif rival is not None and not low:
            return Candidate(layout=layout, rate=rate, is_bound=True, curve=tuple(curve))
        else:
            high = rate
        rate = low * growth if high == math.inf else high / growth if not low else math.sqrt(low * high)
    return Candidate(layout=layout, rate=low, curve=tuple(sorted(curve)), report=best)


def _plan(
    trace: Trace,
    slo: Slo,
    target: float,
    rate: float | None,
    candidates: Sequence[Candidate],
    untried: Sequence[Layout],
    asked: Report | None,
    seconds: float,
    trials: _Trials,
) -> Plan:
    return Plan(
        trace=trace.name, slo=slo, target=target, rate=rate, candidates=tuple(candidates),
        untried=tuple(untried), asked=asked, seconds=round(seconds, 2), num_trials=trials.num_trials,
    )  # fmt: skip


def verdict(plan: Plan) -> Iterator[str]:
    """What the search says, in sentences."""
    limits = ", ".join(
        f"{name.removesuffix('_s').upper()} {1000 * value:,.0f} ms"
        for name, value in asdict(plan.slo).items()
        if value is not None
    )
    share = f"{plan.target:.0%} of the requests"
    best, baseline, apart = plan.best, plan.baseline, plan.disaggregated
    if plan.asked is not None and plan.rate is not None and plan.asked.attainment is not None:
        first = plan.candidates[0].layout
        is_met = plan.asked.attainment >= plan.target
        yield (
            f"{'Yes' if is_met else 'No'}: at {plan.rate:g} requests/s {plan.asked.attainment:.1%} meet "
            f"{limits or 'their deadlines'} on {first.name} (wanted: {plan.target:.0%})."
        )
    if best is None:
        yield f"No layout was found on which {share} meet {limits or 'their deadlines'} at any rate."
        return
    devices = _count(best.layout.num_devices, "device")
    yield (
        f"Best: {best.layout.name}, {best.rate:.2f} requests/s on {devices}, "
        f"{best.per_device:.2f} per device, with {share} in time."
    )
    if plan.rate is not None and (groups := best.num_groups(plan.rate)) is not None:
        devices = _count(groups * best.layout.num_devices, "device")
        yield f"For {plan.rate:g} requests/s: {_count(groups, 'such group')}, {devices}."
    if apart is not None and baseline is not None:
        ratio = apart.per_device / baseline.per_device
        yield (
            f"Phases apart: {apart.per_device:.2f} per device at best ({apart.layout.name}), {ratio:.2f} x "
            f"colocated chunked prefill ({baseline.layout.name})."
        )
    if plan.untried:
        yield f"{_count(len(plan.untried), 'layout')} not tried for want of time: raise --seconds."
    if any(c.layout.machine.is_estimate for c in plan.candidates):
        yield "Some machines are estimates, not measured: see polybatch calibrate."


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
