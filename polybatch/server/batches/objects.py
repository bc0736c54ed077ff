"""Files and batches as clients see them, and what of them is kept in the store.

Source: OpenAI's API reference (files, batches). `seconds` are Unix times; deadlines are kept, not promised:
a batch that is not done at `expires_at` ends as expired with what it has.
"""

from __future__ import annotations

import enum
import re
from typing import Any

import msgspec

from polybatch.errors import RequestError

MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MIN_EXPIRY_S, MAX_EXPIRY_S = 3_600, 30 * 86_400
DEFAULT_EXPIRY_S = MAX_EXPIRY_S
MAX_WINDOW_S = 14 * 86_400
PACED_FROM, PACED_TO = 0.5, 0.9
"""Shares of a batch's window: up to the first, rows wait for gaps in live traffic; by the second all should
be done, so that the last end in time."""

_WINDOW = re.compile(r"([1-9][0-9]{0,6})([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


class BatchStatus(enum.StrEnum):
    """VALIDATING -> IN_PROGRESS -> FINALIZING -> COMPLETED or EXPIRED.

    From the first two also CANCELLING -> CANCELLED; FAILED where validation finds nothing that could be run.
    """

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        return self in _OVER


_OVER = (BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED, BatchStatus.FAILED)


class StoredFile(msgspec.Struct, kw_only=True):
    """A file that is there whole. tenant: whose it is; expires_s: when it is deleted."""

    id: str
    tenant: str
    filename: str
    purpose: str
    size: int
    created_s: int
    expires_s: int | None = None

    def body(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size,
            "created_at": self.created_s,
            "expires_at": self.expires_s,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class RequestCounts(msgspec.Struct):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, kw_only=True):
    """A batch. at: when each status was reached. outcome: how it ends, known from FINALIZING on.

    output_expiry_s: how long its output files are kept.
    """

    id: str
    tenant: str
    input_file_id: str
    endpoint: str
    completion_window: str
    created_s: int
    expires_s: int
    output_expiry_s: int = DEFAULT_EXPIRY_S
    metadata: dict[str, str] | None = None
    status: BatchStatus = BatchStatus.VALIDATING
    outcome: BatchStatus | None = None
    at: dict[str, int] = {}
    counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: list[dict[str, Any]] = []

    def is_behind(self, now_s: float) -> bool:
        """Whether fewer rows are done than an even pace from `PACED_FROM` to `PACED_TO` asks."""
        window_s = max(1, self.expires_s - self.created_s)
        elapsed = (now_s - self.created_s) / window_s
        due = min(1.0, (elapsed - PACED_FROM) / (PACED_TO - PACED_FROM))
        return self.num_done < due * self.counts.total

    def is_answered(self) -> bool:
        """Whether every row has its answer."""
        return 0 < self.counts.total <= self.num_done

    @property
    def num_done(self) -> int:
        return self.counts.completed + self.counts.failed

    def body(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status.value,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_s,
            "in_progress_at": self.at.get(BatchStatus.IN_PROGRESS),
            "expires_at": self.expires_s,
            "finalizing_at": self.at.get(BatchStatus.FINALIZING),
            "completed_at": self.at.get(BatchStatus.COMPLETED),
            "failed_at": self.at.get(BatchStatus.FAILED),
            "expired_at": self.at.get(BatchStatus.EXPIRED),
            "cancelling_at": self.at.get(BatchStatus.CANCELLING),
            "cancelled_at": self.at.get(BatchStatus.CANCELLED),
            "request_counts": msgspec.to_builtins(self.counts),
            "metadata": self.metadata,
        }


class ExpiresAfter(msgspec.Struct, forbid_unknown_fields=True):
    """anchor: "created_at", the only one."""

    seconds: int
    anchor: str = "created_at"

    def checked_s(self, field: str) -> int:
        """Seconds. Raises RequestError."""
        if self.anchor != "created_at":
            raise RequestError(
                f"{field}.anchor is {self.anchor[:80]!r}; it must be 'created_at'", field=f"{field}.anchor"
            )
        if not MIN_EXPIRY_S <= self.seconds <= MAX_EXPIRY_S:
            raise RequestError(
                f"{field}.seconds is {self.seconds}; it must be from {MIN_EXPIRY_S:,} to {MAX_EXPIRY_S:,}",
                field=f"{field}.seconds",
            )
        return self.seconds


class CreateBatch(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/batches. completion_window: "24h", "90m", "2d"."""

    input_file_id: str
    endpoint: str
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


def window_s(text: str) -> int:
    """Seconds of a completion window. Raises RequestError."""
    match = _WINDOW.fullmatch(text)
    seconds = int(match[1]) * _UNIT_S[match[2]] if match else 0
    if not 0 < seconds <= MAX_WINDOW_S:
        raise RequestError(
            f"completion_window is {text[:80]!r}; it must be a time up to {MAX_WINDOW_S // 86_400}d, "
            "such as '24h', '30m' or '2d'",
            field="completion_window",
        )
    return seconds


def check_metadata(metadata: dict[str, str] | None) -> None:
    """Raise RequestError unless it is small."""
    if metadata is None:
        return
    if len(metadata) > MAX_METADATA:
        raise RequestError(
            f"metadata has {len(metadata)} entries; at most {MAX_METADATA} are kept", field="metadata"
        )
    for key, value in metadata.items():
        if len(key) > MAX_METADATA_KEY_CHARS or len(value) > MAX_METADATA_VALUE_CHARS:
            raise RequestError(
                f"metadata {key[:80]!r} is too long: keys have up to {MAX_METADATA_KEY_CHARS} characters, "
                f"values {MAX_METADATA_VALUE_CHARS}",
                field="metadata",
            )
