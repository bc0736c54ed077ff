"""Which prefixes are being computed right now, so that nobody computes the same ones beside.

When many requests with one long prefix arrive together, the first computes it and the others wait for its
pages instead of doing the same work in the same steps. A waiting request is looked up by the first
page it would have to compute; it is held only while the sequence that computes it runs.
"""

from __future__ import annotations

from polybatch.memory.prefix_tree import MatchResult, Node
from polybatch.request import SequenceStatus
from polybatch.scheduling.track import Track

PageKey = tuple[Node | str, tuple[int, ...]]


class PrefixesInFlight:
    """Next full page of every running prefill -> the track that computes it."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._owner: dict[PageKey, Track] = {}
        self._key_of: dict[Track, PageKey] = {}

    def update(self, track: Track) -> None:
        """Note what `track` computes next; called when it is admitted and whenever its prefill moves on."""
        self.remove(track)
        seq = track.seq
        node = track.node
        depth = 0 if node is None else node.depth
        end = (depth + 1) * self._page_size
        # What it computes beside equal pages of another sequence will not enter the tree: first test.
        if seq.num_computed // self._page_size != depth or end > seq.num_tokens or track.namespace is None:
            return
        key: PageKey = (node or track.namespace, tuple(track.cache_keys[end - self._page_size : end]))
        if self._owner.setdefault(key, track) is track:
            self._key_of[track] = key

    def remove(self, track: Track) -> None:
        key = self._key_of.pop(track, None)
        if key is not None:
            del self._owner[key]

    def hold(self, track: Track, match: MatchResult) -> bool:
        """Hold a waiting track if a running one computes the page that follows its match."""
        start = len(match.pages) * self._page_size
        end = start + self._page_size
        tokens = track.cache_keys
        if track.namespace is None or end >= len(tokens):
            return False
        owner = self._owner.get((match.node or track.namespace, tuple(tokens[start:end])))
        if owner is None or (owner.is_batch and not track.is_batch):
            # A row may be long in coming.
            return False
        owner_tokens = owner.cache_keys
        while end + self._page_size < len(tokens):
            if tokens[end : end + self._page_size] != owner_tokens[end : end + self._page_size]:
                break
            end += self._page_size
        track.held_by = owner
        track.held_until = end
        return True

    @staticmethod
    def is_held(track: Track) -> bool:
        """Whether what the track waits for is still being computed."""
        owner = track.held_by
        if owner is None:
            return False
        if owner.seq.status is SequenceStatus.RUNNING and owner.seq.num_computed < track.held_until:
            return True
        track.held_by = None
        return False

    @property
    def tracks(self) -> list[Track]:
        return list(self._key_of)
