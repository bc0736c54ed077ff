"""What several test files share: tiny transformers models as weights, plans by hand, random adapters."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from polybatch.adapters.weights import AdapterWeights, ModuleDelta
from polybatch.config import ModelSpec, RopeSpec
from polybatch.execution.cuda_graphs import Variant
from polybatch.execution.executor import Executor
from polybatch.models.weights import LayerWeights
from polybatch.request import AdapterRef, Request, SamplingParams, Sequence
from polybatch.scheduling.plan import AdapterLoad, Chunk, LogitRows, PageCopy, StepPlan

SELF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MODULES = (*SELF_ATTENTION, "gate_proj", "up_proj", "down_proj")
VOCAB_SIZE = 97

_SMALL = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
_LONG_ROPE = {"rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}

TINY_MODELS: dict[str, tuple[type[PreTrainedModel], type[PreTrainedConfig], dict[str, object]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-tied-biased": (
        LlamaForCausalLM, LlamaConfig,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ),
    "llama3-rope": (
        LlamaForCausalLM, LlamaConfig,
        {"rope_parameters": {
            **_LONG_ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        }},
    ),
    "llama-linear-rope": (
        LlamaForCausalLM, LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}},
    ),
    "llama-yarn-rope": (
        LlamaForCausalLM, LlamaConfig,
        {"rope_parameters": {**_LONG_ROPE, "rope_type": "yarn"}, "max_position_embeddings": 128},
    ),
    "mistral": (
        MistralForCausalLM, MistralConfig,
        {"sliding_window": 7, "num_key_value_heads": 1, "head_dim": 24},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-windowed-layers": (
        Qwen2ForCausalLM, Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-biased": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "attention_bias": True}),
}  # fmt: skip
"""Name -> (model class, config class, what differs from the smallest Llama)."""


def tiny_model(name: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random float32 transformers model on the CPU, every norm and bias away from 1 and 0."""
    model_class, config_class, changes = TINY_MODELS[name]
    config = config_class(**{**_SMALL, **changes, **overrides})
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in parameter_name:
                parameter.copy_(1 + 0.1 * noise)
            elif parameter_name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed" in parameter_name or "lm_head" in parameter_name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    return model


