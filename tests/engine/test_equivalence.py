"""The equivalence gate over tiny models of every family, and proof that it can fail."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from gate_helpers import build_faulty, prompts, run_gate, save_adapters, tiny_config, tiny_weights

from polybatch.adapters.peft_config import LoraConfig
from polybatch.engine import selfcheck
from polybatch.engine.equivalence import Answer, Tally
from polybatch.engine.executors import build_executor
from polybatch.engine.selfcheck import BASE, check
from polybatch.errors import ConfigError, EngineError
from polybatch.scheduling.plan import LogitRows
from polybatch.scheduling.scheduler import Scheduler

FAMILIES = {
    "llama": ("small", "rslora", "dora", "patterns", "vocabulary", "saved tables"),
    "llama-tied-biased": ("biases", "patterns", "vocabulary", "saved tables"),
    "mistral": ("small", "dora", "patterns"),
    "qwen2": ("biases", "rslora", "saved tables"),
    "qwen3": ("dora", "patterns", "vocabulary"),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """(model, names) -> paths of adapters saved by peft; all of a family's without names."""
    made = {}

    def of(model_name, names=None):
        if model_name not in made:
            folder = tmp_path_factory.mktemp(model_name)
            made[model_name] = save_adapters(model_name, folder, FAMILIES[model_name])
        return {name: made[model_name][name] for name in names or FAMILIES[model_name]}

    return of


def not_ok(rows):
    return [row for row in rows.values() if not row.ok]


@pytest.mark.parametrize("executor", ["cpu", "eager"])
@pytest.mark.parametrize("model_name", FAMILIES)
def test_every_row_of_a_mixed_batch_equals_itself_alone_merged_and_peft(model_name, executor, adapters):
    chosen = adapters(model_name)
    if executor == "cpu":
        # Has a test of its own, below.
        chosen.pop("vocabulary", None)
    reports = []
    rows = run_gate(model_name, chosen, tiny_config(executor=executor), report=reports.append)
    assert set(rows) == {(BASE, "alone"), (BASE, "transformers")} | {
        (name, reference) for name in chosen for reference in ("alone", "merged", "peft")
    }
    assert not_ok(rows) == []
    for row in rows.values():
        assert row.tokens == 5 * 8
        assert row.token_differences == row.near_ties <= 1
        assert row.limit == (0 if (executor, row.reference) == ("cpu", "alone") else 1e-3)
    assert len(reports) == 1
    assert f"up to {len(chosen) + 1} adapters (base included) in one" in reports[0]


@pytest.mark.parametrize("model_name", ["llama", "llama-tied-biased", "qwen3"])
def test_adapters_of_the_vocabulary_equal_merged_and_peft_on_the_cpu(model_name, adapters):
    rows = run_gate(model_name, adapters(model_name, ["vocabulary", "patterns"]), tiny_config(executor="cpu"))
    alone = rows.pop(("vocabulary", "alone"))
    assert alone.token_differences == 0
    assert alone.max_logit_difference < 1e-4
    assert not_ok(rows) == []


def test_adapters_of_the_vocabulary_equal_themselves_alone_to_the_bit(adapters):
    rows = run_gate("llama", adapters("llama", ["vocabulary"]), tiny_config(executor="cpu"))
    assert rows["vocabulary", "alone"].ok


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "int8"}])
def test_the_precision_that_is_served_is_compared_with_itself_alone(settings, adapters):
    chosen = adapters("llama", ["rslora", "dora", "saved tables"])
    rows = run_gate("llama", chosen, tiny_config(**settings))
    served = [row for (_, reference), row in rows.items() if reference.startswith("alone, ")]
    assert [row.adapter for row in served] == [BASE, *chosen]
    assert all(row.tokens == 5 * 8 and row.limit == 0 for row in served)
    assert not_ok(rows) == []


