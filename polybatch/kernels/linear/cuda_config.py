"""How the int4 kernel cuts its work, by shape; measured by benchmarks/cuda/linear.py.

Programs wait for memory together, so all of a launch should be resident at once, evenly loaded. Splitting
the inputs fills the device where tiles are few, and costs a sum over the parts. From 64 tokens on, x passes
through the L2 cache as often as there are tiles of rows, and outweighs the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_ANY = 1 << 62


@dataclass(frozen=True, slots=True)
class Int4Config:
    """Tile sizes, parts of the inputs, warps, pipeline stages of int4_linear_kernel or of Hopper's.

    is_scaled: scales multiply weights, not sums; always so in Hopper's.
    """

    block_m: int
    block_out: int
    split: int
    num_warps: int
    num_stages: int
    is_scaled: bool = False
    is_hopper: bool = False

    @property
    def columns(self) -> int:
        """Of a tile's 64, in a step."""
        return 32 if self.is_scaled else 64

    @property
    def parts_at_a_time(self) -> int:
        """Parts whose sums are loaded together at the end: up to 64 registers of them; 0 if not split."""
        per_thread = self.block_m * self.block_out // (32 * self.num_warps)
        return 0 if self.split == 1 else max(1, min(8, 64 // per_thread))


def int4_config(num_tokens: int, rows: int, k_tiles: int, is_hopper: bool = False) -> Int4Config:
    """The configuration for a number of tokens and packed weights of this shape (cuda_pack).

    is_hopper: whether Hopper's kernel may be taken; it is where it was faster.
    """
    if is_hopper and (found := _hopper_config(num_tokens, rows, k_tiles)):
        return found
    _, default, programs, measured = next(entry for entry in _CLASSES if num_tokens <= entry[0])
    config = measured.get((rows, k_tiles), default)
    if config is not default:
        return config
    if rows % config.block_out:
        config = replace(config, block_out=128, num_warps=8)
    split = round(programs / _programs(config, num_tokens, rows))
    return replace(config, split=max(1, min(split, k_tiles // 2)))


def _hopper_config(num_tokens: int, rows: int, k_tiles: int) -> Int4Config | None:
    """None where Triton's kernel was no slower: up to 32 tokens, and where neither tile fills the device."""
    if num_tokens <= 32:
        return None
    if num_tokens <= 64:
        if (rows, k_tiles) in _HOPPER_64:
            return _HOPPER_64[rows, k_tiles]
        if rows // 64 > _WAVE >= rows // 128:
            return None
        config = _SHORT if rows // 64 <= _WAVE else _SHORT_IN_PAIRS
    else:
        fitting = [config for config in _TALL if rows % config.block_out == 0]
        config = min(fitting, key=lambda c: -(-_programs(c, num_tokens, rows) // _WAVE) * (c.block_out + 32))
    split = max(1, min(_WAVE // _programs(config, num_tokens, rows), k_tiles // 2))
    return replace(config, split=split)


def _programs(config: Int4Config, num_tokens: int, rows: int) -> int:
    return rows // config.block_out * -(-num_tokens // config.block_m)


_QKV, _O, _GATE_UP, _DOWN = (6144, 16), (4096, 16), (28672, 16), (4096, 56)
# Tokens up to, configuration of other shapes, programs wanted there, configurations of Llama-3.1-8B's shapes.
_CLASSES: tuple[tuple[int, Int4Config, int, dict[tuple[int, int], Int4Config]], ...] = (
    (
        8,
        Int4Config(16, 64, 1, 4, 3),
        448,
        {
            _QKV: Int4Config(16, 64, 4, 4, 3),
            _O: Int4Config(8, 32, 4, 2, 3),
            _GATE_UP: Int4Config(8, 32, 1, 2, 3),
            _DOWN: Int4Config(8, 32, 8, 2, 3),
        },
    ),
    (
        16,
        Int4Config(16, 64, 1, 4, 3),
        448,
        {
            _QKV: Int4Config(16, 64, 4, 4, 3),
            _O: Int4Config(16, 64, 8, 4, 3),
            _GATE_UP: Int4Config(16, 64, 1, 4, 3),
            _DOWN: Int4Config(16, 64, 8, 4, 3),
        },
    ),
    (
        32,
        Int4Config(32, 64, 1, 4, 3),
        384,
        {
            _QKV: Int4Config(32, 64, 4, 4, 3),
            _O: Int4Config(32, 64, 4, 4, 4),
            _GATE_UP: Int4Config(32, 128, 1, 8, 3),
            _DOWN: Int4Config(32, 64, 6, 4, 3),
        },
    ),
    (
        64,
        Int4Config(64, 64, 1, 4, 3),
        132,
        {
            _QKV: Int4Config(64, 64, 1, 4, 3),
            _O: Int4Config(64, 64, 2, 4, 3),
            _GATE_UP: Int4Config(64, 64, 1, 4, 3),
            _DOWN: Int4Config(64, 64, 4, 4, 3),
        },
    ),
    (
        128,
        Int4Config(64, 64, 1, 4, 3),
        264,
        {
            _QKV: Int4Config(64, 64, 1, 4, 3),
            _O: Int4Config(64, 64, 1, 4, 3),
            _GATE_UP: Int4Config(128, 256, 1, 8, 3, is_scaled=True),
            _DOWN: Int4Config(64, 64, 2, 4, 3),
        },
    ),
    (
        256,
        Int4Config(128, 128, 1, 8, 4, is_scaled=True),
        132,
        {
            _O: Int4Config(64, 64, 1, 4, 3),
            _GATE_UP: Int4Config(128, 256, 1, 8, 3, is_scaled=True),
            _DOWN: Int4Config(64, 64, 1, 4, 3),
        },
    ),
    (
        _ANY,
        Int4Config(128, 128, 1, 8, 4, is_scaled=True),
        132,
        {_GATE_UP: Int4Config(128, 256, 1, 8, 3, is_scaled=True)},
    ),
)


def _hopper(block_m: int, block_out: int, split: int, num_warps: int, num_stages: int) -> Int4Config:
    return Int4Config(block_m, block_out, split, num_warps, num_stages, is_scaled=True, is_hopper=True)


# Programs, one on each multiprocessor of an H100.
_WAVE = 132
_SHORT = _hopper(64, 64, 1, 4, 3)
_SHORT_IN_PAIRS = _hopper(64, 128, 1, 4, 2)  # Two fit on a multiprocessor; one alone waits for its copies.
_HOPPER_64 = {_DOWN: _hopper(64, 128, 4, 4, 3)}
# A wave of tiles takes as long as their rows and 32 more: with this rule each of Llama-3.1-8B's products gets
# what was fastest for it, from 128 to 2,048 tokens.
_TALL = (_hopper(128, 256, 1, 16, 2), _hopper(128, 128, 1, 8, 2), _hopper(128, 64, 1, 4, 3))
