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

Where one round is enough, as it nearly always is, expand is no launch of its own: the kernel that reads y
next (`lora.cuda_fused`) adds B h to it on the way. It finds a row's tile in `lora_rows`, or the rows of its
programs in `lora_units`.
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

# Fields of a tile's record, one per group; those from RANK to PARTS come from the adapter's template.
# A_WORD: index in `words` of the start of the group's first A row in layer 0; RANK: rows of the group;
# STRIDE: words from one layer to the next. Then per module of the group B_WORD (index of gain, bias and B
# rows; ABSENT where the adapter leaves the module alone in all layers), its rank, its first row in the group.
FIRST, NUM_TOKENS, H_START, RANK, STRIDE, A_WORD, MODULE = range(7)
MODULE_FIELDS = 3
# Parts of the tile's h, which expand sums.
PARTS = 15
TILE_FIELDS = 16
ABSENT = -1

# Rows of `lora_rows`: how many rows the row's program handles in narrow launches, 0 for none; its tile, or
# ABSENT; its token in the tile. A narrow tile of more than FEW_ROWS is dense, so that the matrix unit pays:
# its rows have DENSE for their number, and programs of the first of them share its columns.
LEADS, TILE, TOKEN = range(3)
FEW_ROWS = 4
DENSE = -1

# Fields of a unit, the rows that a program takes at once: its first row, how many, its narrow tile or ABSENT,
# the part of the columns. A tile of several rows is HALF_UNITS units, of more than HALF_ROWS TILE_UNITS.
# Row 0 of `lora_units` says first how many units follow: no more than there are rows.
UNIT_FIRST, UNIT_ROWS, UNIT_TILE, UNIT_PART = range(4)
UNIT_FIELDS = 4
HALF_ROWS, HALF_UNITS, TILE_UNITS = 8, 2, 4
# Most rows of a unit without adapter.
BASE_ROWS = 8

