"""Spans tell what a request asked and got, in the trace of its client."""

from __future__ import annotations

import pytest
from server_helpers import RunningServer

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from polybatch.request import Request, SamplingParams
from polybatch.server.meter import RequestMeter
from polybatch.server.tracing import RequestTracer

TRACE = "0af7651916cd43dd8448eb211c80319c"


def tracer_over(meter: RequestMeter) -> tuple[RequestTracer, InMemorySpanExporter]:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return RequestTracer(provider.get_tracer("test"), "base", meter), spans


def test_a_served_request_is_a_span_of_its_clients_trace() -> None:
    with RunningServer(adapters={"red": "red"}) as server:
        server.llm.observer, spans = tracer_over(server.state.meter)
        response = server.client.post(
            "/v1/completions",
            json={"model": "red", "prompt": "hi", "max_tokens": 3, "ignore_eos": True},
            headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "X-Request-Id": "mine"},
        )
        assert response.status_code == 200
        (span,) = spans.get_finished_spans()
        check(span)
        assert server.state.meter.num_output_tokens == 3


def check(span: ReadableSpan) -> None:
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    found = dict(span.attributes or {})
    assert found["gen_ai.request.id"] == "mine"
    assert found["polybatch.adapter"] == "red"
    assert found["gen_ai.usage.completion_tokens"] == 3
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time < span.end_time


def test_a_request_that_the_engine_lost_is_a_failed_span() -> None:
    tracer, spans = tracer_over(RequestMeter())
    request = Request("r", (1, 2), SamplingParams(), 16, 0)
    tracer.submitted(request)
    tracer.dropped(request, is_failed=True)
    (span,) = spans.get_finished_spans()
    assert not span.status.is_ok
