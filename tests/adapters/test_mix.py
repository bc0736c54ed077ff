"""Mixtures: the same numbers as peft's, kept while used, refused where a sum would be wrong."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from adapter_helpers import RecordingWeights, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model

from polybatch.adapters import mix
from polybatch.adapters.mix import mix_weights
from polybatch.adapters.store import AdapterStore
from polybatch.errors import AdapterError, EngineError, RequestError
from polybatch.mixture import Mixture, mixed_ref
from polybatch.request import AdapterRef

RECIPES = {
    "low": {"r": 2, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 5},
    "high": {"r": 7, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "dora": {"r": 2, "target_modules": ["q_proj"], "use_dora": True},
    "vocabulary": {"r": 2, "target_modules": ["q_proj", "lm_head"]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mix")
    for seed, (name, recipe) in enumerate(RECIPES.items()):
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **recipe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_peft_model(tiny_model(), config).save_pretrained(folder / name)
    return {name: folder / name for name in RECIPES}


@pytest.fixture
def store(folders: dict[str, Path]) -> AdapterStore:
    store = AdapterStore(RecordingWeights(tiny_model()), lambda weights: 1 + weights.max_rank)
    for name, path in folders.items():
        store.register(name, path)
    return store


def ref_of(store: AdapterStore, *parts: tuple[str, float]) -> AdapterRef:
    ref = mixed_ref(Mixture(parts), store.get)
    assert ref is not None
    return ref


@pytest.mark.parametrize("scales", [(0.7, 0.3), (1.0, 1.0), (-2.5, 0.125)])
def test_a_mixture_is_pefts_concatenation(
    store: AdapterStore, folders: dict[str, Path], scales: tuple[float, float]
) -> None:
    model = PeftModel.from_pretrained(tiny_model(), str(folders["low"]), adapter_name="low")
    model.load_adapter(str(folders["high"]), adapter_name="high")
    model.add_weighted_adapter(["low", "high"], list(scales), "sum", combination_type="cat")
    ref = store.mix(ref_of(store, ("low", scales[0]), ("high", scales[1])))
    weights = store.weights(ref.digest)
    assert weights.max_rank == 9
    assert ref.num_pages == 10
    modules = dict(model.named_modules())
    num_compared = 0
    for index, layer in enumerate(weights.layers):
        assert layer.keys() == {"q_proj", "v_proj", "down_proj"}
        for module, delta in layer.items():
            block = "mlp" if module == "down_proj" else "self_attn"
            theirs = modules[f"base_model.model.model.layers.{index}.{block}.{module}"]
            torch.testing.assert_close(delta.b.T @ delta.a, theirs.get_delta_weight("sum"))
            num_compared += 1
    assert num_compared == 9


def test_a_single_adapter_may_be_scaled(store: AdapterStore) -> None:
    ref = store.mix(ref_of(store, ("low", 0.5)))
    delta, plain = store.weights(ref.digest).layers[0]["q_proj"], store.weights(store.get("low").digest)
    torch.testing.assert_close(delta.b, plain.layers[0]["q_proj"].b * 0.5)
    assert torch.equal(delta.a, plain.layers[0]["q_proj"].a)


@pytest.mark.parametrize(("name", "reason"), [("dora", "DoRA"), ("vocabulary", "lm_head")])
def test_what_is_more_than_pairs_is_refused_by_name(store: AdapterStore, name: str, reason: str) -> None:
    for parts in ([("low", 1.0), (name, 1.0)], [(name, 0.5)]):
        with pytest.raises(RequestError, match=f"'{name}'.*{reason}") as caught:
            store.mix(ref_of(store, *parts))
        assert caught.value.field == "adapter"
    assert ref_of(store, (name, 1.0)) == store.get(name)


def test_trained_biases_are_refused(store: AdapterStore) -> None:
    weights = store.weights(store.get("low").digest)
    delta = weights.layers[0]["q_proj"]
    delta_with_bias = mix.ModuleDelta(delta.a, delta.b, bias=torch.ones(delta.b.shape[1]))
    layers = ({"q_proj": delta_with_bias}, *weights.layers[1:])
    with pytest.raises(RequestError, match="biases"):
        mix_weights("x", [("biased", mix.AdapterWeights("y", layers), 1.0)])


def test_equal_mixtures_are_made_once(store: AdapterStore) -> None:
    one = store.mix(ref_of(store, ("low", 0.7), ("high", 0.3)))
    two = store.mix(ref_of(store, ("high", 0.3), ("low", 0.7)))
    assert one.digest == two.digest
    assert two.name == "high*0.3+low*0.7"
    assert store.weights(one.digest) is store.weights(two.digest)


def test_mixtures_that_nobody_uses_are_bounded_and_used_ones_stay(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = store.mix(ref_of(store, ("low", 0.5), ("high", 0.5)))
    store.hold(used.digest)
    refs = [store.mix(ref_of(store, ("low", 1 + i), ("high", 0.5))) for i in range(mix.MAX_MIXTURES)]
    assert len(store._mixtures) == mix.MAX_MIXTURES
    assert store.weights(used.digest).max_rank == 9
    store.release(used.digest)
    with pytest.raises(EngineError):
        store.weights(used.digest)
    again = store.mix(ref_of(store, ("low", 0.5), ("high", 0.5)))
    assert again == used
    with pytest.raises(EngineError):
        store.weights(refs[0].digest)


def test_mixtures_are_bounded_in_bytes() -> None:
    cache = mix.MixtureCache(max_mixtures=10, max_bytes=100)
    refs = [AdapterRef(str(i), str(i), 1) for i in range(4)]
    assert cache.put(refs[0], 60) == []
    assert cache.put(refs[1], 40) == []
    assert cache.get("0") is refs[0]
    assert cache.put(refs[2], 30) == ["1"]
    assert cache.put(refs[3], 500) == ["0", "2"]
    assert len(cache) == 1


def test_a_part_that_is_gone_is_said(store: AdapterStore) -> None:
    ref = ref_of(store, ("low", 0.7), ("high", 0.3))
    store.remove("high")
    with pytest.raises(RequestError, match="send it again"):
        store.mix(ref)


def test_a_mixture_that_no_page_can_hold_is_the_requests_error(folders: dict[str, Path]) -> None:
    def num_pages(weights: mix.AdapterWeights) -> int:
        if weights.max_rank > 8:
            raise AdapterError("too large")
        return 1

    store = AdapterStore(RecordingWeights(tiny_model()), num_pages)
    store.register("low", folders["low"])
    store.register("high", folders["high"])
    with pytest.raises(RequestError, match="too large"):
        store.mix(ref_of(store, ("low", 1.0), ("high", 1.0)))
