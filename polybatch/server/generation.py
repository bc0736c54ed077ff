"""From a checked call to running requests: every generation of the server goes through here.

A call has one request per prompt. They enter the bounded queue together and run side by side; their deltas
come back as one stream, numbered by prompt.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from polybatch.engine.deltas import OutputCollector
from polybatch.engine.messages import RequestDelta
from polybatch.engine.request_stream import RequestStream
from polybatch.errors import PolybatchError, RequestError
from polybatch.jobs.tools.answer import template_variables, with_tools
from polybatch.request import Deadlines, Request, RequestOutput
from polybatch.server.admission import Ticket
from polybatch.server.auth import Caller
from polybatch.server.call import ServerCall
from polybatch.server.errors import HttpError, busy, unavailable
from polybatch.server.names import adapter_of
from polybatch.server.state import ServerState
from polybatch.structured.checker import BusyError

logger = logging.getLogger("polybatch.server")

MAX_CHARS_PER_TOKEN = 128
"""Prompts with more characters than so many per token of max_model_len are not even tokenised."""

GRAMMAR_RETRY_S = 3
"""A grammar is compiled within so much time."""


class Generation:
    """The running requests of one call. Iterate it once, then `close` it; closing early aborts them."""

    def __init__(
        self, state: ServerState, call: ServerCall, requests: Sequence[Request], texts: Sequence[str | None]
    ) -> None:
        self.call, self.requests, self.texts = call, requests, texts
        self._state = state
        self._ticket: Ticket | None = None
        self._streams: list[RequestStream] = []
        self._collectors = [
            OutputCollector(request, text) for request, text in zip(requests, texts, strict=True)
        ]
        self._started_s = time.monotonic()
        self._num_output_tokens = 0
        self._is_closed = False

    @property
    def _client_id(self) -> str:
        """What the client calls it."""
        return self._state.meter.client_id(self.requests[0].request_id)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)

    def enter(self) -> None:
        """Enter the queue, within the tenant's limits. Raises HttpError 429 or RequestError."""
        state, tenant = self._state, self.requests[0].tenant
        limits = state.tenants.limits(tenant)
        num_seqs = sum(request.params.n for request in self.requests)
        self._ticket = state.admission.enter(num_seqs, self.num_prompt_tokens, tenant, limits)
        try:
            state.rates.enter(tenant, self.num_prompt_tokens, limits.tokens_per_minute)
        except HttpError:
            state.admission.leave(self._ticket)
            raise

    def promoted(self) -> Generation:
        """A row of a batch as live requests. Deadlines that these have by default are not theirs."""
        requests = [
            replace(
                request, request_id=f"{request.request_id}-live", priority=0,
                deadlines=request.deadlines or Deadlines(),
            )
            for request in self.requests
        ]  # fmt: skip
        return Generation(self._state, self.call, requests, self.texts)

    def submit(self, *, is_queued: bool = True) -> None:
        """Enter the queue and the engine. Raises HttpError 429 or EngineDownError.

        is_queued: False for rows of batches, which have slots of their own.
        """
        if is_queued:
            self.enter()
        # Log-probabilities are many times the size of tokens, and go in pieces.
        is_streamed = self.call.is_streamed or self.call.call.params.logprobs is not None
        try:
            for request in self.requests:
                self._streams.append(self._state.llm.submit(request, is_streamed=is_streamed))
        except PolybatchError:
            self.close()
            raise

    async def deltas(self) -> AsyncGenerator[tuple[int, RequestDelta], None]:
        """(number of the prompt, delta) as they come. Raises RequestError or EngineError where one fails."""
        if len(self._streams) == 1:
            async for delta in self._streams[0]:
                self._count(delta)
                yield 0, delta
            return
        queue: asyncio.Queue[tuple[int, RequestDelta | PolybatchError | None]] = asyncio.Queue()
        pumps = [
            asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(self._streams)
        ]
        try:
            num_open = len(pumps)
            while num_open:
                index, item = await queue.get()
                if item is None:
                    num_open -= 1
                elif isinstance(item, PolybatchError):
                    raise item
                else:
                    self._count(item)
                    yield index, item
        finally:
            for pump in pumps:
                pump.cancel()

    async def collect(self) -> list[RequestOutput]:
        """All of it, one output per prompt."""
        try:
            async for index, delta in self.deltas():
                self._collectors[index].add(delta)
        finally:
            self.close()
        return [collector.output() for collector in self._collectors]

    def _count(self, delta: RequestDelta) -> None:
        self._num_output_tokens += sum(len(completion.token_ids) for completion in delta.completions)

    def close(self) -> None:
        """Leave the queue and abort what still runs. Idempotent."""
        for stream in self._streams:
            stream.close()
        if self._ticket is not None:
            self._state.admission.leave(self._ticket)
            self._state.rates.charge(self.requests[0].tenant, self._num_output_tokens)
            self._num_output_tokens = 0
        if not self._is_closed:
            logger.info(
                "%s: %d prompt tokens, adapter %s, %.3f s", self._client_id,
                self.num_prompt_tokens, self.requests[0].adapter and self.requests[0].adapter.name,
                time.monotonic() - self._started_s,
            )  # fmt: skip
        self._is_closed = True


