"""Traces: what readers make of files, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polybatch.errors import ConfigError
from polybatch.request import Deadlines
from polybatch.simulate.prompts import prompt_tokens
from polybatch.simulate.readers import read_trace, write_trace
from polybatch.simulate.traces import Trace, TraceRequest

SHARED = Path(__file__).parents[3] / "shared" / "data"


def request_of(number: int, **changes: object) -> TraceRequest:
    values = {
        "request_id": f"r{number}",
        "arrival_s": float(number),
        "num_input": 10,
        "num_output": 2,
        **changes,
    }
    return TraceRequest(**values)  # type: ignore[arg-type]


def test_azure_rows_become_requests_from_the_first_time_stamp_on(tmp_path: Path) -> None:
    path = tmp_path / "code.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.2299600,110,27\n"
    )
    trace = read_trace(path)
    assert [(r.num_input, r.num_output) for r in trace.requests] == [(4808, 10), (110, 27)]
    assert [r.arrival_s for r in trace.requests] == pytest.approx([0, 0.25])


def test_mooncake_rows_share_what_their_hash_ids_share(tmp_path: Path) -> None:
    path = tmp_path / "conversation.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 1500, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 3000, "input_length": 1100, "output_length": 6, "hash_ids": [0, 1, 9]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_trace(path).requests
    assert (second.arrival_s, second.num_output) == (3.0, 6)
    a, b = prompt_tokens(first, 0), prompt_tokens(second, 1)
    assert (len(a), len(b)) == (1500, 1100)
    assert a[:1024] == b[:1024]
    assert a[1024] != b[1024]


def test_batch_files_share_equal_beginnings_of_text(tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    system = "You answer in one word. " * 40

    def row(number: int, question: str, model: str = "base") -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        body = {"model": model, "messages": messages, "max_tokens": 30}
        return json.dumps(
            {"custom_id": f"c{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        )

    path.write_text("\n".join([row(0, "What is red?"), row(1, "Why so?"), row(2, "How?", "tuned")]) + "\n")
    trace = read_trace(path)
    first, second, third = trace.requests
    assert (first.num_output, first.max_tokens) == (30, 30)
    assert first.blocks[:14] == second.blocks[:14]
    assert first.blocks[-1] != second.blocks[-1]
    assert (first.adapter, third.adapter) == (None, "tuned")
    words = read_trace(path, encode=lambda text: [len(word) for word in text.split()])
    assert words.requests[0].num_input == 5 * 40 + 3


def test_our_own_format_reads_back_what_was_written(tmp_path: Path) -> None:
    trace = Trace(
        "mine",
        (
            request_of(0, blocks=(3, 4), block_tokens=8, tenant="a", expected_tokens=7),
            request_of(1, adapter="x", deadlines=Deadlines(ttft_s=0.5), after=("r0",), patience_s=2.0),
        ),
        {"x": 32},
    )
    write_trace(trace, tmp_path / "mine.jsonl")
    assert read_trace(tmp_path / "mine.jsonl") == trace


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "TIMESTAMP,Context\n", "has no column ContextTokens"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,1\n", "line 2: .*noon"),
        ("a.jsonl", "{", "line 1"),
        ("a.jsonl", "", "has no requests"),
        ("a.jsonl", '{"hash_ids": [1], "timestamp": 0}', "line 1: the field 'input_length' is missing"),
        ("a.jsonl", '{"arrival_s": 0, "num_input": 0, "num_output": 1}', "line 1: num_input .* is 0"),
        ("a.jsonl", '{"arrival_s": 0, "num_input": 1, "num_output": 1, "size": 3}', "field 'size'"),
        ("a.jsonl", '{"custom_id": "x", "body": {}}', "the field 'prompt' is missing"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_trace(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        read_trace(tmp_path / "none.csv")


def test_blocks_must_cover_the_prompt() -> None:
    with pytest.raises(ConfigError, match="has 1 blocks of 8 tokens for 10 prompt tokens; it must have 2"):
        request_of(0, blocks=(1,), block_tokens=8)


def test_requests_must_be_in_order_unique_and_their_adapters_known() -> None:
    with pytest.raises(ConfigError, match="arrives before"):
        Trace("t", (request_of(1), request_of(0)))
    with pytest.raises(ConfigError, match="'r0' is in trace t twice"):
        Trace("t", (request_of(0), request_of(0)))
    with pytest.raises(ConfigError, match="adapter of request 'r0' is 'x'"):
        Trace("t", (request_of(0, adapter="x"),))


def test_another_rate_stretches_all_gaps_alike() -> None:
    trace = Trace("t", tuple(request_of(i, arrival_s=float(i * i)) for i in range(11)))
    faster = trace.at_rate(2.2)
    assert faster.rate == pytest.approx(2.2)
    assert [r.arrival_s for r in faster.requests] == pytest.approx([i * i / 20 for i in range(11)])


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the public traces beside the checkout")
def test_the_public_traces_are_read_whole() -> None:
    azure = read_trace(SHARED / "azure_llm_code_2023.csv")
    assert len(azure) == 8819
    assert azure.rate == pytest.approx(2.567, abs=0.01)
    mooncake = read_trace(SHARED / "mooncake_synthetic.jsonl")
    assert len(mooncake) == 3993
    assert mooncake.has_shared_prefixes
