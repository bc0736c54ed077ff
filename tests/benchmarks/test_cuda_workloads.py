"""Laws of the GPU benchmark: workloads, traffic, floors, verdicts, and what is left of a piece that dies."""

import dataclasses
import itertools
import json
import time
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.cuda import carry, decode_steps, figures, floors, report, run, serving, workloads
from benchmarks.cuda.adapters import RandomAdapters
from benchmarks.cuda.figures import Figure
from benchmarks.cuda.floors import Ceilings
from benchmarks.cuda.workloads import TimedRequest
from polybatch.adapters.store import AdapterStore
from polybatch.bench.results import Timed
from polybatch.bench.roofline import Limits
from polybatch.bench.workloads import BenchRequest, Workload
from polybatch.config import PoolSpec, SchedulerConfig
from polybatch.engine.core import EngineCore
from polybatch.errors import AdapterError, ConfigError, EngineError
from polybatch.execution.fake import FakeExecutor
from polybatch.models.random_weights import open_random
from polybatch.scheduling.scheduler import Scheduler

SPEC = open_random("llama-3.1-8b")[0].spec
H100 = Ceilings(Limits(3088.0, {"bfloat16": 749e3}), {1: 5.85, 64: 6.10, 256: 7.12})
TINY = dataclasses.replace(SPEC, vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2,
                           num_heads=4, num_kv_heads=2, head_dim=8)  # fmt: skip


def lengths(workload):
    return [len(request.token_ids) for request in workload.requests]


@pytest.mark.parametrize(
    ("name", "count", "shortest", "longest", "output_tokens", "num_adapters"),
    [
        ("G1", 256, 128, 512, 128, 0),
        ("G3", 128, 512, 512, 1, 0),
        ("G4", 256, 2112, 2112, 64, 0),
        ("G5-1", 256, 128, 512, 128, 1),
        ("G5-8", 256, 128, 512, 128, 8),
        ("G5-64", 256, 128, 512, 128, 64),
        ("G5-64zipf", 256, 128, 512, 128, 64),
        ("G5-half", 256, 128, 512, 128, 64),
    ],
)
def test_workloads_have_their_stated_shapes(name, count, shortest, longest, output_tokens, num_adapters):
    workload = workloads.make(name)
    assert len(workload.requests) == count
    assert min(lengths(workload)) >= shortest
    assert max(lengths(workload)) <= longest
    assert {request.max_tokens for request in workload.requests} == {output_tokens}
    assert len(workload.adapters) == num_adapters
    assert set(workload.adapters.values()) <= {16}
    low, high = (
        min(map(min, (r.token_ids for r in workload.requests))),
        max(map(max, (r.token_ids for r in workload.requests))),
    )
    assert workloads.FIRST_TOKEN_ID <= low < high < 128_000


def test_adapter_workloads_are_the_plain_one_with_adapters():
    plain = workloads.make("G1", run=2)
    for mix in workloads.MIXES:
        with_adapters = workloads.make(f"G5-{mix}", run=2)
        assert [r.token_ids for r in with_adapters.requests] == [r.token_ids for r in plain.requests]


def test_mixes_use_adapters_as_their_names_say():
    def uses(mix):
        return Counter(r.adapter for r in workloads.make(f"G5-{mix}").requests)

    assert set(uses("1").values()) == {256}
    assert set(uses("8").values()) == {32}
    assert set(uses("64").values()) == {4}
    zipf = uses("64zipf")
    assert zipf["lora-00"] == max(zipf.values()) > 2 * zipf["lora-03"] > 0
    half = uses("half")
    assert half[None] == 128
    assert len(half) == 65


@pytest.mark.parametrize("name", workloads.NAMES)
def test_runs_differ_in_token_ids_and_in_nothing_else(name):
    first, again, second = (workloads.make(name, run=run, shrink=8) for run in (0, 0, 1))
    assert first == again
    assert lengths(first) == lengths(second)
    assert [r.adapter for r in first.requests] == [r.adapter for r in second.requests]
    prompts = {request.token_ids[:8] for request in first.requests}
    assert prompts.isdisjoint(request.token_ids[:8] for request in second.requests)


def test_all_requests_of_the_shared_prefix_workload_begin_with_it():
    workload = workloads.make("G4", shrink=8)
    assert len({request.token_ids[: workload.shared_prefix_tokens] for request in workload.requests}) == 1
    assert len({request.token_ids for request in workload.requests}) == len(workload.requests)


def test_an_unknown_workload_is_refused():
    with pytest.raises(ConfigError, match="G9"):
        workloads.make("G9")


