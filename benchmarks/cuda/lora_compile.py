"""Compile every launch of `lora` and of the engine's adapters for an H100, with or without one.

    python -m benchmarks.cuda.lora_compile [--engine] [--processes N]

Launches compile in child processes, which leave them in Triton's cache; `lora`'s rehearsal does so too. Here
tensors have no memory and no GPU is needed: the exit status says whether a kernel fails to compile, wants
more shared memory than a program may have, or more registers than a multiprocessor holds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget

MAX_SHARED_BYTES = 232_448
MAX_REGISTERS = 65_536
NUM_SMS = 132
_INDEX = struct.Struct("<H")


class ForkedCompiler(Executor):
    """An executor for `triton.AsyncCompileMode` whose calls all run in `run`, in child processes.

    Threads would take turns in the interpreter, which takes half of the time.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[[], Any], Future]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        self.calls.append((lambda: fn(*args, **kwargs), future))
        return future

    def run(self, processes: int) -> list[str]:
        """Returns what failed to compile, and why; futures of the rest have kernels, from Triton's cache."""
        reader, writer = os.pipe()
        with tempfile.TemporaryDirectory() as folder:
            children = [self._fork(reader, writer, Path(folder, str(n))) for n in range(processes)]
            os.close(reader)
            for index in range(len(self.calls)):
                os.write(writer, _INDEX.pack(index))
            os.close(writer)
            for child in children:
                os.waitpid(child, 0)
            said = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
        outcome = {int(index): error for held in said for index, error in held.items()}
        wrong = []
        for index, (call, future) in enumerate(self.calls):
            error = outcome.get(index, "its process ended")
            if error is None:
                future.set_result(call())
            else:
                future.set_exception(RuntimeError(error))
                wrong.append(error)
        return wrong

    def _fork(self, reader: int, writer: int, path: Path) -> int:
        """A child that takes calls from the pipe until it is closed; what it leaves behind is the cache."""
        child = os.fork()
        if child:
            return child
        os.close(writer)
        said: dict[int, str | None] = {}
        try:
            while data := os.read(reader, _INDEX.size):
                (index,) = _INDEX.unpack(data)
                said[index] = None
                try:
                    self.calls[index][0]()
                except Exception as error:  # noqa: BLE001 the parent says whatever it is
                    said[index] = f"{type(error).__name__}: {str(error)[-600:]}"
            path.write_text(json.dumps(said))
        finally:
            os._exit(0)


class _WithoutMemory(TorchFunctionMode):
    """Tensors of a GPU become ones without memory, and what asks for values gets any."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = "meta"
        first = args[0] if args else None
        if func is torch.Tensor.cuda:
            return first.to("meta")
        if func is torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return first.is_meta
        if isinstance(first, torch.Tensor) and first.is_meta:
            if func is torch.equal:
                return True
            if func is torch.Tensor.item:
                return 0.0
            if func is torch.Tensor.__setitem__:
                return None
            if func is torch.Tensor.__getitem__ and getattr(args[1], "dtype", None) is torch.bool:
                return first
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """Launches inside see an H100, and tensors on it without memory."""
    kept = triton.runtime.driver._active
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, set_current_device=lambda d: None,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    ))  # fmt: skip
    properties = SimpleNamespace(multi_processor_count=NUM_SMS)
    try:
        with (
            mock.patch("torch.cuda.get_device_properties", return_value=properties),
            mock.patch("torch.cuda.Stream"),
            mock.patch("torch.cuda.current_stream"),
            mock.patch("torch.cuda.is_current_stream_capturing", return_value=False),
            mock.patch("torch.cuda.synchronize"),
            _WithoutMemory(),
        ):
            yield
    finally:
        triton.runtime.driver._active = kept


def resources(kernel: Any) -> dict[str, Any]:
    """Registers and bytes on the stack of a thread, threads, and bytes of shared memory of a program."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    names = kernel.src.fn.arg_names
    return {
        "name": kernel.metadata.name, "registers": int(found[1]), "stack": int(found[2]),
        "threads": 32 * kernel.metadata.num_warps, "shared": kernel.metadata.shared,
        "types": kernel.src.signature.get("x", kernel.src.signature.get("memory", "")),
        "constants": {names[at[0]]: value for at, value in kernel.src.constants.items() if len(at) == 1},
    }  # fmt: skip