async def _pump(
    index: int, stream: RequestStream, queue: asyncio.Queue[tuple[int, RequestDelta | PolybatchError | None]]
) -> None:
    try:
        async for delta in stream:
            queue.put_nowait((index, delta))
    except PolybatchError as error:
        queue.put_nowait((index, error))
    queue.put_nowait((index, None))


async def prepare(state: ServerState, call: ServerCall, caller: Caller) -> Generation:
    """Tokenise and check all prompts of a call. Raises RequestError or HttpError."""
    if state.is_draining:
        raise unavailable("the server is shutting down", "shutting_down")
    llm = state.llm
    adapter = adapter_of(
        call.call.model,
        call.adapter_id,
        call.lora,
        base_names=state.config.served_model_names,
        adapters=state.tenants.visible(caller.tenant, llm.adapter_paths),
    )
    call = replace(call, call=with_tools(call.call, state.config.tool_call_parser, llm.tokenizer))
    prompts: Sequence[str | tuple[int, ...]] = (
        (await render(state, call.call.messages, call.template | template_variables(call.call)),)
        if call.is_chat
        else call.call.prompts
    )
    if call.call.params.structured is not None:
        try:
            await llm.check_structured(call.call.params.structured)
        except BusyError as error:
            raise busy(str(error), GRAMMAR_RETRY_S) from error
    internal_id = uuid.uuid4().hex
    requests, texts = [], []
    for index, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else None
        ids: Sequence[int] = (
            await encode(state, prompt, call.add_special_tokens) if isinstance(prompt, str) else prompt
        )
        if call.truncate_prompt_tokens is not None:
            ids = ids[-call.truncate_prompt_tokens :]
        requests.append(
            llm.prepare(
                ids,
                call.call.params,
                adapter=adapter,
                request_id=f"{internal_id}-{index}",
                priority=call.priority,
                cache_salt=f"{caller.tenant}/{call.cache_salt}",
                tenant=caller.tenant,
                deadlines=call.deadlines,
                workflow=call.workflow,
                expected_tokens=call.call.expected_tokens,
                # Who asks for a cache of its own shares nothing.
                num_shared_tokens=(
                    0 if call.cache_salt else state.shared_prefixes.num_shared(caller.tenant, ids)
                ),
            )
        )
        texts.append(text)
    return Generation(state, call, requests, texts)


async def encode(state: ServerState, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a text that could fit the model. Raises RequestError."""
    limit = state.llm.max_model_len * MAX_CHARS_PER_TOKEN
    if len(text) > limit:
        raise RequestError(
            f"prompt has {len(text):,} characters; with max_model_len {state.llm.max_model_len:,} at most "
            f"{limit:,} are looked at: shorten the prompt",
            field="prompt",
        )
    return await state.llm.encode(text, add_special_tokens)


async def render(state: ServerState, messages: Sequence[dict[str, Any]], variables: dict[str, Any]) -> str:
    """Prompt text of a conversation. Raises RequestError.

    In a thread, because a template may take its time.
    """
    tokenizer = state.llm.tokenizer
    if tokenizer is None:
        raise RequestError("the model has no tokenizer: send token ids to /v1/completions", field="messages")
    return await asyncio.to_thread(tokenizer.apply_chat_template, messages, **variables)
