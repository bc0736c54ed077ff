"""Hopper's int4 kernel compiled for an H100, with or without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import subprocess, tempfile, torch, triton
from pathlib import Path
from benchmarks.cuda.lora_compile import over_limits, resources, without_gpu
from polybatch.kernels.linear import cuda_int4_hopper as hopper
from polybatch.kernels.linear.cuda_config import int4_config

assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
configs = {
    (int4_config(tokens, rows, k_tiles, is_hopper=True), dtype)
    for tokens in (64, 128, 256, 512)
    for rows, k_tiles in ((6144, 16), (4096, 16), (28672, 16), (4096, 56))
    for dtype in (torch.bfloat16, torch.float16)
}
with without_gpu():
    words, x, out, table, count = (
        torch.zeros(shape, dtype=dtype, device="cuda")
        for shape, dtype in (
            ((16, 4096, 64), torch.int16), ((256, 4096), torch.bfloat16), ((256, 4096), torch.bfloat16),
            ((17, 4096), torch.int32), ((8,), torch.int32),
        )
    )
    for c, dtype in configs:
        assert c.is_hopper
        kernel = hopper.int4_linear_hopper_kernel.warmup(
            hopper.words_descriptor(words, c.block_out), hopper.x_descriptor(x.to(dtype), c.block_m), table,
            out.to(dtype), torch.zeros(8, device="cuda"), count, 256, 4096, 4096, 16, 4096, BLOCK_M=c.block_m,
            BLOCK_OUT=c.block_out, SPLIT=c.split, STAGES=c.num_stages, SCALES_BF16=False,
            num_warps=c.num_warps, grid=(1,),
        )
        held = resources(kernel)
        assert not over_limits(held) and held["stack"] == 0, (c, held)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "kernel.ptx").write_text(kernel.asm["ptx"])
            said = subprocess.run(
                [assembler, "--gpu-name=sm_90a", "kernel.ptx"], cwd=folder, check=True, capture_output=True,
                text=True,
            ).stderr
        assert "serialized" not in said, (c, said)
print(len(configs))
"""


@pytest.mark.slow
def test_no_product_of_hoppers_kernel_waits_for_the_one_before_and_no_register_spills() -> None:
    """ptxas gives up overlapping matrix instructions where it cannot prove their registers untouched."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0
