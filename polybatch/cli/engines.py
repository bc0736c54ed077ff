"""Opens the engine that a command's flags describe, or the stub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from rich.console import Console

from polybatch.cli.options import EngineOptions
from polybatch.engine import stub
from polybatch.engine.core import EngineCore
from polybatch.errors import ConfigError


@contextmanager
def open_core(
    options: EngineOptions,
    console: Console,
    quiet: bool,
    *,
    policy: str = "fcfs",
    chat_template: str | None = None,
) -> Iterator[EngineCore]:
    """The engine's core, closed on the way out. Raises ConfigError, ModelError or AdapterError."""
    if stub.is_stub(options.chosen_model()):
        refuse_stub_template(chat_template)
        yield stub_core(options, policy)
        return
    from polybatch.engine.llm import LLM

    if not quiet:
        console.print(f"loading {options.chosen_model()}", markup=False, highlight=False)
    settings = options.engine_settings() | {"policy": policy, "chat_template": chat_template}
    with closing(LLM(options.chosen_model(), options.adapters(), **settings)) as llm:
        limit, own_limit = llm.core.max_model_len, llm.spec.max_position
        if not quiet and options.max_model_len is None and limit < own_limit:
            console.print(
                f"memory holds {limit:,} tokens, so prompt and output together may have no more, where the "
                f"model's limit is {own_limit:,}: --memory raises it",
                soft_wrap=True,
                highlight=False,
            )
        yield llm.core


def refuse_stub_template(chat_template: str | None) -> None:
    """Raise ConfigError for a chat template beside the stub."""
    if chat_template is not None:
        raise ConfigError("--chat-template is given, but the stub has none to replace: leave it out")


def stub_core(options: EngineOptions, policy: str = "fcfs") -> EngineCore:
    """The stub as the flags describe it; those of a real model mean nothing to it."""
    return stub.stub_core(
        options.chosen_model(),
        options.adapters(),
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=options.max_model_len,
        enable_prefix_caching=options.enable_prefix_caching,
        policy=policy,
        seed=options.seed,
    )
