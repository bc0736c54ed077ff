"""First come, first served; rows of batches after everything else."""

from __future__ import annotations

from polybatch.scheduling.policies.base import Policy


class FirstComeFirstServed(Policy):
    """The defaults of every hook."""
