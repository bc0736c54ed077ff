"""What a server may be told, with its limits."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields
from pathlib import Path

from polybatch.errors import ConfigError
from polybatch.jobs.tools.styles import check_style


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of the HTTP side.

    tool_call_parser: how the model writes tool calls, None to go by its chat template.
    served_model_names: what `model` may say for the base model; answers to `/v1/models` begin with the first.
    api_keys: one of them is needed for every route but liveness, if there are any. admin_api_keys: for routes
    that change the server; without one these are closed. metrics_api_keys: for /metrics and /ready and
    nothing else. api_keys_file, tenants_file: keys and limits of tenants, see `polybatch.server.key_file`
    and `polybatch.server.tenants`. adapter_roots: folders below which adapters may be loaded at run time.
    allowed_hosts: Host headers besides those of this machine, for a server without keys.
    max_num_queued_reqs, max_num_queued_tokens: completions and prompt tokens that may wait; more are
    answered with 429. max_body_bytes: of a request; max_buffered_bytes: of all bodies whose requests are
    under way. max_json_depth: of arrays and objects in each other. max_n, max_logprobs, max_stop_strings:
    per request; max_stop_chars: of a stop string; max_token_ids: in logit_bias and in
    stop_token_ids. data_dir: where files and batches are kept; without it there are none. max_file_bytes: of
    an upload; max_tenant_file_bytes: of all files of a tenant; max_tenant_batches: under way at once.
    body_timeout_s: to send a request. send_timeout_s: to take a piece of an answer. drain_timeout_s: that
    running requests have to end on shutdown. otlp_traces_endpoint: where spans of requests go, None for
    nowhere.
    """

    served_model_names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    admin_api_keys: tuple[str, ...] = ()
    metrics_api_keys: tuple[str, ...] = ()
    api_keys_file: Path | None = None
    tenants_file: Path | None = None
    adapter_roots: tuple[Path, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    tool_call_parser: str | None = None
    max_num_queued_reqs: int = 1024
    max_num_queued_tokens: int = 1_000_000
    max_body_bytes: int = 8 << 20
    max_buffered_bytes: int = 256 << 20
    max_connections: int = 4096
    max_json_depth: int = 64
    max_n: int = 32
    max_logprobs: int = 20
    max_stop_strings: int = 16
    max_stop_chars: int = 1024
    max_token_ids: int = 1024
    data_dir: Path | None = None
    max_file_bytes: int = 200 << 20
    max_tenant_file_bytes: int = 4 << 30
    max_tenant_batches: int = 64
    body_timeout_s: float = 60.0
    send_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        if self.tool_call_parser is not None:
            check_style(self.tool_call_parser)
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("served_model_names is empty; the base model needs a name")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("max_") and value < 1:
                raise ConfigError(f"{field.name} is {value}; it must be positive")
            if field.name.endswith("_timeout_s") and value < 0:
                raise ConfigError(f"{field.name} is {value}; it must not be negative")
        keys = (*self.api_keys, *self.admin_api_keys, *self.metrics_api_keys)
        for key in keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("an API key is empty or has spaces or characters beyond printable ASCII")
        if len(set(keys)) < len(keys):
            raise ConfigError("an API key, admin key or metrics key is given twice: choose others")
        for root in self.adapter_roots:
            if not root.is_dir():
                raise ConfigError(f"adapter root {root} is no folder: create it or name another")

    @property
    def is_local(self) -> bool:
        """Whether it listens to this machine alone."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
