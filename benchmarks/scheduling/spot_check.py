"""Spot checks: what the simulator says of policies, seen on the real CPU engine.

Claims: under overload the policy `deadline` keeps at least as many deadlines as first come, earliest deadline
and shortest first, and what was told at arrival comes true; long prompts hold decodes up less with stall-free
batching than with prefill first; rows of batches in slack cost live requests little.

Every policy gets the same seeded arrivals and lengths, one after the other, in several rounds. Rates are
multiples of a capacity, and deadlines of the mean time of a request, that are measured just before, so that a
slow or busy machine changes neither the load nor how tight deadlines are. Beside each measurement stands what
the simulator says of the same requests, with the cost model corrected by how fast that very run was.

    python -m benchmarks.scheduling.spot_check [overload long_prompts live_offline] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scheduling.in_process import Served, engine, open_clock, serve
from polybatch import __version__
from polybatch.bench.meter import machine as this_machine
from polybatch.config import ServiceLevels
from polybatch.engine.calibrate import calibrate
from polybatch.engine.llm import LLM
from polybatch.request import Deadlines, SamplingParams
from polybatch.scheduling.cost_profile import CostProfile, load_profile, save_profile
from polybatch.scheduling.online_cost import OnlineCost
from polybatch.scheduling.track import BATCH_PRIORITY
from polybatch.simulate.cluster import simulate
from polybatch.simulate.engine import EngineSettings, Outcome
from polybatch.simulate.machines import machine_of
from polybatch.simulate.report import between_tokens, meets
from polybatch.simulate.traces import Trace, TraceRequest
from polybatch.simulate.workloads.arrivals import gamma_arrivals, lengths_by_quantiles

MODEL = "smollm2-135m-instruct"
OUT = Path(__file__).parents[1] / "results" / "scheduling" / "spot_check.json"
SETTINGS: dict[str, Any] = {
    "threads": 1,
    "max_model_len": 2048,
    "memory": "512MiB",
    "enable_prefix_caching": False,
}

POLICIES = ("fcfs", "edf", "shortest_first", "deadline")
LOADS = (1.6, 2.5)
NUM_CHATS = 160
FIRST_TOKENS = (5.0, 20.0, 70.0)
"""Deadlines, as multiples of the time that a request takes at capacity."""
CHUNK = 256

NUM_TALKS, TALK_TOKENS = 32, 200
NUM_DOCUMENTS, DOCUMENT_TOKENS = 5, 1200

LIVE_LOAD = 0.5
NUM_LIVE = 200
NUM_ROWS, ROW_PROMPT, ROW_OUTPUT = 2000, 120, 40


@dataclass(frozen=True, slots=True)
class Bench:
    """A loaded engine and what steps take on it."""

    llm: LLM
    profile: CostProfile

    def run(self, trace: Trace, settings: EngineSettings, factors: dict[str, float]) -> Served:
        """On the engine. factors: how far steps are off the profile to begin with."""
        costs = OnlineCost(self.profile.model)
        costs.factors = dict(factors)
        return serve(engine(self.llm, settings, costs), trace)

    def predict(
        self, trace: Trace, settings: EngineSettings, factors: dict[str, float]
    ) -> tuple[Outcome, ...]:
        """In the simulator."""
        costs = OnlineCost(self.profile.model)
        costs.factors = factors
        return simulate(trace, replace(machine_of(self.profile, MODEL), costs=costs), settings).outcomes


def chats(num: int, seed: int) -> Trace:
    """Short prompts and answers, one a second."""
    rng = np.random.RandomState(seed)
    times = gamma_arrivals(rng, num, 1.0)
    prompts = lengths_by_quantiles(rng, num, 60, 140, 300)
    outputs = lengths_by_quantiles(rng, num, 16, 36, 60)
    return Trace(
        f"chats {seed}",
        tuple(
            TraceRequest(
                request_id=f"chat-{seed}-{i}", arrival_s=float(times[i]), num_input=int(prompts[i]),
                num_output=int(outputs[i]),
            )
            for i in range(num)
        ),
    )  # fmt: skip


def capacity(bench: Bench, settings: EngineSettings) -> tuple[float, dict[str, float]]:
    """Requests per second with all of them there at once, and how far steps are off the profile now."""
    trace = chats(NUM_CHATS // 2, seed=0)
    at_once = trace.with_requests(replace(r, arrival_s=0.0) for r in trace.requests)
    found = bench.run(at_once, settings, {"decode": 1.0, "mixed": 1.0})
    return len(at_once) / found.end_s, found.factors


def overload(bench: Bench, rounds: int) -> dict[str, Any]:
    """Attainment by policy and load, and what came of what was told at arrival."""
    settings = EngineSettings(max_num_batched_tokens=CHUNK, enable_prefix_caching=False)
    rows: list[dict[str, Any]] = []
    for round_ in range(rounds):
        for load in LOADS:
            rate, factors = capacity(bench, settings)
            limits = [n / rate for n in FIRST_TOKENS]
            trace = chats(NUM_CHATS, seed=1 + round_).at_rate(load * rate)
            which = np.random.RandomState(round_).randint(0, len(limits), len(trace))
            trace = trace.with_requests(
                replace(r, deadlines=Deadlines(ttft_s=limits[which[i]])) for i, r in enumerate(trace.requests)
            )
            # Whoever comes first in one round comes last in the next.
            for policy in POLICIES[:: 1 if round_ % 2 == 0 else -1]:
                own = replace(settings, policy=policy)
                found = bench.run(trace, own, factors)
                rows.append(
                    {
                        "round": round_, "load": load, "policy": policy, "capacity": rate,
                        "measured": _attained(found.outcomes, which),
                        "first_token_over_told": _over_told(found),
                        "simulated": _attained(bench.predict(trace, own, found.factors), which),
                        "throughput": len(trace) / found.end_s, "num_steps": found.num_steps,
                        "waited_share": found.waited_share, "drift": found.factors,
                    }
                )  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    means = {
        f"load={load:g}": {
            policy: {
                side: {
                    key: _mean(r[side][key] for r in rows if (r["load"], r["policy"]) == (load, policy))
                    for key in ("attainment", "answers_right")
                }
                for side in ("measured", "simulated")
            }
            for policy in POLICIES
        }
        for load in LOADS
    }
    kept = {load: {p: m["measured"]["attainment"] for p, m in found.items()} for load, found in means.items()}
    # A request or two of all is what differs from one run to the next.
    slack = 2 / (NUM_CHATS * rounds)
    return {
        "claim": "attainment of deadline is at least that of fcfs, edf and shortest_first",
        "holds": all(found["deadline"] >= max(found.values()) - slack for found in kept.values()),
        "first_token_deadlines": FIRST_TOKENS,
        "means": means,
        "rows": rows,
    }


def _attained(outcomes: Sequence[Outcome], which: Any) -> dict[str, Any]:
    """Shares of requests. which: the class of each."""
    met = np.array([meets(o, None) for o in outcomes])
    answers = [(o.answer, bool(kept)) for o, kept in zip(outcomes, met, strict=True) if o.answer is not None]
    return {
        "attainment": float(met.mean()),
        "by_class": [float(met[which == kind].mean()) for kind in range(len(FIRST_TOKENS))],
        "answers_right": _share(answer == kept for answer, kept in answers),
        "promises_kept": _share(kept for answer, kept in answers if answer),
        "warnings_true": _share(not kept for answer, kept in answers if not answer),
        "promised": _share(answer for answer, _ in answers),
    }


def _over_told(found: Served) -> dict[str, float]:
    """Quantiles of times to the first token over what was told of them at arrival."""
    ratios = [
        o.ttft_s / found.told_s[o.request.request_id]
        for o in found.outcomes
        if o.ttft_s is not None and o.request.request_id in found.told_s
    ]
    return {f"p{p}": float(np.percentile(ratios, p)) for p in (5, 50, 95)}


def long_prompts(bench: Bench, rounds: int) -> dict[str, Any]:
    """P99 TBT of talks while long prompts come in, beside that of the talks alone."""
    talks = [
        TraceRequest(request_id=f"talk-{i}", arrival_s=0.0, num_input=32, num_output=TALK_TOKENS)
        for i in range(NUM_TALKS)
    ]
    base = EngineSettings(enable_prefix_caching=False)
    alone = Trace("talks", tuple(talks))
    rows: list[dict[str, Any]] = []
    for round_ in range(rounds):
        factors = capacity(bench, base)[1]
        quiet = bench.run(alone, base, factors)
        p99_s = _p99(quiet.outcomes)
        # Documents come for three quarters of the time that talks take alone.
        gap_s = 0.75 * quiet.end_s / NUM_DOCUMENTS
        documents = [
            TraceRequest(
                request_id=f"doc-{i}", arrival_s=quiet.end_s * 0.1 + gap_s * i, num_input=DOCUMENT_TOKENS,
                num_output=1,
            )
            for i in range(NUM_DOCUMENTS)
        ]  # fmt: skip
        both = Trace("talks and documents", (*talks, *documents))
        ways = {
            "talks alone": base,
            "prefill_first": replace(base, batching="prefill_first"),
            "hybrid_only": replace(base, batching="hybrid_only"),
            "stall_free, 128 tokens": replace(base, max_num_batched_tokens=128),
            "stall_free, budget per step": replace(base, service=ServiceLevels(target_tbt_s=1.5 * p99_s)),
        }
        for name, settings in ways.items():
            trace = alone if settings is base else both
            found = quiet if settings is base else bench.run(trace, settings, factors)
            simulated = bench.predict(trace, settings, found.factors)
            rows.append(
                {
                    "round": round_, "batching": name, "target_tbt_s": settings.service.target_tbt_s,
                    "measured": _talk(found.outcomes, p99_s),
                    "simulated": _talk(simulated, _p99(bench.predict(alone, base, found.factors))),
                    "waited_share": found.waited_share, "drift": found.factors,
                }
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    ratios = {
        name: {
            side: _mean(r[side]["ratio"] for r in rows if r["batching"] == name)
            for side in ("measured", "simulated")
        }
        for name in ways
    }
    best = ratios["stall_free, budget per step"]["measured"]
    return {
        "claim": "P99 TBT with long prompts is at most 1.5 times that of the decodes alone",
        "holds": best <= 1.5,
        "ratios": ratios,
        "rows": rows,
    }


def _talk(outcomes: Sequence[Outcome], quiet_p99_s: float) -> dict[str, float]:
    gaps = between_tokens(o for o in outcomes if o.request.request_id.startswith("talk"))
    firsts = [o.ttft_s for o in outcomes if o.request.request_id.startswith("doc") and o.ttft_s is not None]
    p99_s = float(np.percentile(gaps, 99))
    return {
        "tbt_p50": float(np.percentile(gaps, 50)), "tbt_p99": p99_s, "tbt_max": float(gaps.max()),
        "ratio": p99_s / quiet_p99_s,
        **({"document_ttft_p50": float(np.median(firsts))} if firsts else {}),
    }  # fmt: skip


def _p99(outcomes: Sequence[Outcome]) -> float:
    gaps = between_tokens(o for o in outcomes if o.request.request_id.startswith("talk"))
    return float(np.percentile(gaps, 99))


def live_offline(bench: Bench, rounds: int) -> dict[str, Any]:
    """Chats at half load with and without an endless job in the same engine."""
    plain = EngineSettings(enable_prefix_caching=False)
    job = [
        TraceRequest(
            request_id=f"row-{i}", arrival_s=0.0, num_input=ROW_PROMPT, num_output=ROW_OUTPUT,
            priority=BATCH_PRIORITY,
        )
        for i in range(NUM_ROWS)
    ]  # fmt: skip
    most, factors = capacity(bench, replace(plain, max_num_batched_tokens=CHUNK))
    rate = LIVE_LOAD * most
    # A step of rows alone, which a chat that comes meanwhile waits for, is little longer than the shortest.
    most_s = 1.5 * machine_of(bench.profile, MODEL).decode_s(1, ROW_PROMPT)
    ways = {
        "rows in slack": ServiceLevels(max_batch_step_s=most_s),
        "rows in less slack": ServiceLevels(max_batch_step_s=most_s, batch_slowdown=0.02),
        "rows without limit": ServiceLevels(batch_slowdown=None),
    }
    found: dict[str, list[Served]] = {name: [] for name in ("alone", *ways)}
    simulated: dict[str, list[Outcome]] = {name: [] for name in found}
    for round_ in range(rounds):
        live = chats(NUM_LIVE, seed=100 + round_).at_rate(rate)
        both = Trace("chats and rows", (*job, *live.requests))
        runs: dict[str, tuple[Trace, EngineSettings]] = {"alone": (live, plain)}
        runs |= {name: (both, replace(plain, service=levels)) for name, levels in ways.items()}
        for name in list(runs)[:: 1 if round_ % 2 == 0 else -1]:
            found[name].append(bench.run(*runs[name], factors))
            print(json.dumps({"way": name, **_waits(_live(found[name][-1].outcomes))}), flush=True)
        # One speed for all, or its noise would be taken for what rows cost.
        drifts = [served[-1].factors for served in found.values()]
        factors = {kind: _mean(drift[kind] for drift in drifts) for kind in drifts[0]}
        for name in runs:
            simulated[name] += _live(bench.predict(*runs[name], factors))
    measured_waits = {
        name: _waits([o for served in served_all for o in _live(served.outcomes)])
        for name, served_all in found.items()
    }
    waits = {
        "measured": measured_waits,
        "simulated": {name: _waits(outcomes) for name, outcomes in simulated.items()},
    }
    costs = {
        name: {
            side: {
                key: waits[side][name][key] / waits[side]["alone"][key] - 1
                for key in ("ttft_p50", "ttft_p99", "tbt_p50", "tbt_p99")
            }
            for side in waits
        }
        for name in ways
    }
    busy = {name: sum(s.busy_s for s in all_) / sum(s.end_s for s in all_) for name, all_ in found.items()}
    slack = costs["rows in slack"]["measured"]
    return {
        "claim": "rows in slack cost live P99 TTFT and TBT under 0.1, and the machine is busy for 0.9",
        "holds": max(slack["ttft_p99"], slack["tbt_p99"]) < 0.1 and busy["rows in slack"] >= 0.9,
        "live_rate": rate,
        "max_batch_step_s": most_s,
        "costs": costs,
        "busy_share": busy,
        "row_tokens_per_s": {
            name: sum(
                len(o.token_times) for s in all_ for o in s.outcomes if o.request.priority >= BATCH_PRIORITY
            )
            / sum(s.end_s for s in all_)
            for name, all_ in found.items()
        },
        "waits": waits,
        "waits_by_round": {name: [_waits(_live(s.outcomes)) for s in all_] for name, all_ in found.items()},
        "later_first_tokens": {name: _later(found["alone"], found[name]) for name in ways},
        "waited_share": {name: [s.waited_share for s in all_] for name, all_ in found.items()},
        "drift": {name: [s.factors for s in all_] for name, all_ in found.items()},
    }


def _live(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [o for o in outcomes if o.request.priority < BATCH_PRIORITY]


def _later(alone: Sequence[Served], beside: Sequence[Served]) -> dict[str, float]:
    """Quantiles, in seconds, of how much later the same request had its first token beside rows."""
    firsts = [[o.ttft_s or 0.0 for s in runs for o in _live(s.outcomes)] for runs in (alone, beside)]
    later = np.subtract(firsts[1], firsts[0])
    return {f"p{p}": float(np.percentile(later, p)) for p in (1, 50, 90, 99)}


def _waits(outcomes: Sequence[Outcome]) -> dict[str, float]:
    ttft = [o.ttft_s for o in outcomes if o.ttft_s is not None]
    gaps = between_tokens(outcomes)
    return {
        f"{name}_p{p}": float(np.percentile(values, p))
        for name, values in (("ttft", ttft), ("tbt", gaps))
        for p in (50, 95, 99)
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _share(values: Iterable[bool]) -> float | None:
    """Of so many that hold; None of none."""
    known = list(values)
    return _mean(known) if known else None


CHECKS: dict[str, Callable[[Bench, int], dict[str, Any]]] = {
    "overload": overload,
    "long_prompts": long_prompts,
    "live_offline": live_offline,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CHECKS)}; default all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--profile", type=Path, help="a cost profile of this machine, instead of measuring")
    parser.add_argument("--calibrate", type=float, default=45.0, metavar="SECONDS")
    parser.add_argument("--keep", type=Path, help="where to write the profile that was measured")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if unknown := set(args.names) - CHECKS.keys():
        parser.error(f"{sorted(unknown)[0]!r} is no check; there are {', '.join(CHECKS)}")
    open_clock()
    with closing(LLM(MODEL, **SETTINGS)) as llm:
        profile = (
            load_profile(args.profile)
            if args.profile
            else calibrate(llm, budget_s=args.calibrate).profile(llm)
        )
        if args.keep is not None:
            save_profile(profile, args.keep)
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
        bench = Bench(llm, profile)
        found = {name: CHECKS[name](bench, args.rounds) for name in args.names or CHECKS}
    machine = this_machine()
    result = {
        "experiment": "spot_check",
        "checks": found,
        "holds": all(check["holds"] for check in found.values()),
        "command": "python -m benchmarks.scheduling.spot_check",
        "version": __version__,
        "model": MODEL,
        "settings": SETTINGS,
        "rounds": args.rounds,
        "machine": asdict(machine) if hasattr(machine, "__dataclass_fields__") else machine,
        "calibration_p95_error": profile.p95_error,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: check["holds"] for name, check in found.items()}))


if __name__ == "__main__":
    main()
