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

from polybatch.server.batches.store import Store


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


def upload(server: RunningServer, num_bytes: int) -> httpx.Response:
    form = {"file": ("in.jsonl", b" " * num_bytes)}
    return server.client.post("/v1/files", files=form, data={"purpose": "batch"})


@pytest.mark.parametrize("num_bytes", [10, 50 << 20])
def test_an_upload_to_a_full_disk_fails_alone_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    def full(self: Store) -> Path:
        path = self.work / "upload-to-a-full-disk"
        path.symlink_to("/dev/full")
        return path

    with RunningServer(config={"data_dir": tmp_path}) as server:
        before = sorted(tmp_path.rglob("*"))
        with monkeypatch.context() as patch:
            patch.setattr(Store, "upload_path", full)
            failed = upload(server, num_bytes)
            assert failed.status_code == 507
            assert failed.json()["error"]["code"] == "disk_full"
            assert server.complete(max_tokens=2).status_code == 200
        assert sorted(tmp_path.rglob("*")) == before
        assert upload(server, num_bytes).status_code == 200


def test_a_journal_on_a_full_disk_takes_no_file_and_no_batch(tmp_path: Path) -> None:
    with RunningServer(config={"data_dir": tmp_path}) as server:
        file_id = begin_upload(server)
        batches = server.state.batches
        assert batches is not None
        # SQLite answers as on a full disk.
        (num_pages,) = batches.store._db.execute("PRAGMA page_count").fetchone()
        batches.store._db.execute(f"PRAGMA max_page_count = {num_pages}")
        before = sorted(tmp_path.rglob("*"))
        large = {str(i): "x" * 512 for i in range(16)}
        body = {"input_file_id": file_id, "endpoint": "/v1/completions", "metadata": large}
        answer = server.client.post("/v1/batches", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
        assert sorted(tmp_path.rglob("*")) == before
        batches.store._db.execute("PRAGMA max_page_count = 1000000")
        assert server.client.post("/v1/batches", json=body).status_code == 200


def begin_upload(server: RunningServer) -> str:
    found: str = upload(server, 10).json()["id"]
    return found
