"""What a job will take, before anything runs: tokens that sharing saves, pages, time.

    lines -> requests -> windows as the runner's -> plan of each, and the scheduler run without a model

The scheduler's run gives steps and pages, and with a cost model seconds; of a large window it is made with a
sample of whole groups and scaled by tokens. Outputs count as long as they are expected to be, which is
max_tokens unless something better is known, so that time and memory are upper bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from polybatch.config import PoolSpec, SchedulerConfig
from polybatch.errors import EngineError, RequestError
from polybatch.jobs.cache_simulation import LruPrefixCache
from polybatch.jobs.lines import Line
from polybatch.jobs.runner import PLANNED, Window
from polybatch.request import Request
from polybatch.scheduling.costs import StepCosts, shape_of
from polybatch.scheduling.plan import StepResult
from polybatch.scheduling.policies import BATCH_PRIORITY
from polybatch.scheduling.prefix_groups import Group, GroupPlan, PlanRow, plan_groups, prompt_key
from polybatch.scheduling.scheduler import Scheduler

MAX_SIMULATED_TOKENS = 200_000
"""Output tokens that are simulated for a window: a second or two."""


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What a job will take.

    rows: lines that can run, bad_lines: that cannot. completions: n of each. windows: parts that are planned
    one by one. groups: with at least two rows, rows_in_groups: theirs.
    prompt_tokens: of all prompts. Of these are computed: planned_tokens by the plan, one_level_tokens where
    only a group's common prefix is shared, lru_tokens in the order of the file with an LRU cache as large as
    the pool. output_tokens: expected. peak_pages: held at once, of pool_pages. seconds: None without a cost
    model.
    """

    rows: int = 0
    bad_lines: int = 0
    completions: int = 0
    windows: int = 0
    groups: int = 0
    rows_in_groups: int = 0
    adapters: int = 0
    prompt_tokens: int = 0
    planned_tokens: int = 0
    one_level_tokens: int = 0
    lru_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    peak_pages: int = 0
    pool_pages: int = 0
    page_size: int = 0
    pool_bytes: int = 0
    seconds: float | None = None

    @property
    def saving(self) -> float:
        """Share of prompt tokens that the plan need not compute."""
        return 1 - self.planned_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def lru_saving(self) -> float:
        """The same, for the cache in the order of the file."""
        return 1 - self.lru_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def peak_bytes(self) -> int:
        return self.pool_bytes * self.peak_pages // max(1, self.pool_pages)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "saving": round(self.saving, 4),
            "lru_saving": round(self.lru_saving, 4),
            "peak_bytes": self.peak_bytes,
        }


def plan_job(
    lines: Iterable[Line],
    requests_of: Callable[[Line], Sequence[Request]],
    config: SchedulerConfig,
    pool: PoolSpec,
    costs: StepCosts | None = None,
    window: Window = PLANNED,
) -> JobPlan:
    """Plan a job; memory is that of one window.

    requests_of: the requests of a line; raises RequestError for a bad one.
    """
    found = JobPlan(
        pool_pages=pool.num_pages, page_size=pool.page_size, pool_bytes=pool.total_bytes,
        seconds=None if costs is None else 0.0,
    )  # fmt: skip
    cache = LruPrefixCache(pool.num_pages, pool.page_size)
    adapters: set[str] = set()
    for requests, num_rows, num_bad in _windows(lines, requests_of, window):
        rows = [_row_of(request) for request in requests]
        plan = plan_groups(rows, pool.page_size)
        shared = [group for group in plan.groups if len(group.rows) > 1]
        adapters.update(row.adapter for row in rows if row.adapter)
        run = _run(requests, plan, config, pool, costs)
        found = replace(
            found,
            rows=found.rows + num_rows,
            bad_lines=found.bad_lines + num_bad,
            completions=found.completions + sum(request.params.n for request in requests),
            windows=found.windows + 1,
            groups=found.groups + len(shared),
            rows_in_groups=found.rows_in_groups + sum(len(group.rows) for group in shared),
            adapters=len(adapters),
            prompt_tokens=found.prompt_tokens + plan.logical_tokens,
            planned_tokens=found.planned_tokens + plan.multi_level_tokens,
            one_level_tokens=found.one_level_tokens + plan.one_level_tokens,
            lru_tokens=found.lru_tokens + sum(cache.add(row.namespace, row.key) for row in rows),
            output_tokens=found.output_tokens + sum(_num_output(request) for request in requests),
            steps=found.steps + run.steps,
            peak_pages=max(found.peak_pages, run.peak_pages),
            seconds=None if found.seconds is None else found.seconds + run.seconds,
        )
    return found


