"""Which compiled kernels a model needs on the CPU, and how a first start gets them: by several processes.

A process compiles one kernel at a time and a start needs about ten, some of which take many seconds. What is
not on disk is therefore compiled by workers, one per processor, each with its share; this process then maps
the results and never imports the compiler.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

from polybatch.config import ModelSpec
from polybatch.kernels.cpu.compile import cache_root, compiling_only, looking_up
from polybatch.kernels.cpu.team import compile_walk
from polybatch.kernels.linear.cpu import ADD, SILU_MUL, STORE, compile_linear
from polybatch.kernels.linear.cpu_pack import INTEGER_KINDS
from polybatch.kernels.lora.cpu import compile_shrink
from polybatch.kernels.norm.cpu import (
    compile_embed,
    compile_embed_packed,
    compile_norm,
    compile_quantize,
    compile_store_rows,
)
from polybatch.kernels.ragged_attention.cpu import compile_attention
from polybatch.kernels.write_kv.cpu import compile_write_kv

logger = logging.getLogger("polybatch.execution")

# -P where there is a choice: a folder named polybatch in the current one must not be imported instead.
_WORKER = [sys.executable, "-P", "-c", "from polybatch.execution.cpu_kernels import work; work()"]


@dataclass(frozen=True, slots=True)
class KernelShape:
    """What tells one model's kernels from another's.

    dtype: of activations, keys and values. linear, head: kinds of packed weights.
    """

    dtype: str
    linear: str
    head: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool

    @staticmethod
    def of(spec: ModelSpec, dtype: str, linear: str, head: str) -> KernelShape:
        return KernelShape(
            dtype, linear, head, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.qk_norm
        )


@dataclass(frozen=True, slots=True)
class Kernels:
    """Addresses of a model's operations. linear: by (kind, end). quantizers: by kind of weights.

    embed_packed: None where the head's kind is not the activations' dtype.
    """

    embed: int
    embed_packed: int | None
    norm: int
    write_kv: int
    attend: int
    shrink: int
    linear: dict[tuple[str, int], int]
    quantizers: dict[str, int]


def compile_kernels(shape: KernelShape) -> Kernels:
    """Get every operation from disk, compiling what is not there."""
    dtype, heads = shape.dtype, (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    ends = ((shape.linear, (STORE, ADD, SILU_MUL)), (shape.head, (STORE,)))
    kinds = dict.fromkeys((shape.linear, shape.head))
    return Kernels(
        linear={(kind, end): compile_linear(kind, end, dtype, dtype) for kind, es in ends for end in es},
        attend=compile_attention(*heads, dtype),
        write_kv=compile_write_kv(*heads, dtype, shape.qk_norm),
        shrink=compile_shrink(dtype),
        quantizers={kind: compile_quantize(dtype, kind) for kind in kinds if kind in INTEGER_KINDS},
        norm=compile_norm(dtype),
        embed=compile_embed(dtype),
        embed_packed=compile_embed_packed(dtype) if shape.head == dtype else None,
    )


def _compile_all(shape: KernelShape) -> None:
    compile_kernels(shape)
    compile_walk()
    compile_store_rows(shape.dtype)


def ensure_kernels(shape: KernelShape, processes: int) -> None:
    """Have workers compile the kernels that are not on disk, and tell the person at the terminal.

    A worker that fails is no error here: whoever needs its kernels compiles them and meets the reason.
    """
    with looking_up() as missing:
        _compile_all(shape)
    if not missing or not sys.executable:
        return
    names = list(dict.fromkeys(missing))
    print(
        f"compiling {len(names)} kernels for this processor, only this once; kept in {cache_root()}",
        file=sys.stderr,
    )
    started = time.perf_counter()
    # Dealt out in turn: the slow ones, matmuls and attention, come first in the list.
    shares = [names[i::processes] for i in range(min(processes, len(names)))]
    # One thread each: there is one worker per processor.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    workers = []
    try:
        for share in shares:
            worker = subprocess.Popen(_WORKER, stdin=subprocess.PIPE, env=environment)
            workers.append(worker)
            assert worker.stdin is not None
            with worker.stdin as pipe:
                pipe.write(json.dumps({"shape": asdict(shape), "names": share}).encode())
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    if any(codes):
        logger.warning("%d of %d processes that compile kernels failed", sum(map(bool, codes)), len(codes))
    logger.info("compiled %d kernels in %.1f s", len(names), time.perf_counter() - started)


def work() -> None:
    """A worker: compile the named kernels of the shape that standard input describes."""
    task = json.load(sys.stdin)
    with compiling_only(frozenset(task["names"])):
        _compile_all(KernelShape(**task["shape"]))
