"""A decoder's weights on the GPU and its forward pass over one ragged step.

The residual stream and all intermediate values live in buffers that are taken once, so a pass allocates
nothing and can be captured in a graph at any number of rows. Projections that read the same input are
fused (q, k, v; gate, up); what follows a product (adapter, bias, rotation, activation) is one kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from polybatch.config import ModelSpec
from polybatch.execution.cuda_stored import stored_product
from polybatch.kernels.linear.cuda import FloatLinear, PackedLinear
from polybatch.kernels.lora.carried import SPARE
from polybatch.kernels.norm.cuda import rms_norm
from polybatch.models.quantized_weights import QuantizedTensor
from polybatch.models.weights import LayerWeights, ModelWeights

FUSED = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
"""Products of a layer and the projections that each joins, along their outputs."""

SPARE_OF = dict(zip(FUSED, SPARE, strict=True))
"""Spare columns of each product's weights, and spare elements of its input, where an adapter is carried."""


class HeadLinear:
    """The vocabulary's matrix; its product comes in float32 without being rounded on the way."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._transposed = weight.t()
        self.num_bytes = weight.nbytes

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if x.dtype is torch.float32:
            torch.mm(x, self._transposed, out=out)
        elif x.is_cuda:
            torch.mm(x, self._transposed, out_dtype=torch.float32, out=out)
        else:
            torch.mm(x.float(), self._transposed.float(), out=out)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer as it is held. products: by the names of FUSED; biases: of those that have one."""

    input_norm: torch.Tensor
    post_attention_norm: torch.Tensor
    products: dict[str, PackedLinear]
    biases: dict[str, torch.Tensor]
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


class DeviceWeights:
    """All weights of a model on one device.

    pack: how the linear weights of the decoder layers are held, each with the name of its product.
    progress: told of layers done and their number. scheme: of pack; weights that the checkpoint stores in it
        are packed as they are stored.
    """

    def __init__(
        self,
        weights: ModelWeights,
        dtype: torch.dtype,
        device: torch.device,
        pack: Callable[[str, torch.Tensor | QuantizedTensor], PackedLinear],
        progress: Callable[[int, int], None] | None = None,
        scheme: str | None = None,
    ) -> None:
        self.spec = spec = weights.spec

        def place(weight: torch.Tensor) -> torch.Tensor:
            return weight.detach().to(device, dtype).contiguous()

        self.embedding = place(weights.embedding())
        self.final_norm = place(weights.final_norm())
        self.lm_head = HeadLinear(self.embedding if spec.tie_embeddings else place(weights.lm_head()))
        self.layers = []
        for index in range(spec.num_layers):
            stored = {
                name: stored_product(weights, index, [f"{part}_proj" for part in parts], scheme)
                for name, parts in FUSED.items()
            }
            self.layers.append(_hold(weights.layer(index), place, pack, stored))
            if progress is not None:
                progress(index + 1, spec.num_layers)

    def with_spare_columns(self) -> list[list[torch.Tensor]]:
        """Per layer and product, weights as they lie, [out, in + spare]."""
        held = [list(layer.products.values()) for layer in self.layers]
        return [[linear.weight for linear in layer if isinstance(linear, FloatLinear)] for layer in held]

    @property
    def num_telling_layers(self) -> int:
        """The first layers, so many that they launch every kernel that the others do."""

        def kind(index: int, layer: Layer) -> tuple[object, ...]:
            products = [(type(linear), linear.num_bytes) for linear in layer.products.values()]
            norms = layer.q_norm is None, layer.k_norm is None
            return self.spec.window(index), *products, *sorted(layer.biases), *norms

        kinds = list(itertools.starmap(kind, enumerate(self.layers)))
        # What joins two layers differs from what comes before the first.
        return max(map(kinds.index, kinds)) + 2

    @property
    def num_bytes(self) -> int:
        held = self.embedding.nbytes + self.final_norm.nbytes
        held += 0 if self.spec.tie_embeddings else self.lm_head.num_bytes
        for layer in self.layers:
            held += sum(linear.num_bytes for linear in layer.products.values())
            held += layer.input_norm.nbytes + layer.post_attention_norm.nbytes
        return held


def _hold(
    layer: LayerWeights,
    place: Callable[[torch.Tensor], torch.Tensor],
    pack: Callable[[str, torch.Tensor | QuantizedTensor], PackedLinear],
    stored: dict[str, QuantizedTensor | None],
) -> Layer:
    products: dict[str, PackedLinear] = {}
    biases: dict[str, torch.Tensor] = {}
    for name, parts in FUSED.items():
        kept = stored[name]
        if kept is None:
            placed = [place(getattr(layer, part)) for part in parts]
            products[name] = pack(name, placed[0] if len(placed) == 1 else torch.cat(placed))
        else:
            products[name] = pack(name, kept)
        found = [getattr(layer, f"{part}_bias") for part in parts]
        if any(bias is not None for bias in found):
            sizes = [getattr(layer, part).shape[0] for part in parts]
            biases[name] = place(
                torch.cat([
                    torch.zeros(size) if bias is None else bias.detach().float().cpu()
                    for bias, size in zip(found, sizes, strict=True)
                ])
            )  # fmt: skip
    return Layer(
        place(layer.input_norm),
        place(layer.post_attention_norm),
        products,
        biases,
        None if layer.q_norm is None else place(layer.q_norm),
        None if layer.k_norm is None else place(layer.k_norm),
    )


