"""`polybatch selfcheck` as users meet it: the table, the exit status, their own prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import tiny_model

from polybatch.bench.random_adapters import write_adapters
from polybatch.cli.main import main
from polybatch.engine import selfcheck
from polybatch.engine.selfcheck import CheckRow
from polybatch.models.hugging_face import open_directory

FLAGS = ("--dtype", "float32", "--memory", "64MiB", "--threads", "1")


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["selfcheck", *args])
    code = caught.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[str, list[str]]:
    """A tiny model with room for the built-in prompts, and the flags of two adapters."""
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    spec = open_directory(tmp_path / "model").spec
    folders = write_adapters(spec, {"red": 4, "blue": 9}, tmp_path)
    return str(tmp_path / "model"), [f"--adapter={name}={folder}" for name, folder in folders.items()]


def test_sound_adapters_pass_with_a_line_each(
    checkpoint: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapters = checkpoint
    assert run(model, *adapters, *FLAGS) == 0
    shown = capsys.readouterr()
    words = [line.split() for line in shown.out.splitlines()]
    for start in (["(base)", "alone"], ["transformers"], ["red", "alone"], ["merged"], ["peft"], ["blue"]):
        assert any(line[: len(start)] == start and line[-1] == "ok" for line in words), start
    assert "preemptions" in shown.err


def test_own_prompts_are_read_one_per_line(
    checkpoint: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapters = checkpoint
    prompts = tmp_path / "prompts.txt"
    start = "a line that is long enough to be shared by pages"
    prompts.write_text("\n\n".join(f"{start} {end}" for end in ("one", "two", "three", "four")) + "\n")
    assert run(model, *adapters, *FLAGS, "--prompts", str(prompts)) == 0
    assert "12 prompts" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "message"), [("\n \n", "has no prompts"), (None, "cannot be read")])
def test_prompts_that_are_missing_are_refused(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    if content is not None:
        prompts.write_text(content)
    assert run("nowhere", "--prompts", str(prompts)) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_adapter_folder_ends_with_status_2(
    checkpoint: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoint[0], "--adapter", "green=/nowhere", *FLAGS) == 2
    assert "/nowhere" in capsys.readouterr().err


def test_a_difference_ends_with_status_1_and_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        CheckRow("red", "alone", 6, 120, 0, 0, 0.0, 0.0, ok=True),
        CheckRow("red", "merged", 6, 120, 3, 1, 0.25, 1e-3, ok=False),
        CheckRow("red", "peft", 0, 0, 0, 0, 0.0, 0.0, ok=True, note="not installed"),
    ]
    monkeypatch.setattr(selfcheck, "run", lambda model, adapters, **settings: rows)
    assert run("anything", "--adapter", "red=somewhere") == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["merged", "6", "120", "3", "1", "2.5e-01", "0.001", "differs"] in lines
    assert ["peft", "not", "installed"] in lines
