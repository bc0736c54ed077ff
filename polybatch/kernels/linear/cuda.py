"""linear on CUDA: one face over 16-bit, int4 and fp8 weights.

    workspace = LinearWorkspace("cuda", torch.bfloat16, max_tokens=8192)
    linear = pack(weight, "int4", workspace)        # weight [out, in], or several stacked along `out`
    linear.forward(x, out)                          # x [T, in], out [T, out] view; T <= max_tokens

`forward` writes `out` and returns nothing. After a first call per size it allocates nothing and may be
captured in a CUDA graph. Layers share the workspace, so they must run one after the other on one stream.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import triton

from polybatch.errors import ConfigError
from polybatch.kernels.gluon import runs_hopper_kernels
from polybatch.kernels.interpret import is_interpreted
from polybatch.kernels.linear.cuda_config import Int4Config, int4_config
from polybatch.kernels.linear.cuda_fp8 import quantize_tokens_kernel
from polybatch.kernels.linear.cuda_int4 import dequantize_kernel, int4_linear_kernel
from polybatch.kernels.linear.cuda_pack import K_TILE, ROW_TILE, Int4Layout, pack_int4
from polybatch.kernels.linear.cuda_workspace import LinearWorkspace, check_product
from polybatch.kernels.linear.quantize_symmetric import (
    QuantizedTensor,
    dequantize_symmetric,
    quantize_fp8,
    quantize_int4_symmetric,
)

__all__ = ["FloatLinear", "Fp8Linear", "Int4Linear", "LinearWorkspace", "PackedLinear", "pack"]

SCHEMES = (None, "int4", "int4-channel", "fp8")
SCRATCH_BYTES = 128 << 20
"""Of widened weights at a time: few pieces, because a product of part of the rows fills the device badly."""
FUSED_TOKENS = 512
"""Above this many tokens, int4 weights are widened and multiplied by cuBLAS."""
HOPPER_FUSED_TOKENS = 2048
"""The same where Hopper's kernel serves the layer."""
BIASED_TOKENS = range(17, 385)
"""So many tokens' products with long sums are faster where a bias is added, if only 0: cuBLASLt, which torch
calls then, chooses other kernels than cuBLAS does (14336 inputs, 128 tokens: 46 us for 53).
"""
_INTERPRETED = is_interpreted()
_LADDER = (8, 16, 32, 64, *range(128, HOPPER_FUSED_TOKENS + 1, 128))


class PackedLinear(Protocol):
    """A linear layer on the device, or several stacked along their outputs."""

    @property
    def num_bytes(self) -> int:
        """Of the weights, without the shared workspace."""
        ...

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out[T, out] = x[T, in] W^T; both in the workspace's dtype, last axis contiguous."""
        ...


def pack(
    weight: torch.Tensor | QuantizedTensor, scheme: str | None, workspace: LinearWorkspace, spare: int = 0
) -> PackedLinear:
    """Put a weight [out, in] on the workspace's device in the layout of its scheme.

    scheme: None (activations' dtype), "int4" (groups of 128 inputs), "int4-channel" (one scale per output) or
    "fp8". Float weights are rounded to nearest; a QuantizedTensor keeps its values where the scheme is its
    own kind and is dequantised where it is None. spare: columns of 0 after a weight that is not packed.
    Raises ConfigError for a scheme or shape that the kernels do not know.
    """
    if scheme not in SCHEMES:
        raise ConfigError(
            f"quantization is {scheme!r}; on CUDA it must be one of {', '.join(map(str, SCHEMES))}"
        )
    if isinstance(weight, QuantizedTensor):
        weight = weight.to(workspace.device)
        if scheme is not None and not scheme.startswith(weight.kind):
            raise ConfigError(
                f"quantization is {scheme!r}, but the checkpoint's weights are {weight.kind}: "
                f"use quantization {weight.kind!r} or None"
            )
        if scheme is None:
            return FloatLinear(dequantize_symmetric(weight, workspace.dtype), spare)
    elif scheme is None:
        return FloatLinear(weight.to(workspace.device, workspace.dtype), spare)
    else:
        weight = weight.to(workspace.device)
    if workspace.dtype == torch.float32:
        raise ConfigError(f"quantization {scheme!r} needs dtype bfloat16 or float16 on CUDA, not float32")
    if scheme == "fp8":
        return Fp8Linear(weight if isinstance(weight, QuantizedTensor) else quantize_fp8(weight), workspace)
    if not isinstance(weight, QuantizedTensor):
        weight = quantize_int4_symmetric(weight, None if scheme == "int4-channel" else 128)
    return Int4Linear(pack_int4(weight), workspace)


