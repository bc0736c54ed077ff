"""The tokenizer that a GGUF file carries in its metadata: vocabulary, merges or scores, flags.

A GGUF file names its pre-tokenizer instead of describing it, so the splits that the supported
families' vocabularies were made with are written down here, as their tokenizer.json files have them.
Source: llama.cpp's vocabulary types "gpt2" (byte-level BPE) and "llama" (SentencePiece BPE).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polybatch.errors import ModelError
from polybatch.models.fields import Fields
from polybatch.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers


class _TokenType(enum.IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name -> regular expression; None is GPT-2's own, "digits" the same after splitting off each digit.
_SPLITS: dict[str, str | None] = {
    "default": None,
    "gpt-2": None,
    "smollm": "digits",
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "llama-bpe": _LLAMA3_SPLIT,
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
    "tekken": _TEKKEN_SPLIT,
}
# A text that is a token is that token, whatever the merges say.
_WHOLE_TOKENS_FIRST = (_LLAMA3_SPLIT, _TEKKEN_SPLIT)


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """Build the tokenizer that `tokenizer.*` keys describe.

    Raises ModelError for a kind that is not supported, and for keys that are missing or malformed.
    """
    fields = Fields(metadata, source)
    tokens = fields.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelError(f"{source} lacks tokenizer.ggml.tokens: the file holds no vocabulary")
    kind = fields.text("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = _byte_level(fields, tokens)
    elif kind == "llama":
        backend = _sentencepiece(fields, tokens)
    else:
        raise fields.bad("tokenizer.ggml.model", "gpt2 (byte-level BPE) or llama (SentencePiece BPE)")
    _add_tokens(backend, tokens, _token_types(fields, len(tokens)))
    named = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.optional_integer(f"tokenizer.ggml.{key}_token_id", high=len(tokens) - 1)
        if index is not None:
            named[f"{name}_token"] = tokens[index]
    template = fields.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        named_tokens=named,
        chat_template=None if template is None else fields.text("tokenizer.chat_template"),
        add_bos=fields.flag("tokenizer.ggml.add_bos_token", kind == "llama"),
        add_eos=fields.flag("tokenizer.ggml.add_eos_token", False),
    )


def _token_types(fields: Fields, num_tokens: int) -> list[int]:
    types = fields.get("tokenizer.ggml.token_type")
    if types is None:
        return [_TokenType.NORMAL] * num_tokens
    if not isinstance(types, list) or len(types) != num_tokens:
        raise fields.bad("tokenizer.ggml.token_type", f"a list of {num_tokens} types, one per token")
    return types


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens that are matched whole in a text before it is split: control ones are special."""
    from tokenizers import AddedToken

    def of_type(*wanted: _TokenType) -> list[AddedToken]:
        chosen = (token for token, kind in zip(tokens, types, strict=True) if kind in wanted and token)
        return [AddedToken(token, normalized=False) for token in chosen]

    backend.add_special_tokens(of_type(_TokenType.CONTROL, _TokenType.UNKNOWN))
    backend.add_tokens(of_type(_TokenType.USER_DEFINED))


def _byte_level(fields: Fields, tokens: list[str]) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = fields.text("tokenizer.ggml.pre", "default")
    if name not in _SPLITS:
        raise fields.bad("tokenizer.ggml.pre", ", ".join(_SPLITS))
    split = _SPLITS[name]
    merges = fields.texts("tokenizer.ggml.merges") or []
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(_bpe(models, fields, vocab, pairs, ignore_merges=split in _WHOLE_TOKENS_FIRST))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split == "digits":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    elif split is not None:
        steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
    own_split = split in (None, "digits")
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_split))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split == _QWEN2_SPLIT:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Fields, tokens: list[str]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = fields.integer("tokenizer.ggml.unknown_token_id", 0, low=0, high=len(tokens) - 1)
    merges = _merges_by_score(fields, tokens, vocab)
    backend = Tokenizer(
        _bpe(models, fields, vocab, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if fields.flag("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _merges_by_score(fields: Fields, tokens: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """All ways to put a token together from two, best token first: SentencePiece's order of merging."""
    scores = fields.get("tokenizer.ggml.scores")
    numbers = isinstance(scores, list) and all(isinstance(score, (int, float)) for score in scores)
    if not numbers or len(scores) != len(tokens):
        raise fields.bad("tokenizer.ggml.scores", f"a list of {len(tokens)} numbers, one per token")
    types = _token_types(fields, len(tokens))
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, index in vocab.items():
        if types[index] != _TokenType.NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[index], vocab[left], vocab[right], left, right))
    ranked.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in ranked]


def _bpe(
    models: Any, fields: Fields, vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any
) -> tokenizers.models.BPE:
    try:
        model: tokenizers.models.BPE = models.BPE(vocab, merges, **options)
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{fields.source}: the vocabulary and its merges do not fit: {error}") from error
    return model
