"""The equivalence gate: does every row of a mixed batch equal what its adapter answers by itself?

The base model and all adapters answer the same prompts in one batch, under chunked prefill, prefix hits
and preemptions. Each row is compared with itself run alone in a fresh engine, with its adapter merged
into the weights and run as a plain model, and with transformers and peft where they are installed: greedy
tokens and logits, in float32. The first comparison is repeated in the precision that would be served.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from polybatch.adapters.merge import MergedWeights
from polybatch.adapters.peft_lora import load_peft
from polybatch.adapters.store import AdapterStore
from polybatch.engine.config import PAGE_SIZE, EngineConfig, ResolvedConfig
from polybatch.engine.door import Door
from polybatch.engine.equivalence import (
    Answer,
    Pressure,
    Tally,
    follow_alone,
    mixed_scheduler,
    run_requests,
    score,
)
from polybatch.engine.executors import build_executor, settle
from polybatch.engine.ports import TextTokenizer
from polybatch.errors import EngineError
from polybatch.execution.executor import Executor
from polybatch.models.as_transformers import to_transformers
from polybatch.models.loader import load_model
from polybatch.models.weights import ModelWeights
from polybatch.request import Request, SamplingParams

MAX_LOGIT_DIFFERENCE = 1e-3
MAX_TOKENS = 20
"""More than a page of the pool holds, so that every sequence has to ask for another while others run."""

ADAPTERS_PER_BATCH = 32
"""More are checked batch by batch, because the logits of a whole batch are kept."""

BASE = "(base)"

_LETTER = (
    "Dear neighbours, the old footbridge behind the mill will be closed from the second Monday in May until "
    "the end of June. The planks have rotted where the willows drip on them, and the railing on the north "
    "side came loose in the storm. Walkers can cross at the weir, ten minutes upstream; cyclists should take "
    "the road through the village. The school bus will wait at the chapel instead of the mill. If you would "
    "like to help with the painting, write to Ines at the post office before Easter.\n\n"
)
PROMPTS = (
    "Write one sentence about the sea in winter.",
    "The film was far too long, but the last scene made me cry. Was it",
    "Name, phone and town: Jonas Weber, 555-0147, lives in Ulm. As JSON:",
    "How many customers ordered more than three lamps in March?",
    _LETTER + "Where does the school bus stop while the bridge is closed?",
    _LETTER + "Summarise the letter in five words.",
)
"""Texts that every adapter answers; the last two share a prefix of several pages."""

T = TypeVar("T")
Build = Callable[[ModelWeights, ResolvedConfig], Executor]
Tell = Callable[[str], None]


def _ignore(message: str) -> None:
    """For callers who do not want to be told."""


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One adapter against one reference.

    token_differences: of `tokens`; near_ties: those among them where the reference's two best logits are
    closer than 0.001, which is allowed. limit: of max_logit_difference; 0 asks for equal bits.
    note: why nothing was compared, where nothing was.
    """

    adapter: str
    reference: str
    rows: int
    tokens: int
    token_differences: int
    near_ties: int
    max_logit_difference: float
    limit: float
    ok: bool
    note: str = ""


def run(
    model: str,
    adapters: Mapping[str, str | Path],
    *,
    prompts: Sequence[str] | None = None,
    progress: Tell = _ignore,
    report: Tell = _ignore,
    **settings: Any,
) -> list[CheckRow]:
    """Check adapters of a model, opened as by `LLM`; one row per adapter and reference.

    prompts: instead of the built-in ones; some must begin alike and some be long. progress: told each phase;
    report: what the mixed batches went through.
    settings: those of `EngineConfig`. What makes the batch hard (token budget, share of the pool, prefix
    caching) is the check's own choice. Takes a few times the model's size in float32.
    Raises ConfigError, ModelError, AdapterError or RequestError before anything runs.
    """
    config = EngineConfig(**settings)
    loaded = load_model(str(model))
    ids = [_encode(text, loaded.tokenizer, loaded.spec.vocab_size) for text in prompts or PROMPTS]
    return check(loaded.weights, adapters, ids, config, progress=progress, report=report)


def _encode(text: str, tokenizer: TextTokenizer | None, vocab_size: int) -> list[int]:
    if tokenizer is None:
        return [byte % vocab_size for byte in text.encode()]
    return tokenizer.encode(text)


