"""Configuration: small frozen dataclasses by concern; derived values are properties. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from polybatch.errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021) and its length extensions.

    kind: "default"; "linear" (positions / factor); "llama3" (Llama 3.1's smoothed band scaling);
    "yarn" (Peng et al. 2023). The fields after `factor` belong to llama3 and yarn only.
    frequency_factors: one divisor per frequency, length head_dim / 2, where a checkpoint ships them.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    frequency_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("default", "linear", "llama3", "yarn"):
            raise ModelError(
                f"rope_scaling type is {self.kind!r}; supported are default, linear, llama3 and yarn"
            )


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a decoder-only checkpoint is made of, whatever file format it came from.

    family: registry key, the checkpoint's `model_type` ("llama", "mistral", "qwen2", "qwen3").
    sliding_window: tokens that a query sees, itself included, or None; windowed_layers: per layer,
    whether the window applies. qkv_bias, o_bias, mlp_bias: linear layers with a bias.
    qk_norm: RMSNorm over each head of q and k before the rotation.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    windowed_layers: tuple[bool, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
                     "num_kv_heads", "head_dim", "max_position"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ModelError(f"the checkpoint's {name} is {getattr(self, name)}; it must be positive")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"the checkpoint has {self.num_heads} attention heads and {self.num_kv_heads} key-value "
                "heads; the first must be a multiple of the second"
            )
        if self.head_dim % 2:
            raise ModelError(f"the checkpoint's head_dim is {self.head_dim}; it must be even")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens, or None where it sees everything."""
        if self.sliding_window is None or (self.windowed_layers and not self.windowed_layers[layer]):
            return None
        return self.sliding_window

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Adaptable linear layers of a decoder layer: module name -> (out, in)."""
        h, q, kv, ff = self.hidden_size, self.q_size, self.kv_size, self.intermediate_size
        return {
            "q_proj": (q, h),
            "k_proj": (kv, h),
            "v_proj": (kv, h),
            "o_proj": (h, q),
            "gate_proj": (ff, h),
            "up_proj": (ff, h),
            "down_proj": (h, ff),
        }


DTYPES = ("float32", "bfloat16")
QUANTIZATIONS = (None, "int8", "int4")
"""What the CPU's executors know."""

CUDA_DTYPES = (*DTYPES, "float16")
CUDA_QUANTIZATIONS = (None, "int4", "int4-channel", "fp8")


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Shape of the page pool: `num_pages` equal pages in every layer, one page id for all layers."""

    num_pages: int
    page_size: int
    page_bytes: int
    num_layers: int

    @property
    def total_bytes(self) -> int:
        return self.num_pages * self.page_bytes * self.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLevels:
    """What live requests are promised, and what is done for it. Seconds; None for nothing.

    ttft_s, tpot_s, e2e_s: deadlines of live requests that bring none of their own; batch_e2e_s: of rows.
    target_tbt_s: no step beside live decodes is to take longer. refuse_late: a request whose deadlines will
    not be met by the forecast at its arrival is refused, else it is served and told so. abort_late: one that
    waits until its first token cannot come in time ends with an error, else it is served after the others.
    batch_slowdown: by what share rows of batches may lengthen a step of live requests; None for up to what
    their deadlines leave. max_batch_step_s: of a step that holds rows only, for a live request that
    arrives meanwhile must wait for it. All but deadlines as such need a cost model.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    batch_e2e_s: float | None = None
    target_tbt_s: float | None = None
    refuse_late: bool = False
    abort_late: bool = False
    batch_slowdown: float | None = 0.05
    max_batch_step_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "e2e_s", "batch_e2e_s", "target_tbt_s", "max_batch_step_s"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not 0 < value < float("inf")):
                raise ConfigError(f"{name} is {value!r}; it must be a positive number of seconds or None")
        slowdown = self.batch_slowdown
        if slowdown is not None and (isinstance(slowdown, bool) or not 0 <= slowdown < float("inf")):
            raise ConfigError(f"batch_slowdown is {slowdown!r}; it must be a share such as 0.05, or None")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ServiceLevels:
        """From a map of its fields. Raises ConfigError for an unknown one."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"service has {name!r}; it knows {', '.join(known)}")
        return cls(**values)


BATCHING = ("stall_free", "prefill_first", "chunk_only", "hybrid_only")
"""How prompts and decodes share steps; all but the first are there to be compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Budgets and policy of the scheduler.

    max_num_batched_tokens: token budget of a step for prefill; decodes are never held back by it.
    max_num_seqs: sequences that run at once. max_model_len: prompt + output, in tokens.
    max_scored_tokens: of prompts whose logits are asked for, in one step; None for no limit of its own.
    policy: one of `polybatch.scheduling.policies.POLICIES`.
    reserve_pages: pages that only running sequences and adapters may be the first to use; idle prefixes are
        evicted before.
    service: what live requests are promised. batching: one of BATCHING.
    adapter_cluster: distinct adapters in the running batch from which on those who need one of them are
        admitted before others; None for never.
    stage_times: (kind, mean seconds) of stages of workflows, where they are known; others are learned.

    Raises ConfigError for what is out of range.
    """

    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    max_model_len: int = 4096
    max_scored_tokens: int | None = None
    policy: str = "fcfs"
    enable_prefix_caching: bool = True
    reserve_pages: int = 0
    service: ServiceLevels = field(default_factory=ServiceLevels)
    batching: str = "stall_free"
    adapter_cluster: int | None = None
    stage_times: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "max_num_seqs", "max_model_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a positive integer")
        if self.batching not in BATCHING:
            raise ConfigError(f"batching is {self.batching!r}; it must be one of {', '.join(BATCHING)}")
        cluster = self.adapter_cluster
        if cluster is not None and (not isinstance(cluster, int) or isinstance(cluster, bool) or cluster < 1):
            raise ConfigError(f"adapter_cluster is {cluster!r}; it must be a positive integer or None")
        for kind, mean_s in self.stage_times:
            if not isinstance(kind, str) or not kind:
                raise ConfigError(f"stage_times has the stage {kind!r}; it must be a name")
            is_number = isinstance(mean_s, (int, float)) and not isinstance(mean_s, bool)
            if not is_number or not 0 < mean_s < float("inf"):
                raise ConfigError(
                    f"stage_times of {kind!r} is {mean_s!r}; it must be a positive number of seconds"
                )
        # The list of policies is above this room, and only its names are wanted here.
        from polybatch.scheduling.policies import policy_named

        policy_named(self.policy)
