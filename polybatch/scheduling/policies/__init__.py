"""The policies by name: the one list behind `SchedulerConfig.policy`, `--scheduling-policy` and the docs."""

from __future__ import annotations

from polybatch.errors import ConfigError
from polybatch.scheduling.policies.base import Policy
from polybatch.scheduling.policies.baselines import (
    EarliestDeadlineFirst,
    EarlyAbort,
    NewestFirst,
    ShortestFirst,
)
from polybatch.scheduling.policies.deadline import Deadline
from polybatch.scheduling.policies.fair import Fair
from polybatch.scheduling.policies.fcfs import FirstComeFirstServed
from polybatch.scheduling.policies.prefix_groups import PrefixGroups
from polybatch.scheduling.policies.priority import Priority
from polybatch.scheduling.track import BATCH_PRIORITY

__all__ = ["BATCH_PRIORITY", "POLICIES", "Policy", "policy_named"]

POLICIES: dict[str, type[Policy]] = {
    "fcfs": FirstComeFirstServed,
    "priority": Priority,
    "fair": Fair,
    "deadline": Deadline,
    "edf": EarliestDeadlineFirst,
    "shortest_first": ShortestFirst,
    "newest_first": NewestFirst,
    "early_abort": EarlyAbort,
    "prefix_groups": PrefixGroups,
}


def policy_named(name: str) -> type[Policy]:
    """Look a policy up. Raises ConfigError for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f"policy is {name!r}; it must be one of {', '.join(POLICIES)}")
    return POLICIES[name]