def check(
    weights: ModelWeights,
    adapters: Mapping[str, str | Path],
    prompts: Sequence[Sequence[int]],
    config: EngineConfig,
    *,
    max_tokens: int = MAX_TOKENS,
    build: Build = build_executor,
    progress: Tell = _ignore,
    report: Tell = _ignore,
) -> list[CheckRow]:
    """`run` for weights in hand and prompts of token ids. build: makes the executors under test."""
    names = list(adapters)
    rows: list[CheckRow] = []
    for start in range(0, max(len(names), 1), ADAPTERS_PER_BATCH):
        group = {name: Path(adapters[name]) for name in names[start : start + ADAPTERS_PER_BATCH]}
        batch = _Batch(weights, group, prompts, max_tokens, build, progress, report)
        exact = replace(config, dtype="float32", quantization=None)
        answers = batch.answer_mixed(exact)
        rows += batch.against_alone(exact, answers)
        rows += batch.against_merged(exact, answers)
        rows += batch.against_peft(answers)
        served = settle(config, weights.spec)
        if (served.dtype, served.quantization) != ("float32", None):
            rows += batch.against_alone(config, batch.answer_mixed(config))
    return rows


class _Batch:
    """The base model and some adapters on the same prompts. Answers are keyed by adapter name or None."""

    def __init__(
        self,
        weights: ModelWeights,
        adapters: Mapping[str, Path],
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        build: Build,
        progress: Tell,
        report: Tell,
    ) -> None:
        self.weights = weights
        self.adapters = adapters
        self._groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for prompt in prompts:
            self._groups.setdefault(tuple(prompt[:PAGE_SIZE]), []).append(tuple(prompt))
        self.prompts = [prompt for group in self._groups.values() for prompt in group]
        self._params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self._build = build
        self._progress, self._report = progress, report

    def answer_mixed(self, config: EngineConfig) -> dict[str | None, list[Answer]]:
        """All prompts of all adapters in one batch, in a pool that is too small for them."""
        resolved = settle(config, self.weights.spec)
        self._progress(f"mixed batch, {_precision(resolved)}")
        with closing(self._build(self.weights, resolved)) as executor:
            store = self._store(executor)
            requests = self._requests(store, resolved)
            scheduler = mixed_scheduler(requests, executor.pool, resolved.scheduler)
            answers, pressure = run_requests(executor, requests, store, scheduler)
        self._report(f"{_precision(resolved)}: {_describe(requests, pressure)}")
        if not pressure.is_complete:
            raise EngineError(f"the mixed batch was not mixed as rehearsed: {pressure}")
        return self._by_name(requests, answers)

    def against_alone(
        self, config: EngineConfig, answers: Mapping[str | None, list[Answer]]
    ) -> Iterator[CheckRow]:
        """Each row against itself in a fresh engine of the same precision."""
        resolved = settle(config, self.weights.spec)
        precision = _precision(resolved)
        reference = "alone" if precision == "float32" else f"alone, {precision}"
        with closing(self._build(self.weights, resolved)) as executor:
            store = self._store(executor)
            is_exact = getattr(executor, "batch_invariant", False)
            if not is_exact and precision != "float32":
                # Rounding differs with the batch there, and nothing says by how much it may.
                yield from (_skipped(name, reference, "not promised") for name in answers)
                return
            requests = self._requests(store, resolved)
            for name, own in self._by_name(requests, requests).items():
                self._progress(f"{name or BASE}: {reference}")
                tally = Tally(0.0 if is_exact else MAX_LOGIT_DIFFERENCE)
                for request, answer in zip(own, answers[name], strict=True):
                    for parts in follow_alone(executor, request, answer, store, resolved.scheduler):
                        tally.add(*parts)
                yield _row(name, reference, len(own), tally)

    def against_merged(
        self, config: EngineConfig, answers: Mapping[str | None, list[Answer]]
    ) -> Iterator[CheckRow]:
        """Each adapter's rows against a plain model with the adapter merged into its weights."""
        resolved = settle(config, self.weights.spec)
        budget = resolved.scheduler.max_num_batched_tokens
        for name, path in self.adapters.items():
            self._progress(f"{name}: merged")
            merged = MergedWeights(self.weights, load_peft(path, self.weights))
            with closing(self._build(merged, resolved)) as executor:
                yield self._against_scores(
                    name,
                    "merged",
                    answers[name],
                    lambda tokens, first: score(executor, tokens, first, budget),
                )

    def against_peft(self, answers: Mapping[str | None, list[Answer]]) -> Iterator[CheckRow]:
        """Each adapter's rows against peft, those of the base model against transformers."""
        for name in answers:
            reference = "transformers" if name is None else "peft"
            needed = ("transformers",) if name is None else ("transformers", "peft")
            if any(importlib.util.find_spec(package) is None for package in needed):
                yield _skipped(name, reference, "not installed")
                continue
            self._progress(f"{name or BASE}: {reference}")
            model = peft_model(self.weights, None if name is None else self.adapters[name])
            yield self._against_scores(name, reference, answers[name], partial(score_with, model))

    def _against_scores(
        self,
        name: str | None,
        reference: str,
        answers: list[Answer],
        score_tokens: Callable[[Sequence[int], int], torch.Tensor],
    ) -> CheckRow:
        """Answers against a reference that is given their tokens and says what it would have answered."""
        tally = Tally(MAX_LOGIT_DIFFERENCE)
        for prompt, answer in zip(self.prompts, answers, strict=True):
            logits = score_tokens([*prompt, *answer.tokens[:-1]], len(prompt))
            tally.add(answer, Answer(logits.argmax(dim=-1).tolist(), logits))
        return _row(name, reference, len(answers), tally)

    def _store(self, executor: Executor) -> AdapterStore:
        store = AdapterStore(self.weights, executor.adapter_pages)
        for name, path in self.adapters.items():
            store.register(name, path)
        return store

    def _requests(self, store: AdapterStore, resolved: ResolvedConfig) -> list[Request]:
        """Neighbours have different adapters, but for prompts that begin alike.

        Those follow one another, or what they share would be gone from the pool when it is asked for.
        """
        door = Door(self.weights.spec, resolved.scheduler.max_model_len, None, store)
        wanted = [
            (name, prompt)
            for group in self._groups.values()
            for name in (None, *self.adapters)
            for prompt in group
        ]
        return [
            door.prepare(f"{index}, {name or BASE}", prompt, self._params, name)
            for index, (name, prompt) in enumerate(wanted)
        ]

    def _by_name(self, requests: Sequence[Request], values: Sequence[T]) -> dict[str | None, list[T]]:
        """What belongs to the requests, by adapter, in the order of `prompts`."""
        found: dict[str | None, list[T]] = {name: [] for name in (None, *self.adapters)}
        for request, value in zip(requests, values, strict=True):
            found[request.adapter.name if request.adapter else None].append(value)
        return found


