"""Outputs follow their grammars in the shared batch, and nobody else's tokens change."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from engine_helpers import make_core, run, run_one
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.engine.llm import LLM
from polybatch.errors import RequestError
from polybatch.execution.fake import FakeAheadExecutor, FakeExecutor
from polybatch.request import FinishReason, SamplingParams
from polybatch.structured.spec import StructuredSpec

PHONE = StructuredSpec(regex="[0-9]{3}-[0-9]{4}")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}

leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
              st.integers(-999, 999), st.integers(0, 999)),
    st.builds(lambda size: {"type": "string", "maxLength": size}, st.integers(0, 6)),
    st.builds(lambda values: {"enum": values}, st.lists(st.text("xyz", max_size=3), min_size=1, unique=True)),
)  # fmt: skip
names = st.text("abcd_", min_size=1, max_size=4)


def objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], is_open: list[bool]) -> dict[str, Any]:
        required = [name for name, keep in zip(properties, is_open, strict=False) if keep]
        return {
            "type": "object", "properties": properties, "required": required, "additionalProperties": False,
        }  # fmt: skip

    flags = st.lists(st.booleans(), min_size=3, max_size=3)
    return st.builds(build, st.dictionaries(names, inner, min_size=1, max_size=3), flags)


def arrays(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most},
                     inner, st.integers(0, 3))  # fmt: skip


def unions(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda some: {"anyOf": some}, st.lists(inner, min_size=1, max_size=3))


schemas = st.recursive(leaves, lambda inner: objects(inner) | arrays(inner) | unions(inner), max_leaves=6)


@settings(max_examples=25, deadline=None)
@given(schema=schemas, seed=st.integers(0, 99))
def test_an_output_that_ends_validates_against_its_schema(schema: dict[str, Any], seed: int) -> None:
    output = run_one(
        make_core(max_model_len=1000, num_pages=1024), [1], seed=seed, max_tokens=900,
        structured=StructuredSpec(json_schema=schema),
    )  # fmt: skip
    assert output.error is None
    assert output.outputs[0].finish_reason is FinishReason.STOP
    jsonschema.validate(json.loads(output.outputs[0].text), schema)


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        (PHONE, "[0-9]{3}-[0-9]{4}"),
        (StructuredSpec(regex="(ab|c){2,5}"), "(ab|c){2,5}"),
        (StructuredSpec(choice=["yes", "no", 'may"be']), 'yes|no|may"be'),
        (StructuredSpec(grammar='start: ("x" | "yy")~3 "!"'), "(x|yy){3}!"),
        (StructuredSpec(grammar='root ::= ("x" | "yy") "!"'), "(x|yy)!"),
    ],
)
def test_outputs_match_their_form_and_only_they_end_it(
    stub: type[FakeExecutor], spec: StructuredSpec, pattern: str
) -> None:
    for temperature in (0.0, 1.0):
        output = run_one(
            make_core(), [1, 2], temperature=temperature, seed=4, max_tokens=100, ignore_eos=True,
            structured=spec,
        )  # fmt: skip
        assert re.fullmatch(pattern, output.outputs[0].text)
        assert output.outputs[0].finish_reason is FinishReason.STOP


def test_an_output_that_is_cut_says_so_and_is_a_beginning_of_its_form(stub: type[FakeExecutor]) -> None:
    output = run_one(make_core(), [1], max_tokens=5, seed=1, structured=PHONE).outputs[0]
    assert output.finish_reason is FinishReason.LENGTH
    assert re.fullmatch("[0-9]{3}-[0-9]", output.text)


@pytest.mark.parametrize("num_pages", [256, 24])
def test_free_rows_get_the_same_tokens_beside_constrained_ones(
    stub: type[FakeExecutor], num_pages: int
) -> None:
    """Twenty-four pages are too few for all, so that rows are preempted in the midst of a grammar."""

    def add(core: Any, index: int, structured: StructuredSpec | None) -> None:
        params = SamplingParams(max_tokens=24, seed=index, ignore_eos=True, structured=structured)
        core.add_request(str(index), [index + 1] * 5, params)

    free = range(0, 12, 2)
    alone = {}
    for index in free:
        core = make_core(num_pages)
        add(core, index, None)
        alone |= run(core)
    core = make_core(num_pages)
    word = StructuredSpec(regex="[a-z]{20,30}")
    for index in range(12):
        add(core, index, None if index in free else word)
    found = run(core)
    for index in free:
        assert found[str(index)].outputs == alone[str(index)].outputs
    for index in range(1, 12, 2):
        text = found[str(index)].outputs[0].text
        assert re.fullmatch("[a-z]{20,24}", text)
    assert (core.stats().scheduler.num_preemptions > 0) == (num_pages == 24)


def test_every_completion_has_a_matcher_of_its_own(stub: type[FakeExecutor]) -> None:
    output = run_one(make_core(), [1], n=5, seed=2, max_tokens=20, structured=PHONE)
    texts = [completion.text for completion in output.outputs]
    assert all(re.fullmatch(PHONE.regex or "", text) for text in texts)
    assert len(set(texts)) > 1


def test_constrained_rows_are_not_sampled_on_the_device() -> None:
    executor = FakeAheadExecutor()
    core = make_core(executor=executor)
    core.add_request("one", [1], SamplingParams(max_tokens=20, structured=PHONE))
    run(core)
    assert executor.num_launches == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"json_schema": {"type": "frob"}}, "frob"),
        ({"json_schema": {"$ref": "http://elsewhere/schema"}}, "elsewhere"),
        ({"json_schema": {"type": "object", "unevaluatedProperties": False}}, "unevaluatedProperties"),
        ({"grammar": "start: nowhere"}, "nowhere"),
        ({"grammar": "root ::= ((("}, "GBNF"),
    ],
)
def test_what_does_not_compile_is_refused_with_the_reason(spec: dict[str, Any], message: str) -> None:
    core = make_core()
    for _ in range(2):
        with pytest.raises(RequestError, match=message) as caught:
            core.add_request("bad", [1], SamplingParams(structured=StructuredSpec(**spec)))
        assert caught.value.field == next(iter(spec))
    assert not core.has_work()


def test_a_grammar_that_grows_too_complex_ends_its_row_alone() -> None:
    core = make_core()
    many = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}
    with pytest.raises(RequestError, match="items"):
        core.door.grammars.compile(StructuredSpec(json_schema=many))
    # Behind a beginning that is harmless, so that it is only found out as it runs.
    bomb = StructuredSpec(grammar=f"start: /[a-z]{{20}}/ %json {json.dumps(many)}")
    core.add_request("bomb", [1], SamplingParams(max_tokens=150, seed=1, structured=bomb))
    core.add_request("free", [2], SamplingParams(max_tokens=100, seed=1, ignore_eos=True))
    found = run(core)
    assert len(found["free"].outputs[0].token_ids) == 100
    assert "too complex" in (found["bomb"].error or "")


def test_min_tokens_beside_a_form_is_refused() -> None:
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(min_tokens=3, structured=PHONE)


def test_a_model_without_a_tokenizer_cannot_be_constrained() -> None:
    core = make_core()
    core.door._tokenizer = None
    with pytest.raises(RequestError, match="tokenizer"):
        core.add_request("one", [1], SamplingParams(structured=PHONE))


@pytest.fixture(scope="module")
def real_llm(real_model: Path) -> Any:
    with LLM(str(real_model), max_model_len=512, memory="64MiB", threads=1) as llm:
        yield llm


def test_the_real_model_writes_what_its_forms_say(real_llm: LLM) -> None:
    ask = [[{"role": "user", "content": "Describe a person."}]] * 4
    specs = [StructuredSpec(json_schema=PERSON), PHONE, StructuredSpec(choice=["Rome", "Paris"]), None]
    params = [SamplingParams(temperature=0, max_tokens=120, structured=spec) for spec in specs]
    person, phone, choice, free = (output.outputs[0] for output in real_llm.chat(ask, params))
    jsonschema.validate(json.loads(person.text), PERSON)
    assert re.fullmatch(PHONE.regex or "", phone.text)
    assert choice.text in ("Rome", "Paris")
    alone = real_llm.chat(ask[:1], params[3:])[0].outputs[0]
    assert free.token_ids == alone.token_ids


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(schema=schemas, seed=st.integers(0, 99))
def test_the_real_model_keeps_random_schemas(real_llm: LLM, schema: dict[str, Any], seed: int) -> None:
    params = SamplingParams(max_tokens=400, seed=seed, structured=StructuredSpec(json_schema=schema))
    output = real_llm.generate("JSON: ", params)[0].outputs[0]
    assert output.finish_reason is FinishReason.STOP
    jsonschema.validate(json.loads(output.text), schema)
