"""What the scheduler plans, case by case. Laws under random traffic are in `test_random_traffic`."""

from __future__ import annotations

import pytest
from scheduling_helpers import Driver, adapter_of, is_decoding, pool_of, request_of

from polybatch.config import SchedulerConfig
from polybatch.errors import ConfigError, EngineError, RequestError
from polybatch.request import FinishReason, SequenceStatus
from polybatch.scheduling.budget import MIN_PREFILL_TOKENS
from polybatch.scheduling.plan import LogitRows, StepResult


def shape(driver: Driver) -> list[tuple[str, int, int, LogitRows]]:
    """The next step, carried out: request, start, n_new, logits of each chunk."""
    driver.step()
    return [(c.seq.request.request_id, c.start, c.n_new, c.logits) for c in driver.plans[-1].chunks]


def test_a_long_prompt_is_cut_to_the_budget_and_only_its_last_chunk_has_logits() -> None:
    driver = Driver(SchedulerConfig(max_num_batched_tokens=8), pool_of(16))
    driver.add(request_of("a", 20, 2))
    assert [shape(driver)[0] for _ in range(4)] == [
        ("a", 0, 8, LogitRows.NONE),
        ("a", 8, 8, LogitRows.NONE),
        ("a", 16, 4, LogitRows.LAST),
        ("a", 20, 1, LogitRows.LAST),
    ]
    assert not driver.scheduler.has_work


def test_decodes_come_first_then_running_prefills_then_admissions() -> None:
    driver = Driver(SchedulerConfig(max_num_batched_tokens=40), pool_of(64))
    driver.add(request_of("decode", [9, 9, 9], 9))
    driver.step()
    driver.add(request_of("long", list(range(50, 110)), 2))
    driver.step()
    driver.add(request_of("new", [8] * 30, 2))
    assert shape(driver) == [
        ("decode", 4, 1, LogitRows.LAST),
        ("long", 39, 21, LogitRows.LAST),
        ("new", 0, 18, LogitRows.NONE),
    ]


def test_decodes_beyond_the_budget_all_run_and_leave_prefill_a_minimal_chunk() -> None:
    driver = Driver(SchedulerConfig(max_num_batched_tokens=50), pool_of(400))
    for index in range(60):
        driver.add(request_of(f"d{index}", [index, 1], 90))
    while not all(is_decoding(seq) for seq in driver.live):
        driver.step()
    driver.add(request_of("new", [3] * 90, 2))
    chunks = shape(driver)
    assert len(chunks) == 61
    assert chunks[-1] == ("new", 0, MIN_PREFILL_TOKENS, LogitRows.NONE)


def test_a_prompt_is_admitted_whole_or_not_at_all() -> None:
    driver = Driver(SchedulerConfig(), pool_of(10))
    driver.add(request_of("a", [1] * 20, 2))
    later = driver.add(request_of("b", [2] * 24, 2))[0]
    driver.step()
    assert later.status is SequenceStatus.WAITING
    assert later.pages == []
    driver.run()


def test_an_admission_leaves_the_watermark_to_those_who_run() -> None:
    driver = Driver(SchedulerConfig(), pool_of(10))
    driver.add(request_of("a", [1] * 20, 2))
    later = driver.add(request_of("b", [2] * 20, 1))[0]
    driver.step()
    assert later.status is SequenceStatus.WAITING
    driver.run()


def test_a_lone_request_may_take_the_whole_pool() -> None:
    driver = Driver(SchedulerConfig(), pool_of(10))
    driver.add(request_of("warm", [1] * 20, 2))
    driver.run()
    seq = driver.add(request_of("a", [1] * 19 + [2] * 21, 1))[0]
    driver.run()
    assert seq.num_output == 1


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "num_adapter_pages", "field", "words"),
    [
        (5120, 1, 0, "prompt", "5,120 tokens, max_model_len is 4,096"),
        (4090, 7, 0, "max_tokens", "from 1 to 6"),
        (100, 30, 0, "max_tokens", "33 pages .*raise memory"),
        (100, 20, 3, "max_tokens", "33 pages .*3 for its adapter.*lower max_tokens"),
        (0, 5, 0, "prompt", "at least one"),
    ],
)
def test_what_can_never_be_served_is_refused_at_the_door(
    prompt: int, max_tokens: int, num_adapter_pages: int, field: str, words: str
) -> None:
    num_pages = 32 if prompt < 4000 else 10_000
    driver = Driver(SchedulerConfig(max_model_len=4096), pool_of(num_pages))
    adapter = adapter_of("a", num_adapter_pages)
    with pytest.raises(RequestError, match=words) as caught:
        driver.add(request_of("r", prompt, max_tokens, adapter=adapter))
    assert caught.value.field == field
    assert not driver.scheduler.has_work


