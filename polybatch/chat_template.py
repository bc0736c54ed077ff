"""Conversations to prompt text: check the messages, render the checkpoint's Jinja template.

A template is part of a checkpoint, so it runs in Jinja's immutable sandbox: it sees the messages and
a few functions that the field's templates use, can change nothing, and has a limited time and length.
"""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polybatch.errors import ModelError, RequestError

MAX_RENDER_S = 2.0
MAX_RENDERED_CHARS = 1 << 26


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


def compile_template(
    source: str, max_s: float = MAX_RENDER_S, *, name: str = "the checkpoint's chat template"
) -> Callable[..., str]:
    """A function of keyword variables that renders the template within max_s seconds. Thread-safe.

    name: what errors call it.

    Raises ModelError for a template that does not parse; the function raises RequestError where it
    fails on a conversation, with what the template itself says about it.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    deadline = threading.local()

    def check_time() -> None:
        if time.monotonic() > deadline.at:
            raise TemplateError(f"it takes more than {max_s:g} s: send fewer or shorter messages")

    class TimedEnvironment(ImmutableSandboxedEnvironment):
        """Looks at the clock wherever the sandbox is asked anyway, which no loop of a template avoids."""

        intercepted_binops = frozenset(("*", "**", "+", "%", "-", "//"))

        def getattr(self, obj: Any, attribute: str) -> Any:
            check_time()
            return super().getattr(obj, attribute)

        def getitem(self, obj: Any, argument: Any) -> Any:
            check_time()
            return super().getitem(obj, argument)

        def call(self, *args: Any, **kwargs: Any) -> Any:
            check_time()
            return super().call(*args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check_time()
            if operator == "**" or (operator == "*" and max(_length(left), _length(right)) > 0):
                _check_product(operator, left, right)
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = TimedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    # Jinja's own filter escapes for HTML, which a prompt is not.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise ModelError(f"{name} does not parse: {error}") from error

    def render(**variables: Any) -> str:
        deadline.at = time.monotonic() + max_s
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in template.generate(**variables):
                check_time()
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    raise TemplateError(f"it writes more than {MAX_RENDERED_CHARS:,} characters")
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise _bad(f"the chat template refuses these messages: {error}") from error
        except RecursionError as error:
            raise _bad("the messages are nested too deeply for the chat template") from error
        return "".join(pieces)

    return render


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _check_product(operator: str, left: Any, right: Any) -> None:
    """Refuse what one operation would blow up: powers, and long repetitions of texts and lists."""
    if operator == "**":
        raise ValueError("powers are not allowed")
    count = right if isinstance(right, int) else left
    if isinstance(count, int) and count * max(_length(left), _length(right)) > MAX_RENDERED_CHARS:
        raise ValueError(f"a product is longer than {MAX_RENDERED_CHARS:,} characters")


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
