"""Whatever interrupts a job, going on with it answers every line exactly once."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from job_helpers import FACTS, EchoEngine, answer, completion_line, read_output, run_job, write_input

from polybatch.errors import ConfigError, EngineError
from polybatch.jobs import output as output_module
from polybatch.jobs.job import journal_path, open_job, weights_fingerprint
from polybatch.jobs.output import OutputFile

PROGRAM = Path(__file__).with_name("job_helpers.py")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    write_input(path, 60)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def check_complete(out: Path, count: int = 60) -> None:
    rows = read_output(out)
    assert sorted(row["custom_id"] for row in rows) == sorted(f"row-{i}" for i in range(count))
    for row in rows:
        prompt = row["custom_id"].replace("row-", "prompt ")
        assert row["response"]["body"]["choices"][0]["text"] == answer(prompt)


def start(source: Path, out: Path, step_s: float, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(PROGRAM), str(source), str(out), str(step_s), *more])


def test_kill_9_at_random_points_loses_and_repeats_nothing(tmp_path: Path, out: Path) -> None:
    source, rng = tmp_path / "in.jsonl", random.Random(0)
    write_input(source, 1500)
    kills = 0
    while True:
        process = start(source, out, 0.003)
        grown = out.stat().st_size if out.exists() else 0
        wanted = grown + rng.randrange(1, 120_000)
        while process.poll() is None and (not out.exists() or out.stat().st_size < wanted):
            time.sleep(0.001)
        if process.poll() is not None:
            assert process.returncode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    check_complete(out, 1500)


def test_kill_9_while_the_input_is_being_indexed_loses_nothing(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "in.jsonl"
    write_input(source, 20_000)
    process = start(source, out, 0.0)
    while not journal_path(out).exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    job = open_job(source, out, FACTS)
    assert job.journal.counts()[0] == 20_000
    job.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), keep_journal=st.booleans())
def test_any_torn_tail_is_mended(tmp_path: Path, source: Path, cut: int, keep_journal: bool) -> None:
    out = tmp_path / "torn.jsonl"
    run_job(source, out, overwrite=True)
    with out.open("rb+") as stream:
        stream.truncate(out.stat().st_size - cut)
    if not keep_journal:
        journal_path(out).unlink()
    run_job(source, out)
    check_complete(out)


def test_results_newer_than_the_journal_are_kept(source: Path, out: Path) -> None:
    run_job(source, out)
    whole = out.read_bytes()
    with sqlite3.connect(journal_path(out)) as db:
        db.execute("UPDATE rows SET state = 0 WHERE line > 10")
    lines = whole.splitlines(keepends=True)
    old = [line for line in lines if int(json.loads(line)["id"].removeprefix("batch_req_")) <= 10]
    new = [line for line in lines if line not in old]
    out.write_bytes(b"".join(old + new))
    with sqlite3.connect(journal_path(out)) as db:
        db.execute("UPDATE facts SET value = ? WHERE name = 'output_bytes'", (str(sum(map(len, old))),))
    engine = EchoEngine()
    run_job(source, out, engine)
    assert engine.submitted == []
    check_complete(out)


def test_a_lost_block_after_the_journaled_bytes_is_cut_and_done_again(source: Path, out: Path) -> None:
    run_job(source, out)
    with sqlite3.connect(journal_path(out)) as db:
        db.execute("UPDATE rows SET state = 0")
        first = len(out.read_bytes().splitlines(keepends=True)[0])
        line = int(json.loads(out.read_bytes().splitlines()[0])["id"].removeprefix("batch_req_"))
        db.execute("UPDATE rows SET state = 1 WHERE line = ?", (line,))
        db.execute("UPDATE facts SET value = ? WHERE name = 'output_bytes'", (str(first),))
    data = bytearray(out.read_bytes())
    data[first + 100 : first + 300] = b"\0" * 200
    out.write_bytes(data)
    run_job(source, out)
    check_complete(out)


def test_a_deleted_journal_is_rebuilt_from_the_output(source: Path, out: Path) -> None:
    run_job(source, out)
    journal_path(out).unlink()
    engine = EchoEngine()
    run_job(source, out, engine)
    assert engine.submitted == []
    check_complete(out)


def test_a_deleted_output_begins_afresh(source: Path, out: Path) -> None:
    run_job(source, out)
    out.unlink()
    run_job(source, out, facts={"model": "other"})
    check_complete(out)


def test_error_lines_count_as_answered(source: Path, out: Path) -> None:
    source.write_text("not JSON\n" + completion_line("x", "explode"))
    run_job(source, out)
    engine = EchoEngine()
    journal_path(out).unlink()
    progress = run_job(source, out, engine).progress
    assert engine.submitted == []
    assert (progress.ok, progress.errors) == (0, 2)


@pytest.mark.parametrize("journal_survives", [True, False])
def test_a_changed_input_is_refused_and_overwrite_is_the_way_out(
    source: Path, out: Path, journal_survives: bool
) -> None:
    run_job(source, out)
    before = out.read_bytes()
    source.write_text(completion_line("new", "prompt"))
    if not journal_survives:
        journal_path(out).unlink()
    with pytest.raises(ConfigError, match="--overwrite"):
        run_job(source, out)
    assert out.read_bytes() == before
    run_job(source, out, overwrite=True)
    assert [row["custom_id"] for row in read_output(out)] == ["new"]


@pytest.mark.parametrize("journal_survives", [True, False])
def test_another_model_or_parameter_is_refused_by_name(
    source: Path, out: Path, journal_survives: bool
) -> None:
    run_job(source, out)
    if not journal_survives:
        journal_path(out).unlink()
    expected = "its model was echo, now it is parrot" if journal_survives else "another model"
    with pytest.raises(ConfigError, match=expected):
        run_job(source, out, facts={"model": "parrot"})


@pytest.mark.parametrize("text", ["dear diary\n", "dear diary", '{"id": 1}\n'])
def test_a_file_that_is_no_output_is_never_touched(source: Path, out: Path, text: str) -> None:
    out.write_text(text)
    with pytest.raises(ConfigError, match="something else"):
        run_job(source, out)
    assert out.read_text() == text


def test_an_output_that_answers_a_line_twice_is_refused(source: Path, out: Path) -> None:
    run_job(source, out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([*lines, lines[3]]))
    with pytest.raises(ConfigError, match="twice"):
        run_job(source, out)


def test_an_output_in_use_is_refused(source: Path, out: Path) -> None:
    job = open_job(source, out, FACTS)
    try:
        with pytest.raises(ConfigError, match="another process"):
            open_job(source, out, FACTS, overwrite=True)
    finally:
        job.close()


def test_input_and_output_must_differ(source: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(ConfigError, match="both"):
        run_job(source, source, overwrite=True)
    assert source.read_bytes() == before


def test_without_resume_an_existing_output_is_refused(source: Path, out: Path) -> None:
    run_job(source, out)
    with pytest.raises(ConfigError, match="--resume"):
        run_job(source, out, resume=False)


def test_a_damaged_journal_is_refused_with_the_way_out(source: Path, out: Path) -> None:
    run_job(source, out)
    journal_path(out).write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError, match="delete it"):
        run_job(source, out)
    journal_path(out).unlink()
    run_job(source, out)
    check_complete(out)


def test_a_full_disk_leaves_no_half_line(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = OutputFile(out)
    output.append(b"whole\n")
    real_write = os.write
    room = [3]

    def write(fd: int, data: bytes) -> int:
        if not room:
            raise OSError(28, "No space left on device")
        return real_write(fd, data[: room.pop()])

    monkeypatch.setattr(output_module.os, "write", write)
    with pytest.raises(EngineError, match="No space left"):
        output.append(b"a longer line\n")
    output.close()
    assert out.read_bytes() == b"whole\n"


def test_a_checkpoint_is_recognised_by_content(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "w").write_bytes(b"1" * 100)
    first = weights_fingerprint(str(folder))
    assert weights_fingerprint(str(folder)) == first
    (folder / "w").write_bytes(b"1" * 99 + b"2")
    assert weights_fingerprint(str(folder)) != first
    assert weights_fingerprint("a-name") == "a-name"


def peak_kib(tmp_path: Path, count: int) -> int:
    source, out = tmp_path / f"{count}.jsonl", tmp_path / f"{count}.out.jsonl"
    write_input(source, count)
    assert start(source, out, 0.0, str(tmp_path / "peak")).wait() == 0
    with out.open("rb") as stream:
        assert sum(1 for _ in stream) == count
    return int((tmp_path / "peak").read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("short", "long"), [(500, 6_000), pytest.param(50_000, 200_000, marks=pytest.mark.slow)]
)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, short: int, long: int) -> None:
    """Beyond SQLite's page cache of 4 MiB, which fills up once."""
    assert peak_kib(tmp_path, long) - peak_kib(tmp_path, short) < 6 << 10
