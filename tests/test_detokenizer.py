"""Text as it arrives: pieces add up to the whole, characters stay whole, stop strings do not leak."""

import codecs
from collections.abc import Sequence
from typing import Any

import pytest
import tokenizer_helpers as small
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.detokenizer import IncrementalDetokenizer, StopChecker
from polybatch.tokenizer import Tokenizer


def pieces(tokenizer: Any, prompt: Sequence[int], output: Sequence[int], skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    return [detokenizer.push(token) for token in output] + [detokenizer.flush()]


token_lists = st.lists(st.integers(0, small.byte_level().vocab_size + 2), max_size=30)


@settings(max_examples=150, deadline=None)
@given(token_lists, st.booleans())
def test_pieces_add_up_to_the_decoded_output(output: list[int], skip: bool) -> None:
    tokenizer = small.byte_level()
    expected = tokenizer.decode(output, skip_special_tokens=skip)
    assert "".join(pieces(tokenizer, [0], output, skip)) == expected


@settings(max_examples=150, deadline=None)
@given(token_lists, token_lists, st.booleans())
def test_output_continues_the_prompts_text(prompt: list[int], output: list[int], skip: bool) -> None:
    tokenizer = small.byte_level()
    skipped = tokenizer.all_special_ids if skip else frozenset()
    data = b"".join(tokenizer.token_bytes(token) for token in prompt if token not in skipped)
    shown, _ = codecs.utf_8_decode(data, "replace", False)
    whole = tokenizer.decode([*prompt, *output], skip_special_tokens=skip)
    assert shown + "".join(pieces(tokenizer, prompt, output, skip)) == whole


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_no_piece_splits_a_character(text: str) -> None:
    for tokenizer in (small.byte_level(), small.sentencepiece()):
        ids = tokenizer.encode(text)
        seen = ""
        for piece in pieces(tokenizer, [], ids, skip=True):
            seen += piece
            assert tokenizer.decode(ids).startswith(seen)
        assert seen == tokenizer.decode(ids)


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer = small.byte_level()
    by_byte = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    ids = [by_byte[bytes([byte])] for byte in "🦜".encode()]
    assert pieces(tokenizer, [], ids) == ["", "", "", "🦜", ""]
    assert pieces(tokenizer, [], ids[:3]) == ["", "", "", "\ufffd"]
    assert pieces(tokenizer, ids[:2], ids[2:]) == ["", "🦜", ""]
    assert pieces(tokenizer, ids, ids) == ["", "", "", "🦜", ""]


def test_special_tokens_are_hidden_or_shown() -> None:
    tokenizer = small.byte_level()
    ids = tokenizer.encode("the<|im_end|> dog")
    assert "".join(pieces(tokenizer, [], ids, skip=True)) == "the dog"
    assert "".join(pieces(tokenizer, [], ids, skip=False)) == "the<|im_end|> dog"


def test_sentencepiece_drops_the_space_only_at_the_very_beginning() -> None:
    tokenizer = small.sentencepiece()
    ids = tokenizer.encode("the dog", add_special_tokens=False)
    assert "".join(pieces(tokenizer, [], ids)) == "the dog"
    assert "".join(pieces(tokenizer, [tokenizer.bos_token_id or 0], ids)) == "the dog"
    assert "".join(pieces(tokenizer, ids, ids)) == " the dog"


class OpaqueTokenizer:
    """A tokenizer that can decode and says nothing about bytes."""

    def __init__(self, inner: Tokenizer) -> None:
        self.all_special_ids = inner.all_special_ids
        self.decode = inner.decode


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_tokenizers_without_a_byte_scheme_stream_the_same_text(prompt: str, text: str) -> None:
    for inner in (small.byte_level(), small.sentencepiece()):
        prompt_ids, ids = inner.encode(prompt, False), inner.encode(text, False)
        opaque = pieces(OpaqueTokenizer(inner), prompt_ids, ids)
        assert "".join(opaque) == "".join(pieces(inner, prompt_ids, ids))
        assert not any("\ufffd" in piece for piece in opaque[:-1] if "\ufffd" not in text)


def first_stop(text: str, stop: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the first complete stop string ends, and which, by looking at every end in turn."""
    for end in range(len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return end, max(complete, key=len)
    return None


letters = st.text("ab", max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple)


@settings(max_examples=300, deadline=None)
@given(st.lists(letters, max_size=8), stops, st.booleans())
def test_any_split_of_a_text_ends_where_the_whole_text_does(
    parts: list[str], stop: tuple[str, ...], include: bool
) -> None:
    checker = StopChecker(stop, include)
    shown, hits = "", []
    text = "".join(parts)
    found = first_stop(text, stop)
    for part in parts:
        emit, hit = checker.push(part)
        shown += emit
        hits.append(hit)
        final = text if found is None else text[: found[0] - (0 if include else len(found[1]))]
        assert final.startswith(shown), "text was shown that belongs to a stop string"
    shown += checker.flush()
    assert shown == final if parts else shown == ""
    assert (hits[-1] if hits else None) == (found[1] if found else None)


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    checker = StopChecker(("###", "\n\nUser"))
    assert checker.push("one #") == ("one ", None)
    assert checker.push("two\n") == ("#two", None)
    assert checker.push("\nUse") == ("", None)
    assert checker.push("d") == ("\n\nUsed", None)
    assert checker.push("a####b") == ("a", "###")
    assert checker.push("more") == ("", "###")
    assert checker.flush() == ""


def test_held_text_is_given_back_at_the_end() -> None:
    checker = StopChecker(("STOP",))
    assert checker.push("do not ST") == ("do not ", None)
    assert checker.flush() == "ST"
    assert checker.flush() == ""


@pytest.mark.parametrize("include", [True, False])
def test_no_stop_strings_pass_everything_at_once(include: bool) -> None:
    assert StopChecker((), include).push("text") == ("text", None)
