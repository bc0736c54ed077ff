"""Other engines on the same card: transformers' continuous batching, and peft's mixed batches.

Both hold random weights of the same shape, drawn on the device, in bfloat16. Continuous batching wants flash
attention; where that is missing it takes torch's attention over gathered pages, which the figure says.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.cuda import workloads
from benchmarks.cuda.figures import Figure
from benchmarks.cuda.pieces import WARMUP_RUN, Setup
from polybatch.bench.results import Timed, record
from polybatch.bench.workloads import Workload
from polybatch.errors import EngineError
from polybatch.models.random_weights import open_random

ATTENTIONS = ("flash_attention_3", "flash_attention_2", "sdpa", "eager")
"""Continuous batching puts the paged variant of each in its place."""

CACHE_PAGE_TOKENS = 128
TRIAL_REQUESTS = 16
PEFT_MIXES = {"G5 peft": ("8", 64, 8), "peft, an adapter a row": ("64", 32, 4)}
"""Figure: mix of adapters, requests, tokens out. Of a thousand, most rows have one of their own."""

PEFT_INPUT_TOKENS = 256


def continuous_batching(setup: Setup) -> Iterator[Figure]:
    """G1 by continuous batching, its defaults as they are, with the first attention that runs.

    Where a trial says that the whole workload would take minutes, a part of it stands for the rest.
    """
    vocab_size = _settings(setup)["vocab_size"]
    errors = []
    for attention in ATTENTIONS:
        if not _has(attention):
            errors.append(f"{attention} is not installed")
            continue
        try:
            model = _model(setup, attention)
            trial = workloads.make("G1", WARMUP_RUN, vocab_size, setup.shrink).head(TRIAL_REQUESTS)
            _generate_batch(model, trial)
        except Exception as error:  # noqa: BLE001 - whatever another engine raises, the next attention may do
            errors.append(f"{attention}: {type(error).__name__}: {error}"[:300])
            print(errors[-1], file=sys.stderr)
            continue
        yield _throughput(model, setup, attention, vocab_size)
        return
    raise EngineError(f"no attention of transformers' continuous batching runs: {'; '.join(errors)}")


def _throughput(model: Any, setup: Setup, attention: str, vocab_size: int) -> Figure:
    trial = workloads.make("G1", WARMUP_RUN + 1, vocab_size, setup.shrink).head(2 * TRIAL_REQUESTS)
    per_request_s = _generate_batch(model, trial).total_s / len(trial.requests)
    whole = workloads.make("G1", 0, vocab_size, setup.shrink)
    # Batches of all requests are far quicker per request, so this errs towards running everything.
    is_whole = per_request_s * len(whole.requests) < 90
    count = len(whole.requests) if is_whole else len(trial.requests)
    kept = []
    for run in range(setup.runs if is_whole else 1):
        workload = workloads.make("G1", run, vocab_size, setup.shrink).head(count)
        kept.append(record(workload, run, _generate_batch(model, workload)))
    values = tuple(run.out_tok_s for run in kept)
    note = f"{attention} over pages, {count} of {len(whole.requests)} requests, warm-up excluded"
    runs = {"runs": [dataclasses.asdict(run) for run in kept]}
    return Figure("G1 transformers", statistics.median(values), "out tok/s", values, note=note, details=runs)


def _generate_batch(model: Any, workload: Workload) -> Timed:
    """Through the manager, so that its cache and graphs are there before the clock runs.

    Raises EngineError where the engine lost requests, which it only logs.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    prompts = [list(request.token_ids) for request in workload.requests]
    (max_tokens,) = {request.max_tokens for request in workload.requests}
    generation = GenerationConfig(do_sample=False, max_new_tokens=max_tokens, eos_token_id=-1, pad_token_id=0)
    hints = WorkloadHints(max(map(len, prompts)), max_tokens, len(prompts))
    limits = {}
    if "flash" not in model.config._attn_implementation:
        # Without flash attention a step attends over the whole cache, so it is made to fit the requests.
        pages = sum(-(-(len(prompt) + max_tokens) // CACHE_PAGE_TOKENS) for prompt in prompts)
        limits = {"num_blocks": pages + 8, "block_size": CACHE_PAGE_TOKENS, "max_batch_tokens": 4096}
    outputs: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(
        generation_config=generation,
        continuous_batching_config=ContinuousBatchingConfig(**limits),
        workload_hints=hints,
        timeout=5,
    ) as manager:
        start = time.perf_counter()
        ids = manager.add_requests(inputs=prompts, max_new_tokens=max_tokens)
        while len(outputs) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                outputs[result.request_id] = list(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise EngineError(f"generation ended with {len(outputs)} of {len(prompts)} requests answered")
        total_s = time.perf_counter() - start
    return Timed(total_s, [outputs[request_id] for request_id in ids])


def mixed_adapters(setup: Setup) -> Iterator[Figure]:
    """Batches through peft's `adapter_names`: a small G5 of 8 adapters in turn, and one for every row."""
    from peft import LoraConfig, get_peft_model

    inputs = max(1, PEFT_INPUT_TOKENS // setup.shrink)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model: Any = _model(setup, "sdpa")
    known: set[str | None] = set()
    for key, (mix, count, outputs) in PEFT_MIXES.items():
        ranks, names = workloads.assign(mix, max(1, count // setup.shrink))
        for name in dict.fromkeys(names):
            if name is None or name in known:
                continue
            config = LoraConfig(r=ranks[name], lora_alpha=32, target_modules=modules, init_lora_weights=False)
            with torch.device(setup.device):
                if known:
                    model.add_adapter(name, config, autocast_adapter_dtype=False)
                else:
                    model = get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
            known.add(name)
        model = model.to(setup.device, torch.bfloat16).eval()

        # Each run's prompts are new; the first warms up.
        _peft_speed(setup, model, mix, names, 2, 0)
        speeds = [_peft_speed(setup, model, mix, names, outputs, run + 1) for run in range(setup.runs)]
        values = tuple(round(speed, 2) for speed in speeds)
        base = _peft_speed(setup, model, mix, ["__base__"] * len(names), outputs, setup.runs + 1)
        note = (
            f"adapter_names, {len(set(names))} adapters, {len(names)} requests, {inputs} tokens in, "
            f"{outputs} out; {base:.0f} out tok/s with every row on the base model"
        )
        yield Figure(key, statistics.median(values), "out tok/s", values, note=note)


def _peft_speed(
    setup: Setup, model: Any, mix: str, names: Sequence[str | None], outputs: int, run: int
) -> float:
    """Tokens per second of a batch."""
    inputs = max(1, PEFT_INPUT_TOKENS // setup.shrink)
    workload = workloads.decode(len(names), outputs, run, _settings(setup)["vocab_size"], mix, inputs)
    return len(names) * outputs / _padded(model, workload, names, setup.device).total_s


def _padded(model: Any, workload: Workload, names: Sequence[str | None], device: str) -> Timed:
    """All requests, of equal lengths, in one call of `generate`."""
    ids = torch.tensor([request.token_ids for request in workload.requests], device=device)
    (max_tokens,) = {request.max_tokens for request in workload.requests}
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=list(names), do_sample=False,
            max_new_tokens=max_tokens, min_new_tokens=max_tokens, pad_token_id=0,
        )  # fmt: skip
    # Reading the tokens waits for the device.
    tokens = output[:, ids.shape[1] :].tolist()
    timed = Timed(time.perf_counter() - start, tokens)
    record(workload, 0, timed)
    return timed


def _has(attention: str) -> bool:
    """Whether flash attention is installed; what the hub could send does not count."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    found = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
    return attention not in found or bool(found[attention]())


def _settings(setup: Setup) -> dict[str, Any]:
    return open_random(setup.model.removeprefix("random:"))[1]


def _model(setup: Setup, attention: str) -> Any:
    """A model of transformers with random weights, drawn on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(_settings(setup))
    with warnings.catch_warnings():
        # Advice on settings that it converts by itself.
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device(setup.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return model.eval()
