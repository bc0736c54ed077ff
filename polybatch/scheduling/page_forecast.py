"""How many pages running sequences will need, while they grow and end: may one more be let in?

Time is counted in tokens per sequence: every running sequence gains one a step. A sequence grows to its
expected end and gives its pages back there; what all of them hold together has its peak at one of these ends.
A newcomer is let in if the peak still fits, so pages are as full as can be without a preemption, where a
bound on requests or the sum of all final sizes would leave some empty.
Source: memory-centric batching of BatchLLM (Zheng et al. 2024); the peak over sorted ends as in S-LoRA's
admission test (Sheng et al. 2024), here in buckets of a quarter of a page.
"""

from __future__ import annotations

RESOLUTION = 4
"""Buckets of time in which a page is filled."""


class PageForecast:
    """Pages needed beyond those held now, by buckets of future tokens; never less than there will be.

    Of a sequence, `slack` tokens still fit in the pages that it has, and `remaining` tokens are expected to
    come, at least 1; in the step after the last its pages are free. An operation takes O(buckets).
    """

    def __init__(self, page_size: int) -> None:
        self._width = page_size // RESOLUTION if page_size % RESOLUTION == 0 else 1
        self._phases = page_size // self._width
        self._running: list[tuple[int, int, int]] = []
        self._needed: list[int] | None = None

    def add_running(self, own_pages: int, slack: int, remaining: int) -> None:
        """A sequence that holds its pages already. own_pages: what it will give back."""
        self._running.append((own_pages, self._start(slack), self._end(remaining)))
        self._needed = None

    def fits(self, num_pages: int, slack: int, remaining: int, room: int) -> bool:
        """Whether a newcomer that takes `num_pages` now stays within `room` to its end, with all others."""
        needed = self._curve()
        start, phases = self._start(slack), self._phases
        for bucket in range(self._end(remaining)):
            grown = 0 if bucket < start else 1 + (bucket - start) // phases
            if needed[min(bucket, len(needed) - 1)] + num_pages + grown > room:
                return False
        return True

    def add(self, num_pages: int, slack: int, remaining: int) -> None:
        """A newcomer was let in."""
        needed = self._curve()
        start, end, phases = self._start(slack), self._end(remaining), self._phases
        needed += [needed[-1]] * (end + 1 - len(needed))
        for bucket in range(end):
            needed[bucket] += num_pages + (0 if bucket < start else 1 + (bucket - start) // phases)

    def _start(self, slack: int) -> int:
        """The bucket in which a page is added first; there is one more every `phases` buckets."""
        return (slack + 1) // self._width

    def _end(self, remaining: int) -> int:
        """The bucket from which on the pages are free."""
        return -(-(remaining + 1) // self._width)

    def _curve(self) -> list[int]:
        """Pages needed at each bucket; the last entry holds from there on."""
        if self._needed is None:
            phases = self._phases
            size = max((end for _, _, end in self._running), default=0) + 1
            growing = [0] * phases
            starts = [0] * size
            stops = [[0] * size for _ in range(phases)]
            given_back = [0] * size
            for own_pages, start, end in self._running:
                given_back[end] += own_pages
                if start < end:
                    given_back[end] += 1 + (end - 1 - start) // phases
                    starts[start] += 1
                    stops[start % phases][end] += 1
            self._needed = []
            total = 0
            for bucket in range(size):
                phase = bucket % phases
                growing[phase] += starts[bucket]
                for other in range(phases):
                    growing[other] -= stops[other][bucket]
                total += growing[phase] - given_back[bucket]
                self._needed.append(total)
        return self._needed
