"""What the front counts of requests: how many, how long, of how many tokens.

Times of a request that streams are those at which its tokens arrived here; those of one that does not are
the engine's, with its tokens as if they had come evenly.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

from polybatch.engine.messages import RequestDelta
from polybatch.engine.observer import Observer
from polybatch.request import AdapterRef, FinishReason, Request, RequestMetrics
from polybatch.server.histogram import REQUEST_S, SMALL, TOKEN_S, TOKENS, TTFT_S, Histogram

MAX_ADAPTER_LABELS = 100
OTHER_ADAPTERS = "(other)"
MIXTURES = "(mixture)"
MAX_IDS = 1024

HTTP_SCOPE: ContextVar[MutableMapping[str, Any] | None] = ContextVar("HTTP_SCOPE", default=None)
"""The HTTP request that is being answered; `request_id` in its state is the id that the client knows."""


class _Flight:
    """A request on its way. last_s: arrival of the newest token, by completion."""

    __slots__ = ("first_s", "last_s", "num_output")

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.last_s: dict[int, float] = {}
        self.num_output = 0


class RequestMeter(Observer):
    """Totals since the start of the server, and histograms by their name in vLLM's metrics."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._flights: dict[str, _Flight] = {}
        self._ids: OrderedDict[str, str] = OrderedDict()
        self._labels: set[str] = set()
        self.num_prompt_tokens = self.num_output_tokens = 0
        self.num_finished: Counter[str] = Counter({reason.value: 0 for reason in FinishReason})
        self.requests_by_adapter: Counter[str] = Counter()
        self.prompt_tokens_by_adapter: Counter[str] = Counter()
        self.output_tokens_by_adapter: Counter[str] = Counter()
        self.http: Counter[tuple[str, str, str]] = Counter()
        """Answers by (handler, method, class of status)."""
        self.ttft, self.itl, self.tpot = Histogram(TTFT_S), Histogram(TOKEN_S), Histogram(TOKEN_S)
        self.e2e, self.queue, self.prefill, self.decode, self.inference = (
            Histogram(REQUEST_S) for _ in range(5)
        )
        self.prompt_tokens, self.output_tokens = Histogram(TOKENS), Histogram(TOKENS)
        self.n, self.max_tokens = Histogram(SMALL), Histogram(TOKENS)

    def label(self, adapter: AdapterRef | None) -> str:
        """An adapter as a label: its name for the first that come, so that there are never too many."""
        if adapter is None:
            return ""
        if adapter.parts:
            return MIXTURES
        if adapter.name in self._labels or len(self._labels) < MAX_ADAPTER_LABELS:
            self._labels.add(adapter.name)
            return adapter.name
        return OTHER_ADAPTERS

    def client_id(self, request_id: str) -> str:
        """The id that the client knows, where the request came lately over HTTP."""
        return self._ids.get(request_id, request_id)

    def submitted(self, request: Request) -> None:
        self._flights[request.request_id] = _Flight()
        scope = HTTP_SCOPE.get()
        if scope is not None and "request_id" in scope["state"]:
            self._ids[request.request_id] = scope["state"]["request_id"]
            if len(self._ids) > MAX_IDS:
                self._ids.popitem(last=False)
        num_prompt, label = len(request.prompt_token_ids), self.label(request.adapter)
        self.num_prompt_tokens += num_prompt
        self.requests_by_adapter[label] += 1
        self.prompt_tokens_by_adapter[label] += num_prompt
        self.prompt_tokens.observe(num_prompt)
        self.n.observe(request.params.n)
        self.max_tokens.observe(request.max_tokens)

    def received(self, request: Request, delta: RequestDelta) -> None:
        flight = self._flights[request.request_id]
        now, num_new = self._clock(), 0
        # A request that does not stream comes whole: the engine knows better when its tokens came.
        is_whole = delta.is_finished and flight.first_s is None and delta.metrics is not None
        for change in delta.completions:
            count = len(change.token_ids)
            if not count:
                continue
            num_new += count
            last_s = flight.last_s.get(change.index)
            if last_s is not None:
                self.itl.observe((now - last_s) / count, count)
            flight.last_s[change.index] = now
        if num_new:
            if flight.first_s is None and not is_whole:
                flight.first_s = now
                self.ttft.observe(now - request.arrival_s)
            flight.num_output += num_new
            self.num_output_tokens += num_new
            self.output_tokens_by_adapter[self.label(request.adapter)] += num_new
        if delta.is_finished:
            self._finish(request, flight, delta, is_whole=is_whole)

    def dropped(self, request: Request, *, is_failed: bool) -> None:
        self.num_finished["error" if is_failed else "abort"] += 1
        del self._flights[request.request_id]

    def _finish(self, request: Request, flight: _Flight, delta: RequestDelta, *, is_whole: bool) -> None:
        del self._flights[request.request_id]
        if delta.fault is not None:
            self.num_finished["error"] += 1
            return
        reasons = [change.finish_reason for change in delta.completions if change.finish_reason]
        self.num_finished[reasons[0].value if reasons else "abort"] += 1
        self.output_tokens.observe(flight.num_output)
        if delta.metrics is not None:
            self._note_times(request, delta.metrics, flight.num_output, is_whole=is_whole)

    def _note_times(
        self, request: Request, times: RequestMetrics, num_output: int, *, is_whole: bool
    ) -> None:
        first, end = times.first_token_s, times.finished_s
        if first is None or end is None or times.first_scheduled_s is None:
            return
        self.e2e.observe(end - times.arrival_s)
        self.queue.observe(times.first_scheduled_s - times.arrival_s)
        self.prefill.observe(first - times.first_scheduled_s)
        self.decode.observe(end - first)
        self.inference.observe(end - times.first_scheduled_s)
        num_gaps = num_output // request.params.n - 1
        if num_gaps > 0:
            self.tpot.observe((end - first) / num_gaps)
        if is_whole:
            self.ttft.observe(first - times.arrival_s)
            if num_gaps > 0:
                self.itl.observe((end - first) / num_gaps, num_gaps * request.params.n)