def test_what_just_fits_is_served() -> None:
    driver = Driver(SchedulerConfig(max_model_len=129), pool_of(32))
    # 129 tokens, the last of which never needs KV.
    seq = driver.add(request_of("r", 100, 29))[0]
    driver.run()
    assert seq.num_tokens == 129


def test_a_request_id_in_use_is_refused() -> None:
    driver = Driver(SchedulerConfig(), pool_of(8))
    driver.add(request_of("r", 2))
    with pytest.raises(RequestError, match="'r' is in use"):
        driver.add(request_of("r", 3))
    driver.run()
    driver.add(request_of("r", 3))
    driver.run()


def test_a_finished_sequences_pages_serve_the_next_turn() -> None:
    driver = Driver(SchedulerConfig(), pool_of(32))
    first = driver.add(request_of("turn-1", 10, 6))[0]
    driver.run()
    second = driver.add(request_of("turn-2", [*first.tokens, 7, 8, 9], 2))[0]
    driver.run()
    # 15 of turn 1's 16 tokens have KV: three full pages are shared and three tokens copied.
    assert second.num_cached == 15
    assert driver.scheduler.stats().num_prefix_hit_tokens == 15
    assert driver.scheduler.stats().num_prefix_query_tokens == 29


def test_a_page_that_is_copied_from_is_not_overwritten_by_a_load_of_the_same_plan() -> None:
    driver = Driver(SchedulerConfig(), pool_of(11))
    for index in range(2):
        driver.add(request_of(f"warm-{index}", [index + 1] * 3, 1))
        driver.run()
    driver.plans.clear()
    for index in range(2):
        driver.add(request_of(f"copy-{index}", [index + 1, index + 1, 9], 3))
    # Fits only if the two sources, which nobody shares, count as room.
    driver.add(request_of("load", [8] * 4, 1, adapter=adapter_of("big", 7)))
    driver.step()
    assert len(driver.plans[0].copies) == 2
    assert driver.plans[0].loads == ()
    driver.run()


def test_nothing_of_a_plan_that_failed_is_ever_read() -> None:
    driver = Driver(SchedulerConfig(), pool_of(32))
    driver.add(request_of("warm", [1, 2, 3], 1))
    driver.run()
    driver.add(request_of("aborted", [1, 2, 9], 3))
    driver.add(request_of("failed", [5] * 9, 3, adapter=adapter_of("sql", 2)))
    plan = driver.plan()
    assert plan is not None
    assert len(plan.copies) == len(plan.loads) == 1
    driver.abort("aborted")
    assert [seq.request.request_id for seq in driver.scheduler.discard(plan)] == ["failed"]
    driver.forget_ended()
    driver.scheduler.check()
    driver.add(request_of("aborted", [1, 2, 9, 9], 3))
    driver.add(request_of("failed", [5] * 9, 3, adapter=adapter_of("sql", 2)))
    driver.run()
    assert driver.scheduler.stats().num_adapter_loads == 2


def test_requests_of_one_prefix_that_arrive_together_compute_it_once() -> None:
    driver = Driver(SchedulerConfig(max_num_batched_tokens=64), pool_of(128))
    for index in range(8):
        driver.add(request_of(f"r{index}", [*range(100, 140), index, index], 2))
    driver.add(request_of("other", [5] * 10, 2))
    driver.step()
    assert [chunk.seq.request.request_id for chunk in driver.plans[0].chunks] == ["r0", "other"]
    driver.run()
    assert driver.scheduler.stats().num_prefill_tokens == 42 + 10 + 7 * 2


def test_a_prefix_of_another_salt_or_adapter_content_is_never_met() -> None:
    driver = Driver(SchedulerConfig(), pool_of(64))
    old, new = adapter_of("sql", version=1), adapter_of("sql", version=2)
    cached = []
    for index, (adapter, salt) in enumerate([(old, "a"), (old, "b"), (new, "a"), (None, "a"), (old, "a")]):
        cached.append(driver.add(request_of(f"r{index}", 9, 2, adapter=adapter, salt=salt))[0])
        driver.run()
    assert [seq.num_cached for seq in cached] == [0, 0, 0, 0, 8]


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("num_prompt", [1, 3, 4, 8, 11])
def test_siblings_compute_only_the_last_prompt_token(num_prompt: int, enable_prefix_caching: bool) -> None:
    driver = Driver(SchedulerConfig(enable_prefix_caching=enable_prefix_caching), pool_of(64))
    sequences = driver.add(request_of("r", num_prompt, 6, n=4))
    driver.step()
    assert [chunk.seq.index for chunk in driver.plans[0].chunks] == [0]
    driver.run()
    assert [seq.num_cached for seq in sequences] == [0, *[num_prompt - 1] * 3]
    assert driver.scheduler.stats().num_prefill_tokens == num_prompt + 3
    if not enable_prefix_caching:
        assert driver.scheduler.stats().num_free_pages == 64


