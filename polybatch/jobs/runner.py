"""Runs a job: keeps a bounded window of rows in the engine and appends results as they finish.

    pending lines -> parse -> engine (window) -> finished rows -> output -> journal

Memory depends on the window, not on the length of the file; a policy that plans, plans what is in it.
Results reach the operating system after every step; output and journal are synced at most once a second or
every 1,000 rows.
Every line ends as a result or as an error line; a line that fails takes no other with it. Where a whole
step fails, its rows are run again one by one: what fails alone becomes an error line, unless row after
row fails, which is the machine's fault and ends the run with these rows still to do.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from polybatch.engine.ports import TextTokenizer
from polybatch.errors import EngineError, RequestError
from polybatch.jobs.job import Job
from polybatch.jobs.lines import Line, parse_line
from polybatch.jobs.responses import response_body
from polybatch.jobs.results import SYNC_ROWS, Progress, ResultWriter
from polybatch.jobs.schema import Call
from polybatch.jobs.tools.answer import add_tool_calls, template_variables, with_tools
from polybatch.request import FinishReason, RequestOutput, SamplingParams
from polybatch.scheduling.policies import BATCH_PRIORITY

MAX_FAILED_STEPS = 3
"""Rows that fail alone, one right after the other, before the engine is held to be broken."""
MAX_NAMES_SHOWN = 10


class BatchEngine(Protocol):
    """What a job needs of an engine."""

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template_args: Any) -> Sequence[int]:
        """Token ids of a conversation up to where the answer begins. Raises RequestError."""
        ...

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        adapter: str | None,
        *,
        priority: int,
        expected_tokens: int | None,
    ) -> None:
        """Queue a request. Raises RequestError if it can never run."""
        ...

    def step(self) -> list[RequestOutput]:
        """Run one step; returns the requests that finished in it.

        Raises EngineError if the step fails; then nothing is in flight any more.
        """
        ...

    def drain(self) -> list[RequestOutput]:
        """Outputs that no step has returned, such as those of a step that failed."""
        ...

    def has_work(self) -> bool: ...

    def abort(self, request_id: str) -> object: ...


@dataclass(frozen=True, slots=True)
class ModelNames:
    """What `model` of a body may say: a name of the base model, or an adapter's."""

    base: tuple[str, ...]
    adapters: tuple[str, ...] = ()

    def adapter_of(self, model: str) -> str | None:
        """The adapter to use, None for the base model. Raises RequestError for an unknown name."""
        if model in self.adapters:
            return model
        if model in self.base:
            return None
        names = [*self.base, *self.adapters]
        more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
        raise RequestError(
            f"model {model!r} is not known here; known are {', '.join(names[:MAX_NAMES_SHOWN])}{more}: "
            "use one of them or register the adapter",
            field="model",
        )


@dataclass(frozen=True, slots=True)
class Window:
    """What may be in the engine before no further row is submitted: completions, and bytes of their lines.

    Waiting ones are included. A byte of text is a quarter of a token or so, and a token takes some 60 bytes.
    """

    max_completions: int
    max_bytes: int = 16 << 20


PLANNED = Window(max_completions=32_768)
"""Enough for a plan to find what belongs together, in half a gibibyte or so."""


@dataclass(slots=True)
class _Row:
    line: Line
    call: Call
    request_ids: list[str]
    outputs: dict[str, RequestOutput] = field(default_factory=dict)


