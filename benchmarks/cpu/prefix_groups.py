"""The global plan against first come, first served with a prefix cache: one job of groups, pages scarce.

    python -m benchmarks.cpu.prefix_groups --out benchmarks/results/scheduling/prefix_groups.json

Claim: on BatchLLM's workload scaled to a CPU (groups of 16 rows, a common prefix ten times as long as a row's
own part, 10 to 20 outputs, shuffled with seed 42) and a pool too small for all prefixes, the plan computes no
prompt token twice, and the job takes less than two thirds of the time that it takes in order of arrival,
where an LRU prefix cache of the same size finds what it can. The ceiling: tokens that must be computed.

Both engines live in one process and run the job by turns, with prompts drawn anew for each round, so what
else the machine does falls on both. Outputs are compared: they must be equal. The second part needs no model:
it counts tokens per step of a decode-heavy job for both policies, and for the plan with a bound on requests
instead of pages.
Source: Zheng et al. 2024 (BatchLLM), the workload of its test of shared contexts.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polybatch import LLM, SamplingParams
from polybatch.bench import meter, results
from polybatch.config import PoolSpec, SchedulerConfig
from polybatch.request import Request
from polybatch.scheduling.plan import LogitRows, StepResult
from polybatch.scheduling.policies import BATCH_PRIORITY
from polybatch.scheduling.prefix_groups import PlanRow, plan_groups, prompt_key
from polybatch.scheduling.scheduler import Scheduler

POLICIES = ("fcfs", "prefix_groups")
GROUP_SIZE = 16
PAGE_SIZE = 16
MAX_MODEL_LEN = 512


@dataclass(frozen=True, slots=True)
class Row:
    tokens: list[int]
    num_output: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One job. cpu_s: processor seconds of all threads of this process, which others' work hardly moves."""

    policy: str
    wall_s: float
    cpu_s: float
    prefill_tokens: int
    steps: int
    preemptions: int


def draw_job(
    num_groups: int, prefix: int, private: int, outputs: tuple[int, int], vocab_size: int, seed: int
) -> list[Row]:
    """Rows in groups of 16 with a common prefix, in the order of a shuffle with seed 42."""
    rng = random.Random(seed)

    def draw(n: int) -> list[int]:
        return [rng.randrange(100, vocab_size) for _ in range(n)]

    rows = []
    for _ in range(num_groups):
        common = draw(prefix)
        rows += [Row(common + draw(private), rng.randint(*outputs)) for _ in range(GROUP_SIZE)]
    random.Random(42).shuffle(rows)
    return rows


def bounds(rows: list[Row]) -> dict[str, int]:
    """Prompt tokens in all, with one level of sharing, and at least."""
    plan = plan_groups([PlanRow(prompt_key(row.tokens), row.num_output) for row in rows], PAGE_SIZE)
    return {
        "logical": plan.logical_tokens,
        "one_level": plan.one_level_tokens,
        "multi_level": plan.multi_level_tokens,
    }


def run_job(llm: LLM, policy: str, rows: list[Row]) -> tuple[Measured, list[list[int]]]:
    """Have the engine run the job; returns what it took and the outputs."""
    params = [SamplingParams(temperature=0, max_tokens=row.num_output, ignore_eos=True) for row in rows]
    before = llm.stats()
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate([row.tokens for row in rows], params)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = llm.stats()
    measured = Measured(
        policy, round(wall, 2), round(cpu, 2),
        after.scheduler.num_prefill_tokens - before.scheduler.num_prefill_tokens,
        after.times.num_steps - before.times.num_steps,
        after.scheduler.num_preemptions - before.scheduler.num_preemptions,
    )  # fmt: skip
    return measured, [output.outputs[0].token_ids for output in outputs]


def count_steps(rows: list[Row], policy: str, num_pages: int, max_num_seqs: int) -> dict[str, Any]:
    """Run the scheduler over a job without a model; a step is dominated by decodes if most tokens are."""
    config = SchedulerConfig(policy=policy, max_num_seqs=max_num_seqs)
    scheduler = Scheduler(config, PoolSpec(num_pages, PAGE_SIZE, 1, 1))
    for number, row in enumerate(rows):
        params = SamplingParams(max_tokens=row.num_output)
        request = Request(str(number), tuple(row.tokens), params, row.num_output, 0, priority=BATCH_PRIORITY)
        scheduler.add(request, 0.0)
    sizes, num_steps = [], 0
    while scheduler.has_work:
        plan = scheduler.plan(float(num_steps))
        assert plan is not None
        num_steps += 1
        if 2 * sum(chunk.n_new == 1 for chunk in plan.chunks) > plan.num_tokens:
            sizes.append(plan.num_tokens)
        tokens = tuple((1,) if chunk.logits is LogitRows.LAST else () for chunk in plan.chunks)
        scheduler.commit(plan, StepResult(tokens))
    stats = scheduler.stats()
    return {
        "policy": policy,
        "max_num_seqs": max_num_seqs,
        "steps": num_steps,
        "decode_dominated_steps": len(sizes),
        "tokens_per_decode_dominated_step": round(statistics.mean(sizes), 1),
        "prefill_tokens": stats.num_prefill_tokens,
        "preemptions": stats.num_preemptions,
    }


