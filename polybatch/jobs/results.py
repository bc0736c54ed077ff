"""Results on their way to a job's files: lines are appended at once, output and journal synced now and then.

Used by every runner of a job. Results reach the operating system with each `flush`; output, then journal, are
synced at most once a second or every 1,000 rows.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from polybatch.errors import RequestError
from polybatch.jobs.job import Job
from polybatch.jobs.journal import ERROR, OK
from polybatch.jobs.lines import Line, custom_id_of, encode_output
from polybatch.jobs.responses import error_body

SYNC_INTERVAL_S = 1.0
SYNC_ROWS = 1_000
MAX_EXAMPLES = 3


@dataclass(slots=True)
class Progress:
    """How far a run is. Rows count the whole job, the other figures this run alone.

    rows_by_model: rows with a result, by the name their body used. examples: see `note_example`.
    """

    total: int
    ok: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    started_s: float = 0.0
    elapsed_s: float = 0.0
    done_before: int = 0
    rows_by_model: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        return self.ok + self.errors

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that came from the prefix cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def left_s(self) -> float | None:
        """Estimated seconds to the end, None before anything finished."""
        done_now = self.done - self.done_before
        return None if not done_now else self.elapsed_s / done_now * (self.total - self.done)


def note_example(examples: list[str], message: str) -> None:
    """Keep the message of an error line, `line N: TEXT`, if its text is one of the first few."""
    texts = {example.partition(": ")[2] for example in examples}
    if len(texts) < MAX_EXAMPLES and message.partition(": ")[2] not in texts:
        examples.append(message)


class ResultWriter:
    """Writes the results of one run of a job and counts them.

    clock: seconds, monotonic; for progress and the sync interval only.
    """

    def __init__(self, job: Job, clock: Callable[[], float] = time.monotonic) -> None:
        self._job, self._clock = job, clock
        self._finished: list[bytes] = []
        self._unmarked: dict[int, int] = {}
        self._synced_s = clock()
        total, ok, errors = job.journal.counts()
        self.progress = Progress(total, ok, errors, started_s=clock(), done_before=ok + errors)

    @property
    def num_unwritten(self) -> int:
        """Lines that wait for the next `flush`."""
        return len(self._finished)

    def succeed(self, line: Line, body: dict[str, Any], model: str) -> None:
        """The row has its answer, an object of `polybatch.jobs.responses` or of a server. model: as asked."""
        self._add(line, 200, body, None)
        progress, used = self.progress, body.get("usage") or {}
        progress.ok += 1
        progress.prompt_tokens += used.get("prompt_tokens") or 0
        progress.cached_tokens += (used.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        progress.output_tokens += used.get("completion_tokens") or 0
        progress.rows_by_model[model] += 1

    def fail(self, line: Line, status: int, code: str, error: RequestError) -> None:
        """The row ends as an error line that says which line it was."""
        message = f"line {line.number}: {error}"
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = error_body(message, kind=kind, param=error.field, code=code)
        self.fail_as(line, status, body, {"code": code, "message": message})

    def fail_as(self, line: Line, status: int, body: dict[str, Any], summary: dict[str, Any]) -> None:
        """The row ends as an error line with this body. summary: {"code", "message"}."""
        self._add(line, status, body, summary)
        self.progress.errors += 1
        note_example(self.progress.examples, summary["message"])

    def _add(self, line: Line, status: int, body: dict[str, Any], summary: dict[str, Any] | None) -> None:
        self._finished.append(encode_output(line.number, custom_id_of(line), status, body, summary))
        self._unmarked[line.number] = OK if summary is None else ERROR

    def flush(self, sync: bool = False) -> None:
        """Append what finished; sync output, then journal, when it is time. Raises EngineError."""
        if self._finished:
            self._job.output.append(b"".join(self._finished))
            self._finished.clear()
        now = self._clock()
        if self._unmarked and (
            sync or len(self._unmarked) >= SYNC_ROWS or now - self._synced_s >= SYNC_INTERVAL_S
        ):
            self._job.output.sync()
            self._job.journal.mark(self._unmarked, self._job.output.size)
            self._unmarked.clear()
            self._synced_s = now
        self.progress.elapsed_s = now - self.progress.started_s