class Runner:
    """One run over the rows of a job that lack a result.

    clock: seconds, monotonic; for progress and the sync interval only. tokenizer, tool_call_parser: whose
    chat template tells how the model writes tool calls, and what overrides it.
    """

    def __init__(
        self,
        job: Job,
        engine: BatchEngine,
        names: ModelNames,
        window: Window,
        clock: Callable[[], float] = time.monotonic,
        *,
        tokenizer: TextTokenizer | None = None,
        tool_call_parser: str | None = None,
    ) -> None:
        self._job, self._engine, self._names = job, engine, names
        self._tokenizer, self._tool_call_parser = tokenizer, tool_call_parser
        self._window = window
        self._rows: dict[str, _Row] = {}
        self._num_completions = self._num_bytes = 0
        self._should_stop: Callable[[], bool] = lambda: False
        self._suspects: deque[Line] = deque()
        self._failed_alone: list[tuple[Line, EngineError]] = []
        self._results = ResultWriter(job, clock)
        self.progress = self._results.progress

    def run(
        self,
        should_stop: Callable[[], bool] = lambda: False,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> bool:
        """Work until every row has a result or an error line, or until should_stop says so.

        Returns whether the job is complete. What finished is synced on every way out.
        """
        lines = self._job.pending_lines()
        self._should_stop = should_stop
        try:
            while not should_stop():
                is_read = not self._fill(lines)
                if self._rows:
                    self._step()
                self._results.flush()
                report(self.progress)
                if is_read and not self._rows and not self._suspects:
                    self._give_up_failed()
                    break
        finally:
            self._results.flush(sync=True)
        for request_id in list(self._rows):
            self._engine.abort(request_id)
        return self.progress.done == self.progress.total

    def _step(self) -> None:
        if not self._engine.has_work():
            raise EngineError(f"the engine lost {len(self._rows)} requests, {min(self._rows)} first")
        try:
            outputs = self._engine.step()
        except EngineError as error:
            self._isolate(error)
            return
        for output in outputs:
            self._collect(output)

    def _isolate(self, error: EngineError) -> None:
        """Take back the rows of a failed step, to be run alone, or give up the one that already was."""
        self._engine.drain()
        rows = {row.line.number: row for row in self._rows.values()}
        self._rows.clear()
        self._num_completions = self._num_bytes = 0
        if len(rows) > 1:
            self._suspects.extend(row.line for row in rows.values())
            return
        self._failed_alone += [(row.line, error) for row in rows.values()]
        if len(self._failed_alone) >= MAX_FAILED_STEPS:
            raise error

    def _give_up_failed(self) -> None:
        """Write the error lines of rows that failed alone, once others are seen to succeed."""
        for line, error in self._failed_alone:
            self._results.fail(line, 500, "engine_error", RequestError(str(error)))
        self._failed_alone.clear()

    def _fill(self, lines: Iterator[Line]) -> bool:
        """Submit lines until the window is full; False when there are no more."""
        if self._suspects:
            if not self._rows:
                self._submit(self._suspects.popleft())
            return True
        # A file of nothing but bad lines must not pile up its error lines here.
        while (
            self._num_completions < self._window.max_completions
            and self._num_bytes < self._window.max_bytes
            and self._results.num_unwritten < SYNC_ROWS
            and not self._should_stop()
        ):
            line = next(lines, None)
            if line is None:
                return False
            self._submit(line)
        return True

    def _submit(self, line: Line) -> None:
        try:
            call = parse_line(line)
        except RequestError as error:
            self._results.fail(line, 400, "invalid_request", error)
            return
        try:
            adapter = self._names.adapter_of(call.model)
        except RequestError as error:
            self._results.fail(line, 404, "model_not_found", error)
            return
        row = _Row(line, call, [])
        try:
            row.call = call = with_tools(call, self._tool_call_parser, self._tokenizer)
            prompts = call.prompts or (self._engine.encode_chat(call.messages, **template_variables(call)),)
            for k, prompt in enumerate(prompts):
                request_id = f"{line.number}.{k}"
                params = self._seeded(call.params, request_id)
                self._engine.add_request(
                    request_id, prompt, params, adapter, priority=BATCH_PRIORITY,
                    expected_tokens=call.expected_tokens,
                )  # fmt: skip
                row.request_ids.append(request_id)
        except RequestError as error:
            for request_id in row.request_ids:
                self._engine.abort(request_id)
            self._results.fail(line, 400, "invalid_request", error)
            return
        self._rows.update(dict.fromkeys(row.request_ids, row))
        self._num_completions += call.num_sequences
        self._num_bytes += len(line.data or b"")

    def _seeded(self, params: SamplingParams, request_id: str) -> SamplingParams:
        """A row without a seed gets one from the job and its line, so that resuming changes no answer."""
        if params.seed is not None or params.temperature == 0:
            return params
        key = f"{self._job.fingerprint}:{request_id}".encode()
        return replace(params, seed=int.from_bytes(hashlib.blake2b(key, digest_size=7).digest()))

    def _collect(self, output: RequestOutput) -> None:
        row = self._rows.get(output.request_id)
        if row is None or not output.finished:
            return
        failure = _failure(output)
        if failure is None:
            row.outputs[output.request_id] = output
            if len(row.outputs) < len(row.request_ids):
                return
        for request_id in row.request_ids:
            del self._rows[request_id]
            if failure is not None and request_id not in row.outputs and request_id != output.request_id:
                self._engine.abort(request_id)
        self._num_completions -= row.call.num_sequences
        self._num_bytes -= len(row.line.data or b"")
        if failure is not None:
            self._results.fail(row.line, 500, "engine_error", RequestError(failure))
        else:
            self._give_up_failed()
            self._succeed(row)

    def _succeed(self, row: _Row) -> None:
        outputs = [row.outputs[request_id] for request_id in row.request_ids]
        body = response_body(
            row.call,
            outputs,
            response_id=f"{self._job.fingerprint.removeprefix('pb_')}-{row.line.number}",
            created=int(time.time()),
            fingerprint=self._job.fingerprint,
        )
        add_tool_calls(body, row.call)
        self._results.succeed(row.line, body, row.call.model)
        preemptions = sum(o.metrics.num_preemptions for o in outputs if o.metrics is not None)
        self.progress.preemptions += preemptions


def _failure(output: RequestOutput) -> str | None:
    if output.error is not None:
        return output.error
    reasons = {completion.finish_reason for completion in output.outputs}
    if not output.outputs or reasons & {FinishReason.ERROR, FinishReason.ABORT}:
        return "the engine gave the request up without saying why"
    return None
