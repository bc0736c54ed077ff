"""OpenAI request bodies -> prompts and `SamplingParams`, strictly.

One table says of every field whether it is used, harmless, allowed with one value only, or refused.
Nothing is silently ignored: a field that would change the answer and is not supported is an error
that names it. Knows nothing of files, HTTP or the engine.
Source: OpenAI's API reference (chat completions, completions); the extra fields are vLLM's.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polybatch.errors import RequestError
from polybatch.jobs.structured_fields import STRUCTURED_FIELDS, structured_spec
from polybatch.jobs.tool_messages import tool_fields
from polybatch.jobs.tools.settings import TOOL_FIELDS, ToolSettings, take_tools
from polybatch.jobs.tools.styles import ToolStyle
from polybatch.request import SamplingParams

MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 128
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions; chat's default is the rest of the context."""


class Endpoint(enum.StrEnum):
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Call:
    """One checked request body.

    model: the base model's or an adapter's name, not yet resolved.
    messages: a chat's messages, contents flattened to text; empty for completions.
    prompts: a completion's prompts, text or token ids, at least one; empty for chat.
    params: log-probabilities included as `SamplingParams` counts them; max_tokens None means
    the rest of the context.
    expected_tokens: of each completion, as far as the caller knows; an estimate, never a limit.
    tools: that may be called; None for none. tool_style: how the model writes calls, once that is known.
    """

    endpoint: Endpoint
    model: str
    params: SamplingParams
    messages: tuple[dict[str, Any], ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    expected_tokens: int | None = None
    tools: ToolSettings | None = None
    tool_style: ToolStyle | None = None

    @property
    def num_sequences(self) -> int:
        return self.params.n * max(1, len(self.prompts))


_SAMPLING = frozenset(
    ("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
     "frequency_penalty", "seed", "stop", "stop_token_ids", "min_tokens", "prompt_logprobs")
)  # fmt: skip
_FLAGS = frozenset(("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"))
_COMMON = _SAMPLING | _FLAGS | STRUCTURED_FIELDS
_COMMON |= {"model", "max_tokens", "logit_bias", "logprobs", "expected_tokens"}
USED_FIELDS = {
    Endpoint.CHAT: _COMMON | {"messages", "max_completion_tokens", "top_logprobs", *TOOL_FIELDS},
    Endpoint.COMPLETIONS: _COMMON | {"prompt"},
}

# Labels for the provider's books and hints about its cache: they never change an answer.
LABELS = frozenset(
    ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
     "service_tier")
)  # fmt: skip

# Fields that may be spelled out as long as they ask for what happens anyway.
FIXED_FIELDS: dict[str, tuple[object, ...]] = {
    "stream": (False,),
    "modalities": (["text"],),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}

LIVE_FIELDS = ("deadlines", "workflow")
"""What only live requests have: a row of a batch is answered whole, some time before its batch's end."""

_REFUSED = frozenset(
    ("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options", "stream_options",
     "truncate_prompt_tokens", "allowed_token_ids", "bad_words", "chat_template",
     "chat_template_kwargs", "priority", "cache_salt", "request_id", "rid", "lora_path", "lora",
     "documents", "add_special_tokens", "echo_tokens", "length_penalty", "use_beam_search",
     "early_stopping", "detokenize")
)  # fmt: skip

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant",
          "tool": "tool"}  # fmt: skip


def parse_call(endpoint: Endpoint, body: object) -> Call:
    """Check a decoded JSON body and turn it into a `Call`.

    Raises RequestError that names the field, its value and what is allowed. null means absent.
    """
    if not isinstance(body, Mapping):
        raise RequestError(f"body is {_show(body)}; it must be an object", field="body")
    fields = {name: value for name, value in body.items() if value is not None}
    _check_names(endpoint, fields)
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise RequestError(
            f"model is {_show(model)}; it must be the name of the base model or of an adapter", field="model"
        )
    params = _sampling_params(endpoint, fields)
    expected = _expected_tokens(fields)
    if endpoint is Endpoint.CHAT:
        messages = _messages(fields.get("messages"))
        tools = take_tools(fields)
        return Call(endpoint, model, params, messages=messages, expected_tokens=expected, tools=tools)
    prompts = _prompts(fields.get("prompt"))
    return Call(endpoint, model, params, prompts=prompts, expected_tokens=expected)


def refuse_live_fields(fields: Mapping[str, Any]) -> None:
    """Raise RequestError if a row of a batch has fields of live requests."""
    for name in LIVE_FIELDS:
        if fields.get(name) is not None:
            raise RequestError(
                f"{name} is for live requests; a row of a batch has one deadline, the end of its batch's "
                "completion_window: remove it, or send the request live",
                field=name,
            )


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _expected_tokens(fields: Mapping[str, Any]) -> int | None:
    count = fields.get("expected_tokens")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise RequestError(
            f"expected_tokens is {_show(count)}; it must be a positive integer", field="expected_tokens"
        )
    return count


