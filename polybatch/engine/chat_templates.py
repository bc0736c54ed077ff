"""A chat template of the operator's own in place of the checkpoint's.

It is configuration, given where the model is; a request cannot bring one. It runs in the same sandbox, within
the same time, as those of checkpoints.
"""

from __future__ import annotations

import copy
from pathlib import Path

from polybatch.chat_template import compile_template
from polybatch.engine.ports import TextTokenizer
from polybatch.errors import ConfigError, ModelError
from polybatch.tokenizer import Tokenizer

MAX_BYTES = 1 << 20


def with_template(tokenizer: TextTokenizer | None, given: str | None) -> TextTokenizer | None:
    """The tokenizer with another chat template; itself where none is given.

    given: a file's path or Jinja text. Raises ConfigError where it cannot be read or does not parse, or there
    is no tokenizer that renders one.
    """
    if given is None:
        return tokenizer
    source = template_source(given)
    try:
        compile_template(source, name="it")
    except ModelError as error:
        raise ConfigError(f"chat_template is {_short(given)}; {error}") from error
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigError(
            f"chat_template is {_short(given)}, but this model has no tokenizer of its own: leave it out"
        )
    changed = copy.copy(tokenizer)
    # What it has compiled belongs to the old one.
    changed.__dict__.pop("_render", None)
    changed.chat_template = source
    return changed


def template_source(given: str) -> str:
    r"""The Jinja source that a flag gives: a file's content, or the text itself, in which \n is a line break.

    Text that has no braces is no template, so it is taken for a path. Raises ConfigError.
    """
    if "{" in given:
        return given.replace("\\n", "\n")
    path = Path(given)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(
                f"chat_template is {given!r}, a file of {size:,} bytes; the limit is {MAX_BYTES:,}"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"chat_template is {_short(given)}; it must be Jinja text, or a file that can be read: {reason}"
        ) from error


def _short(given: str) -> str:
    return repr(given if len(given) <= 80 else given[:77] + "...")
