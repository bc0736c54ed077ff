"""What the CUDA kernel of ragged attention works on, planned on the host. NumPy only.

The unit is an *item*: some tokens' queries against one range of keys that a row of the page table leads
to. A tile of a prefill chunk, a part of a decoding token's long context, the k + 1 tokens of a
verification and a prefix that many sequences share (their tokens together, so that its pages are read
once) are all items. A token whose keys are spread over several items has that many *parts*; the kernel
merges them in the order of their numbers, so the result does not depend on which program ends first.

Items are cut so that the programs that a device holds at once have near-equal work; the longest come
first. Sources: Flash-Decoding (Dao et al. 2023), BatchLLM (Zheng et al. 2024) for shared prefixes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polybatch.errors import EngineError

Int32Array = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.integer]

# An item's record (int32): its first token, for a group's the index of it in `attention_tokens`; number of
# tokens, row of the page table, first key, key after the last, number of its part, IS_PART | IS_GROUP,
# position of the first token, at least the key after the last for a group's.
ITEM_FIELDS = 8
IS_PART, IS_GROUP = 1, 2
# What a narrow item's key costs the device, in keys of a wide item on one multiprocessor; what it costs to
# begin with narrow items when wide ones have ended. Read from benchmarks/cuda/attention_prefix.py's times.
NARROW_COST, LATE_COST = 0.0116, 600
# Levels of a tree of shared pages that the search for groups goes down; it bounds the search's time.
MAX_BRANCHINGS = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """One configuration of the kernel.

    rows: query rows of an item, a row being (token, query head of one key-value head's group).
    keys: keys that one turn of the loop takes. num_warps, num_stages: Triton's.
    programs_per_sm: programs that an SM holds at once. max_registers: per thread, None for the compiler's
        choice. prefetch: bring an item's first keys and values to the L2 cache while the kernel before ends.
    Narrow programs of one warp that take two pages a turn compute their addresses with fewer instructions.
    """

    rows: int
    keys: int
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 2
    max_registers: int | None = None
    prefetch: bool = False


@dataclass(frozen=True, slots=True)
class SharedTiles:
    """Configurations of decode steps in which rows share a prefix, with as many rows as those of `Tiles`.

    wide: its programs have keys in flight while they compute and leave room for narrow ones beside them.
    pipelined: of `hopper.py`, in wide's place where there is no window. A program fills a multiprocessor, so
        wide items are cut for half of them, and narrow ones have the rest; where the prefix is so long that
        this takes longer than one kind after the other, for all.
    """

    narrow: Tile
    wide: Tile
    pipelined: Tile | None = None


@dataclass(frozen=True, slots=True)
class Tiles:
    """Configurations of the two kinds of item.

    shared: of decode steps with both kinds, whose parts a launch of its own then merges; None for the same.
    waves: items to cut for each program that the device holds at once. min_part_keys: no cut goes below,
        for writing and reading a part costs about as much as 8 keys do, starting a program more.
    """

    # The fastest, or near it, of each case that `benchmarks/cuda/attention.py` times on an H100.
    narrow: Tile = Tile(16, 64, num_stages=2, programs_per_sm=4, max_registers=128, prefetch=True)
    wide: Tile = Tile(128, 64, num_warps=8, num_stages=2, programs_per_sm=1, max_registers=128)
    shared: SharedTiles | None = None
    waves: float = 1.0
    min_part_keys: int = 64


@dataclass(frozen=True, slots=True)
class Heads:
    """num_heads query heads share num_kv_heads key-value heads, `group` to each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step's arrays have room for.

    max_seqs: chunks. max_group_tokens: tokens that share a prefix.
    max_partials: (token, part) pairs, each num_heads * (head_dim + 1) float32 of scratch memory.
    """

    max_tokens: int
    max_seqs: int
    max_narrow: int
    max_wide: int
    max_group_tokens: int
    max_partials: int

    @property
    def is_decode(self) -> bool:
        """Whether chunks of one token are what there is room for."""
        return self.max_tokens <= self.max_seqs


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Chunks that read the same leading pages: those of `members`, ascending, of a step.

    page_row: row of the page table that leads to the pages. num_tokens: a multiple of the page size; at
    most what every member had before the step.
    """

    page_row: int
    num_tokens: int
    members: IntArray


@dataclass(frozen=True, slots=True)
class Work:
    """What a plan came to: items of each kind and (token, part) pairs."""

    num_narrow: int
    num_wide: int
    num_partials: int

    @property
    def has_wide(self) -> bool:
        return self.num_wide > 0


def make_limits(
    heads: Heads,
    tiles: Tiles,
    *,
    max_tokens: int,
    max_seqs: int,
    num_sms: int,
    max_group_tokens: int | None = None,
) -> Limits:
    """Room for any plan of at most max_tokens tokens in max_seqs chunks.

    max_group_tokens: tokens, all groups together, that share a prefix; every one by default, as a decode
        step wants it. The cut adds at most an item for each program that the device holds at once.
    """
    wide, narrow = _tokens_per_item(heads, tiles.wide), _tokens_per_item(heads, tiles.narrow)
    grouped = max_tokens if max_group_tokens is None else max_group_tokens
    groups = min(max_seqs, grouped) // 2
    cuts = [int(tiles.waves * _num_slots(heads, t, num_sms)) + 1 for t in (tiles.narrow, tiles.wide)]
    # Each chunk, and each group of two members or more, may leave one tile partly filled. Wide tiles are of
    # runs that are longer than a narrow tile.
    wide_chunks = min(max_seqs, max_tokens // (narrow + 1))
    num_wide = wide_chunks + (max_tokens - wide_chunks) // wide
    num_wide += min(groups, grouped // (narrow + 1)) + grouped // wide
    return Limits(
        max_tokens=max_tokens,
        max_seqs=max_seqs,
        max_narrow=max_seqs + groups + cuts[0],
        max_wide=num_wide + cuts[1],
        max_group_tokens=grouped,
        max_partials=2 * (grouped + cuts[0] * narrow + cuts[1] * wide),
    )


def arrays(limits: Limits) -> dict[str, tuple[tuple[int, ...], type[np.int32]]]:
    """Shape and dtype of each array that `fill` writes and the kernel reads.

    attention_num_items: narrow ones, then wide ones.
    """
    return {
        "attention_num_items": ((2,), np.int32),
        "attention_narrow_items": ((limits.max_narrow, ITEM_FIELDS), np.int32),
        "attention_wide_items": ((limits.max_wide, ITEM_FIELDS), np.int32),
        "attention_tokens": ((limits.max_group_tokens,), np.int32),
        "attention_parts": ((limits.max_tokens, 2), np.int32),
    }


def fill(
    views: Mapping[str, Int32Array],
    heads: Heads,
    tiles: Tiles,
    *,
    first_tokens: IntArray,
    num_new: IntArray,
    kv_lens: IntArray,
    num_sms: int,
    max_partials: int,
    page_rows: IntArray | None = None,
    groups: Sequence[PrefixGroup] = (),
    window: int | None = None,
    context_range: IntArray | None = None,
) -> Work:
    """Plan a step's items into the arrays that `arrays` names.

    first_tokens, num_new, kv_lens: [S], of each chunk its first token's row, its tokens, and its
        sequence's tokens with keys, the chunk included. page_rows: [S], rows of the page table, 0 to
        S - 1 by default. groups: disjoint. A chunk that fills an item by itself gains nothing from
        sharing and is left out of its group; so are the longest of those beyond max_group_tokens.
    window, context_range ([S, 2]): as in the package's contract. A range excludes groups.
    Raises EngineError where the plan does not fit; the arrays are then not to be used.
    """
    firsts, counts, kv_ends = (np.asarray(a, dtype=np.int64) for a in (first_tokens, num_new, kv_lens))
    starts = kv_ends - counts
    rows = np.arange(len(counts)) if page_rows is None else np.asarray(page_rows)
    num_tokens = int((firsts + counts).max(initial=0))
    _require("max_tokens", num_tokens, len(views["attention_parts"]))
    lows, highs = np.zeros_like(kv_ends), kv_ends
    if context_range is not None:
        if groups:
            raise EngineError("context_range and groups exclude each other: give one of them")
        lows = np.asarray(context_range[:, 0], dtype=np.int64)
        highs = np.minimum(kv_ends, context_range[:, 1])

    room = len(views["attention_tokens"])
    shared = _share(groups, counts, starts, room, wide_tokens=_tokens_per_item(heads, tiles.wide))
    lows = lows.copy()
    lows[shared.members] = np.repeat(shared.prefixes, shared.num_members)
    order = _expand(firsts[shared.members], counts[shared.members])
    views["attention_tokens"][: len(order)] = order

    # Tiles of the chunks, then those of the groups.
    owner, offset, size, is_wide = _tile(np.concatenate((counts, shared.num_tokens)), heads, tiles)
    split = int(np.searchsorted(owner, len(counts)))
    chunk, group = owner[:split], owner[split:] - len(counts)
    position = starts[chunk] + offset[:split]
    begin = lows[chunk]
    group_begin = np.zeros_like(group)
    if window is not None:
        begin = np.maximum(begin, position - window + 1)
        group_begin = np.maximum(group_begin, shared.first_positions[group] - window + 1)
    end = np.minimum(highs[chunk], position + size[:split])
    first = np.concatenate((firsts, _starts(shared.num_tokens)))[owner] + offset
    begin = np.concatenate((begin, group_begin))
    end = np.concatenate((end, shared.prefixes[group]))
    row = np.concatenate((rows, shared.page_rows))[owner]

    length = np.maximum(end - begin, 0)
    step = np.empty_like(length)
    # Prefixes are long and narrow programs fill what they leave: better slots left over than a second wave.
    has_wide_chunk = bool(is_wide[:split].any())
    for chosen, tile, rounding in (
        (~is_wide, tiles.narrow, 0.5), (is_wide, tiles.wide, 0.5 if has_wide_chunk else 0.01)
    ):  # fmt: skip
        slots = tiles.waves * _num_slots(heads, tile, num_sms)
        if tile is tiles.wide and not has_wide_chunk and window is None:
            slots *= _wide_share(length, is_wide, heads, tiles, num_sms)
        step[chosen] = _cut(length[chosen], tile.keys, slots, tiles.min_part_keys, rounding)
    num_parts = np.maximum(-(-length // step), 1)

    # A token's parts are its group's, then its own.
    before = np.zeros_like(counts)
    if len(group):
        group_parts = num_parts[split + _starts(np.bincount(group))]
        before[shared.members] = np.repeat(group_parts, shared.num_members)
    total = num_parts[:split] + before[chunk]
    num_partials = int((size[:split] * total)[total > 1].sum())
    _require("max_partials", num_partials, max_partials)
    of_token = np.ones(num_tokens, dtype=np.int64)
    if num_partials:
        of_token[_expand(first[:split], size[:split])] = np.repeat(total, size[:split])
    written = np.where(of_token > 1, of_token, 0)
    views["attention_parts"][:num_tokens, 0] = np.cumsum(written) - written
    views["attention_parts"][:num_tokens, 1] = of_token
    views["attention_parts"][num_tokens:] = 0

    flags = np.full(len(length), IS_PART)
    flags[:split][total == 1] = 0
    flags[split:] |= IS_GROUP
    tile_of = np.repeat(np.arange(len(num_parts)), num_parts)
    rank = _ranks(num_parts)
    part_begin = begin[tile_of] + rank * step[tile_of]
    part_end = np.minimum(part_begin + step[tile_of], end[tile_of])
    part = rank + np.concatenate((before[chunk], np.zeros_like(group)))[tile_of]
    at = np.concatenate((position, shared.prefixes[group]))
    fields = (
        first[tile_of], size[tile_of], row[tile_of], part_begin, part_end, part, flags[tile_of], at[tile_of]
    )  # fmt: skip
    records = np.stack(fields, axis=1)
    longest_first = np.argsort(part_begin - part_end, kind="stable")
    wide = is_wide[tile_of][longest_first]
    num_items = views["attention_num_items"]
    for i, (kind, chosen) in enumerate((("narrow", ~wide), ("wide", wide))):
        of_kind = longest_first[chosen]
        items = views[f"attention_{kind}_items"]
        _require(f"max_{kind}", len(of_kind), len(items))
        items[: len(of_kind)] = records[of_kind]
        num_items[i] = len(of_kind)
    return Work(int(num_items[0]), int(num_items[1]), num_partials)


def find_prefix_groups(
    page_table: IntArray, num_full_pages: IntArray, *, page_size: int, min_tokens: int, min_members: int
) -> list[PrefixGroup]:
    """Disjoint groups of sequences whose leading pages have equal ids, to save the most reads.

    page_table: [S, P]. num_full_pages: [S], leading pages of each sequence that were full before the
        step. A page id stands for all tokens up to its end, so equal ids mean equal pages before, too.
    min_tokens, min_members: the smallest group worth its merging.
    Where some of a group share more than the rest, either all share what is common, or each branch its
    own, whichever saves more reads.
    """
    table, full = np.asarray(page_table), np.asarray(num_full_pages)
    least = max(1, -(-min_tokens // page_size))
    candidates = np.flatnonzero(full >= least)
    best = _best_branches(table, full, candidates, 0, least, max(2, min_members), MAX_BRANCHINGS)
    return [PrefixGroup(int(members[0]), depth * page_size, members) for depth, members in best[1]]


def _best_branches(
    table: IntArray, full: IntArray, members: IntArray, depth: int, least: int, few: int, levels: int
) -> tuple[int, list[tuple[int, IntArray]]]:
    """(page reads saved, [(pages, members)]) among members that agree on their first `depth` pages."""
    members = members[full[members] > depth]
    if len(members) < few or not levels:
        return 0, []
    column = table[members, depth]
    order = column.argsort(kind="stable")
    column = column[order]
    bounds = [0, *((column[1:] != column[:-1]).nonzero()[0] + 1).tolist(), len(column)]
    saved, found = 0, []
    for low, high in itertools.pairwise(bounds):
        if high - low >= few:
            branch = members[order[low:high]]
            more, groups = _best_within(table, full, branch, depth, least, few, levels)
            saved += more
            found += groups
    return saved, found


def _best_within(
    table: IntArray, full: IntArray, members: IntArray, depth: int, least: int, few: int, levels: int
) -> tuple[int, list[tuple[int, IntArray]]]:
    """As _best_branches, for members that agree on the page at `depth`, too."""
    pages = table[members, depth : full[members].min()]
    same = (pages == pages[0]).all(axis=0)
    common = depth + (len(same) if same.all() else int(same.argmin()))
    apart = _best_branches(table, full, members, common, least, few, levels - 1)
    together = (len(members) - 1) * common if common >= least else 0
    return apart if apart[0] >= together else (together, [(common, members)])


@dataclass(frozen=True, slots=True)
class _Shared:
    """G groups with M members in all. members: [M]. num_members, num_tokens, prefixes (tokens),
    page_rows, first_positions (the earliest of the group's new tokens): [G]."""

    members: IntArray
    num_members: IntArray
    num_tokens: IntArray
    prefixes: IntArray
    page_rows: IntArray
    first_positions: IntArray


def _share(
    groups: Sequence[PrefixGroup], counts: IntArray, starts: IntArray, room: int, wide_tokens: int
) -> _Shared:
    kept = []
    for g in groups:
        members = g.members[counts[g.members] < wide_tokens]
        if int(counts[members].sum()) > room:
            shortest_first = members[np.argsort(counts[members], kind="stable")]
            members = np.sort(shortest_first[np.cumsum(counts[shortest_first]) <= room])
        if len(members) > 1:
            kept.append((g, members))
            room -= int(counts[members].sum())
    if not kept:
        none = np.zeros(0, dtype=np.int64)
        return _Shared(none, none, none, none, none, none)
    members = np.concatenate([m for _, m in kept])
    num_members = np.array([len(m) for _, m in kept])
    prefixes = np.array([g.num_tokens for g, _ in kept])
    if bool((starts[members] < np.repeat(prefixes, num_members)).any()):
        raise EngineError(
            "a prefix group is longer than what a member had before the step: cut num_tokens to whole pages "
            "computed before"
        )
    bounds = _starts(num_members)
    return _Shared(
        members=members,
        num_members=num_members,
        num_tokens=np.add.reduceat(counts[members], bounds),
        prefixes=prefixes,
        page_rows=np.array([g.page_row for g, _ in kept]),
        first_positions=np.minimum.reduceat(starts[members], bounds),
    )


def _tile(
    counts: IntArray, heads: Heads, tiles: Tiles
) -> tuple[IntArray, IntArray, IntArray, npt.NDArray[np.bool_]]:
    """Cut runs of tokens into tiles: of each its run, first token in it, tokens, whether it is wide."""
    narrow = _tokens_per_item(heads, tiles.narrow)
    most = np.where(counts > narrow, _tokens_per_item(heads, tiles.wide), narrow)
    num_tiles = -(-counts // most)
    owner = np.repeat(np.arange(len(counts)), num_tiles)
    offset = _ranks(num_tiles) * most[owner]
    return owner, offset, np.minimum(most[owner], counts[owner] - offset), counts[owner] > narrow


def _cut(length: IntArray, turn: int, num_slots: float, least: int, rounding: float) -> IntArray:
    """Keys of each part of each tile, whole turns of the loop, at least one: equal work for every slot.

    rounding: added to the number of parts before its fraction is dropped, at most 0.5.
    """
    target = max(float(length.sum()) / num_slots, least)
    num_parts = np.maximum((length / target + rounding).astype(np.int64), 1)
    step: IntArray = np.maximum(-(-length // (num_parts * turn)), 1) * turn
    return step


def _wide_share(
    length: IntArray, is_wide: npt.NDArray[np.bool_], heads: Heads, tiles: Tiles, num_sms: int
) -> float:
    """The part of the multiprocessors that wide programs should fill."""
    if tiles.shared is None or tiles.shared.pipelined is None:
        return 1.0
    wide = float(length[is_wide].sum()) * heads.num_kv_heads / num_sms
    narrow = float(length[~is_wide].sum()) * heads.num_kv_heads * NARROW_COST
    return 1.0 if wide > narrow + LATE_COST else 0.5


def _tokens_per_item(heads: Heads, tile: Tile) -> int:
    tokens = tile.rows // heads.group
    if tokens < 1:
        raise EngineError(
            f"{heads.group} query heads share a key-value head, an item holds {tile.rows}: "
            "raise the rows of the tiles"
        )
    return tokens


def _num_slots(heads: Heads, tile: Tile, num_sms: int) -> float:
    """Items that run at once; each takes one program for every key-value head."""
    return max(1.0, num_sms * tile.programs_per_sm / heads.num_kv_heads)


def _starts(counts: IntArray) -> IntArray:
    """Exclusive sum."""
    return np.cumsum(counts) - counts


def _ranks(counts: IntArray) -> IntArray:
    """0 … counts[i] - 1 for each i, one after the other."""
    return np.arange(int(counts.sum())) - np.repeat(_starts(counts), counts)


def _expand(firsts: IntArray, counts: IntArray) -> IntArray:
    """firsts[i] … firsts[i] + counts[i] - 1 for each i, one after the other."""
    return np.repeat(firsts, counts) + _ranks(counts)


def _require(name: str, needed: int, limit: int) -> None:
    if needed > limit:
        raise EngineError(
            f"the step's attention needs {name} = {needed:,}, its arrays have room for {limit:,}: "
            "make the limits larger or the step smaller"
        )
