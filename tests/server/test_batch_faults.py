"""Kill the engine, kill the server: a batch ends with every row answered once."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import openai
import pytest
from batch_helpers import begin, lines_of, row, until
from server_helpers import RunningServer
from test_serve_command import command

ROWS = [row(f"r{i}", f"prompt {i}", max_tokens=10 + i % 7, temperature=0) for i in range(300)]


def answers(client: openai.OpenAI, file_id: str | None) -> dict[str, str]:
    lines = lines_of(client, file_id)
    return {name: line["response"]["body"]["choices"][0]["text"] for name, line in lines.items()}


@pytest.mark.parametrize("num_kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killing_the_server_loses_and_repeats_no_row(
    tmp_path: Path, num_kills: int, server: RunningServer
) -> None:
    args = ("stub:step_s=0.005", "--served-model-name", "base", "--max-num-seqs", "8", "--max-model-len",
            "1000", "--data-dir", str(tmp_path))  # fmt: skip
    batch_id, seen, found = "", -1, {}
    for is_killed in [True] * num_kills + [False]:
        with command(*args) as (process, url):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
            batch_id = batch_id or begin(client, ROWS).id
            if not is_killed:
                found = answers(client, until(client, batch_id).output_file_id)
                break
            while True:
                counts = client.batches.retrieve(batch_id).request_counts
                assert counts is not None
                if counts.completed >= seen + 40:
                    break
                time.sleep(0.005)
            seen = counts.completed
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    assert found.keys() == {f"r{i}" for i in range(300)}
    for asked in ROWS[::50]:
        alone = server.complete(**asked["body"]).json()["choices"][0]["text"]
        assert found[asked["custom_id"]] == alone


def test_killing_the_engine_loses_and_repeats_no_row(tmp_path: Path) -> None:
    config = {"data_dir": tmp_path}
    with RunningServer("stub:step_s=0.005", config=config, max_num_seqs=16) as running:
        batch = begin(running.openai, ROWS)
        for target in (50, 150):
            while running.openai.batches.retrieve(batch.id).request_counts.completed < target:  # type: ignore[union-attr]
                time.sleep(0.005)
            pid = running.llm.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        done = until(running.openai, batch.id, limit_s=120)
        assert (done.status, done.error_file_id) == ("completed", None)
        assert answers(running.openai, done.output_file_id).keys() == {f"r{i}" for i in range(300)}
        assert running.llm.num_restarts >= 1


def test_an_orderly_shutdown_does_not_wait_for_batches_and_the_next_server_goes_on(tmp_path: Path) -> None:
    config = {"data_dir": tmp_path}
    rows = [row(f"r{i}", max_tokens=100) for i in range(40)]
    with RunningServer("stub:step_s=0.005", config=config, max_num_seqs=4) as running:
        batch = begin(running.openai, rows)
        while running.openai.batches.retrieve(batch.id).request_counts.completed < 4:  # type: ignore[union-attr]
            time.sleep(0.005)
    with RunningServer(config=config) as running:
        done = until(running.openai, batch.id)
        assert (done.status, done.request_counts.completed) == ("completed", 40)  # type: ignore[union-attr]
        assert lines_of(running.openai, done.output_file_id).keys() == {f"r{i}" for i in range(40)}


@pytest.mark.parametrize("stage", ["split", "place", "record"])
def test_finalizing_twice_makes_the_same_files(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polybatch.server.batches import process
    from polybatch.server.batches.objects import Batch, StoredFile
    from polybatch.server.batches.process import BatchProcess
    from polybatch.server.batches.store import Store

    original = BatchProcess._split
    calls = []

    def split(self: BatchProcess, job: object) -> object:
        calls.append(1)
        if stage == "split" and len(calls) == 1:
            raise OSError("disk full")
        made = original(self, job)  # type: ignore[arg-type]
        if stage == "place" and len(calls) == 1:
            raise OSError("disk full")
        return made

    recorded = Store.update_batch

    def record(self: Store, batch: Batch, files: Sequence[StoredFile] = ()) -> None:
        if stage == "record" and batch.status.is_over and len(calls) == 1:
            raise sqlite3.OperationalError("database or disk is full")
        recorded(self, batch, files)

    monkeypatch.setattr(process.BatchProcess, "_split", split)
    monkeypatch.setattr(Store, "update_batch", record)
    monkeypatch.setattr("polybatch.server.batches.service.RETRY_S", 0.05)
    with RunningServer(config={"data_dir": tmp_path}) as running:
        done = until(running.openai, begin(running.openai, [row("a"), row("b", flavour="x")]).id)
        assert len(calls) == 2
        assert lines_of(running.openai, done.output_file_id).keys() == {"a"}
        assert lines_of(running.openai, done.error_file_id).keys() == {"b"}
        assert len(running.openai.files.list(purpose="batch_output").data) == 2
        assert len(list((tmp_path / "files").iterdir())) == 3


def test_a_row_that_always_fails_the_engine_becomes_an_error_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes no other row with it."""
    from polybatch.engine.async_llm import EngineDownError
    from polybatch.server.generation import Generation

    original = Generation.collect

    async def collect(self: Generation) -> object:
        if "poison" in str(self.texts):
            self.close()
            raise EngineDownError("the engine process ended while it worked on this")
        return await original(self)

    monkeypatch.setattr(Generation, "collect", collect)
    with RunningServer(config={"data_dir": tmp_path}) as running:
        rows = [row("bad", "poison"), *(row(f"r{i}") for i in range(20))]
        done = until(running.openai, begin(running.openai, rows).id)
        assert len(lines_of(running.openai, done.output_file_id)) == 20
        (error,) = lines_of(running.openai, done.error_file_id).values()
        assert error["response"]["status_code"] == 503
        assert httpx.get(f"{running.url}/health").status_code == 200
        assert running.state.batches is not None
        assert running.state.batches.capacity.num_in_flight == 0


def test_a_batch_is_over_only_once_its_files_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polybatch.server.batches.objects import Batch, StoredFile
    from polybatch.server.batches.store import Store

    recorded = Store.update_batch

    def record(self: Store, batch: Batch, files: Sequence[StoredFile] = ()) -> None:
        if batch.status.is_over:
            time.sleep(0.3)
        recorded(self, batch, files)

    monkeypatch.setattr(Store, "update_batch", record)
    with RunningServer(config={"data_dir": tmp_path}) as running:
        done = until(running.openai, begin(running.openai, [row("a")]).id)
        assert lines_of(running.openai, done.output_file_id).keys() == {"a"}


def test_a_record_that_fails_halfway_leaves_nothing_and_can_be_made_again(tmp_path: Path) -> None:
    from test_batch_slots import batch

    from polybatch.server.batches.objects import StoredFile
    from polybatch.server.batches.store import Store

    store = Store(tmp_path)
    files = [
        StoredFile(id=name, tenant="", filename="f", purpose="batch_output", size=1, created_s=0)
        for name in ("first", "second")
    ]
    full = "BEFORE INSERT ON files WHEN NEW.id = 'second' BEGIN SELECT RAISE(ABORT, 'disk full'); END"
    store._db.execute(f"CREATE TRIGGER full {full}")
    with pytest.raises(sqlite3.Error):
        store.update_batch(batch(), files)
    assert store.file("first", "", 0.0) is None
    store._db.execute("DROP TRIGGER full")
    store.update_batch(batch(), files)
    assert store.file("first", "", 0.0) is not None
    store.close()
