"""A job answers every line once, whatever the lines are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from job_helpers import FACTS, NAMES, EchoEngine, answer, completion_line, read_output, run_job, write_input

from polybatch.errors import ConfigError, EngineError
from polybatch.jobs.job import open_job
from polybatch.jobs.runner import Runner, Window
from polybatch.request import RequestOutput


def line(**changes: object) -> str:
    fields = json.loads(completion_line("good", "x")) | changes
    return json.dumps({k: v for k, v in fields.items() if v != "absent"}) + "\n"


def run_lines(tmp_path: Path, *lines: str | bytes) -> list[dict]:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(part if isinstance(part, bytes) else part.encode() for part in lines))
    run_job(source, tmp_path / "out.jsonl")
    return read_output(tmp_path / "out.jsonl")


def test_every_row_gets_the_answer_to_its_own_prompt(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 100)
    run_job(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    rows = {row["custom_id"]: row for row in read_output(tmp_path / "out.jsonl")}
    assert len(rows) == 100
    for i in range(100):
        row = rows[f"row-{i}"]
        assert row["id"] == f"batch_req_{i + 1}"
        assert row["error"] is None
        assert row["response"]["status_code"] == 200
        assert row["response"]["body"]["choices"][0]["text"] == answer(f"prompt {i}")


def test_an_adapter_is_chosen_by_the_name_in_model(tmp_path: Path) -> None:
    rows = run_lines(tmp_path, completion_line("1", "x", model="a"), completion_line("2", "x"))
    texts = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}
    assert texts == {"1": answer("x", "a"), "2": answer("x")}


def test_usage_and_choices_cover_all_prompts_and_completions(tmp_path: Path) -> None:
    (row,) = run_lines(tmp_path, completion_line("1", ["abc", "de"], n=2))
    body = row["response"]["body"]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in body["choices"]] == [answer("abc")] * 2 + [answer("de")] * 2
    assert body["usage"] == {
        "prompt_tokens": 5, "completion_tokens": 32, "total_tokens": 37,
        "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "custom_id", "status", "named"),
    [
        ("this is not JSON\n", None, 400, "not a JSON object"),
        ('["a", "list"]\n', None, 400, "not a JSON object"),
        ('{"custom_id": "torn\n', None, 400, "not a JSON object"),
        (b'{"custom_id": "\xff\xfe"}\n', None, 400, "JSON"),
        ("[" * 100_000 + "\n", None, 400, "not a JSON object"),
        (line(custom_id="absent"), None, 400, "custom_id is missing"),
        (line(custom_id=""), None, 400, "custom_id"),
        (line(custom_id=7), None, 400, "custom_id is 7"),
        (line(custom_id="bad", method="GET"), "bad", 400, "method is 'GET'"),
        (line(custom_id="bad", url="/v1/embeddings"), "bad", 400, "url is '/v1/embeddings'"),
        (line(custom_id="bad", body="absent"), "bad", 400, "body is missing"),
        (line(custom_id="bad", body=[]), "bad", 400, "body is []"),
        (line(custom_id="bad", extra=1), "bad", 400, "unknown field 'extra'"),
        ('{"custom_id": "bad", "method": "POST", "url": "/v1/completions", "body": {"a": "\\ud800"}}\n',
         None, 400, "not a JSON object"),
        (completion_line("bad", "x", model="nobody"), "bad", 404, "model 'nobody' is not known"),
        (completion_line("bad", "x", temperature=-1), "bad", 400, "temperature is -1"),
        (completion_line("bad", "x" * 1001), "bad", 400, "max_model_len"),
        (completion_line("bad", ["fine", "x" * 1001]), "bad", 400, "max_model_len"),
        (completion_line("bad", "explode"), "bad", 500, "caught fire"),
        (completion_line("bad", ["explode", "fine", "fine too"]), "bad", 500, "caught fire"),
    ],
)  # fmt: skip
def test_a_bad_line_becomes_an_error_line_and_harms_no_other(
    tmp_path: Path, bad: str | bytes, custom_id: str | None, status: int, named: str
) -> None:
    rows = run_lines(tmp_path, completion_line("before", "x"), bad, completion_line("after", "y"))
    by_id = {row["custom_id"]: row for row in rows}
    assert len(rows) == 3
    assert by_id["before"]["error"] is None
    assert by_id["after"]["error"] is None
    row = by_id[custom_id]
    assert row["response"]["status_code"] == status
    assert named in row["error"]["message"]
    assert row["error"]["message"].startswith("line 2: ")
    assert row["response"]["body"]["error"]["message"] == row["error"]["message"]


def test_what_a_row_says_of_its_length_reaches_the_engine(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(completion_line("1", ["x", "y"], expected_tokens=7) + completion_line("2", "z"))
    engine = EchoEngine()
    run_job(source, tmp_path / "out.jsonl", engine)
    assert engine.expected == {"1.0": 7, "1.1": 7, "2.0": None}


def test_a_line_too_long_becomes_an_error_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polybatch.jobs.lines.read_lines.__defaults__", (200,))
    rows = run_lines(tmp_path, completion_line("long", "x" * 500), completion_line("short", "x"))
    assert {row["custom_id"]: row["response"]["status_code"] for row in rows} == {None: 400, "short": 200}


def test_blank_lines_a_byte_order_mark_and_a_missing_last_newline_are_harmless(tmp_path: Path) -> None:
    rows = run_lines(tmp_path, b"\xef\xbb\xbf", completion_line("1", "x"), "\n  \r\n", line().rstrip("\n"))
    assert {row["id"]: row["custom_id"] for row in rows} == {"batch_req_1": "1", "batch_req_4": "good"}


def test_an_empty_input_is_a_finished_job(tmp_path: Path) -> None:
    assert run_lines(tmp_path) == []


def test_duplicate_ids_are_refused_with_both_line_numbers_before_anything_runs(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(completion_line("x", "1") + completion_line("y", "2") + completion_line("x", "3"))
    with pytest.raises(ConfigError, match="'x' is on lines 1 and 3"):
        run_job(source, out)
    assert list(tmp_path.iterdir()) == [source]


def test_the_engine_never_holds_more_than_the_window(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 300)
    engine = EchoEngine(max_num_seqs=4)
    run_job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", engine, window=12)
    assert engine.peak_requests == 12


def test_a_stopped_job_keeps_what_finished_and_continues(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_input(source, 100)
    job = open_job(source, out, {"model": "echo"})
    engine = EchoEngine()
    steps = iter(range(5))
    runner = Runner(job, engine, NAMES, Window(16))
    assert not runner.run(should_stop=lambda: next(steps, None) is None)
    job.close()
    assert not engine.has_work()
    first = read_output(out)
    assert 0 < len(first) < 100
    second = EchoEngine()
    run_job(source, out, second)
    assert len(second.submitted) == 100 - len(first)
    assert sorted(r["custom_id"] for r in read_output(out)) == sorted(f"row-{i}" for i in range(100))


def test_rows_without_a_seed_get_the_same_one_in_every_run(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [completion_line(str(i), "x", **({"seed": 5} if i == 3 else {})) for i in range(4)]
    source.write_text("".join(lines))
    engines = [EchoEngine(), EchoEngine()]
    for engine in engines:
        run_job(source, tmp_path / "out.jsonl", engine, overwrite=True)
    assert engines[0].seeds == engines[1].seeds
    assert len(set(engines[0].seeds.values())) == 4
    assert engines[0].seeds["4.0"] == 5


def test_a_finished_job_has_nothing_left_to_do(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 10)
    run_job(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    engine = EchoEngine()
    run_job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", engine)
    assert engine.submitted == []
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_an_engine_that_loses_requests_ends_the_job_instead_of_hanging(tmp_path: Path) -> None:
    class Forgetful(EchoEngine):
        def step(self) -> list[RequestOutput]:
            self.waiting.clear()
            return []

    write_input(tmp_path / "in.jsonl", 3)
    with pytest.raises(EngineError, match="lost 3 requests"):
        run_job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", Forgetful())


class Fragile(EchoEngine):
    """A whole step fails, and all its requests with it, when certain prompts run."""

    def step(self) -> list[RequestOutput]:
        if any(b"poison" in bytes(ids) for ids, _, _ in self.waiting.values()):
            self.waiting.clear()
            self.running.clear()
            raise EngineError("the machine tripped")
        return super().step()


def test_a_row_that_fails_a_whole_step_takes_no_other_with_it(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = [f"poison {i}" if i in (7, 31, 39) else f"fine {i}" for i in range(40)]
    source.write_text("".join(completion_line(str(i), prompt) for i, prompt in enumerate(prompts)))
    run_job(source, out, Fragile())
    rows = {int(row["custom_id"]): row["response"]["status_code"] for row in read_output(out)}
    assert rows == {i: 500 if i in (7, 31, 39) else 200 for i in range(40)}


def test_an_engine_that_fails_every_row_ends_the_job_and_leaves_them_to_do(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(completion_line(str(i), "poison") for i in range(40)))
    with pytest.raises(EngineError, match="tripped"):
        run_job(source, out, Fragile())
    assert read_output(out) == []
    run_job(source, out)
    assert len(read_output(out)) == 40


def test_progress_counts_rows_and_tokens(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(completion_line("1", "abcd") + completion_line("2", "efgh", model="b") + "bad\n")
    progress = run_job(source, tmp_path / "out.jsonl").progress
    assert (progress.total, progress.ok, progress.errors) == (3, 2, 1)
    assert (progress.prompt_tokens, progress.output_tokens, progress.cached_tokens) == (8, 16, 2)
    assert progress.hit_rate == 0.25
    assert progress.rows_by_model == {"base": 1, "b": 1}


def test_lines_in_the_engine_are_bounded_in_bytes_too(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(completion_line(f"{i}", f"{i}" * 200) for i in range(10, 40)))
    longest = max(map(len, source.read_bytes().splitlines()))
    engine = EchoEngine(max_num_seqs=2)
    job = open_job(source, out, FACTS)
    try:
        assert Runner(job, engine, NAMES, Window(1000, max_bytes=4 * longest)).run()
    finally:
        job.close()
    assert 2 <= engine.peak_requests <= 5
    assert len(read_output(out)) == 30


def test_stopping_while_rows_are_read_submits_no_more(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write_input(source, 100)
    engine = EchoEngine()
    job = open_job(source, tmp_path / "out.jsonl", FACTS)
    try:
        runner = Runner(job, engine, NAMES, Window(1000))
        assert not runner.run(should_stop=lambda: len(engine.submitted) >= 10)
    finally:
        job.close()
    assert len(engine.submitted) == 10
    assert not engine.waiting
