"""Prometheus metrics: this server's own names and those that dashboards and routers know from vLLM.

    vllm:* {model_name, engine}      names, units and meanings of vLLM
    polybatch_*                      what only this engine has: pages by kind, steps by phase, adapters
    http_requests_total {handler, method, status}

Counters of the engine process begin at 0 with each of its restarts. Labels are bounded: adapters by name as
far as `MAX_ADAPTER_LABELS`, then together; handlers are routes; statuses are classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polybatch.engine.snapshot import EngineSnapshot
from polybatch.server.histogram import Histogram
from polybatch.server.meter import HTTP_SCOPE, MAX_ADAPTER_LABELS, OTHER_ADAPTERS, RequestMeter
from polybatch.server.state import ServerState

METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_OWN, _VLLM = "polybatch_", "vllm:"


class ServerMetrics(Collector):
    """All metrics of a server at one moment. snapshot: None while there is no engine to ask."""

    def __init__(self, state: ServerState, snapshot: EngineSnapshot | None) -> None:
        self._state, self._snapshot = state, snapshot
        self._labels = {"model_name": state.config.served_model_names[0], "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        meter = self._state.meter
        yield from self._server(meter)
        yield from self._requests(meter)
        if self._snapshot is not None:
            yield from self._engine(self._snapshot)
            yield from self._own_engine(self._snapshot)

    def _server(self, meter: RequestMeter) -> Iterator[Metric]:
        state = self._state
        is_up = float(state.llm.health().is_ready)
        yield _gauge(f"{_OWN}engine_up", "1 while the engine process serves", is_up)
        yield _counter(f"{_OWN}engine_restarts", "Restarts of the engine process", state.llm.num_restarts)
        yield _gauge(
            f"{_OWN}queued_completions", "Completions in the server's queue", state.admission.num_queued_seqs
        )
        http = CounterMetricFamily(
            "http_requests", "Answers over HTTP", labels=("handler", "method", "status")
        )
        for key, count in meter.http.items():
            http.add_metric(key, count)
        yield http
        adapters = CounterMetricFamily(
            f"{_OWN}adapter_requests", "Requests by adapter, empty for none", labels=("adapter",)
        )
        tokens = CounterMetricFamily(
            f"{_OWN}adapter_tokens", "Prompt and generated tokens by adapter", labels=("adapter", "kind")
        )
        for name, count in meter.requests_by_adapter.items():
            adapters.add_metric((name,), count)
            tokens.add_metric((name, "prompt"), meter.prompt_tokens_by_adapter[name])
            tokens.add_metric((name, "generation"), meter.output_tokens_by_adapter[name])
        yield adapters
        yield tokens

    def _requests(self, meter: RequestMeter) -> Iterator[Metric]:
        yield self._counter("prompt_tokens", "Prompt tokens of accepted requests", meter.num_prompt_tokens)
        yield self._counter("generation_tokens", "Generated tokens", meter.num_output_tokens)
        finished = CounterMetricFamily(
            f"{_VLLM}request_success",
            "Finished requests by reason",
            labels=(*self._labels, "finished_reason"),
        )
        for reason, count in meter.num_finished.items():
            finished.add_metric((*self._labels.values(), reason), count)
        yield finished
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token", meter.ttft),
            ("inter_token_latency_seconds", "Time between tokens", meter.itl),
            ("time_per_output_token_seconds", "Time between tokens, older name", meter.itl),
            ("request_time_per_output_token_seconds", "Mean of a request", meter.tpot),
            ("e2e_request_latency_seconds", "Arrival to end", meter.e2e),
            ("request_queue_time_seconds", "Arrival to first step", meter.queue),
            ("request_prefill_time_seconds", "First step to first token", meter.prefill),
            ("request_decode_time_seconds", "First token to end", meter.decode),
            ("request_inference_time_seconds", "First step to end", meter.inference),
            ("request_prompt_tokens", "Prompt tokens of a request", meter.prompt_tokens),
            ("request_generation_tokens", "Generated tokens of a request", meter.output_tokens),
            ("request_params_n", "n of a request", meter.n),
            ("request_params_max_tokens", "max_tokens of a request", meter.max_tokens),
        ):
            yield self._histogram(name, text, histogram)

    def _engine(self, snapshot: EngineSnapshot) -> Iterator[Metric]:
        stats, llm = snapshot.stats.scheduler, self._state.llm
        yield self._gauge("num_requests_running", "Sequences that run", stats.num_running)
        yield self._gauge("num_requests_waiting", "Sequences that wait", stats.num_waiting)
        usage = kv_usage(snapshot)
        yield self._gauge("kv_cache_usage_perc", "Share of pages in use that KV may have, 0 to 1", usage)
        yield self._gauge("gpu_cache_usage_perc", "The same, older name", usage)
        queries, hits = stats.num_prefix_query_tokens, stats.num_prefix_hit_tokens
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache", hits)
        yield self._counter("num_preemptions", "Preemptions", stats.num_preemptions)
        yield _info(
            f"{_VLLM}cache_config_info",
            "Pages of the pool",
            self._labels | {"block_size": str(llm.page_size), "num_gpu_blocks": str(stats.num_pages)},
        )
        # What vLLM calls slots is not limited here: as many adapters may run as sequences.
        yield _info(
            f"{_VLLM}lora_requests_info",
            "Adapters of running and of waiting sequences; the value is the Unix time",
            {
                "max_lora": str(self._state.max_num_seqs),
                "running_lora_adapters": _names(snapshot.running),
                "waiting_lora_adapters": _names(snapshot.waiting),
            },
            time.time(),
        )

    def _own_engine(self, snapshot: EngineSnapshot) -> Iterator[Metric]:
        stats, times = snapshot.stats.scheduler, snapshot.stats.times
        yield _by(
            GaugeMetricFamily(f"{_OWN}pages", "Pages of the pool by what they hold", labels=("kind",)),
            {
                "free": stats.num_free_pages,
                "kv": stats.num_kv_pages,
                "cached": stats.num_cached_pages,
                "adapter": stats.num_adapter_pages,
            },
        )
        yield _by(
            GaugeMetricFamily(f"{_OWN}adapters", "Adapters in the pool, and in all", labels=("where",)),
            {"resident": stats.num_resident_adapters, "registered": len(self._state.llm.adapter_paths)},
        )
        for name, counts in (("running", snapshot.running), ("waiting", snapshot.waiting)):
            family = GaugeMetricFamily(
                f"{_OWN}sequences_{name}", f"Sequences that are {name}, by adapter", labels=("adapter",)
            )
            yield _by(family, {"": 0} | _capped(counts))
        yield _counter(f"{_OWN}adapter_loads", "Adapters loaded into the pool", stats.num_adapter_loads)
        yield _counter(f"{_OWN}steps", "Steps", times.num_steps)
        yield _by(
            CounterMetricFamily(f"{_OWN}step_tokens", "Tokens computed, by phase", labels=("phase",)),
            {"prefill": stats.num_prefill_tokens, "decode": times.num_tokens - stats.num_prefill_tokens},
        )
        yield _by(
            CounterMetricFamily(f"{_OWN}step_seconds", "Time of steps, by part", labels=("part",)),
            {
                "plan": times.plan_s,
                "forward": times.forward_s,
                "sample": times.sample_s,
                "commit": times.commit_s,
                "output": times.output_s,
            },
        )
        kept = CounterMetricFamily(
            f"{_OWN}deadlines", "Requests with a deadline, by kind and whether it was kept",
            labels=("kind", "kept"),
        )  # fmt: skip
        for name, count in asdict(snapshot.stats.deadlines).items():
            kept.add_metric(tuple(name.split("_")), count)
        yield kept
        costs = snapshot.stats.costs
        yield _by(
            CounterMetricFamily(
                f"{_OWN}step_cost_seconds", "Time of steps that were predicted", labels=("kind",)
            ),
            {"predicted": costs.predicted_s, "measured": costs.measured_s},
        )
        yield _by(
            GaugeMetricFamily(
                f"{_OWN}step_cost_error", "Relative error of predicted step times", labels=("quantile",)
            ),
            {"0.5": costs.median_error, "0.95": costs.p95_error},
        )
        yield _by(
            GaugeMetricFamily(
                f"{_OWN}step_cost_factor", "Step time over the cost model's, by class", labels=("class",)
            ),
            costs.factors,
        )
        yield _gauge(
            f"{_OWN}step_cost_calibrated", "1 with a profile of polybatch calibrate", costs.is_calibrated
        )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(_VLLM + name, text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(_VLLM + name, text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(_VLLM + name, text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), histogram.cumulative(), histogram.sum)
        return family


def kv_usage(snapshot: EngineSnapshot) -> float:
    """Share of the pages that sequences hold, of those not taken by adapters in use; 0 to 1."""
    stats = snapshot.stats.scheduler
    in_use = sum(entry.num_pages for entry in snapshot.resident if entry.num_users)
    return stats.num_kv_pages / max(1, stats.num_pages - in_use)


def render(state: ServerState, snapshot: EngineSnapshot | None, accept: str) -> tuple[bytes, str]:
    """The metrics in the format that a scraper accepts, and its content type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServerMetrics(state, snapshot))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class HttpMeter:
    """ASGI middleware around everything: counts answers, and says whose answer is being made."""

    def __init__(self, app: ASGIApp, meter: RequestMeter) -> None:
        self._app, self._meter = app, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})
        HTTP_SCOPE.set(scope)

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                method = scope["method"] if scope["method"] in METHODS else "other"
                key = (getattr(route, "path", "none"), method, f"{message['status'] // 100}xx")
                self._meter.http[key] += 1
            await send(message)

        await self._app(scope, receive, send_counted)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _info(name: str, text: str, labels: Mapping[str, str], value: float = 1.0) -> Metric:
    family = GaugeMetricFamily(name, text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), value)
    return family


def _by(family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[str, float]) -> Metric:
    for label, value in values.items():
        family.add_metric((label,), value)
    return family


def _names(counts: Mapping[str, int]) -> str:
    return ",".join(sorted(name for name in _head(counts) if name))


def _capped(counts: Mapping[str, int]) -> dict[str, float]:
    head = set(_head(counts))
    capped = {name: float(count) for name, count in counts.items() if name in head}
    rest = sum(counts.values()) - sum(capped.values())
    return capped | ({OTHER_ADAPTERS: rest} if rest else {})


def _head(counts: Mapping[str, int]) -> Iterable[str]:
    return list(counts)[:MAX_ADAPTER_LABELS]