def test_traffic_is_as_described():
    requests = workloads.traffic(1000, 20.0, 50.0, vocab_size=1000)
    assert requests == workloads.traffic(1000, 20.0, 50.0, vocab_size=1000)
    assert len(requests) == 1000
    gaps = np.diff([0.0, *(timed.at_s for timed in requests)])
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.1)
    for sizes in ([len(t.request.token_ids) for t in requests], [t.request.max_tokens for t in requests]):
        assert 8 <= min(sizes) < 20
        assert 500 < max(sizes) < 512
    assert set(workloads.traffic_adapters(1000).values()) == {8, 16, 32, 64}
    # Uniform popularity touches 1 - 1/e of as many adapters as there are requests.
    assert len({timed.request.adapter for timed in requests}) == pytest.approx(632, rel=0.05)


def test_less_alpha_is_more_skewed_and_more_cv_is_burstier():
    def top_share(alpha):
        chosen = Counter(
            t.request.adapter for t in workloads.traffic(200, 20, 50, vocab_size=99, alpha=alpha)
        )
        return chosen["s2-0000"] / 1000

    assert top_share(0.1) == pytest.approx(0.59, abs=0.05)
    assert top_share(1.0) < 0.02
    gaps = np.diff([t.at_s for t in workloads.traffic(2, 20, 50, vocab_size=99, cv=4)])
    assert gaps.std() / gaps.mean() > 2.5


def test_decode_floors_are_bytes_over_bandwidth():
    expected = {1: (4.88, 5.87), 32: (5.56, 6.68), 64: (6.25, 7.49), 128: (7.64, 9.15), 256: (10.4, 12.7)}
    for batch, (floor_ms, practical_ms) in expected.items():
        floor = floors.decode_floor(SPEC, H100, "bfloat16", *decode_steps.pair(batch, None))
        assert 1000 * floor.floor_s == pytest.approx(floor_ms, rel=0.01)
        assert 1000 * floor.practical_s == pytest.approx(practical_ms, rel=0.01)


def test_live_adapters_add_their_bytes_to_a_step():
    assert floors.adapter_bytes(SPEC, 16) == pytest.approx(84e6, rel=0.01)
    plain, mixed = (
        floors.decode_floor(SPEC, H100, "bfloat16", *decode_steps.pair(64, mix)) for mix in (None, "64")
    )
    added_s = 64 * floors.adapter_bytes(SPEC, 16) / 3088e9
    assert mixed.floor_s - plain.floor_s == pytest.approx(added_s)
    assert mixed.practical_s - plain.practical_s == pytest.approx(added_s)


def test_a_prefix_in_common_is_read_once_a_step():
    workload = workloads.make("G4")
    once = floors.workload_floor(SPEC, H100, "bfloat16", workload)
    each = floors.workload_floor(SPEC, H100, "bfloat16", Workload("", workload.requests))
    assert once.floor_s == pytest.approx(0.74, rel=0.03)
    assert once.practical_s == pytest.approx(0.88, rel=0.03)
    assert each.floor_s > 2 * once.floor_s


def test_prefill_is_bound_by_arithmetic_and_int4_has_no_practical_floor():
    workload = workloads.make("G3")
    floor = floors.workload_floor(SPEC, H100, "bfloat16", workload)
    assert floor.per_s(workload.num_input_tokens)[0] == pytest.approx(53_600, rel=0.02)
    assert floors.workload_floor(SPEC, H100, "int4", workload).practical_s is None


def test_linear_times_between_measured_batches_lie_between_their_times():
    assert H100.linears_s(64) == pytest.approx(0.0061)
    assert H100.linears_s(1) < H100.linears_s(30) < H100.linears_s(64)
    assert H100.linears_s(512) == pytest.approx(2 * 0.00712)


def test_a_decode_step_is_the_difference_of_two_runs():
    def answer(workload):
        (output_tokens,) = {request.max_tokens for request in workload.requests}
        return Timed(3.0 + 0.25 * output_tokens, [])

    measured = decode_steps.measure(answer, 4, None, vocab_size=100, num_pairs=2, shrink=4)
    assert measured.ms == pytest.approx(250)
    assert len(measured.pairs_ms) == 2


