"""`echo` of /v1/completions: the prompt, and its log-probabilities, before the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from polybatch.engine.ports import TextTokenizer
from polybatch.jobs.responses import completion_logprobs
from polybatch.jobs.schema import Call
from polybatch.request import Logprob, RequestOutput
from polybatch.server.call import ServerCall


@dataclass(frozen=True, slots=True)
class _Scores:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """A prompt as it can be echoed. text: as sent, or as the token ids read; empty where nobody asks."""

    token_ids: tuple[int, ...]
    text: str = ""
    first_token_text: str = ""

    def logprobs(
        self, call: Call, scores: Sequence[dict[int, Logprob] | None] | None
    ) -> dict[str, Any] | None:
        """OpenAI's `logprobs` of the prompt; its first token has none."""
        if call.params.logprobs is None or scores is None:
            return None
        known = [entries for entries in scores[1:] if entries is not None]
        rest = completion_logprobs(
            call, _Scores(list(self.token_ids[1 : 1 + len(known)]), known), len(self.first_token_text)
        )
        if rest is None:
            return None
        return {
            "tokens": [self.first_token_text, *rest["tokens"]],
            "token_logprobs": [None, *rest["token_logprobs"]],
            "top_logprobs": [None, *rest["top_logprobs"]],
            "text_offset": [0, *rest["text_offset"]],
        }


def echoed(token_ids: tuple[int, ...], text: str | None, tokenizer: TextTokenizer | None) -> EchoedPrompt:
    """Work out what an echo shows."""
    if tokenizer is None:
        return EchoedPrompt(token_ids, text or "")
    text = tokenizer.decode(token_ids, skip_special_tokens=False) if text is None else text
    return EchoedPrompt(token_ids, text, tokenizer.token_text(token_ids[0]))


def without_completions(output: RequestOutput) -> RequestOutput:
    """An output whose completions hold nothing, for max_tokens 0."""
    emptied = [
        replace(c, text="", token_ids=[], logprobs=[] if c.logprobs is not None else None)
        for c in output.outputs
    ]
    return replace(output, outputs=emptied)


def add_echo(
    body: dict[str, Any], call: ServerCall, prompts: Sequence[EchoedPrompt], outputs: Sequence[RequestOutput]
) -> None:
    """Put each prompt before its choices in a response body, in place."""
    n = call.call.params.n
    for k, choice in enumerate(body["choices"]):
        prompt, output = prompts[k // n], outputs[k // n]
        if not call.wants_prompt_logprobs:
            choice.pop("prompt_logprobs", None)
        choice["text"] = prompt.text + choice["text"]
        head, tail = prompt.logprobs(call.call, output.prompt_logprobs), choice["logprobs"]
        if head is None or tail is None:
            continue
        tail["text_offset"] = [offset + len(prompt.text) for offset in tail["text_offset"]]
        choice["logprobs"] = {name: head[name] + tail[name] for name in head}