NARROW, WIDE = 0, 1
BLOCK_TOKENS = (16, 64)
BLOCK_RANK = 16
MAX_WIDE_RANK = 64
# From this length on a segment is cut into wide tiles, where the step's launches include them.
WIDE_TOKENS = 64
MAX_WIDE_PARTS = 8
MAX_PARTS = 16
# Parts of down's h that silu_mul leaves of wide tiles, one of each of its programs.
DOWN_PARTS = 16
# Shrink programs that fill a large GPU about twice.
ENOUGH_PROGRAMS = 264
# Items of a tile and group; a tile of more rows gives each item more.
TILE_ITEMS = 8
# Rows without adapter for which a launch of the plain kernel pays, which has room for more of them at once.
MIN_BASE_ROWS = 512
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
        return max(1024, 1 << (-(-self.num_in // MAX_PARTS) - 1).bit_length(), self.min_part_columns)

    @property
    def narrow_parts(self) -> int:
        """Parts of h that a narrow shrink leaves for expand to sum; fixed, so that results do not depend
        on what else is in the batch."""
        return -(-self.num_in // self.part_columns)


def group_shapes(shapes: Mapping[str, tuple[int, int]], min_part_columns: int = 0) -> tuple[GroupShape, ...]:
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
    """What to launch.

    rounds: of each, whether it has narrow and wide tiles. wide_parts: parts of h in wide tiles.
    wide_ranks: per group, rows of A that a shrink program of wide tiles takes. is_long: whether a module of
    wide tiles has more than BLOCK_RANK rows.
    num_wide: wide tiles in all. num_base: first rows that the plain kernels take, since they are many and
    have no adapter. has_rows: whether rows are left that are in neither.
    num_units: in `lora_units`; None: any, as in a graph.
    num_h: elements of h in each round; how much there is to exchange, no matter to the launches.
    """

    rounds: tuple[tuple[bool, bool], ...] = ((True, False),)
    wide_parts: int = 1
    wide_ranks: tuple[int, ...] = (BLOCK_RANK,) * len(GROUPS)
    is_long: bool = False
    num_wide: int = 0
    num_base: int = 0
    has_rows: bool = True
    num_units: int | None = field(default=None, compare=False)
    num_h: tuple[int, ...] = field(default=(0,), compare=False)

    @property
    def is_fusable(self) -> bool:
        """Whether kernels that read y may add B h to it: all of h is there at once."""
        return len(self.rounds) == 1

    def holds(self, step: LoraPlan) -> bool:
        """Whether a graph that launches this runs a step that `fill` made for it."""
        return len(step.rounds) == 1 and step.num_wide <= self.num_wide


# What the graph of a decode step launches, whatever the step: narrow tiles in one round.
GRAPH_PLAN = LoraPlan()


def mixed_graph_plan(num_rows: int, num_parts: int = 0) -> LoraPlan:
    """What the graph of a mixed step launches: room for every wide tile of so many rows, of any rank.

    num_parts: of h in wide tiles; 0 for as many as fill the GPU.
    """
    # A segment has WIDE_TOKENS or more, and at most one tile that is not full.
    num_wide = num_rows // WIDE_TOKENS + num_rows // BLOCK_TOKENS[WIDE]
    if not num_wide:
        return GRAPH_PLAN
    parts = num_parts or min(max(ENOUGH_PROGRAMS * BLOCK_TOKENS[WIDE] // num_rows, 1), MAX_WIDE_PARTS)
    return LoraPlan(((True, True),), parts, (MAX_WIDE_RANK,) * len(GROUPS), is_long=True, num_wide=num_wide)


def common_mixed_plans() -> list[LoraPlan]:
    """Plans that together launch every kernel of mixed steps whose adapters cover all modules."""
    plans = []
    for rank in (8, 16, 32, 64):
        ranks = tuple(
            1 << (min(max(rank * len(group), BLOCK_RANK), MAX_WIDE_RANK) - 1).bit_length() for group in GROUPS
        )
        plans.append(LoraPlan(((True, True),), wide_ranks=ranks, is_long=rank > BLOCK_RANK, num_wide=1))
    return plans


def arrays(limits: LoraLimits) -> dict[str, tuple[tuple[int, ...], type[np.int32]]]:
    """Name -> (shape, dtype) of the arrays that `fill` writes and the kernels read."""
    num_groups = len(GROUPS)
    return {
        "lora_tiles": ((limits.max_tiles, num_groups, TILE_FIELDS), np.int32),
        "lora_items": ((num_groups, limits.max_tiles * TILE_ITEMS), np.int32),
        "lora_bounds": ((MAX_ROUNDS, 2, num_groups, BOUND_FIELDS), np.int32),
        "lora_rows": ((3, limits.max_tokens), np.int32),
        "lora_units": ((limits.max_tokens + 1, UNIT_FIELDS), np.int32),
    }


def fill(
    views: Mapping[str, Array],
    segments: Array,
    templates: Int32Array,
    shapes: Sequence[GroupShape],
    max_h: int,
    *,
    num_rows: int,
    wide: bool,
    graph: LoraPlan | None = None,
    is_fused: bool = False,
) -> LoraPlan:
    """Write a step's tiles, items and their bounds, and each row's place.

    views: arrays as `arrays` names them. segments: [G, 3], rows (first token, last token + 1, index into
        templates), disjoint. templates: [N, groups, TILE_FIELDS], from `CudaAdapters.place`.
    num_rows: of the step, with those that only fill up a graph.
    wide: whether wide tiles may be launched. Without them a step fits GRAPH_PLAN where h fits in one round.
    graph: of a mixed step, what a graph launches that is to run it, if it `holds` the result, as it nearly
        always does; None where kernels will be launched as the result says.
    is_fused: whether h of down may be left to `FusedLora.silu_mul`, which will be launched for gate and up.
    Raises EngineError where a capacity is exceeded.
    """
    rows = views["lora_rows"]
    rows[LEADS, :num_rows] = 1
    rows[TILE, :num_rows] = ABSENT
    segments = np.asarray(segments, np.int64).reshape(-1, 3)
    template = templates[segments[:, 2]]
    keep = (template[:, :, _B_WORDS] != ABSENT).any(axis=(1, 2)) & (segments[:, 1] > segments[:, 0])
    if not keep.all():
        segments, template = segments[keep], template[keep]
    if not len(segments):
        views["lora_bounds"][:1] = 0
        none = np.zeros(0, np.int64)
        _fill_units(views["lora_units"], rows[TILE], none, none, 0, num_rows)
        return GRAPH_PLAN
    starts, stops = segments[:, 0], segments[:, 1]
    wide = wide and (graph is None or graph.num_wide > 0)
    is_wide = (stops - starts >= WIDE_TOKENS) & wide
    has_wide = bool(is_wide.any())
    if has_wide:
        order = np.argsort(is_wide, kind="stable")
        starts, stops, template, is_wide = starts[order], stops[order], template[order], is_wide[order]
    lengths = stops - starts

    ranks = template[:, :, RANK].astype(np.int64)
    narrow_parts = np.array([shape.narrow_parts for shape in shapes])
    wide_parts, wide_ranks = 1, GRAPH_PLAN.wide_ranks
    if has_wide and graph is not None:
        wide_parts, wide_ranks = graph.wide_parts, graph.wide_ranks
    elif has_wide:
        largest = ranks[is_wide].max(axis=0)
        wide_ranks = tuple(
            1 << (min(max(rank, BLOCK_RANK), MAX_WIDE_RANK) - 1).bit_length() for rank in largest.tolist()
        )
        wide_parts = _wide_parts(lengths[is_wide], ranks[is_wide], max_h)
    if has_wide:
        parts = np.where(is_wide[:, None], wide_parts, narrow_parts)
    else:
        parts = narrow_parts
    h_per_token = (ranks * parts).max(axis=1)
    limit = max_h // np.maximum(h_per_token, 1)
    if not limit.all():
        raise EngineError(
            f"one token's intermediate values of an adapter are {h_per_token.max():,} elements, the scratch "
            f"buffer has {max_h:,}: raise LoraLimits.max_h"
        )
    tile_tokens = np.minimum(limit, np.where(is_wide, BLOCK_TOKENS[WIDE], BLOCK_TOKENS[NARROW]))

    counts = -(-lengths // tile_tokens)
    num_tiles, max_tiles = int(counts.sum()), len(views["lora_tiles"])
    if num_tiles > max_tiles:
        raise EngineError(
            f"a step has {num_tiles} adapter tiles, the arrays were made for {max_tiles}: raise "
            "LoraLimits.max_segments or max_h"
        )
    first, num_tokens = starts, lengths
    if num_tiles > len(counts):
        owner = np.repeat(np.arange(len(counts)), counts)
        first = starts[owner] + _within(counts) * tile_tokens[owner]
        num_tokens = np.minimum(tile_tokens[owner], stops[owner] - first)
        template, ranks, is_wide, h_per_token = (
            template[owner],
            ranks[owner],
            is_wide[owner],
            h_per_token[owner],
        )
        parts = parts[owner] if has_wide else parts
    h_sizes = num_tokens * h_per_token
    edges, h_start = _rounds(h_sizes, max_h)
    tiles = views["lora_tiles"][:num_tiles]
    tiles[:] = template
    tiles[:, :, FIRST], tiles[:, :, NUM_TOKENS] = first[:, None], num_tokens[:, None]
    tiles[:, :, H_START], tiles[:, :, PARTS] = h_start[:, None], parts

    num_narrow = num_tiles - int(is_wide.sum())
    block_rank = np.where(is_wide[:, None], wide_ranks, BLOCK_RANK) if has_wide else BLOCK_RANK
    _fill_items(views, ranks, block_rank, edges, num_narrow)
    if is_fused and has_wide and len(edges) == 2:
        _leave_down_to_silu_mul(views, num_narrow, num_tiles, wide_ranks[-1], int(h_sizes.sum()), max_h)
    num_base = int(first.min())
    if graph is not None or not wide or num_base < MIN_BASE_ROWS:
        num_base = 0
    _fill_rows(rows, first, num_tokens, num_narrow)
    num_units = _fill_units(
        views["lora_units"], rows[TILE], first[:num_narrow], num_tokens[:num_narrow], num_base, num_rows
    )
    pairs = list(itertools.pairwise(edges))
    return LoraPlan(
        tuple((low < num_narrow, high > num_narrow) for low, high in pairs),
        wide_parts,
        wide_ranks,
        has_wide and bool((template[is_wide][:, :, _RANKS] > BLOCK_RANK).any()),
        num_tiles - num_narrow,
        num_base,
        has_rows=num_units > 0,
        num_units=num_units,
        num_h=tuple(int(h_sizes[low:high].sum()) for low, high in pairs),
    )


_B_WORDS = slice(MODULE, MODULE + MODULE_FIELDS * MAX_GROUP_MODULES, MODULE_FIELDS)
_RANKS = slice(MODULE + 1, MODULE + MODULE_FIELDS * MAX_GROUP_MODULES, MODULE_FIELDS)


def _wide_parts(lengths: Int64Array, ranks: Int64Array, max_h: int) -> int:
    """Parts into which wide tiles cut the input, so that few tiles still fill the GPU; no more than fit."""
    tiles = -(-lengths // BLOCK_TOKENS[WIDE])
    programs = int((tiles[:, None] * -(-ranks // MAX_WIDE_RANK)).max(axis=1, initial=0).sum())
    fitting = max_h // max(int(ranks.max(initial=0)) * BLOCK_TOKENS[WIDE], 1)
    return int(np.clip(min(ENOUGH_PROGRAMS // max(programs, 1), fitting), 1, MAX_WIDE_PARTS))


def _fill_items(
    views: Mapping[str, Array], ranks: Int64Array, block_rank: Array | int, edges: list[int], num_narrow: int
) -> None:
    """Items of every tile and group, and their bounds within the group's for each round and variant.

    An item is a block of rows, several where a tile would have more than TILE_ITEMS. The first narrow one of
    the first round is the group's first.
    """
    num_tiles, num_groups = ranks.shape
    blocks = -(-ranks // block_rank)
    per_tile = -(-blocks // np.maximum(-(-blocks // TILE_ITEMS), 1))
    flat = per_tile.T.reshape(-1)
    items = np.repeat(np.tile(np.arange(num_tiles) * TILE_ITEMS, num_groups), flat) + _within(flat)
    before = np.zeros(len(flat) + 1, np.int64)
    np.cumsum(flat, out=before[1:])
    of_group = np.arange(num_groups) * num_tiles
    edges_of_items = before[:: max(num_tiles, 1)]
    for group, (low, high) in enumerate(itertools.pairwise(edges_of_items.tolist())):
        views["lora_items"][group, : high - low] = items[low:high]
    bounds = views["lora_bounds"]
    for round_, (low, high) in enumerate(itertools.pairwise(edges)):
        middle = min(max(low, num_narrow), high)
        for variant, (first, last) in enumerate(((low, middle), (middle, high))):
            held = bounds[round_, variant]
            held[:, 0] = before[of_group + first] - before[of_group]
            held[:, 1] = before[of_group + last] - before[of_group]
            held[:, 2:] = first, last


def _leave_down_to_silu_mul(
    views: Mapping[str, Array], num_narrow: int, num_tiles: int, block_rank: int, start: int, max_h: int
) -> None:
    """Wide tiles of down lose their items and get h as silu_mul's parts, from `start` on, if all fit."""
    tiles = views["lora_tiles"][num_narrow:num_tiles, -1]
    ranks = tiles[:, RANK].astype(np.int64)
    sizes = tiles[:, NUM_TOKENS] * ranks * DOWN_PARTS
    if ranks.max() > block_rank or start + sizes.sum() > max_h:
        return
    tiles[:, H_START], tiles[:, PARTS] = start + np.cumsum(sizes) - sizes, DOWN_PARTS
    held = views["lora_bounds"][0, WIDE, -1]
    held[1] = held[0]


def _fill_rows(rows: Array, first: Int64Array, num_tokens: Int64Array, num_narrow: int) -> None:
    """Each row's tile, and which rows lead programs of narrow launches."""
    tile = np.repeat(np.arange(len(first)), num_tokens)
    token = _within(num_tokens)
    at = first[tile] + token
    rows[TILE, at], rows[TOKEN, at] = tile, token
    leads = np.where(num_tokens > FEW_ROWS, DENSE, num_tokens)
    leads[num_narrow:] = 0
    rows[LEADS, at] = np.where((token == 0) | (leads == DENSE)[tile], leads[tile], 0)


def _fill_units(
    units: Array, tile_of_row: Array, first: Int64Array, num_tokens: Int64Array, num_base: int, num_rows: int
) -> int:
    """Units of the narrow tiles, then of the rows without adapter from num_base on; returns their number."""
    parts = np.where(num_tokens > HALF_ROWS, TILE_UNITS, np.where(num_tokens > 1, HALF_UNITS, 1))
    base = np.flatnonzero(tile_of_row[num_base:num_rows] == ABSENT) + num_base
    # Neighbours share a unit: a run's rows have one difference of row and place in the list.
    shift = base - np.arange(len(base))
    starts = np.searchsorted(shift, shift)
    leads = np.flatnonzero((np.arange(len(base)) - starts) % BASE_ROWS == 0)
    num_of_tiles = int(parts.sum())
    num_units = num_of_tiles + len(leads)
    units[0, 0] = num_units
    of_tiles, of_base = units[1 : 1 + num_of_tiles], units[1 + num_of_tiles : 1 + num_units]
    of_tiles[:, UNIT_FIRST], of_tiles[:, UNIT_ROWS] = np.repeat(first, parts), np.repeat(num_tokens, parts)
    of_tiles[:, UNIT_TILE] = np.repeat(np.arange(len(first)), parts)
    of_tiles[:, UNIT_PART] = _within(parts)
    of_base[:, UNIT_FIRST], of_base[:, UNIT_TILE], of_base[:, UNIT_PART] = base[leads], ABSENT, 0
    of_base[:, UNIT_ROWS] = np.diff(leads, append=len(base))
    return num_units


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


__all__ = [
    "GRAPH_PLAN",
    "GroupShape",
    "LoraLimits",
    "LoraPlan",
    "arrays",
    "common_mixed_plans",
    "fill",
    "group_shapes",
    "mixed_graph_plan",
]