class HFWeights:
    """`ModelWeights` over a transformers model in memory, of any of the served families."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.spec = spec_of(model.config)

    def embedding(self) -> torch.Tensor:
        return self._state["model.embed_tokens.weight"]

    def lm_head(self) -> torch.Tensor:
        return self.embedding() if self.spec.tie_embeddings else self._state["lm_head.weight"]

    def final_norm(self) -> torch.Tensor:
        return self._state["model.norm.weight"]

    def layer(self, index: int) -> LayerWeights:
        def get(name: str) -> torch.Tensor | None:
            return self._state.get(f"model.layers.{index}.{name}")

        linears: dict[str, torch.Tensor | None] = {}
        for module in MODULES:
            short = module.removesuffix("_proj")
            linears[short] = get(f"{_parent(module)}.{module}.weight")
            linears[f"{short}_bias"] = get(f"{_parent(module)}.{module}.bias")
        return LayerWeights(
            input_norm=get("input_layernorm.weight"),
            post_attention_norm=get("post_attention_layernorm.weight"),
            q_norm=get("self_attn.q_norm.weight"),
            k_norm=get("self_attn.k_norm.weight"),
            **linears,
        )

    def linear(self, layer: int, module: str) -> torch.Tensor:
        return self._state[f"model.layers.{layer}.{_parent(module)}.{module}.weight"]


def _parent(module: str) -> str:
    return "self_attn" if module in SELF_ATTENTION else "mlp"


def spec_of(config: PreTrainedConfig) -> ModelSpec:
    """The spec of a transformers config of a served family."""
    rope = dict(config.rope_parameters)
    layer_types = getattr(config, "layer_types", None) or ()
    attention_bias = getattr(config, "attention_bias", False)
    qwen2 = config.model_type == "qwen2"
    return ModelSpec(
        family=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        max_position=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope=RopeSpec(
            theta=rope["rope_theta"],
            kind=rope["rope_type"],
            factor=rope.get("factor", 1.0),
            original_max_position=rope.get("original_max_position_embeddings"),
            low_freq_factor=rope.get("low_freq_factor", 1.0),
            high_freq_factor=rope.get("high_freq_factor", 4.0),
        ),
        tie_embeddings=config.tie_word_embeddings,
        qkv_bias=qwen2 or attention_bias,
        o_bias=attention_bias and not qwen2,
        mlp_bias=getattr(config, "mlp_bias", False),
        qk_norm=config.model_type == "qwen3",
        sliding_window=getattr(config, "sliding_window", None),
        windowed_layers=tuple(kind == "sliding_attention" for kind in layer_types),
    )


def sequence(
    tokens: SequenceOf[int], pages: SequenceOf[int] = (), adapter: AdapterRef | None = None
) -> Sequence:
    """A sequence with these tokens and pages, as a scheduler would hold it."""
    request = Request("r", tuple(tokens), SamplingParams(), max_tokens=16, seed=0, adapter=adapter)
    seq = Sequence(request)
    seq.pages = list(pages)
    return seq


def random_adapter(
    spec: ModelSpec,
    ranks: dict[str, int],
    seed: int = 0,
    *,
    layers: Iterable[int] | None = None,
    dense: bool = False,
    name: str | None = None,
) -> AdapterWeights:
    """A random adapter with these ranks per module, in all layers or the given ones.

    dense: also a gain and a bias on every adapted module, as DoRA with trained biases would have.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = set(range(spec.num_layers) if layers is None else layers)

    def delta(module: str, rank: int) -> ModuleDelta:
        num_out, num_in = spec.linear_shapes[module]
        return ModuleDelta(
            a=torch.randn(rank, num_in, generator=generator) * num_in**-0.5,
            b=torch.randn(rank, num_out, generator=generator) * max(rank, 1) ** -0.5,
            gain=1 + 0.2 * torch.randn(num_out, generator=generator) if dense else None,
            bias=0.2 * torch.randn(num_out, generator=generator) if dense else None,
        )

    return AdapterWeights(
        digest=name or f"adapter-{seed}",
        layers=tuple(
            {module: delta(module, rank) for module, rank in ranks.items()} if layer in chosen else {}
            for layer in range(spec.num_layers)
        ),
    )


def merged_model(model: PreTrainedModel, adapter: AdapterWeights) -> PreTrainedModel:
    """A copy of a transformers model with all that an adapter changes worked into its weights."""
    model = copy.deepcopy(model)
    tables = (model.model.embed_tokens, adapter.embedding), (model.lm_head, adapter.lm_head)
    # Read both before either is written: tied tables are one, and only one of them may change.
    changed = [
        (module, delta.full if delta.full is not None else module.weight + delta.left @ delta.right)
        for module, delta in tables
        if delta is not None
    ]
    for module, table in changed:
        module.weight = torch.nn.Parameter(table.detach().clone())
    with torch.no_grad():
        for layer, deltas in zip(model.model.layers, adapter.layers, strict=True):
            for module, delta in deltas.items():
                linear = layer.get_submodule(f"{_parent(module)}.{module}")
                linear.weight.add_(delta.b.T @ delta.a)
                if delta.gain is not None:
                    linear.weight.mul_(delta.gain[:, None])
                if delta.bias is not None:
                    base = 0 if linear.bias is None else linear.bias
                    linear.bias = torch.nn.Parameter(base + delta.bias)
    return model


