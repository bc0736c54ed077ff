"""Laws of what a benchmark writes down, and of the process that holds an engine."""

import json
import sys

import pytest

from benchmarks.cpu import report
from benchmarks.cpu.client import EngineFailedError, EngineSpec, WorkerProcess
from polybatch.bench import meter, results, workloads
from polybatch.bench.results import Result, Timed, record
from polybatch.errors import EngineError


def outputs(workload):
    return [[7] * request.max_tokens for request in workload.requests]


def test_figures_follow_from_the_tokens_and_the_time():
    workload = workloads.make("W2")
    run = record(workload, 0, Timed(8.0, outputs(workload)))
    assert run.output_tokens == 64 * 64
    assert run.out_tok_s == 512
    assert run.in_tok_s == pytest.approx(workload.num_input_tokens / 8, abs=0.01)
    assert run.ttft_ms is None


def test_a_stream_reports_its_first_token_and_the_rate_of_the_others():
    workload = workloads.make("W1")
    run = record(workload, 0, Timed(13.0, outputs(workload), [0.25 + 0.1 * i for i in range(128)]))
    assert run.ttft_ms == 250
    assert run.decode_tok_s == 10


def test_an_output_of_the_wrong_length_earns_no_figures():
    workload = workloads.make("W2")
    tokens = outputs(workload)
    tokens[5].pop()
    with pytest.raises(EngineError, match="request 5"):
        record(workload, 0, Timed(1.0, tokens))
    with pytest.raises(EngineError, match="63 outputs for 64 requests"):
        record(workload, 0, Timed(1.0, outputs(workload)[:-1]))


def test_a_stream_without_a_stamp_per_token_earns_no_figures():
    workload = workloads.make("W1")
    with pytest.raises(EngineError, match="127 time stamps"):
        record(workload, 0, Timed(1.0, outputs(workload), [0.1] * 127))


def result_of(*seconds):
    workload = workloads.make("W2")
    runs = [record(workload, i, Timed(s, outputs(workload))) for i, s in enumerate(seconds)]
    return Result("polybatch:int8", "W2", "polybatch 0", runs)


def test_medians_are_of_the_runs():
    result = result_of(4.0, 2.0, 16.0)
    assert result.median("total_s") == 4
    assert result.spread("out_tok_s") == (256, 2048)
    assert result.median("ttft_ms") is None
    assert result.headline == "out_tok_s"


def document(*measured):
    return results.document(
        measured,
        command=results.portable_command(
            ["run", "--out=/home/me/x.json", "@/home/me/peers.args", "--runs=3"]
        ),
        model="/models/m.gguf",
        threads=2,
        machine=meter.machine(),
        limits=None,
        skipped=[{"engine": "vllm:bfloat16", "workload": "W2", "reason": "not installed"}],
    )


def test_a_document_survives_json_and_names_no_folder_of_this_machine():
    content = json.loads(json.dumps(document(result_of(4.0))))
    assert content["command"] == "run --out=x.json @peers.args --runs=3"
    assert content["model"] == "m.gguf"
    assert content["results"][0]["median"]["out_tok_s"] == 1024


def test_a_report_lists_the_fastest_first_and_what_was_left_out():
    slow, fast = result_of(8.0), result_of(2.0)
    slow.engine = "other"
    text = report.markdown(json.loads(json.dumps(document(slow, fast))))
    assert text.index("| polybatch:int8 |") < text.index("| other |")
    assert "- W2 vllm:bfloat16: not installed" in text


def test_a_report_replaces_its_own_section_alone():
    page = "before\n<!-- results:a -->\nold\n<!-- /results:a -->\nafter\n"
    changed = report.replace_section(page, "a", "new")
    assert "old" not in changed
    assert changed.startswith("before\n<!-- results:a -->")
    assert changed.endswith("<!-- /results:a -->\nafter\n")
    assert report.replace_section(changed, "a", "new") == changed
    with pytest.raises(ValueError, match="results:b"):
        report.replace_section(page, "b", "new")


def test_engine_names_split_into_kind_precision_and_label():
    spec = EngineSpec("llama.cpp:q4_0:eight-slots", sys.executable, "m.gguf")
    assert (spec.kind, spec.precision) == ("llama_cpp", "q4_0")
    assert EngineSpec("transformers", sys.executable, "m").precision == ""


def test_an_engine_that_cannot_run_says_why_and_its_process_ends(tmp_path):
    workload = workloads.make("W2", num_requests=1)
    spec = EngineSpec("openvino:int8", sys.executable, str(tmp_path))
    with WorkerProcess(spec, 1, tmp_path / "log", timeout_s=60) as worker:
        with pytest.raises(EngineFailedError, match="exported OpenVINO folder") as failed:
            worker.load(workload, {})
        assert failed.value.is_unsupported
    assert worker.process.poll() is not None


def test_an_engine_that_ends_is_noticed_with_its_last_words(tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    script.chmod(0o755)
    with WorkerProcess(EngineSpec("vllm", str(script), "m"), 1, tmp_path / "log") as worker:
        worker.process.wait(30)
        with pytest.raises(EngineFailedError, match="out of memory"):
            worker.load(workloads.make("W1"), {})
