"""Policies: who goes first, and thereby who yields first.

A policy is one function from a request to its place in the order; smaller goes first. The same order
sorts the waiting queue and the running sequences, and preemption takes from its far end, so the
first in order is never preempted by anyone and always progresses.
"""

from __future__ import annotations

from typing import Protocol

from polybatch.errors import ConfigError
from polybatch.request import Request

Key = tuple[int, int]

BATCH_PRIORITY = 1 << 40
"""`Request.priority` of rows of batches: after everything else, whatever the policy."""


class Policy(Protocol):
    """Gives a request its place when it is added.

    order: counts sequences in order of arrival and must be the key's last element: keys are unique.
    A preempted sequence keeps its key, which puts it before everything of its class that came later.
    """

    def __call__(self, request: Request, order: int) -> Key: ...


def fcfs(request: Request, order: int) -> Key:
    """First come, first served."""
    return (request.priority if request.priority >= BATCH_PRIORITY else 0, order)


def priority(request: Request, order: int) -> Key:
    """Lower `Request.priority` first, then first come, first served."""
    return (request.priority, order)


def fair(request: Request, order: int) -> Key:
    """First come, first served within a tenant; between tenants see `polybatch.scheduling.fairness`."""
    return (2, order)


POLICIES: dict[str, Policy] = {"fcfs": fcfs, "priority": priority, "fair": fair}


def policy_named(name: str) -> Policy:
    """Look a policy up. Raises ConfigError for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f"policy is {name!r}; it must be one of {', '.join(POLICIES)}")
    return POLICIES[name]
