"""Tokenizers of Hugging Face directories, against transformers; the real model's against its GGUF."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizer_helpers as small
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from polybatch.errors import ModelError, RequestError
from polybatch.tokenizer import Tokenizer

STRINGS = [
    *small.TEXTS[:3],
    "",
    " leading and trailing ",
    "a\u00a0b\u200bc\ttab\x00nul \r\n\n\n   spaces",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><think\uff5c> text<|im_end",
    "I'm, you're, WE'LL; 3.14 1,000,000 ½ ² Ⅷ ٣",
    "👩‍👩‍👧‍👦🏳️‍🌈 é e\u0301 ﬁ",
]
# As transformers wrote it for years.
END = {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "normalized": False,
       "rstrip": False, "single_word": False, "special": True}  # fmt: skip
NAMED = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def test_a_saved_tokenizer_encodes_and_decodes_as_transformers_does(tmp_path: Path) -> None:
    small.save(tmp_path, small.byte_level_json(), eos_token="<|im_end|>", bos_token="<|im_start|>")
    ours, theirs = Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in STRINGS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.vocab_size == len(theirs)
    assert {ours.eos_token_id, ours.bos_token_id} <= ours.all_special_ids
    assert ours.backend.token_to_id("<think\uff5c>") not in ours.all_special_ids


@pytest.mark.parametrize(
    "flags",
    [{}, {"add_bos_token": True}, {"add_eos_token": True}, {"add_bos_token": True, "add_eos_token": True},
     {"add_bos_token": False}, {"add_bos_token": True, "bos_token": None}],
)  # fmt: skip
@pytest.mark.parametrize("surround", [True, False])
def test_beginning_and_end_tokens_are_added_as_transformers_adds_them(
    flags: dict[str, Any], surround: bool, tmp_path: Path
) -> None:
    config = {"bos_token": "<|im_start|>", "eos_token": END, **flags}
    made = Tokenizer(Backend.from_str(small.byte_level_json()), named_tokens=NAMED, add_bos=surround)
    small.save(tmp_path, made.backend.to_str(), **config)
    ours, theirs = Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for special in (True, False):
        assert ours.encode("hello", special) == theirs.encode("hello", add_special_tokens=special)


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_tokenizer_built_from_flags_surrounds_texts_by_them(bos: bool, eos: bool) -> None:
    backend = Backend.from_str(small.byte_level_json())
    tokenizer = Tokenizer(backend, named_tokens=NAMED, add_bos=bos, add_eos=eos)
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [1] * bos + plain + [2] * eos


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    layout = json.loads(small.byte_level_json())
    layout["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    layout["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
                         "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
    tokenizer = Tokenizer.from_directory(small.save(tmp_path, json.dumps(layout)))
    assert tokenizer.decode(tokenizer.encode(small.TEXTS[0])) == small.TEXTS[0]


def test_token_text_shows_special_tokens_by_name() -> None:
    tokenizer = small.byte_level()
    assert tokenizer.token_text(tokenizer.eos_token_id or 0) == "<|im_end|>"
    assert [tokenizer.token_text(token) for token in tokenizer.encode("the")] == ["the"]


def test_ids_outside_the_vocabulary_stand_for_nothing() -> None:
    for tokenizer in (small.byte_level(), small.sentencepiece()):
        assert tokenizer.decode([10**6]) == ""
        assert tokenizer.token_bytes(10**6) == b""


def test_lone_surrogates_are_a_request_error() -> None:
    with pytest.raises(RequestError, match="lone surrogate") as caught:
        small.byte_level().encode("bad \ud800 text")
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("make", [small.byte_level, small.sentencepiece])
@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_the_bytes_of_all_tokens_are_the_bytes_of_the_text(make: Any, text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    if tokenizer.byte_scheme == "sentencepiece":
        joined = joined.removeprefix(" ")
    assert joined == tokenizer.decode(ids, skip_special_tokens=False)
    assert joined == (text.replace("▁", " ") if tokenizer.byte_scheme == "sentencepiece" else text)


def test_templates_come_from_the_file_or_the_settings(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    expected = "<|im_start|>[user]hi"
    small.save(tmp_path, small.byte_level_json(), bos_token="<|im_start|>", chat_template=TEMPLATE)
    assert Tokenizer.from_directory(tmp_path).apply_chat_template(messages) == expected
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": TEMPLATE}]
    small.save(tmp_path, small.byte_level_json(), bos_token="<|im_start|>", chat_template=named)
    assert Tokenizer.from_directory(tmp_path).apply_chat_template(messages) == expected
    (tmp_path / "chat_template.jinja").write_text("file: " + TEMPLATE)
    assert Tokenizer.from_directory(tmp_path).apply_chat_template(messages) == "file: " + expected


def test_without_a_template_a_conversation_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="no chat template") as caught:
        small.byte_level().apply_chat_template([{"role": "user", "content": "hi"}])
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "not json"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"chat_template": 3}'),
    ],
)
def test_malformed_files_are_model_errors(file: str, text: str, tmp_path: Path) -> None:
    small.save(tmp_path, small.byte_level_json())
    (tmp_path / file).write_text(text)
    with pytest.raises(ModelError, match=str(tmp_path)):
        Tokenizer.from_directory(tmp_path)


def test_a_directory_without_tokenizer_json_says_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="save_pretrained"):
        Tokenizer.from_directory(tmp_path)


def test_the_real_tokenizer_equals_transformers(real_model: Path) -> None:
    from polybatch.models.gguf_file import GgufFile
    from polybatch.models.gguf_tokenizer import tokenizer_from_gguf

    ours = tokenizer_from_gguf(GgufFile(real_model).metadata, str(real_model))
    theirs = AutoTokenizer.from_pretrained(real_model.parent, gguf_file=real_model.name)
    words = small.TEXTS[:3] + [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    for text in [*STRINGS, *words]:
        # transformers does not know this pre-tokenizer and joins spaces with the digit that follows;
        # the checkpoint's own tokenizer.json splits digits off first, as we do.
        text = "".join(char for char in text if not char.isnumeric())
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n"}]
    for generation in (True, False):
        rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation)
        assert ours.apply_chat_template(chat, generation) == rendered
    assert ours.encode("  12", False) == [ours.backend.token_to_id(token) for token in ("ĠĠ", "1", "2")]
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.all_special_ids == {i for i, t in theirs.added_tokens_decoder.items() if t.special}