def test_without_prefix_caching_nothing_is_reused() -> None:
    driver = Driver(SchedulerConfig(enable_prefix_caching=False), pool_of(32))
    for index in range(2):
        seq = driver.add(request_of(f"r{index}", 12, 2))[0]
        driver.run()
        assert seq.num_cached == 0
        assert driver.scheduler.stats().num_free_pages == 32


def test_when_the_first_sibling_is_gone_the_next_computes_the_prompt() -> None:
    driver = Driver(SchedulerConfig(max_num_batched_tokens=4), pool_of(64))
    sequences = driver.add(request_of("r", 12, 2, n=3))
    driver.step()
    driver.scheduler.finish(sequences[0], FinishReason.ERROR)
    driver.forget_ended()
    driver.run()
    assert [seq.finish_reason for seq in sequences] == [
        FinishReason.ERROR,
        FinishReason.LENGTH,
        FinishReason.LENGTH,
    ]


def test_prompt_logprobs_need_all_rows_and_read_no_cache() -> None:
    driver = Driver(SchedulerConfig(max_num_batched_tokens=6), pool_of(32))
    driver.add(request_of("warm", 10, 1))
    driver.run()
    driver.plans.clear()
    driver.add(request_of("scored", 10, 2, prompt_logprobs=1))
    assert [shape(driver)[0] for _ in range(3)] == [
        ("scored", 0, 6, LogitRows.ALL),
        ("scored", 6, 4, LogitRows.ALL),
        ("scored", 10, 1, LogitRows.LAST),
    ]


def test_the_latest_is_preempted_waits_in_front_and_resumes_from_the_cache() -> None:
    driver = Driver(SchedulerConfig(), pool_of(12, 2))
    first = driver.add(request_of("first", [1] * 8, 12))[0]
    second = driver.add(request_of("second", [2] * 8, 12))[0]
    while not driver.plans or not driver.plans[-1].preempted:
        driver.step()
    third = driver.add(request_of("third", [3] * 2, 2))[0]
    assert driver.plans[-1].preempted == (second,)
    assert second.status is SequenceStatus.WAITING
    assert second.num_computed == 0
    num_before = second.num_tokens
    driver.run()
    assert (first.num_preemptions, third.num_preemptions) == (0, 0)
    order = [chunk.seq for plan in driver.plans for chunk in plan.chunks if chunk.seq is not first]
    assert order.index(third) > max(
        i for i, seq in enumerate(order[:-1]) if seq is second and i < order.index(third)
    )
    assert second.num_output == 12
    assert num_before > second.num_prompt


def test_an_adapter_is_loaded_once_and_shared_by_those_who_run() -> None:
    driver = Driver(SchedulerConfig(), pool_of(32))
    sql = adapter_of("sql", 3)
    for index in range(3):
        driver.add(request_of(f"r{index}", [index] * 4, 4, adapter=sql))
    driver.run()
    assert sum(len(plan.loads) for plan in driver.plans) == 1
    assert len(driver.plans[0].loads[0].pages) == 3


def test_an_adapter_is_prefetched_while_its_first_request_waits() -> None:
    driver = Driver(SchedulerConfig(max_num_seqs=1), pool_of(32))
    driver.add(request_of("running", 4, 6))
    driver.step()
    waiting = driver.add(request_of("waiting", 4, 2, adapter=adapter_of("sql", 2)))[0]
    driver.step()
    assert [load.adapter.name for load in driver.plans[-1].loads] == ["sql"]
    assert waiting.status is SequenceStatus.WAITING
    assert driver.plans[-1].resident == {}
    driver.run()
    assert driver.scheduler.stats().num_adapter_loads == 1


def test_a_prefetch_takes_nothing_that_is_in_use_or_needed_sooner() -> None:
    driver = Driver(SchedulerConfig(max_num_seqs=1), pool_of(12))
    driver.add(request_of("warm", 1, 1, adapter=adapter_of("next", 4)))
    driver.run()
    driver.add(request_of("running", 4, 6, adapter=adapter_of("used", 4)))
    driver.step()
    driver.add(request_of("second", 4, 2, adapter=adapter_of("next", 4)))
    driver.add(request_of("third", 4, 2, adapter=adapter_of("later", 4)))
    driver.plans.clear()
    driver.step()
    # 12 pages: 4 + 4 for the adapters, 2 for the sequence; 2 are free and 4 would be needed.
    assert driver.plans[-1].loads == ()
    driver.run()