def _windows(
    lines: Iterable[Line], requests_of: Callable[[Line], Sequence[Request]], window: Window
) -> Iterator[tuple[list[Request], int, int]]:
    """Requests of consecutive lines as far as they fit a window, the rows that they are, and bad lines."""
    requests: list[Request] = []
    num_rows = num_bad = num_bytes = num_completions = 0
    for line in lines:
        try:
            found = requests_of(line)
        except RequestError:
            num_bad += 1
            continue
        requests += found
        num_rows += 1
        num_bytes += len(line.data or b"")
        num_completions += sum(request.params.n for request in found)
        if num_bytes >= window.max_bytes or num_completions >= window.max_completions:
            yield requests, num_rows, num_bad
            requests, num_rows, num_bad, num_bytes, num_completions = [], 0, 0, 0, 0
    if num_rows or num_bad:
        yield requests, num_rows, num_bad


def _row_of(request: Request) -> PlanRow:
    adapter = "" if request.adapter is None else request.adapter.digest
    return PlanRow(prompt_key(request.prompt_token_ids), _num_output(request), adapter, adapter)


def _num_output(request: Request) -> int:
    """Tokens expected of all completions."""
    return _expected(request) * request.params.n


def _expected(request: Request) -> int:
    return min(request.expected_tokens or request.max_tokens, request.max_tokens)


@dataclass(slots=True)
class _Run:
    steps: int = 0
    seconds: float = 0.0
    peak_pages: int = 0


def _run(
    requests: list[Request], plan: GroupPlan, config: SchedulerConfig, pool: PoolSpec, costs: StepCosts | None
) -> _Run:
    """Run the real scheduler over a window, or a sample of it, without a model."""
    sample = _sample(requests, plan.groups)
    scheduler = Scheduler(replace(config, policy="prefix_groups"), pool, costs=costs)
    work = all_work = 0
    for group in plan.groups:
        all_work += group.physical_tokens + int(group.expected_tokens)
    for group in sample:
        work += group.physical_tokens + int(group.expected_tokens)
        for index in group.rows:
            _add(scheduler, requests[index])
    run = _Run()
    while scheduler.has_work:
        step = scheduler.plan(run.seconds)
        if step is None:
            raise EngineError("nothing can be scheduled while rows of the simulated job wait")
        if costs is not None:
            run.seconds += costs.predict(shape_of(step, pool.page_size))
        run.steps += 1
        ends = (chunk.start + chunk.n_new == chunk.seq.num_tokens for chunk in step.chunks)
        tokens = tuple((0,) if is_end else () for is_end in ends)
        stats = scheduler.stats()
        run.peak_pages = max(run.peak_pages, stats.num_kv_pages + stats.num_adapter_pages)
        scheduler.commit(step, StepResult(tokens))
    scale = all_work / work if work else 1.0
    run.steps = round(run.steps * scale)
    run.seconds *= scale
    return run


def _add(scheduler: Scheduler, request: Request) -> None:
    """Let a request end at its expected length and by nothing else. Raises RequestError for one too large."""
    length = _expected(request)
    params = replace(request.params, min_tokens=0, max_tokens=length)
    scheduler.add(
        replace(
            request, params=params, max_tokens=length, expected_tokens=None, stop_token_ids=frozenset(),
            priority=BATCH_PRIORITY,
        ),
        0.0,
    )  # fmt: skip


def _sample(requests: list[Request], groups: Sequence[Group]) -> Sequence[Group]:
    """Groups evenly spread over the plan, about as many as may be simulated."""
    num_output = sum(_num_output(request) for request in requests)
    stride = -(-num_output // MAX_SIMULATED_TOKENS)
    return groups[:: max(1, stride)]
