"""What all routes share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request

from polybatch.engine.async_llm import AsyncLLM
from polybatch.server.admission import Admission
from polybatch.server.auth import Keys
from polybatch.server.config import ServerConfig
from polybatch.server.engine_view import EngineView
from polybatch.server.meter import RequestMeter
from polybatch.server.rates import TokenRates
from polybatch.server.tenants import SharedPrefixes, TenantBook, read_tenants

if TYPE_CHECKING:
    from polybatch.server.batches.service import BatchService

DEFAULT_MAX_NUM_SEQS = 256


@dataclass(slots=True)
class ServerState:
    """llm: started. started_s: Unix time. is_draining: no new work is taken any more.
    batches: None for a server that keeps no files. meter, view: what watchers read.
    tenants, shared_prefixes: as the file has them."""

    llm: AsyncLLM
    config: ServerConfig
    keys: Keys
    admission: Admission
    started_s: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    batches: BatchService | None = None
    meter: RequestMeter = field(default_factory=RequestMeter)
    view: EngineView = field(init=False)
    tenants: TenantBook = field(default_factory=TenantBook)
    shared_prefixes: SharedPrefixes = field(default_factory=SharedPrefixes)
    rates: TokenRates = field(default_factory=TokenRates)

    def __post_init__(self) -> None:
        self.view = EngineView(self.llm)
        self.llm.observer = self.meter

    @classmethod
    def create(cls, llm: AsyncLLM, config: ServerConfig) -> ServerState:
        admission = Admission(
            _max_num_seqs(llm), llm.num_pool_tokens, config.max_num_queued_reqs, config.max_num_queued_tokens
        )
        keys = Keys(config.api_keys, config.admin_api_keys, config.api_keys_file, config.metrics_api_keys)
        state = cls(llm, config, keys, admission)
        state.reload()
        return state

    def reload(self) -> None:
        """Read keys and tenants again; calls that were let in go on. Raises ConfigError, changing nothing."""
        tenants = read_tenants(self.config.tenants_file)
        shared_prefixes = SharedPrefixes(tenants.shared_prefixes, self.llm.tokenizer)
        self.keys.reload()
        self.tenants, self.shared_prefixes = tenants, shared_prefixes
        self.admission.is_shared = len(self.keys.tenants) > 1

    @property
    def max_num_seqs(self) -> int:
        """Sequences that may run at once."""
        return _max_num_seqs(self.llm)

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: changes with the checkpoint."""
        return f"fp_{self.llm.fingerprint[:12]}"


def _max_num_seqs(llm: AsyncLLM) -> int:
    max_num_seqs = llm.settings.get("max_num_seqs") or DEFAULT_MAX_NUM_SEQS
    assert isinstance(max_num_seqs, int)
    return max_num_seqs


def state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state
