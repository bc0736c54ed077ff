"""What the dashboard shows, as one JSON object: `/dashboard/data` answers with it, twice a second or so.

All times are seconds; `now`, `at` and those that end in `_at` lie on the engine's clock.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from polybatch import __version__
from polybatch.engine.snapshot import EngineSnapshot, PageKind
from polybatch.engine.step_log import RequestTrace, StepRecord
from polybatch.server.auth import Caller
from polybatch.server.histogram import Histogram
from polybatch.server.meter import OTHER_ADAPTERS
from polybatch.server.metrics import kv_usage
from polybatch.server.state import ServerState

MAX_ADAPTERS = 256
DEADLINES = {"ttft": "first token", "tpot": "pace of tokens", "e2e": "last token"}


def dashboard_data(
    state: ServerState, snapshot: EngineSnapshot | None, caller: Caller, after_step: int
) -> dict[str, Any]:
    """Everything but the engine's steps up to `after_step`, which the page has already.

    Once keys exist, a caller sees the requests of the own tenant alone and the adapters that exist for it, an
    administrator those of all.
    """
    health = state.llm.health()
    return {
        "model": state.config.served_model_names[0],
        "version": __version__,
        "uptime_s": time.time() - state.started_s,
        "state": "draining" if state.is_draining else health.state.value,
        "is_ready": health.is_ready and not state.is_draining,
        "reason": health.reason,
        "num_restarts": health.num_restarts,
        "num_queued": state.admission.num_queued_seqs,
        "ttft": _histogram(state.meter.ttft),
        "itl": _histogram(state.meter.itl),
        "engine": None if snapshot is None else _engine(state, snapshot, caller, after_step),
    }


def _engine(state: ServerState, snapshot: EngineSnapshot, caller: Caller, after_step: int) -> dict[str, Any]:
    stats = snapshot.stats.scheduler
    sees_all = state.keys.is_open or caller.is_admin
    visible = set(state.tenants.visible(caller.tenant, state.llm.adapter_paths)) | {""}

    def shown(adapter: str) -> str:
        return adapter if sees_all or adapter in visible else OTHER_ADAPTERS

    return {
        "now": snapshot.at_s,
        "stats": asdict(stats) | {"num_steps": snapshot.stats.times.num_steps},
        "costs": asdict(snapshot.stats.costs),
        "deadlines": asdict(snapshot.stats.deadlines),
        "kv_usage": kv_usage(snapshot),
        "max_num_seqs": state.max_num_seqs,
        "page_size": state.llm.page_size,
        "pages": {
            "num_pages": snapshot.pages.num_pages,
            "pages_per_cell": snapshot.pages.pages_per_cell,
            "kinds": [kind.name.lower() for kind in PageKind],
            "runs": snapshot.pages.runs,
        },
        "steps": [_step(record, shown) for record in state.view.steps if record.index > after_step],
        "running": _renamed(snapshot.running, shown),
        "waiting": _renamed(snapshot.waiting, shown),
        "adapters": [entry for entry in _adapters(state, snapshot) if shown(entry["name"]) == entry["name"]],
        "requests": [
            _request(state, trace, snapshot.at_s)
            for trace in snapshot.traces
            if sees_all or trace.tenant == caller.tenant
        ],
    }


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {
        "bounds": histogram.bounds,
        "counts": histogram.counts,
    }


def _renamed(counts: Mapping[str, int], shown: Callable[[str], str]) -> dict[str, int]:
    """Counts by adapter, those of hidden ones together."""
    found: Counter[str] = Counter()
    for name, count in counts.items():
        found[shown(name)] += count
    return dict(found)


def _step(record: StepRecord, shown: Callable[[str], str]) -> dict[str, Any]:
    """predicted_s is absent where nothing is predicted."""
    step = {
        "index": record.index,
        "at": record.started_s,
        "duration_s": record.duration_s,
        "num_seqs": record.num_seqs,
        "num_loads": record.num_loads,
        "num_preempted": record.num_preempted,
        "decode": _renamed(record.decode, shown),
        "prefill": _renamed(record.prefill, shown),
    }
    return step if record.predicted_s is None else step | {"predicted_s": record.predicted_s}


def _adapters(state: ServerState, snapshot: EngineSnapshot) -> list[dict[str, Any]]:
    """Adapters in the pool, those in use first, then those in host memory."""
    resident = {entry.name: entry for entry in snapshot.resident}
    on_host = [(ref.name, ref.num_pages) for ref in state.llm.adapters if ref.name not in resident]
    in_pool = [(entry.name, entry.num_pages) for entry in snapshot.resident]
    return [
        {
            "name": name,
            "num_pages": num_pages,
            "is_resident": name in resident,
            "is_pinned": name in resident and resident[name].is_pinned,
            "running": snapshot.running.get(name, 0),
            "waiting": snapshot.waiting.get(name, 0),
        }
        for name, num_pages in (in_pool + on_host)[:MAX_ADAPTERS]
    ]


def _request(state: ServerState, trace: RequestTrace, now: float) -> dict[str, Any]:
    return {
        "id": state.meter.client_id(trace.request_id),
        "adapter": trace.adapter,
        "status": trace.status,
        "num_prompt": trace.num_prompt,
        "num_output": trace.num_output,
        "arrival_at": trace.arrival_s,
        "adapter_load_at": trace.adapter_load_s,
        "scheduled_at": trace.first_scheduled_s,
        "first_token_at": trace.first_token_s,
        "finished_at": trace.finished_s,
        "first_due_at": trace.first_due_s,
        "last_due_at": trace.last_due_s,
        "missed": trace.missed,
        "story": ", ".join(story(trace, now)),
    }


def story(trace: RequestTrace, now: float) -> Iterable[str]:
    """What befell a request, in order, as parts of a sentence."""
    end = now if trace.finished_s is None else trace.finished_s
    scheduled = trace.first_scheduled_s
    first_s, last_s = trace.predicted_ttft_s, trace.predicted_e2e_s
    if first_s is not None and last_s is not None:
        yield f"told {_ms(first_s)} to the first token, {_ms(last_s)} to the last"
    waited_s = (end if scheduled is None else scheduled) - trace.arrival_s
    is_for_adapter = trace.adapter_load_s is not None and (
        scheduled is None or trace.adapter_load_s <= scheduled
    )
    yield f"queued {_ms(waited_s)}" + (
        f", adapter {trace.adapter} loaded meanwhile" if is_for_adapter else ""
    )
    if scheduled is not None:
        yield from _computed(trace, scheduled, end)
    if trace.finished_s is not None:
        yield f"ended by {trace.status}"
    for outcome, kinds in (("in time", trace.kept), ("late", trace.missed)):
        if kinds:
            yield f"{outcome}: {' and '.join(DEADLINES[kind] for kind in kinds)}"


def _computed(trace: RequestTrace, scheduled: float, end: float) -> Iterable[str]:
    if trace.num_cached:
        yield f"{trace.num_cached:,} of {trace.num_prompt:,} prompt tokens from cache"
    chunks = "chunk" if trace.num_chunks == 1 else "chunks"
    prefill_s = (end if trace.first_token_s is None else trace.first_token_s) - scheduled
    verb = "prefilling" if trace.first_token_s is None and trace.finished_s is None else "prefilled"
    yield f"{verb} in {trace.num_chunks} {chunks} {_ms(prefill_s)}"
    if trace.num_preemptions:
        yield f"preempted {'once' if trace.num_preemptions == 1 else f'{trace.num_preemptions} times'}"
    if trace.first_token_s is not None:
        tokens = "token" if trace.num_output == 1 else "tokens"
        yield f"{trace.num_output:,} {tokens} in {_ms(end - trace.first_token_s)}"


def _ms(duration_s: float) -> str:
    return f"{duration_s:.1f} s" if duration_s >= 10 else f"{duration_s * 1000:,.0f} ms"