def test_random_adapters_differ_and_share_the_hosts_memory():
    made = RandomAdapters(TINY, buffer_bytes=1 << 16)
    adapters = [made.make(f"a{i}", rank) for i, rank in enumerate((8, 64, 8))]
    assert len({adapter.digest for adapter in adapters}) == 3
    assert [adapter.max_rank for adapter in adapters] == [8, 64, 8]
    storages = set()
    for adapter in adapters:
        for layer in adapter.layers:
            for module, (out, width) in TINY.linear_shapes.items():
                delta = layer[module]
                assert delta.a.shape == (adapter.max_rank, width)
                assert delta.b.shape == (adapter.max_rank, out)
                assert delta.a.is_contiguous()
                assert bool(delta.a.abs().max() > 0)
                storages.add(delta.a.untyped_storage().data_ptr())
    assert len(storages) == 1
    assert not torch.equal(adapters[0].layers[0]["q_proj"].a, adapters[2].layers[0]["q_proj"].a)


def make_core(ranks, clock=time.monotonic):
    executor = FakeExecutor(pool=PoolSpec(64, 16, 16 * 8, 1))
    store = AdapterStore(None, executor.adapter_pages)
    spec = dataclasses.replace(TINY, num_layers=1)
    RandomAdapters(spec, buffer_bytes=1 << 16).register(store, ranks)
    config = SchedulerConfig(max_model_len=400, max_num_batched_tokens=64, max_num_seqs=8)
    scheduler = Scheduler(config, executor.pool)
    return EngineCore(executor, scheduler, None, store, max_model_len=400, clock=clock), store


def test_adapters_registered_from_memory_are_known_by_name_and_bad_names_are_refused():
    _, store = make_core({"a": 4, "b": 8})
    assert [ref.name for ref in store.list()] == ["a", "b"]
    assert store.weights(store.get("b").digest).max_rank == 8
    with pytest.raises(AdapterError, match="name"):
        store.add_weights(" ", store.weights(store.get("a").digest))
    assert len(store.list()) == 2


def test_replayed_traffic_is_accounted_for_and_leaves_the_engine_idle():
    ranks = workloads.traffic_adapters(4)
    core, _ = make_core(ranks)
    arrivals = workloads.traffic(4, 100, 0.3, vocab_size=200, tokens=(4, 30))
    served = serving.replay(core, arrivals, 0.4)
    assert not core.has_work()
    assert 0 < served.num_arrived <= len(arrivals)
    assert served.num_finished <= served.num_arrived
    assert served.num_without_token <= served.num_arrived - served.num_finished
    assert served.out_tok_s > 0
    assert served.num_loads >= 1
    assert 0 <= served.attainment <= 1
    core.scheduler.check()


def test_a_replay_says_since_when_requests_always_waited_and_what_ran_meanwhile():
    ticks = itertools.count()

    def clock():
        return next(ticks) * 0.01

    ranks = workloads.traffic_adapters(4)
    core, _ = make_core(ranks, clock)
    # A few of these take all the pages, and the last ones come to a queue.
    arrivals = [
        TimedRequest(0.1 * i, BenchRequest((5 + i,) * 4, 380, name)) for i, name in enumerate([*ranks] * 25)
    ]
    served = serving.replay(core, arrivals, 12.0, 6.0, clock=clock)
    assert 0 < served.queued_from_s < 6
    assert served.num_waiting > 0
    assert 0 < served.adapters <= served.rows <= 8
    assert served.adapters <= 4
    assert served.num_steps > 0
    assert len(served.out_tok_s_thirds) == 3
    assert min(served.out_tok_s_thirds) * 0.9 < served.out_tok_s < max(served.out_tok_s_thirds) * 1.1


def test_without_a_queue_at_the_end_a_replay_names_no_beginning_of_it():
    core, _ = make_core({})
    served = serving.replay(core, [TimedRequest(0.0, BenchRequest((5,) * 4, 3))], 0.1)
    assert served.queued_from_s is None
    assert served.num_waiting == 0


def test_requests_without_a_token_count_as_waiting():
    core, _ = make_core({})
    # The pool takes one of these at a time, and one takes longer than the replay.
    arrivals = [TimedRequest(0.0, BenchRequest((5,) * 300, 90)) for _ in range(200)]
    served = serving.replay(core, arrivals, 0.2)
    assert served.num_without_token > 0
    assert served.attainment < 1
    assert not core.has_work()


def test_a_replay_wants_an_idle_engine():
    core, _ = make_core({})
    core.add_request("left over", [1, 2, 3])
    with pytest.raises(EngineError, match="idle"):
        serving.replay(core, [], 0.1)


def test_a_replay_without_requests_measures_nothing():
    core, _ = make_core({})
    with pytest.raises(EngineError, match="no request arrived"):
        serving.replay(core, [], 0.02)


def figure(key, value, unit="out tok/s", **others):
    return Figure(key, value, unit, **others)


