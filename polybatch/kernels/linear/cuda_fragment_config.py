"""How the kernel of `cuda_fragments` cuts its work, by shape; chosen by benchmarks/cuda/linear.py.

Rows of a tile decide how often x passes through the L2 cache: 4 M / rows times the bytes of the weights. That
is half of them at 16 tokens and 128 rows; more than as much again as memory gives makes the cache the limit.
All programs of a launch should be resident at once, evenly loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_ANY = 1 << 62


@dataclass(frozen=True, slots=True)
class FragmentConfig:
    """Tile sizes, parts of the inputs, warps, stages of x, tiles of weights under way of the kernel.

    is_scaled: scales multiply weights, not sums. is_dependent: start while the kernel before ends.
    follow_mib: of the next product's weights, sent for while the last own ones arrive.
    """

    block_m: int
    block_out: int
    split: int
    num_warps: int
    num_stages: int
    ahead: int
    is_scaled: bool = False
    is_dependent: bool = False
    follow_mib: int = 8

    @property
    def parts_at_a_time(self) -> int:
        """Parts whose sums are loaded together at the end: up to 64 registers of them; 0 if not split."""
        per_thread = self.block_m * self.block_out // (32 * self.num_warps)
        return 0 if self.split == 1 else max(1, min(8, 64 // per_thread))


def fragment_config(num_tokens: int, rows: int, k_tiles: int) -> FragmentConfig:
    """The configuration for a number of tokens and weights packed into fragments of this shape."""
    _, default, programs, measured = next(entry for entry in _CLASSES if num_tokens <= entry[0])
    config = measured.get((rows, k_tiles))
    if config is not None:
        return config
    if rows % default.block_out:
        default = replace(default, block_out=128, num_warps=8)
    tiles = rows // default.block_out * -(-num_tokens // default.block_m)
    return replace(default, split=max(1, min(round(programs / tiles), k_tiles // 4, 16)))


_QKV, _O, _GATE_UP, _DOWN = (6144, 32), (4096, 32), (28672, 32), (4096, 112)
# Tokens up to, configuration of other shapes, programs wanted there, configurations of Llama-3.1-8B's shapes.
_CLASSES: tuple[tuple[int, FragmentConfig, int, dict[tuple[int, int], FragmentConfig]], ...] = (
    (
        16,
        FragmentConfig(16, 64, 1, 4, 4, 3),
        512,
        {
            _QKV: FragmentConfig(16, 64, 4, 4, 4, 3),
            _O: FragmentConfig(16, 64, 8, 4, 4, 3),
            _GATE_UP: FragmentConfig(16, 64, 1, 4, 4, 3),
            _DOWN: FragmentConfig(16, 64, 8, 4, 4, 3),
        },
    ),
    (
        32,
        FragmentConfig(32, 128, 1, 8, 4, 2),
        264,
        {
            _QKV: FragmentConfig(32, 128, 5, 8, 4, 2),
            _O: FragmentConfig(32, 128, 8, 8, 4, 2),
            _GATE_UP: FragmentConfig(32, 128, 1, 8, 4, 2),
            _DOWN: FragmentConfig(32, 128, 8, 8, 4, 2),
        },
    ),
    (
        64,
        FragmentConfig(64, 128, 1, 8, 3, 2, is_scaled=True),
        264,
        {
            _QKV: FragmentConfig(64, 128, 5, 8, 3, 2, is_scaled=True),
            _O: FragmentConfig(64, 128, 8, 8, 3, 2, is_scaled=True),
            _GATE_UP: FragmentConfig(64, 128, 1, 8, 3, 2, is_scaled=True),
            _DOWN: FragmentConfig(64, 128, 8, 8, 3, 2, is_scaled=True),
        },
    ),
    (128, FragmentConfig(128, 128, 1, 8, 3, 2, is_scaled=True), 132, {}),
    (_ANY, FragmentConfig(128, 128, 1, 8, 3, 2, is_scaled=True, follow_mib=0), 132, {}),
)