class FloatLinear:
    """Weights in the activations' dtype, multiplied by cuBLAS.

    weight: [out, in + spare]. Inputs may be as wide, [T, in + spare], and take all of it then.
    """

    def __init__(self, weight: torch.Tensor, spare: int = 0) -> None:
        num_out, self._num_in = weight.shape
        self.weight = weight.contiguous()
        if spare:
            self.weight = weight.new_zeros(num_out, self._num_in + spare)
            self.weight[:, : self._num_in] = weight
        self._whole, self._own = self.weight.T, self.weight[:, : self._num_in].T
        self._nothing = None
        if weight.is_cuda and weight.itemsize == 2 and self._num_in >= 2 * num_out:
            self._nothing = weight.new_zeros(num_out)

    @property
    def num_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> None:
        weight = self._own if x.shape[1] == self._num_in else self._whole
        if self._nothing is not None and len(x) in BIASED_TOKENS and out.is_contiguous():
            torch.addmm(self._nothing, x, weight, out=out)
        else:
            torch.mm(x, weight, out=out)


class Int4Linear:
    """4-bit weights: a fused kernel up to some number of tokens, above it widened weights and cuBLAS."""

    def __init__(self, layout: Int4Layout, workspace: LinearWorkspace) -> None:
        self.layout = layout
        self._workspace = workspace
        self._chunk_rows = _chunk_rows(layout, workspace)
        self._is_hopper = (
            layout.is_grouped and layout.offsets is None and runs_hopper_kernels(workspace.device)
        )
        self._fused_tokens = HOPPER_FUSED_TOKENS if self._is_hopper else FUSED_TOKENS
        self._descriptors: dict[int, Any] = {}
        for is_hopper in {False, self._is_hopper}:
            steps = {min(m, self._fused_tokens) for m in _LADDER}
            self.reserve([(m, self._config(m, is_hopper)) for m in steps])
        if workspace.max_tokens > self._fused_tokens:
            workspace.reserve("widened", self._chunk_rows * layout.num_in, workspace.dtype)

    @property
    def num_bytes(self) -> int:
        return self.layout.num_bytes

    def reserve(self, configs: list[tuple[int, Int4Config]]) -> None:
        """Room for the partial sums of these (tokens, configuration) pairs."""
        tiles = [-(-m // c.block_m) * (self.layout.rows // c.block_out) for m, c in configs]
        cells = [t * c.split * c.block_out * c.block_m for t, (_, c) in zip(tiles, configs, strict=True)]
        split = [cell for cell, (_, c) in zip(cells, configs, strict=True) if c.split > 1]
        self._workspace.reserve("partials", max([1, *split]), torch.float32)
        self._workspace.reserve("arrived", max(tiles), torch.int32)

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> None:
        num_tokens = x.shape[0]
        check_product(x, out, self.layout.num_in, self.layout.num_out, self._workspace)
        if num_tokens > self._fused_tokens:
            self.forward_widened(x, out)
        elif num_tokens:
            self.forward_fused(x, out, self._config(num_tokens, self._is_hopper and _has_aligned_rows(x)))

    def _config(self, num_tokens: int, is_hopper: bool) -> Int4Config:
        return int4_config(num_tokens, self.layout.rows, self.layout.k_tiles, is_hopper)

    def forward_fused(self, x: torch.Tensor, out: torch.Tensor, config: Int4Config) -> None:
        """One launch. The workspace must have been reserved for the configuration."""
        kernel, grid, arguments, options = self._launch(x, out, config)
        kernel[grid](*arguments, **options)

    def _launch(
        self, x: torch.Tensor, out: torch.Tensor, config: Int4Config
    ) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
        if config.is_hopper:
            return self._launch_hopper(x, out, config)
        layout = self.layout
        grid = (-(-x.shape[0] // config.block_m), layout.rows // config.block_out, config.split)
        arguments = (
            x, layout.words, layout.scales, layout.scales if layout.offsets is None else layout.offsets, out,
            self._workspace.buffer("partials"), self._workspace.buffer("arrived"), x.shape[0], layout.num_in,
            layout.num_out, layout.rows, layout.k_tiles, config.split, x.stride(0), out.stride(0),
        )  # fmt: skip
        options: dict[str, Any] = {
            "BLOCK_M": config.block_m,
            "BLOCK_OUT": config.block_out,
            "COLUMNS": config.columns,
            "REDUCED": config.parts_at_a_time,
            "EVEN_K": layout.num_in % K_TILE == 0,
            "GROUPED": layout.is_grouped,
            "HAS_ZEROS": layout.offsets is not None,
            "SCALES_BF16": layout.scales_bf16,
            "SCALED": config.is_scaled and layout.is_grouped,
            "ASSEMBLY": not _INTERPRETED,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        return int4_linear_kernel, grid, arguments, options

    def _launch_hopper(
        self, x: torch.Tensor, out: torch.Tensor, config: Int4Config
    ) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
        # Gluon is Triton's experimental part, which other GPUs and other versions do without.
        from polybatch.kernels.linear import cuda_int4_hopper as hopper

        layout = self.layout
        if config.block_out not in self._descriptors:
            self._descriptors[config.block_out] = hopper.words_descriptor(layout.words, config.block_out)
        grid = (-(-x.shape[0] // config.block_m), layout.rows // config.block_out * config.split)
        arguments = (
            self._descriptors[config.block_out], hopper.x_descriptor(x, config.block_m), layout.scales, out,
            self._workspace.buffer("partials"), self._workspace.buffer("arrived"), x.shape[0], layout.num_out,
            layout.rows, layout.k_tiles, out.stride(0),
        )  # fmt: skip
        options: dict[str, Any] = {
            "BLOCK_M": config.block_m,
            "BLOCK_OUT": config.block_out,
            "SPLIT": config.split,
            "STAGES": config.num_stages,
            "SCALES_BF16": layout.scales_bf16,
            "num_warps": config.num_warps,
        }
        return hopper.int4_linear_hopper_kernel, grid, arguments, options

    def forward_widened(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Rows of weights by the chunk: widen them into scratch, multiply."""
        layout = self.layout
        scratch = self._workspace.buffer("widened")
        for first in range(0, layout.num_out, self._chunk_rows):
            num_rows = min(self._chunk_rows, layout.num_out - first)
            weight = scratch[: num_rows * layout.num_in].view(num_rows, layout.num_in)
            dequantize_kernel[(layout.k_tiles, -(-num_rows // 64))](
                layout.words,
                layout.scales,
                layout.scales if layout.offsets is None else layout.offsets,
                weight,
                first,
                num_rows,
                layout.num_in,
                layout.rows,
                BLOCK_OUT=64,
                GROUPED=layout.is_grouped,
                HAS_ZEROS=layout.offsets is not None,
                SCALES_BF16=layout.scales_bf16,
                ASSEMBLY=not _INTERPRETED,
                num_warps=4,
            )
            torch.mm(x, weight.T, out=out[:, first : first + num_rows])


def _has_aligned_rows(x: torch.Tensor) -> bool:
    """Whether the bulk copy engine can read x."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def _chunk_rows(layout: Int4Layout, workspace: LinearWorkspace) -> int:
    """Rows to widen at a time, in pieces of about the same size."""
    row_bytes = layout.num_in * workspace.dtype.itemsize
    pieces = -(-layout.rows * row_bytes // SCRATCH_BYTES)
    return -(-layout.rows // (pieces * ROW_TILE)) * ROW_TILE


class Fp8Linear:
    """e4m3 weights with a scale per output channel, activations rounded per token; bfloat16 in and out."""

    def __init__(self, weight: QuantizedTensor, workspace: LinearWorkspace) -> None:
        num_out, num_in = weight.shape
        if num_in % 16 or num_out % 16:
            raise ConfigError(
                f"quantization 'fp8' needs linear layers of multiples of 16; one is {num_in} to {num_out}"
            )
        if workspace.dtype != torch.bfloat16:
            raise ConfigError(f"quantization 'fp8' needs dtype bfloat16, not {workspace.dtype}")
        self._values = weight.values.contiguous()
        self._scales = weight.scales.float().reshape(1, -1).contiguous()
        self._workspace = workspace
        workspace.reserve("fp8_values", workspace.max_tokens * num_in, torch.float8_e4m3fn)
        workspace.reserve("fp8_scales", workspace.max_tokens, torch.float32)
        workspace.reserve("fp8_out", workspace.max_tokens * num_out, torch.bfloat16)

    @property
    def num_bytes(self) -> int:
        return self._values.numel() + 4 * self._scales.numel()

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> None:
        num_tokens = x.shape[0]
        num_out, num_in = self._values.shape
        check_product(x, out, num_in, num_out, self._workspace)
        if not num_tokens:
            return
        values, scales = self.quantize(x)
        # The library writes contiguous rows only.
        dense = out
        if not out.is_contiguous():
            dense = self._workspace.buffer("fp8_out")[: num_tokens * num_out].view(num_tokens, num_out)
        torch._scaled_mm(
            values,
            self._values.T,
            scale_a=scales,
            scale_b=self._scales,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
            out=dense,
        )
        if dense is not out:
            out.copy_(dense)

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [T, in] -> (values [T, in] e4m3, scales [T, 1] float32), in the workspace."""
        num_tokens, num_in = x.shape
        values = self._workspace.buffer("fp8_values")[: num_tokens * num_in].view(num_tokens, num_in)
        scales = self._workspace.buffer("fp8_scales")[:num_tokens].view(num_tokens, 1)
        block = triton.next_power_of_2(num_in)
        quantize_tokens_kernel[(num_tokens,)](
            x, values, scales, num_in, x.stride(0), BLOCK=block, num_warps=min(16, max(4, block // 1024))
        )
        return values, scales
