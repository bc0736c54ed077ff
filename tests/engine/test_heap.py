"""What lives as long as the engine is kept away from the cycle collector, and given back with it."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from polybatch import LLM
from polybatch.engine.heap import freeze_heap
from polybatch.engine.stub import stub_core
from polybatch.errors import AdapterError

TINY = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "dtype": "float32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def unfrozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is frozen, whatever engines other tests have open."""
    monkeypatch.setattr("polybatch.engine.heap._users", set())
    gc.unfreeze()
    yield
    gc.unfreeze()


@pytest.fixture
def model(tmp_path: Path) -> str:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    return f"random:{config}"


def open_llm(model: str, **settings: object) -> LLM:
    return LLM(model, executor="eager", memory="1MiB", max_model_len=64, **settings)  # type: ignore[arg-type]


def test_what_an_engine_is_made_of_is_not_collected_over_and_over_and_is_given_back_when_it_closes(
    model: str,
) -> None:
    with open_llm(model) as llm:
        assert gc.get_freeze_count() > 10_000
        assert llm.generate([[1, 2, 3]])[0].outputs[0].token_ids
    assert gc.get_freeze_count() == 0


def test_of_several_engines_the_last_one_that_closes_gives_the_heap_back(model: str) -> None:
    first, second = open_llm(model), open_llm(model)
    first.close()
    first.close()
    assert gc.get_freeze_count() > 10_000
    with LLM.from_core(stub_core()):
        # It has not frozen anything, and so gives nothing back.
        pass
    assert gc.get_freeze_count() > 10_000
    second.close()
    assert gc.get_freeze_count() == 0


def test_an_engine_that_does_not_start_leaves_nothing_frozen(model: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError):
        open_llm(model, adapters={"missing": tmp_path})
    assert gc.get_freeze_count() == 0


def test_giving_back_twice_takes_nothing_from_others() -> None:
    own, others = freeze_heap(), freeze_heap()
    own()
    own()
    assert gc.get_freeze_count() > 0
    others()
    assert gc.get_freeze_count() == 0
