"""An engine over the stub model: real scheduler, real sampler, fake executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polybatch.config import PoolSpec, SchedulerConfig
from polybatch.engine.core import EngineCore
from polybatch.execution.fake import ByteTokenizer, FakeAdapters, FakeExecutor
from polybatch.request import RequestOutput, SamplingParams
from polybatch.scheduling.scheduler import Scheduler

STUBS: list[type[FakeExecutor]] = [FakeExecutor]
"""The last is what `make_core` builds; `stub` in conftest.py runs tests over both kinds."""


def make_core(
    num_pages: int = 256,
    page_size: int = 4,
    *,
    executor: FakeExecutor | None = None,
    adapters: Sequence[str] = (),
    max_model_len: int = 200,
    max_num_batched_tokens: int = 64,
    max_num_seqs: int = 64,
    seed: int = 0,
    **scheduler: Any,
) -> EngineCore:
    pool = PoolSpec(num_pages, page_size, page_size * 8, 1)
    executor = executor or STUBS[-1](pool=pool)
    store = FakeAdapters(executor)
    for name in adapters:
        store.add(name)
    config = SchedulerConfig(
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        **scheduler,
    )
    return EngineCore(
        executor,
        Scheduler(config, executor.pool),
        ByteTokenizer(),
        store,
        max_model_len=max_model_len,
        seed=seed,
    )


def run(core: EngineCore) -> dict[str, RequestOutput]:
    """Step until nothing is left; finished outputs by request id."""
    found = {}
    while core.has_work():
        for output in core.step():
            if output.finished:
                found[output.request_id] = output
        core.scheduler.check()
    return found


def run_one(core: EngineCore, prompt: Any, adapter: str | None = None, **params: Any) -> RequestOutput:
    core.add_request("one", prompt, SamplingParams(**params), adapter)
    return run(core)["one"]
