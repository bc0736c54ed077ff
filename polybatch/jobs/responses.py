"""`RequestOutput` -> OpenAI response bodies: chat.completion, text_completion and error objects.

The counterpart of `schema`: plain dicts ready for JSON, no files and no HTTP.
Source: OpenAI's API reference; `stop_reason` and `prompt_logprobs` as vLLM adds them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from polybatch.jobs.schema import Call, Endpoint
from polybatch.request import CompletionOutput, Logprob, RequestOutput

IMPOSSIBLE_LOGPROB = -9999.0
"""JSON has no -inf; OpenAI writes this for tokens that cannot occur."""


class Scored(Protocol):
    """Tokens with the log-probabilities at their positions."""

    @property
    def token_ids(self) -> list[int]: ...

    @property
    def logprobs(self) -> list[dict[int, Logprob]] | None: ...


def response_body(
    call: Call, outputs: Sequence[RequestOutput], *, response_id: str, created: int, fingerprint: str
) -> dict[str, Any]:
    """The response object of a finished call.

    outputs: one finished `RequestOutput` per prompt of the call, in the order of its prompts.
    created: Unix time in seconds. fingerprint: OpenAI's `system_fingerprint`.
    Choices are numbered prompt by prompt, the n completions of each together.
    """
    is_chat = call.endpoint is Endpoint.CHAT
    choices = [
        _choice(call, output, completion, k * call.params.n + completion.index)
        for k, output in enumerate(outputs)
        for completion in output.outputs
    ]
    body: dict[str, Any] = {
        "id": ("chatcmpl-" if is_chat else "cmpl-") + response_id,
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": call.model,
        "choices": choices,
        "usage": usage(outputs),
        "system_fingerprint": fingerprint,
    }
    if is_chat and call.params.prompt_logprobs is not None:
        body["prompt_logprobs"] = prompt_logprobs_body(outputs[0].prompt_logprobs)
    return body


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Token counts over all prompts and completions; a prompt counts once whatever n is."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }


def error_body(
    message: str, *, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object; kind is its `type`, for example "invalid_request_error"."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _choice(call: Call, output: RequestOutput, completion: CompletionOutput, index: int) -> dict[str, Any]:
    reason = completion.finish_reason
    choice: dict[str, Any] = {"index": index}
    if call.endpoint is Endpoint.CHAT:
        choice["message"] = {"role": "assistant", "content": completion.text, "refusal": None}
        choice["logprobs"] = chat_logprobs(call, completion)
    else:
        choice["text"] = completion.text
        choice["logprobs"] = completion_logprobs(call, completion)
        if call.params.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_body(output.prompt_logprobs)
    choice["finish_reason"] = None if reason is None else reason.value
    choice["stop_reason"] = completion.stop_reason
    return choice


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else IMPOSSIBLE_LOGPROB


def _token_text(token: int, logprob: Logprob) -> str:
    return f"token_id:{token}" if logprob.decoded_token is None else logprob.decoded_token


def _best(entries: dict[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The best alternatives by rank; the chosen token is among `entries` even if it ranks lower."""
    ranked = sorted(entries.items(), key=lambda item: item[1].rank)
    return [item for item in ranked if item[1].rank <= count]


def _token_entry(token: int, logprob: Logprob) -> dict[str, Any]:
    text = _token_text(token, logprob)
    return {"token": text, "logprob": _finite(logprob.logprob), "bytes": list(text.encode())}


def chat_logprobs(call: Call, completion: Scored) -> dict[str, Any] | None:
    """`logprobs` of a chat choice, or of a chunk of one."""
    if call.params.logprobs is None or completion.logprobs is None:
        return None
    content = []
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        entry = _token_entry(token, entries[token])
        entry["top_logprobs"] = [_token_entry(t, lp) for t, lp in _best(entries, call.params.logprobs)]
        content.append(entry)
    return {"content": content, "refusal": None}


def completion_logprobs(call: Call, completion: Scored, offset: int = 0) -> dict[str, Any] | None:
    """`logprobs` of a completion, or of a chunk of one. offset: characters that came before."""
    if call.params.logprobs is None or completion.logprobs is None:
        return None
    tokens: list[str] = []
    values: list[float] = []
    tops: list[dict[str, float]] = []
    offsets: list[int] = []
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        text = _token_text(token, entries[token])
        tokens.append(text)
        values.append(_finite(entries[token].logprob))
        tops.append(
            {_token_text(t, lp): _finite(lp.logprob) for t, lp in _best(entries, call.params.logprobs)}
        )
        offsets.append(offset)
        offset += len(text)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def prompt_logprobs_body(
    prompt_logprobs: Sequence[dict[int, Logprob] | None] | None,
) -> list[dict[str, Any] | None] | None:
    """`prompt_logprobs` as vLLM writes them."""
    if prompt_logprobs is None:
        return None
    return [
        None
        if entries is None
        else {
            str(token): {
                "logprob": _finite(lp.logprob),
                "rank": lp.rank,
                "decoded_token": lp.decoded_token,
            }
            for token, lp in entries.items()
        }
        for entries in prompt_logprobs
    ]