def test_verdicts_know_which_way_is_better():
    found = [
        figure("G1", 9000.0, practical_floor=10_000.0),
        figure("G1 transformers", 6000.0),
        figure("G2 B=64", 8.0, "ms", practical_floor=7.5),
        figure("G4", 1.2, "s"),
    ]
    verdicts = {
        (key, verdict.bar.of): verdict.is_met
        for key, listed in figures.judge(found).items()
        for verdict in listed
    }
    assert verdicts == {
        ("G1", None): False,
        ("G1", figures.PRACTICAL_FLOOR): True,
        ("G1", "G1 transformers"): True,
        ("G2 B=64", figures.PRACTICAL_FLOOR): True,
        ("G4", None): False,
    }


def test_every_bar_names_a_figure_that_some_piece_measures():
    keys = {"G1", "G3", "G4", "G5 plain", "G1 transformers", "G5 peft", "start-up", "start-up with adapters"}
    keys |= {f"G2 B={batch}" for batch in (1, 32, 64, 128, 256)}
    keys |= {f"G5-{mix}" for mix in workloads.MIXES}
    keys |= {f"G5-{mix} B={batch}" for mix in ("1", "64", "64zipf", "half") for batch in (64, 256)}
    keys |= {"G6 64 adapters", "G6 1000 adapters", "G6 1000 adapters, clustered", "peft, an adapter a row"}
    keys |= {"G6 TTFT, all resident", "G6 TTFT, twice what fits"}
    for bar in figures.BARS:
        assert bar.key in keys
        assert bar.of in keys | {None, figures.PRACTICAL_FLOOR}
    assert set(figures.ELSEWHERE) <= keys


CONTEXT = {
    "created": "2026-11-22T00:00:00+00:00",
    "command": "python -m benchmarks.cuda.run",
    "model": "random:tiny",
    "precision": "bfloat16",
    "device": {"name": "a card"},
    "versions": {"torch": "2"},
}


def test_a_report_shows_figures_beside_their_limits_and_failures_with_their_reason(tmp_path):
    good = figure("G4", 0.9, "s", values=(0.8, 0.9, 1.0), floor=0.72, practical_floor=0.86, note="a remark")
    for piece, found, error in (("G4", [good], None), ("G5", [], "it broke")):
        document = figures.piece_document(piece, found, error, 3.0, CONTEXT)
        (tmp_path / f"{piece}.json").write_text(json.dumps(document))
    documents = figures.read(tmp_path)
    assert figures.figures_of(documents) == [good]
    bundle = tmp_path.with_suffix(".json")
    bundle.write_text(json.dumps({"pieces": documents}))
    assert figures.read(bundle) == documents
    text = report.markdown(documents)
    row = next(line for line in text.splitlines() if line.startswith("| G4"))
    assert row == "| G4 | 0.90 s | 0.80 to 1.00 | 0.72 | 0.86 | 1.05 x | 2.06 | met: 0.90 ≤ 1.10 |"
    assert "- G4: a remark." in text
    assert "- G5: failed after 3.0 s: it broke" in text


def test_figures_of_a_piece_that_died_are_kept_beside_the_reason(tmp_path):
    arguments = run.parse(["--out", str(tmp_path), "--device", "cpu"])
    unfinished = figures.piece_document("G2", [figure("G2 B=1", 6.0, "ms")], None, 0.0, CONTEXT)
    (tmp_path / "G2.json").write_text(json.dumps(unfinished))
    assert not run._is_complete(tmp_path, "G2")
    run._mark_dead(arguments, "G2", "the process was ended")
    run._mark_dead(arguments, "G3", "the process was ended")
    documents = {document["piece"]: document for document in figures.read(tmp_path)}
    assert documents["G2"]["figures"][0]["value"] == 6.0
    assert documents["G3"]["figures"] == []
    assert {document["error"] for document in documents.values()} == {"the process was ended"}


def test_a_file_split_and_carried_part_by_part_is_the_same_file(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(range(256)) * 10)
    parts = carry.split(file, tmp_path / "parts", 1000)
    assert len(parts) == 3
    store = tmp_path / "store"
    joined = None
    for part in parts:
        assert joined is None
        trip = tmp_path / f"trip-{part.name}"
        trip.mkdir()
        for brought in (part, tmp_path / "parts" / "weights.bin.json"):
            (trip / brought.name).write_bytes(brought.read_bytes())
        joined = carry.keep(trip, store)
    assert joined is not None
    assert joined.read_bytes() == file.read_bytes()


def test_a_damaged_part_is_refused(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"x" * 100)
    (part,) = carry.split(file, tmp_path / "parts", 1000)
    part.write_bytes(b"y" * 100)
    with pytest.raises(ValueError, match="not the part"):
        carry.keep(tmp_path / "parts", tmp_path / "store")
