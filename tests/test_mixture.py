"""What a mixture of adapters is called and when two are the same."""

from __future__ import annotations

from typing import Any

import pytest

from polybatch.errors import RequestError
from polybatch.mixture import Mixture, choice_of, is_pairs, mixed_ref
from polybatch.request import AdapterRef

REFS = {name: AdapterRef(name, f"digest-{name[0]}", 2) for name in ("a", "a-again", "b", "c")}


def ref(*parts: tuple[str, float]) -> AdapterRef | None:
    return mixed_ref(Mixture(parts), REFS.__getitem__)


def test_order_and_names_do_not_matter_but_scales_do() -> None:
    one = ref(("a", 0.7), ("b", 0.3))
    assert one is not None
    for same in (ref(("b", 0.3), ("a", 0.7)), ref(("a", 0.5), ("a-again", 0.2), ("b", 0.3), ("c", 0))):
        assert same is not None
        assert same.digest == one.digest
    others = [ref(("a", 0.3), ("b", 0.7)), ref(("a", 0.7)), ref(("a", 0.7), ("b", -0.3)), ref(("b", 0.3))]
    digests = {one.digest} | {other.digest for other in others if other is not None}
    assert len(digests) == 5
    assert one.name == "a*0.7+b*0.3"


def test_one_adapter_at_full_scale_is_that_adapter_and_none_at_all_is_the_base_model() -> None:
    assert ref(("a", 1)) == REFS["a"]
    assert ref(("a", 1), ("b", 0)) == REFS["a"]
    assert ref(("a", 0)) is None
    assert ref(("a", 1), ("a-again", -1)) is None


def test_pairs_are_told_from_a_choice_per_prompt() -> None:
    assert is_pairs([("a", 0.7), ("b", 1)])
    for other in (["a", "b"], [None], [], "ab", [("a", True)], [("a", 0.7), None], Mixture([("a", 1)])):
        assert not is_pairs(other)
    assert choice_of([("a", 0.5)]) == Mixture([("a", 0.5)])
    assert choice_of("a") == "a"
    assert choice_of(None) is None


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [("a", 1)] * 2,
        [(f"a{i}", 1) for i in range(9)],
        [("a", float("nan"))],
        [("a", float("inf"))],
        [("a", 101)],
        [("a", "1")],
        [(1, "a")],
        ["ab"],
    ],
)
def test_an_impossible_mixture_is_refused(parts: Any) -> None:
    with pytest.raises(RequestError) as caught:
        Mixture(parts)
    assert caught.value.field == "adapter"


def test_what_is_no_choice_is_refused() -> None:
    for value in (3, [1, 2], {"a": 1}, [("a", 1), "b"]):
        with pytest.raises(RequestError):
            choice_of(value)  # type: ignore[arg-type]
