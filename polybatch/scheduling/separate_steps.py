"""Ways of filling steps to compare stall-free batching with, as composers of their own.

prefill_first: prompts in steps of their own, whole, and before any decode. hybrid_only: whole prompts beside
decodes. chunk_only: chunks of prompts and decodes in turn. A prompt longer than a step's budget is cut in any
case. Source: the ablation of Sarathi-Serve (Agrawal et al. 2024), section 5.4.
"""

from __future__ import annotations

from polybatch.scheduling.admission import PlanDraft
from polybatch.scheduling.composer import Composer
from polybatch.scheduling.track import Track


class WholePrompts(Composer):
    """Prompts are cut only where they are longer than a whole step."""

    def _plan_prefill(self, track: Track, budget: int, draft: PlanDraft) -> int:
        has_prefill = bool(draft.chunks) and draft.chunks[-1].n_new > 1
        if has_prefill and track.seq.num_uncomputed > budget:
            # Nothing more in this step.
            return budget
        return super()._plan_prefill(track, budget, draft)


class PrefillApart(Composer):
    """Steps hold prompts, if there are any, or decodes."""

    def _plan_chunks(self, draft: PlanDraft, *, is_live_waiting: bool) -> None:
        tracks = self._tracks
        if not self._is_decodes_turn():
            prefills = list(tracks.prefilling)
            budget = self._policy.prefill_budget(self._so_far(draft, prefills))
            budget = self._plan_prefills(prefills, budget, draft)
            self._plan_admissions(budget, draft, is_live_only=is_live_waiting)
        if not draft.chunks:
            self._plan_all_decodes(draft)

    def _is_decodes_turn(self) -> bool:
        return False


class PrefillFirst(WholePrompts, PrefillApart):
    pass


class ChunkOnly(PrefillApart):
    """After a step of prompts comes one of decodes."""

    _had_prefill = False

    def _is_decodes_turn(self) -> bool:
        is_turn = self._had_prefill and bool(self._tracks.decoding)
        self._had_prefill = not is_turn
        return is_turn


COMPOSERS: dict[str, type[Composer]] = {
    "stall_free": Composer,
    "prefill_first": PrefillFirst,
    "chunk_only": ChunkOnly,
    "hybrid_only": WholePrompts,
}
