"""Opens the engine that a command's flags describe, or the stub.

The stub (`--model stub`) is the real engine over an executor without a model: instant, deterministic
nonsense with one token per byte, any adapter name welcome. It tries out files, flags and pipelines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

from rich.console import Console

from polybatch.adapters.weights import AdapterWeights
from polybatch.cli.options import STUB_MODEL, EngineOptions
from polybatch.config import PoolSpec, SchedulerConfig
from polybatch.engine.core import EngineCore
from polybatch.errors import RequestError
from polybatch.execution.fake import ByteTokenizer, FakeExecutor
from polybatch.models.builtin import cache_dir
from polybatch.request import AdapterRef
from polybatch.scheduling.scheduler import Scheduler

STUB_POOL = PoolSpec(num_pages=32_768, page_size=16, page_bytes=128, num_layers=1)
STUB_MODEL_LEN = 8_192


@contextmanager
def open_core(options: EngineOptions, console: Console, quiet: bool) -> Iterator[EngineCore]:
    """The engine's core, closed on the way out. Raises ConfigError, ModelError or AdapterError."""
    if options.chosen_model() == STUB_MODEL:
        yield stub_core(options)
        return
    from polybatch.engine.llm import LLM

    if not quiet:
        console.print(f"loading {options.chosen_model()}", markup=False, highlight=False)
        if not (cache_dir() / "kernels").is_dir():
            console.print("compiling kernels for this processor, which takes a while only this once")
    with closing(LLM(options.chosen_model(), options.adapters(), **options.engine_settings())) as llm:
        yield llm.core


def stub_core(options: EngineOptions) -> EngineCore:
    """The real loop and scheduler over `FakeExecutor`."""
    config = SchedulerConfig(
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len or STUB_MODEL_LEN,
        enable_prefix_caching=options.enable_prefix_caching,
    )
    executor = FakeExecutor(pool=STUB_POOL)
    return EngineCore(
        executor,
        Scheduler(config, executor.pool),
        ByteTokenizer(),
        StubAdapters(options.adapters()),
        max_model_len=config.max_model_len,
        seed=options.seed,
    )


class StubAdapters:
    """An `AdapterSource` whose adapters are their names; each takes one page and changes all answers."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._refs = {
            name: AdapterRef(name, hashlib.sha256(name.encode()).hexdigest(), num_pages=1) for name in paths
        }

    def get(self, name: str) -> AdapterRef:
        if name not in self._refs:
            raise RequestError(f"adapter {name!r} is not registered", field="adapter")
        return self._refs[name]

    def weights(self, digest: str) -> AdapterWeights:
        return AdapterWeights(digest, layers=())

    def hold(self, digest: str) -> None:
        """Nothing is ever freed."""

    def release(self, digest: str) -> None:
        """Nothing is ever freed."""
