"""Conversations to prompt text: check the messages, render the checkpoint's Jinja template.

A template is part of a checkpoint, so it runs in Jinja's immutable sandbox: it sees the messages and
a few functions that the field's templates use, and can change nothing.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polybatch.errors import ModelError, RequestError


def check_messages(messages: object) -> list[dict[str, Any]]:
    """Messages as templates take them: a role and a text each; lists of text parts are joined by newlines.

    Content may be absent only beside `tool_calls`. Raises RequestError naming `messages`.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise _bad(f"messages is {type(messages).__name__}; it must be a list of messages")
    if not messages:
        raise _bad("messages is empty; it must hold at least one message")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _bad(f"{where} is {type(message).__name__}; it must be a map with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise _bad(f"{where}.role is {role!r}; it must be a role such as system, user or assistant")
    if content is None and not message.get("tool_calls"):
        raise _bad(f"{where} has no content; it must be a string or a list of text parts")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        content = "\n".join(_text_of(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if content is not None and not isinstance(content, str):
        kind = type(content).__name__
        raise _bad(f"{where}.content is {kind}; it must be a string or a list of text parts")
    # Templates of the field test content for truth or concatenate it; an empty text serves both.
    return {**message, "content": content or ""}


def _text_of(part: object, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise _bad(f"{where} is of type {kind!r}; only text parts are supported")
    text = part.get("text")
    if not isinstance(text, str):
        raise _bad(f"{where}.text is {type(text).__name__}; it must be a string")
    return text


def _bad(message: str) -> RequestError:
    return RequestError(message, field="messages")


def compile_template(source: str) -> Callable[..., str]:
    """A function of keyword variables that renders the template.

    Raises ModelError for a template that does not parse; the function raises RequestError where it
    fails on a conversation, with what the template itself says about it.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    # Jinja's own filter escapes for HTML, which a prompt is not.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise ModelError(f"the checkpoint's chat template does not parse: {error}") from error

    def render(**variables: Any) -> str:
        try:
            return template.render(**variables)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise _bad(f"the chat template refuses these messages: {error}") from error
        except RecursionError as error:
            raise _bad("the messages are nested too deeply for the chat template") from error

    return render


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
