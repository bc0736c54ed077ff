"""`--chat-template`: refused where there is none to replace, part of what a job is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polybatch.cli.batch import _facts
from polybatch.cli.main import main
from polybatch.cli.options import EngineOptions
from polybatch.errors import ConfigError

OWN = "{{ messages[0].content }}"


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", [("batch", "-i", "IN", "-o", "OUT"), ("chat",), ("plan-job", "IN")])
def test_the_stub_has_no_template_to_replace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    body = {"model": "stub", "prompt": "x"}
    source = tmp_path / "in.jsonl"
    source.write_text(
        json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body})
    )
    args = [{"IN": str(source), "OUT": str(tmp_path / "out.jsonl")}.get(arg, arg) for arg in command]
    assert "the stub has none" in error_of(capsys, *args, "--model", "stub", "--chat-template", OWN)


@pytest.mark.parametrize("command", [("batch", "-i", "in.jsonl", "-o", "out.jsonl"), ("chat",)])
def test_through_a_server_the_template_is_the_servers_to_choose(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    told = error_of(capsys, *command, "--server", "http://127.0.0.1:9", "--chat-template", OWN)
    assert "--chat-template is the server's to choose" in told


def test_a_job_goes_on_only_with_the_template_that_it_began_with(tmp_path: Path) -> None:
    engine, path = EngineOptions(model="stub"), tmp_path / "own.jinja"
    path.write_text(OWN)
    assert _facts(engine, None, str(path)) == _facts(engine, None, OWN)
    assert _facts(engine, None, OWN) != _facts(engine, None, OWN + "!")
    assert "chat_template" not in _facts(engine, None, None)
    with pytest.raises(ConfigError, match="chat_template"):
        _facts(engine, None, str(tmp_path / "missing"))
