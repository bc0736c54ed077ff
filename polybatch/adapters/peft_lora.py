"""PEFT's LoRA directories -> `AdapterWeights`.

`adapter_config.json` says what peft would do, the safetensors file holds with what; both must agree.
Scaling is multiplied into `b`, DoRA's magnitude becomes a gain per output, a stored bias becomes its
difference from the base model's.

Tied embeddings follow peft: a pair on embed_tokens, or a saved copy of it, leaves lm_head as it was, unless
the configuration says ensure_weight_tying.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from polybatch.adapters.peft_config import LoraConfig, read_config
from polybatch.adapters.peft_files import EMBEDDING, LM_HEAD, Parts, TensorFile, open_weights, sort_tensors
from polybatch.adapters.weights import AdapterWeights, ModuleDelta, VocabularyDelta
from polybatch.errors import AdapterError
from polybatch.models.weights import LayerWeights, ModelWeights


def load_peft(path: str | Path, base: ModelWeights) -> AdapterWeights:
    """Load and check a PEFT LoRA directory for this base model.

    Names, shapes and dtypes are checked from the header before any tensor is read; one base weight at a
    time is read where DoRA or a bias needs it.
    Raises AdapterError that names the file, the tensor or key, and a way out.
    Source: peft 0.21, tuners/lora.
    """
    directory = Path(path)
    if not directory.is_dir():
        reason = "is a file; give the directory that holds it" if directory.exists() else "does not exist"
        raise AdapterError(f"adapter path {str(directory)!r} {reason}")
    config = read_config(directory)
    with open_weights(directory) as file:
        parts = sort_tensors(file, config, base.spec)
        layers: tuple[dict[str, ModuleDelta], ...] = tuple({} for _ in range(base.spec.num_layers))
        for index, modules in enumerate(layers):
            members = [p for p in parts.values() if p.layer == index]
            biased = any("bias" in p.tensors for p in members)
            base_layer = base.layer(index) if biased else None
            for part in members:
                assert part.module is not None
                delta = _module_delta(part, index, config, file, base, base_layer)
                if delta.rank or delta.gain is not None or delta.bias is not None:
                    modules[part.module] = delta
        embedding, lm_head = _Vocabulary(parts, config, file, base).deltas()
    return AdapterWeights(
        digest=digest(layers, embedding, lm_head),
        layers=layers,
        embedding=embedding,
        lm_head=lm_head,
        path=str(directory),
        info=_describe(config, layers, embedding, lm_head),
    )


def digest(
    layers: tuple[dict[str, ModuleDelta], ...],
    embedding: VocabularyDelta | None,
    lm_head: VocabularyDelta | None,
) -> str:
    """SHA-256 (hex) over name, shape and float32 values of every tensor, sorted by name."""
    tensors: dict[str, torch.Tensor | None] = {}
    for index, modules in enumerate(layers):
        for module, delta in modules.items():
            for name in ("a", "b", "gain", "bias"):
                tensors[f"{index:06d}.{module}.{name}"] = getattr(delta, name)
    for table, change in (("embedding", embedding), ("lm_head", lm_head)):
        for name in ("full", "left", "right"):
            tensors[f"{table}.{name}"] = getattr(change, name) if change else None
    sha = hashlib.sha256(f"layers {len(layers)}".encode())
    for name, tensor in sorted(tensors.items()):
        if tensor is not None:
            sha.update(f"\n{name} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.contiguous().numpy().data)
    return sha.hexdigest()


def _module_delta(
    part: Parts,
    index: int,
    config: LoraConfig,
    file: TensorFile,
    base: ModelWeights,
    layer: LayerWeights | None,
) -> ModuleDelta:
    assert part.module is not None
    out, in_ = base.spec.linear_shapes[part.module]
    a, b = torch.zeros(0, in_), torch.zeros(0, out)
    gain = bias = None
    if part.has_pair:
        a = file.read(part.tensors["a"])
        b = _scaled(file, part.tensors["b"], config.scaling(part.key)).T.contiguous()
    if "magnitude" in part.tensors:
        adapted = base.linear(index, part.module).float().addmm(b.T, a)
        gain = _gain(file, part.tensors["magnitude"], adapted)
    if "bias" in part.tensors:
        assert layer is not None
        base_bias = getattr(layer, part.module.removesuffix("_proj") + "_bias")
        if base_bias is None:
            raise AdapterError(
                f"{file.path}: {part.tensors['bias']} is a bias, but the base model has none there"
            )
        bias = file.read(part.tensors["bias"]) - base_bias.float()
        bias = bias if bias.any() else None
    return ModuleDelta(a, b, gain, bias)


def _scaled(file: TensorFile, name: str, scaling: float) -> torch.Tensor:
    scaled = file.read(name) * scaling
    if not torch.isfinite(scaled).all():
        raise AdapterError(f"{file.path}: {name} times its scaling, {scaling:g}, exceeds float32")
    return scaled


def _gain(file: TensorFile, name: str, adapted: torch.Tensor) -> torch.Tensor:
    """DoRA: trained magnitude over the norm of each row of the adapted weight [out, in]."""
    gain: torch.Tensor = file.read(name) / torch.linalg.norm(adapted, dim=1)
    if not torch.isfinite(gain).all():
        raise AdapterError(f"{file.path}: {name} belongs to a weight row of norm 0; the gain is not finite")
    return gain


class _Vocabulary:
    """Changes of embed_tokens and lm_head, read from one file."""

    def __init__(
        self, parts: dict[str, Parts], config: LoraConfig, file: TensorFile, base: ModelWeights
    ) -> None:
        self.parts = parts
        self.config = config
        self.file = file
        self.base = base

    def deltas(self) -> tuple[VocabularyDelta | None, VocabularyDelta | None]:
        """(embedding, lm_head), None where unchanged."""
        tables = {key: self._table(key) for key in (EMBEDDING, LM_HEAD)}
        if self.base.spec.tie_embeddings:
            for one, other in ((EMBEDDING, LM_HEAD), (LM_HEAD, EMBEDDING)):
                # One parameter serves both ends, unless modules_to_save made a copy for one of them.
                if not self.config.saves(one) and not self._stores(other):
                    tables[other] = tables[one]
        return self._delta(EMBEDDING, tables[EMBEDDING]), self._delta(LM_HEAD, tables[LM_HEAD])

    def _stores(self, key: str) -> bool:
        return key in self.parts and "table" in self.parts[key].tensors

    def _base_table(self, key: str) -> torch.Tensor:
        return self.base.embedding() if key == EMBEDDING else self.base.lm_head()

    def _table(self, key: str) -> torch.Tensor | None:
        """The stored table in float32, or None where absent or the base model's own, rounded or not."""
        if not self._stores(key):
            return None
        stored = self.file.stored(self.parts[key].tensors["table"])
        unchanged = torch.equal(self._base_table(key).to(stored.dtype), stored)
        return None if unchanged else stored.to(torch.float32, copy=True)

    def _delta(self, key: str, table: torch.Tensor | None) -> VocabularyDelta | None:
        """Change of one table by its pair, if it has one, and by a whole new table, if there is one."""
        part = self.parts.get(key)
        if part is None or not part.has_pair:
            return None if table is None else VocabularyDelta(full=table)
        scaling = self.config.scaling(key)
        if key == EMBEDDING:
            left = self.file.read(part.tensors["embedding_a"]).T.contiguous()
            right = _scaled(self.file, part.tensors["embedding_b"], scaling).T.contiguous()
        else:
            left = _scaled(self.file, part.tensors["b"], scaling)
            right = self.file.read(part.tensors["a"])
        if table is None and "magnitude" not in part.tensors:
            return VocabularyDelta(left=left, right=right)
        full = (self._base_table(key).float() if table is None else table).addmm(left, right)
        if "magnitude" in part.tensors:
            # peft normalises an embedding per hidden dimension, lm_head per token.
            adapted = full.T if key == EMBEDDING else full
            gain = _gain(self.file, part.tensors["magnitude"], adapted)
            full *= gain if key == EMBEDDING else gain[:, None]
        return VocabularyDelta(full=full)


def _describe(
    config: LoraConfig,
    layers: tuple[dict[str, ModuleDelta], ...],
    embedding: VocabularyDelta | None,
    lm_head: VocabularyDelta | None,
) -> dict[str, str]:
    ranks = sorted({d.rank for layer in layers for d in layer.values()})
    modules = list(dict.fromkeys(module for layer in layers for module in layer))
    modules += [name for name, change in (("embed_tokens", embedding), ("lm_head", lm_head)) if change]
    return {
        "kind": "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA",
        "rank": "-".join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1]))) if ranks else "0",
        "modules": ", ".join(modules),
        "layers": str(sum(1 for layer in layers if layer)),
        "base_model": config.base_model,
    }


__all__ = ["digest", "load_peft"]
