"""How many pages running sequences will need, while they grow and end: may one more be let in?

Time is counted in tokens per sequence: every running sequence gains one a step. A sequence grows to its
expected end and gives its pages back there; what all of them hold together has its peak at one of these ends.
A newcomer is let in if the peak still fits, so pages are as full as can be without a preemption, where a bound
on requests or the sum of all final sizes would leave some empty.
Source: memory-centric batching of BatchLLM (Zheng et al. 2024); the peak over sorted ends as in S-LoRA's
admission test (Sheng et al. 2024), here in buckets of a page.
"""

from __future__ import annotations


class PageForecast:
    """Pages needed beyond those held now, by buckets of `page_size` future tokens; O(buckets) an operation.

    A sequence grows by a page in each of the first `growth` buckets and ends with that of its last token.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._running: list[tuple[int, int, int]] = []
        self._needed: list[int] | None = None

    def add_running(self, own_pages: int, growth: int, remaining_tokens: int) -> None:
        """A sequence that holds its pages already. own_pages: what it will give back, growth: before that."""
        self._running.append((own_pages, growth, self._bucket(remaining_tokens)))
        self._needed = None

    def fits(self, num_pages: int, growth: int, remaining_tokens: int, room: int) -> bool:
        """Whether a newcomer that takes `num_pages` now and `growth` later stays within `room` to its end."""
        needed = self._curve()
        for bucket in range(self._bucket(remaining_tokens) + 1):
            if needed[min(bucket, len(needed) - 1)] + num_pages + min(bucket, growth) > room:
                return False
        return True

    def add(self, num_pages: int, growth: int, remaining_tokens: int) -> None:
        """A newcomer was let in."""
        needed = self._curve()
        last = self._bucket(remaining_tokens)
        needed += [needed[-1]] * (last + 2 - len(needed))
        for bucket in range(last + 1):
            needed[bucket] += num_pages + min(bucket, growth)

    def _bucket(self, remaining_tokens: int) -> int:
        return -(-remaining_tokens // self._page_size)

    def _curve(self) -> list[int]:
        """Pages needed at each bucket; the last entry holds from there on."""
        if self._needed is None:
            size = max((last for _, _, last in self._running), default=0) + 2
            stops, given_back = [0] * (size + 1), [0] * size
            for own_pages, growth, last in self._running:
                growth = min(growth, last - 1)
                stops[growth + 1] += 1
                given_back[last] += own_pages + growth
            self._needed = []
            num_growing, total = len(self._running), 0
            for bucket in range(size):
                num_growing -= stops[bucket]
                total += (num_growing if bucket else 0) - given_back[bucket]
                self._needed.append(total)
        return self._needed
