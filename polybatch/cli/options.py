"""The flags that every command with a model shares, under the names that vLLM's users know.

`with_engine` adds them to a command and hands them over as one `EngineOptions`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer

from polybatch.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m-instruct"
STUB_MODEL = "stub"

_PANEL = "Model and engine"

ChatTemplate = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|TEXT", rich_help_panel=_PANEL, help="Jinja to use instead of the model's chat template."
    ),
]
"""`--chat-template` of the commands that render conversations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Flags of the model and the engine as given; None leaves the choice to the engine."""

    model_name: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="The same as --model.", show_default=False),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", show_default=False, rich_help_panel=_PANEL,
            help=f"Hugging Face folder or name, GGUF file, {DEFAULT_MODEL} (default), "
            f"or {STUB_MODEL}: no model at all, instant nonsense to try out files and flags.",
        ),
    ] = None  # fmt: skip
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", "--lora-modules", metavar="NAME=DIR", rich_help_panel=_PANEL,
            help="A PEFT adapter folder and the name that requests use; repeat for more.",
        ),
    ] = None  # fmt: skip
    dtype: Annotated[
        str, typer.Option(rich_help_panel=_PANEL, help="auto, bfloat16, float32 or (CUDA) float16.")
    ] = "auto"
    quantization: Annotated[
        str | None,
        typer.Option(
            "--quantization", "-q", rich_help_panel=_PANEL,
            help="int8 or int4 weights; on a GPU int4, int4-channel or fp8.",
        ),
    ] = None  # fmt: skip
    device: Annotated[
        str, typer.Option(rich_help_panel=_PANEL, help="auto (a GPU if there is one), cpu, cuda or cuda:N.")
    ] = "auto"
    max_model_len: Annotated[
        int | None, typer.Option(rich_help_panel=_PANEL, help="Prompt and output together, in tokens.")
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_PANEL,
            help="For KV and adapters beside the weights, such as 2GiB; default a quarter of what is free.",
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_PANEL,
            help="Share of the GPU's memory for weights, buffers, KV and adapters; default all that is free.",
        ),
    ] = None
    max_num_seqs: Annotated[
        int, typer.Option(rich_help_panel=_PANEL, help="Completions that run at once.")
    ] = 256
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(rich_help_panel=_PANEL, help="Prompt tokens per step; default 2,048, on a GPU 8,192."),
    ] = None
    enable_prefix_caching: Annotated[
        bool, typer.Option(rich_help_panel=_PANEL, help="Reuse the KV of prompts that begin alike.")
    ] = True
    executor: Annotated[
        str,
        typer.Option(
            rich_help_panel=_PANEL, help="auto, cpu (compiled), cuda or eager (the torch reference)."
        ),
    ] = "auto"
    threads: Annotated[
        int | None, typer.Option(rich_help_panel=_PANEL, help="CPU threads; default one per processor.")
    ] = None
    tensor_parallel_size: Annotated[
        int, typer.Option(rich_help_panel=_PANEL, help="GPUs of this host that share the model.")
    ] = 1
    seed: Annotated[int, typer.Option(rich_help_panel=_PANEL, help="For requests that bring no seed.")] = 0

    def chosen_model(self) -> str:
        """The model named by argument or flag. Raises ConfigError if both are given and differ."""
        if self.model_name and self.model and self.model_name != self.model:
            raise ConfigError(f"the model is given twice, {self.model_name!r} and {self.model!r}: drop one")
        return self.model or self.model_name or DEFAULT_MODEL

    def adapters(self) -> dict[str, str]:
        """Adapter name -> folder. Raises ConfigError for a malformed or repeated pair."""
        result: dict[str, str] = {}
        for pair in self.adapter or ():
            name, path = _name_and_path(pair)
            if name in result:
                raise ConfigError(f"--adapter {name} is given twice: choose two names")
            if name == self.chosen_model():
                raise ConfigError(f"--adapter {name} has the base model's name: choose another name")
            result[name] = path
        return result

    def engine_settings(self) -> dict[str, Any]:
        """Keyword arguments for the engine, besides model and adapters."""
        apart = ("model_name", "model", "adapter")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}


def _name_and_path(text: str) -> tuple[str, str]:
    """Of `NAME=DIR`, or as vLLM also has it, `{"name": NAME, "path": DIR}`. Raises ConfigError."""
    name, _, path = text.partition("=")
    if text.startswith("{"):
        try:
            found = json.loads(text)
            name, path = found["name"], found["path"]
        except (ValueError, KeyError, TypeError):
            name = path = ""
    if not (isinstance(name, str) and isinstance(path, str) and name and path):
        raise ConfigError(f"--adapter is {text!r}; it must be NAME=DIR")
    return name, path


def with_engine(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags of `EngineOptions`; it takes them as its keyword argument `engine`."""
    hints = get_type_hints(EngineOptions, include_extras=True)
    own_hints = get_type_hints(command, include_extras=True)
    engine_parameters = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(EngineOptions)
    ]
    own_parameters = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own_hints[p.name])
        for p in inspect.signature(command).parameters.values()
        if p.name != "engine"
    ]

    def wrapper(**values: Any) -> None:
        engine = EngineOptions(**{f.name: values.pop(f.name) for f in fields(EngineOptions)})
        command(engine=engine, **values)

    parameters = [*own_parameters, *engine_parameters]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapper.__doc__ = command.__doc__
    wrapper.__name__ = command.__name__
    return wrapper
