"""Kernels in Gluon run on Hopper GPUs, compiled, with the Triton they were written for, and nowhere else."""

from __future__ import annotations

import pytest
import torch
import triton

from polybatch.kernels import gluon

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "version", "capability", "is_interpreted", "runs"),
    [
        (GPU, "3.6.0", (9, 0), False, True),
        (None, "3.6.0", (9, 0), False, True),
        (CPU, "3.6.0", (9, 0), False, False),
        (GPU, "3.60.0", (9, 0), False, False),
        (GPU, "3.6.0", (10, 0), False, False),
        (None, "3.6.0", (9, 0), True, False),
    ],
)
def test_hopper_kernels_run_only_where_they_can(
    device: torch.device | None,
    version: str,
    capability: tuple[int, int],
    is_interpreted: bool,
    runs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(gluon, "is_interpreted", lambda: is_interpreted)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert gluon.runs_hopper_kernels(device) is runs
