"""Bodies of answers, as they are described: whole, with nothing beside the fields named here.

Source: OpenAI's API reference; `stop_reason` and `prompt_logprobs` as vLLM adds them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

UnixTime = Annotated[int, Meta(description="Unix time in seconds.")]


class Exact(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """An object without further fields."""


class ErrorDetail(Exact):
    """param: the field that is at fault. code: for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Exact):
    """What every refusal and failure looks like."""

    error: ErrorDetail


class PromptTokensDetails(Exact):
    """cached_tokens: of the prompts, found in the prefix cache."""

    cached_tokens: int


class Usage(Exact):
    """Token counts over all prompts and completions of a call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(Exact):
    """How likely a token of the prompt was."""

    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class TokenLogprob(Exact):
    """A token that might have been."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenTokenLogprob(TokenLogprob):
    """A token of the output with its best alternatives."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Exact):
    """Of the message's tokens."""

    content: list[ChosenTokenLogprob]
    refusal: None


class FunctionCall(Exact):
    """arguments: JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(Exact):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(Exact):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Exact):
    """One completion of a conversation."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "abort"]
    stop_reason: str | int | None


class ChatCompletion(Exact):
    """A whole answer of a chat."""

    id: str
    object: Literal["chat.completion"]
    created: UnixTime
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_logprobs: PromptLogprobs | UnsetType | None = UNSET


class CompletionLogprobs(Exact):
    """Of the text's tokens, side by side."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Exact):
    """One completion of a prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: str | int | None
    prompt_logprobs: PromptLogprobs | UnsetType | None = UNSET


class Completion(Exact):
    """A whole answer to prompts; choices prompt by prompt."""

    id: str
    object: Literal["text_completion"]
    created: UnixTime
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


class Model(Exact):
    """A base model or an adapter. root: where it comes from. parent: the base of an adapter."""

    id: str
    object: Literal["model"]
    created: UnixTime
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(Exact):
    """The base model's names, then adapters."""

    object: Literal["list"]
    data: list[Model]


class Tokens(Exact):
    """Token ids of a text; token_strs where they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Exact):
    """The text of token ids."""

    prompt: str


class File(Exact):
    """A file of requests or of answers."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: UnixTime
    expires_at: UnixTime | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class DeletedFile(Exact):
    """A file that is gone."""

    id: str
    object: Literal["file"]
    deleted: bool


class FileList(Exact):
    """A page of files."""

    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchErrors(Exact):
    """Why a batch failed before any row was answered."""

    object: Literal["list"]
    data: list[dict[str, Any]]


class BatchCounts(Exact):
    """Rows in all, answered, and ended with an error."""

    total: int
    completed: int
    failed: int


class BatchObject(Exact):
    """A batch; `*_at`: when it got there."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled", "failed"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: UnixTime
    in_progress_at: UnixTime | None
    expires_at: UnixTime
    finalizing_at: UnixTime | None
    completed_at: UnixTime | None
    failed_at: UnixTime | None
    expired_at: UnixTime | None
    cancelling_at: UnixTime | None
    cancelled_at: UnixTime | None
    request_counts: BatchCounts
    metadata: dict[str, str] | None


class BatchList(Exact):
    """A page of batches."""

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Health(Exact):
    """The HTTP process answers."""

    status: Literal["ok"]


class Readiness(Exact):
    """Whether requests are served, and how the engine process is. Ages in seconds."""

    is_ready: bool
    state: Literal["starting", "ready", "restarting", "failed", "closed"]
    reason: str
    num_restarts: int
    num_steps: int
    heartbeat_age_s: float | None
    step_age_s: float | None


class Version(Exact):
    """Of Polybatch."""

    version: str
