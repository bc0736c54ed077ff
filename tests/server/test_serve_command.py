"""`polybatch serve` as a process: flags, config file, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from polybatch.cli.main import main
from polybatch.server.key_file import add_key
from polybatch.server.run import bind


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def command(*args: str, env: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server and its address."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "polybatch.cli.main", "serve", *args, "--port", str(port)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})},
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if process.poll() is not None:
                break
            try:
                httpx.get(f"{url}/health", timeout=5)
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def error_of(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "polybatch.cli.main", "serve", *args],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_sigterm_lets_running_requests_end(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(
        "model: stub:step_s=0.02\nadapter: [red=red]\nserved-model-name: base\ndrain_timeout: 1\n"
    )
    with command("--config", str(config), env={"POLYBATCH_API_KEY": "secret"}) as (process, url):
        headers = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{url}/ready").status_code == 401
        assert httpx.get(f"{url}/ready", headers=headers).status_code == 200
        short = {"model": "red", "prompt": "x", "max_tokens": 30, "ignore_eos": True, "stream": True}
        endless = short | {"max_tokens": 8000}
        with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
            with (
                client.stream("POST", "/v1/completions", json=short) as ending,
                client.stream("POST", "/v1/completions", json=endless) as cut,
            ):
                whole, part = ending.iter_lines(), cut.iter_lines()
                next(whole)
                next(part)
                process.send_signal(signal.SIGTERM)
                ended = [line for line in whole if line]
                stopped = [line for line in part if line]
            assert json.loads(ended[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
            assert "shutting down" in json.loads(stopped[-2].removeprefix("data: "))["error"]["message"]
            assert stopped[-1] == "data: [DONE]"
        assert process.wait(30) == 0


def test_sighup_reads_keys_again(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    old = add_key(path, "acme")
    with command("--model", "stub", "--api-keys", str(path)) as (process, url):

        def status(key: str) -> int:
            return httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

        assert status(old) == 200
        path.unlink()
        new = add_key(path, "acme")
        assert status(new) == 401
        process.send_signal(signal.SIGHUP)
        for _ in range(100):
            if status(new) == 200:
                break
            time.sleep(0.05)
        assert [status(new), status(old)] == [200, 401]
        assert process.poll() is None


def test_what_cannot_be_served_is_said_in_one_line(tmp_path: Path) -> None:
    missing = error_of("stub", "--adapter", "x=missing")
    assert missing.returncode == 2
    assert missing.stderr.splitlines()[-1].startswith("polybatch: error: adapter path 'missing'")
    assert "Traceback" not in missing.stderr


def test_giving_up_the_late_is_refused_under_a_policy_that_never_does() -> None:
    refused = error_of("stub", "--late-requests", "abort", "--scheduling-policy", "fair")
    assert refused.returncode == 2
    assert "the policy 'fair' never does: add --scheduling-policy deadline" in refused.stderr


def test_an_address_that_is_taken_is_found_out_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        for flags in (("--port", port), ("--host", "no.such.host.invalid")):
            refused = error_of("no-such-model", *flags)
            assert refused.returncode == 2
            assert refused.stderr.splitlines()[-1].startswith("polybatch: error: --host")
            assert "Traceback" not in refused.stderr


def test_a_port_of_the_systems_choice_is_bound_once() -> None:
    (sock,) = bind("localhost", 0)
    assert sock.getsockname()[1] > 0
    sock.close()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prot: 80\n", "'prot', which is no flag"),
        ("- a\n", "must hold a map"),
        ("a: [\n", "cannot be read"),
        ("config: x.yaml\n", "no flag"),
    ],
)
def test_a_bad_config_file_is_refused(
    tmp_path: Path, content: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        main(["serve", "stub", "--config", str(path)])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ("stub", "--adapter", "red=x", "--served-model-name", "red"),
        ("stub", "--max-n", "0"),
        ("stub", "--lora-modules", '{"name": "red"}'),
        ("stub", "--log-level", "loud"),
        ("stub", "--api-key", "a", "--admin-api-key", "a"),
        ("stub", "--engine-hang-timeout", "0"),
        ("stub", "--scheduling-policy", "luck"),
    ],
)
def test_a_bad_flag_is_refused(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", *args])
    assert caught.value.code == 2
    assert "polybatch: error:" in capsys.readouterr().err
