"""Turn what the user calls a model into weights, spec and tokenizer.

    built-in name       smollm2-135m-instruct
    path to a file      a GGUF file
    path to a folder    a Hugging Face checkpoint
    random:CONFIG       random weights of a known configuration or a config.json
    owner/name          a Hugging Face checkpoint on the hub

Nothing heavy is read here: tensors are mapped and dequantised when an executor asks for them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from polybatch.config import ModelSpec
from polybatch.errors import ModelError
from polybatch.models import hugging_face
from polybatch.models.builtin import BUILTIN_MODELS, fetch_builtin
from polybatch.models.random_weights import open_random
from polybatch.models.weights import ModelWeights
from polybatch.tokenizer import Tokenizer

_SAMPLES = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An opened model.

    name: as the user gave it. path: file or folder of the checkpoint, None for random weights.
    tokenizer: None for random weights, and for folders that hold none.
    fingerprint: equal for equal checkpoints wherever they lie. load_s: seconds that opening took.
    """

    name: str
    path: Path | None
    spec: ModelSpec
    weights: ModelWeights
    tokenizer: Tokenizer | None
    fingerprint: str
    load_s: float


def report_to_stderr(message: str) -> None:
    """Show one line of progress to the person at the terminal."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(message, markup=False)


def load_model(
    model: str, *, revision: str | None = None, progress: Callable[[str], None] = report_to_stderr
) -> LoadedModel:
    """Open a model by built-in name, path, `random:` configuration or hub name, in that order.

    revision: branch, tag or commit, for hub names only. progress: told of downloads.
    Raises ModelError for a checkpoint that is missing, malformed or not supported.
    """
    start = time.perf_counter()
    if revision is not None and (
        model in BUILTIN_MODELS or ":" in model or Path(model).expanduser().exists()
    ):
        raise ModelError(f"revision is {revision!r}, but {model!r} is no hub name: leave revision out")
    path: Path | None = None
    weights: ModelWeights
    if model.startswith("random:"):
        weights, settings = open_random(model.removeprefix("random:"))
        tokenizer = None
        fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    else:
        path = _resolve(model, revision, progress)
        if path.is_file():
            weights, tokenizer = _open_gguf(path)
            fingerprint = _fingerprint([path])
        else:
            weights = hugging_face.open_directory(path)
            tokenizer = Tokenizer.from_directory(path) if Tokenizer.is_in(path) else None
            fingerprint = _fingerprint([path / "config.json", *sorted(path.glob("*.safetensors"))])
    return LoadedModel(
        model, path, weights.spec, weights, tokenizer, fingerprint, time.perf_counter() - start
    )


def _open_gguf(path: Path) -> tuple[ModelWeights, Tokenizer]:
    # Importing gguf takes a tenth of a second that other checkpoints need not pay.
    from polybatch.models.gguf_file import GgufFile
    from polybatch.models.gguf_model import open_gguf
    from polybatch.models.gguf_tokenizer import tokenizer_from_gguf

    file = GgufFile(path)
    weights, tokenizer = open_gguf(file), tokenizer_from_gguf(file.metadata, str(path))
    file.forget_header()
    return weights, tokenizer


def _resolve(model: str, revision: str | None, progress: Callable[[str], None]) -> Path:
    if model in BUILTIN_MODELS:
        return fetch_builtin(model, progress)
    path = Path(model).expanduser()
    if path.exists():
        return path
    if (
        model.endswith((".gguf", ".safetensors"))
        or model.count("/") != 1
        or model.startswith(("/", ".", "~"))
    ):
        raise ModelError(
            f"model {model!r} is no existing path, no hub name (owner/name) and no built-in name "
            f"({', '.join(BUILTIN_MODELS)})"
        )
    progress(f"Looking up {model} on the model hub")
    return hugging_face.fetch(model, revision)


def _fingerprint(files: Iterable[Path]) -> str:
    """Hash over sizes and evenly spaced samples of the files: cheap, and the same wherever they lie."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as handle:
            digest.update(handle.read(1 << 16))
            for index in range(_SAMPLES):
                handle.seek(size * index // _SAMPLES)
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()