def valleys(num_pages: int) -> dict[str, Any]:
    """A decode-heavy job: 160 + 16 tokens of input and 60 to 120 of output, in groups of 16."""
    rows = draw_job(32, 160, 16, (60, 120), 49_152, seed=7)
    runs = [
        count_steps(rows, "fcfs", num_pages, 256),
        count_steps(rows, "prefix_groups", num_pages, 16),
        count_steps(rows, "prefix_groups", num_pages, 256),
    ]
    return {"rows": len(rows), "pages": num_pages, "bounds": bounds(rows), "runs": runs}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--quantization")
    parser.add_argument("--groups", type=int, default=10)
    parser.add_argument("--prefix", type=int, default=400)
    parser.add_argument("--private", type=int, default=40)
    parser.add_argument("--pages", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    decode_heavy = valleys(300)
    for run in decode_heavy["runs"]:
        print(run)
    rounds, least = measure(arguments)
    ratios = [by["fcfs"].wall_s / by["prefix_groups"].wall_s for by in rounds]
    cpu_ratios = [by["fcfs"].cpu_s / by["prefix_groups"].cpu_s for by in rounds]
    line = {
        "speedup": round(statistics.median(ratios), 2),
        "speedup_cpu": round(statistics.median(cpu_ratios), 2),
        "prefill_tokens": {name: rounds[0][name].prefill_tokens for name in POLICIES},
        "prefill_tokens_at_least": least["multi_level"],
    }
    if arguments.out:
        document = {
            "command": "python -m benchmarks.cpu.prefix_groups " + " ".join(argv or sys.argv[1:]),
            "machine": meter.as_dict(meter.machine()),
            "settings": {name: str(value) for name, value in vars(arguments).items()},
            "summary": line,
            "bounds": least,
            "rounds": [{name: asdict(found) for name, found in by.items()} for by in rounds],
            "decode_heavy": decode_heavy,
        }
        results.write(arguments.out, document)
    print(json.dumps(line))


def measure(arguments: argparse.Namespace) -> tuple[list[dict[str, Measured]], dict[str, int]]:
    """Run both engines by turns, each round in the other order. Exits if their outputs differ."""
    engines: dict[str, LLM] = {}
    for policy in POLICIES:
        engines[policy] = LLM(
            arguments.model, quantization=arguments.quantization, max_model_len=MAX_MODEL_LEN,
            memory=arguments.pages * _page_bytes(arguments), threads=arguments.threads, policy=policy,
        )  # fmt: skip
    vocab_size = engines["fcfs"].spec.vocab_size
    warm = draw_job(1, 64, 16, (4, 4), vocab_size, seed=0)
    for policy, llm in engines.items():
        run_job(llm, policy, warm)
    rounds = []
    for number in range(arguments.rounds):
        rows = draw_job(
            arguments.groups, arguments.prefix, arguments.private, (10, 20), vocab_size, seed=number + 1
        )
        found: dict[str, Measured] = {}
        outputs = {}
        for policy in POLICIES if number % 2 else reversed(POLICIES):
            found[policy], outputs[policy] = run_job(engines[policy], policy, rows)
            print(found[policy], flush=True)
        if outputs["fcfs"] != outputs["prefix_groups"]:
            sys.exit("outputs differ between the policies")
        rounds.append(found)
        least = bounds(rows)
    for llm in engines.values():
        llm.close()
    return rounds, least


def _page_bytes(arguments: argparse.Namespace) -> int:
    """Of one page in all layers."""
    from polybatch.engine.config import EngineConfig
    from polybatch.engine.executors import page_bytes
    from polybatch.models.loader import load_model

    spec = load_model(arguments.model).spec
    return page_bytes(EngineConfig(quantization=arguments.quantization), spec) * spec.num_layers


if __name__ == "__main__":
    main()
