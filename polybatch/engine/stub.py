"""The model `stub`: the real engine over an executor without a model.

Instant, deterministic nonsense with one token per byte, any adapter name welcome. It tries out files, flags
and pipelines; `stub:step_s=0.02,num_pages=64` makes steps last and memory short, `stub:script=1` lets prompts
write the answers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from polybatch.adapters.weights import AdapterWeights
from polybatch.config import PoolSpec, SchedulerConfig, ServiceLevels
from polybatch.engine.core import EngineCore
from polybatch.errors import AdapterError, ConfigError, RequestError
from polybatch.execution.fake import ByteTokenizer, FakeExecutor
from polybatch.request import AdapterRef
from polybatch.scheduling.online_cost import OnlineCost
from polybatch.scheduling.plan import LogitRows, StepPlan
from polybatch.scheduling.scheduler import Scheduler

STUB_MODEL = "stub"
STUB_POOL = PoolSpec(num_pages=32_768, page_size=16, page_bytes=128, num_layers=1)
STUB_MODEL_LEN = 8_192
STUB_BATCHED_TOKENS = 2_048
SCRIPT_LOGIT = 1_000.0


def is_stub(model: str) -> bool:
    return model == STUB_MODEL or model.startswith(f"{STUB_MODEL}:")


def stub_core(
    model: str = STUB_MODEL,
    adapters: Mapping[str, str] | None = None,
    *,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int | None = None,
    max_model_len: int | None = None,
    enable_prefix_caching: bool = True,
    policy: str = "fcfs",
    service: Mapping[str, Any] | None = None,
    stage_times: Mapping[str, float] | None = None,
    seed: int = 0,
) -> EngineCore:
    """The real loop and scheduler over `FakeExecutor`. Raises ConfigError for unknown options."""
    step_s, num_pages, is_scripted = _options(model)
    config = SchedulerConfig(
        max_num_batched_tokens=max_num_batched_tokens or STUB_BATCHED_TOKENS,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len or STUB_MODEL_LEN,
        policy=policy,
        service=ServiceLevels.of(service or {}),
        stage_times=tuple((stage_times or {}).items()),
        enable_prefix_caching=enable_prefix_caching,
    )
    pool = PoolSpec(num_pages, STUB_POOL.page_size, STUB_POOL.page_bytes, STUB_POOL.num_layers)
    executor = SlowExecutor(pool, step_s) if step_s else FakeExecutor(pool=pool)
    if is_scripted:
        executor = ScriptedExecutor(pool, step_s)
    store = StubAdapters(adapters or {})
    costs = OnlineCost()
    return EngineCore(
        executor,
        Scheduler(config, executor.pool, costs=costs if service else None),
        ByteTokenizer(),
        store,
        max_model_len=config.max_model_len,
        seed=seed,
        costs=costs,
    )


def _options(model: str) -> tuple[float, int, bool]:
    """Seconds per step, pages, whether it is scripted, from `stub:step_s=0.02,num_pages=64,script=1`."""
    values = {"step_s": 0.0, "num_pages": float(STUB_POOL.num_pages), "script": 0.0}
    for option in filter(None, model.removeprefix(STUB_MODEL).removeprefix(":").split(",")):
        name, _, value = option.partition("=")
        try:
            values[name] = {"step_s": float, "num_pages": int, "script": int}[name](value)
        except (KeyError, ValueError):
            raise ConfigError(
                f"the stub's option is {option!r}; it must be step_s=SECONDS, num_pages=COUNT or script=1"
            ) from None
    return values["step_s"], int(values["num_pages"]), bool(values["script"])


class SlowExecutor(FakeExecutor):
    """A stub whose steps take as long as a model's."""

    def __init__(self, pool: PoolSpec, step_s: float) -> None:
        super().__init__(pool=pool)
        self._step_s = step_s

    def forward(self, plan: StepPlan, adapters: Mapping[str, AdapterWeights]) -> torch.Tensor:
        time.sleep(self._step_s)
        return super().forward(plan, adapters)


class ScriptedExecutor(SlowExecutor):
    """A stub that wants to say what its prompt has last between the bytes 2 and 3, and then to end."""

    def forward(self, plan: StepPlan, adapters: Mapping[str, AdapterWeights]) -> torch.Tensor:
        logits = super().forward(plan, adapters)
        row = 0
        for chunk in plan.chunks:
            row += {LogitRows.NONE: 0, LogitRows.LAST: 1, LogitRows.ALL: chunk.n_new}[chunk.logits]
            if chunk.logits is LogitRows.NONE:
                continue
            seq = chunk.seq
            prompt = bytes(token for token in seq.tokens[: seq.num_prompt] if token < 256)
            script = [*prompt.rpartition(b"\2")[2].partition(b"\3")[0], ByteTokenizer.eos_token_id]
            said = min(chunk.start + chunk.n_new - seq.num_prompt, len(script) - 1)
            logits[row - 1, script[said]] += SCRIPT_LOGIT
        return logits


class StubAdapters:
    """Adapters that are their names; each takes one page and changes all answers.

    A folder need not exist, but one whose name begins with "missing" is refused.
    """

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._refs: dict[str, AdapterRef] = {}
        for name, path in paths.items():
            self.register(name, path)

    def register(self, name: str, path: str | Path) -> AdapterRef:
        """Raises AdapterError for a folder called missing."""
        return self.add_weights(name, self.read(path))

    def read(self, path: str | Path) -> AdapterWeights:
        if Path(path).name.startswith("missing"):
            raise AdapterError(f"adapter path {str(path)!r} has no adapter_config.json")
        return AdapterWeights(str(path), layers=())

    def add_weights(self, name: str, weights: AdapterWeights) -> AdapterRef:
        self._refs[name] = AdapterRef(name, hashlib.sha256(name.encode()).hexdigest(), num_pages=1)
        return self._refs[name]

    def remove(self, name: str) -> AdapterRef:
        ref = self.get(name)
        del self._refs[name]
        return ref

    def list(self) -> tuple[AdapterRef, ...]:
        return tuple(self._refs.values())

    def get(self, name: str) -> AdapterRef:
        if name not in self._refs:
            raise RequestError(f"adapter {name!r} is not registered", field="adapter")
        return self._refs[name]

    def mix(self, ref: AdapterRef) -> AdapterRef:
        return replace(ref, num_pages=len(ref.parts))

    def weights(self, digest: str) -> AdapterWeights:
        return AdapterWeights(digest, layers=())

    def hold(self, digest: str) -> None:
        """Nothing is ever freed."""

    def release(self, digest: str) -> None:
        """Nothing is ever freed."""