def over_limits(held: dict[str, Any]) -> bool:
    """Whether an H100 refuses to launch it."""
    registers = -(-held["registers"] // 8) * 8 * held["threads"]
    return held["shared"] > MAX_SHARED_BYTES or registers > MAX_REGISTERS


def engine_launches() -> None:
    """What the engine launches in decode and mixed steps, by width of the model and dtype."""
    from polybatch.kernels.lora import cuda_fused, work
    from polybatch.kernels.lora.cuda import CudaLora
    from polybatch.kernels.lora.cuda_fused import FusedLora

    device = torch.device("cuda")
    # Hidden and intermediate size, heads, KV heads, elements of a head.
    models = [(4096, 14336, 32, 8, 128), (576, 1536, 9, 3, 64), (2048, 8192, 32, 8, 64),
              (3072, 8192, 24, 8, 128), (5120, 17408, 40, 8, 128), (8192, 28672, 64, 8, 128),
              (16384, 53248, 128, 8, 128)]  # fmt: skip
    for (hidden, inner, heads, kv_heads, dim), dtype in itertools.product(
        models, (torch.bfloat16, torch.float16, torch.float32)
    ):
        q, kv = (heads * dim, hidden), (kv_heads * dim, hidden)
        shapes = work.group_shapes({
            "q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": q[::-1], "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden), "down_proj": (hidden, inner),
        })  # fmt: skip

        def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=kind, device=device)

        lora = CudaLora(shapes, dtype, device, 1 << 22)
        limits, ints = work.LoraLimits(256, 64), torch.int32
        arrays = {name: empty(*shape, kind=ints) for name, (shape, _) in work.arrays(limits).items()}
        memory, words, places = empty(1 << 26), empty(1 << 16, kind=ints), empty(256, kind=ints)
        table, pages = empty(1024, dim, kind=torch.float32), empty(16, 2, kv_heads, 16, dim)
        for plan in (work.GRAPH_PLAN, *work.common_mixed_plans()):
            fused = FusedLora(lora, words, arrays, plan, 256)
            for group, shape in enumerate(shapes):
                x, y = empty(256, shape.num_in), empty(256, sum(shape.outs))
                lora(group, 0, x, y, memory, words, arrays, plan)
                if group == cuda_fused.QKV:
                    fused.write_kv(0, memory, y, places, places, table, pages)
                elif group == cuda_fused.GATE_UP:
                    fused.silu_mul(0, memory, y, empty(256, inner))
                else:
                    for rows in (None, places):
                        fused.rms_norm(
                            group, 0, memory, y, empty(hidden), 1e-5, residual=y, out=empty(256, hidden),
                            rows=rows,
                        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", action="store_true", help="what the engine launches, not the benchmark")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    from benchmarks.cuda import lora, lora_timing

    with without_gpu(), lora_timing.rehearsal(options.processes) as (compiler, wrong):
        if options.engine:
            engine_launches()
        else:
            lora.run(lora.empty_results(), layers=1, seed=0, is_quick=False)
        print(f"{len(compiler.calls)} kernels", flush=True)
    kernels = [resources(future.result()) for _, future in compiler.calls if not future.exception()]
    for held in sorted(kernels, key=lambda held: (held["name"], held["shared"])):
        print("TOO LARGE" * over_limits(held), json.dumps(held))
    wrong += [f"{held} is too large" for held in kernels if over_limits(held)]
    print(
        f"{len(kernels)} kernels compiled; at most {max(held['shared'] for held in kernels):,} bytes shared"
    )
    if wrong:
        sys.exit("wrong: " + "\n".join(wrong))


if __name__ == "__main__":
    main()
