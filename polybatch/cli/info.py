"""`polybatch info`: what the engine would do with this model on this machine, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from polybatch.cli.options import EngineOptions, with_engine

if TYPE_CHECKING:
    from polybatch.engine.core import EngineCore


@with_engine
def info(engine: EngineOptions) -> None:
    """Show the model, the memory plan in pages and bytes, and the kernels chosen and why."""
    from polybatch.cli.engines import open_core

    console = Console()
    with open_core(engine, Console(stderr=True), quiet=True) as core:
        console.print(model_table(engine.chosen_model(), core))
        console.print(memory_table(core, engine.max_num_seqs))
        console.print(_table("Kernels", core.executor.describe()))
        if adapters := engine.adapters():
            console.print(adapter_table(core, adapters))


def model_table(name: str, core: EngineCore) -> Table:
    spec = core.executor.spec
    rows = {
        "name": name,
        "family": spec.family,
        "parameters": f"{_parameters(core):,}",
        "layers": f"{spec.num_layers} of {spec.hidden_size} wide, {spec.intermediate_size} in the MLP",
        "attention": f"{spec.num_heads} query heads of {spec.head_dim}, {spec.num_kv_heads} key-value heads",
        "vocabulary": f"{spec.vocab_size:,} tokens{', tied' if spec.tie_embeddings else ''}",
        "positions": f"{spec.max_position:,}, rotary {spec.rope.kind}",
    }
    return _table("Model", rows)


def memory_table(core: EngineCore, max_num_seqs: int) -> Table:
    pool, max_len = core.executor.pool, core.door.max_model_len
    per_seq = -(-max_len // pool.page_size)
    layers = pool.num_layers
    rows = {
        "pages": f"{pool.num_pages:,} for KV and adapters together",
        "a page": f"{pool.page_size} tokens, {pool.page_bytes:,} bytes in each of {layers} layers",
        "pool": f"{show_bytes(pool.total_bytes)}, {pool.num_pages * pool.page_size:,} tokens",
        "KV per token": f"{pool.page_bytes * layers // pool.page_size:,} bytes",
        "max_model_len": f"{max_len:,} tokens = {per_seq:,} pages, "
        + show_bytes(per_seq * pool.page_bytes * layers),
        "longest sequences at once": f"{min(max_num_seqs, pool.num_pages // per_seq):,} "
        f"(max_num_seqs {max_num_seqs:,})",
    }
    return _table("Memory", rows)


def adapter_table(core: EngineCore, paths: dict[str, str]) -> Table:
    table = Table(title="Adapters", title_justify="left", title_style="bold")
    for column in ("name", "rank", "pages", "folder"):
        table.add_column(column, justify="right" if column in ("rank", "pages") else "left")
    assert core.store is not None
    for name, path in paths.items():
        ref = core.store.get(name)
        table.add_row(name, str(core.store.weights(ref.digest).max_rank), f"{ref.num_pages:,}", path)
    return table


def show_bytes(count: int) -> str:
    """1.5 GiB, 24.0 MiB."""
    if count < 1024:
        return f"{count} bytes"
    power = min(3, (count.bit_length() - 1) // 10)
    return f"{count / 1024**power:,.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def _parameters(core: EngineCore) -> int:
    """Of the embeddings and the linear layers; norms and biases are too few to show."""
    spec = core.executor.spec
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
