"""Laws of the limits that stand beside every measurement."""

import pytest

from polybatch.bench import roofline, workloads
from polybatch.bench.workloads import BenchRequest, Workload
from polybatch.config import ModelSpec, RopeSpec

SPEC = ModelSpec("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, RopeSpec())
LIMITS = roofline.Limits(50.0, {"float32": 190.0, "bfloat16": 360.0, "int8": 590.0})


def bound(name, precision="bfloat16", limits=LIMITS):
    return roofline.bound(SPEC, workloads.make(name), roofline.PRECISIONS[precision], limits)


def test_the_demo_model_has_134_million_weights():
    assert roofline.layer_weights(SPEC) + 49152 * 576 == 134_479_872


def test_a_single_stream_is_bound_by_the_bytes_of_the_weights():
    limit = bound("W1")
    assert limit.total_s == limit.memory_s
    assert limit.decode_tok_s == pytest.approx(185, rel=0.03)
    assert bound("W1", "int8").decode_tok_s == pytest.approx(370, rel=0.04)
    assert bound("W1", "q4_0").decode_tok_s > bound("W1", "int8").decode_tok_s


def test_a_batch_is_bound_by_arithmetic():
    limit = bound("W2")
    assert limit.total_s == limit.compute_s == pytest.approx(8.9, rel=0.05)
    assert bound("W2", "int8").out_tok_s == pytest.approx(760, rel=0.05)


def test_a_prefix_in_common_is_counted_once():
    whole = workloads.make("W3")
    unshared = Workload("", whole.requests)
    precision = roofline.PRECISIONS["bfloat16"]
    once = roofline.bound(SPEC, whole, precision, LIMITS)
    each = roofline.bound(SPEC, unshared, precision, LIMITS)
    assert once.compute_s < each.compute_s / 4
    assert once.memory_s < each.memory_s


def test_adapters_cost_their_ranks_and_rows_without_one_cost_nothing():
    base, lora = bound("W4base"), bound("W4")
    share = roofline.adapter_weights(SPEC, 8) / roofline.layer_weights(SPEC)
    assert base.compute_s < lora.compute_s < base.compute_s * (1 + share)
    plain = Workload("", (BenchRequest((1, 2, 3), 4),))
    registered = Workload("", plain.requests, {"unused": 64})
    precision = roofline.PRECISIONS["bfloat16"]
    assert roofline.bound(SPEC, plain, precision, LIMITS) == roofline.bound(
        SPEC, registered, precision, LIMITS
    )


def test_attention_counts_every_causal_pair_once():
    one, two = (Workload("", (BenchRequest((1,) * n, 1),)) for n in (64, 128))
    precision = roofline.PRECISIONS["bfloat16"]
    seconds = [roofline.bound(SPEC, w, precision, LIMITS).compute_s for w in (one, two)]
    linear = 2 * roofline.layer_weights(SPEC) * 64 / 360e9
    pairs = 128 * 129 // 2 - 64 * 65 // 2
    attention = 4 * SPEC.num_layers * SPEC.q_size * pairs / 360e9
    assert seconds[1] - seconds[0] == pytest.approx(linear + attention)


def test_a_faster_machine_has_a_lower_limit():
    twice = roofline.Limits(100.0, {name: 2 * rate for name, rate in LIMITS.gflops.items()})
    for name in workloads.NAMES:
        assert bound(name, limits=twice).total_s == pytest.approx(bound(name).total_s / 2)
