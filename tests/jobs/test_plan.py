"""What a job is said to take is what the engine then takes."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_helpers import completion_line
from typer.testing import CliRunner

from polybatch.cli.main import app, main
from polybatch.config import PoolSpec, SchedulerConfig
from polybatch.errors import RequestError
from polybatch.jobs.cache_simulation import LruPrefixCache
from polybatch.jobs.lines import Line
from polybatch.jobs.plan import JobPlan, plan_job
from polybatch.jobs.runner import Window
from polybatch.request import AdapterRef, Request, SamplingParams
from polybatch.scheduling.costs import CostModel
from polybatch.scheduling.prefix_groups import prompt_key
from polybatch.scheduling.scheduler import Scheduler

POOL = PoolSpec(30, 16, 100, 2)
CONFIG = SchedulerConfig(max_num_batched_tokens=256, max_num_seqs=32)
COSTS = CostModel(base=0.01, per_token=0.001)


def job(num_groups: int = 8, size: int = 6) -> list[Request]:
    rng = random.Random(2)
    requests = []
    for group in range(num_groups):
        prefix = [rng.randrange(1000) for _ in range(96)]
        for row in range(size):
            tokens = tuple(prefix + [rng.randrange(1000) for _ in range(10)])
            requests.append(Request(f"{group}.{row}", tokens, SamplingParams(max_tokens=5), 5, 0))
    rng.shuffle(requests)
    return requests


def plan(
    requests: list[Request], *, window: Window | None = None, costs: CostModel | None = COSTS
) -> JobPlan:
    lines = [Line(number, b"x" * 100) for number in range(len(requests))]
    return plan_job(lines, lambda line: [requests[line.number]], CONFIG, POOL, costs, window or Window(10**6))


def test_tokens_pages_and_steps_are_those_of_the_scheduler() -> None:
    found = plan(job())
    scheduler = Scheduler(
        SchedulerConfig(max_num_batched_tokens=256, max_num_seqs=32, policy="prefix_groups"), POOL
    )
    assert found.rows == found.completions == 48
    assert (found.groups, found.rows_in_groups) == (8, 48)
    assert found.prompt_tokens == 48 * 106
    assert found.planned_tokens == found.one_level_tokens == 8 * 96 + 48 * 10
    assert found.output_tokens == 48 * 5
    assert found.lru_tokens > 1.5 * found.planned_tokens
    assert 7 + 10 <= found.peak_pages <= POOL.num_pages
    # Every token costs as much wherever it runs, and every step the base.
    num_tokens = found.planned_tokens + found.output_tokens - found.rows
    assert found.seconds == pytest.approx(0.01 * found.steps + 0.001 * num_tokens)
    assert scheduler.stats().num_pages == found.pool_pages


def test_without_costs_there_is_no_time() -> None:
    assert plan(job(), costs=None).seconds is None


def test_windows_bound_what_is_held_and_cost_sharing() -> None:
    whole, parts = plan(job()), plan(job(), window=Window(12))
    assert (whole.windows, parts.windows) == (1, 4)
    assert whole.planned_tokens < parts.planned_tokens < parts.prompt_tokens
    assert parts.rows == 48
    assert plan(job(), window=Window(10**6, max_bytes=800)).windows == 6


def test_a_sample_of_a_large_job_is_scaled_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan(job(num_groups=40))
    monkeypatch.setattr("polybatch.jobs.plan.MAX_SIMULATED_TOKENS", 300)
    sampled = plan(job(num_groups=40))
    assert sampled.planned_tokens == whole.planned_tokens
    assert sampled.steps == pytest.approx(whole.steps, rel=0.25)
    assert sampled.seconds == pytest.approx(whole.seconds, rel=0.25)


def test_bad_lines_are_counted_and_adapters_share_nothing() -> None:
    requests = job(num_groups=1)
    adapters = [AdapterRef("a", "a", 2), AdapterRef("b", "b", 2)]
    lines = [Line(number, b"x") for number in range(8)]

    def read(line: Line) -> list[Request]:
        if line.number >= 6:
            raise RequestError("temperature is -1")
        request = requests[line.number]
        return [Request(request.request_id, request.prompt_token_ids, request.params, 5, 0,
                        adapter=adapters[line.number % 2])]  # fmt: skip

    found = plan_job(lines, read, CONFIG, POOL)
    assert (found.rows, found.bad_lines, found.adapters, found.groups) == (6, 2, 2, 2)
    assert found.planned_tokens == 2 * 96 + 6 * 10


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), max_size=25),
    st.integers(1, 12),
    st.sampled_from([1, 2, 3]),
)
def test_the_cache_evicts_the_least_recently_used_leaf(
    prompts: list[list[int]], num_pages: int, page_size: int
) -> None:
    """Against pages named by all their tokens."""
    cache = LruPrefixCache(num_pages, page_size)
    pages: OrderedDict[tuple[int, ...], None] = OrderedDict()
    for prompt in prompts:
        ends = range(page_size, len(prompt) + 1, page_size)
        num_hits = 0
        for end in ends:
            if tuple(prompt[:end]) not in pages or end >= len(prompt):
                break
            num_hits += 1
        assert cache.add("", prompt_key(prompt)) == len(prompt) - num_hits * page_size
        for end in reversed(ends):
            pages[tuple(prompt[:end])] = None
            pages.move_to_end(tuple(prompt[:end]))
        while len(pages) > num_pages:
            pages.popitem(last=False)
        # Whoever is there has its parents there.
        assert all(page[:-page_size] in pages for page in pages if len(page) > page_size)


def write_job(path: Path) -> None:
    lines = [
        completion_line(f"{group}-{row}", f"{group} " * 60 + f"question {row}", model="stub", max_tokens=4,
                        ignore_eos=True, temperature=0)
        for row in range(6) for group in "abcd"
    ]  # fmt: skip
    path.write_text("".join([*lines, "not a line\n"]))


def test_the_command_says_what_the_batch_then_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_job(source)
    shown = CliRunner().invoke(
        app, ["plan-job", str(source), "--model", "stub", "--json"], catch_exceptions=False
    )
    found = json.loads(shown.stdout)
    assert (found["rows"], found["bad_lines"], found["groups"], found["seconds"]) == (24, 1, 4, None)
    table = CliRunner().invoke(app, ["plan-job", str(source), "--model", "stub"], catch_exceptions=False)
    assert "line 25: not a JSON object" in table.stdout
    with pytest.raises(SystemExit):
        main(["batch", "--model", "stub", "-i", str(source), "-o", str(out), "--quiet"])
    usages = [
        row["response"]["body"]["usage"]
        for row in map(json.loads, out.read_text().splitlines())
        if row["error"] is None
    ]
    computed = sum(u["prompt_tokens"] - u["prompt_tokens_details"]["cached_tokens"] for u in usages)
    # A prompt's last page, partly filled, is found by others only once its row has ended.
    assert found["planned_tokens"] <= computed <= found["planned_tokens"] + 16 * 24
    assert found["prompt_tokens"] - computed >= 0.97 * (found["prompt_tokens"] - found["planned_tokens"])
    assert sum(u["prompt_tokens"] for u in usages) == found["prompt_tokens"]


def test_the_table_names_the_way_to_a_time_and_expected_tokens_count(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write_job(source)
    shown = CliRunner().invoke(
        app, ["plan-job", str(source), "--model", "stub", "--expected-tokens", "2"], catch_exceptions=False
    )
    assert "polybatch calibrate" in shown.stdout
    assert "48 output tokens expected" in shown.stdout


def test_a_rows_own_estimate_comes_before_that_for_all(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(
        completion_line("own", "x", model="stub", expected_tokens=3)
        + completion_line("plain", "x", model="stub")
    )
    shown = CliRunner().invoke(
        app, ["plan-job", str(source), "--model", "stub", "--expected-tokens", "9"], catch_exceptions=False
    )
    assert "12 output tokens expected" in shown.stdout


@pytest.mark.parametrize("flags", [[], ["--scheduling-policy", "fcfs"]])
def test_a_batch_answers_the_same_under_any_policy(tmp_path: Path, flags: list[str]) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_job(source)
    with pytest.raises(SystemExit):
        main(["batch", "--model", "stub:num_pages=40", "--max-model-len", "512", "-i", str(source),
              "-o", str(out), "--quiet", "--served-model-name", "stub", *flags])  # fmt: skip
    answers = {
        row["custom_id"]: row["response"]["body"]["choices"][0]["text"]
        for row in map(json.loads, out.read_text().splitlines())
        if row["error"] is None
    }
    reference = tmp_path / "reference.jsonl"
    with pytest.raises(SystemExit):
        main(["batch", "--model", "stub", "-i", str(source), "-o", str(reference), "--quiet",
              "--scheduling-policy", "priority"])  # fmt: skip
    expected = {
        row["custom_id"]: row["response"]["body"]["choices"][0]["text"]
        for row in map(json.loads, reference.read_text().splitlines())
        if row["error"] is None
    }
    assert len(answers) == 24
    assert answers == expected
