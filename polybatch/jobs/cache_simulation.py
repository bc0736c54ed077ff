"""What a prefix cache that evicts the least recently used page would save, prompts in the order they come."""

from __future__ import annotations

from collections import OrderedDict

from polybatch.scheduling.prefix_groups import TOKEN_BYTES


class LruPrefixCache:
    """Pages of prompts by their whole history, all of the pool theirs: more than a running engine could give.

    Whole pages only. Memory: a few dozen bytes for each page of the pool.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._num_pages, self._page_size = num_pages, page_size
        self._pages: OrderedDict[int, None] = OrderedDict()

    def add(self, namespace: str, key: bytes) -> int:
        """Serve a prompt, given by `prompt_key`; returns the tokens of it that had to be computed."""
        size = self._page_size * TOKEN_BYTES
        num_tokens = len(key) // TOKEN_BYTES
        history, histories = hash(namespace), []
        for start in range(0, len(key) - size + 1, size):
            history = hash((history, key[start : start + size]))
            histories.append(history)
        num_hits = 0
        for history in histories[: (num_tokens - 1) // self._page_size]:
            if history not in self._pages:
                break
            num_hits += 1
        # Parents are used last, so that leaves are evicted first.
        for history in reversed(histories):
            self._pages[history] = None
            self._pages.move_to_end(history)
        while len(self._pages) > self._num_pages:
            self._pages.popitem(last=False)
        return num_tokens - num_hits * self._page_size
