"""`polybatch batch --server` and `polybatch chat --server` against a real server."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from server.server_helpers import RunningServer
from test_cli_batch import rows_of, texts_of, write_rows

from polybatch.cli.main import main

MODELS = ("base", "red")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer("stub:step_s=0.002", adapters={"red": "red"}) as running:
        yield running


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_rows(tmp_path / "in.jsonl", 60, models=MODELS)
    return tmp_path / "in.jsonl"


def run(*args: object) -> int:
    """Exit status of the command, run in this process."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_every_row_is_answered_and_the_summary_counts_them(
    server: RunningServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with source.open("a") as stream:
        stream.write('{"custom_id": "bad"}\n')
    write_rows(tmp_path / "more", 1, models=("nobody",))
    with source.open("a") as stream:
        stream.write((tmp_path / "more").read_text().replace('"r0"', '"unknown"'))
    out = tmp_path / "out.jsonl"
    assert run("batch", "--server", server.url, "-i", source, "-o", out, "--concurrency", 8) == 0
    rows = rows_of(out)
    assert len(rows) == 62
    statuses = {name: row["response"]["status_code"] for name, row in rows.items()}
    assert (statuses.pop("bad"), statuses.pop("unknown")) == (400, 404)
    assert set(statuses.values()) == {200}
    shown = capsys.readouterr().err
    assert "rows by red" in shown
    assert "rows with an error" in shown
    before = out.read_bytes()
    assert run("batch", "--server", f"{server.url}/v1", "-i", source, "-o", out, "--quiet") == 0
    assert out.read_bytes() == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_without_a_lost_or_repeated_row(
    server: RunningServer, source: Path, tmp_path: Path, how: signal.Signals
) -> None:
    write_rows(source, 120, models=MODELS, max_tokens=30)
    out = tmp_path / "out.jsonl"
    args = ["batch", "--server", server.url, "-i", str(source), "-o", str(out), "--concurrency", "4"]
    with subprocess.Popen(
        [sys.executable, "-m", "polybatch.cli.main", *args], stderr=subprocess.PIPE, text=True
    ) as process:
        while not out.exists() or out.read_bytes().count(b"\n") < 10:
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(process.pid, how)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == (-how if how is signal.SIGKILL else 128 + how)
    assert how is signal.SIGKILL or "Run the same command again" in said
    done = out.read_bytes().count(b"\n")
    assert 10 <= done < 120
    assert run(*args, "--quiet") == 0
    assert texts_of(out).keys() == {f"r{i}" for i in range(120)}
    server.until_idle()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "stub"], "--model is for an engine"),
        (["stub"], "--model is for an engine"),
        (["--dtype", "float32"], "--dtype is for an engine"),
        (["--adapter", "a=b"], "--adapter is for an engine"),
        (["--served-model-name", "x"], "--served-model-name"),
        (["--no-resume"], "--overwrite"),
        (["--server", "http://127.0.0.1:9"], "its server was"),
        (["--server", "nowhere"], "must be an address"),
    ],
)
def test_what_cannot_work_is_one_line_and_status_2(
    server: RunningServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str],
    said: str,
) -> None:  # fmt: skip
    out = tmp_path / "out.jsonl"
    assert run("batch", "--server", server.url, "-i", source, "-o", out, "--quiet") == 0
    before = out.read_bytes()
    assert run("batch", "--server", server.url, "-i", source, "-o", out, *args) == 2
    assert said in capsys.readouterr().err
    assert out.read_bytes() == before


def test_a_key_is_sent_and_a_wrong_one_ends_the_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunningServer(adapters={"red": "red"}, config={"api_keys": ("secret",)}) as running:
        args = ("batch", "--server", running.url, "-i", source, "-o", tmp_path / "out", "--quiet")
        assert run(*args, "--api-key", "wrong") == 2
        assert "refuses the key" in capsys.readouterr().err
        assert run("chat", "--server", running.url, "--api-key", "wrong") == 2
        assert "says 401 to /v1/models: the API key is wrong\n" in capsys.readouterr().err
        monkeypatch.setenv("POLYBATCH_API_KEY", "secret")
        assert run(*args) == 0
        assert len(texts_of(tmp_path / "out")) == 60


def chat(monkeypatch: pytest.MonkeyPatch, lines: list[str], *args: object) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    return run("chat", "--temperature", 0, "--max-tokens", 12, *args)


def test_a_chat_is_streamed_from_the_server_with_its_adapters(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(model: str, *messages: str) -> str:
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
        body = {"model": model, "messages": turns, "temperature": 0, "top_p": 0.95, "max_tokens": 12}
        response = server.client.post("/v1/chat/completions", content=json.dumps(body))
        text: str = response.json()["choices"][0]["message"]["content"]
        return text

    first = answer("base", "hello")
    second = answer("red", "hello", first, "more")
    assert chat(monkeypatch, ["hello", "/adapter red", "more", "/adapter x"], "--server", server.url) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{first}\n{second}\n"
    assert "no adapter is called 'x'; known: red" in shown.err


def test_a_chat_says_what_is_wrong_and_goes_on(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, ["x" * 2000, "hi"], "--server", server.url) == 0
    shown = capsys.readouterr()
    assert "max_model_len" in shown.err
    assert len(shown.out.strip()) > 0
    assert chat(monkeypatch, ["hi"], "--server", server.url, "--model", "nobody") == 0
    assert "not served here" in capsys.readouterr().err
    assert chat(monkeypatch, ["hi"], "--server", "http://127.0.0.1:9") == 2
    assert "does not answer" in capsys.readouterr().err
