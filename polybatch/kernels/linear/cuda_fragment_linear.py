"""A packed linear over 4-bit weights in fragment order; see `cuda_fragments` for the kernel.

Behind `polybatch.kernels.linear.cuda.pack`, whose workspace and rules hold here too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from polybatch.kernels.linear.cuda_fragment_config import FragmentConfig, fragment_config
from polybatch.kernels.linear.cuda_fragments import fragment_linear_kernel, widen_fragments_kernel
from polybatch.kernels.linear.cuda_pack import ROW_TILE, FragmentLayout
from polybatch.kernels.linear.cuda_workspace import LinearWorkspace, check_product

SCRATCH_BYTES = 128 << 20
"""Of widened weights at a time: few pieces, because a product of part of the rows fills the device badly."""
FUSED_TOKENS = 512
"""Above this many tokens, int4 weights are widened and multiplied by cuBLAS."""
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_LADDER = (16, 32, 64, *range(128, FUSED_TOKENS + 1, 128))
_WIDENED_ROWS = 64


class FragmentLinear:
    """4-bit weights: the fused kernel up to FUSED_TOKENS tokens, above it widened weights and cuBLAS.

    following: the product that runs after this one, for whose weights it may send early; None for no other.
    """

    def __init__(self, layout: FragmentLayout, workspace: LinearWorkspace) -> None:
        self.layout = layout
        self.following: FragmentLinear | None = None
        self._workspace = workspace
        row_bytes = layout.num_in * workspace.dtype.itemsize
        pieces = -(-layout.rows * row_bytes // SCRATCH_BYTES)
        self._chunk_rows = -(-layout.rows // (pieces * ROW_TILE)) * ROW_TILE
        self.reserve([(m, fragment_config(m, layout.rows, layout.k_tiles)) for m in _LADDER])
        if workspace.max_tokens > FUSED_TOKENS:
            workspace.reserve("widened", self._chunk_rows * layout.num_in, workspace.dtype)

    @property
    def num_bytes(self) -> int:
        return self.layout.num_bytes

    def reserve(self, configs: list[tuple[int, FragmentConfig]]) -> None:
        """Room for the partial sums of these (tokens, configuration) pairs."""
        tiles = [-(-m // c.block_m) * (self.layout.rows // c.block_out) for m, c in configs]
        cells = [t * c.split * c.block_out * c.block_m for t, (_, c) in zip(tiles, configs, strict=True)]
        split = [cell for cell, (_, c) in zip(cells, configs, strict=True) if c.split > 1]
        self._workspace.reserve("partials", max([1, *split]), torch.float32)
        self._workspace.reserve("arrived", max(tiles), torch.int32)

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> None:
        num_tokens = x.shape[0]
        check_product(x, out, self.layout.num_in, self.layout.num_out, self._workspace)
        if num_tokens > FUSED_TOKENS:
            self.forward_widened(x, out)
        elif num_tokens:
            self.forward_fused(x, out, fragment_config(num_tokens, self.layout.rows, self.layout.k_tiles))

    def forward_fused(
        self, x: torch.Tensor, out: torch.Tensor, config: FragmentConfig, next_split: int | None = None
    ) -> None:
        """One launch. The workspace must have been reserved for the configuration.

        next_split: of the product that follows, if it does not run in its usual configuration.
        """
        grid, arguments, options = self._launch(x, out, config, next_split)
        fragment_linear_kernel[grid](*arguments, **options)

    def compile_fused(self, x: torch.Tensor, out: torch.Tensor, config: FragmentConfig) -> None:
        """Compile what forward_fused would launch; inside triton.AsyncCompileMode many at a time."""
        grid, arguments, options = self._launch(x, out, config)
        fragment_linear_kernel.warmup(*arguments, grid=grid, **options)

    def _launch(
        self, x: torch.Tensor, out: torch.Tensor, config: FragmentConfig, next_split: int | None = None
    ) -> tuple[tuple[int, int, int], tuple[Any, ...], dict[str, Any]]:
        layout, num_tokens = self.layout, x.shape[0]
        out_tiles = layout.rows // config.block_out
        grid = (-(-num_tokens // config.block_m), out_tiles, config.split)
        sent = layout
        parts = num_bytes = 0
        if self.following is not None and config.follow_mib and not _INTERPRETED:
            sent = self.following.layout
            parts = next_split or fragment_config(num_tokens, sent.rows, sent.k_tiles).split
            num_bytes = _sent_bytes(config.follow_mib << 20, out_tiles * config.split, sent, parts)
        arguments = (
            x, layout.words, layout.scales, layout.scales if layout.zeros is None else layout.zeros, out,
            self._workspace.buffer("partials"), self._workspace.buffer("arrived"), sent.words, sent.scales,
            num_tokens, layout.num_in, layout.num_out, layout.rows, layout.k_tiles, config.split,
            sent.rows, sent.k_tiles, max(1, parts), num_bytes, x.stride(0), out.stride(0),
        )  # fmt: skip
        is_dependent = config.is_dependent and not _INTERPRETED
        options: dict[str, Any] = {
            "BLOCK_M": config.block_m,
            "BLOCK_OUT": config.block_out,
            "AHEAD": config.ahead,
            "REDUCED": config.parts_at_a_time,
            "THREADS": 32 * config.num_warps,
            "EVEN_K": layout.num_in % 128 == 0,
            "GROUPED": layout.is_grouped,
            "HAS_ZEROS": layout.zeros is not None,
            "SCALES_BF16": layout.scales_bf16,
            "SCALED": config.is_scaled and layout.is_grouped,
            "ASSEMBLY": not _INTERPRETED,
            "DEPENDENT": is_dependent,
            "FOLLOWED": num_bytes > 0 and sent.is_grouped,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        if is_dependent:
            options["launch_pdl"] = True
        return grid, arguments, options

    def forward_widened(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Rows of weights by the chunk: widen them into scratch, multiply."""
        layout = self.layout
        scratch = self._workspace.buffer("widened")
        for first in range(0, layout.num_out, self._chunk_rows):
            num_rows = min(self._chunk_rows, layout.num_out - first)
            weight = scratch[: num_rows * layout.num_in].view(num_rows, layout.num_in)
            widen_fragments_kernel[(layout.k_tiles, -(-num_rows // _WIDENED_ROWS))](
                layout.words,
                layout.scales,
                layout.scales if layout.zeros is None else layout.zeros,
                weight,
                first,
                num_rows,
                layout.num_in,
                layout.rows,
                BLOCK_OUT=_WIDENED_ROWS,
                GROUPED=layout.is_grouped,
                HAS_ZEROS=layout.zeros is not None,
                SCALES_BF16=layout.scales_bf16,
                num_warps=4,
            )
            torch.mm(x, weight.T, out=out[:, first : first + num_rows])


def link_products(products: Sequence[object]) -> None:
    """Tell products that run soon after each other of the next; those of other kinds are left out."""
    for one, following in pairwise(products):
        if isinstance(one, FragmentLinear) and isinstance(following, FragmentLinear):
            one.following = following


def _sent_bytes(wanted: int, programs: int, layout: FragmentLayout, parts: int) -> int:
    """Of another product's words, what each of these programs sends for: from the start of each of its parts.

    A multiple of 512, as 16 bytes of scales belong to 512 of words.
    """
    per_part = -(-programs // parts)
    part_bytes = layout.k_tiles // parts * layout.rows * 64
    return min(wanted // programs, part_bytes // per_part) // 512 * 512
