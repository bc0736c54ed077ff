"""Outputs cut into what each step added, and put together again.

`RequestOutput` is all there is so far; between processes only what is new travels, so that a token costs the
same at the end of a long answer as at its start. `DeltaCutter` sits at the engine, `OutputCollector` at the
front.
"""

from __future__ import annotations

from polybatch.engine.messages import CompletionDelta, Fault, RequestDelta
from polybatch.request import CompletionOutput, Logprob, Request, RequestMetrics, RequestOutput
from polybatch.scheduling.plan import PENDING


class _Sent:
    """How much of a completion is on its way already."""

    __slots__ = ("is_finished", "num_chars", "num_tokens")

    def __init__(self) -> None:
        self.num_chars = self.num_tokens = 0
        self.is_finished = False


class DeltaCutter:
    """Remembers per request what was sent; forgets it with the end of the request."""

    def __init__(self) -> None:
        self._sent: dict[str, list[_Sent]] = {}

    def cut(self, output: RequestOutput) -> RequestDelta:
        """What an output adds to the ones before it."""
        sent = self._sent.get(output.request_id)
        is_first = sent is None
        if sent is None:
            sent = self._sent[output.request_id] = [_Sent() for _ in output.outputs]
        if output.finished:
            del self._sent[output.request_id]
        metrics = output.metrics
        is_predicted = metrics is not None and metrics.predicted_ttft_s is not None
        changes = (
            _cut_completion(completion, before)
            for completion, before in zip(output.outputs, sent, strict=True)
        )
        return RequestDelta(
            output.request_id,
            [change for change in changes if change is not None],
            is_finished=output.finished,
            num_cached_tokens=output.num_cached_tokens,
            prompt_logprobs=output.prompt_logprobs if is_first else None,
            # What was predicted comes first, what came of it last.
            metrics=metrics if output.finished or (is_first and is_predicted) else None,
            fault=None if output.error is None else Fault(output.error_kind, output.error),
        )

    def forget(self, request_id: str) -> None:
        """Drop what is remembered of a request that sends nothing more."""
        self._sent.pop(request_id, None)


def _cut_completion(completion: CompletionOutput, sent: _Sent) -> CompletionDelta | None:
    tokens = completion.token_ids[sent.num_tokens :]
    if tokens and tokens[-1] == PENDING:
        tokens.pop()
    text = completion.text[sent.num_chars :]
    is_finished = completion.finish_reason is not None
    if not tokens and not text and is_finished == sent.is_finished:
        return None
    end = sent.num_tokens + len(tokens)
    logprobs = None if completion.logprobs is None else completion.logprobs[sent.num_tokens : end]
    sent.num_tokens, sent.num_chars = end, sent.num_chars + len(text)
    sent.is_finished = is_finished
    return CompletionDelta(
        completion.index,
        text,
        tokens,
        logprobs,
        completion.cumulative_logprob,
        completion.finish_reason,
        completion.stop_reason,
    )


class OutputCollector:
    """Puts the deltas of one request together. prompt: its text, where there is one."""

    def __init__(self, request: Request, prompt: str | None = None) -> None:
        self._request, self._prompt = request, prompt
        self._completions = [_Collected() for _ in range(request.params.n)]
        self._num_cached_tokens = 0
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._metrics: RequestMetrics | None = None
        self._is_finished = False

    def add(self, delta: RequestDelta) -> None:
        for change in delta.completions:
            self._completions[change.index].add(change)
        self._num_cached_tokens = delta.num_cached_tokens
        self._prompt_logprobs = delta.prompt_logprobs or self._prompt_logprobs
        self._metrics = delta.metrics
        self._is_finished = delta.is_finished

    def output(self) -> RequestOutput:
        """All that came so far."""
        return RequestOutput(
            request_id=self._request.request_id,
            prompt=self._prompt,
            prompt_token_ids=list(self._request.prompt_token_ids),
            outputs=[completion.output(i) for i, completion in enumerate(self._completions)],
            finished=self._is_finished,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
            adapter=self._request.adapter.name if self._request.adapter else None,
            metrics=self._metrics,
        )


class _Collected:
    __slots__ = ("last", "logprobs", "texts", "token_ids")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] | None = None
        self.last: CompletionDelta | None = None

    def add(self, change: CompletionDelta) -> None:
        self.texts.append(change.text)
        self.token_ids += change.token_ids
        if change.logprobs is not None:
            self.logprobs = (self.logprobs or []) + change.logprobs
        self.last = change

    def output(self, index: int) -> CompletionOutput:
        last = self.last
        return CompletionOutput(
            index=index,
            text="".join(self.texts),
            token_ids=self.token_ids,
            cumulative_logprob=None if last is None else last.cumulative_logprob,
            logprobs=self.logprobs,
            finish_reason=None if last is None else last.finish_reason,
            stop_reason=None if last is None else last.stop_reason,
        )
