"""Half an hour of mixed traffic against the demo's model, as `python -m benchmarks.serving.soak` sends it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.serving import soak

SECONDS = float(os.environ.get("POLYBATCH_SOAK_S", "1800"))


@pytest.mark.slow
def test_mixed_traffic_hangs_no_client_leaks_no_page_and_leaves_memory_level(
    real_model: Path, tmp_path: Path
) -> None:
    found = soak.soak(SECONDS, tmp_path)
    assert soak.faults(found) == []
    assert found["num_tracebacks"] == 0
    level = found["level"]
    assert level["running"] == level["waiting"] == level["queued"] == level["pages"]["kv"] == 0
