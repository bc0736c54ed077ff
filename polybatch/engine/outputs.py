"""From tokens to what users get: text, log-probabilities and finish reasons of running requests.

A `Completion` follows one sequence, a `Progress` one request with its n completions. Text is made
step by step only where somebody looks at it meanwhile (streaming, stop strings), else once at the end.
"""

from __future__ import annotations

import torch

from polybatch.detokenizer import IncrementalDetokenizer, StopChecker
from polybatch.engine.ports import TextTokenizer
from polybatch.request import (
    CompletionOutput,
    Deadlines,
    FinishReason,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
    Sequence,
)
from polybatch.sampling.logprobs import TokenLogprobs, gather_logprobs
from polybatch.sampling.state import SamplingState
from polybatch.scheduling.deadlines import Attainment, attainment_of
from polybatch.scheduling.forecast import AdmissionAnswer
from polybatch.scheduling.plan import Chunk
from polybatch.structured.grammar import Grammar


class Completion:
    """One completion on its way: the sequence, its sampling state, and the text so far.

    is_watched: its text is needed after every step.
    """

    __slots__ = ("_checker", "_detokenizer", "_maps", "_num_pushed", "_tokenizer", "cumulative_logprob",
                 "finish_reason", "is_watched", "logprobs", "progress", "sampling", "seq", "stop_reason",
                 "text")  # fmt: skip

    def __init__(
        self,
        seq: Sequence,
        progress: Progress,
        tokenizer: TextTokenizer | None,
        grammar: Grammar | None = None,
    ) -> None:
        params = seq.request.params
        self.seq = seq
        self.progress = progress
        self.sampling = SamplingState(seq, None if grammar is None else grammar.matcher())
        self.text = ""
        self.logprobs: list[TokenLogprobs] = []
        self._maps: list[dict[int, Logprob]] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.is_watched = progress.is_streamed or bool(params.stop)
        self._num_pushed = seq.num_prompt
        self._checker = StopChecker(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._tokenizer = tokenizer
        self._detokenizer: IncrementalDetokenizer | None = None

    def add_logprobs(self, entry: TokenLogprobs) -> None:
        self.logprobs.append(entry)
        self.cumulative_logprob += entry.logprob

    def push_new_tokens(self) -> str | None:
        """Bring the text up to date; returns the stop string that ends it, if one does."""
        seq, detokenizer = self.seq, self._detokenizer
        if self._tokenizer is None:
            return None
        if detokenizer is None:
            request = seq.request
            detokenizer = self._detokenizer = IncrementalDetokenizer(
                self._tokenizer, request.prompt_token_ids, request.params.skip_special_tokens
            )
        end = len(seq.tokens) - self._has_silent_stop
        searched_from = seq.num_prompt + seq.request.params.min_tokens
        for position in range(self._num_pushed, end):
            piece = detokenizer.push(seq.tokens[position])
            hit = self._add_text(piece, is_searched=position >= searched_from)
            if hit is not None:
                self._num_pushed = len(seq.tokens)
                return hit
        self._num_pushed = max(self._num_pushed, end)
        return None

    def end(self, reason: FinishReason | None, stop_reason: str | int | None) -> None:
        """Settle the text and why it ended; a stop string in the last tokens comes before their reason."""
        if self.finish_reason is not None:
            return
        hit = self.push_new_tokens()
        if hit is None and self._detokenizer is not None:
            hit = self._add_text(self._detokenizer.flush(), is_searched=True)
            if hit is None and self._checker is not None:
                self.text += self._checker.flush()
        if hit is None:
            self.finish_reason, self.stop_reason = reason, stop_reason
        else:
            self.finish_reason, self.stop_reason = FinishReason.STOP, hit

    def stop_at(self, hit: str) -> None:
        """End at a stop string that `push_new_tokens` found."""
        self.finish_reason, self.stop_reason = FinishReason.STOP, hit

    def _add_text(self, piece: str, is_searched: bool) -> str | None:
        if self._checker is None or not is_searched:
            self.text += piece
            return None
        emit, hit = self._checker.push(piece)
        self.text += emit
        return hit

    @property
    def _has_silent_stop(self) -> bool:
        """Whether the last token ended the sequence and stays out of the text."""
        seq = self.seq
        return (
            seq.finish_reason is FinishReason.STOP
            and not seq.request.params.include_stop_str_in_output
            and seq.tokens[-1] in seq.request.stop_token_ids
        )

    def output(self, tokenizer: TextTokenizer | None) -> CompletionOutput:
        has_logprobs = self.seq.request.params.logprobs is not None
        # A stream asks after every step, and what was shown once stays as it is.
        self._maps += [logprob_map(entry, tokenizer) for entry in self.logprobs[len(self._maps) :]]
        return CompletionOutput(
            index=self.seq.index,
            text=self.text,
            token_ids=self.seq.output_token_ids,
            cumulative_logprob=self.cumulative_logprob if has_logprobs else None,
            logprobs=list(self._maps) if has_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class Progress:
    """One request in the engine. num_live: completions that still run."""

    __slots__ = (
        "_prompt_maps",
        "answer",
        "completions",
        "deadlines",
        "error",
        "error_kind",
        "finished_s",
        "first_scheduled_s",
        "first_token_s",
        "is_streamed",
        "num_live",
        "prompt_logprobs",
        "request",
    )  # fmt: skip

    def __init__(self, request: Request, is_streamed: bool) -> None:
        self.request = request
        self.is_streamed = is_streamed
        self.answer: AdmissionAnswer | None = None
        self.deadlines: Deadlines | None = None
        self.completions: list[Completion] = []
        self.num_live = 0
        self.prompt_logprobs: dict[int, TokenLogprobs] = {}
        self._prompt_maps: dict[int, dict[int, Logprob]] = {}
        self.error: str | None = None
        self.error_kind = "EngineError"
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.finished_s: float | None = None

    def output(self, tokenizer: TextTokenizer | None) -> RequestOutput:
        """The request as it stands: all of it where finished, so far where not."""
        request = self.request
        seqs = [completion.seq for completion in self.completions]
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=[completion.output(tokenizer) for completion in self.completions],
            finished=self.num_live == 0,
            prompt_logprobs=self._prompt_logprobs(tokenizer),
            num_cached_tokens=seqs[0].num_cached if seqs else 0,
            adapter=request.adapter.name if request.adapter else None,
            metrics=self._metrics(seqs),
            error=self.error,
            error_kind=self.error_kind,
        )

    def attainment(self) -> Attainment:
        """Which deadlines were kept, by the request's first and last token."""
        if self.deadlines is None or self.finished_s is None:
            return Attainment()
        reasons = {completion.finish_reason for completion in self.completions}
        return attainment_of(
            self.deadlines,
            self.request.arrival_s,
            self.first_token_s,
            self.finished_s,
            max((completion.seq.num_output for completion in self.completions), default=0),
            has_ended_well=reasons <= {FinishReason.STOP, FinishReason.LENGTH},
        )

    def _metrics(self, seqs: list[Sequence]) -> RequestMetrics:
        answer, kept = self.answer, self.attainment()
        return RequestMetrics(
            self.request.arrival_s,
            self.first_scheduled_s,
            self.first_token_s,
            self.finished_s,
            sum(seq.num_preemptions for seq in seqs),
            None if answer is None else answer.ttft_s,
            None if answer is None else answer.e2e_s,
            None if answer is None else answer.missed,
            kept.ttft,
            kept.tpot,
            kept.e2e,
        )

    def _prompt_logprobs(self, tokenizer: TextTokenizer | None) -> list[dict[int, Logprob] | None] | None:
        if self.request.params.prompt_logprobs is None:
            return None
        for position, entry in self.prompt_logprobs.items():
            if position not in self._prompt_maps:
                self._prompt_maps[position] = logprob_map(entry, tokenizer)
        positions = range(1, len(self.request.prompt_token_ids))
        return [None, *(self._prompt_maps.get(position) for position in positions)]


def logprob_map(entry: TokenLogprobs, tokenizer: TextTokenizer | None) -> dict[int, Logprob]:
    """Token id -> log-probability: the token itself first, then the best ones in order."""

    def text(token: int) -> str | None:
        return None if tokenizer is None else tokenizer.token_text(token)

    found = {entry.token: Logprob(entry.logprob, entry.rank, text(entry.token))}
    for rank, (token, value) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), 1):
        found.setdefault(token, Logprob(value, rank, text(token)))
    return found


def score_prompt(progress: Progress, chunk: Chunk, logits: torch.Tensor) -> None:
    """Note the log-probabilities of the prompt tokens that follow those of a chunk.

    logits: [n_new, vocab] float32, one row per token of the chunk.
    """
    seq = chunk.seq
    num_top = seq.request.params.prompt_logprobs
    end = min(chunk.start + chunk.n_new, seq.num_prompt - 1)
    if num_top is None or chunk.start >= end:
        return
    tokens = seq.tokens[chunk.start + 1 : end + 1]
    entries = gather_logprobs(logits[: len(tokens)], tokens, [num_top] * len(tokens))
    progress.prompt_logprobs.update(zip(range(chunk.start + 1, end + 1), entries, strict=True))
