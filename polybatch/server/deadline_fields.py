"""Deadlines and workflows as live requests bring them, in bodies or headers, and what they are told of them.

    "deadlines": {"ttft_ms": 500, "tpot_ms": 50, "e2e_ms": 20000}
    X-Request-TTFT-Ms, X-Request-TPOT-Ms, X-Request-Deadline-Ms     the same, where a body cannot say it
    "workflow": {"id": "w1", "stage": "draft", "deadline_ms": 60000, "remaining": ["check"]}
    "expected_tokens": 120

Times are in milliseconds from the request's arrival; those of the body come before those of headers.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from polybatch.errors import RequestError
from polybatch.request import Deadlines, RequestMetrics, WorkflowStage
from polybatch.server.openapi import parameter

KINDS = ("ttft", "tpot", "e2e")
NUMBER = re.compile(r"[0-9]{1,15}(\.[0-9]{0,15})?([eE][+-]?[0-9]{1,3})?", re.ASCII)
MAX_MS = 1e12
MAX_NAME_CHARS = 128
MAX_REMAINING = 1024
_NAMES = {"X-Request-TTFT-Ms": "ttft_ms", "X-Request-TPOT-Ms": "tpot_ms", "X-Request-Deadline-Ms": "e2e_ms"}
HEADERS = {name.lower(): field for name, field in _NAMES.items()}
REQUEST_HEADERS = [
    parameter(
        name,
        f"`deadlines.{field}` of a body without it.",
        {"type": "number", "exclusiveMinimum": 0},
        "header",
    )
    for name, field in _NAMES.items()
]
ANSWER_HEADERS = {
    name: {"schema": {"type": kind}, "description": f"To requests with deadlines: {text}"}
    for name, kind, text in (
        ("X-Predicted-TTFT-Ms", "number", "milliseconds until the first token, as predicted at arrival."),
        ("X-Predicted-E2E-Ms", "number", "the same, until the last."),
        ("X-Predicted-Misses", "string", "those that will be missed, of ttft, tpot and e2e, or none."),
    )
}


def deadlines_from(fields: Mapping[str, Any], headers: Mapping[str, str]) -> Deadlines | None:
    """Deadlines of a body's field `deadlines` and of headers; None for none. Raises RequestError."""
    values: dict[str, Any] = {}
    for header, name in HEADERS.items():
        text = headers.get(header)
        if text is not None:
            if not NUMBER.fullmatch(text):
                raise RequestError(
                    f"the header {header} is {text[:40]!r}; it must be milliseconds", field=header
                )
            values[name] = float(text)
    given = fields.get("deadlines")
    if given is not None:
        if not isinstance(given, Mapping):
            raise RequestError(
                f"deadlines is {str(given)[:80]!r}; it must be an object of ttft_ms, tpot_ms and e2e_ms",
                field="deadlines",
            )
        for name, value in given.items():
            if name not in HEADERS.values():
                raise RequestError(
                    f"deadlines.{name} is not known: ttft_ms, tpot_ms and e2e_ms are", field="deadlines"
                )
            values[name] = value
    seconds = {
        f"{kind}_s": _ms(f"deadlines.{kind}_ms", values[f"{kind}_ms"]) / 1000
        for kind in KINDS if values.get(f"{kind}_ms") is not None
    }  # fmt: skip
    return Deadlines(**seconds) if seconds else None


def workflow_from(given: object, now: float) -> WorkflowStage | None:
    """A body's field `workflow`; now: on the engine's clock. Raises RequestError."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise RequestError(f"workflow is {str(given)[:80]!r}; it must be an object", field="workflow")
    for name in given.keys() - {"id", "stage", "deadline_ms", "remaining"}:
        raise RequestError(
            f"workflow.{name} is not known: id, stage, deadline_ms and remaining are", field="workflow"
        )
    remaining = given.get("remaining") or []
    if not isinstance(remaining, list) or len(remaining) > MAX_REMAINING:
        raise RequestError(
            f"workflow.remaining must be a list of at most {MAX_REMAINING:,} names of stages",
            field="workflow.remaining",
        )
    return WorkflowStage(
        _name("workflow.id", given.get("id")),
        _name("workflow.stage", given.get("stage")),
        now + _ms("workflow.deadline_ms", given.get("deadline_ms")) / 1000,
        tuple(_name("workflow.remaining", name) for name in remaining),
    )


def arrival_clock() -> float:
    """The engine's clock, here in the front: monotonic, and one for all processes of a host."""
    return time.monotonic()


def answer_headers(metrics: RequestMetrics | None) -> dict[str, str]:
    """What a request with deadlines is told: the forecast at its arrival, and what it will miss."""
    if metrics is None or metrics.predicted_ttft_s is None or metrics.predicted_e2e_s is None:
        return {}
    return {
        "X-Predicted-TTFT-Ms": f"{1000 * metrics.predicted_ttft_s:.1f}",
        "X-Predicted-E2E-Ms": f"{1000 * metrics.predicted_e2e_s:.1f}",
        "X-Predicted-Misses": ",".join(metrics.missed or ()) or "none",
    }


def _ms(field: str, value: object) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0.01 <= value <= MAX_MS:  # type: ignore[operator]
        raise RequestError(
            f"{field} is {str(value)[:40]!r}; it must be a positive number of milliseconds", field=field
        )
    return float(value)  # type: ignore[arg-type]


def _name(field: str, value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_CHARS:
        raise RequestError(
            f"{field} is {str(value)[:80]!r}; it must be a name of at most {MAX_NAME_CHARS} characters",
            field=field,
        )
    return value
