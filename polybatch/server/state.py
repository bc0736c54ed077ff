"""What all routes share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi import Request

from polybatch.engine.async_llm import AsyncLLM
from polybatch.server.admission import Admission
from polybatch.server.auth import Keys
from polybatch.server.config import ServerConfig

DEFAULT_MAX_NUM_SEQS = 256


@dataclass(slots=True)
class ServerState:
    """llm: started. started_s: Unix time. is_draining: no new work is taken any more."""

    llm: AsyncLLM
    config: ServerConfig
    keys: Keys
    admission: Admission
    started_s: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False

    @classmethod
    def create(cls, llm: AsyncLLM, config: ServerConfig) -> ServerState:
        max_num_seqs = llm.settings.get("max_num_seqs") or DEFAULT_MAX_NUM_SEQS
        assert isinstance(max_num_seqs, int)
        admission = Admission(
            max_num_seqs, llm.num_pool_tokens, config.max_num_queued_reqs, config.max_num_queued_tokens
        )
        return cls(llm, config, Keys(config.api_keys, config.admin_api_keys), admission)

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: changes with the checkpoint."""
        return f"fp_{self.llm.fingerprint[:12]}"


def state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state
