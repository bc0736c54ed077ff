"""ModelWeights over any source of named tensors: one place that knows which tensors a spec needs.

A source (safetensors, GGUF, random) lists names and shapes cheaply and reads one tensor at a time.
Names, shapes and dtypes are checked when a checkpoint is opened, before any tensor is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Protocol, runtime_checkable

import torch

from polybatch.config import ModelSpec
from polybatch.errors import ModelError
from polybatch.models.quantized_weights import QuantizedTensor
from polybatch.models.weights import LayerWeights


class TensorSource(Protocol):
    """Named tensors of one checkpoint. `read` returns float32, float16 or bfloat16."""

    @property
    def label(self) -> str:
        """The checkpoint's name in errors."""
        ...

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def check_type(self, name: str) -> None:
        """Raise ModelError where the tensor's type cannot be read."""
        ...

    def read(self, name: str) -> torch.Tensor: ...


@runtime_checkable
class QuantizedTensors(Protocol):
    """What a source may also do: give a tensor's integers as they are stored, None where it has none."""

    def quantized(self, name: str) -> QuantizedTensor | None: ...


Locate = Callable[[str, int | None], str]
"""Field of LayerWeights and layer, or one of MODEL_FIELDS and None -> the source's tensor name."""

MODEL_FIELDS = ("embedding", "final_norm", "lm_head")


def layer_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Fields of LayerWeights that a layer of this model has -> shape."""
    shapes: dict[str, tuple[int, ...]] = {"input_norm": (spec.hidden_size,)}
    shapes |= {module.removesuffix("_proj"): shape for module, shape in spec.linear_shapes.items()}
    shapes["post_attention_norm"] = (spec.hidden_size,)
    biased = spec.qkv_bias * ("q", "k", "v") + spec.o_bias * ("o",) + spec.mlp_bias * ("gate", "up", "down")
    shapes |= {f"{name}_bias": shapes[name][:1] for name in biased}
    if spec.qk_norm:
        shapes |= {"q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,)}
    return shapes


def model_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Tensors outside the layers -> shape; lm_head only where it is not the embedding."""
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (spec.vocab_size, spec.hidden_size),
        "final_norm": (spec.hidden_size,),
    }
    if not spec.tie_embeddings:
        shapes["lm_head"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def expected_tensors(spec: ModelSpec, locate: Locate) -> Iterator[tuple[str, tuple[int, ...]]]:
    """All tensor names and shapes of a model, in the source's spelling."""
    for field, shape in model_shapes(spec).items():
        yield locate(field, None), shape
    for layer in range(spec.num_layers):
        for field, shape in layer_shapes(spec).items():
            yield locate(field, layer), shape


class CheckpointWeights:
    """ModelWeights that reads from a source at every call and keeps nothing.

    ignored: tensor names that the checkpoint may hold besides the model's.
    Raises ModelError for a tensor that is missing, of the wrong shape or type, or unexpected.
    """

    def __init__(
        self, spec: ModelSpec, source: TensorSource, locate: Locate, ignored: Callable[[str], bool]
    ) -> None:
        self._spec = spec
        self._source = source
        self._locate = locate
        names = source.names()
        expected = set()
        for name, shape in expected_tensors(spec, locate):
            if name not in names:
                raise ModelError(f"{source.label} lacks the tensor {name}, of shape {list(shape)}")
            if source.shape(name) != shape:
                raise ModelError(
                    f"{source.label}: tensor {name} has the shape {list(source.shape(name))}; "
                    f"the checkpoint's settings ask for {list(shape)}"
                )
            source.check_type(name)
            expected.add(name)
        for name in names:
            if name not in expected and not ignored(name):
                raise ModelError(
                    f"{source.label} holds the tensor {name}, which a {spec.family} model with these "
                    "settings does not have: refused, since its output would not be the checkpoint's"
                )

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def _read(self, field: str, layer: int | None = None) -> torch.Tensor:
        return self._source.read(self._locate(field, layer))

    def embedding(self) -> torch.Tensor:
        return self._read("embedding")

    def lm_head(self) -> torch.Tensor:
        return self._read("embedding" if self._spec.tie_embeddings else "lm_head")

    def final_norm(self) -> torch.Tensor:
        return self._read("final_norm")

    def layer(self, index: int) -> LayerWeights:
        return LayerWeights(**{field: self._read(field, index) for field in layer_shapes(self._spec)})

    def linear(self, layer: int, module: str) -> torch.Tensor:
        return self._source.read(self._linear_name(layer, module))

    def quantized_linear(self, layer: int, module: str) -> QuantizedTensor | None:
        """The weight that `linear` dequantises, as the checkpoint stores it; None where that is in floats."""
        name = self._linear_name(layer, module)
        return self._source.quantized(name) if isinstance(self._source, QuantizedTensors) else None

    def _linear_name(self, layer: int, module: str) -> str:
        if module not in self._spec.linear_shapes:
            raise ModelError(f"no linear layer {module!r}; there are {', '.join(self._spec.linear_shapes)}")
        return self._locate(module.removesuffix("_proj"), layer)
