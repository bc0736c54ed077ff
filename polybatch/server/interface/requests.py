"""Bodies of requests.

Small ones are decoded into these very types. Those of generations are read by `polybatch.server.call` and
`polybatch.jobs.schema`, which know more than types can say; here they are only described, and tests hold the
two together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

_PROMPT: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {
            "type": "array", "minItems": 1,
            "items": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        },
    ]
}  # fmt: skip
_RESPONSE_FORMAT: dict[str, Any] = {
    "type": ["object", "null"],
    "required": ["type"],
    "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}},
}
_SCHEMA: dict[str, Any] = {"type": ["object", "string", "boolean", "null"]}
_LORA: dict[str, Any] = {
    "type": ["array", "null"],
    "maxItems": 8,
    "items": {
        "type": "object", "required": ["id"], "additionalProperties": False,
        "properties": {"id": {"type": "string"}, "scale": {"type": "number"}},
    },
}  # fmt: skip
_MS: dict[str, Any] = {"type": ["number", "null"], "exclusiveMinimum": 0}
_DEADLINES: dict[str, Any] = {
    "type": ["object", "null"], "additionalProperties": False,
    "properties": {"ttft_ms": _MS, "tpot_ms": _MS, "e2e_ms": _MS},
}  # fmt: skip
_WORKFLOW: dict[str, Any] = {
    "type": ["object", "null"], "additionalProperties": False, "required": ["id", "stage", "deadline_ms"],
    "properties": {
        "id": {"type": "string"}, "stage": {"type": "string"}, "deadline_ms": _MS,
        "remaining": {"type": "array", "items": {"type": "string"}, "maxItems": 1024},
    },
}  # fmt: skip

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
TopK = Annotated[int, Meta(ge=-1)]
Temperature = Annotated[float, Meta(ge=0, le=100)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Salt = Annotated[str, Meta(max_length=256)]
RequestId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:/+=@-]{1,128}$")]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
Name = Annotated[str, Meta(min_length=1)]
Tools = Annotated[list[dict[str, Any]], Meta(max_length=128)]
TokenIds = Annotated[list[int], Meta(max_length=1024)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Of answers that are streamed."""

    include_usage: Annotated[bool | None, Meta(description="A last chunk with token counts.")] = None
    continuous_usage_stats: Annotated[
        bool | None, Meta(description="Token counts in every chunk, beside include_usage.")
    ] = None
    include_obfuscation: Annotated[bool | None, Meta(description="Changes nothing.")] = None


class GenerationRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that chat and completions share."""

    model: Annotated[
        str, Meta(min_length=1, description="The base model, an adapter, or both as `base:adapter`.")
    ]
    max_tokens: Annotated[Count | None, Meta(description="Tokens of the output.")] = None
    min_tokens: Annotated[Count | None, Meta(description="No stop before so many.")] = None
    n: Annotated[Positive | None, Meta(description="Completions per prompt; see --max-n.")] = None
    temperature: Annotated[Temperature | None, Meta(description="0 is greedy.")] = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[TopK | None, Meta(description="0 or -1 is off.")] = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[
        dict[str, float] | None, Meta(description="Token id in decimal -> added to its logit, -100 to 100.")
    ] = None
    seed: Annotated[int | None, Meta(description="64 bits.")] = None
    stop: Annotated[StopString | list[StopString] | None, Meta(description="The output ends before.")] = None
    stop_token_ids: Annotated[TokenIds | None, Meta(description="The output ends with.")] = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: Annotated[bool | None, Meta(description="Only lengths and stop strings end it.")] = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[
        Count | None, Meta(description="Best alternatives per token of the prompt.")
    ] = None
    stream: Annotated[bool | None, Meta(description="Answer as server-sent events.")] = None
    stream_options: Annotated[StreamOptions | None, Meta(description="Beside stream: true only.")] = None
    response_format: Annotated[
        Any, Meta(description="A form, as OpenAI spells it.", extra_json_schema=_RESPONSE_FORMAT)
    ] = None
    structured_outputs: Annotated[
        dict[str, Any] | None,
        Meta(description="One of json, json_object, regex, choice and grammar, as vLLM spells it."),
    ] = None
    guided_json: Annotated[Any, Meta(description="Older vLLM.", extra_json_schema=_SCHEMA)] = None
    guided_regex: Annotated[str | None, Meta(description="Older vLLM.")] = None
    guided_choice: Annotated[list[str] | None, Meta(description="Older vLLM.")] = None
    guided_grammar: Annotated[str | None, Meta(description="Older vLLM.")] = None
    regex: Annotated[str | None, Meta(description="As SGLang spells it.")] = None
    ebnf: Annotated[str | None, Meta(description="As SGLang spells it.")] = None
    json_schema: Annotated[Any, Meta(description="As SGLang spells it.", extra_json_schema=_SCHEMA)] = None
    adapter_id: Annotated[Name | None, Meta(description="An adapter's name.")] = None
    lora: Annotated[Any, Meta(description="Adapters to mix, with their scales.", extra_json_schema=_LORA)] = (
        None
    )
    priority: Annotated[
        int | None, Meta(description="Lower first; with --scheduling-policy priority only.")
    ] = None
    cache_salt: Annotated[
        Salt | None,
        Meta(description="Cached prefixes are shared between equal salts only."),
    ] = None
    request_id: Annotated[
        RequestId | None,
        Meta(description="As the header X-Request-Id."),
    ] = None
    truncate_prompt_tokens: Annotated[
        Positive | None, Meta(description="Keep only so many of the prompt's last tokens.")
    ] = None
    add_special_tokens: bool | None = None
    deadlines: Annotated[
        Any, Meta(description="When tokens are due, in milliseconds.", extra_json_schema=_DEADLINES)
    ] = None
    workflow: Annotated[
        Any,
        Meta(description="A call's place in a workflow with one deadline.", extra_json_schema=_WORKFLOW),
    ] = None
    expected_tokens: Annotated[
        Positive | None, Meta(description="How long the output is likely to be; no limit.")
    ] = None


class TextPart(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A part of a message's content."""

    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[TextPart] | None, Meta(description="null beside tool_calls only.")] = None
    name: str | None = None
    tool_calls: Annotated[list[dict[str, Any]] | None, Meta(description="An assistant's.")] = None
    tool_call_id: Annotated[str | None, Meta(description="Of a tool's answer.")] = None


class ChatCompletionRequest(GenerationRequest, forbid_unknown_fields=True, kw_only=True):
    """A conversation to answer: OpenAI's fields and those of other servers' clients."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[Positive | None, Meta(description="max_tokens by its new name.")] = None
    logprobs: Annotated[bool | None, Meta(description="Log-probabilities of the output's tokens.")] = None
    top_logprobs: Annotated[TopLogprobs | None, Meta(description="Beside logprobs: true.")] = None
    tools: Annotated[Tools | None, Meta(description="Functions.")] = None
    tool_choice: Annotated[
        Any,
        Meta(
            description="none, auto, required, or a function.",
            extra_json_schema={"type": ["string", "object", "null"]},
        ),
    ] = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Meta(description="Variables of the chat template: texts, numbers, flags.")
    ] = None
    add_generation_prompt: Annotated[
        bool | None, Meta(description="End the prompt where an answer begins; true by default.")
    ] = None


class CompletionRequest(GenerationRequest, forbid_unknown_fields=True, kw_only=True):
    """Prompts to continue: OpenAI's fields and those of other servers' clients."""

    prompt: Annotated[
        Any, Meta(description="Text, token ids, or up to 128 of either.", extra_json_schema=_PROMPT)
    ]
    logprobs: Annotated[
        Count | None,
        Meta(description="Best alternatives per token; see --max-logprobs."),
    ] = None
    echo: Annotated[bool | None, Meta(description="The prompt before its completion.")] = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """prompt or messages, one of them. add_special_tokens: null is true for a prompt, false for messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Token ids to read."""

    tokens: list[int]
    model: str | None = None


class LoadAdapterRequest(msgspec.Struct, forbid_unknown_fields=True):
    """load_inplace: a name in use gets the new weights; else that is an error."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterRequest(msgspec.Struct, forbid_unknown_fields=True):
    """An adapter to forget."""

    lora_name: str
