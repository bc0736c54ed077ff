"""Granted prefixes are cached once for all, and nothing else is."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import pytest
from scheduling_helpers import Driver, pool_of, request_of

from polybatch.config import SchedulerConfig
from polybatch.scheduling.track import salt_number

GRANTED = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
"""Two pages of four, and two tokens that fill no page."""


def num_cached(driver: Driver, tenant: str, tokens: SequenceOf[int], shared: int, adapter: str = "") -> int:
    """Run a request to its end; how many tokens of its prompt were cached."""
    driver.count = getattr(driver, "count", 0) + 1  # type: ignore[attr-defined]
    request = request_of(
        f"{tenant}{driver.count}", list(tokens), 2, salt=f"{tenant}/", tenant=tenant, shared=shared  # type: ignore[attr-defined]
    )  # fmt: skip
    seq = driver.add(request)[0]
    driver.run()
    return seq.num_cached


@pytest.fixture
def driver() -> Driver:
    return Driver(SchedulerConfig(), pool_of(64))


def test_whole_pages_of_a_granted_prefix_are_shared_and_what_follows_is_not(driver: Driver) -> None:
    secret = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert num_cached(driver, "a", GRANTED + secret, 10) == 0
    assert num_cached(driver, "b", GRANTED + secret, 10) == 8
    assert num_cached(driver, "b", GRANTED + secret, 10) >= 16
    assert num_cached(driver, "c", [*GRANTED, 5, 6, 7, 8], 10) == 8


def test_without_a_grant_nothing_of_it_is_seen(driver: Driver) -> None:
    num_cached(driver, "a", [*GRANTED, 1, 2], 10)
    assert num_cached(driver, "b", [*GRANTED, 1, 2], 0) == 0
    assert num_cached(driver, "c", [*GRANTED, 1, 2], 3) == 0


def test_of_prompts_that_differ_early_only_the_common_pages_are_shared(driver: Driver) -> None:
    num_cached(driver, "a", [*GRANTED, 1, 2], 10)
    assert num_cached(driver, "b", [*GRANTED[:5], 99, 98, 97, 96], 5) == 4


def test_a_prompt_that_is_the_granted_prefix_alone_leaves_the_last_token_to_compute(driver: Driver) -> None:
    prompt = GRANTED[:8]
    assert num_cached(driver, "a", prompt, 8) == 0
    assert num_cached(driver, "b", prompt, 8) == 7


def test_a_salted_token_is_no_token_and_belongs_to_one_salt() -> None:
    numbers = {salt_number(salt) | token for salt in ("", "a/", "b/", "a/b") for token in (0, 5, 2**31)}
    assert len(numbers) == 12
    assert min(numbers) > 2**40
