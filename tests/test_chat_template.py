"""Conversations: malformed ones are refused by field, templates run sandboxed."""

from typing import Any

import pytest

from polybatch.chat_template import check_messages, compile_template
from polybatch.errors import ModelError, RequestError

HI = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ("hi", "messages is str"),
        (None, "messages is NoneType"),
        ({"role": "user"}, "messages is dict"),
        ([], "at least one message"),
        (["hi"], r"messages\[0\] is str"),
        ([HI, {"content": "x"}], r"messages\[1\]\.role is None"),
        ([{"role": 3, "content": "x"}], r"messages\[0\]\.role is 3"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content is int"),
        ([{"role": "user", "content": b"x"}], r"messages\[0\]\.content is bytes"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\] is of type 'str'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\] is of type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]\.text is NoneType"),
    ],
)
def test_malformed_conversations_name_what_is_wrong(messages: Any, named: str) -> None:
    with pytest.raises(RequestError, match=named) as caught:
        check_messages(messages)
    assert caught.value.field == "messages"


def test_text_parts_are_joined_and_other_keys_kept() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}
    assert check_messages([{"role": "user", "content": parts, "name": "n"}, call]) == [
        {"role": "user", "content": "a\nb", "name": "n"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]},
    ]


def test_templates_have_the_functions_of_the_field() -> None:
    template = """
        {%- for x in items %}
            {%- if x == 2 %}{% continue %}{% endif %}
            {{- x }},
        {%- endfor %}
        {{- {"b": "<é>", "a": 1} | tojson }}{{ strftime_now("%%") }}"""
    assert compile_template(template)(items=[1, 2, 3]) == '1,3,{"b": "<é>", "a": 1}%'


def test_blocks_leave_no_lines_of_their_own() -> None:
    assert compile_template("a\n  {% if true %}\nb\n  {% endif %}\nc")() == "a\nb\nc"


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system role') }}", "{{ 'a' + none }}", "{{ missing.field }}", "{{ 1 // 0 }}"],
)
def test_a_template_that_fails_is_a_request_error(template: str) -> None:
    with pytest.raises(RequestError, match="the chat template refuses") as caught:
        compile_template(template)()
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.items() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(template: str) -> None:
    with pytest.raises(RequestError, match="the chat template refuses"):
        compile_template(template)(messages=[])


def test_a_template_that_does_not_parse_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="does not parse"):
        compile_template("{% for %}")


@pytest.mark.parametrize(
    "body",
    ["", "{{ messages[0].role }}", "{% set x = a %}", "{% set ns.n = ns.n + 1 %}"],
)
def test_a_template_that_does_not_end_is_stopped(body: str) -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}" + body + "{% endfor %}{% endfor %}"
    render = compile_template("{% set ns = namespace(n=0) %}" + loops, max_s=0.05)
    with pytest.raises(RequestError, match=r"takes more than 0\.05 s"):
        render(messages=[{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "source", ["{{ 'a' * 10**20 }}", "{{ 'a' * 10000000000 }}", "{{ [1] * 10000000000 }}"]
)
def test_a_template_cannot_ask_for_endless_memory(source: str) -> None:
    with pytest.raises(RequestError, match="refuses"):
        compile_template(source)()
