"""Flags of live service: times of stages, the slowdown by rows, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from polybatch.cli.main import app
from polybatch.cli.service_flags import stage_times_of
from polybatch.engine import async_llm
from polybatch.engine.config import EngineConfig
from polybatch.errors import ConfigError


class CapturedError(Exception):
    """Ends `serve` before anything is started."""


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `serve` with these flags would give the engine."""
    pytest.importorskip("uvloop")

    class Capture:
        def __init__(self, *args: Any, **settings: Any) -> None:
            raise CapturedError(settings)

    monkeypatch.setattr(async_llm, "AsyncLLM", Capture)

    def settings_of(*flags: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, ["serve", "stub", *flags])
        assert isinstance(result.exception, CapturedError), result.output
        found: dict[str, Any] = result.exception.args[0]
        return found

    return settings_of


def test_times_of_stages_come_as_pairs_and_files(tmp_path: Path, settings: Any) -> None:
    path = tmp_path / "stages.json"
    path.write_text(json.dumps({"draft": 2, "a=b": 0.5}))
    assert stage_times_of(["check=1.5", str(path)]) == {"check": 1.5, "draft": 2, "a=b": 0.5}
    assert settings("--stage-times", "check=1.5", "--stage-times", str(path))["stage_times"] == {
        "check": 1.5, "draft": 2, "a=b": 0.5,
    }  # fmt: skip
    assert settings()["stage_times"] is None
    assert EngineConfig(stage_times={"draft": 2}).stage_times == {"draft": 2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["draft"], "must be NAME=SECONDS"),
        (["draft=soon"], "must be NAME=SECONDS"),
        (["draft=0"], "'draft' is 0.0; it must be a positive number"),
        (["draft=nan"], "positive number"),
        (["draft=inf"], "positive number"),
        (["=1"], "must be a name"),
        (["draft=1", "draft=2"], "'draft' twice"),
        (["missing.json"], "missing.json cannot be read"),
    ],
)
def test_what_is_no_time_of_a_stage_is_refused_by_name(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage_times_of(given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must hold a map"),
        ("{", "cannot be read"),
        ('{"a": "1"}', "'a' is '1'"),
        ('{"a": true}', "'a'"),
    ],
)
def test_a_file_of_stages_must_map_names_to_seconds(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "stages.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        stage_times_of([str(path)])


def test_the_slowdown_by_rows_can_be_switched_off(tmp_path: Path, settings: Any) -> None:
    assert settings()["service"] is None
    assert settings("--batch-slowdown", "none")["service"]["batch_slowdown"] is None
    assert settings("--batch-slowdown", "0.2")["service"]["batch_slowdown"] == 0.2
    config = tmp_path / "serve.yaml"
    config.write_text("batch-slowdown: none\n")
    assert settings("--config", str(config))["service"]["batch_slowdown"] is None
    result = CliRunner().invoke(app, ["serve", "stub", "--batch-slowdown", "fast"])
    assert result.exit_code == 2
    assert "neither a number nor none" in result.output


def test_the_simulator_takes_both(tmp_path: Path) -> None:
    attainment = {}
    for name, flags in {
        "unknown": [],
        "known": ["--stage-times", "candidates=60", "--service", "batch_slowdown=none"],
    }.items():
        out = tmp_path / f"{name}.json"
        args = [
            "simulate",
            "-w",
            "hexgen",
            "--set",
            "num_questions=12",
            "--rate",
            "3",
            "--policy",
            "deadline",
            *flags,
        ]
        result = CliRunner().invoke(app, [*args, "--json", str(out)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        attainment[name] = json.loads(out.read_text())["policies"]["deadline"]
    assert attainment["known"] != attainment["unknown"]
