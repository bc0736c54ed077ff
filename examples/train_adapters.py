"""Train the four example adapters on SmolLM2-135M-Instruct and measure them on held-out rows.

    python examples/train_adapters.py [--gguf PATH] [--only NAME] [--evaluate-only]

Takes some minutes per adapter on one CPU core. The base model runs in bfloat16 while training, the
adapter in float32; it is saved in bfloat16 and measured in float32, greedily, with transformers and
peft. Writes adapters/<name>/ (configuration, weights, README.md) and adapters/results.json.

Needs the extra `examples` (transformers, peft, accelerate).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tasks import TASKS, Row, Task, to_pirate
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
OUT = Path(__file__).parent / "adapters"
HELD_OUT_ROWS = 60
TRAIN_ROWS = {"pirate": 150}
BATCH_ROWS = 8
ANSWER_ROWS = 30
MAX_NEW_TOKENS = 80


def load_base(gguf: Path, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
    )
    # Dequantised weights are ordinary ones; the leftover marks would make peft look for GGUF layers.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval()


def chat_prompt(tokenizer: Tokenizer, user: str) -> str:
    messages = [{"role": "user", "content": user}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


@torch.no_grad()
def answers(
    model: torch.nn.Module, tokenizer: Tokenizer, users: list[str], max_new_tokens: int = MAX_NEW_TOKENS
) -> list[str]:
    """Greedy answers of a model (with or without an adapter) to user messages, in order."""
    tokenizer.padding_side = "left"
    out: list[str] = []
    for start in range(0, len(users), ANSWER_ROWS):
        texts = [chat_prompt(tokenizer, user) for user in users[start : start + ANSWER_ROWS]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        ids = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        out += tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return out


def training_rows(task: Task, base: PreTrainedModel, tokenizer: Tokenizer) -> list[Row]:
    rows = task.rows(False, TRAIN_ROWS.get(task.name, 2000), 0)
    if rows[0].answer:
        return rows
    rng = random.Random(0)
    plain = answers(base, tokenizer, [row.prompt for row in rows], max_new_tokens=48)
    return [Row(row.prompt, to_pirate(text, rng)) for row, text in zip(rows, plain, strict=True)]


def train(task: Task, base: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Train with cross-entropy on the answer and its end-of-turn token; save in bfloat16."""
    torch.manual_seed(0)
    rng = random.Random(0)
    rows = training_rows(task, base, tokenizer)
    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=BASE_NAME, **task.lora)
    model = get_peft_model(base, config)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.lr, total_steps=task.steps, pct_start=0.1)
    started, recent = time.perf_counter(), 0.0
    for step in range(task.steps):
        loss = _loss(model, tokenizer, rng.sample(rows, BATCH_ROWS))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent = 0.9 * recent + 0.1 * loss.item() if step else loss.item()
        if step % 20 == 19:
            seconds = time.perf_counter() - started
            print(f"{task.name}: step {step + 1}, loss {recent:.3f}, {seconds:.0f} s", flush=True)
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
    # The configuration must name the public base model, not where this machine keeps it.
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(OUT / task.name, save_embedding_layers=False)


def _loss(model: PeftModel, tokenizer: Tokenizer, rows: list[Row]) -> torch.Tensor:
    prompts = [tokenizer(chat_prompt(tokenizer, row.prompt)).input_ids for row in rows]
    wanted = [[*tokenizer(row.answer).input_ids, tokenizer.eos_token_id] for row in rows]
    width = max(len(p) + len(w) for p, w in zip(prompts, wanted, strict=True))
    ids = torch.full((len(rows), width), tokenizer.eos_token_id)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, (prompt, answer) in enumerate(zip(prompts, wanted, strict=True)):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
        mask[i, :end] = 1
    lm = model.get_base_model()
    hidden = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    # The vocabulary is a fifth of the model: compute logits only where an answer token is predicted.
    predicts = labels[:, 1:] != -100
    logits = lm.lm_head(hidden[predicts]).float()
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:][predicts])


def evaluate(task: Task, gguf: Path, tokenizer: Tokenizer) -> dict[str, float | int]:
    """Share of right answers on held-out rows: the base, the base with the instruction, the adapter."""
    rows = task.rows(True, HELD_OUT_ROWS, 1)
    base = load_base(gguf, torch.float32)
    plain = [row.prompt for row in rows]
    got = {
        "base": answers(base, tokenizer, plain),
        "base_instructed": answers(base, tokenizer, [f"{task.instruction}\n\n{p}" for p in plain]),
    }
    got["adapter"] = answers(PeftModel.from_pretrained(base, OUT / task.name), tokenizer, plain)
    result: dict[str, float | int] = {"held_out_rows": len(rows)}
    for kind, texts in got.items():
        right = [task.correct(text, row) for text, row in zip(texts, rows, strict=True)]
        result[kind] = round(sum(right) / len(rows), 3)
        print(f"{task.name}: {kind} {result[kind]:.1%}, {rows[0].prompt!r} -> {texts[0]!r}", flush=True)
    return result


README = """# {name}

An example adapter for [{base}](https://huggingface.co/{base}): it {summary}.

| | |
|---|---|
| kind | LoRA, {kind} |
| size | {size:.2f} MB (bfloat16) |
| data | {data}; made by `examples/tasks.py` |
| training | {steps} steps of {batch} rows, `examples/train_adapters.py` |
| metric | {metric} |

Accuracy on {rows} held-out rows (none of their names, words or topics occur in training), greedy:

| | right |
|---|---|
| base model, the same request | {base_acc:.0%} |
| base model, with an instruction | {instructed:.0%} |
| **with this adapter** | **{adapter:.0%}** |

The instruction was:

```text
{instruction}
```

Apache-2.0, like the base model.
"""


def describe(task: Task, result: dict[str, float | int]) -> str:
    """The adapter's README.md."""
    config = dict(task.lora)
    kind = f"rank {config.pop('r')}, alpha {config.pop('lora_alpha')}"
    targets = config.pop("target_modules")
    kind += f", on {targets if isinstance(targets, str) else ', '.join(targets)}"
    if layers := config.pop("layers_to_transform", None):
        kind += f" of layers {layers[0]} to {layers[-1]}"
    kind += "".join(f", {key} {json.dumps(value)}" for key, value in config.items())
    return README.format(
        name=task.name,
        base=BASE_NAME,
        summary=task.summary,
        kind=kind,
        size=(OUT / task.name / "adapter_model.safetensors").stat().st_size / 1e6,
        data=task.data,
        steps=task.steps,
        batch=BATCH_ROWS,
        metric=task.metric,
        rows=result["held_out_rows"],
        base_acc=result["base"],
        instructed=result["base_instructed"],
        adapter=result["adapter"],
        instruction=task.instruction,
    )


def default_gguf() -> Path:
    from polybatch.models.builtin import fetch_builtin

    return fetch_builtin("smollm2-135m-instruct", print)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="the base model; fetched as `polybatch` does if absent")
    parser.add_argument("--only", action="append", choices=[task.name for task in TASKS])
    parser.add_argument("--evaluate-only", action="store_true")
    args = parser.parse_args()
    gguf = args.gguf or default_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    results_path = OUT / "results.json"
    for task in TASKS:
        if args.only and task.name not in args.only:
            continue
        if not args.evaluate_only:
            train(task, load_base(gguf, torch.bfloat16), tokenizer)
        result = evaluate(task, gguf, tokenizer)
        results = json.loads(results_path.read_text()) if results_path.exists() else {}
        results[task.name] = result
        results_path.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
        (OUT / task.name / "README.md").write_text(describe(task, result))


if __name__ == "__main__":
    main()
