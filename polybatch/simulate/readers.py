"""Readers of traces: Azure's CSV, Mooncake's JSON lines, our own, and batch files. No torch.

`read_trace` goes by the file's content. Our own format is one object per line with the fields of
`TraceRequest` that are set, `deadlines` as {"ttft_s", "tpot_s", "e2e_s"}, and `adapter_rank` beside `adapter`
where it is not 16. A batch file has no true output lengths: max_tokens stands for them, and unless it is told
how to encode, four bytes of text count as a token.
Sources: Azure/AzurePublicDataset (2023 code and conversation traces); kvcache-ai/Mooncake, whose hash_ids
stand for blocks of 512 tokens.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from polybatch.errors import ConfigError, PolybatchError
from polybatch.request import Deadlines
from polybatch.scheduling.policies import BATCH_PRIORITY
from polybatch.simulate.traces import Trace, TraceRequest

T = TypeVar("T")

DEFAULT_RANK = 16
JOB_OUTPUT_TOKENS = 256
"""Of a row of a batch file that sets no max_tokens."""

_JOB_BLOCK = 16
_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read_trace(path: str | Path, *, encode: Callable[[str], Sequence[int]] | None = None) -> Trace:
    """Read a trace of any known format. Raises ConfigError that names file, line and field.

    encode: text to token ids, for batch files.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"trace {path} is not a file: check the path")
    if path.suffix == ".csv":
        return read_azure(path)
    rows = _json_lines(path)
    first = rows[0][1]
    if "hash_ids" in first:
        return _read_mooncake(path, rows)
    if "body" in first:
        return _read_job(path, rows, encode or bytes_as_tokens)
    return _read_own(path, rows)


def read_azure(path: Path) -> Trace:
    """Arrivals of a service: a time stamp, prompt tokens and output tokens per row."""
    requests = []
    start: float | None = None
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ConfigError(
                f"trace {path} has no column {missing[0]}; needed are {', '.join(_COLUMNS)}: add or rename it"
            )
        for number, row in enumerate(reader):
            with _line(path, number + 2):
                # Python reads six digits of a second, the file has seven.
                at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
                start = at if start is None else start
                requests.append(
                    TraceRequest(
                        request_id=f"{path.stem}-{number}", arrival_s=at - start,
                        num_input=int(row["ContextTokens"]), num_output=int(row["GeneratedTokens"]),
                    )
                )  # fmt: skip
    return Trace(path.stem, _not_empty(path, requests))


def write_trace(trace: Trace, path: Path) -> None:
    """Write our own format, which `read_trace` reads back as it was."""
    defaults = {f.name: f.default for f in fields(TraceRequest)}
    with path.open("w") as file:
        for request in trace.requests:
            row = {name: value for name, value in asdict(request).items() if value != defaults[name]}
            if request.workflow is not None:
                raise ConfigError(
                    f"request {request.request_id!r} is a stage of a workflow, which files cannot hold: "
                    "keep the generator's name and seed instead"
                )
            if request.adapter is not None:
                row["adapter_rank"] = trace.adapters[request.adapter]
            file.write(json.dumps(row) + "\n")


def bytes_as_tokens(text: str) -> list[int]:
    """Four bytes a token: about right in number, and equal beginnings stay equal."""
    data = text.encode()
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def _read_mooncake(path: Path, rows: list[tuple[int, dict[str, Any]]]) -> Trace:
    requests = []
    for number, row in rows:
        with _line(path, number):
            requests.append(
                TraceRequest(
                    request_id=f"{path.stem}-{number}", arrival_s=row["timestamp"] / 1000,
                    num_input=row["input_length"], num_output=row["output_length"],
                    blocks=tuple(row["hash_ids"]),
                )
            )  # fmt: skip
    return Trace(path.stem, tuple(requests))


def _read_own(path: Path, rows: list[tuple[int, dict[str, Any]]]) -> Trace:
    known = {f.name for f in fields(TraceRequest)} - {"workflow"}
    requests, adapters = [], {}
    for number, row in rows:
        with _line(path, number):
            values = {"request_id": f"{path.stem}-{number}", **row}
            rank = values.pop("adapter_rank", DEFAULT_RANK)
            unknown = sorted(values.keys() - known)
            if unknown:
                raise ValueError(f"it has a field {unknown[0]!r}; known are {', '.join(sorted(known))}")
            if values.get("deadlines") is not None:
                values["deadlines"] = Deadlines(**values["deadlines"])
            for name in ("blocks", "after"):
                values[name] = tuple(values.get(name, ()))
            requests.append(TraceRequest(**values))
            if requests[-1].adapter is not None:
                adapters[requests[-1].adapter] = rank
    return Trace(path.stem, tuple(requests), adapters)


def _read_job(
    path: Path, rows: list[tuple[int, dict[str, Any]]], encode: Callable[[str], Sequence[int]]
) -> Trace:
    """All rows at once. Prompts share whole blocks of 16 tokens; a row's model may be an adapter."""
    ids: dict[tuple[int | None, tuple[int, ...]], int] = {}
    models = [row["body"].get("model") for _, row in rows if isinstance(row.get("body"), dict)]
    base = max(set(models), key=models.count) if models else None
    requests, adapters = [], {}
    for number, row in rows:
        with _line(path, number):
            body = row["body"]
            tokens = encode(_text_of(body))
            blocks: list[int] = []
            for at in range(0, len(tokens), _JOB_BLOCK):
                key = (blocks[-1] if blocks else None, tuple(tokens[at : at + _JOB_BLOCK]))
                blocks.append(ids.setdefault(key, len(ids)))
            model = body.get("model")
            adapter = model if model != base else None
            if adapter is not None:
                adapters[adapter] = DEFAULT_RANK
            limit = body.get("max_completion_tokens") or body.get("max_tokens") or JOB_OUTPUT_TOKENS
            requests.append(
                TraceRequest(
                    request_id=row["custom_id"], arrival_s=0.0, num_input=len(tokens), num_output=limit,
                    max_tokens=limit, blocks=tuple(blocks), block_tokens=_JOB_BLOCK, adapter=adapter,
                    priority=BATCH_PRIORITY,
                )
            )  # fmt: skip
    return Trace(path.stem, tuple(requests), adapters)


def _text_of(body: dict[str, Any]) -> str:
    if "messages" not in body:
        return str(body["prompt"])
    return "".join(f"<{m['role']}>{m['content']}" for m in body["messages"]) + "<assistant>"


def _json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            with _line(path, number):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("it is not an object")
                rows.append((number, row))
    _not_empty(path, rows)
    return rows


def _not_empty(path: Path, rows: Sequence[T]) -> tuple[T, ...]:
    if not rows:
        raise ConfigError(f"trace {path} has no requests: give a file with one per line")
    return tuple(rows)


@contextmanager
def _line(path: Path, number: int) -> Iterator[None]:
    """Name file and line in whatever is wrong with a row."""
    try:
        yield
    except KeyError as error:
        raise ConfigError(
            f"trace {path}, line {number}: the field {error.args[0]!r} is missing: add it or drop the line"
        ) from error
    except (ValueError, TypeError, AttributeError, PolybatchError) as error:
        raise ConfigError(f"trace {path}, line {number}: {error}: correct or drop the line") from error
