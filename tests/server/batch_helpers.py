"""Files of rows, and batches seen to their end."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
from openai.types import Batch
from server_helpers import RunningServer

OVER = ("completed", "failed", "expired", "cancelled")


def row(custom_id: str, prompt: str = "hi", **body: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "base", "prompt": prompt, "max_tokens": 4, "ignore_eos": True} | body,
    }


def jsonl(rows: list[Any]) -> bytes:
    lines = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows)
    return b"".join(line + b"\n" for line in lines)


def upload(client: openai.OpenAI, rows: list[Any], **options: Any) -> str:
    return client.files.create(file=("in.jsonl", jsonl(rows)), purpose="batch", **options).id


def begin(client: openai.OpenAI, rows: list[Any], window: str = "24h", **options: Any) -> Batch:
    return client.batches.create(
        input_file_id=upload(client, rows),
        endpoint=options.pop("endpoint", "/v1/completions"),
        completion_window=window,  # type: ignore[arg-type]
        **options,
    )


def until(client: openai.OpenAI, batch_id: str, *statuses: str, limit_s: float = 60) -> Batch:
    end = time.monotonic() + limit_s
    while (batch := client.batches.retrieve(batch_id)).status not in (statuses or OVER):
        assert time.monotonic() < end, batch
        assert batch.status not in OVER, batch
        time.sleep(0.02)
    return batch


def lines_of(client: openai.OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """Lines of an output or error file by custom_id, none of them twice."""
    if file_id is None:
        return {}
    # Of bytes: texts know more ends of lines than JSON does.
    lines = [json.loads(line) for line in client.files.content(file_id).read().splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def grow_old(server: RunningServer, batch_id: str) -> None:
    """Let a batch be at nineteen twentieths of its window."""
    service = server.state.batches
    assert service is not None
    old = service.batch(batch_id, "")
    shift_s = int(0.95 * (old.expires_s - old.created_s))
    old.created_s -= shift_s
    old.expires_s -= shift_s
