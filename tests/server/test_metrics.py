"""Prometheus metrics: their names, that they count what happened, and that their labels stay few."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from server_helpers import RunningServer

from polybatch.engine.messages import CompletionDelta, RequestDelta
from polybatch.request import AdapterRef, FinishReason, Request, RequestMetrics, SamplingParams
from polybatch.server.histogram import Histogram
from polybatch.server.meter import MAX_ADAPTER_LABELS, OTHER_ADAPTERS, RequestMeter

KNOWN = frozenset(
    """
vllm:num_requests_running vllm:num_requests_waiting vllm:kv_cache_usage_perc vllm:lora_requests_info
vllm:cache_config_info vllm:prompt_tokens vllm:generation_tokens vllm:request_success vllm:num_preemptions
vllm:prefix_cache_queries vllm:prefix_cache_hits vllm:time_to_first_token_seconds
vllm:inter_token_latency_seconds vllm:time_per_output_token_seconds vllm:e2e_request_latency_seconds
vllm:request_queue_time_seconds vllm:request_prefill_time_seconds vllm:request_decode_time_seconds
vllm:request_inference_time_seconds vllm:request_prompt_tokens vllm:request_generation_tokens
vllm:request_params_n vllm:request_params_max_tokens
polybatch_engine_up polybatch_engine_restarts polybatch_pages polybatch_adapters polybatch_adapter_loads
polybatch_adapter_requests polybatch_adapter_tokens polybatch_sequences_running polybatch_sequences_waiting
polybatch_steps polybatch_step_tokens polybatch_step_seconds polybatch_queued_completions http_requests
polybatch_step_cost_seconds polybatch_step_cost_error polybatch_step_cost_factor
polybatch_step_cost_calibrated polybatch_deadlines
    """.split()  # noqa: SIM905
)


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    with RunningServer(adapters={"red": "red", "blue": "blue"}) as running:
        running.complete(max_tokens=5, ignore_eos=True)
        running.complete(max_tokens=7, ignore_eos=True, model="red", stream=True)
        running.complete(max_tokens=3, ignore_eos=True, n=2)
        running.complete(model="nobody")
        running.client.get("/no/such/route")
        running.until_idle()
        yield running


def scrape(server: RunningServer) -> dict[str, Metric]:
    response = server.client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def value(families: dict[str, Metric], family: str, sample: str = "", **labels: str) -> float:
    found = [
        each.value
        for each in families[family].samples
        if each.name == family + sample and labels.items() <= each.labels.items()
    ]
    assert len(found) == 1, (family, sample, labels, families[family].samples)
    return found[0]


def test_every_documented_metric_is_there(served: RunningServer) -> None:
    families = scrape(served)
    assert families.keys() >= KNOWN
    for name in KNOWN:
        assert families[name].samples, name
        labels = families[name].samples[0].labels
        if name.startswith("vllm:") and name != "vllm:lora_requests_info":
            assert (labels["model_name"], labels["engine"]) == ("base", "0")


def test_counters_tell_what_was_generated(served: RunningServer) -> None:
    families = scrape(served)
    assert value(families, "vllm:generation_tokens", "_total") == 5 + 7 + 2 * 3
    assert value(families, "vllm:prompt_tokens", "_total") == value(
        families, "vllm:request_prompt_tokens", "_sum"
    )
    assert value(families, "vllm:request_success", "_total", finished_reason="length") == 3
    assert value(families, "vllm:time_to_first_token_seconds", "_count") == 3
    # Every token of a completion but the first has one before it.
    assert value(families, "vllm:inter_token_latency_seconds", "_count") == 4 + 6 + 2 * 2
    assert value(families, "polybatch_adapter_tokens", "_total", adapter="red", kind="generation") == 7
    assert value(families, "polybatch_steps", "_total") > 0


def test_pages_of_all_kinds_are_all_pages(served: RunningServer) -> None:
    families = scrape(served)
    pages = sum(sample.value for sample in families["polybatch_pages"].samples)
    assert pages == int(families["vllm:cache_config_info"].samples[0].labels["num_gpu_blocks"])
    assert value(families, "polybatch_adapters", where="registered") == 2
    assert value(families, "polybatch_adapters", where="resident") == 1


def test_http_answers_are_counted_by_route_and_class(served: RunningServer) -> None:
    families = scrape(served)
    route = {"handler": "/v1/completions", "method": "POST"}
    assert value(families, "http_requests", "_total", **route, status="2xx") == 3
    assert value(families, "http_requests", "_total", **route, status="4xx") == 1
    assert value(families, "http_requests", "_total", handler="none", status="4xx") == 1


def test_lora_info_names_running_and_waiting_adapters() -> None:
    with RunningServer("stub:step_s=0.05", adapters={"red": "red", "blue": "blue"}, max_num_seqs=1) as server:

        async def begin(name: str) -> None:
            request = server.llm.prepare(
                [1, 2, 3], SamplingParams(max_tokens=900, ignore_eos=True), adapter=name
            )
            server.llm.submit(request)

        server.run(begin("red"))
        server.run(begin("blue"))
        deadline = time.monotonic() + 20
        labels: dict[str, str] = {}
        while labels.get("waiting_lora_adapters") != "blue" and time.monotonic() < deadline:
            time.sleep(0.1)
            labels = scrape(server)["vllm:lora_requests_info"].samples[0].labels
        assert labels == {
            "max_lora": "1", "running_lora_adapters": "red", "waiting_lora_adapters": "blue"
        }  # fmt: skip
        server.run(_fail_all(server))


async def _fail_all(server: RunningServer) -> None:
    server.llm.fail_all("the test is over")


def test_metrics_without_an_engine_say_so() -> None:
    with RunningServer() as server:
        server.run(server.llm.close())
        families = scrape(server)
        assert value(families, "polybatch_engine_up") == 0
        assert "vllm:num_requests_running" not in families


def request_for(adapter: AdapterRef | None, request_id: str = "r", n: int = 1) -> Request:
    params = SamplingParams(n=n)
    return Request(request_id, (1, 2, 3), params, 16, 0, adapter=adapter, arrival_s=10.0)


def test_adapter_labels_are_bounded() -> None:
    meter = RequestMeter()
    for i in range(3 * MAX_ADAPTER_LABELS):
        meter.submitted(request_for(AdapterRef(f"a{i}", str(i), 1), request_id=str(i)))
    assert len(meter.requests_by_adapter) == MAX_ADAPTER_LABELS + 1
    assert meter.requests_by_adapter[OTHER_ADAPTERS] == 2 * MAX_ADAPTER_LABELS
    assert sum(meter.requests_by_adapter.values()) == 3 * MAX_ADAPTER_LABELS


def delta(tokens: int, *, is_finished: bool = False, metrics: RequestMetrics | None = None) -> RequestDelta:
    reason = FinishReason.STOP if is_finished else None
    change = CompletionDelta(0, "", [7] * tokens, finish_reason=reason)
    return RequestDelta("r", [change], is_finished=is_finished, metrics=metrics)


def test_a_stream_is_timed_as_it_arrives() -> None:
    now = [10.0]
    meter = RequestMeter(clock=lambda: now[0])
    request = request_for(None)
    meter.submitted(request)
    for at, tokens, is_finished in ((10.5, 1, False), (10.75, 1, False), (11.25, 2, True)):
        now[0] = at
        meter.received(request, delta(tokens, is_finished=is_finished))
    assert meter.ttft.sum == pytest.approx(0.5)
    # Two tokens that come together came half as long after the one before each.
    assert meter.itl.sum == pytest.approx(0.75)
    assert sum(meter.itl.counts) == 3


def test_a_request_that_comes_whole_is_timed_by_the_engine() -> None:
    meter = RequestMeter(clock=lambda: 99.0)
    request = request_for(None)
    meter.submitted(request)
    meter.received(request, delta(5, is_finished=True, metrics=RequestMetrics(10.0, 10.25, 10.5, 12.5)))
    assert (meter.ttft.sum, meter.itl.sum, meter.e2e.sum) == pytest.approx((0.5, 2.0, 2.5))
    assert (meter.queue.sum, meter.prefill.sum, meter.decode.sum) == pytest.approx((0.25, 0.25, 2.0))
    assert sum(meter.itl.counts) == 4


@pytest.mark.parametrize(("is_failed", "reason"), [(True, "error"), (False, "abort")])
def test_dropped_requests_are_counted_by_whose_fault_it_was(is_failed: bool, reason: str) -> None:
    meter = RequestMeter()
    meter.submitted(request_for(None))
    meter.dropped(request_for(None), is_failed=is_failed)
    assert meter.num_finished[reason] == 1


@given(st.lists(st.floats(0, 100), max_size=50))
def test_buckets_are_cumulative_and_end_with_the_count(values: list[float]) -> None:
    histogram = Histogram((1.0, 5.0, 50.0))
    for each in values:
        histogram.observe(each)
    buckets = dict(histogram.cumulative())
    assert buckets == {
        "1.0": sum(each <= 1 for each in values),
        "5.0": sum(each <= 5 for each in values),
        "50.0": sum(each <= 50 for each in values),
        "+Inf": len(values),
    }
    assert histogram.sum == pytest.approx(sum(values))


def test_the_grafana_dashboard_asks_only_for_metrics_that_exist(served: RunningServer) -> None:
    board = json.loads((Path(__file__).parents[2] / "grafana" / "polybatch.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"(?:vllm:|polybatch_|http_)\w+", target["expr"])
    }
    samples = {sample.name for family in scrape(served).values() for sample in family.samples}
    assert len(asked) > 20
    assert asked <= samples