def hf_logits(model: PreTrainedModel, tokens: SequenceOf[int]) -> torch.Tensor:
    """Logits [len(tokens), vocab] of a transformers model over one prompt alone."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(tokens)])).logits[0].float()


class Driver:
    """Drives an executor by hand: gives shuffled pages, loads adapters at first use, keeps all logits.

    Pages are never given back, so a test needs a pool that holds everything it runs.
    """

    def __init__(self, executor: Executor, seed: int = 0) -> None:
        self.executor = executor
        generator = torch.Generator().manual_seed(seed)
        self._free = torch.randperm(executor.pool.num_pages, generator=generator).tolist()
        self._host: dict[str, AdapterWeights] = {}
        self._resident: dict[str, tuple[int, ...]] = {}

    def take(self, count: int) -> tuple[int, ...]:
        """Pages that nobody has."""
        return tuple(self._free.pop() for _ in range(count))

    def add(self, tokens: SequenceOf[int], adapter: AdapterWeights | None = None) -> Sequence:
        """A sequence with pages for all of its tokens, none computed yet."""
        ref = None
        if adapter is not None:
            self._host[adapter.digest] = adapter
            ref = AdapterRef(adapter.digest, adapter.digest, self.executor.adapter_pages(adapter))
        return sequence(tokens, self.take(-(-len(tokens) // self.executor.pool.page_size)), ref)

    def step(
        self,
        chunks: SequenceOf[tuple[Sequence, int]],
        rows: LogitRows | SequenceOf[LogitRows] = LogitRows.ALL,
        copies: SequenceOf[PageCopy] = (),
    ) -> torch.Tensor:
        """Run the next `n` tokens of each sequence; returns a copy of the logits."""
        wanted = [rows] * len(chunks) if isinstance(rows, LogitRows) else rows
        refs = {seq.adapter.digest: seq.adapter for seq, _ in chunks if seq.adapter is not None}
        loads = tuple(
            AdapterLoad(ref, self.take(ref.num_pages))
            for digest, ref in refs.items()
            if digest not in self._resident
        )
        self._resident.update({load.adapter.digest: load.pages for load in loads})
        plan = StepPlan(
            chunks=tuple(
                Chunk(seq, seq.num_computed, count, row)
                for (seq, count), row in zip(chunks, wanted, strict=True)
            ),
            copies=tuple(copies),
            loads=loads,
            resident={digest: self._resident[digest] for digest in refs},
        )
        logits = self.executor.forward(plan, self._host).clone()
        for seq, count in chunks:
            seq.num_computed += count
        return logits

    def run(self, seqs: SequenceOf[Sequence], schedule: SequenceOf[SequenceOf[int]]) -> list[torch.Tensor]:
        """Run steps until all is computed and released; returns the logits of every token, per sequence.

        schedule: per step how many tokens each sequence gets, at most what it still lacks; when the
        schedule ends, the rest of every sequence runs in one step.
        """
        parts: list[list[torch.Tensor]] = [[] for _ in seqs]
        for counts in itertools.chain(schedule, [[10**9] * len(seqs)]):
            chunks = [
                (i, min(count, seq.num_uncomputed))
                for i, (seq, count) in enumerate(zip(seqs, counts, strict=True))
            ]
            chunks = [(i, count) for i, count in chunks if count > 0]
            if chunks:
                logits = self.step([(seqs[i], count) for i, count in chunks])
                for (i, _), part in zip(chunks, logits.split([count for _, count in chunks]), strict=True):
                    parts[i].append(part)
        for seq in seqs:
            self.executor.release(seq)
        return [torch.cat(part) for part in parts]


class Replays:
    """A ladder of graphs whose replays run what they would have captured; its smallest are rehearsed."""

    def __init__(self, sizes: list[int], run: Callable[[int, Variant, bool], None]) -> None:
        self.sizes, self._run = sizes, run
        self.replayed: list[tuple[int, Variant]] = []

    def size_for(self, num_rows: int) -> int | None:
        return next((size for size in self.sizes if size >= num_rows), None)

    def replay(self, size: int, variant: Variant) -> None:
        if size == self.sizes[0] and (size, variant) not in self.replayed:
            self._run(size, variant, True)
        self.replayed.append((size, variant))
        self._run(size, variant, False)


def run_alone(
    executor: Executor, tokens: SequenceOf[int], adapter: AdapterWeights | None = None
) -> torch.Tensor:
    """Logits [len(tokens), vocab] of one sequence as the only one, in one chunk."""
    driver = Driver(executor)
    return driver.run([driver.add(tokens, adapter)], [])[0]


def random_tokens(count: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count,), generator=generator).tolist()