def test_a_pinned_adapter_outlives_all_others() -> None:
    driver = Driver(SchedulerConfig(max_num_seqs=2), pool_of(16))
    pinned = adapter_of("pinned", 2)
    driver.scheduler.pin(pinned)
    for index in range(30):
        driver.add(request_of(f"r{index}", [index] * 4, 4, adapter=adapter_of(f"a{index}", 4)))
    driver.add(request_of("last", 4, 2, adapter=pinned))
    driver.run()
    loads = [load.adapter.name for plan in driver.plans for load in plan.loads]
    assert loads.count("pinned") == 1


def test_a_pin_that_starves_a_live_request_is_refused() -> None:
    driver = Driver(SchedulerConfig(), pool_of(16))
    driver.add(request_of("r", 4, 50))
    with pytest.raises(ConfigError, match="pin fewer adapters or raise memory"):
        driver.scheduler.pin(adapter_of("big", 3))
    driver.scheduler.pin(adapter_of("small", 2))
    with pytest.raises(RequestError, match="2 more hold pinned adapters"):
        driver.add(request_of("s", 4, 57))
    driver.run()


def commit_tokens(driver: Driver, *tokens: int) -> list[FinishReason | None]:
    plan = driver.plan()
    assert plan is not None
    driver.device.execute(plan)
    finished = driver.scheduler.commit(plan, StepResult(tokens=(tokens,)))
    driver.forget_ended()
    driver.scheduler.check()
    return [seq.finish_reason for seq in finished]


def test_a_stop_token_ends_the_sequence_but_not_before_min_tokens() -> None:
    driver = Driver(SchedulerConfig(), pool_of(16))
    seq = driver.add(request_of("r", 3, 9, stop=frozenset({2}), min_tokens=3))[0]
    assert commit_tokens(driver, 2) == []
    assert commit_tokens(driver, 2) == []
    assert commit_tokens(driver, 2) == [FinishReason.STOP]
    assert seq.output_token_ids == [2, 2, 2]


def test_max_tokens_ends_with_length_unless_the_last_token_stops() -> None:
    for last, reason in ((5, FinishReason.LENGTH), (2, FinishReason.STOP)):
        driver = Driver(SchedulerConfig(), pool_of(16))
        driver.add(request_of("r", 3, 2, stop=frozenset({2})))
        assert commit_tokens(driver, 5) == []
        assert commit_tokens(driver, last) == [reason]


def test_a_step_may_bring_no_token_or_several() -> None:
    driver = Driver(SchedulerConfig(), pool_of(16))
    seq = driver.add(request_of("r", 3, 9, stop=frozenset({2})))[0]
    assert commit_tokens(driver) == []
    assert (seq.num_tokens, seq.num_computed) == (3, 2)
    assert commit_tokens(driver, 5, 6, 7) == []
    assert (seq.num_tokens, seq.num_computed) == (6, 3)
    assert commit_tokens(driver, 5, 2, 7, 8) == [FinishReason.STOP]
    assert seq.output_token_ids == [5, 6, 7, 5, 2]


def test_the_engine_may_end_a_sequence_at_a_stop_string_even_in_its_last_token() -> None:
    driver = Driver(SchedulerConfig(), pool_of(16))
    seq = driver.add(request_of("r", 3, 1))[0]
    driver.run()
    assert seq.finish_reason is FinishReason.LENGTH
    driver.scheduler.finish(seq, FinishReason.STOP, "END")
    assert (seq.finish_reason, seq.stop_reason) == (FinishReason.STOP, "END")


def test_results_that_do_not_fit_the_plan_are_an_error() -> None:
    driver = Driver(SchedulerConfig(max_num_batched_tokens=2), pool_of(16))
    driver.add(request_of("r", 5, 3))
    plan = driver.plan()
    assert plan is not None
    with pytest.raises(EngineError, match="0 results were given for 1 chunks"):
        driver.scheduler.commit(plan, StepResult(tokens=()))
    with pytest.raises(EngineError, match="ends at 2"):
        driver.scheduler.commit(plan, StepResult(tokens=((7,),)))


def test_nothing_to_do_is_no_plan() -> None:
    driver = Driver(SchedulerConfig(), pool_of(4))
    assert driver.scheduler.plan(0.0) is None
    assert driver.scheduler.abort("unknown") == []