def peft_model(weights: ModelWeights, path: Path | None) -> Any:
    """The model in transformers, wrapped by peft with the adapter of a directory, or as it is."""
    model = to_transformers(weights)
    if path is None:
        return model
    peft = importlib.import_module("peft")
    with warnings.catch_warnings():
        # Advice on training and saving.
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, str(path), torch_device="cpu").eval()


def score_with(model: Any, tokens: Sequence[int], first: int) -> torch.Tensor:
    """`score`, by a model of transformers or peft."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([list(tokens)]), logits_to_keep=len(tokens) - first + 1)
    logits: torch.Tensor = output.logits[0].float()
    return logits


def _precision(resolved: ResolvedConfig) -> str:
    return resolved.dtype if resolved.quantization is None else f"{resolved.quantization}/{resolved.dtype}"


def _describe(requests: Sequence[Request], pressure: Pressure) -> str:
    return (
        f"{len(requests)} prompts in {pressure.num_steps} steps with up to {pressure.max_adapters} adapters "
        f"(base included) in one; {pressure.num_chunked_prompts} prefilled in chunks, "
        f"{pressure.num_prefix_hit_tokens:,} tokens from shared prefixes, "
        f"{pressure.num_preemptions} preemptions"
    )


def _row(name: str | None, reference: str, num_rows: int, tally: Tally) -> CheckRow:
    return CheckRow(
        adapter=name or BASE,
        reference=reference,
        rows=num_rows,
        tokens=tally.num_tokens,
        token_differences=tally.num_differences,
        near_ties=tally.num_near_ties,
        max_logit_difference=tally.max_logit_difference,
        limit=tally.limit,
        ok=tally.is_ok,
    )


def _skipped(name: str | None, reference: str, note: str) -> CheckRow:
    return CheckRow(name or BASE, reference, 0, 0, 0, 0, 0.0, 0.0, ok=True, note=note)


__all__ = ["CheckRow", "check", "run"]
