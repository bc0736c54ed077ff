"""Random adapters in pages and an 8B Llama's layers around `lora`'s kernels, for `lora` to check and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from polybatch.adapters.layout import plan_layout
from polybatch.config import ModelSpec, RopeSpec
from polybatch.execution.adapter_words import adapter_words
from polybatch.kernels.activation.cuda import silu_mul
from polybatch.kernels.lora import cuda, cuda_fused, work
from polybatch.kernels.lora.cuda_fused import FusedLora
from polybatch.kernels.lora.work import GROUPS, LoraLimits
from polybatch.kernels.norm.cuda import rms_norm
from polybatch.kernels.write_kv.cuda import rope_table, write_kv

SPEC = ModelSpec(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, max_position=8192, rms_norm_eps=1e-5, rope=RopeSpec(),
)  # fmt: skip
SHAPES = SPEC.linear_shapes
GROUP_SHAPES = work.group_shapes(SHAPES)
PAGE_BYTES = 65536
MAX_H = 1 << 22


class Pool:
    """Random rows of adapters with these ranks (0 leaves a module out) in shuffled pages of some layers."""

    def __init__(
        self,
        ranks: list[dict[str, tuple[int, bool, bool]]],
        layers: int,
        dtype: torch.dtype,
        shapes: Mapping[str, tuple[int, int]] = SHAPES,
        device: str = "cuda",
    ) -> None:
        self.dtype, self.shapes = dtype, shapes
        self.layouts = [plan_layout([r], shapes, dtype.itemsize, PAGE_BYTES) for r in ranks]
        num_pages = sum(layout.num_pages for layout in self.layouts)
        order = np.random.default_rng(0).permutation(num_pages)
        elements = num_pages * PAGE_BYTES // dtype.itemsize
        self.memory = torch.empty(layers, elements, dtype=dtype, device=device).normal_(std=0.05)
        self.pages, words, templates = [], [], []
        for layout in self.layouts:
            pages, order = order[: layout.num_pages].astype(np.int64), order[layout.num_pages :]
            held = adapter_words(layout)
            templates.append(held.template_at(sum(map(len, words))))
            words.append(held.starts(pages, PAGE_BYTES))
            self.pages.append(pages)
        self.words = torch.from_numpy(np.concatenate(words)).to(device)
        self.templates = np.stack(templates)

    def expected(self, group, layer, x, y, segments):
        """float64, from the layout rather than from words."""
        result, memory = y.double(), self.memory[layer]
        for start, stop, n in segments:
            column = 0
            for module in GROUPS[group]:
                out, in_ = self.shapes[module]
                at = (slice(start, stop), slice(column, column + out))
                column += out
                places = self.layouts[n].layers[0].get(module)
                if places is None:
                    continue
                a = self._rows(memory, n, places.a_page, places.a_offset, in_)
                b = self._rows(memory, n, places.b_page, places.b_offset, out)
                result[at] += x[start:stop].double() @ a.T @ b
                for place, is_gain in ((places.gain, True), (places.bias, False)):
                    if place is not None:
                        row = self._rows(memory, n, np.array([place.page]), np.array([place.offset]), out)
                        result[at] = result[at] * row if is_gain else result[at] + row
        return result

    def _rows(self, memory, n, page, offset, width):
        starts = torch.from_numpy((self.pages[n][page] * PAGE_BYTES + offset) // self.dtype.itemsize)
        columns = torch.arange(width, device=memory.device)
        return memory[starts.to(memory.device)[:, None] + columns].double()


class Step:
    """One step's plan on the device, with x (NaN where no segment is) and y per group.

    is_fused: as `fill` has it, for whole layers; not to be asked for where a group is checked alone.
    """

    def __init__(self, pool: Pool, segments, num_tokens: int, *, wide: bool, is_fused: bool = False):
        self.pool, self.segments, self.num_tokens = pool, segments, num_tokens
        views = {
            name: np.zeros(shape, dtype)
            for name, (shape, dtype) in work.arrays(LoraLimits(num_tokens, max(len(segments), 1))).items()
        }
        took = []
        for _ in range(5):
            begin = time.perf_counter()
            self.plan = work.fill(views, np.array(segments), pool.templates, GROUP_SHAPES, MAX_H,
                                  num_rows=num_tokens, wide=wide, is_fused=is_fused)  # fmt: skip
            took.append(time.perf_counter() - begin)
        self.plan_s = float(np.median(took))
        self.arrays = {name: torch.from_numpy(view).cuda() for name, view in views.items()}
        self.lora = cuda.CudaLora(GROUP_SHAPES, pool.dtype, torch.device("cuda"), MAX_H)
        self.fused = FusedLora(self.lora, pool.words, self.arrays, self.plan, num_tokens)
        self.covered = torch.zeros(num_tokens, dtype=torch.bool)
        for start, stop, _ in segments:
            self.covered[start:stop] = True

    def args(self, layer: int) -> tuple:
        return self.pool.memory[layer], self.pool.words, self.arrays, self.plan

    def random(self, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = GROUP_SHAPES[group]
        x = torch.randn(self.num_tokens, shape.num_in, device="cuda").to(self.pool.dtype)
        x[~self.covered.cuda()] = torch.nan
        return x, torch.randn(self.num_tokens, sum(shape.outs), device="cuda").to(self.pool.dtype)

    def check(self, group: int, layer: int) -> float:
        """Relative error of one group, separate and fused; raises if a token without adapter changed."""
        x, y = self.random(group)
        expected = self.pool.expected(group, layer, x, y, self.segments)
        base = ~self.covered.cuda()
        self.lora.h.fill_(torch.nan)
        separate = y.clone()
        self.lora(group, layer, x, separate, *self.args(layer))
        assert torch.equal(separate[base], y[base]), "a token without adapter changed"
        errors = [distance(separate, expected)]
        self.lora.h.fill_(torch.nan)
        self.lora.shrink(group, layer, x, *self.args(layer))
        rounded = expected.to(y.dtype)
        for got, wanted in self._fused_and_plain(group, layer, y, rounded):
            errors.append(distance(got, wanted.double()))
        return max(errors)

    def _fused_and_plain(self, group, layer, y, rounded):
        """What a fused kernel made of y and h, and the plain one of y as it should be."""
        memory, n = self.pool.memory[layer], len(y)
        if group == cuda_fused.GATE_UP:
            out = torch.full((n, y.shape[1] // 2), torch.nan, dtype=y.dtype, device="cuda")
            self.fused.silu_mul(layer, memory, y, out)
            return [(out, silu_mul(rounded))]
        if group == cuda_fused.QKV:
            place = Placement(n, y.dtype)
            q = self.fused.write_kv(layer, memory, y, *place.args())
            other = Placement(n, y.dtype)
            expected_q = write_kv(rounded, *other.args())
            return [(q, expected_q), (place.kv, other.kv)]
        residual, weight = torch.randn_like(y), torch.randn_like(y[0])
        wanted_residual = residual.clone()
        wanted = rms_norm(rounded, weight, 1e-5, residual=wanted_residual)
        rows = torch.arange(n - 1, -1, -1, dtype=torch.int32, device="cuda")
        chosen, out = torch.empty_like(y), torch.empty_like(y)
        args = (group, layer, memory, y, weight, 1e-5)
        self.fused.rms_norm(*args, residual=residual.clone(), out=chosen, rows=rows)
        self.fused.rms_norm(*args, residual=residual, out=out)
        return [(out, wanted), (residual, wanted_residual), (chosen.flip(0), wanted)]


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((got.double() - expected).norm() / expected.norm()).item()


class Placement:
    """Where the keys and values of a step's tokens go."""

    def __init__(self, num_tokens: int, dtype: torch.dtype) -> None:
        self.positions = torch.arange(num_tokens, dtype=torch.int32, device="cuda") % 1000
        self.slots = torch.arange(num_tokens, dtype=torch.int32, device="cuda")
        inv_freq = 500000.0 ** -(torch.arange(64) / 64)
        self.table = rope_table(inv_freq, 1.0, 1000).cuda()
        self.kv = torch.zeros(-(-num_tokens // 16), 2, 8, 16, 128, dtype=dtype, device="cuda")

    def args(self) -> tuple:
        return self.positions, self.slots, self.table, self.kv


class Base:
    """The base model's layers without attention, for what adapters add to them."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.weights = [
            [torch.empty(sum(s.outs), s.num_in, dtype=torch.bfloat16, device="cuda").normal_(std=0.02).t()
             for s in GROUP_SHAPES]
            for _ in range(layers)
        ]  # fmt: skip
        self.norm = torch.ones(SPEC.hidden_size, dtype=torch.bfloat16, device="cuda")

    def buffers(self, num_tokens: int) -> dict[str, torch.Tensor]:
        widths = {"hidden": 4096, "residual": 4096, "qkv": 6144, "attention": 4096, "gate_up": 28672,
                  "activated": 14336}  # fmt: skip
        return {
            name: torch.randn(num_tokens, width, device="cuda").bfloat16() for name, width in widths.items()
        }

    def run(self, step: Step, space: dict[str, torch.Tensor], place: Placement, is_adapted: bool) -> None:
        b, fused = space, step.fused
        for layer in range(self.layers):
            memory = step.pool.memory[layer]

            def product(group: int, x: torch.Tensor, out: torch.Tensor, layer: int = layer) -> None:
                def base() -> None:
                    torch.mm(x, self.weights[layer][group], out=out)

                if is_adapted:
                    step.lora.shrink_beside(base, group, layer, x, *step.args(layer))
                else:
                    base()

            def add_norm(group: int, memory=memory, layer: int = layer) -> None:
                x, residual = b["hidden"], b["residual"]
                if is_adapted:
                    fused.rms_norm(group, layer, memory, x, self.norm, 1e-5, residual=residual, out=x)
                else:
                    rms_norm(x, self.norm, 1e-5, residual=residual, out=x)

            product(cuda_fused.QKV, b["hidden"], b["qkv"])
            if is_adapted:
                fused.write_kv(layer, memory, b["qkv"], *place.args())
            else:
                write_kv(b["qkv"], *place.args())
            product(cuda_fused.O, b["attention"], b["hidden"])
            add_norm(cuda_fused.O)
            product(cuda_fused.GATE_UP, b["hidden"], b["gate_up"])
            if is_adapted:
                fused.silu_mul(layer, memory, b["gate_up"], b["activated"])
            else:
                silu_mul(b["gate_up"], out=b["activated"])
            product(cuda_fused.DOWN, b["activated"], b["hidden"])
            add_norm(cuda_fused.DOWN)


def consumers(step: Step, base: Base) -> dict[str, tuple[Callable, Callable]]:
    """Kernels that read a product: name -> (plain, fused), each for one layer."""
    b, place, fused = base.buffers(step.num_tokens), Placement(step.num_tokens, torch.bfloat16), step.fused
    x, residual, gate_up, out = b["hidden"], b["residual"], b["gate_up"], b["activated"]
    memory = step.pool.memory

    def norm(group: int) -> tuple[Callable, Callable]:
        return (
            lambda i: rms_norm(x, base.norm, 1e-5, residual=residual, out=x),
            lambda i: fused.rms_norm(group, i, memory[i], x, base.norm, 1e-5, residual=residual, out=x),
        )

    return {
        "write_kv": (lambda i: write_kv(b["qkv"], *place.args()),
                     lambda i: fused.write_kv(i, memory[i], b["qkv"], *place.args())),
        "norm of o": norm(cuda_fused.O),
        "silu_mul": (lambda i: silu_mul(gate_up, out=out),
                     lambda i: fused.silu_mul(i, memory[i], gate_up, out)),
        "norm of down": norm(cuda_fused.DOWN),
    }  # fmt: skip


def uniform(n: int, rank: int) -> list[dict[str, tuple[int, bool, bool]]]:
    return [dict.fromkeys(SHAPES, (rank, False, False)) for _ in range(n)]


def segments_of(counts) -> list[tuple[int, int, int]]:
    ends = np.cumsum(counts)
    return [(int(e - c), int(e), n) for n, (c, e) in enumerate(zip(counts, ends, strict=True)) if c]


def zipf(num_adapters: int, rows: int) -> list[tuple[int, int, int]]:
    weights = 1 / np.arange(1, num_adapters + 1)
    picks = np.random.default_rng(1).choice(num_adapters, rows, p=weights / weights.sum())
    return segments_of(np.bincount(picks, minlength=num_adapters))
