"""Expected lengths: what is known, then what rows of the same kind did, then a guess that is not wild."""

from __future__ import annotations

import dataclasses

import pytest
from scheduling_helpers import EOS, adapter_of, request_of

from polybatch.request import Request, Sequence
from polybatch.scheduling.output_lengths import MIN_ROWS, UNKNOWN_TOKENS, OutputLengths


def stoppable(max_tokens: int, **fields: object) -> Request:
    return request_of("r", [1, 2], max_tokens, stop=frozenset({EOS}), **fields)  # type: ignore[arg-type]


def ended(request: Request, num_output: int) -> Sequence:
    seq = Sequence(request)
    seq.tokens += [3] * num_output
    return seq


def test_what_only_its_length_can_end_has_that_length() -> None:
    assert OutputLengths().expected(request_of("r", [1], 5000)) == 5000


def test_a_given_length_is_taken_but_never_beyond_max_tokens() -> None:
    request = dataclasses.replace(stoppable(50), expected_tokens=20)
    assert OutputLengths().expected(request) == 20
    assert OutputLengths().expected(dataclasses.replace(request, expected_tokens=90)) == 50


def test_rows_of_the_same_kind_teach_and_others_do_not() -> None:
    lengths = OutputLengths()
    request = stoppable(4000)
    assert lengths.expected(request) == UNKNOWN_TOKENS
    assert lengths.expected(stoppable(30)) == 30
    for number in range(MIN_ROWS):
        assert lengths.expected(request) == UNKNOWN_TOKENS
        lengths.observe(ended(request, 10 + 2 * (number % 2)))
    assert lengths.expected(request) == pytest.approx(11)
    assert lengths.expected(stoppable(3900)) == pytest.approx(11)
    assert lengths.expected(stoppable(4000, adapter=adapter_of("a"))) == UNKNOWN_TOKENS
    assert lengths.expected(stoppable(4000, tenant="other")) == UNKNOWN_TOKENS
    # A standard deviation more, for who runs.
    assert lengths.remaining(Sequence(request)) == 12


@pytest.mark.parametrize("num_output", [0, 1, 100, 255, 256, 300, 999])
def test_there_is_always_a_token_to_come_and_never_more_than_allowed(num_output: int) -> None:
    seq = ended(stoppable(1000), num_output)
    remaining = OutputLengths().remaining(seq)
    assert 1 <= remaining <= 1000 - num_output
    if num_output >= UNKNOWN_TOKENS:
        assert remaining == min(1000 - num_output, num_output // 2)
