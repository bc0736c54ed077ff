"""Rows of batches make way for live requests: at once for slots and pages, in every step for its tokens."""

from __future__ import annotations

from collections.abc import Callable

from polybatch.config import SchedulerConfig
from polybatch.scheduling.admission import Admission
from polybatch.scheduling.live_tracks import LiveTracks
from polybatch.scheduling.policies import Policy
from polybatch.scheduling.track import Track


def make_way(
    tracks: LiveTracks,
    config: SchedulerConfig,
    admission: Admission,
    policy: Policy,
    preempt: Callable[[Track], None],
) -> bool:
    """Preempt rows of batches for the slots and pages of live requests that wait.

    Returns whether live requests wait beside rows of batches that ran: these then get what the others leave
    of the step.
    """
    running = tracks.running
    if not (running and running[-1].is_batch):
        return False
    num_waiting = num_pages = num_tokens = 0
    for track in list(tracks.waiting.head(config.max_num_seqs)):
        # No more than the step can take in.
        if track.is_batch or num_tokens > config.max_num_batched_tokens:
            break
        num_waiting += 1
        num_pages += admission.num_wanted(track)
        num_tokens += track.seq.num_tokens
        while running and running[-1].is_batch:
            if len(running) + num_waiting <= config.max_num_seqs and admission.has_room(num_pages):
                break
            preempt(policy.victim([row for row in running if row.is_batch]))
    return num_waiting > 0
