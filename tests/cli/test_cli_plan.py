"""`polybatch plan`: what it answers and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polybatch.cli.main import app
from polybatch.errors import ConfigError

QUESTION = (
    "plan", "-w", "slora", "--set", "num_adapters=20", "--set", "ranks=16", "--set", "duration_s=5",
    "--slo", "ttft=0.3", "--chunks", "2048", "--traffic-seconds", "2", "--seconds", "0",
)  # fmt: skip


def run(*args: str) -> str:
    result = CliRunner().invoke(app, [*QUESTION, *args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_question_is_answered_in_a_sentence_a_table_and_a_file(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    text = run("--rate", "8", "--json", str(out))
    assert "Yes: at 8 requests/s" in text
    assert "Best: h100-8b" in text
    content = json.loads(out.read_text())
    assert content["best"] == "h100-8b, steps of 2,048"
    assert content["num_devices"] == 1
    assert content["asked"]["attainment"] >= 0.9


def test_a_plan_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    run("--plot", str(picture))
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--chunks", "many"), "--chunks is 'many'"),
        (("--tensor-parallel", "0"), "--tensor-parallel is '0'"),
        (("--machine", "abacus"), "machine is 'abacus'"),
        (("--slo", "fast"), "slo is 'fast'"),
        (("--policy", "luck"), "luck"),
    ],
)
def test_bad_options_are_refused_by_name(args: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, [*QUESTION, *args], catch_exceptions=False)
