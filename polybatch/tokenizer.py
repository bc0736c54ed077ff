"""Text to token ids and back, and conversations to prompts.

A thin layer over the `tokenizers` library that knows what its file does not: special ids, whether a
prompt begins with a begin-of-sequence token, the chat template. transformers is not needed and not
imported. Text that arrives token by token is detokenizer.py's business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polybatch.chat_template import check_messages, compile_template
from polybatch.errors import ModelError, RequestError

if TYPE_CHECKING:
    import tokenizers

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SPACE = "▁"


class Tokenizer:
    """A checkpoint's tokenizer.

    backend: a `tokenizers.Tokenizer`, owned from now on. named_tokens: "bos_token", "eos_token" … ->
    text; templates see them as variables, and they count as special. chat_template: Jinja source.
    add_bos, add_eos: whether encode puts those tokens around a text; None leaves it to the backend.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        named_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
    ) -> None:
        self.backend = backend
        self.named_tokens = dict(named_tokens or {})
        self.chat_template = chat_template
        backend.no_truncation()
        backend.no_padding()
        known = [text for text in self.named_tokens.values() if backend.token_to_id(text) is not None]
        added = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
        backend.add_special_tokens([text for text in dict.fromkeys(known) if not added.get(text)])
        self.all_special_ids: frozenset[int] = frozenset(
            index for index, token in backend.get_added_tokens_decoder().items() if token.special
        )
        if add_bos is not None or add_eos is not None or backend.post_processor is None:
            self._surround(bool(add_bos), bool(add_eos))
        self._bytes: dict[int, bytes] = {}

    def _surround(self, add_bos: bool, add_eos: bool) -> None:
        from tokenizers.processors import TemplateProcessing

        bos = self.named_tokens.get("bos_token") if add_bos and self.bos_token_id is not None else None
        eos = self.named_tokens.get("eos_token") if add_eos and self.eos_token_id is not None else None
        pieces = ([bos] if bos else []) + ["$A"] + ([eos] if eos else [])
        special = [(token, self.backend.token_to_id(token)) for token in (bos, eos) if token]
        self.backend.post_processor = TemplateProcessing(single=pieces, special_tokens=special)

    @staticmethod
    def is_in(path: Path) -> bool:
        """Whether a checkpoint directory holds any kind of tokenizer."""
        return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """The tokenizer of a Hugging Face directory: tokenizer.json, tokenizer_config.json, template.

        tokenizer.json alone says which special tokens surround a text, as in transformers 5.
        Raises ModelError for files that are missing or malformed.
        """
        import tokenizers

        file = path / "tokenizer.json"
        if not file.is_file():
            raise ModelError(
                f"{file} does not exist: convert the tokenizer with transformers' save_pretrained"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ModelError(f"cannot read {file}: {error}") from error
        config = _read_config(path / "tokenizer_config.json")
        return cls(
            backend,
            named_tokens=_named_tokens(config),
            chat_template=_chat_template(path, config),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Rendered chat prompts hold their special tokens: pass False for them.

        Raises RequestError for text that no UTF-8 can express (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"prompt holds the lone surrogate {text[error.start]!r} at character {error.start}; "
                "it must be valid Unicode",
                field="prompt",
            ) from error
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids, with no clean-up of spaces; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Text of one token alone, special ones by name; lossy where it is a part of a character."""
        return self.backend.decode([token_id], skip_special_tokens=False)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Prompt text of a conversation; encode it with add_special_tokens=False.

        variables: further template variables, such as enable_thinking.
        Raises RequestError naming `messages` for a malformed conversation, or one the template refuses.
        """
        checked = check_messages(messages)
        if self.chat_template is None:
            raise RequestError(
                "the model has no chat template; send a prompt to the completions interface instead",
                field="messages",
            )
        variables = {**self.named_tokens, "documents": None, **variables}
        variables |= {"messages": checked, "tools": tools, "add_generation_prompt": add_generation_prompt}
        return self._render(**variables)

    @cached_property
    def _render(self) -> Callable[..., str]:
        return compile_template(self.chat_template or "")

    def _named_id(self, name: str) -> int | None:
        text = self.named_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    @cached_property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @cached_property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def byte_scheme(self) -> str | None:
        """How tokens spell bytes: "byte_level", "sentencepiece" (first space dropped), or None: unknown.

        Where it is known, text is the concatenation of token_bytes, which makes streaming exact.
        """
        decoder = self.backend.decoder
        if decoder is None:
            return None
        layout = json.loads(decoder.__getstate__())
        if layout["type"] == "ByteLevel":
            return "byte_level"
        steps = layout.get("decoders", ())
        kinds = [step["type"] for step in steps]
        if kinds != ["Replace", "ByteFallback", "Fuse", "Strip"]:
            return None
        replaces = steps[0]["pattern"] == {"String": _SPACE} and steps[0]["content"] == " "
        strips = (steps[3]["content"], steps[3]["start"], steps[3]["stop"]) == (" ", 1, 0)
        return "sentencepiece" if replaces and strips else None

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token stands for, possibly part of a character. Needs a byte_scheme.

        Ids outside the vocabulary stand for nothing, as in decode.
        """
        found = self._bytes.get(token_id)
        if found is None:
            token = self.backend.id_to_token(token_id) or ""
            found = _byte_level_bytes(token) if self.byte_scheme == "byte_level" else _fallback_bytes(token)
            self._bytes[token_id] = found
        return found


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte in byte-level vocabularies: printable Latin-1 itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([BYTE_ALPHABET[char] for char in token])
    except KeyError:
        # Added tokens are written as they read.
        return token.encode()


def _fallback_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return token.encode()
    return token.replace(_SPACE, " ").encode()


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object")
    return config


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like, each written as a text or as a map with `content`."""
    named = {}
    for name in _NAMED:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            named[name] = text
    return named


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json's default one."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {file}: {error}") from error
    template = _read_config(path / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{path}: chat_template must be a string or a list with one named default")
    return template
