"""Is the engine right on this device? Logits, the equivalence gate, and greedy tokens of a real model.

    python -m benchmarks.cuda.transformers_oracle --device cuda --out results/cuda-oracle

    logits  two random layers of every family against transformers (and peft): prompts in chunks, ragged
            decode batches, all adapters mixed with base rows, and one; relative error below 2e-2 in bfloat16,
            1e-4 in float32
    allocations  steps take no device memory, whatever they hold
    gate    `polybatch selfcheck` in float32 on the example adapters, and how far bfloat16 rows move when they
            are batched: its noise floor, which has no limit
    tokens  greedy tokens of a real model in float32 equal those that the CPU gave, kept in a JSON file that
            `--device cpu --write-reference FILE` makes

The last two want `--model`, a real checkpoint. A comparison that fails ends the program with status 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda.adapters import RandomAdapters
from polybatch.adapters.store import AdapterStore
from polybatch.bench import results
from polybatch.bench.random_adapters import write_adapters
from polybatch.engine import selfcheck
from polybatch.engine.config import EngineConfig
from polybatch.engine.equivalence import Answer, Tally, follow_alone, mixed_scheduler, run_requests, score
from polybatch.engine.llm import LLM
from polybatch.kernels.lora import carried
from polybatch.models.loader import load_model
from polybatch.request import Request, SamplingParams
from polybatch.scheduling.scheduler import Scheduler

LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"

_SMALL = {
    "vocab_size": 1003, "hidden_size": 512, "intermediate_size": 1216, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "eos_token_id": 2, "initializer_range": 0.04,
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": _LLAMA3_ROPE, "head_dim": 128}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 8}),
    "mistral": ("mistral", {"sliding_window": 64, "head_dim": 128}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
}
RANKS = {"rank-5": 5, "rank-16": 16, "rank-64": 64}
PROMPT_TOKENS = (1, 15, 16, 17, 70, 33, 128, 240)
OUTPUT_TOKENS = 24
REFERENCE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. error: what was measured; limit: what it must stay below, None for nothing owed."""

    name: str
    error: float
    limit: float | None
    ok: bool
    note: str = ""


def logits(device: str, dtype: str, folder: Path) -> Iterator[Check]:
    """Every family against transformers."""
    for label, (kind, settings) in FAMILIES.items():
        model_folder = folder / label
        _save_random_model(kind, settings, model_folder)
        weights = load_model(str(model_folder)).weights
        adapters = write_adapters(weights.spec, RANKS, folder / f"{label}-adapters")
        references = {
            name: selfcheck.peft_model(weights, path) for name, path in ((None, None), *adapters.items())
        }
        with closing(_llm(str(model_folder), device, dtype, adapters)) as llm:
            tokens = _tokens(301, 7)
            prefill = score(llm.core.executor, tokens, 1, 97)
            reference = selfcheck.score_with(references[None], tokens, 1)
            yield _within(f"{label} {dtype}: prompt in chunks", [(prefill, reference)], dtype)
            # All adapters together, then one beside base rows, which is carried.
            for names in ([None, *adapters], [None, "rank-16"]):
                requests = _requests(llm, names)
                by_adapter: dict[str | None, list[tuple[torch.Tensor, torch.Tensor]]] = {}
                for request, answer in zip(requests, _answer(llm, requests), strict=True):
                    name = request.adapter.name if request.adapter else None
                    prompt = request.prompt_token_ids
                    scored = [*prompt, *answer.tokens[:-1]]
                    expected = selfcheck.score_with(references[name], scored, len(prompt))
                    by_adapter.setdefault(name, []).append((answer.logits, expected))
                of = "of all" if len(names) > 2 else "of one adapter"
                for name, pairs in by_adapter.items():
                    yield _within(f"{label} {dtype}: decode {of}, {name or 'base'}", pairs, dtype)


def _save_random_model(kind: str, settings: dict[str, Any], folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_SMALL, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        # transformers begins with biases of 0 and norms of 1, which would hide that they are left out.
        if parameter.ndim == 1:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * (0.1 if "norm" in name else 0.3))
    model.save_pretrained(folder)


