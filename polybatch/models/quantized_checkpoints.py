"""Quantised Hugging Face checkpoints: GPTQ, AWQ and compressed-tensors, read without going through floats.

A linear layer of such a checkpoint has several tensors in the place of its `weight`. `QuantizedSource` shows
them as one tensor of that name: its shape, its dequantised values (`read`), and its integers with scales and
zeros (`quantized`) for executors that compute with them. Which layers are quantised is read off the tensors'
names; everything else passes through.

What is packed how (eight 4-bit values in an int32, the first in the lowest bits, unless said otherwise):

    GPTQ                qweight [in / 8, out], qzeros [groups, out / 8], scales [groups, out], g_idx [in].
                        Zeros are stored less 1, but not in checkpoint_format gptq_v2.
    AWQ ("gemm")        qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out].
                        The eight columns of a word lie in the order 0, 2, 4, 6, 1, 3, 5, 7.
    pack-quantized      weight_packed [out, in / 8], weight_scale [out, groups], weight_shape [2],
                        weight_zero_point [out / 8, groups] where asymmetric. Values and zeros are
                        stored plus 8.
    float-quantized     weight [out, in] in float8 e4m3, weight_scale [out, 1] or one for all.

Refused by name: activation order (groups of inputs that are not consecutive), other widths, sparse or
otherwise packed formats, static scales of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import torch

from polybatch.errors import ModelError
from polybatch.models.checkpoint import TensorSource
from polybatch.models.fields import Fields
from polybatch.models.quantized_weights import ZERO, QuantizedTensor, dequantize_symmetric

Shape = tuple[int, ...]
_PER_WORD = 8
_FLOATS = ("F16", "BF16", "F32")
# Column c of eight lies at this place of an AWQ word.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class TypedSource(TensorSource, Protocol):
    """A source that also names the types of tensors, as safetensors spells them ("F16", "I32")."""

    def type_of(self, name: str) -> str: ...


class Format(Protocol):
    """How one linear layer is stored. Names of parts are what follows the layer's name and a dot."""

    marker: str
    """The part that only quantised layers have."""
    values: str
    """The part that holds the values, a matrix."""
    types: Mapping[str, tuple[str, ...]]
    optional: Collection[str]

    def size(self, stored: Mapping[str, Shape]) -> tuple[int, int]:
        """(out, in), from the shapes of the parts."""
        ...

    def shapes(self, out: int, inputs: int, stored: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """The shapes that the parts must have."""
        ...

    def unpack(self, parts: Mapping[str, torch.Tensor], label: str) -> QuantizedTensor: ...


def open_quantized(config: Fields, source: TypedSource) -> TypedSource | QuantizedSource:
    """The source as it is where config.json names no quantisation, else its layers put together.

    Raises ModelError for a method, width or layout that is not supported.
    """
    quantization = config.section("quantization_config")
    if quantization is None:
        return source
    method = quantization.text("quant_method")
    if method not in _METHODS:
        raise ModelError(
            f"{config.source}: the checkpoint is quantised by {method!r}; supported are "
            f"{', '.join(_METHODS)}: give another checkpoint of the model, or a GGUF file"
        )
    return QuantizedSource(source, _METHODS[method](quantization))


class QuantizedSource:
    """A TensorSource in which a quantised layer is one tensor, `<layer>.weight`."""

    def __init__(self, source: TypedSource, form: Format) -> None:
        self.label = source.label
        self._source = source
        self._format = form
        names = set(source.names())
        ending = f".{form.marker}"
        layers = [name.removesuffix(ending) for name in names if name.endswith(ending)]
        self._parts: dict[str, dict[str, str]] = {}
        for layer in layers:
            parts = {part: f"{layer}.{part}" for part in form.types if f"{layer}.{part}" in names}
            missing = [part for part in form.types if part not in parts and part not in form.optional]
            if missing:
                raise ModelError(f"{self.label} holds {layer}{ending} but lacks {layer}.{missing[0]}")
            self._parts[f"{layer}.weight"] = parts
            names -= set(parts.values())
        self._names = names | self._parts.keys()

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> Shape:
        if name not in self._parts:
            return self._source.shape(name)
        stored = self._stored(name)
        values = self._format.values
        if len(stored[values]) != 2:
            raise self._bad(name, values, f"has the shape {list(stored[values])}; it must have two axes")
        return self._format.size(stored)

    def check_type(self, name: str) -> None:
        """Raise ModelError unless all parts of the layer have the types and shapes of the format."""
        if name not in self._parts:
            self._source.check_type(name)
            return
        out, inputs = self.shape(name)
        stored = self._stored(name)
        expected = self._format.shapes(out, inputs, stored)
        for part, full in self._parts[name].items():
            kind, kinds = self._source.type_of(full), self._format.types[part]
            if kind not in kinds:
                raise self._bad(name, part, f"has the type {kind}; it must be {' or '.join(kinds)}")
            if part in expected and stored[part] != expected[part]:
                raise self._bad(
                    name,
                    part,
                    f"has the shape {list(stored[part])}; "
                    f"quantization_config asks for {list(expected[part])}",
                )

    def read(self, name: str) -> torch.Tensor:
        """Dequantised where the layer is quantised, in the dtype of its scales."""
        weight = self.quantized(name)
        if weight is None:
            return self._source.read(name)
        return dequantize_symmetric(weight, weight.scales.dtype)

    def quantized(self, name: str) -> QuantizedTensor | None:
        """The layer's integers, scales and zeros; None for a tensor that is not quantised."""
        if name not in self._parts:
            return None
        parts = {part: self._source.read(full) for part, full in self._parts[name].items()}
        return self._format.unpack(parts, f"{self.label}: {name.removesuffix('.weight')}")

    def is_empty_bias(self, name: str) -> bool:
        """Whether this is the bias of a quantised layer and all zero: some tools add one to every layer."""
        layer = name.removesuffix(".bias")
        quantised = layer != name and f"{layer}.weight" in self._parts
        return quantised and not bool(self._source.read(name).any())

    def _stored(self, name: str) -> dict[str, Shape]:
        return {part: self._source.shape(full) for part, full in self._parts[name].items()}

    def _bad(self, name: str, part: str, what: str) -> ModelError:
        return ModelError(f"{self.label}: tensor {self._parts[name][part]} {what}")


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [a, b] -> uint8 [a, b, 8], the lowest bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).to(torch.uint8)


