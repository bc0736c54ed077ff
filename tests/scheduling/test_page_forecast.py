"""The forecast of pages admits what fits at every future step, and little less."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.scheduling.page_forecast import PageForecast

Life = tuple[int, int, int]
"""Pages now, tokens that still fit in them, tokens to come."""

lives = st.tuples(st.integers(1, 9), st.integers(0, 15), st.integers(1, 70))


def held(life: Life, time: int, page_size: int) -> int:
    """Pages of a sequence after so many more tokens; none in the step after its last."""
    pages, slack, remaining = life
    if time > remaining:
        return 0
    return pages + -(-max(0, time - slack) // page_size)


def peak(running: list[Life], newcomers: list[Life], page_size: int) -> int:
    """Pages needed beyond those that run hold now, at the worst step before the first newcomer's end."""
    now = sum(pages for pages, _, _ in running)
    end = newcomers[0][2]
    return max(
        sum(held(life, time, page_size) for life in running + newcomers) - now for time in range(end + 1)
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(lives, max_size=10), lives, st.integers(-40, 80), st.sampled_from([1, 3, 4, 16]))
def test_what_is_admitted_fits_at_every_step_to_its_end(
    running: list[Life], newcomer: Life, room: int, page_size: int
) -> None:
    forecast = PageForecast(page_size)
    for life in running:
        forecast.add_running(*life)
    exact = peak(running, [newcomer], page_size)
    if forecast.fits(*newcomer, room):
        assert exact <= room
    elif page_size <= 4:
        # Buckets of one token: nothing is rounded but the page for the token that never gets KV.
        assert exact > room
    forecast.add(*newcomer)
    if forecast.fits(*newcomer, room):
        assert peak(running, [newcomer, newcomer], page_size) <= room


def test_room_that_ends_give_back_is_used_again() -> None:
    forecast = PageForecast(16)
    for _ in range(4):
        forecast.add_running(10, 0, 8)
    # No page is free for its growth now, but there will be forty.
    assert forecast.fits(2, 15, 300, 2 + 4)
    assert not forecast.fits(2, 0, 300, 2)
