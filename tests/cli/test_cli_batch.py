"""The batch command as a user meets it: exit status, messages, resuming after signals and kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polybatch.cli.main import main

COMMAND = [sys.executable, "-m", "polybatch.cli.main", "batch"]


def write_rows(path: Path, count: int, *, max_tokens: int = 8, models: tuple[str, ...] = ("stub",)) -> None:
    with path.open("w") as stream:
        for i in range(count):
            body = {
                "model": models[i % len(models)],
                "messages": [{"role": "user", "content": f"message {i}"}],
                "max_tokens": max_tokens,
                "ignore_eos": True,
            }
            row = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            stream.write(json.dumps(row) + "\n")


def run(*args: object) -> int:
    """Exit status of the command, run in this process."""
    with pytest.raises(SystemExit) as caught:
        main(["batch", "--model", "stub", *map(str, args)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def rows_of(path: Path) -> dict[str, dict]:
    lines = path.read_bytes().splitlines()
    rows = {row["custom_id"]: row for row in map(json.loads, lines)}
    assert len(rows) == len(lines)
    return rows


def texts_of(path: Path) -> dict[str, str]:
    return {
        name: row["response"]["body"]["choices"][0]["message"]["content"]
        for name, row in rows_of(path).items()
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_rows(tmp_path / "in.jsonl", 30, models=("stub", "red", "blue"))
    return tmp_path / "in.jsonl"


def test_rows_of_base_and_adapters_share_a_job_and_the_summary_counts_them(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert run("-i", source, "-o", out, "--adapter", "red=x", "--lora-modules", "blue=y") == 0
    assert len(texts_of(out)) == 30
    shown = capsys.readouterr()
    assert shown.out == ""
    for name in ("stub", "red", "blue"):
        assert f"rows by {name}" in shown.err
    assert "240" in shown.err


def test_bad_lines_do_not_change_the_exit_status(source: Path, tmp_path: Path) -> None:
    assert run("-i", source, "-o", tmp_path / "out.jsonl", "--quiet") == 0
    statuses = {row["response"]["status_code"] for row in rows_of(tmp_path / "out.jsonl").values()}
    assert statuses == {200, 404}


def test_the_summary_says_what_is_wrong_with_some_of_the_lines(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("-i", source, "-o", tmp_path / "out.jsonl") == 0
    _, found = capsys.readouterr().err.split("lines that are wrong, for example:\n")
    red, blue = found.splitlines()
    assert red.startswith("  line 2: model 'red' is not known here")
    assert blue.startswith("  line 3: model 'blue' is not known here")


def test_answers_do_not_depend_on_how_many_run_at_once(source: Path, tmp_path: Path) -> None:
    adapters = ("--adapter", "red=x", "--adapter", "blue=y", "--quiet")
    assert run("-i", source, "-o", tmp_path / "1", "--max-num-seqs", 1, *adapters) == 0
    assert run("-i", source, "-o", tmp_path / "9", "--max-num-seqs", 9, *adapters) == 0
    assert texts_of(tmp_path / "1") == texts_of(tmp_path / "9")


def test_another_name_for_the_base_model_may_be_served(source: Path, tmp_path: Path) -> None:
    names = ("--served-model-name", "red", "--served-model-name", "blue")
    assert run("-i", source, "-o", tmp_path / "out", "--quiet", *names) == 0
    assert all(row["error"] is None for row in rows_of(tmp_path / "out").values())


def test_quiet_is_silent(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-i", source, "-o", tmp_path / "out", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seed", "1"], "its seed was 0, now it is 1"),
        (["--dtype", "float32"], "its dtype was auto, now it is float32"),
        (["--adapter", "red=x"], "its adapters was none, now it is red=x"),
        (["--no-resume"], "--overwrite"),
        (["--adapter", "red"], "must be NAME=DIR"),
        (["--adapter", "stub=x"], "base model's name"),
        (["--adapter", "a=x", "--adapter", "a=y"], "given twice"),
        (["--adapter", "a=x", "--served-model-name", "a"], "also an adapter's name"),
        (["other-model"], "given twice"),
    ],
)
def test_what_cannot_work_is_one_line_on_stderr_and_status_2(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    out = tmp_path / "out.jsonl"
    assert run("-i", source, "-o", out, "--quiet") == 0
    before = out.read_bytes()
    assert run("-i", source, "-o", out, *args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("polybatch: error: ")
    assert error.count("\n") == 1
    assert out.read_bytes() == before


def test_a_missing_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-i", tmp_path / "nowhere", "-o", tmp_path / "out") == 2
    assert "nowhere is not a file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def wait_for_rows(process: subprocess.Popen[str], out: Path, size: int) -> None:
    while process.poll() is None and (not out.exists() or out.stat().st_size < size):
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "status", "flags", "again"),
    [
        (signal.SIGINT, 130, ["--overwrite"], "again without --overwrite to"),
        (signal.SIGTERM, 143, [], "again to"),
    ],
)
def test_a_signal_ends_the_step_keeps_results_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, status: int, flags: list[str], again: str
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, 2000)
    args = [*COMMAND, "-i", str(source), "-o", str(out), "--model", "stub", "--max-num-seqs", "4", *flags]
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
    wait_for_rows(process, out, 1)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == status
    assert f"Run the same command {again} go on." in error
    assert "Traceback" not in error
    done = len(rows_of(out))
    assert 0 < done < 2000
    assert f"stopped: {done:,} of 2,000 rows" in error


@pytest.mark.slow
def test_kill_9_at_random_points_of_the_command_loses_and_repeats_nothing(tmp_path: Path) -> None:
    source, out, rng = tmp_path / "in.jsonl", tmp_path / "out.jsonl", random.Random(1)
    write_rows(source, 3000)
    args = [*COMMAND, "-i", str(source), "-o", str(out), "--model", "stub", "--max-num-seqs", "16"]
    kills = 0
    while True:
        process = subprocess.Popen(args, stderr=subprocess.DEVNULL, text=True)
        wait_for_rows(process, out, (out.stat().st_size if out.exists() else 0) + rng.randrange(400_000))
        if process.poll() is not None:
            assert process.returncode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    whole = tmp_path / "whole.jsonl"
    assert run("-i", source, "-o", whole, "--quiet", "--max-num-seqs", 16) == 0
    assert texts_of(out) == texts_of(whole)