def test_low_precision_without_a_promise_is_not_compared(adapters):
    rows = run_gate("llama", adapters("llama", ["small"]), tiny_config(executor="eager", dtype="bfloat16"))
    skipped = rows["small", "alone, bfloat16"]
    assert (skipped.ok, skipped.tokens, skipped.note) == (True, 0, "not promised")


def test_adapters_beyond_one_batch_are_checked_in_further_ones(adapters, monkeypatch):
    monkeypatch.setattr(selfcheck, "ADAPTERS_PER_BATCH", 2)
    reports = []
    chosen = adapters("mistral")
    rows = run_gate("mistral", chosen, tiny_config(), report=reports.append)
    assert len(reports) == 2
    assert {name for name, _ in rows} == {BASE, *chosen}
    assert not_ok(rows) == []


def test_a_missing_package_is_named_and_fails_nothing(adapters, monkeypatch):
    found = selfcheck.importlib.util.find_spec
    monkeypatch.setattr(
        selfcheck.importlib.util, "find_spec", lambda name: None if name == "peft" else found(name)
    )
    rows = run_gate("llama", adapters("llama", ["small"]), tiny_config())
    assert rows["small", "peft"].note == "not installed"
    assert rows["small", "peft"].tokens == 0
    assert rows[BASE, "transformers"].tokens == 5 * 8
    assert not_ok(rows) == []


def test_prompts_that_cannot_be_mixed_are_refused(adapters):
    with pytest.raises(ConfigError, match="give more or longer"):
        check(tiny_weights("llama"), {}, [[1, 2, 3]], tiny_config(), max_tokens=4)


def mixed_only(fault):
    """build_faulty(**fault) for the first executor, which runs the mixed batch; sound ones after it."""
    builders = itertools.chain([build_faulty(**fault)], itertools.repeat(build_executor))
    return lambda weights, config: next(builders)(weights, config)


def failures(rows):
    return {key for key, row in rows.items() if not row.ok}


def test_a_slightly_wrong_adapter_fails_its_own_rows_and_no_others(adapters):
    chosen = adapters("llama", ["small", "dora"])

    def swap(plan, given):
        """The rank-5 adapter with everything that it adds 2 % too large, in one layer."""

        def louder(layer):
            return {m: dataclasses.replace(delta, b=delta.b * 1.02) for m, delta in layer.items()}

        return {
            digest: dataclasses.replace(w, layers=(louder(w.layers[0]), *w.layers[1:]))
            if w.max_rank == 5
            else w
            for digest, w in given.items()
        }

    rows = run_gate("llama", chosen, tiny_config(), build=mixed_only({"swap": swap}))
    assert failures(rows) == {("dora", "alone"), ("dora", "merged"), ("dora", "peft")}


@pytest.mark.parametrize(
    ("error", "executor", "expected"),
    [
        (3e-3, "cpu", {"alone", "merged", "peft", "transformers"}),
        (3e-3, "eager", {"alone", "merged", "peft", "transformers"}),
        (2e-5, "cpu", {"alone"}),
    ],
)
def test_a_perturbed_logit_fails_every_comparison_whose_limit_it_exceeds(error, executor, expected, adapters):
    def spoil(plan, logits):
        # The worst token's, so that no token changes.
        if len(logits):
            logits[torch.arange(len(logits)), logits.argmin(dim=-1)] += error
        return logits

    config = tiny_config(executor=executor)
    rows = run_gate("llama", adapters("llama", ["small"]), config, build=mixed_only({"spoil": spoil}))
    assert {reference for _, reference in failures(rows)} == expected
    assert all(row.token_differences == 0 for row in rows.values())


