"""Adapters' kernels compiled for an H100, which the interpreter, having no such limits, cannot tell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--engine"], []], ids=["engine", "benchmark"])
def test_an_h100_holds_every_kernel_that_is_launched(options: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda.lora_compile", *options],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
