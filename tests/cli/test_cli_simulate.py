"""`polybatch simulate`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polybatch.cli.main import app
from polybatch.errors import ConfigError


def run(*args: str) -> str:
    result = CliRunner().invoke(app, ["simulate", *args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_policies_are_compared_in_one_table_and_one_file(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    few = ("--set", "duration_s=20", "--rate", "2")
    text = run("-w", "slora", *few, "--policy", "fcfs,fair", "--slo", "ttft=6", "--json", str(out))
    assert "attainment" in text
    assert "fair" in text
    assert "simulated on h100-8b\n" in text
    content = json.loads(out.read_text())
    assert set(content["policies"]) == {"fcfs", "fair"}
    assert content["policies"]["fcfs"]["num_completed"] == 40


def test_a_trace_runs_on_several_engines_together_or_apart(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    row = {"num_input": 500, "num_output": 20}
    trace.write_text("\n".join(json.dumps({"arrival_s": 0.1 * i, **row}) for i in range(30)))
    for args in (
        ("--replicas", "2"),
        ("--disaggregate", "1:2"),
        ("--machine", "h100-8b", "--machine", "cpu-135m"),
    ):
        out = tmp_path / "o.json"
        run("--trace", str(trace), "--json", str(out), *args)
        content = json.loads(out.read_text())
        assert content["policies"]["fcfs"]["num_completed"] == 30
        assert len(content["machines"]) == (3 if args[0] == "--disaggregate" else 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "one of --trace and --workload"),
        (("-w", "slora", "-t", "x"), "one of --trace and --workload"),
        (("-w", "nope"), "workload is 'nope'"),
        (("-w", "slora", "--policy", "best"), "policy is 'best'"),
        (("-w", "slora", "--router", "best"), "router is 'best'"),
        (("-w", "slora", "--machine", "best"), "machine is 'best'"),
        (("-w", "slora", "--slo", "best"), "slo is 'best'"),
        (("-w", "slora", "--rate", "0"), "rate is 0"),
        (("-w", "slora", "--disaggregate", "2"), "--disaggregate is '2'"),
        (("-w", "slora", "--disaggregate", "1:1", "--replicas", "2"), "leave --replicas out"),
        (("-w", "batchllm", "--rate", "2"), "no parameter 'rate'"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(args: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["simulate", *args], catch_exceptions=False)


def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    run("-w", "slora", "--set", "duration_s=5", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
