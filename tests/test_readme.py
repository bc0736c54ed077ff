"""The README's commands and snippets run as written.

A comment before a block says what it needs: `test: stub` nothing, `test: model` the demo's model,
`test: client` the server that the block `test: server` starts, here over the stub and on a free port.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"<!-- test: (\w+) -->\n```(\w+)\n(.*?)```", README, re.DOTALL)


def run_block(language: str, code: str, folder: Path) -> str:
    """Run a block where its relative paths mean what they mean in the checkout."""
    (folder / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "sh" else [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("language", "code"), [(lang, code) for needs, lang, code in BLOCKS if needs == "stub"]
)
def test_blocks_that_need_no_model_run(tmp_path: Path, language: str, code: str) -> None:
    run_block(language, code, tmp_path)


@pytest.mark.usefixtures("real_model")
@pytest.mark.parametrize(
    ("language", "code"), [(lang, code) for needs, lang, code in BLOCKS if needs == "model"]
)
def test_blocks_that_need_the_model_run(tmp_path: Path, language: str, code: str) -> None:
    run_block(language, code, tmp_path)


def test_blocks_for_the_server_run_against_it(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    (start,) = [code for needs, _, code in BLOCKS if needs == "server"]
    clients = [(language, code) for needs, language, code in BLOCKS if needs == "client"]
    assert {language for language, _ in clients} == {"sh", "python"}
    assert "8000" in start
    command = [sys.executable, "-m", "polybatch.cli.main", *start.replace("8000", port).split()[1:]]
    server = subprocess.Popen([*command, "--model", "stub"], cwd=ROOT)
    try:
        deadline_s = time.monotonic() + 60
        while not is_ready(f"http://127.0.0.1:{port}/ready"):
            assert server.poll() is None
            assert time.monotonic() < deadline_s, "the server does not get ready"
            time.sleep(0.1)
        for i, (language, code) in enumerate(clients):
            (tmp_path / str(i)).mkdir()
            assert run_block(language, code.replace("localhost:8000", f"127.0.0.1:{port}"), tmp_path / str(i))
        assert httpx.get(f"http://127.0.0.1:{port}/dashboard").status_code == 200
    finally:
        server.terminate()
        assert server.wait(60) == 0


def is_ready(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.ConnectError:
        return False


def test_the_adapters_accuracies_are_those_measured() -> None:
    results = json.loads((ROOT / "examples/adapters/results.json").read_text())
    for name, measured in results.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| [{name}]"))
        assert re.findall(r"(\d+%)", row) == [f"{measured[of]:.0%}" for of in ("base_instructed", "adapter")]


def test_all_kinds_of_blocks_are_found() -> None:
    assert {needs for needs, _, _ in BLOCKS} == {"stub", "model", "server", "client"}


def test_every_file_that_the_readme_links_to_exists() -> None:
    missing = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not (ROOT / link).exists()]
    assert missing == []


def test_every_command_of_the_readme_exists() -> None:
    from polybatch.cli.main import app

    known = {command.name for command in (*app.registered_commands, *app.registered_groups)}
    assert set(re.findall(r"(?:^|`|\| )polybatch ([a-z]+)", README, re.MULTILINE)) <= known


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