def test_a_wrong_token_fails_and_is_counted(adapters):
    def spoil(plan, logits):
        """The base model's second best token in place of its best at position 32."""
        sampled = [chunk for chunk in plan.chunks if chunk.logits is LogitRows.LAST]
        for chunk, row in zip(sampled, logits, strict=True):
            if chunk.seq.adapter is None and chunk.start + chunk.n_new == 33:
                best, second = row.topk(2).indices.tolist()
                row[[best, second]] = row[[second, best]]
        return logits

    rows = run_gate("llama", adapters("llama", ["small"]), tiny_config(), build=mixed_only({"spoil": spoil}))
    assert failures(rows) == {(BASE, "alone"), (BASE, "transformers")}
    # After the wrong token everything is compared behind the same tokens again, and agrees.
    for _, reference in failures(rows):
        assert rows[BASE, reference].token_differences == 1
        assert rows[BASE, reference].near_ties == 0
        assert rows[BASE, reference].tokens == 5 * 8


def test_keys_and_values_shared_across_adapters_fail(adapters, monkeypatch):
    monkeypatch.setattr(Scheduler, "_namespace_of", lambda self, request: "everybody")
    rows = run_gate("llama", adapters("llama", ["small", "dora"]), tiny_config())
    assert {reference for _, reference in failures(rows)} >= {"alone", "merged", "peft"}


def test_a_loader_that_misreads_an_adapter_fails_against_peft_alone(adapters, monkeypatch):
    scaling = LoraConfig.scaling
    monkeypatch.setattr(LoraConfig, "scaling", lambda self, key: 1.05 * scaling(self, key))
    rows = run_gate("llama", adapters("llama", ["small"]), tiny_config())
    assert failures(rows) == {("small", "peft")}


def test_a_mixed_batch_that_was_not_mixed_is_an_error(adapters, monkeypatch):
    monkeypatch.setattr(selfcheck, "mixed_scheduler", lambda requests, pool, limits: Scheduler(limits, pool))
    with pytest.raises(EngineError, match="num_preemptions=0"):
        run_gate("llama", adapters("llama", ["small"]), tiny_config())


def answer(tokens, *rows):
    return Answer(tokens, torch.tensor(rows, dtype=torch.float32))


def test_a_token_may_differ_only_where_the_reference_all_but_ties():
    near, clear = Tally(1e-3), Tally(1e-3)
    near.add(answer([1], [2.0, 2.0001, 0.0]), answer([0], [2.0004, 2.0, 0.0]))
    assert (near.num_differences, near.num_near_ties, near.is_ok) == (1, 1, True)
    clear.add(answer([1], [2.0, 2.0001, 0.0]), answer([0], [2.0011, 2.0, 0.0]))
    assert (clear.num_differences, clear.num_near_ties, clear.is_ok) == (1, 0, False)


def test_a_comparison_of_nothing_is_not_ok():
    assert not Tally(1e-3).is_ok


def test_equal_bits_are_asked_for_where_the_limit_is_zero():
    tally = Tally(0.0)
    tally.add(answer([0], [1.0, 0.0]), answer([0], [1.0, 0.0]))
    assert tally.is_ok
    tally.add(answer([0], [1.0, -0.0]), answer([0], [1.0, 0.0]))
    assert tally.max_logit_difference == 0.0
    assert not tally.is_ok


def test_logits_that_are_not_finite_are_never_ok():
    for bad in (float("nan"), float("inf")):
        tally = Tally(1e-3)
        tally.add(answer([0], [1.0, bad]), answer([0], [1.0, bad]))
        tally.add(answer([0], [1.0, 0.0]), answer([0], [1.0, 0.0]))
        assert not tally.is_ok


def test_answers_of_different_length_cannot_be_compared():
    with pytest.raises(EngineError, match="cannot be compared"):
        Tally(1e-3).add(answer([0, 1], [1.0, 0.0], [0.0, 1.0]), answer([0], [1.0, 0.0]))


def test_prompts_are_as_awkward_as_they_should_be():
    lengths = [len(prompt) for prompt in prompts()]
    assert sum(length > 40 for length in lengths) == 3
    assert all(length // 16 < (length + 7) // 16 for length in lengths)