def _tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = torch.randint(3, _SMALL["vocab_size"], (count,), generator=generator).tolist()
    return drawn


def _llm(model: str, device: str, dtype: str, adapters: dict[str, Path] | None = None) -> LLM:
    return LLM(
        model, adapters, device=device, dtype=dtype, memory="1GiB", max_model_len=1024, max_num_seqs=16,
        max_num_batched_tokens=512,
    )  # fmt: skip


def _requests(llm: LLM, names: Sequence[str | None]) -> list[Request]:
    """Ragged prompts for every adapter, neighbours of different ones."""
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    return [
        llm.core.door.prepare(f"{name}-{length}", _tokens(length, length), params, name)
        for length in PROMPT_TOKENS
        for name in names
    ]


def _answer(llm: LLM, requests: Sequence[Request]) -> list[Answer]:
    store, executor = llm.core.store, llm.core.executor
    assert isinstance(store, AdapterStore)
    scheduler = Scheduler(llm.config.scheduler, executor.pool)
    return run_requests(executor, requests, store, scheduler)[0]


def _within(name: str, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], dtype: str) -> Check:
    """Relative error of all rows together: the norm of the difference over the norm of the reference."""
    got, expected = (torch.cat([pair[side].double().cpu() for pair in pairs]) for side in (0, 1))
    error = float((got - expected).norm() / expected.norm())
    return Check(name, error, LIMITS[dtype], error < LIMITS[dtype], f"{len(got)} rows")


def gate(device: str, model: str) -> Iterator[Check]:
    """The equivalence gate in float32, and the noise floor of bfloat16."""
    weights = load_model(model)
    adapters = {path.name: path for path in sorted(EXAMPLES.iterdir()) if path.is_dir()}
    prompts = [
        selfcheck._encode(text, weights.tokenizer, weights.spec.vocab_size) for text in selfcheck.PROMPTS
    ]
    config = EngineConfig(
        device=device, dtype="float32", memory="2GiB", max_num_batched_tokens=512, max_num_seqs=32
    )
    for row in selfcheck.check(weights.weights, adapters, prompts, config):
        note = f"{row.token_differences} of {row.tokens} tokens differ, {row.near_ties} near ties {row.note}"
        name = f"gate: {row.adapter} against {row.reference}"
        yield Check(name, row.max_logit_difference, row.limit, row.ok, note.strip())
    with closing(_llm(model, device, "bfloat16", adapters)) as llm:
        params = SamplingParams(temperature=0, max_tokens=selfcheck.MAX_TOKENS, ignore_eos=True)
        requests = [
            llm.core.door.prepare(f"{name}-{number}", prompt, params, name)
            for number, prompt in enumerate(prompts)
            for name in (None, *adapters)
        ]
        executor, store = llm.core.executor, llm.core.store
        assert isinstance(store, AdapterStore)
        scheduler = mixed_scheduler(requests, executor.pool, llm.config.scheduler)
        answers, _ = run_requests(executor, requests, store, scheduler)
        tally = Tally(float("inf"))
        for request, answer in zip(requests, answers, strict=True):
            for parts in follow_alone(executor, request, answer, store, llm.config.scheduler):
                tally.add(*parts)
        note = f"{tally.num_differences} of {tally.num_tokens} tokens differ"
        yield Check(
            "noise floor of bfloat16: mixed against alone", tally.max_logit_difference, None, True, note
        )


def greedy(device: str, model: str) -> list[Answer]:
    """Greedy answers of a real model in float32 to the prompts of the gate, in one batch."""
    with closing(_llm(model, device, "float32")) as llm:
        params = SamplingParams(temperature=0, max_tokens=REFERENCE_TOKENS, ignore_eos=True)
        requests = [
            llm.core.door.prepare(f"greedy-{number}", text, params)
            for number, text in enumerate(selfcheck.PROMPTS)
        ]
        return _answer(llm, requests)