def _check_names(endpoint: Endpoint, fields: Mapping[str, Any]) -> None:
    refuse_live_fields(fields)
    used = USED_FIELDS[endpoint]
    for name, value in fields.items():
        if name in used or name in LABELS:
            continue
        if name in FIXED_FIELDS:
            # 1 == True == 1.0 in Python, not in JSON.
            if any(value == v and type(value) is type(v) for v in FIXED_FIELDS[name]):
                continue
            allowed = " or ".join(repr(v) for v in FIXED_FIELDS[name])
            message = f"{name} is {_show(value)}; only {allowed} is supported: change or remove it"
        elif name in _REFUSED:
            message = f"{name} is not supported: remove it"
        elif any(name in names for names in USED_FIELDS.values()):
            message = f"{name} does not belong to {endpoint.value}: remove it"
        else:
            near = difflib.get_close_matches(name, used, n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it"
            message = f"unknown field {name!r}: {hint}"
        raise RequestError(message, field=name)


def _sampling_params(endpoint: Endpoint, fields: Mapping[str, Any]) -> SamplingParams:
    values = {name: fields[name] for name in _SAMPLING if name in fields}
    for name in _FLAGS & fields.keys():
        if not isinstance(fields[name], bool):
            raise RequestError(f"{name} is {_show(fields[name])}; it must be true or false", field=name)
        values[name] = fields[name]
    values["max_tokens"] = _max_tokens(endpoint, fields)
    values["logprobs"] = _logprobs(endpoint, fields)
    if "logit_bias" in fields:
        values["logit_bias"] = _logit_bias(fields["logit_bias"])
    values["structured"] = structured_spec(fields)
    return SamplingParams(**values)


def _max_tokens(endpoint: Endpoint, fields: Mapping[str, Any]) -> int | None:
    old, new = fields.get("max_tokens"), fields.get("max_completion_tokens")
    if endpoint is Endpoint.COMPLETIONS:
        return COMPLETION_MAX_TOKENS if old is None else old
    if old is not None and new is not None and old != new:
        raise RequestError(
            f"max_tokens is {_show(old)} and max_completion_tokens is {_show(new)}; they mean the same: "
            "give one of them",
            field="max_completion_tokens",
        )
    return old if new is None else new


def _logprobs(endpoint: Endpoint, fields: Mapping[str, Any]) -> int | None:
    """Chat asks with a boolean and `top_logprobs`, completions with one number."""
    asked = fields.get("logprobs")
    if endpoint is Endpoint.COMPLETIONS:
        return asked
    if asked is not None and not isinstance(asked, bool):
        raise RequestError(f"logprobs is {_show(asked)}; chat wants true or false", field="logprobs")
    top = fields.get("top_logprobs")
    if top is None:
        return 0 if asked else None
    if not isinstance(top, int) or isinstance(top, bool) or not 0 <= top <= MAX_TOP_LOGPROBS:
        raise RequestError(
            f"top_logprobs is {_show(top)}; it must be an integer from 0 to {MAX_TOP_LOGPROBS}",
            field="top_logprobs",
        )
    if not asked:
        raise RequestError("top_logprobs needs logprobs: true beside it", field="top_logprobs")
    return top


def _logit_bias(value: object) -> dict[int, float]:
    """JSON's keys are strings; the range of ids and values is checked by `SamplingParams`."""
    if not isinstance(value, Mapping):
        raise RequestError(
            f"logit_bias is {_show(value)}; it must map token ids to numbers", field="logit_bias"
        )
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit()):
            raise RequestError(
                f"logit_bias has the key {_show(key)}; keys are token ids in decimal", field="logit_bias"
            )
        biases[int(key)] = bias
    return biases


def _messages(value: object) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise RequestError(
            f"messages is {_show(value)}; it must be a list of at least one message", field="messages"
        )
    return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(value))


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is {_show(message)}; it must be an object", field=where)
    fields = {name: value for name, value in message.items() if value is not None}
    for name in fields.keys() - {"role", "content", "name", "tool_calls", "tool_call_id"}:
        raise RequestError(f"{where}.{name} is not supported: remove it", field=f"{where}.{name}")
    role = fields.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestError(
            f"{where}.role is {_show(role)}; supported are {', '.join(_ROLES)}", field=f"{where}.role"
        )
    result = {"role": _ROLES[role], **tool_fields(fields, where)}
    content = fields.get("content", "" if "tool_calls" in result else None)
    result["content"] = _content(content, f"{where}.content")
    if "name" in fields:
        if not isinstance(fields["name"], str):
            raise RequestError(f"{where}.name must be a string", field=f"{where}.name")
        result["name"] = fields["name"]
    return result


def _content(value: object, where: str) -> str:
    """A string, or a list of text parts, which are joined by line breaks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise RequestError(f"{where} is {_show(value)}; it must be a string or text parts", field=where)
    texts: list[str] = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise RequestError(
                f'{where}[{i}] is {_show(part)}; only {{"type": "text", "text": "..."}} is supported',
                field=f"{where}[{i}]",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    """A string, token ids, or a list of strings or of lists of token ids."""
    one = _prompt(value)
    if one is not None:
        return (one,)
    prompts = [_prompt(item) for item in value] if isinstance(value, list) else []
    checked = tuple(prompt for prompt in prompts if prompt is not None)
    if not prompts or len(checked) != len(prompts):
        raise RequestError(
            f"prompt is {_show(value)}; it must be a string, a list of token ids, or a list of those",
            field="prompt",
        )
    if len({type(prompt) for prompt in checked}) > 1:
        raise RequestError(
            "prompt is a list of texts and token ids; it must hold one kind: split the request",
            field="prompt",
        )
    if len(checked) > MAX_PROMPTS:
        raise RequestError(
            f"prompt holds {len(checked)} prompts; at most {MAX_PROMPTS} are allowed: split the request",
            field="prompt",
        )
    return checked


def _prompt(value: object) -> str | tuple[int, ...] | None:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(token, int) and not isinstance(token, bool) for token in value):
        return tuple(value)
    return None
