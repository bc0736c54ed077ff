"""Show what each adapter answered in the demo: python examples/show_demo.py IN.jsonl OUT.jsonl"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ANSWERS_PER_MODEL = 2


def prompt_text(body: dict[str, Any]) -> str:
    """The last message of a chat, or the prompt of a completion."""
    return str(body["messages"][-1]["content"] if "messages" in body else body["prompt"])


def answer_text(row: dict[str, Any]) -> str:
    if row["error"] is not None:
        return f"error: {row['error']['message']}"
    choice = row["response"]["body"]["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def shorten(text: str, length: int) -> str:
    flat = " ".join(text.split())
    return escape(flat if len(flat) <= length else flat[: length - 1] + "…")


def main(requests_path: Path, answers_path: Path) -> None:
    bodies, rows, ids = {}, {}, defaultdict(list)
    for line in requests_path.read_text().splitlines():
        request = json.loads(line)
        bodies[request["custom_id"]] = request["body"]
        ids[request["body"]["model"]].append(request["custom_id"])
    for line in answers_path.read_text().splitlines():
        row = json.loads(line)
        rows[row["custom_id"]] = row
    table = Table(title="A sample of the answers", title_justify="left", show_lines=True)
    table.add_column("model or adapter", style="bold", no_wrap=True)
    table.add_column("asked", ratio=2)
    table.add_column("answered", ratio=3)
    for name, own in ids.items():
        for custom_id in sorted(own)[:: max(1, len(own) // ANSWERS_PER_MODEL)][:ANSWERS_PER_MODEL]:
            asked, answered = prompt_text(bodies[custom_id]), answer_text(rows[custom_id])
            table.add_row(name, shorten(asked, 160), shorten(answered, 240))
    console = Console()
    console.print(table)
    console.print(
        f"All {len(rows)} answers, made in the same batches, are in {answers_path}.\n"
        "The model has 135 million parameters: adapters teach it a habit, not knowledge.\n"
        "Next, and there /adapter pirate:\n"
        "  .venv/bin/polybatch chat --adapter pirate=examples/adapters/pirate",
        highlight=False,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
