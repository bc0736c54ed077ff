"""/v1/chat/completions and /v1/completions, streamed and not."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from polybatch.engine.messages import RequestDelta
from polybatch.errors import PolybatchError
from polybatch.jobs.responses import response_body
from polybatch.jobs.schema import Endpoint
from polybatch.jobs.tools.answer import add_tool_calls
from polybatch.request import RequestOutput
from polybatch.server.auth import caller_of
from polybatch.server.bodies import decode_object, read_body
from polybatch.server.call import ServerCall, parse_server_call
from polybatch.server.chunks import ChunkWriter
from polybatch.server.deadline_fields import ANSWER_HEADERS, REQUEST_HEADERS, answer_headers
from polybatch.server.echo import EchoedPrompt, add_echo, echoed, without_completions
from polybatch.server.errors import as_http
from polybatch.server.generation import Generation, prepare
from polybatch.server.interface.answers import ChatCompletion, Completion
from polybatch.server.interface.requests import ChatCompletionRequest, CompletionRequest
from polybatch.server.openapi import EVENTS, describe
from polybatch.server.state import ServerState, state_of
from polybatch.server.streams import DONE, EventStream, event, unless_gone

router = APIRouter(tags=["generation"])

ERRORS = (404, 500, 503)
COMMON: dict[str, Any] = {"also": EVENTS, "parameters": REQUEST_HEADERS, "headers": ANSWER_HEADERS}
CHAT = describe(ChatCompletion, *ERRORS, body=ChatCompletionRequest, **COMMON)
COMPLETIONS = describe(Completion, *ERRORS, body=CompletionRequest, **COMMON)


@router.post(Endpoint.CHAT.value, **CHAT)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await _answer(request, Endpoint.CHAT)


@router.post(Endpoint.COMPLETIONS.value, **COMPLETIONS)
async def completions(request: Request) -> Response:
    """Continue one or more prompts."""
    return await _answer(request, Endpoint.COMPLETIONS)


async def _answer(request: Request, endpoint: Endpoint) -> Response:
    state = state_of(request)
    policy = str(state.llm.settings.get("policy") or "fcfs")
    body = decode_object(await read_body(request, state.config))
    call = parse_server_call(endpoint, body, state.config, policy, request.headers)
    if call.request_id is not None:
        request.state.request_id = call.request_id
    generation = await unless_gone(request.receive, prepare(state, call, caller_of(request)))
    identity = {
        "response_id": request.state.request_id,
        "created": int(time.time()),
        "fingerprint": state.fingerprint,
    }
    if call.is_streamed:
        return await _stream(request, state, call, generation, identity)
    generation.submit()
    outputs = await unless_gone(request.receive, generation.collect())
    told = answer_headers(outputs[0].metrics) if outputs else {}
    return JSONResponse(whole_answer(state, generation, outputs, identity), headers=told)


def whole_answer(
    state: ServerState, generation: Generation, outputs: list[RequestOutput], identity: dict[str, Any]
) -> dict[str, Any]:
    """The response object of a finished generation, for live clients and for rows of batches."""
    call = generation.call
    if call.is_prompt_only:
        outputs = [without_completions(output) for output in outputs]
    answer = response_body(call.call, outputs, **identity)
    if call.echo:
        add_echo(answer, call, _prompts(state, call, generation), outputs)
    add_tool_calls(answer, call.call)
    return answer


async def _stream(
    request: Request, state: ServerState, call: ServerCall, generation: Generation, identity: dict[str, Any]
) -> Response:
    """Begin to answer once there is something to say, so that an early failure has its own status."""
    prefix = "chatcmpl-" if call.is_chat else "cmpl-"
    identity = identity | {"response_id": prefix + identity["response_id"]}
    writer = ChunkWriter(generation.call, _prompts(state, call, generation), **identity)
    generation.submit()
    deltas = generation.deltas()
    try:
        first = await unless_gone(request.receive, _first(deltas))
    except BaseException:
        generation.close()
        raise
    return EventStream(
        _events(writer, first, deltas), generation.close, state.config.send_timeout_s,
        headers=answer_headers(first[1].metrics),
    )  # fmt: skip


async def _first(deltas: AsyncIterator[tuple[int, RequestDelta]]) -> tuple[int, RequestDelta]:
    return await anext(deltas)


async def _events(
    writer: ChunkWriter,
    first: tuple[int, RequestDelta],
    deltas: AsyncGenerator[tuple[int, RequestDelta], None],
) -> AsyncGenerator[bytes, None]:
    try:
        yield writer.write(*first)
        async with aclosing(deltas):
            async for index, delta in deltas:
                events = writer.write(index, delta)
                if events:
                    yield events
    except PolybatchError as error:
        yield event(as_http(error).body) + DONE
        return
    yield writer.close()


def _prompts(state: ServerState, call: ServerCall, generation: Generation) -> list[EchoedPrompt]:
    if not call.echo:
        return [EchoedPrompt(request.prompt_token_ids) for request in generation.requests]
    is_cut = call.truncate_prompt_tokens is not None
    return [
        echoed(request.prompt_token_ids, None if is_cut else text, state.llm.tokenizer)
        for request, text in zip(generation.requests, generation.texts, strict=True)
    ]
