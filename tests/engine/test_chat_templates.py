"""A chat template of the operator's: read, checked at start-up, rendered like the checkpoint's own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from test_heap import TINY
from tokenizer_helpers import byte_level

from polybatch import LLM
from polybatch.engine.async_llm import AsyncLLM
from polybatch.engine.chat_templates import MAX_BYTES, template_source, with_template
from polybatch.errors import ConfigError, RequestError
from polybatch.execution.fake import ByteTokenizer
from polybatch.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]
OWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\\n{% endfor %}"


def test_a_template_is_a_file_or_text_in_which_a_shells_line_breaks_are_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ 'ü\\n' }}\n")
    assert template_source(str(path)) == "{{ 'ü\\n' }}\n"
    assert template_source("ü{{ x }}\\n") == "ü{{ x }}\n"


@pytest.mark.parametrize("name", ["missing.jinja", ".", "\0"])
def test_text_without_braces_is_a_file_that_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"chat_template is .*; it must be Jinja text, or a file"):
        template_source(name)


def test_a_file_that_is_no_text_or_far_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_bytes(b"\xff\xfe{{ x }}")
    with pytest.raises(ConfigError, match="a file that can be read"):
        template_source(str(path))
    path.write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match=r"1,048,577 bytes; the limit is 1,048,576"):
        template_source(str(path))


def test_it_takes_the_place_of_the_checkpoints_and_leaves_that_alone() -> None:
    # A copy, for other tests share the one that is kept.
    theirs = with_template(byte_level(), "theirs {{ messages[0].content }}")
    assert isinstance(theirs, Tokenizer)
    assert theirs.apply_chat_template(HI) == "theirs hi"
    own = with_template(theirs, OWN)
    assert isinstance(own, Tokenizer)
    assert own.apply_chat_template(HI) == "<user>hi\n"
    assert own.encode("the dog") == theirs.encode("the dog")
    assert theirs.apply_chat_template(HI) == "theirs hi"
    assert with_template(theirs, None) is theirs


@pytest.mark.parametrize("broken", ["{% for %}", "{{ x | no_such_filter }}", "{% if x %}"])
def test_one_that_does_not_parse_is_refused_before_anything_is_served(broken: str) -> None:
    with pytest.raises(ConfigError, match=r"chat_template is .*; it does not parse: "):
        with_template(byte_level(), broken)


def test_a_model_without_a_tokenizer_of_its_own_takes_none() -> None:
    for tokenizer in (None, ByteTokenizer()):
        with pytest.raises(ConfigError, match="no tokenizer of its own: leave it out"):
            with_template(tokenizer, OWN)

    async def start() -> None:
        with pytest.raises(ConfigError, match="no tokenizer of its own"):
            await AsyncLLM("stub", chat_template=OWN).start()

    asyncio.run(start())


def test_it_runs_in_the_sandbox_of_the_others() -> None:
    reaching = with_template(byte_level(), "{{ messages.__class__.__mro__ }}")
    assert reaching is not None
    with pytest.raises(RequestError, match="unsafe"):
        reaching.apply_chat_template(HI)


def test_conversations_of_an_engine_are_rendered_by_it(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY | {"vocab_size": 512}))
    with LLM(
        f"random:{config}", executor="eager", memory="1MiB", max_model_len=64, tokenizer=byte_level(),
        chat_template=OWN,
    ) as llm:  # fmt: skip
        assert llm.core.door.render_chat(HI) == "<user>hi\n"
        assert llm.chat(HI)[0].prompt == "<user>hi\n"
