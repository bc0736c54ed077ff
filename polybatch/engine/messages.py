"""What the front and the engine process say to each other, and how it is put on a socket.

A frame is four bytes of length, little-endian, and a message in msgpack. Every message is a typed struct
of a closed union, so that nothing can arrive but these, with these fields: no pickle, nothing to execute.

    front -> engine   Start | Submit | Abort | AddAdapter | RemoveAdapter | GetStats | GetSnapshot | Shutdown
    engine -> front   Ready | StartFailed | Outputs | Reply | Heartbeat
"""

from __future__ import annotations

import msgspec

from polybatch.config import ModelSpec
from polybatch.engine.snapshot import EngineSnapshot
from polybatch.engine.stats import EngineStats
from polybatch.errors import (
    AdapterError,
    ConfigError,
    DeadlineError,
    EngineError,
    ModelError,
    PolybatchError,
    RequestError,
)
from polybatch.log_format import LogFormat
from polybatch.request import AdapterRef, FinishReason, Logprob, Request, RequestMetrics

MAX_FRAME_BYTES = 64 << 20
HEADER_BYTES = 4

Setting = bool | int | float | str | None | dict[str, bool | int | float | str | None]
Logprobs = dict[int, Logprob]


class Start(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """First message. adapters: name -> folder; settings: keyword arguments of `LLM`.

    is_restart: adapters that cannot be loaded any more are left out and named in Ready.lost.
    """

    model: str
    adapters: dict[str, str]
    settings: dict[str, Setting]
    heartbeat_s: float
    is_restart: bool = False
    log_level: int = 20
    log_format: LogFormat = "text"


class Submit(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Queue a request. is_streamed: its deltas come step by step, else in one when it ends."""

    request: Request
    is_streamed: bool


class Abort(msgspec.Struct, array_like=True, frozen=True, tag=True):
    request_id: str


class AddAdapter(msgspec.Struct, array_like=True, frozen=True, tag=True):
    call_id: int
    name: str
    path: str


class RemoveAdapter(msgspec.Struct, array_like=True, frozen=True, tag=True):
    call_id: int
    name: str


class GetStats(msgspec.Struct, array_like=True, frozen=True, tag=True):
    call_id: int


class GetSnapshot(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """after_step: index of the last step that is known, -1 for none."""

    call_id: int
    after_step: int


class Shutdown(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """End now; what is in flight is dropped."""


class Fault(msgspec.Struct, array_like=True, frozen=True):
    """An error on its way; kind is the name of its class in `polybatch.errors`.

    wait_s: of a DeadlineError.
    """

    kind: str
    message: str
    field: str | None = None
    wait_s: float = 0.0


class Ready(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The model is loaded. lost: adapter -> why it could not be loaded again after a restart."""

    spec: ModelSpec
    max_model_len: int
    num_pages: int
    page_size: int
    adapters: list[AdapterRef]
    lost: dict[str, str]


class StartFailed(msgspec.Struct, array_like=True, frozen=True, tag=True):
    fault: Fault


class CompletionDelta(msgspec.Struct, array_like=True, frozen=True):
    """What one completion gained; `cumulative_logprob` and the reasons as they stand."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class RequestDelta(msgspec.Struct, array_like=True, frozen=True):
    """What one request gained in a step.

    prompt_logprobs and metrics come with the end; metrics also with the beginning where there was a forecast.
    """

    request_id: str
    completions: list[CompletionDelta]
    is_finished: bool = False
    num_cached_tokens: int = 0
    prompt_logprobs: list[Logprobs | None] | None = None
    metrics: RequestMetrics | None = None
    fault: Fault | None = None


class Outputs(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """What a step brought, for all requests that it concerns."""

    deltas: list[RequestDelta]


class Reply(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Answer to the call of that id."""

    call_id: int
    fault: Fault | None = None
    adapter: AdapterRef | None = None
    stats: EngineStats | None = None
    snapshot: EngineSnapshot | None = None


class Heartbeat(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Sent by a thread of its own. num_beats: rounds of the loop, num_steps: steps done.

    is_busy: the loop is at work, so that num_beats should grow.
    """

    num_beats: int
    num_steps: int
    is_busy: bool


ToEngine = Start | Submit | Abort | AddAdapter | RemoveAdapter | GetStats | GetSnapshot | Shutdown
ToFront = Ready | StartFailed | Outputs | Reply | Heartbeat

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_front: msgspec.msgpack.Decoder[ToFront] = msgspec.msgpack.Decoder(ToFront)


def encode(message: ToEngine | ToFront) -> bytes:
    """A frame. Raises EngineError for a message over MAX_FRAME_BYTES."""
    buffer = bytearray(HEADER_BYTES)
    _encoder.encode_into(message, buffer, HEADER_BYTES)
    size = len(buffer) - HEADER_BYTES
    if size > MAX_FRAME_BYTES:
        raise EngineError(
            f"a {type(message).__name__} message takes {size:,} bytes; at most {MAX_FRAME_BYTES:,} go "
            "between the processes: ask for fewer tokens or log-probabilities at a time"
        )
    buffer[:HEADER_BYTES] = size.to_bytes(HEADER_BYTES, "little")
    return bytes(buffer)


def frame_size(header: bytes | bytearray) -> int:
    """Bytes of the message that follows a header. Raises EngineError beyond MAX_FRAME_BYTES."""
    size = int.from_bytes(header, "little")
    if size > MAX_FRAME_BYTES:
        raise EngineError(f"a frame of {size:,} bytes was announced; at most {MAX_FRAME_BYTES:,} are allowed")
    return size


def decode_to_engine(data: bytes | bytearray) -> ToEngine:
    """Raises EngineError for anything that is no such message, RequestError for impossible parameters."""
    try:
        return _to_engine.decode(data)
    except msgspec.DecodeError as error:
        raise EngineError(f"the front sent what is no message: {error}") from error


def decode_to_front(data: bytes) -> ToFront:
    """Raises EngineError for anything that is no such message."""
    try:
        return _to_front.decode(data)
    except msgspec.DecodeError as error:
        raise EngineError(f"the engine process sent what is no message: {error}") from error


_ERRORS: dict[str, type[PolybatchError]] = {
    error.__name__: error for error in (ConfigError, ModelError, AdapterError, EngineError)
}


def fault_of(error: BaseException) -> Fault:
    """An error as a message; what nobody raised on purpose is an EngineError."""
    if isinstance(error, DeadlineError):
        return Fault("DeadlineError", str(error), error.field, error.wait_s)
    if isinstance(error, RequestError):
        return Fault("RequestError", str(error), error.field)
    name = type(error).__name__
    return Fault(name, str(error)) if name in _ERRORS else Fault("EngineError", f"{name}: {error}")


def error_of(fault: Fault) -> PolybatchError:
    """The error that a fault stands for."""
    if fault.kind == "DeadlineError":
        return DeadlineError(fault.message, fault.wait_s)
    if fault.kind == "RequestError":
        return RequestError(fault.message, fault.field)
    return _ERRORS.get(fault.kind, EngineError)(fault.message)
