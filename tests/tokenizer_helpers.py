"""Small tokenizers of the kinds that checkpoints ship, trained on the spot."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from polybatch.tokenizer import Tokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog, and the dog doesn't mind at all",
    "naïve café déjà vu — Größe, señor, Ελλάδα, Привет мир, 日本語のテキスト, 한국어 🦜👩‍👩‍👧 done",
    "def f(x):\n    return x + 1234  # 56.78\n\n\tif x:\r\n  pass",
] * 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@cache
def byte_level_json() -> str:
    """A byte-level BPE with three special tokens and one plain added token."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([AddedToken("<think\uff5c>", normalized=False)])
    return backend.to_str()


@cache
def sentencepiece_json() -> str:
    """A BPE with spaces as ▁ and bytes as <0xAB>, as Llama 2's."""
    alphabet = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=alphabet[:3], show_progress=False)
    backend.train_from_iterator(TEXTS[:1], trainer)
    layout = json.loads(backend.to_str())
    vocab = layout["model"]["vocab"]
    for token in alphabet[3:]:
        vocab[token] = len(vocab)
    backend = Backend.from_str(json.dumps(layout))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend.to_str()


@cache
def byte_level() -> Tokenizer:
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return Tokenizer(Backend.from_str(byte_level_json()), named_tokens=named)


@cache
def sentencepiece() -> Tokenizer:
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(Backend.from_str(sentencepiece_json()), named_tokens=named, add_bos=True)


def save(path: Path, layout: str, **config: object) -> Path:
    """Write a tokenizer as a Hugging Face directory."""
    (path / "tokenizer.json").write_text(layout)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
