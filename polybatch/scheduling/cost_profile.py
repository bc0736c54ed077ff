"""A calibrated cost model as a file: JSON for one machine, model and precision; data, parsed strictly."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import msgspec

from polybatch.errors import ConfigError
from polybatch.scheduling.costs import COEFFICIENTS, CostModel, StepShape

FORMAT = 3
MAX_FILE_BYTES = 1 << 20


class CostKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What coefficients depend on.

    device: name of the processor or GPU. threads: of the CPU's executor, 0 on a GPU. fingerprint: of the
    checkpoint, equal wherever it lies. kv_dtype: of keys and values.
    """

    device: str
    threads: int
    model: str
    fingerprint: str
    executor: str
    dtype: str
    quantization: str | None
    kv_dtype: str
    tensor_parallel_size: int

    @property
    def file_name(self) -> str:
        """Of the profile in the cache directory; the model's name is there for people only."""
        parts = msgspec.structs.astuple(self)
        told_apart = [
            part for name, part in zip(self.__struct_fields__, parts, strict=True) if name != "model"
        ]
        digest = hashlib.sha256(msgspec.json.encode(told_apart)).hexdigest()[:16]
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", self.model.rstrip("/").rpartition("/")[2])[:64]
        return f"{name}-{digest}.json"


class PoolShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The page pool that was measured with; page_bytes is per layer."""

    num_pages: int
    page_size: int
    page_bytes: int
    num_layers: int


class EngineLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits of the scheduler that was measured with, as in `SchedulerConfig`."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int


class CostProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A cost model and how good it is.

    coefficients: all of `COEFFICIENTS` by name, seconds per unit; the rest of the model as in `CostModel`.
    median_error, p95_error: relative, over num_held_out random steps that the fit did not see; num_fitted:
    those that it did. num_disturbed: of all of them, steps that other programs kept disturbing.
    adapter_bytes_per_rank: of an adapter's rows on all linear layers, in all of them. created: ISO 8601.
    """

    format: int
    key: CostKey
    coefficients: dict[str, float]
    hinge: int
    row_sizes: tuple[int, ...]
    mixed_sizes: tuple[int, ...] = ()
    median_error: float
    p95_error: float
    num_fitted: int
    num_held_out: int
    num_disturbed: int
    pool: PoolShape
    limits: EngineLimits
    adapter_bytes_per_rank: float
    created: str
    version: str

    @property
    def model(self) -> CostModel:
        return CostModel(
            **self.coefficients, hinge=self.hinge, row_sizes=self.row_sizes, mixed_sizes=self.mixed_sizes,
        )  # fmt: skip


_LEAST_STEPS = (
    StepShape(num_tokens=1, num_decodes=1, decode_context=1, num_logits=1),
    StepShape(num_tokens=2, num_prefill_tokens=2, num_prefills=1, prefill_pairs=3, prefill_context=2),
)

_decoder = msgspec.json.Decoder(CostProfile)


class _Version(msgspec.Struct):
    format: int = 0


def parse_profile(data: bytes, source: str) -> CostProfile:
    """A profile from its JSON. Raises ConfigError for anything else; source: what to call it there."""
    way_out = "delete it, or make it anew with `polybatch calibrate`"
    try:
        version = msgspec.json.decode(data, type=_Version).format
        if version != FORMAT:
            raise ConfigError(f"{source} has the format {version}, this version reads {FORMAT}: {way_out}")
        profile = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} is no cost profile: {error}; {way_out}") from error
    unknown = set(profile.coefficients) ^ set(COEFFICIENTS)
    if unknown:
        raise ConfigError(
            f"{source}: coefficients {', '.join(sorted(unknown))} are unknown or missing; {way_out}"
        )
    for name, value in profile.coefficients.items():
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"{source}: {name} is {value}; it must be 0 or more; {way_out}")
    for sizes in (profile.row_sizes, profile.mixed_sizes):
        if profile.hinge < 0 or any(a >= b for a, b in zip((0, *sizes), sizes, strict=False)):
            raise ConfigError(
                f"{source}: hinge must be 0 or more, row_sizes and mixed_sizes ascend from 1; {way_out}"
            )
    if min(map(profile.model.predict, _LEAST_STEPS)) <= 0:
        raise ConfigError(f"{source}: by its coefficients some steps cost nothing; {way_out}")
    return profile


def load_profile(path: Path) -> CostProfile:
    """Raises ConfigError for a file that cannot be read or is no profile."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has more than {MAX_FILE_BYTES:,} bytes; a cost profile has a few thousand")
    return parse_profile(data, str(path))


def save_profile(profile: CostProfile, path: Path) -> None:
    """Write a profile so that nobody ever reads half of it. Raises ConfigError where that fails."""
    beside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
        beside.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error