def _along_columns(words: torch.Tensor) -> torch.Tensor:
    """int32 [a, b] -> uint8 [a, 8 b]."""
    return _nibbles(words).flatten(1)


def _along_rows(words: torch.Tensor) -> torch.Tensor:
    """int32 [a, b] -> uint8 [8 a, b]."""
    return _nibbles(words).transpose(1, 2).flatten(0, 1)


def _awq_columns(words: torch.Tensor) -> torch.Tensor:
    return _nibbles(words)[..., list(_AWQ_PLACES)].flatten(1)


def _symmetric(zeros: torch.Tensor) -> torch.Tensor | None:
    return None if bool((zeros == ZERO).all()) else zeros.contiguous()


def _group_size(quantization: Fields, key: str = "group_size") -> int | None:
    """None for one scale per output channel, which these formats write as -1."""
    return None if quantization.get(key) == -1 else quantization.integer(key)


def _require(quantization: Fields, key: str, wanted: object, default: object = None) -> None:
    value = quantization.get(key)
    if (default if value is None else value) != wanted:
        raise quantization.bad(key, f"{wanted!r}: nothing else is supported")


class Gptq:
    """Values packed along the inputs."""

    marker = values = "qweight"
    types: Mapping[str, tuple[str, ...]] = {
        "qweight": ("I32",),
        "qzeros": ("I32",),
        "scales": _FLOATS,
        "g_idx": ("I32",),
    }
    optional: Collection[str] = ("g_idx",)

    def __init__(self, quantization: Fields) -> None:
        _require(quantization, "bits", 4)
        if quantization.flag("desc_act"):
            raise ModelError(
                f"{quantization.source}: desc_act (activation order) is not supported: its groups are not of "
                "consecutive inputs; give a checkpoint made with desc_act false"
            )
        kind = quantization.text("checkpoint_format", "gptq")
        if kind not in ("gptq", "gptq_v2"):
            raise quantization.bad("checkpoint_format", "gptq or gptq_v2")
        self._group = _group_size(quantization)
        self._zero_shift = 1 if kind == "gptq" else 0

    def size(self, stored: Mapping[str, Shape]) -> tuple[int, int]:
        rows, out = stored["qweight"]
        return out, rows * _PER_WORD

    def shapes(self, out: int, inputs: int, stored: Mapping[str, Shape]) -> Mapping[str, Shape]:
        groups = -(-inputs // (self._group or inputs))
        return {"qzeros": (groups, out // _PER_WORD), "scales": (groups, out), "g_idx": (inputs,)}

    def unpack(self, parts: Mapping[str, torch.Tensor], label: str) -> QuantizedTensor:
        values = _along_rows(parts["qweight"]).T.contiguous()
        size = self._group or values.shape[1]
        order = parts.get("g_idx")
        if order is not None and not torch.equal(order.long(), torch.arange(values.shape[1]) // size):
            raise ModelError(
                f"{label}.g_idx puts inputs into groups that are not consecutive (activation order), which "
                "is not supported: give a checkpoint made with desc_act false"
            )
        zeros = _along_columns(parts["qzeros"]).T + self._zero_shift
        return QuantizedTensor("int4", values, parts["scales"].T.contiguous(), _symmetric(zeros), size)


class Awq:
    """Values packed along the outputs, eight columns interleaved."""

    marker = values = "qweight"
    types: Mapping[str, tuple[str, ...]] = {"qweight": ("I32",), "qzeros": ("I32",), "scales": _FLOATS}
    optional: Collection[str] = ()

    def __init__(self, quantization: Fields) -> None:
        _require(quantization, "w_bit" if "w_bit" in quantization else "bits", 4)
        if quantization.text("version", "gemm").lower() != "gemm":
            raise quantization.bad("version", "gemm: give a checkpoint in that layout")
        self._group = _group_size(
            quantization, "q_group_size" if "q_group_size" in quantization else "group_size"
        )

    def size(self, stored: Mapping[str, Shape]) -> tuple[int, int]:
        inputs, words = stored["qweight"]
        return words * _PER_WORD, inputs

    def shapes(self, out: int, inputs: int, stored: Mapping[str, Shape]) -> Mapping[str, Shape]:
        groups = -(-inputs // (self._group or inputs))
        return {"qzeros": (groups, out // _PER_WORD), "scales": (groups, out)}

    def unpack(self, parts: Mapping[str, torch.Tensor], label: str) -> QuantizedTensor:
        values = _awq_columns(parts["qweight"]).T.contiguous()
        zeros = _awq_columns(parts["qzeros"]).T
        size = self._group or values.shape[1]
        return QuantizedTensor("int4", values, parts["scales"].T.contiguous(), _symmetric(zeros), size)


class PackedIntegers:
    """compressed-tensors' pack-quantized: values packed along the inputs of each row."""

    marker = values = "weight_packed"
    types: Mapping[str, tuple[str, ...]] = {
        "weight_packed": ("I32",),
        "weight_scale": _FLOATS,
        "weight_shape": ("I64", "I32"),
        "weight_zero_point": ("I32",),
    }
    optional: Collection[str] = ("weight_zero_point", "weight_shape")

    def __init__(self, weights: Fields) -> None:
        _require(weights, "num_bits", 4)
        _require(weights, "type", "int")
        if weights.get("actorder") not in (None, "weight", "static"):
            raise weights.bad("actorder", "null or weight: activation order of groups is not supported")
        strategy = weights.text("strategy")
        if strategy not in ("group", "channel"):
            raise weights.bad("strategy", "group or channel")
        self._group = weights.integer("group_size") if strategy == "group" else None

    def size(self, stored: Mapping[str, Shape]) -> tuple[int, int]:
        out, words = stored["weight_packed"]
        return out, words * _PER_WORD

    def shapes(self, out: int, inputs: int, stored: Mapping[str, Shape]) -> Mapping[str, Shape]:
        groups = -(-inputs // (self._group or inputs))
        return {
            "weight_scale": (out, groups),
            "weight_shape": (2,),
            "weight_zero_point": (-(-out // _PER_WORD), groups),
        }

    def unpack(self, parts: Mapping[str, torch.Tensor], label: str) -> QuantizedTensor:
        values = _along_columns(parts["weight_packed"])
        shape = parts.get("weight_shape")
        if shape is not None and shape.tolist() != list(values.shape):
            raise ModelError(
                f"{label}.weight_shape is {shape.tolist()}; weight_packed holds {list(values.shape)}"
            )
        zeros = None
        if "weight_zero_point" in parts:
            zeros = _symmetric(_along_rows(parts["weight_zero_point"])[: values.shape[0]])
        return QuantizedTensor("int4", values, parts["weight_scale"], zeros, self._group or values.shape[1])


class Float8:
    """compressed-tensors' float-quantized: e4m3 with a scale per output channel, or one for all."""

    marker, values = "weight_scale", "weight"
    types: Mapping[str, tuple[str, ...]] = {"weight_scale": _FLOATS, "weight": ("F8_E4M3",)}
    optional: Collection[str] = ()

    def __init__(self, weights: Fields) -> None:
        _require(weights, "num_bits", 8)
        _require(weights, "type", "float")
        strategy = weights.text("strategy")
        if strategy not in ("channel", "tensor"):
            raise weights.bad("strategy", "channel or tensor")
        self._is_per_channel = strategy == "channel"

    def size(self, stored: Mapping[str, Shape]) -> tuple[int, int]:
        out, inputs = stored["weight"]
        return out, inputs

    def shapes(self, out: int, inputs: int, stored: Mapping[str, Shape]) -> Mapping[str, Shape]:
        if self._is_per_channel:
            return {"weight_scale": (out, 1)}
        return {"weight_scale": stored["weight_scale"] if stored["weight_scale"] in ((), (1, 1)) else (1,)}

    def unpack(self, parts: Mapping[str, torch.Tensor], label: str) -> QuantizedTensor:
        values = parts["weight"]
        scales = parts["weight_scale"].reshape(-1, 1).expand(values.shape[0], 1).contiguous()
        return QuantizedTensor("fp8", values, scales, None, values.shape[1])


def _compressed_tensors(quantization: Fields) -> Format:
    """The format of a compressed-tensors checkpoint, which must be one for all its linear layers."""
    if quantization.get("kv_cache_scheme") is not None:
        raise quantization.bad("kv_cache_scheme", "null: scales for the KV cache are not supported")
    sparsity = quantization.section("sparsity_config")
    if sparsity is not None and sparsity.text("format", "dense") != "dense":
        raise sparsity.bad("format", "dense: sparse weights are not supported")
    groups = quantization.section("config_groups")
    names = list(quantization.get("config_groups") or [])
    if groups is None or len(names) != 1:
        raise quantization.bad("config_groups", "a map of one group")
    group = groups.section(names[0])
    weights = None if group is None else group.section("weights")
    if group is None or weights is None:
        raise groups.bad(names[0], "a map with weights")
    form = group.text("format", quantization.text("format"))
    if form not in _COMPRESSED:
        raise quantization.bad("format", " or ".join(_COMPRESSED))
    inputs = group.section("input_activations")
    if inputs is not None and not (form == "float-quantized" and inputs.get("dynamic") is True):
        raise group.bad("input_activations", "null, or dynamic with float-quantized weights")
    return _COMPRESSED[form](weights)


_COMPRESSED: Mapping[str, Callable[[Fields], Format]] = {
    "pack-quantized": PackedIntegers,
    "float-quantized": Float8,
}
_METHODS: Mapping[str, Callable[[Fields], Format]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": _compressed_tensors,
}
