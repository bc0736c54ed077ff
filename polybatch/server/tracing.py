"""A span per request for OpenTelemetry, sent by OTLP over HTTP; needs the extra `tracing`.

Spans are made when a request has ended, from times that are known anyway, and belong to the trace that the
client's `traceparent` header names. They hold counts and times, never prompts or answers.
Source: OpenTelemetry's semantic conventions for generative AI, for the attributes' names.
"""

from __future__ import annotations

import time

from opentelemetry.context import Context
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer

from polybatch import __version__
from polybatch.engine.messages import RequestDelta
from polybatch.engine.observer import Observer
from polybatch.request import Request, RequestMetrics
from polybatch.server.meter import HTTP_SCOPE, RequestMeter

NANO = 1_000_000_000


class RequestTracer(Observer):
    """Makes spans and hands everything on to the meter."""

    def __init__(self, tracer: Tracer, model: str, meter: RequestMeter) -> None:
        self._tracer, self._model, self._meter = tracer, model, meter
        self._contexts: dict[str, Context] = {}
        self._num_output: dict[str, int] = {}

    def submitted(self, request: Request) -> None:
        self._meter.submitted(request)
        scope = HTTP_SCOPE.get()
        headers = (
            {} if scope is None else {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        )
        self._contexts[request.request_id] = extract(headers)
        self._num_output[request.request_id] = 0

    def received(self, request: Request, delta: RequestDelta) -> None:
        self._meter.received(request, delta)
        self._num_output[request.request_id] += sum(len(change.token_ids) for change in delta.completions)
        if delta.is_finished:
            reasons = [str(change.finish_reason) for change in delta.completions if change.finish_reason]
            failure = None if delta.fault is None else delta.fault.message
            self._end(request, delta.metrics, reasons, delta.num_cached_tokens, failure)

    def dropped(self, request: Request, *, is_failed: bool) -> None:
        self._meter.dropped(request, is_failed=is_failed)
        self._end(request, None, ["error" if is_failed else "abort"], 0, "engine down" if is_failed else None)

    def _end(
        self,
        request: Request,
        times: RequestMetrics | None,
        reasons: list[str],
        num_cached: int,
        failure: str | None,
    ) -> None:
        # The engine's clock counts from no date.
        offset_s = time.time() - time.monotonic()
        attributes: dict[str, str | int | float | list[str]] = {
            "gen_ai.request.model": self._model,
            "gen_ai.request.id": self._meter.client_id(request.request_id),
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.request.n": request.params.n,
            "gen_ai.usage.prompt_tokens": len(request.prompt_token_ids),
            "gen_ai.usage.completion_tokens": self._num_output.pop(request.request_id),
            "gen_ai.response.finish_reasons": reasons,
            "polybatch.cached_tokens": num_cached,
        }
        if request.adapter is not None:
            attributes["polybatch.adapter"] = request.adapter.name
        end_s = time.monotonic()
        if times is not None:
            end_s = times.finished_s or end_s
            attributes["polybatch.preemptions"] = times.num_preemptions
            if times.first_scheduled_s is not None:
                attributes["gen_ai.latency.time_in_queue"] = times.first_scheduled_s - times.arrival_s
            if times.first_token_s is not None:
                attributes["gen_ai.latency.time_to_first_token"] = times.first_token_s - times.arrival_s
        span = self._tracer.start_span(
            "llm_request",
            context=self._contexts.pop(request.request_id),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=int((request.arrival_s + offset_s) * NANO),
        )
        if failure is not None:
            span.set_status(Status(StatusCode.ERROR, failure))
        span.end(end_time=int((end_s + offset_s) * NANO))


def open_provider(endpoint: str, service: str) -> TracerProvider:
    """Spans to an OTLP collector, such as http://localhost:4318/v1/traces; `shutdown` sends the last ones."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    provider = TracerProvider(
        resource=Resource.create({"service.name": service, "service.version": __version__})
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider
