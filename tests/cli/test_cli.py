"""Commands besides batch, and what all of them share."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys

import pytest

from polybatch import __version__
from polybatch.cli.info import show_bytes
from polybatch.cli.main import main
from polybatch.cli.progress import duration


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom polybatch.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("batch", "chat", "serve", "info", "bench", "selfcheck"):
        assert command in result.stdout


def test_every_command_explains_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("batch", "chat", "serve", "info", "bench", "selfcheck"):
        assert run(command, "--help") == 0
        assert "--max-model-len" in capsys.readouterr().out


def test_paragraphs_of_help_are_filled_for_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("bench", "--help") == 0
    shown = capsys.readouterr().out
    paragraph = [
        line.strip() for line in shown[shown.index("W1 is one") : shown.index("Arguments")].splitlines()
    ]
    lines = paragraph[: paragraph.index("")]
    for line, after in itertools.pairwise(lines):
        assert len(line) + len(after.split()[0]) >= 77


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-num-seqs", "0"], "--max-num-seqs is 0; it must be"),
        (["--max-model-len=-1", "--memory", "1GiB"], "--max-model-len is -1; it must be"),
        (["--memory", "much"], "--memory is 'much'; it must be"),
    ],
)
def test_a_wrong_setting_is_named_by_the_flag_that_was_typed(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("info", *flags) == 2
    assert capsys.readouterr().err.startswith(f"polybatch: error: {said}")


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"polybatch {__version__}\n"


def test_info_shows_model_memory_kernels_and_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "stub", "--adapter", "red=somewhere") == 0
    shown = capsys.readouterr().out
    for text in ("vocabulary", "32,768 for KV and adapters", "16 tokens, 128 bytes", "pseudo-random", "red"):
        assert text in shown


def chat(monkeypatch: pytest.MonkeyPatch, typed: str, *args: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return run("chat", "stub", "--temperature", "0", "--max-tokens", "12", *args)


def test_chat_answers_a_pipe_line_by_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "one\n\n/reset\none\n/adapter red\n/reset\none\n", "--adapter", "red=x") == 0
    shown = capsys.readouterr()
    first, again, red = shown.out.removesuffix("\n").split("\n")[:3]
    assert first
    assert first == again != red
    assert "answering with red" in shown.err


def test_chat_remembers_until_reset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "one\none\n") == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first != second


def test_chat_survives_wrong_commands_and_messages_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = "/dance\n/adapter nobody\n" + "x" * 300 + "\nshort\n/quit\nnever\n"
    assert chat(monkeypatch, typed, "--max-model-len", "100") == 0
    shown = capsys.readouterr()
    assert "no command is called /dance" in shown.err
    assert "no adapter is called 'nobody'" in shown.err
    assert "max_model_len is 100" in shown.err
    assert len(shown.out.strip()) > 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (61, "1m01s"), (3599.6, "1h00m"), (7380, "2h03m")]
)
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(1023, "1023 bytes"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB"), (5 << 40, "5,120.0 GiB")],
)
def test_bytes_read_naturally(count: int, text: str) -> None:
    assert show_bytes(count) == text
