"""What rank 0 tells the other ranks, and the little that they answer: typed messages, never pickle.

A frame is its length in 8 bytes, little-endian, and a msgpack body. Arrays go as their bytes; both ends run
the same code on the same machine. Everything that changes a rank's state goes in the order in which rank 0
changed its own, so that page tables, adapters and words are the same everywhere.
"""

from __future__ import annotations

import socket
from typing import Any

import msgspec

from polybatch.errors import AdapterError, ConfigError, EngineError, ModelError, PolybatchError
from polybatch.kernels.lora.work import LoraPlan
from polybatch.kernels.ragged_attention.work import Work

HEADER_BYTES = 8

STARTING, OPENING, JOINING = "its interpreter starts", "it opens the model", "it meets the other ranks"
BUILDING, FOLLOWING = "it starts up", "it takes part in steps"
"""Phases of a rank, in their order."""


class Start(msgspec.Struct, tag="start"):
    """Load this part of a model. store: file over which the ranks find each other.

    settings: of `CudaExecutor`. draw_on: device on which random weights are drawn.
    """

    model: str
    rank: int
    size: int
    store: str
    device: str
    draw_on: str
    settings: dict[str, int | str | bool | None]


class Rows(msgspec.Struct, array_like=True):
    """A module's part of an adapter. a, b, gain, bias: in the pool's dtype, as `ModuleDelta`.

    sum_gain, sum_bias: float32, as `SumScale`.
    """

    rank: int
    a: bytearray
    b: bytearray
    gain: bytearray | None
    bias: bytearray | None
    sum_gain: bytearray | None
    sum_bias: bytearray | None


class Adapter(msgspec.Struct, tag="adapter"):
    """This rank's part of an adapter; it is kept for loads to come."""

    digest: str
    layers: list[dict[str, Rows]]


class Load(msgspec.Struct, tag="load"):
    """Bring a known adapter into these pages."""

    digest: str
    pages: list[int]


class Place(msgspec.Struct, tag="place"):
    """Make the words of these adapters valid on the device."""

    digests: list[str]
    resident: dict[str, list[int]]


class Copy(msgspec.Struct, tag="copy"):
    """Copy pages, (from, to) each."""

    pages: list[tuple[int, int]]


class Step(msgspec.Struct, tag="step"):
    """Run a step. fields: the stage's arrays.

    page_indices, page_values: int64 and int32, what is new in the page table. graph: variant of the graph of
    num_rows rows to replay, or None. digests, segments: where adapters do something to sums over ranks, all
    of the step's adapters and their rows. attention: per window of the model.
    """

    is_decode: bool
    fields: bytearray
    page_indices: bytearray
    page_values: bytearray
    num_rows: int
    digests: list[str]
    segments: list[list[int]]
    graph: int | None
    lora: LoraPlan | None
    attention: list[tuple[int | None, Work]]


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Nothing more will come."""


class Phase(msgspec.Struct, tag="phase"):
    """What the rank does now, and how much of it is done, of how much."""

    name: str
    done: int = 0
    total: int = 0


class Failed(msgspec.Struct, tag="failed"):
    """The rank ends. kind: name of the error's class."""

    kind: str
    message: str


ToRank = Start | Adapter | Load | Place | Copy | Step | Shutdown
FromRank = Phase | Failed

_encoder = msgspec.msgpack.Encoder()
_to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
_from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)
_ERRORS: dict[str, type[PolybatchError]] = {
    error.__name__: error for error in (ConfigError, ModelError, AdapterError, EngineError)
}


def encode(message: ToRank | FromRank) -> bytearray:
    """A frame."""
    frame = bytearray(HEADER_BYTES)
    _encoder.encode_into(message, frame, HEADER_BYTES)
    frame[:HEADER_BYTES] = (len(frame) - HEADER_BYTES).to_bytes(HEADER_BYTES, "little")
    return frame


def receive_to_rank(sock: socket.socket) -> ToRank | None:
    """The next message from rank 0, None where it has closed. Raises EngineError for anything else."""
    message: ToRank | None = _receive(sock, _to_rank)
    return message


def receive_from_rank(sock: socket.socket) -> FromRank | None:
    """The next message from another rank, None where it has closed. Raises EngineError for anything else."""
    message: FromRank | None = _receive(sock, _from_rank)
    return message


def failed(error: BaseException) -> Failed:
    """An error as a message."""
    name = type(error).__name__
    return Failed(name, str(error)) if name in _ERRORS else Failed("EngineError", f"{name}: {error}")


def error_of(message: Failed, rank: int) -> PolybatchError:
    """The error that a rank met, under its name."""
    return _ERRORS.get(message.kind, EngineError)(f"rank {rank}: {message.message}")


def _receive(sock: socket.socket, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    header = _read(sock, HEADER_BYTES)
    body = None if header is None else _read(sock, int.from_bytes(header, "little"))
    if body is None:
        return None
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise EngineError(f"a rank got what is no message: {error}") from error


def _read(sock: socket.socket, size: int) -> bytearray | None:
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size:
        count = sock.recv_into(view[filled:])
        if not count:
            return None
        filled += count
    return data
