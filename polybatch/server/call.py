"""A body of /v1/chat/completions or /v1/completions: what `polybatch.jobs.schema` knows, and what only a
server does with a request.

The fields of a live server are taken out here and checked; the rest goes through the one table of fields that
batch files have, too. As there, a field that would change the answer and is not supported is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from polybatch.errors import RequestError
from polybatch.jobs.schema import Call, Endpoint, parse_call
from polybatch.request import Deadlines, WorkflowStage
from polybatch.server.config import ServerConfig
from polybatch.server.deadline_fields import arrival_clock, deadlines_from, workflow_from
from polybatch.server.gate import REQUEST_ID

T = TypeVar("T", bound=object)

MAX_PRIORITY = 2**31
MAX_SALT_CHARS = 256
MAX_TEMPLATE_VARIABLES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCall:
    """One checked request of a live client.

    include_usage: a last chunk with the token counts; continuous_usage: counts in every chunk. echo: the
    prompt comes first in the answer; is_prompt_only: nothing but it (max_tokens 0 beside echo).
    wants_prompt_logprobs: as a field of their own.
    priority: lower first. adapter_id, lora: as sent, None where absent. template: variables of the chat
    template. truncate_prompt_tokens: only so many of the prompt's last tokens are kept.
    deadlines, workflow: as in `polybatch.request.Request`.
    """

    call: Call
    is_streamed: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    is_prompt_only: bool = False
    wants_prompt_logprobs: bool = False
    priority: int = 0
    cache_salt: str = ""
    request_id: str | None = None
    adapter_id: object = None
    lora: object = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    template: dict[str, Any] = field(default_factory=dict)
    deadlines: Deadlines | None = None
    workflow: WorkflowStage | None = None

    @property
    def is_chat(self) -> bool:
        return self.call.endpoint is Endpoint.CHAT


def parse_server_call(
    endpoint: Endpoint,
    body: Mapping[str, Any],
    config: ServerConfig,
    policy: str,
    headers: Mapping[str, str] | None = None,
) -> ServerCall:
    """Check a decoded body. policy: the scheduler's. headers: those that say deadlines, in lower case.

    Raises RequestError that names the field.
    """
    rest = {name: value for name, value in body.items() if value is not None}
    is_streamed = _take(rest, "stream", bool, False)
    options = _take(rest, "stream_options", dict, None)
    if options is not None and not is_streamed:
        raise RequestError("stream_options needs stream: true beside it", field="stream_options")
    include_usage, continuous = _usage_options(options or {})
    own: dict[str, Any] = {
        "is_streamed": is_streamed,
        "include_usage": include_usage,
        "continuous_usage": continuous,
        "priority": _priority(rest, policy),
        "cache_salt": _salt(rest),
        "request_id": _request_id(rest),
        "adapter_id": rest.pop("adapter_id", None),
        "lora": rest.pop("lora", None),
        "truncate_prompt_tokens": _truncation(rest),
        "deadlines": deadlines_from(rest, headers or {}),
        "workflow": workflow_from(rest.pop("workflow", None), arrival_clock()),
    }
    rest.pop("deadlines", None)
    if endpoint is Endpoint.CHAT:
        own["template"] = _template(rest)
        own["add_special_tokens"] = _take(rest, "add_special_tokens", bool, False)
    else:
        own["echo"] = _take(rest, "echo", bool, False)
        own["add_special_tokens"] = _take(rest, "add_special_tokens", bool, True)
        own["is_prompt_only"] = own["echo"] and rest.get("max_tokens") == 0
        if own["is_prompt_only"]:
            rest["max_tokens"] = 1
    call = parse_call(endpoint, rest)
    _check_caps(call, config)
    own["wants_prompt_logprobs"] = call.params.prompt_logprobs is not None
    if own.get("echo") and call.params.logprobs is not None and not own["wants_prompt_logprobs"]:
        # An echoed prompt has its log-probabilities among the completion's.
        call = replace(call, params=replace(call.params, prompt_logprobs=call.params.logprobs))
    return ServerCall(call=call, **own)


def _take(fields: dict[str, Any], name: str, kind: type[T], default: Any) -> Any:
    value = fields.pop(name, None)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        wanted = {bool: "true or false", dict: "an object", str: "a string", int: "an integer"}[kind]
        raise RequestError(f"{name} is {str(value)[:80]!r}; it must be {wanted}", field=name)
    return value


def _usage_options(options: dict[str, Any]) -> tuple[bool, bool]:
    rest = {name: value for name, value in options.items() if value is not None}
    include = _take(rest, "include_usage", bool, False)
    continuous = _take(rest, "continuous_usage_stats", bool, False)
    # Padding against eavesdroppers on token lengths: there is none to switch on or off.
    _take(rest, "include_obfuscation", bool, False)
    for name in rest:
        raise RequestError(
            f"stream_options.{name} is not supported: remove it", field=f"stream_options.{name}"
        )
    return include, continuous and include


def _priority(fields: dict[str, Any], policy: str) -> int:
    priority: int = _take(fields, "priority", int, 0)
    if abs(priority) > MAX_PRIORITY:
        raise RequestError(
            f"priority is {priority}; it must be within {MAX_PRIORITY:,} of 0", field="priority"
        )
    if priority and policy != "priority":
        raise RequestError(
            f"priority is {priority}, but the scheduling policy is {policy}: leave it out, or start the "
            "server with --scheduling-policy priority (lower goes first)",
            field="priority",
        )
    return priority


def _salt(fields: dict[str, Any]) -> str:
    salt: str = _take(fields, "cache_salt", str, "")
    if len(salt) > MAX_SALT_CHARS:
        raise RequestError(
            f"cache_salt has {len(salt):,} characters; the limit is {MAX_SALT_CHARS}", field="cache_salt"
        )
    return salt


def _request_id(fields: dict[str, Any]) -> str | None:
    request_id: str | None = _take(fields, "request_id", str, None)
    if request_id is not None and not REQUEST_ID.fullmatch(request_id):
        raise RequestError(
            f"request_id is {request_id[:80]!r}; it must be 1 to 128 letters, digits or ._:/+=@-",
            field="request_id",
        )
    return request_id


def _truncation(fields: dict[str, Any]) -> int | None:
    count: int | None = _take(fields, "truncate_prompt_tokens", int, None)
    if count is not None and count < 1:
        raise RequestError(
            f"truncate_prompt_tokens is {count}; it must be positive", field="truncate_prompt_tokens"
        )
    return count


def _template(fields: dict[str, Any]) -> dict[str, Any]:
    variables: dict[str, Any] = _take(fields, "chat_template_kwargs", dict, {})
    if len(variables) > MAX_TEMPLATE_VARIABLES:
        raise RequestError(
            f"chat_template_kwargs has {len(variables)} entries; the limit is {MAX_TEMPLATE_VARIABLES}",
            field="chat_template_kwargs",
        )
    for name, value in variables.items():
        where = f"chat_template_kwargs.{name}"
        if name in ("messages", "tools", "add_generation_prompt"):
            raise RequestError(f"{where} is set by its own field: remove it", field=where)
        if not isinstance(value, (str, bool, int, float, type(None))):
            raise RequestError(f"{where} must be a string, a number, true or false", field=where)
    return {**variables, "add_generation_prompt": _take(fields, "add_generation_prompt", bool, True)}


def _check_caps(call: Call, config: ServerConfig) -> None:
    params = call.params
    caps = (
        ("n", params.n, config.max_n),
        ("logprobs", params.logprobs or 0, config.max_logprobs),
        ("prompt_logprobs", params.prompt_logprobs or 0, config.max_logprobs),
        ("stop", len(params.stop), config.max_stop_strings),
        ("logit_bias", len(params.logit_bias), config.max_token_ids),
        ("stop_token_ids", len(params.stop_token_ids), config.max_token_ids),
    )
    for name, value, limit in caps:
        if value > limit:
            raise RequestError(f"{name} asks for {value}; this server allows {limit}", field=name)
    for text in params.stop:
        if len(text) > config.max_stop_chars:
            raise RequestError(
                f"stop has a string of {len(text):,} characters; "
                f"this server allows {config.max_stop_chars:,}",
                field="stop",
            )
