"""HexGen-Text2SQL's workflows: questions that take some fifteen calls with one deadline. No torch.

A question is looked up (IR), its keywords are extracted, three lookups follow, then candidate queries are
written in parallel, revised one after the other as often as needed, and tested. A stage begins when the one
before has ended with all its calls. Calls of a kind share their template, the prompt's beginning.
Mean lengths and templates are the paper's traces'; single lengths spread around them log-normally, and the
number of revisions is geometric with mean 2 up to 10: the traces themselves are not at hand.
Source: HexGen-Text2SQL (Peng et al. 2025) and its simulator's request model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polybatch.errors import ConfigError
from polybatch.request import WorkflowStage
from polybatch.simulate.traces import Trace, TraceRequest
from polybatch.simulate.workloads.arrivals import gamma_arrivals


@dataclass(frozen=True, slots=True)
class Call:
    """Mean prompt and output, and the templates that prompts of this kind begin with, in tokens."""

    prompt: int
    output: int
    templates: tuple[int, ...]


CALLS = {
    "ir": Call(308, 5, (213,)),
    "keywords": Call(667, 45, (630,)),
    "candidates": Call(11748, 678, (5292, 9158)),
    "revise": Call(5963, 79, (3059,)),
    "unit_tests": Call(1109, 103, (436,)),
    "unit_tester": Call(275, 4, (213,)),
    "evaluate": Call(961, 22, (261,)),
}
NUM_CANDIDATES, NUM_TESTERS = 3, 3
MEAN_REVISIONS, MAX_REVISIONS = 2, 10
BASE_S = 52.95
"""Time of a standard workflow on the paper's mix of machines."""

_SPREAD = 0.25


def stages(num_revisions: int) -> list[list[str]]:
    """The calls of one question, stage by stage; with two revisions there are fifteen."""
    return [
        ["ir"], ["keywords"], ["ir"] * 3, ["candidates"] * NUM_CANDIDATES, *([["revise"]] * num_revisions),
        ["unit_tests"], ["unit_tester"] * NUM_TESTERS, ["evaluate"],
    ]  # fmt: skip


STANDARD = tuple(call for stage in stages(MEAN_REVISIONS) for call in stage)


def hexgen(
    *,
    seed: int = 42,
    rate: float = 0.5,
    num_questions: int = 100,
    slo_scale: float = 5.0,
    base_s: float = BASE_S,
) -> Trace:
    """num_questions at Poisson times, each due slo_scale * base_s later. rate: questions per second."""
    if num_questions < 1 or not slo_scale > 0 or not base_s > 0:
        raise ConfigError(
            f"num_questions is {num_questions}, slo_scale {slo_scale}, base_s {base_s}; all must be positive"
        )
    rng = np.random.RandomState(seed)
    kinds = list(CALLS)
    requests: list[TraceRequest] = []
    for number, at in enumerate(gamma_arrivals(rng, num_questions, rate)):
        arrival = float(at)
        revisions = min(MAX_REVISIONS, int(rng.geometric(1 / (1 + MEAN_REVISIONS))) - 1)
        before: tuple[str, ...] = ()
        done: list[str] = []
        for stage in stages(revisions):
            done += stage
            ids: list[str] = []
            for name in stage:
                call = CALLS[name]
                template = int(rng.choice(call.templates))
                prompt = template + max(1, _spread(rng, call.prompt - _mean(call.templates)))
                ids.append(f"hexgen-{number}-{len(done) - len(stage) + len(ids)}")
                own = 1_000 + 4_096 * len(requests)
                num_blocks = -(-prompt // template)
                requests.append(
                    TraceRequest(
                        request_id=ids[-1], arrival_s=arrival, num_input=prompt,
                        num_output=max(1, _spread(rng, call.output)),
                        blocks=(2 * kinds.index(name) + call.templates.index(template),
                                *range(own, own + num_blocks - 1)),
                        block_tokens=template,
                        workflow=WorkflowStage(
                            f"hexgen-{number}", name, arrival + slo_scale * base_s, remaining(done)
                        ),
                        after=before,
                    )
                )  # fmt: skip
            before = tuple(ids)
    return Trace("hexgen", tuple(requests))


def remaining(done: list[str]) -> tuple[str, ...]:
    """Stages of the standard workflow that are still expected; revisions no more once tests have begun."""
    left = list(STANDARD)
    for name in done:
        if name in left:
            left.remove(name)
    if "unit_tests" in done:
        left = [name for name in left if name != "revise"]
    return tuple(left)


def _mean(values: tuple[int, ...]) -> float:
    return sum(values) / len(values)


def _spread(rng: np.random.RandomState, mean: float) -> int:
    """A log-normal length with this mean."""
    return round(mean * float(np.exp(_SPREAD * rng.standard_normal() - _SPREAD**2 / 2)))
