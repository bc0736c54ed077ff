"""Write mixed.jsonl: 64 OpenAI batch lines for the base model and the four example adapters, interleaved.

    python examples/make_mixed.py [--out PATH]

Deterministic. Half of the base rows share a long system prompt (a shop's questions and answers), which
an engine with a prefix cache reads once; adapter rows use held-out rows of their task.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tasks import TASKS

BASE = "smollm2-135m-instruct"
ROWS_PER_ADAPTER = 12
MAX_TOKENS = {"sentiment": 4, "json-contact": 48, "sql": 40, "pirate": 40}

SHOP = """You answer customers of Nordlicht Outdoor, a shop for tents, backpacks and lamps. Use only what \
is written here and answer in one or two short sentences.

Delivery: Orders placed before 2 pm leave our warehouse the same day. Delivery inside the country takes two \
to three working days and costs 4.90 euros; it is free from 60 euros. Deliveries abroad take five to eight \
working days and cost 12.50 euros. Parcels can be sent to a pick-up station on request.

Returns: Unused goods may be returned within 30 days. Print the return label in your account, under Orders. \
The refund reaches you within five working days after the parcel arrives. Tents that have been pitched \
cannot be returned unless they are faulty.

Warranty: Tents and backpacks have a warranty of five years, lamps of two years. Poles and zips are repaired \
free of charge during that time. Send a photo of the damage to repair@nordlicht.example and we answer \
within one working day.

Payment: We take cards, bank transfer and payment on account. Payment on account is open to customers who \
have ordered at least once. Gift cards are valid for three years and can be combined with any other payment.

Products: The Fjell 2 tent sleeps two, weighs 1.9 kilograms and stands winds of up to 90 kilometres an hour. \
The Fjell 4 sleeps four and weighs 3.6 kilograms. The Tur 40 backpack holds 40 litres and weighs 1.1 \
kilograms; its rain cover is included. The Glim lamp shines for 30 hours on one charge and is waterproof.

Hours: The telephone line is open on weekdays from 9 am to 5 pm. Our shop in the harbour street is open on \
Saturdays, too."""
SHOP_QUESTIONS = (
    "How much does the Fjell 2 tent weigh?",
    "How long does delivery abroad take?",
    "Can I return a tent that I have pitched once?",
    "Is the Glim lamp waterproof?",
    "How long is the warranty on backpacks?",
    "From what amount is delivery free?",
    "How long are gift cards valid?",
    "When can I call you?",
)
PLAIN_QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "What is two plus three?",
    "Give me a synonym for happy.",
    "Which planet is closest to the sun?",
    "Say hello in Spanish.",
    "Why is the sky blue? Answer in one sentence.",
)


def line(custom_id: str, model: str, user: str, max_tokens: int, system: str | None = None) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": user})
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def lines() -> list[dict[str, Any]]:
    """Queues of one kind each, dealt in turn so that neighbours differ."""
    queues = [
        [line(f"shop-{i:02}", BASE, q, 40, SHOP) for i, q in enumerate(SHOP_QUESTIONS)],
        [line(f"base-{i:02}", BASE, q, 40) for i, q in enumerate(PLAIN_QUESTIONS)],
    ]
    for task in TASKS:
        rows = task.rows(True, ROWS_PER_ADAPTER, 2)
        queues.append(
            [
                line(f"{task.name}-{i:02}", task.name, row.prompt, MAX_TOKENS[task.name])
                for i, row in enumerate(rows)
            ]
        )
    longest = max(map(len, queues))
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "mixed.jsonl")
    out = parser.parse_args().out
    out.write_text("".join(json.dumps(row) + "\n" for row in lines()), encoding="utf-8")


if __name__ == "__main__":
    main()
