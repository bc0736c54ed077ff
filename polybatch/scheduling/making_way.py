"""Rows of batches make way for live requests: at once for slots and pages, in every step for its tokens."""

from __future__ import annotations

from collections.abc import Callable

from polybatch.config import SchedulerConfig
from polybatch.scheduling.admission import Admission
from polybatch.scheduling.track import Track
from polybatch.scheduling.waiting import Waiting


def make_way(
    waiting: Waiting,
    running: list[Track],
    config: SchedulerConfig,
    admission: Admission,
    preempt: Callable[[Track], None],
) -> bool:
    """Preempt the last rows of batches for the slots and pages of live requests that wait.

    running: in the policy's order, rows of batches last; `preempt` takes from it. Returns whether live
    requests wait beside rows of batches that ran: these then get what the others leave of the step.
    """
    if not (running and running[-1].is_batch):
        return False
    num_waiting = num_pages = num_tokens = 0
    for track in list(waiting.head(config.max_num_seqs)):
        # No more than the step can take in.
        if track.is_batch or num_tokens > config.max_num_batched_tokens:
            break
        num_waiting += 1
        num_pages += admission.num_wanted(track)
        num_tokens += track.seq.num_tokens
        while running and running[-1].is_batch:
            if len(running) + num_waiting <= config.max_num_seqs and admission.has_room(num_pages):
                break
            preempt(running[-1])
    return num_waiting > 0