class Workspace:
    """Intermediate values of a step: a buffer for each name of `workspace_shapes`.

    hidden: normalised values on their way into a product. product: that of o or down. last: normalised
    rows that need logits. Where weights have spare columns, rows of the products' inputs have spare elements
    behind them.
    """

    residual: torch.Tensor
    hidden: torch.Tensor
    product: torch.Tensor
    qkv: torch.Tensor
    attention: torch.Tensor
    gate_up: torch.Tensor
    activated: torch.Tensor
    last: torch.Tensor
    logits: torch.Tensor

    def __init__(
        self,
        spec: ModelSpec,
        max_tokens: int,
        max_logits: int,
        dtype: torch.dtype,
        device: torch.device,
        has_spare: bool = False,
    ) -> None:
        wide = workspace_shapes(spec, max_tokens, max_logits, dtype, has_spare)
        for name, ((rows, width), kind) in workspace_shapes(spec, max_tokens, max_logits, dtype).items():
            buffer = torch.empty(wide[name][0], dtype=kind, device=device)
            setattr(self, name, buffer[:rows, :width])

    def wide_inputs(self) -> list[torch.Tensor]:
        """What each of FUSED's products reads, with spare elements, which there must be."""
        inputs = (self.hidden, self.attention, self.hidden, self.activated)
        return [with_spare(x, name) for name, x in zip(FUSED, inputs, strict=True)]


def with_spare(x: torch.Tensor, name: str) -> torch.Tensor:
    """Rows of a workspace's buffer with their spare elements, as input of a product."""
    return x.as_strided((x.shape[0], x.shape[1] + SPARE_OF[name]), x.stride())


def workspace_shapes(
    spec: ModelSpec, max_tokens: int, max_logits: int, dtype: torch.dtype, has_spare: bool = False
) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Buffers of a `Workspace` for max_tokens tokens and max_logits rows of logits, by name."""
    spare = SPARE_OF if has_spare else dict.fromkeys(SPARE_OF, 0)
    return {
        "residual": ((max_tokens, spec.hidden_size), dtype),
        "hidden": ((max_tokens, spec.hidden_size + max(spare["qkv"], spare["gate_up"])), dtype),
        "product": ((max_tokens, spec.hidden_size), dtype),
        "qkv": ((max_tokens, spec.q_size + 2 * spec.kv_size), dtype),
        "attention": ((max_tokens, spec.q_size + spare["o"]), dtype),
        "gate_up": ((max_tokens, 2 * spec.intermediate_size), dtype),
        "activated": ((max_tokens, spec.intermediate_size + spare["down"]), dtype),
        "last": ((max_logits, spec.hidden_size), dtype),
        "logits": ((max_logits, spec.vocab_size), torch.float32),
    }


class StepOperations(Protocol):
    """What differs from step to step inside a layer."""

    def embed(self, out: torch.Tensor) -> None:
        """Write the embeddings of the step's tokens, [n, hidden]."""
        ...

    def attend(self, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> None:
        """Write keys and values to their pages and attention's result to out, [n, H * D].

        qkv: [n, (H + 2 KH) * D], not yet rotated; changed.
        """
        ...

    def product(self, layer: int, name: str, x: torch.Tensor, out: torch.Tensor) -> None:
        """A fused product without its bias. The adapters of its tokens may follow where it is read next."""
        ...

    def activate(self, layer: int, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """SiLU of the gate times up, [n, intermediate]."""
        ...

    def add_norm(
        self,
        layer: int,
        name: str,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> None:
        """Add x, the product `name` of a layer, to the residual and normalise; see `rms_norm`."""
        ...


def run_layers(
    weights: DeviceWeights,
    space: Workspace,
    step: StepOperations,
    num_rows: int,
    num_layers: int | None = None,
) -> None:
    """One pass over the first num_rows rows of a step; `run_head` goes on from there.

    num_layers: the first so many, in a rehearsal; None for all.
    """
    residual, hidden = space.residual[:num_rows], space.hidden[:num_rows]
    qkv, attention = space.qkv[:num_rows], space.attention[:num_rows]
    gate_up, activated = space.gate_up[:num_rows], space.activated[:num_rows]
    product = space.product[:num_rows]
    step.embed(residual)
    for index, layer in enumerate(weights.layers[:num_layers]):
        if index == 0:
            rms_norm(residual, layer.input_norm, weights.spec.rms_norm_eps, out=hidden)
        else:
            step.add_norm(index - 1, "down", product, residual, layer.input_norm, hidden)
        step.product(index, "qkv", hidden, qkv)
        step.attend(index, qkv, attention)
        step.product(index, "o", attention, product)
        _add_bias(product, layer.biases.get("o"))
        step.add_norm(index, "o", product, residual, layer.post_attention_norm, hidden)
        step.product(index, "gate_up", hidden, gate_up)
        _add_bias(gate_up, layer.biases.get("gate_up"))
        step.activate(index, gate_up, activated)
        step.product(index, "down", activated, product)
        _add_bias(product, layer.biases.get("down"))


def run_head(
    weights: DeviceWeights, space: Workspace, step: StepOperations, logit_rows: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """The logits of a pass over num_rows rows, [L, vocab] float32, a view.

    logit_rows: [L] int32, -1 for none: such a row's logits mean nothing.
    """
    residual, product = space.residual[:num_rows], space.product[:num_rows]
    count = len(logit_rows)
    last, logits = space.last[:count], space.logits[:count]
    step.add_norm(len(weights.layers) - 1, "down", product, residual, weights.final_norm, last, logit_rows)
    if count:
        weights.lm_head.forward(last, logits)
    return logits


def _add_bias(x: torch.Tensor, bias: torch.Tensor | None) -> None:
    if bias is not None:
        x += bias
