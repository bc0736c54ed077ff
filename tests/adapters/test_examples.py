"""The example adapters and batch file are small, portable and what their scripts make."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from polybatch.adapters.peft_lora import load_peft
from polybatch.config import ModelSpec, RopeSpec

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("json-contact", "pirate", "sentiment", "sql")
MAX_BYTES = 1_500_000


class Shapes:
    """A base model of SmolLM2-135M's shapes; plain LoRA reads no base weight."""

    spec = ModelSpec(
        family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30,
        num_heads=9, num_kv_heads=3, head_dim=64, max_position=8192, rms_norm_eps=1e-5, rope=RopeSpec(),
        tie_embeddings=True,
    )  # fmt: skip


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("tasks")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_adapter_is_small_portable_and_documented(name: str) -> None:
    directory = EXAMPLES / "adapters" / name
    assert sum(file.stat().st_size for file in directory.iterdir()) <= MAX_BYTES
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    adapter = load_peft(directory, Shapes())  # type: ignore[arg-type]
    assert any(delta.b.any() for layer in adapter.layers for delta in layer.values())
    results = json.loads((EXAMPLES / "adapters" / "results.json").read_text())[name]
    assert f"{results['adapter']:.0%}" in (directory / "README.md").read_text()


def test_the_examples_differ_in_rank_and_modules() -> None:
    adapters = [load_peft(EXAMPLES / "adapters" / name, Shapes()) for name in NAMES]  # type: ignore[arg-type]
    assert len({adapter.max_rank for adapter in adapters}) >= 3
    assert len({adapter.info["modules"] for adapter in adapters}) >= 3
    assert len({adapter.digest for adapter in adapters}) == len(NAMES)


def test_held_out_rows_share_no_prompt_with_training_rows(tasks: ModuleType) -> None:
    for task in tasks.TASKS:
        train = {row.prompt for row in task.rows(False, 2000, 0)}
        held_out = task.rows(True, 60, 1)
        assert len(held_out) >= 50
        assert not train & {row.prompt for row in held_out}


def test_wanted_answers_count_as_right_and_others_do_not(tasks: ModuleType) -> None:
    for task in tasks.TASKS:
        for row in task.rows(True, 5, 1):
            assert not task.correct("I am sorry, I cannot do that.", row)
            assert not row.answer or task.correct(row.answer, row)


def test_the_batch_file_is_what_its_script_writes(tasks: ModuleType) -> None:
    made = importlib.import_module("make_mixed").lines()
    lines = [json.loads(line) for line in (EXAMPLES / "mixed.jsonl").read_text().splitlines()]
    assert lines == made
    assert len({line["custom_id"] for line in lines}) == len(lines) == 64
    assert {line["body"]["model"] for line in lines} == {"smollm2-135m-instruct", *NAMES}
    assert all(line["body"]["max_tokens"] <= 48 for line in lines)
