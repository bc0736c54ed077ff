"""Deltas -> OpenAI's streaming chunks.

A chunk per choice that gained something; with `include_usage` a last one with empty `choices` and the counts.
Source: OpenAI's API reference; `continuous_usage_stats` as vLLM has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polybatch.engine.messages import CompletionDelta, RequestDelta
from polybatch.jobs.responses import chat_logprobs, completion_logprobs, prompt_logprobs_body
from polybatch.jobs.tools.answer import ToolStream, finish_reason, tool_stream
from polybatch.request import Logprob
from polybatch.server.call import ServerCall
from polybatch.server.echo import EchoedPrompt
from polybatch.server.streams import DONE, event


class ChunkWriter:
    """Writes the chunks of one call.

    prompts: one per prompt, token ids as the engine got them. created: Unix time in seconds.
    """

    def __init__(
        self,
        call: ServerCall,
        prompts: Sequence[EchoedPrompt],
        *,
        response_id: str,
        created: int,
        fingerprint: str,
    ) -> None:
        self._call, self._prompts = call, prompts
        self._head: dict[str, Any] = {
            "id": response_id,
            "object": "chat.completion.chunk" if call.is_chat else "text_completion",
            "created": created,
            "model": call.call.model,
            "system_fingerprint": fingerprint,
        }
        self._num_prompt = sum(len(prompt.token_ids) for prompt in prompts)
        self._num_cached = [0] * len(prompts)
        self._num_completion = 0
        self._offsets: dict[int, int] = {}
        self._is_started: set[int] = set()
        self._tools: dict[int, ToolStream | None] = {}

    def write(self, index: int, delta: RequestDelta) -> bytes:
        """Events of what a prompt's request gained; empty where that cannot be seen yet."""
        events: list[bytes] = []
        self._num_cached[index] = delta.num_cached_tokens
        if index not in self._is_started:
            self._is_started.add(index)
            events += self._openings(index, delta.prompt_logprobs)
        for change in delta.completions:
            if not self._call.is_prompt_only:
                self._num_completion += len(change.token_ids)
            choice = self._choice(index, change)
            if choice is not None:
                events.append(self._event([choice]))
        return b"".join(events)

    def close(self) -> bytes:
        """The usage, if wanted, and the end."""
        if not self._call.include_usage:
            return DONE
        return event({**self._head, "choices": [], "usage": self._usage()}) + DONE

    def _event(self, choices: list[dict[str, Any]]) -> bytes:
        chunk = {**self._head, "choices": choices}
        if self._call.include_usage:
            chunk["usage"] = self._usage() if self._call.continuous_usage else None
        return event(chunk)

    def _openings(self, index: int, scores: list[dict[int, Logprob] | None] | None) -> list[bytes]:
        """What comes before the first token: the role in a chat, the prompt where it is echoed."""
        call, prompt = self._call, self._prompts[index]
        choices = []
        for k in range(call.call.params.n):
            choice: dict[str, Any] = {"index": index * call.call.params.n + k, "finish_reason": None}
            if call.is_chat:
                choice["delta"] = {"role": "assistant", "content": ""}
                choice["logprobs"] = None
            elif call.echo:
                choice["text"] = prompt.text
                choice["logprobs"] = prompt.logprobs(call.call, scores)
            elif call.wants_prompt_logprobs:
                choice |= {"text": "", "logprobs": None}
            else:
                continue
            if call.wants_prompt_logprobs:
                choice["prompt_logprobs"] = prompt_logprobs_body(scores)
            self._offsets[choice["index"]] = len(choice.get("text", ""))
            choices.append(choice)
        return [self._event([choice]) for choice in choices]

    def _choice(self, index: int, change: CompletionDelta) -> dict[str, Any] | None:
        call = self._call
        number = index * call.call.params.n + change.index
        text = "" if call.is_prompt_only else change.text
        tools = self._tools.setdefault(number, tool_stream(call.call))
        delta = {"content": text} if text or change.finish_reason is None else {}
        if tools is not None:
            delta = tools.delta(text, is_last=change.finish_reason is not None)
        is_silent = not (delta if tools is not None else text) and change.finish_reason is None
        if is_silent and (call.call.params.logprobs is None or call.is_prompt_only):
            return None
        choice: dict[str, Any] = {"index": number}
        if call.is_chat:
            choice["delta"] = delta
            choice["logprobs"] = chat_logprobs(call.call, change)
        else:
            offset = self._offsets.get(number, 0)
            choice["text"] = text
            choice["logprobs"] = (
                None if call.is_prompt_only else completion_logprobs(call.call, change, offset)
            )
            self._offsets[number] = offset + len(text)
        reason = change.finish_reason
        choice["finish_reason"] = None if reason is None else finish_reason(reason.value, tools)
        if change.stop_reason is not None:
            choice["stop_reason"] = change.stop_reason
        return choice

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": self._num_completion,
            "total_tokens": self._num_prompt + self._num_completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached)},
        }
