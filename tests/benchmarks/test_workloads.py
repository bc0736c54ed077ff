"""Laws of the benchmark workloads: their stated shapes, and the same work for every engine and every run."""

from collections import Counter

import pytest

from polybatch.bench import workloads
from polybatch.errors import ConfigError


def lengths(workload):
    return [len(request.token_ids) for request in workload.requests]


@pytest.mark.parametrize(
    ("name", "count", "shortest", "longest", "max_tokens"),
    [
        ("W1", 1, 128, 128, 128),
        ("W2", 64, 32, 256, 64),
        ("W3", 64, 512 + 16, 512 + 48, 32),
        ("W4", 64, 64, 64, 32),
        ("W4base", 64, 64, 64, 32),
        ("W5", 64, 32, 256, 64),
        ("W5base", 64, 32, 256, 64),
    ],
)
def test_workloads_have_their_stated_shapes(name, count, shortest, longest, max_tokens):
    workload = workloads.make(name)
    assert len(workload.requests) == count
    assert all(shortest <= n <= longest for n in lengths(workload))
    assert {request.max_tokens for request in workload.requests} == {max_tokens}
    assert workload.num_input_tokens == sum(lengths(workload))
    assert workload.num_output_tokens == count * max_tokens
    assert longest < workload.max_model_len


@pytest.mark.parametrize("name", workloads.NAMES)
def test_equal_arguments_give_equal_requests(name):
    assert workloads.make(name, run=3) == workloads.make(name, run=3)


@pytest.mark.parametrize("name", workloads.NAMES)
def test_runs_differ_in_token_ids_and_in_nothing_else(name):
    first, second = workloads.make(name, run=0), workloads.make(name, run=1)
    assert lengths(first) == lengths(second)
    assert [r.adapter for r in first.requests] == [r.adapter for r in second.requests]
    prompts = {request.token_ids[:8] for request in first.requests}
    assert prompts.isdisjoint(request.token_ids[:8] for request in second.requests)


def test_w3_alone_has_tokens_in_common():
    for name in workloads.NAMES:
        workload = workloads.make(name)
        heads = {request.token_ids[:512] for request in workload.requests}
        if name == "W3":
            assert len(heads) == 1
            assert workload.shared_prefix_tokens == 512
            assert len({request.token_ids for request in workload.requests}) == 64
        else:
            assert len(heads) == len(workload.requests)
            assert workload.shared_prefix_tokens == 0


def test_w4_uses_16_adapters_of_rank_8_in_turn():
    workload = workloads.make("W4")
    assert sorted(workload.adapters.values()) == [8] * 16
    used = [request.adapter for request in workload.requests]
    assert used == list(workload.adapters) * 4


def test_w5_mixes_ranks_popularity_and_rows_without_an_adapter():
    workload = workloads.make("W5")
    assert Counter(workload.adapters.values()) == {4: 12, 8: 12, 16: 12, 64: 12}
    used = Counter(request.adapter for request in workload.requests)
    assert used.pop(None) == 21
    assert used.keys() <= workload.adapters.keys()
    by_popularity = list(workload.adapters)
    head = sum(used[name] for name in by_popularity[:12])
    tail = sum(used[name] for name in by_popularity[36:])
    assert head > 2 * tail
    assert {workload.adapters[name] for name in used} == {4, 8, 16, 64}


def test_base_workloads_differ_from_theirs_by_the_adapters_alone():
    for name in ("W4", "W5"):
        with_adapters, without = workloads.make(name), workloads.make(f"{name}base")
        assert [r.token_ids for r in with_adapters.requests] == [r.token_ids for r in without.requests]
        assert not without.adapters
        assert all(request.adapter is None for request in without.requests)


@pytest.mark.parametrize("vocab_size", [8, 256, 49152, 151936])
def test_token_ids_stay_within_the_vocabulary(vocab_size):
    workload = workloads.make("W2", vocab_size=vocab_size)
    assert all(0 <= token < vocab_size for request in workload.requests for token in request.token_ids)


def test_fewer_requests_are_the_first_of_a_kind_and_a_stream_stays_one():
    assert len(workloads.make("W2", num_requests=4).requests) == 4
    assert len(workloads.make("W1", num_requests=4).requests) == 1
    workload = workloads.make("W5")
    assert workload.head(16).requests == workload.requests[:16]
    assert workload.head(16).adapters == workload.adapters


def test_an_unknown_workload_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'W9'.*W1, W2"):
        workloads.make("W9")
