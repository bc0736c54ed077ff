"""The door: what a user asks becomes a `Request`, resolved and checked, or a RequestError.

Nothing here touches the scheduler, so a list of prompts can be checked before any of it runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from polybatch.config import ModelSpec
from polybatch.engine.ports import AdapterSource, TextTokenizer
from polybatch.errors import RequestError
from polybatch.mixture import AdapterChoice, Mixture, choice_of, mixed_ref
from polybatch.request import AdapterRef, Deadlines, Request, SamplingParams, WorkflowStage
from polybatch.sampling.random import stream
from polybatch.structured.grammar import GrammarCompiler
from polybatch.structured.spec import StructuredSpec
from polybatch.structured.vocabulary import Vocabulary, check_constrainable, vocabulary_of

logger = logging.getLogger("polybatch.engine")


class Door:
    """Makes requests for one model.

    max_model_len: prompt + output in tokens. seed: requests without their own get one made from it and
    from how many came before, so that equal runs are equal. is_compiling: whether `prepare` compiles what an
    output must follow, rather than whoever runs the request. pool_tokens: how many memory holds, if known;
    refusals say by it what raises the limit.
    """

    def __init__(
        self,
        spec: ModelSpec,
        max_model_len: int,
        tokenizer: TextTokenizer | None = None,
        adapters: AdapterSource | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        is_compiling: bool = True,
        pool_tokens: int | None = None,
    ) -> None:
        self.grammars = GrammarCompiler(self.vocabulary)
        self._is_compiling = is_compiling
        self.spec, self.max_model_len = spec, max_model_len
        self._raising = ways_to_raise(max_model_len, spec.max_position, pool_tokens)
        self._tokenizer, self._adapters = tokenizer, adapters
        self._seed, self._clock = seed, clock
        self._num_requests = 0
        self._prompt_type: Any = tuple[Annotated[int, msgspec.Meta(ge=0, lt=spec.vocab_size)], ...]
        if tokenizer is not None and tokenizer.vocab_size > spec.vocab_size:
            # Often a padding token that nobody sends, so no reason to refuse the model.
            logger.warning(
                "the tokenizer has %d tokens, the model only %d: prompts with any of the others are refused; "
                "check that the two belong together",
                tokenizer.vocab_size,
                spec.vocab_size,
            )

    def prepare(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        adapter: AdapterChoice = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        num_shared_tokens: int = 0,
        deadlines: Deadlines | None = None,
        workflow: WorkflowStage | None = None,
        expected_tokens: int | None = None,
        add_special_tokens: bool = True,
    ) -> Request:
        """Resolve and check a request.

        prompt: text or token ids. add_special_tokens: False for text that holds its own, such as a rendered
        conversation. Raises RequestError with the field, its value and its limit.
        """
        params = params or SamplingParams()
        text = prompt if isinstance(prompt, str) else None
        ids = self._text().encode(prompt, add_special_tokens) if isinstance(prompt, str) else prompt
        token_ids = self._token_ids(ids)
        check_vocabulary("logit_bias", params.logit_bias, self.spec.vocab_size)
        check_vocabulary("stop_token_ids", params.stop_token_ids, self.spec.vocab_size)
        if params.stop and self._tokenizer is None:
            raise RequestError(
                f"stop is {list(params.stop)}, but this model has no tokenizer: use stop_token_ids",
                field="stop",
            )
        max_tokens = resolve_max_tokens(len(token_ids), params, self.max_model_len, self._raising)
        stop_ids = frozenset(params.stop_token_ids)
        if params.structured is not None:
            self._check_structured(params.structured)
        if not params.ignore_eos or params.structured is not None:
            stop_ids |= frozenset(self.spec.eos_token_ids)
        ref = self._adapter(choice_of(adapter))
        seed = stream(self._seed, self._num_requests) if params.seed is None else params.seed
        self._num_requests += 1
        return Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            max_tokens=max_tokens,
            seed=seed,
            stop_token_ids=stop_ids,
            prompt=text,
            adapter=ref,
            priority=priority,
            arrival_s=self._clock(),
            cache_salt=cache_salt,
            tenant=tenant,
            num_shared_tokens=num_shared_tokens,
            deadlines=deadlines,
            workflow=workflow,
            expected_tokens=expected_tokens,
        )

    def vocabulary(self) -> Vocabulary:
        """What grammars are compiled for. Raises RequestError for a model that cannot be constrained."""
        return vocabulary_of(self._tokenizer, self.spec.vocab_size, self.spec.eos_token_ids)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **template_args: Any) -> str:
        """A conversation as prompt text up to where the answer begins, special tokens included."""
        return self._text().apply_chat_template(messages, **template_args)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template_args: Any) -> list[int]:
        """`render_chat`, as token ids. Raises RequestError."""
        return self._text().encode(self.render_chat(messages, **template_args), False)

    def _check_structured(self, spec: StructuredSpec) -> None:
        check_constrainable(self._tokenizer, self.spec.eos_token_ids)
        if self._is_compiling:
            self.grammars.compile(spec)

    def _adapter(self, choice: str | Mixture | None) -> AdapterRef | None:
        if choice is None:
            return None
        if self._adapters is None:
            raise RequestError(f"adapter is {choice!r}, but this engine has no adapters", field="adapter")
        if isinstance(choice, Mixture):
            return mixed_ref(choice, self._adapters.get)
        return self._adapters.get(choice)

    def _token_ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        """A prompt's tokens, checked. Raises RequestError."""
        check_length(ids, self.max_model_len, self._raising)
        try:
            # Prompts are long: types, extremes and the copy take one pass, outside of Python.
            token_ids: tuple[int, ...] = msgspec.convert(ids, self._prompt_type)
        except msgspec.ValidationError:
            check_tokens(ids, self.spec.vocab_size)
            return tuple(map(int, ids))
        return token_ids

    def _text(self) -> TextTokenizer:
        if self._tokenizer is None:
            raise RequestError(
                "prompt is text, but this model has no tokenizer: pass token ids", field="prompt"
            )
        return self._tokenizer


