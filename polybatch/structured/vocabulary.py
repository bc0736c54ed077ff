"""The bytes that each token spells, which is all a grammar needs to know of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polybatch.errors import RequestError


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokens: bytes by token id, as many as the model has logits; special ones by name.

    special_ids: never part of a text; a grammar may name them. eos_ids: allowed where the grammar ends.
    """

    tokens: list[bytes]
    special_ids: list[int]
    eos_ids: list[int]


def vocabulary_of(tokenizer: object, vocab_size: int, eos_token_ids: Sequence[int]) -> Vocabulary:
    """The vocabulary of a `polybatch.tokenizer.Tokenizer`, cut or filled up to the model's vocab_size.

    Raises RequestError as `check_constrainable` does.
    """
    check_constrainable(tokenizer, eos_token_ids)
    count = min(tokenizer.vocab_size, vocab_size)  # type: ignore[attr-defined]
    special = {token for token in tokenizer.all_special_ids if token < count}  # type: ignore[attr-defined]
    # Rows of the embedding beyond the tokenizer's vocabulary stand for nothing, and must never be chosen.
    special |= {*range(count, vocab_size), *eos_token_ids}
    tokens = [tokenizer.token_bytes(token) for token in range(count)]  # type: ignore[attr-defined]
    tokens += [f"<unused {token}>".encode() for token in range(count, vocab_size)]
    return Vocabulary(tokens, sorted(special), list(eos_token_ids))


def check_constrainable(tokenizer: object, eos_token_ids: Sequence[int]) -> None:
    """Raise RequestError for a model whose output cannot be constrained.

    That is one without a tokenizer, with tokens that spell no bytes, or without an end-of-sequence token.
    """
    if tokenizer is None:
        raise RequestError("structured output needs a tokenizer, and this model has none", field="structured")
    if getattr(tokenizer, "byte_scheme", None) is None:
        raise RequestError(
            "structured output is not supported with this model: its tokenizer does not spell bytes",
            field="structured",
        )
    if not eos_token_ids:
        raise RequestError(
            "structured output needs an end-of-sequence token, and this model names none", field="structured"
        )
