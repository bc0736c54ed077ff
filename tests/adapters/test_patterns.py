"""Regular expressions of untrusted files: Python's answers, in bounded time."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from polybatch.adapters.patterns import MAX_LOOKAHEADS, MAX_PATTERN, PatternError, check, reaches_end

ATOMS = [
    "a",
    "b",
    r"\.",
    ".",
    "[ab]",
    "[^a]",
    r"\d",
    r"\w",
    r"\b",
    "^",
    "$",
    "(?=a)",
    "(?!b)",
    "",
    "1",
    r"[\d.]",
]
COUNTS = ["*", "+", "?", "*?", "{2}", "{1,2}", "{2,}", "{0}", "{3,5}?"]
patterns = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(COUNTS)).map(lambda pair: f"({pair[0]}){pair[1]}"),
        inner.map(lambda body: f"(?={body})"),
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(pattern=patterns, text=st.text("ab1._", max_size=7))
def test_the_answer_is_that_of_fullmatch(pattern, text):
    assume(pattern.count("(?=") + pattern.count("(?!") <= MAX_LOOKAHEADS)
    check(pattern)
    assert reaches_end(pattern, text) is (re.fullmatch(pattern, text) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+b", r"(a|a)*b", r"(.*)*x", ".*" * 40 + "x", r"(a*){1000000}b", r"((a?){50}){50}b", "(a|aa)+$x",
        r"((((((a*)*)*)*)*)*)*b", r"(?=(a*)*b)a*",
    ],
)  # fmt: skip
def test_what_makes_backtracking_explode_is_answered(pattern):
    check(pattern)
    assert not reaches_end(pattern, "a" * 100)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", "groupref"), (r"(?<=a)b", "assert"), (r"(?i)a", "flags"), (r"(?i:a)b", "subpattern"),
        (r"a++", "possessive"), (r"(?>a)", "atomic"), ("(", "no regular expression"),
        ("a" * (MAX_PATTERN + 1), "characters"), ("(" * 40 + "a" + ")" * 40, "deep"),
        (r"(a)?(?(1)b|c)", "groupref"),
        ("(?=a" * 3 + ")" * 3, "lookaheads 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(pattern, message):
    with pytest.raises(PatternError, match=message):
        check(pattern)