def tokens(device: str, model: str, reference: Path) -> Iterator[Check]:
    """Greedy tokens against those of the CPU."""
    expected = json.loads(reference.read_text())["tokens"]
    for number, (answer, wanted) in enumerate(zip(greedy(device, model), expected, strict=True)):
        pairs = zip(answer.tokens, wanted, strict=True)
        place = next((i for i, (got, want) in enumerate(pairs) if got != want), None)
        note = f"{len(wanted)} tokens"
        if place is not None:
            first, second = answer.logits[place].topk(2).values.tolist()
            note = (
                f"token {place} of {len(wanted)} differs, the two best logits are {first - second:.1e} apart"
            )
        yield Check(f"greedy tokens of prompt {number}", float(place is not None), 0.5, place is None, note)


def allocations(device: str) -> Iterator[Check]:
    """Steps allocate no device memory: mixed and decode steps, adapters loaded and evicted on the way."""
    llm = LLM("random:llama-3.2-1b", device=device, memory="256MiB", max_model_len=1024, max_num_seqs=16,
              max_num_batched_tokens=512)  # fmt: skip
    with closing(llm):
        store = llm.core.store
        assert isinstance(store, AdapterStore)
        ranks = {f"a{number}": 8 << number % 3 for number in range(6)}
        RandomAdapters(llm.spec, device=device, buffer_bytes=2**26).register(store, ranks)
        params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
        names = [None, *ranks] * 4
        before = 0
        for turn in range(2):
            prompts = [_tokens(20 + 13 * row, 100 * turn + row) for row in range(len(names))]
            torch.cuda.synchronize()
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            llm.generate(prompts, params, adapter=names)
        torch.cuda.synchronize()
        count = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        loads = llm.stats().scheduler.num_adapter_loads
        steps = llm.stats().times.num_steps
        note = f"{steps} steps, {loads} adapter loads"
        yield Check("device allocations in steps", float(count), 0.5, count == 0, note)


def _checks(arguments: argparse.Namespace, folder: Path) -> Iterator[Check]:
    wanted = arguments.only.split(",")
    if "logits" in wanted:
        for dtype in ("float32", "bfloat16"):
            yield from logits(arguments.device, dtype, folder / dtype)
    if "allocations" in wanted and arguments.device == "cuda":
        yield from allocations(arguments.device)
    if "gate" in wanted and arguments.model:
        yield from gate(arguments.device, arguments.model)
    if "tokens" in wanted and arguments.model and arguments.reference:
        yield from tokens(arguments.device, arguments.model, arguments.reference)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda.transformers_oracle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="logits,allocations,gate,tokens")
    parser.add_argument("--model", help="a real checkpoint, for gate and tokens")
    parser.add_argument("--reference", type=Path, help="JSON with the CPU's tokens")
    parser.add_argument("--write-reference", type=Path, help="make that file and do nothing else")
    parser.add_argument("--out", type=Path, help="folder for oracle.json")
    # Steps here have few rows.
    carried.MIN_ROWS = 1
    arguments = parser.parse_args()
    if arguments.write_reference:
        answers = [answer.tokens for answer in greedy(arguments.device, arguments.model)]
        name = Path(arguments.model).name
        results.write(arguments.write_reference, {"model": name, "dtype": "float32", "tokens": answers})
        return
    done: list[Check] = []
    error = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            for check in _checks(arguments, Path(folder)):
                done.append(check)
                limit = "-" if check.limit is None else f"{check.limit:.0e}"
                verdict = "ok" if check.ok else "WRONG"
                print(
                    f"{verdict:5} {check.error:9.2e} (limit {limit}) {check.name}; {check.note}", flush=True
                )
                gc.collect()
        except Exception as failure:  # noqa: BLE001 - what was compared before is kept
            traceback.print_exc()
            error = f"{type(failure).__name__}: {failure}"
    if arguments.out:
        results.write(
            arguments.out / "oracle.json",
            {
                "command": results.portable_command([parser.prog, *sys.argv[1:]]),
                "error": error,
                "checks": [asdict(check) for check in done],
            },
        )
    num_wrong = sum(not check.ok for check in done)
    print(json.dumps({"checks": len(done), "wrong": num_wrong, "error": error}))
    sys.exit(1 if num_wrong or error or not done else 0)


if __name__ == "__main__":
    main()
