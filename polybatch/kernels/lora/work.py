"""Planning of `lora` on a GPU: a step's adapter segments as tiles and items in int32 arrays.

Linear layers that share an input form a group (q/k/v, o, gate/up, down): one shrink and one expand each.
A *tile* is up to `BLOCK_TOKENS` tokens of one segment. A shrink program computes, for an *item*, one tile's
values of some rows of the group (h = A x) over one part of the input's columns; an expand program adds one
block of output columns to one tile (y += B h), summing the parts of h in a fixed order.

Tiles come in two variants: narrow ones for decoding and short chunks, where reading adapter rows is what
costs, and wide ones for long chunks, where tokens are. Lists hold for all layers: where an adapter's rows
lie in a layer is read from `words` (see `polybatch.execution.cuda_adapters`), at a fixed stride per layer.
h lies packed in a scratch buffer of fixed size; tiles that do not fit together form rounds, executed one
after the other (shrink, then expand), so that any rank works.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from polybatch.errors import EngineError

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Array = np.ndarray[Any, Any]

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
MAX_GROUP_MODULES = 3

# Fields of a tile's record, one per group; those from RANK on come from the adapter's template.
# A_WORD: index in `words` of the start of the group's first A row in layer 0; RANK: rows of the group;
# STRIDE: words from one layer to the next. Then per module of the group B_WORD (index of gain, bias and B
# rows; ABSENT where the adapter leaves the module alone in all layers), its rank, its first row in the group.
FIRST, NUM_TOKENS, H_START, RANK, STRIDE, A_WORD, MODULE = range(7)
MODULE_FIELDS = 3
TILE_FIELDS = 16
ABSENT = -1

NARROW, WIDE = 0, 1
BLOCK_TOKENS = (16, 64)
BLOCK_RANK = (16, 64)
# From this length on a segment is cut into wide tiles, where the step's launches include them.
WIDE_TOKENS = 64
MAX_WIDE_PARTS = 8
# Shrink programs that fill a large GPU about twice.
ENOUGH_PROGRAMS = 264
# Items of a tile and group; a tile of more rows gives each item more.
TILE_ITEMS = 8
MAX_ROUNDS = 64
BOUND_FIELDS = 4


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Linear layers that share an input. outs: rows of y per module, side by side in the fused output.

    min_part_columns: of a part of h; fewer parts are less to exchange where several GPUs sum h.
    """

    modules: tuple[str, ...]
    num_in: int
    outs: tuple[int, ...]
    min_part_columns: int = 0

    @property
    def part_columns(self) -> int:
        """Input columns that one narrow shrink program reads."""
        return max(512 if self.num_in <= 8192 else 1024, self.min_part_columns)

    @property
    def narrow_parts(self) -> int:
        """Parts of h that a narrow shrink leaves for expand to sum; fixed, so that results do not depend
        on what else is in the batch."""
        return -(-self.num_in // self.part_columns)


def group_shapes(
    shapes: Mapping[str, tuple[int, int]], min_part_columns: int = 0
) -> tuple[GroupShape, ...]:
    """Groups of a decoder layer. shapes: module -> (out, in), as `ModelSpec.linear_shapes`."""
    return tuple(
        GroupShape(
            modules, shapes[modules[0]][1], tuple(shapes[module][0] for module in modules), min_part_columns
        )
        for modules in GROUPS
    )


@dataclass(frozen=True, slots=True)
class LoraLimits:
    """Capacity of a step: tokens, adapter segments, and elements of the scratch buffer for h."""

    max_tokens: int
    max_segments: int
    max_h: int = 1 << 22

    @property
    def max_tiles(self) -> int:
        return self.max_segments + self.max_tokens // BLOCK_TOKENS[NARROW]


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """What to launch: per round, whether it has narrow and wide tiles; parts of h in wide tiles.

    num_h: elements of h in each round; how much there is to exchange, no matter to the launches.
    """

    rounds: tuple[tuple[bool, bool], ...] = ((True, False),)
    wide_parts: int = 1
    num_h: tuple[int, ...] = field(default=(0,), compare=False)


# What a CUDA graph launches, whatever the step: narrow tiles in one round.
GRAPH_PLAN = LoraPlan()


def arrays(limits: LoraLimits) -> dict[str, tuple[tuple[int, ...], type[np.int32]]]:
    """Name -> (shape, dtype) of the arrays that `fill` writes and the kernels read."""
    num_groups = len(GROUPS)
    return {
        "lora_tiles": ((num_groups, limits.max_tiles, TILE_FIELDS), np.int32),
        "lora_items": ((num_groups, limits.max_tiles * TILE_ITEMS), np.int32),
        "lora_bounds": ((MAX_ROUNDS, 2, num_groups, BOUND_FIELDS), np.int32),
    }


def fill(
    views: Mapping[str, Array],
    segments: Array,
    templates: Int32Array,
    shapes: Sequence[GroupShape],
    max_h: int,
    *,
    wide: bool,
) -> LoraPlan:
    """Write a step's tiles, items and their bounds.

    views: arrays as `arrays` names them. segments: [G, 3], rows (first token, last token + 1, index into
        templates), disjoint. templates: [N, groups, TILE_FIELDS], from `CudaAdapters.place`.
    wide: whether wide tiles may be launched. A step fits a graph if the result equals GRAPH_PLAN, as it does
        without wide tiles where h fits in one round.
    Raises EngineError where a capacity is exceeded.
    """
    segments = np.asarray(segments, np.int64).reshape(-1, 3)
    template = templates[segments[:, 2]].astype(np.int64)
    active = template[:, :, MODULE : MODULE + MODULE_FIELDS * MAX_GROUP_MODULES : MODULE_FIELDS] != ABSENT
    keep = active.any(axis=(1, 2)) & (segments[:, 1] > segments[:, 0])
    segments, template = segments[keep], template[keep]
    lengths = segments[:, 1] - segments[:, 0]
    variant = np.where(wide & (lengths >= WIDE_TOKENS), WIDE, NARROW)
    order = np.argsort(variant, kind="stable")
    segments, template, lengths, variant = segments[order], template[order], lengths[order], variant[order]

    ranks = template[:, :, RANK]
    wide_parts = _wide_parts(lengths[variant == WIDE], ranks[variant == WIDE], max_h)
    parts = np.array([[shape.narrow_parts for shape in shapes], [wide_parts] * len(shapes)])
    h_per_token = (ranks * parts[variant]).max(axis=1, initial=0)
    tile_tokens = np.minimum(np.array(BLOCK_TOKENS)[variant], max_h // np.maximum(h_per_token, 1))
    if not tile_tokens.all():
        raise EngineError(
            f"one token's intermediate values of an adapter are {h_per_token.max():,} elements, the scratch "
            f"buffer has {max_h:,}: raise LoraLimits.max_h"
        )

    counts = -(-lengths // np.maximum(tile_tokens, 1))
    owner = np.repeat(np.arange(len(segments)), counts)
    num_tiles, max_tiles = len(owner), views["lora_tiles"].shape[1]
    if num_tiles > max_tiles:
        raise EngineError(
            f"a step has {num_tiles} adapter tiles, the arrays were made for {max_tiles}: raise "
            "LoraLimits.max_segments or max_h"
        )
    first = segments[owner, 0] + _within(counts) * tile_tokens[owner]
    num_tokens = np.minimum(tile_tokens[owner], segments[owner, 1] - first)
    h_sizes = num_tokens * h_per_token[owner]
    edges, h_start = _rounds(h_sizes, max_h)
    tiles = views["lora_tiles"][:, :num_tiles]
    tiles[:] = template[owner].transpose(1, 0, 2)
    tiles[:, :, FIRST], tiles[:, :, NUM_TOKENS], tiles[:, :, H_START] = first, num_tokens, h_start

    num_narrow = int((variant[owner] == NARROW).sum())
    bounds = views["lora_bounds"]
    bounds[: len(edges) - 1] = 0
    lows = np.array(edges[:-1]), np.maximum(edges[:-1], num_narrow)
    highs = np.minimum(edges[1:], num_narrow), np.array(edges[1:])
    block_rank = np.array(BLOCK_RANK)[variant[owner]]
    for group in range(len(shapes)):
        per_tile = _items_per_tile(tiles[group, :, RANK], block_rank)
        items = np.repeat(np.arange(num_tiles) * TILE_ITEMS, per_tile) + _within(per_tile)
        views["lora_items"][group, : len(items)] = items
        before = np.concatenate([[0], np.cumsum(per_tile)])
        for which in (NARROW, WIDE):
            low, high = lows[which], np.maximum(highs[which], lows[which])
            bounds[: len(low), which, group] = np.stack([before[low], before[high], low, high], axis=1)
    rounds = tuple(
        (bool(low < num_narrow), bool(high > num_narrow)) for low, high in itertools.pairwise(edges)
    )
    num_h = tuple(int(h_sizes[low:high].sum()) for low, high in itertools.pairwise(edges))
    return LoraPlan(rounds, wide_parts, num_h) if num_tiles else GRAPH_PLAN


def _wide_parts(lengths: Int64Array, ranks: Int64Array, max_h: int) -> int:
    """Parts into which wide tiles cut the input, so that few tiles still fill the GPU; no more than fit."""
    if not len(lengths):
        return 1
    tiles = -(-lengths // BLOCK_TOKENS[WIDE])
    programs = int((tiles[:, None] * -(-ranks // BLOCK_RANK[WIDE])).max(axis=1, initial=0).sum())
    fitting = max_h // max(int(ranks.max(initial=0)) * BLOCK_TOKENS[WIDE], 1)
    return int(np.clip(min(ENOUGH_PROGRAMS // max(programs, 1), fitting), 1, MAX_WIDE_PARTS))


def _items_per_tile(ranks: Array, block_rank: Array) -> Array:
    """Items of each tile: blocks of rows, several to an item where they would be more than TILE_ITEMS."""
    blocks = -(-ranks // block_rank)
    per_item = np.maximum(-(-blocks // TILE_ITEMS), 1)
    return np.asarray(-(-blocks // per_item))


def _within(counts: Array) -> Array:
    """0 … count - 1 for each count, one after the other."""
    ends = np.cumsum(counts)
    numbers: Array = np.arange(int(ends[-1]) if len(ends) else 0)
    return np.asarray(numbers - np.repeat(ends - counts, counts))


def _rounds(sizes: Array, capacity: int) -> tuple[list[int], Array]:
    """Edges of runs of tiles whose h fits together, and where each tile's h starts. Always one run."""
    ends = np.cumsum(sizes)
    starts = ends - sizes
    edges = [0]
    while edges[-1] < len(sizes) or len(edges) == 1:
        low = edges[-1]
        base = int(starts[low]) if len(sizes) else 0
        edges.append(int(np.searchsorted(ends, base + capacity, side="right")))
        starts[low : edges[-1]] -= base
    if len(edges) - 1 > MAX_ROUNDS:
        raise EngineError(
            f"a step's adapters need {len(edges) - 1} rounds, at most {MAX_ROUNDS} are possible: raise "
            "LoraLimits.max_h"
        )
    return edges, starts


__all__ = ["GRAPH_PLAN", "GroupShape", "LoraLimits", "LoraPlan", "arrays", "fill", "group_shapes"]
