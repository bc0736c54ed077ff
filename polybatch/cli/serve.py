"""`polybatch serve`: an OpenAI-compatible HTTP server."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from polybatch.cli.options import ChatTemplate, EngineOptions, with_engine
from polybatch.cli.service_flags import share_or_none, stage_times_of
from polybatch.config import ServiceLevels
from polybatch.errors import ConfigError
from polybatch.scheduling.policies import POLICIES

_HTTP, _LIMITS, _ACCESS = "HTTP", "Limits", "Access"
KEY_VARIABLES = ("POLYBATCH_API_KEY", "VLLM_API_KEY")


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a YAML file for flags that are not given. Raises ConfigError."""
    if path is None:
        return None
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold a map of flags to values, such as port: 8000")
    known = {
        name.lstrip("-"): parameter
        for parameter in context.command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    defaults: dict[str, Any] = {}
    for key, value in content.items():
        parameter = known.get(str(key).replace("_", "-"))
        if parameter is None or parameter.name in (None, "config", "help"):
            raise ConfigError(f"--config {path} has {key!r}, which is no flag of serve: see --help")
        is_list = getattr(parameter, "multiple", False)
        defaults[str(parameter.name)] = [value] if is_list and not isinstance(value, list) else value
    context.default_map = defaults
    return path


@with_engine
def serve(
    *,
    engine: EngineOptions,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with flags by their long names; those of the command line win.",
            callback=_read_config,
            is_eager=True,
        ),
    ] = None,
    host: Annotated[str, typer.Option(rich_help_panel=_HTTP, help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(rich_help_panel=_HTTP, min=0, max=65535, help="0 takes one that is free.")
    ] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=_HTTP, help="Name of the base model for clients; repeat for more."),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=_ACCESS,
            help="Clients need one of these; repeat for more. "
            "Better in the environment, as POLYBATCH_API_KEY.",
        ),
    ] = None,
    admin_api_key: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=_ACCESS, help="For loading adapters and the like; closed without one."),
    ] = None,
    metrics_api_key: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=_ACCESS,
            help="For /metrics, which needs one once there are keys, and /ready.",
        ),
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_ACCESS,
            help="File of tenants' keys, made by polybatch keys new; read again on SIGHUP.",
        ),
    ] = None,
    tenants: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_ACCESS,
            help="YAML file of tenants' limits and shared prefixes; read again on SIGHUP.",
        ),
    ] = None,
    adapter_root: Annotated[
        list[Path] | None,
        typer.Option(rich_help_panel=_ACCESS, help="Folder below which adapters may be loaded at run time."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=_ACCESS, help="Host header to accept besides localhost, without keys."),
    ] = None,
    tool_call_parser: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_HTTP,
            help="How the model writes tool calls: hermes, llama3_json or mistral. Default: by its template.",
        ),
    ] = None,
    chat_template: ChatTemplate = None,
    enable_auto_tool_choice: Annotated[bool, typer.Option(hidden=True)] = True,
    enable_chunked_prefill: Annotated[bool, typer.Option("--enable-chunked-prefill", hidden=True)] = True,
    disable_log_requests: Annotated[bool, typer.Option("--disable-log-requests", hidden=True)] = True,
    max_num_queued_reqs: Annotated[
        int, typer.Option(rich_help_panel=_LIMITS, help="Completions that may wait; more get status 429.")
    ] = 1024,
    max_num_queued_tokens: Annotated[
        int, typer.Option(rich_help_panel=_LIMITS, help="Prompt tokens that may wait.")
    ] = 1_000_000,
    max_body_bytes: Annotated[int, typer.Option(rich_help_panel=_LIMITS, help="Of one request.")] = 8 << 20,
    max_buffered_bytes: Annotated[
        int, typer.Option(rich_help_panel=_LIMITS, help="Of the bodies of all requests under way.")
    ] = 256 << 20,
    max_connections: Annotated[
        int, typer.Option(rich_help_panel=_LIMITS, help="Open at once; more are refused.")
    ] = 4096,
    max_n: Annotated[int, typer.Option(rich_help_panel=_LIMITS, help="Completions per prompt.")] = 32,
    max_logprobs: Annotated[int, typer.Option(rich_help_panel=_LIMITS, help="Per token.")] = 20,
    max_stop_strings: Annotated[int, typer.Option(rich_help_panel=_LIMITS, help="Per request.")] = 16,
    data_dir: Annotated[
        Path | None,
        typer.Option(rich_help_panel=_HTTP, help="Keep files and batches here; without it there are none."),
    ] = None,
    max_file_bytes: Annotated[
        int, typer.Option(rich_help_panel=_LIMITS, help="Of an upload to /v1/files.")
    ] = 200 << 20,
    max_tenant_file_bytes: Annotated[
        int, typer.Option(rich_help_panel=_LIMITS, help="Of all files of one API key.")
    ] = 4 << 30,
    drain_timeout: Annotated[
        float, typer.Option(rich_help_panel=_LIMITS, help="Seconds for running requests to end on SIGTERM.")
    ] = 30.0,
    engine_hang_timeout: Annotated[
        float, typer.Option(rich_help_panel=_LIMITS, help="Seconds without a finished step until a restart.")
    ] = 300.0,
    scheduling_policy: Annotated[
        str,
        typer.Option(
            rich_help_panel=_LIMITS,
            help="; ".join(f"{name}: {policy.summary}" for name, policy in POLICIES.items()),
        ),
    ] = "fcfs",
    target_tbt_ms: Annotated[
        float | None,
        typer.Option(rich_help_panel=_LIMITS, help="Size prefill so that tokens come at least so often."),
    ] = None,
    default_ttft_ms: Annotated[
        float | None,
        typer.Option(rich_help_panel=_LIMITS, help="Deadline of the first token, of requests with none."),
    ] = None,
    default_tpot_ms: Annotated[
        float | None, typer.Option(rich_help_panel=_LIMITS, help="The same, for each further token.")
    ] = None,
    default_deadline_ms: Annotated[
        float | None, typer.Option(rich_help_panel=_LIMITS, help="The same, for the last token.")
    ] = None,
    late_requests: Annotated[
        str,
        typer.Option(
            rich_help_panel=_LIMITS,
            help="serve them; refuse at arrival what will miss its deadlines; or abort (with the policy "
            "deadline) what waited until it must miss them.",
        ),
    ] = "serve",
    batch_slowdown: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_LIMITS,
            parser=share_or_none,
            metavar="SHARE|none",
            help="Share by which rows of batches may lengthen live steps; none: as far as deadlines allow.",
        ),
    ] = 0.05,
    max_batch_step_ms: Annotated[
        float | None,
        typer.Option(rich_help_panel=_LIMITS, help="Keep steps with rows of batches alone so short."),
    ] = None,
    adapter_cluster: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_LIMITS, help="From so many adapters in a step on, prefer those that run."
        ),
    ] = None,
    stage_times: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=_LIMITS,
            metavar="NAME=SECONDS|FILE.json",
            help="What stages of workflows take on average, where it is known; repeat for more.",
        ),
    ] = None,
    enable_lora: Annotated[bool, typer.Option(hidden=True)] = True,
    max_loras: Annotated[int | None, typer.Option(hidden=True)] = None,
    max_lora_rank: Annotated[int | None, typer.Option(hidden=True)] = None,
    max_cpu_loras: Annotated[int | None, typer.Option(hidden=True)] = None,
    log_level: Annotated[
        str, typer.Option(rich_help_panel=_HTTP, help="debug, info, warning or error.")
    ] = "info",
    log_format: Annotated[
        str, typer.Option(rich_help_panel=_HTTP, help="text, or json: an object per line.")
    ] = "text",
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(rich_help_panel=_HTTP, help="Send OpenTelemetry spans there, by OTLP over HTTP."),
    ] = None,
) -> None:
    """Serve the model and its adapters over HTTP, as OpenAI's interface.

    polybatch serve --adapter sql=adapters/sql --port 8000, and any OpenAI client can use the models
    smollm2-135m-instruct and sql. Stop it with Ctrl-C or SIGTERM; what runs may end.
    """
    import logging

    from polybatch.log_format import FORMATS, set_up_logging

    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise ConfigError(f"--log-level is {log_level!r}; it must be debug, info, warning or error")
    if log_format not in FORMATS:
        raise ConfigError(f"--log-format is {log_format!r}; it must be {' or '.join(FORMATS)}")
    set_up_logging(level, log_format)
    # Before what takes seconds to import.
    logging.getLogger("polybatch.server").info("loading %s", engine.chosen_model())
    from polybatch.engine.async_llm import AsyncLLM
    from polybatch.engine.connection import Watch

    try:
        import uvloop

        from polybatch.server.config import ServerConfig
        from polybatch.server.run import serve as run
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'polybatch[serve]'") from error
    for name, value in (("loras", max_loras), ("lora-rank", max_lora_rank), ("cpu-loras", max_cpu_loras)):
        if value is not None:
            logging.getLogger("polybatch").info("--max-%s %d: there is no such limit here", name, value)
    model, adapters = engine.chosen_model(), engine.adapters()
    names = tuple(served_model_name or (model,))
    if clash := set(names) & set(adapters):
        raise ConfigError(f"--served-model-name {clash.pop()} is also an adapter's name: choose another")
    keys = api_key or [os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)][:1]
    server = ServerConfig(
        served_model_names=names, host=host, port=port, api_keys=tuple(keys),
        admin_api_keys=tuple(admin_api_key or ()), metrics_api_keys=tuple(metrics_api_key or ()),
        adapter_roots=tuple(adapter_root or ()), allowed_hosts=tuple(allowed_host or ()),
        tool_call_parser=tool_call_parser, max_num_queued_reqs=max_num_queued_reqs,
        max_num_queued_tokens=max_num_queued_tokens, max_body_bytes=max_body_bytes, max_n=max_n,
        max_logprobs=max_logprobs, max_stop_strings=max_stop_strings, drain_timeout_s=drain_timeout,
        otlp_traces_endpoint=otlp_traces_endpoint,
        api_keys_file=api_keys, tenants_file=tenants, max_buffered_bytes=max_buffered_bytes,
        max_connections=max_connections,
        data_dir=data_dir, max_file_bytes=max_file_bytes, max_tenant_file_bytes=max_tenant_file_bytes,
    )  # fmt: skip
    if late_requests not in ("serve", "refuse", "abort"):
        raise ConfigError(f"--late-requests is {late_requests!r}; it must be serve, refuse or abort")
    if late_requests == "abort" and scheduling_policy != "deadline":
        raise ConfigError(
            f"--late-requests is 'abort', which the policy {scheduling_policy!r} never does: "
            "add --scheduling-policy deadline"
        )
    times = {"target_tbt_s": target_tbt_ms, "ttft_s": default_ttft_ms, "tpot_s": default_tpot_ms,
             "e2e_s": default_deadline_ms, "max_batch_step_s": max_batch_step_ms}  # fmt: skip
    levels = ServiceLevels(
        **{name: ms / 1000 for name, ms in times.items() if ms is not None},
        refuse_late=late_requests == "refuse", abort_late=late_requests == "abort",
        batch_slowdown=batch_slowdown,
    )  # fmt: skip
    settings = engine.engine_settings() | {
        "policy": scheduling_policy,
        "service": asdict(levels) if levels != ServiceLevels() else None,
        "adapter_cluster": adapter_cluster,
        "stage_times": stage_times_of(stage_times or ()) or None,
        "chat_template": chat_template,
    }
    llm = AsyncLLM(model, adapters, watch=Watch(stall_s=engine_hang_timeout), **settings)
    status = uvloop.run(run(llm, server))
    if status:
        raise typer.Exit(status)
