"""First come, first served; rows of batches after everything else."""

from __future__ import annotations

from typing import ClassVar

from polybatch.scheduling.policies.base import Policy


class FirstComeFirstServed(Policy):
    """The defaults of every hook."""

    is_by_arrival: ClassVar[bool] = True
