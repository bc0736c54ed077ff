"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from polybatch.chat_template import check_messages
from polybatch.engine.door import check_vocabulary
from polybatch.errors import RequestError
from polybatch.server.auth import caller_of
from polybatch.server.bodies import decode_as, read_body
from polybatch.server.generation import encode, render
from polybatch.server.interface.answers import Text, Tokens
from polybatch.server.interface.requests import DetokenizeRequest, TokenizeRequest
from polybatch.server.names import adapter_of
from polybatch.server.openapi import describe
from polybatch.server.state import state_of

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", **describe(Tokens, 404, body=TokenizeRequest))
async def tokenize(request: Request) -> JSONResponse:
    """Token ids of a text or of a conversation."""
    state = state_of(request)
    body = decode_as(await read_body(request, state.config), TokenizeRequest)
    _check_model(request, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", field="prompt")
    if body.messages is not None:
        variables: dict[str, Any] = {"add_generation_prompt": body.add_generation_prompt}
        text = await render(state, check_messages(body.messages), variables)
    else:
        text = body.prompt or ""
    is_special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    tokens = await encode(state, text, is_special)
    tokenizer = state.llm.tokenizer
    texts = (
        [tokenizer.token_text(token) for token in tokens] if tokenizer and body.return_token_strs else None
    )
    return JSONResponse(
        {
            "count": len(tokens),
            "max_model_len": state.llm.max_model_len,
            "tokens": tokens,
            "token_strs": texts,
        }
    )


@router.post("/detokenize", **describe(Text, 404, body=DetokenizeRequest))
async def detokenize(request: Request) -> JSONResponse:
    """Text of token ids, special ones by name."""
    state = state_of(request)
    body = decode_as(await read_body(request, state.config), DetokenizeRequest)
    _check_model(request, body.model)
    tokenizer = state.llm.tokenizer
    if tokenizer is None:
        raise RequestError("the model has no tokenizer", field="tokens")
    check_vocabulary("tokens", body.tokens, state.llm.spec.vocab_size)
    return JSONResponse({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})


def _check_model(request: Request, model: str | None) -> None:
    """Raise HttpError 404 for a model that is not here."""
    state = state_of(request)
    if model is not None:
        names = state.config.served_model_names
        adapters = state.tenants.visible(caller_of(request).tenant, state.llm.adapter_paths)
        adapter_of(model, None, None, base_names=names, adapters=adapters)