def ways_to_raise(max_model_len: int, max_position: int, pool_tokens: int | None) -> tuple[str, ...]:
    """What lets longer requests in, for the end of a refusal: nothing at the model's own limit."""
    if max_model_len >= max_position:
        return ()
    if pool_tokens is not None and max_model_len >= pool_tokens:
        return ("raise memory, and max_model_len if it is set",)
    return ("raise max_model_len",)


def check_length(token_ids: Sequence[int], max_model_len: int, raising: Sequence[str]) -> None:
    """Raise RequestError unless the prompt is a list with tokens in it and leaves room for one more."""
    if not isinstance(token_ids, (list, tuple)):
        kind = type(token_ids).__name__
        raise RequestError(f"prompt is a {kind}; it must be text or a list of token ids", field="prompt")
    if not token_ids:
        raise RequestError("prompt has no tokens; it needs at least one", field="prompt")
    if len(token_ids) >= max_model_len:
        raise RequestError(
            f"prompt has {len(token_ids):,} tokens, max_model_len is {max_model_len:,} and must leave room "
            f"for one more: {_any_of('shorten the prompt', *raising)}",
            field="prompt",
        )


def check_tokens(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise RequestError unless all of the prompt's tokens, at least one, are integers of the vocabulary."""
    for token in token_ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise RequestError(f"prompt holds {token!r}; token ids are integers", field="prompt")
    check_vocabulary("prompt", (min(token_ids), max(token_ids)), vocab_size)


def check_vocabulary(field: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raise RequestError for a token id outside the vocabulary."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"{field} has token id {token}; the model's vocabulary is 0 to {vocab_size - 1:,}",
                field=field,
            )


def resolve_max_tokens(
    num_prompt: int, params: SamplingParams, max_model_len: int, raising: Sequence[str]
) -> int:
    """Output tokens that the request may have. Raises RequestError if its limits do not fit the model."""
    room = max_model_len - num_prompt
    max_tokens = room if params.max_tokens is None else params.max_tokens
    if max_tokens > room:
        raise RequestError(
            f"prompt has {num_prompt:,} tokens and max_tokens is {max_tokens:,}, together "
            f"{num_prompt + max_tokens:,}; max_model_len is {max_model_len:,}: "
            f"{_any_of('lower max_tokens', 'shorten the prompt', *raising)}",
            field="max_tokens",
        )
    if params.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens is {params.min_tokens:,}, but only {max_tokens:,} tokens fit after the prompt: "
            f"{_any_of('lower min_tokens', 'shorten the prompt', *raising)}",
            field="min_tokens",
        )
    return max_tokens


def _any_of(*ways: str) -> str:
    return " or ".join(filter(None, (", ".join(ways[:-1]), ways[-1])))
