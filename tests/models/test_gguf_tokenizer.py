"""Tokenizers from GGUF metadata: equal to the tokenizer.json that they were converted from."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizer_helpers as small
from gguf_helpers import write_gguf
from helpers import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_SPLIT

from polybatch.errors import ModelError
from polybatch.models.gguf_tokenizer import tokenizer_from_gguf
from polybatch.tokenizer import Tokenizer

# Llama 3's split, as its tokenizer.json has it.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_metadata(pre: str | None) -> dict[str, Any]:
    model = json.loads(small.byte_level_json())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    # The plain added token follows the trained ones.
    tokens.append("<think\uff5c>")
    types = [3 if token in small.SPECIAL else 1 for token in tokens[:-1]] + [4]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    return metadata if pre is None else metadata | {"tokenizer.ggml.pre": pre}


def original(pre: str | None) -> Backend:
    """The same vocabulary with the pre-tokenizer that the name stands for, put together by hand."""
    layout = json.loads(small.byte_level_json())
    layout["model"]["ignore_merges"] = pre == "llama-bpe"
    backend = Backend.from_str(json.dumps(layout))
    split = {"llama-bpe": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT}.get(pre or "")
    first: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    if pre == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


texts = st.one_of(
    st.text(max_size=30),
    st.text(" ab'stm12\n\t\r.é\u0301漢½", max_size=30),
    st.lists(st.sampled_from(["<|im_end|>", "<think\uff5c>", " the", "1234 ", "don't", "\r\n"])).map("".join),
)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2", "default", None])
def test_named_pre_tokenizers_split_as_the_original_does(pre: str | None) -> None:
    ours = tokenizer_from_gguf(byte_level_metadata(pre), "file")
    theirs = original(pre)
    assert ours.backend.get_vocab() == theirs.get_vocab()

    @settings(max_examples=60, deadline=None)
    @given(texts)
    def same(text: str) -> None:
        assert ours.encode(text) == theirs.encode(text).ids

    same()
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)
    assert ours.all_special_ids == {0, 1, 2}
    assert ours.byte_scheme == "byte_level"


def sentencepiece_metadata() -> dict[str, Any]:
    model = json.loads(small.sentencepiece_json())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    rank = {left + right: i for i, (left, right) in reversed(list(enumerate(model["merges"])))}
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(rank.get(token, 10_000)) for token in tokens],
        "tokenizer.ggml.token_type": [kinds.get(t, 6 if t.startswith("<0x") else 1) for t in tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@settings(max_examples=80, deadline=None)
@given(st.one_of(st.text(max_size=20), st.text(" thequickbrownfox", max_size=30)))
def test_scores_give_back_the_merges_of_a_sentencepiece_vocabulary(text: str) -> None:
    ours, theirs = tokenizer_from_gguf(sentencepiece_metadata(), "file"), small.sentencepiece()
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ids[0] == 1
    assert ours.decode(ids) == theirs.decode(ids)


def test_a_file_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_model("llama"), extra={"tokenizer.chat_template": "{{ 1 + 1 }}"})
    from polybatch.models.gguf_file import GgufFile

    ours = tokenizer_from_gguf(GgufFile(tmp_path / "m.gguf").metadata, "file")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("the", "thethat", "<|end|>the(x)=Y;", ""):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.apply_chat_template([{"role": "user", "content": "x"}]) == "2"
    assert isinstance(ours, Tokenizer)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer.ggml.model": "t5"}, "t5"),
        ({"tokenizer.ggml.pre": "poro-chat"}, "poro-chat"),
        ({"tokenizer.ggml.tokens": None}, "tokens"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokens"),
        ({"tokenizer.ggml.merges": ["not in"]}, "merges"),
        ({"tokenizer.ggml.merges": [""]}, "merges"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "add_bos_token"),
        ({"tokenizer.chat_template": 5}, "chat_template"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": ["a"]}, "scores"),
        ({"tokenizer.ggml.model": "llama"}, "scores"),
    ],
)
def test_unsupported_and_malformed_vocabularies_are_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ModelError, match=named):
        tokenizer_from_gguf(byte_level_metadata("gpt-2") | changes, "file")
