"""Names, digests and who keeps an adapter's weights alive."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapter_helpers import RecordingWeights, tiny_model
from peft import LoraConfig, get_peft_model

from polybatch.adapters.store import AdapterStore
from polybatch.errors import AdapterError, EngineError, RequestError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("store") / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), config).save_pretrained(path)
    return path


@pytest.fixture
def store() -> AdapterStore:
    return AdapterStore(RecordingWeights(tiny_model()), lambda weights: 1 + weights.max_rank)


def other_weights(directory: Path, path: Path) -> Path:
    """The same adapter with another scaling."""
    shutil.copytree(directory, path)
    raw = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**raw, "lora_alpha": 99}))
    return path


def test_a_registered_adapter_is_found_with_its_pages_and_weights(
    store: AdapterStore, directory: Path
) -> None:
    ref = store.register("law", directory)
    assert (ref.name, ref.num_pages) == ("law", 3)
    assert store.get("law") == ref
    assert store.list() == (ref,)
    assert store.weights(ref.digest).digest == ref.digest


def test_two_names_of_equal_content_share_weights_until_the_last_goes(
    store: AdapterStore, directory: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    one, two = store.register("one", directory), store.register("two", copy)
    assert one.digest == two.digest
    held = store.weights(one.digest)
    store.remove("one")
    assert store.weights(two.digest) is held
    store.remove("two")
    with pytest.raises(EngineError, match="not held"):
        store.weights(two.digest)


def test_weights_outlive_their_name_while_a_request_holds_them(store: AdapterStore, directory: Path) -> None:
    ref = store.register("law", directory)
    store.hold(ref.digest)
    store.remove("law")
    assert store.weights(ref.digest).digest == ref.digest
    store.release(ref.digest)
    with pytest.raises(EngineError):
        store.weights(ref.digest)


def test_a_name_given_other_weights_gets_another_digest(
    store: AdapterStore, directory: Path, tmp_path: Path
) -> None:
    old = store.register("law", directory)
    new = store.register("law", other_weights(directory, tmp_path / "other"))
    assert new.digest != old.digest
    assert store.get("law") == new
    with pytest.raises(EngineError):
        store.weights(old.digest)


def test_registering_a_name_again_with_equal_weights_keeps_one_holder(
    store: AdapterStore, directory: Path
) -> None:
    ref = store.register("law", directory)
    assert store.register("law", directory) == ref
    store.remove("law")
    with pytest.raises(EngineError):
        store.weights(ref.digest)


def test_a_failed_registration_changes_nothing(store: AdapterStore, directory: Path, tmp_path: Path) -> None:
    ref = store.register("law", directory)
    with pytest.raises(AdapterError):
        store.register("law", tmp_path / "missing")
    assert store.get("law") == ref
    assert store.weights(ref.digest).digest == ref.digest


def test_an_unknown_name_is_answered_with_close_or_known_ones(store: AdapterStore, directory: Path) -> None:
    with pytest.raises(RequestError, match="no adapter is registered"):
        store.get("law")
    store.register("sentiment", directory)
    with pytest.raises(RequestError, match="did you mean 'sentiment'") as error:
        store.get("sentimnt")
    assert error.value.field == "adapter"
    with pytest.raises(RequestError, match="known are sentiment"):
        store.remove("xyz")


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\0", "x" * 257])
def test_a_bad_name_is_refused(name: str, store: AdapterStore, directory: Path) -> None:
    with pytest.raises(AdapterError, match="adapter name"):
        store.register(name, directory)


def test_releasing_more_often_than_held_is_an_error(store: AdapterStore, directory: Path) -> None:
    ref = store.register("law", directory)
    store.remove("law")
    with pytest.raises(EngineError, match="more often"):
        store.release(ref.digest)
    with pytest.raises(EngineError, match="not in the store"):
        store.hold(ref.digest)
