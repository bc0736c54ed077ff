"""A first start compiles in several processes; a later one finds everything on disk."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from polybatch.execution.cpu_kernels import KernelShape, compile_kernels, ensure_kernels
from polybatch.kernels.cpu.compile import looking_up

shape = KernelShape("float32", "float32", "float32", 2, 1, 16, False)
ensure_kernels(shape, processes=2)
with looking_up() as missing:
    kernels = compile_kernels(shape)
assert not missing, missing
assert all(kernels.linear.values()) and kernels.attend and kernels.embed_packed
assert "numba" not in sys.modules
ensure_kernels(shape, processes=2)
"""


@pytest.mark.slow
def test_workers_compile_what_is_missing_once_and_this_process_never(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "only this once" in done.stderr
