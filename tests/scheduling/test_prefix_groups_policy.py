"""The policy `prefix_groups` in the real scheduler: what it computes, holds and promises."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_helpers import Driver, adapter_of, pool_of, random_request, request_of

from polybatch.config import PoolSpec, SchedulerConfig
from polybatch.errors import RequestError
from polybatch.request import Request
from polybatch.scheduling.plan import LogitRows, StepPlan, StepResult
from polybatch.scheduling.policies import BATCH_PRIORITY
from polybatch.scheduling.prefix_groups import PlanRow, plan_groups, prompt_key
from polybatch.scheduling.scheduler import Scheduler

PAGE = 16


def job(
    num_groups: int, size: int, prefix: int, private: int, outputs: tuple[int, int], inner: int = 0
) -> list[Request]:
    """Shuffled rows in groups with a common prefix; inner: further tokens that half a group shares."""
    rng = random.Random(42)

    def draw(n: int) -> list[int]:
        return [rng.randrange(100, 9999) for _ in range(n)]

    prompts = []
    for _ in range(num_groups):
        common, halves = draw(prefix), (draw(inner), draw(inner))
        prompts += [common + halves[i % 2] + draw(private) for i in range(size)]
    rng.shuffle(prompts)
    return [
        request_of(f"r{i}", prompt, rng.randint(*outputs), priority=BATCH_PRIORITY)
        for i, prompt in enumerate(prompts)
    ]


class Run:
    """A scheduler stepped to its end without a model."""

    def __init__(self, policy: str, requests: list[Request], num_pages: int, max_num_seqs: int = 256) -> None:
        config = SchedulerConfig(max_num_batched_tokens=512, max_num_seqs=max_num_seqs, policy=policy)
        self.scheduler = Scheduler(config, PoolSpec(num_pages, PAGE, 64, 1))
        for request in requests:
            self.scheduler.add(request, 0.0)
        self.steps: list[StepPlan] = []
        self.peak_pages = 0
        while self.scheduler.has_work:
            plan = self.scheduler.plan(float(len(self.steps)))
            assert plan is not None
            tokens = tuple((1,) if chunk.logits is LogitRows.LAST else () for chunk in plan.chunks)
            self.scheduler.commit(plan, StepResult(tokens))
            self.steps.append(plan)
            stats = self.scheduler.stats()
            self.peak_pages = max(self.peak_pages, stats.num_kv_pages + stats.num_cached_pages)
            if len(self.steps) % 20 == 0:
                self.scheduler.check()
        self.stats = self.scheduler.stats()

    @property
    def decode_batch(self) -> float:
        """Mean tokens of steps of which most are decodes."""
        sizes = [p.num_tokens for p in self.steps if 2 * sum(c.n_new == 1 for c in p.chunks) > p.num_tokens]
        return sum(sizes) / len(sizes)


def optimum_of(requests: list[Request]) -> tuple[int, int]:
    plan = plan_groups([PlanRow(prompt_key(request.prompt_token_ids)) for request in requests])
    return plan.multi_level_tokens, plan.logical_tokens


@pytest.mark.parametrize("inner", [0, 48])
@pytest.mark.parametrize("num_pages", [120, 400])
def test_a_shuffled_job_saves_what_the_tree_over_all_prompts_can_save_and_more_than_a_cache(
    inner: int, num_pages: int
) -> None:
    requests = job(24, 16, 200, 20, (4, 12), inner)
    least, logical = optimum_of(requests)
    planned, cached = Run("prefix_groups", requests, num_pages), Run("fcfs", requests, num_pages)
    saved = logical - planned.stats.num_prefill_tokens
    assert saved >= 0.97 * (logical - least)
    assert saved > logical - cached.stats.num_prefill_tokens
    assert planned.stats.num_preemptions == 0


def test_pages_are_held_for_groups_that_run_and_for_no_others() -> None:
    """However long the job: of the pool, most is never touched."""
    requests = job(60, 8, 320, 16, (4, 4))
    run = Run("prefix_groups", requests, num_pages=4000, max_num_seqs=16)
    assert run.stats.num_cached_pages == 0
    per_group, per_row = 320 // PAGE, 3
    # Two groups' rows run, and while they end the next ones' first members compute.
    assert run.peak_pages <= 6 * per_group + 16 * per_row
    assert run.stats.num_prefill_tokens == optimum_of(requests)[0]


def test_decode_steps_are_fuller_where_pages_bound_them_instead_of_a_number_of_requests() -> None:
    requests = job(16, 16, 160, 16, (60, 120))
    planned, cached = Run("prefix_groups", requests, 300), Run("fcfs", requests, 300)
    capped = Run("prefix_groups", requests, 300, max_num_seqs=16)
    assert planned.decode_batch > 1.4 * cached.decode_batch
    assert planned.decode_batch > 1.2 * capped.decode_batch
    assert len(planned.steps) < len(cached.steps)
    assert planned.stats.num_preemptions == 0


def test_outputs_far_longer_than_others_of_their_kind_still_end() -> None:
    rng = random.Random(5)
    driver = Driver(SchedulerConfig(policy="prefix_groups"), pool_of(40))
    for i in range(60):
        # Most stop at their first token; what is learned from them is wrong for the rest.
        request = request_of(f"r{i}", [rng.randrange(50)], 30, priority=BATCH_PRIORITY)
        driver.add(request)
    while driver.scheduler.has_work:
        driver.step()
        for seq in driver.live:
            if seq.num_output == 1 and int(seq.request.request_id[1:]) < 40:
                driver.scheduler.finish(seq, "stop")  # type: ignore[arg-type]
        driver.forget_ended()
    driver.scheduler.check()
    assert driver.scheduler.stats().num_kv_pages == 0


def test_live_requests_are_not_held_back_by_a_job() -> None:
    """They start in the step after they came, whatever is planned, and end as fast as alone."""
    config = SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=8, policy="prefix_groups")
    driver = Driver(config, pool_of(60))
    for request in [request_of(f"b{i}", [i % 3] * 12 + [i], 30, priority=BATCH_PRIORITY) for i in range(50)]:
        driver.add(request)
    for number in range(10):
        for _ in range(3):
            driver.step()
        (seq,) = driver.add(request_of(f"live{number}", [7] * 10, 5))
        for _ in range(5 + 1):
            # One more: where a row ran out of pages, admissions are put off to the next step.
            driver.step()
        assert seq.num_output == 5
    driver.run()


def test_an_adapter_is_loaded_once_where_rows_would_load_it_over_and_over() -> None:
    rng = random.Random(3)
    adapters = [adapter_of(f"a{i}", num_pages=6) for i in range(12)]
    requests = [
        request_of(f"r{i}", [rng.randrange(9) for _ in range(12)], 4, adapter=rng.choice(adapters),
                   priority=BATCH_PRIORITY)
        for i in range(240)
    ]  # fmt: skip
    loads = {}
    for policy in ("prefix_groups", "fcfs"):
        driver = Driver(SchedulerConfig(max_num_seqs=8, policy=policy), pool_of(60))
        for request in requests:
            driver.add(request)
        driver.run()
        loads[policy] = driver.scheduler.stats().num_adapter_loads
    assert loads["prefix_groups"] == len(adapters)
    assert loads["fcfs"] > 2 * len(adapters)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_pages=st.integers(8, 60),
    page_size=st.sampled_from([1, 2, 4, 8]),
    budget=st.sampled_from([1, 3, 8, 40]),
    max_num_seqs=st.sampled_from([1, 2, 5, 16]),
    has_cache=st.booleans(),
)
def test_rows_and_live_requests_all_finish_with_exact_pages(
    seed: int, num_pages: int, page_size: int, budget: int, max_num_seqs: int, has_cache: bool
) -> None:
    """The driver checks every read, every plan and the books after every step."""
    config = SchedulerConfig(
        max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, max_model_len=64, policy="prefix_groups",
        enable_prefix_caching=has_cache,
    )  # fmt: skip
    driver = Driver(config, pool_of(num_pages, page_size), empty_every=5)
    rng = random.Random(seed)
    adapters = [adapter_of(f"a{index}", index % 4) for index in range(6)]
    for number in range(40):
        request = random_request(rng, f"r{number}", adapters, min(48, num_pages * page_size))
        if rng.random() < 0.7:
            request = as_row(request)
        try:
            driver.add(request)
        except RequestError as error:
            assert "pages" in str(error)  # noqa: PT017
        if rng.random() < 0.1 and driver.live:
            driver.abort(rng.choice(driver.live).request.request_id)
        for _ in range(rng.choice([0, 0, 1, 4])):
            driver.step()
    driver.run()


def as_row(request: Request) -> Request:
    names = ("request_id", "prompt_token_ids", "params", "max_tokens", "seed", "stop_token_ids", "adapter",
             "cache_salt", "tenant", "num_shared_tokens")  # fmt: skip
    return Request(**{name: getattr(request, name) for name in names}, priority=BATCH_PRIORITY)
