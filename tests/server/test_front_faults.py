"""The HTTP process dies, or its disk is full."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from server_helpers import RunningServer
from test_serve_command import command

from polybatch.server.batches.upload import Upload


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    """Whether it steps on; a process that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_the_engine_ends_when_its_front_is_killed() -> None:
    with command("stub") as (process, _):
        started = children(process.pid)
        assert started
        os.kill(process.pid, signal.SIGKILL)
        end = time.monotonic() + 30
        while any(map(is_running, started)):
            assert time.monotonic() < end, "the engine process goes on without a front"
            time.sleep(0.02)


def test_an_upload_to_a_full_disk_fails_alone_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(self: Upload, least: int) -> bytes:
        raise OSError(28, "No space left on device")

    with RunningServer(config={"data_dir": tmp_path}) as server:
        before = sorted(tmp_path.rglob("*"))
        with monkeypatch.context() as patch:
            patch.setattr(Upload, "take", take)
            form = {"files": {"file": ("in.jsonl", b"{}\n")}, "data": {"purpose": "batch"}}
            # On a connection of its own: one that had such an error is closed.
            failed = httpx.post(f"{server.url}/v1/files", **form)  # type: ignore[arg-type]
            assert failed.status_code == 500
            assert server.complete(max_tokens=2).status_code == 200
        assert sorted(tmp_path.rglob("*")) == before
        assert server.client.post("/v1/files", **form).status_code == 200  # type: ignore[arg-type]
