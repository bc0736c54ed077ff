"""`polybatch info`: what the engine would do with this model on this machine, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from polybatch.cli.options import EngineOptions, with_engine

if TYPE_CHECKING:
    from polybatch.engine.llm import LLM


@with_engine
def info(engine: EngineOptions) -> None:
    """Show the model, the memory plan in pages and bytes, and the kernels chosen and why."""
    from polybatch.cli.engines import open_llm

    console = Console()
    with open_llm(engine, Console(stderr=True, highlight=False), quiet=True) as llm:
        console.print(model_table(engine.chosen_model(), llm))
        console.print(memory_table(llm, engine.max_num_seqs))
        console.print(_table("Kernels", llm.core.executor.describe()))
        if adapters := engine.adapters():
            console.print(adapter_table(llm, adapters))


def model_table(name: str, llm: LLM) -> Table:
    spec = llm.core.executor.spec
    rows = {
        "name": name,
        "family": spec.family,
        "parameters": f"{_parameters(llm):,}",
        "layers": f"{spec.num_layers} of {spec.hidden_size} wide, {spec.intermediate_size} in the MLP",
        "attention": f"{spec.num_heads} heads of {spec.head_dim}, {spec.num_kv_heads} of them with keys and values",
        "vocabulary": f"{spec.vocab_size:,} tokens{', tied' if spec.tie_embeddings else ''}",
        "positions": f"{spec.max_position:,}, rotary {spec.rope.kind}",
    }
    return _table("Model", rows)


def memory_table(llm: LLM, max_num_seqs: int) -> Table:
    pool, max_len = llm.core.executor.pool, llm.core.max_model_len
    per_seq = -(-max_len // pool.page_size)
    layers = pool.num_layers
    rows = {
        "pages": f"{pool.num_pages:,} for KV and adapters together",
        "a page": f"{pool.page_size} tokens, {pool.page_bytes:,} bytes in each of {layers} layers",
        "pool": f"{show_bytes(pool.total_bytes)}, {pool.num_pages * pool.page_size:,} tokens",
        "KV per token": f"{pool.page_bytes * layers // pool.page_size:,} bytes",
        "max_model_len": f"{max_len:,} tokens = {per_seq:,} pages, {show_bytes(per_seq * pool.page_bytes * layers)}",
        "longest sequences at once": f"{min(max_num_seqs, pool.num_pages // per_seq):,} "
        f"(max_num_seqs {max_num_seqs:,})",
    }
    return _table("Memory", rows)


def adapter_table(llm: LLM, paths: dict[str, str]) -> Table:
    table = Table(title="Adapters", title_justify="left", title_style="bold")
    for column in ("name", "rank", "pages", "folder"):
        table.add_column(column, justify="right" if column in ("rank", "pages") else "left")
    executor = llm.core.executor
    store = llm.core.store
    for name, path in paths.items():
        assert store is not None
        weights = store.weights(store.ref(name).digest)
        table.add_row(name, str(weights.max_rank), f"{executor.adapter_pages(weights):,}", path)
    return table


def show_bytes(count: int) -> str:
    """1.5 GiB, 24.0 MiB."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            break
        size /= 1024
    else:
        unit = "GiB"
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


def _parameters(llm: LLM) -> int:
    """Of the embeddings and the linear layers; norms and biases are too few to show."""
    spec = llm.core.executor.spec
    linear = sum(rows * columns for rows, columns in spec.linear_shapes.values())
    tables = 1 if spec.tie_embeddings else 2
    return linear * spec.num_layers + tables * spec.vocab_size * spec.hidden_size


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    return table
