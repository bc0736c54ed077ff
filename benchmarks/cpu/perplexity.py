"""What low precision costs in quality: perplexity on GSM8K texts, against transformers in float32.

    python -m benchmarks.cpu.perplexity --model smollm2-135m-instruct --reference MODEL.gguf \\
        --out benchmarks/results/cpu/perplexity.json

A text is a question, a line break and its worked answer. Perplexity is the exponential of the mean negative
log-probability over all tokens but each text's first, all texts together. Low precisions are measured
against bfloat16 of the same checkpoint, dequantised where it comes quantised.

Without --data the texts are looked for in `shared/data` beside the checkout. --reference is optional: the
same weights for transformers, as a Hugging Face folder or a GGUF file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from polybatch import LLM, SamplingParams
from polybatch.bench import meter, results
from polybatch.errors import EngineError

DEFAULT_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gsm8k_test_first660.jsonl"
PRECISIONS = ("float32", "bfloat16", "int8", "int4")
console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Score:
    """log_prob_sum: natural logarithm, over num_tokens predicted tokens."""

    engine: str
    log_prob_sum: float
    num_tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(-self.log_prob_sum / self.num_tokens)


def read_texts(file: Path, count: int) -> list[str]:
    """The first texts of a JSONL file with `question` and `answer`."""
    with file.open() as lines:
        rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    if len(rows) < count:
        sys.exit(f"{file.name} has {len(rows)} texts, {count} are asked for: lower --texts")
    return [f"{row['question']}\n{row['answer']}" for row in rows]


def score_polybatch(llm: LLM, name: str, texts: Sequence[Sequence[int]]) -> Score:
    """Log-probabilities of the prompts' own tokens. Raises EngineError if one is missing."""
    start = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([list(text) for text in texts], params)
    total, count = 0.0, 0
    for text, output in zip(texts, outputs, strict=True):
        entries = output.prompt_logprobs
        if entries is None or len(entries) != len(text):
            raise EngineError(f"{output.request_id} came without the log-probabilities of its prompt")
        for token, entry in zip(text[1:], entries[1:], strict=True):
            if entry is None or token not in entry:
                raise EngineError(f"{output.request_id} lacks the log-probability of a prompt token")
            total += entry[token].logprob
            count += 1
    return Score(f"polybatch:{name}", total, count, round(time.perf_counter() - start, 1))


def score_transformers(reference: str, texts: Sequence[Sequence[int]], threads: int) -> Score:
    """The reference: one text at a time in float32."""
    import torch

    from benchmarks.cpu.prepare import load_transformers

    torch.set_num_threads(threads)
    start = time.perf_counter()
    model = load_transformers(Path(reference), torch.float32)
    total, count = 0.0, 0
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([list(text)])
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            total += float(log_probs.gather(1, ids[0, 1:, None]).double().sum())
            count += len(text) - 1
    return Score("transformers:float32", total, count, round(time.perf_counter() - start, 1))


def load(model: str, precision: str, threads: int) -> LLM:
    is_quantised = precision.startswith("int")
    return LLM(
        model,
        dtype="auto" if is_quantised else precision,
        quantization=precision if is_quantised else None,
        max_model_len=1024,
        max_num_seqs=32,
        enable_prefix_caching=False,
        threads=threads,
    )


def show(scores: Sequence[Score]) -> None:
    """The table: each perplexity and what it is above the reference and above bfloat16."""
    by_name = {score.engine: score.perplexity for score in scores}
    table = Table("engine", "perplexity", "over float32 of transformers", "over bfloat16", "s")
    for score in scores:
        row = [score.engine, f"{score.perplexity:.4f}"]
        for base in ("transformers:float32", "polybatch:bfloat16"):
            row.append(f"{100 * (score.perplexity / by_name[base] - 1):+.2f} %" if base in by_name else "-")
        table.add_row(*row, f"{score.seconds:.0f}")
    Console(width=None if sys.stdout.isatty() else results.PLAIN_WIDTH).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.perplexity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--reference", help="GGUF file or Hugging Face folder of the same weights")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not arguments.data.exists():
        sys.exit(f"{arguments.data} does not exist: give a JSONL file of questions and answers with --data")
    texts = read_texts(arguments.data, arguments.texts)
    scores: list[Score] = []
    encoded: list[list[int]] = []
    for precision in arguments.precisions.split(","):
        with load(arguments.model, precision, arguments.threads) as llm:
            if llm.tokenizer is None:
                sys.exit(f"model {arguments.model!r} has no tokenizer: give one with text")
            encoded = encoded or [llm.tokenizer.encode(text) for text in texts]
            scores.append(score_polybatch(llm, precision, encoded))
        console.print(f"{scores[-1].engine}: {scores[-1].perplexity:.4f}")
    if arguments.reference:
        scores.insert(0, score_transformers(arguments.reference, encoded, arguments.threads))
    show(scores)
    content = {
        "format": results.FORMAT,
        "command": results.portable_command(["python", "-m", "benchmarks.cpu.perplexity", *sys.argv[1:]]),
        "machine": asdict(meter.machine()),
        "model": os.path.basename(arguments.model.rstrip("/")),
        "data": arguments.data.name,
        "num_texts": len(texts),
        "scores": [{**asdict(score), "perplexity": score.perplexity} for score in scores],
    }
    if arguments.out is not None:
        results.write(arguments.out, content)
    print(json.dumps({score.engine: round(score.perplexity, 4) for score in scores}))


if __name__ == "__main__":
    main()
