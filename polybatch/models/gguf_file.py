"""Read a GGUF file: metadata at once, tensors on demand. Not what they mean to a model.

The file is mapped, never copied. Every count, length and offset is checked against the bytes that
are there before it is used, because a checkpoint is somebody else's data: a truncated or hostile
file ends in a ModelError, not in a crash or in gigabytes of memory. The `gguf` package's own reader
makes three array views per vocabulary entry, which takes seconds.
Source: the GGUF specification, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from polybatch.errors import ModelError
from polybatch.models.gguf_blocks import dequantise_blocks

MAGIC = b"GGUF"
SUPPORTED_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
MAX_DIMS = 4

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_VIEWS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies. shape: outermost dimension first, as torch counts. offset: in the file."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GgufFile:
    """An open GGUF file.

    metadata: key -> number, bool, string or list of them. tensors: name -> place and type.
    Raises ModelError for a file that cannot be opened, is truncated or breaks the format.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # Copy-on-write, because torch wants writable memory; nothing is ever written.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read the GGUF file {path}: {error}") from error
        cursor = _Cursor(self._map, path)
        if cursor.take(4) != MAGIC:
            raise ModelError(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}")
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise ModelError(f"{path} has GGUF version {version}; supported are 2 and 3, little-endian")
        # The smallest tensor entry takes 24 bytes, the smallest metadata entry 13.
        num_tensors = cursor.count("tensors", 24)
        num_keys = cursor.count("metadata keys", 13)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = cursor.string()
            if key in metadata:
                raise ModelError(f"{path} gives the metadata key {key!r} twice")
            metadata[key] = cursor.value(cursor.scalar("I"))
        self.metadata = metadata
        entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment % 8:
            raise ModelError(f"{path}: general.alignment is {alignment!r}; it must be a multiple of 8")
        self.data_offset = -(-cursor.offset // alignment) * alignment
        self.tensors = {}
        for name, shape, type_id, offset in entries:
            if name in self.tensors:
                raise ModelError(f"{path} lists the tensor {name!r} twice")
            self.tensors[name] = self._place(name, shape, type_id, offset)

    def _place(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GgufTensor:
        try:
            kind = GGMLQuantizationType(type_id)
        except ValueError:
            raise ModelError(f"{self.path}: tensor {name!r} has the unknown type {type_id}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ModelError(f"{self.path}: tensor {name!r} of shape {shape} is not whole {kind.name} blocks")
        num_bytes = math.prod(shape) // block * block_bytes
        start = self.data_offset + offset
        if start + num_bytes > len(self._map):
            raise ModelError(
                f"{self.path}: tensor {name!r} ends at byte {start + num_bytes:,}, the file at "
                f"{len(self._map):,}: the file is truncated, fetch it again"
            )
        return GgufTensor(name, kind.name, shape, start, num_bytes)

    def read(self, name: str) -> torch.Tensor:
        """A tensor by name: mapped as it is for F32, F16 and BF16, dequantised to float32 otherwise.

        Raises ModelError for a name that is not there or a type outside SUPPORTED_TYPES.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelError(f"{self.path} has no tensor {name!r}")
        self.check_type(tensor)
        if tensor.type_name in _VIEWS:
            dtype = _VIEWS[tensor.type_name]
            count = math.prod(tensor.shape)
            flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=tensor.offset)
            return flat.reshape(tensor.shape)
        blocks = torch.frombuffer(self._map, dtype=torch.uint8, count=tensor.num_bytes, offset=tensor.offset)
        rows = blocks.reshape(math.prod(tensor.shape[:-1]), -1)
        values = dequantise_blocks(rows, tensor.type_name).reshape(tensor.shape)
        self._forget(tensor)
        return values

    def _forget(self, tensor: GgufTensor) -> None:
        """Give a tensor's pages back: once dequantised they would only take memory."""
        self._give_back(tensor.offset, tensor.offset + tensor.num_bytes)

    def forget_header(self) -> None:
        """Drop the metadata and give its pages back, once tokenizer and model have been made of it."""
        self.metadata = {}
        self._give_back(0, self.data_offset)

    def _give_back(self, start: int, stop: int) -> None:
        """Unmap pages for now; the file still holds them."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, stop - first)

    def check_type(self, tensor: GgufTensor) -> None:
        """Raise ModelError where the tensor's type cannot be read."""
        if tensor.type_name not in SUPPORTED_TYPES:
            raise ModelError(
                f"{self.path}: tensor {tensor.name!r} has the type {tensor.type_name}; supported are "
                f"{', '.join(SUPPORTED_TYPES)}: convert the checkpoint to one of these"
            )

    def bytes(self, start: int, stop: int) -> bytes:
        """Raw bytes of the file, clipped to its length."""
        return self._map[start:stop]

    @property
    def num_bytes(self) -> int:
        return len(self._map)


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dims = cursor.scalar("I")
    if not 1 <= num_dims <= MAX_DIMS:
        raise ModelError(f"{cursor.path}: tensor {name!r} has {num_dims} dimensions; at most {MAX_DIMS}")
    shape = tuple(cursor.scalar("Q") for _ in range(num_dims))
    if min(shape) < 1:
        raise ModelError(f"{cursor.path}: tensor {name!r} has the empty shape {shape[::-1]}")
    return name, shape[::-1], cursor.scalar("I"), cursor.scalar("Q")


class _Cursor:
    """Reads forward; refuses every read that would pass the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.path = path
        self.offset = 0
        self._data = data
        self._size = len(data)

    def take(self, num_bytes: int) -> bytes:
        start = self.offset
        stop = start + num_bytes
        if stop > self._size:
            raise ModelError(
                f"{self.path} ends at byte {self._size:,} where its header needs {stop:,}: "
                "the file is truncated or damaged, fetch it again"
            )
        self.offset = stop
        return self._data[start:stop]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, what: str, least_bytes: int) -> int:
        """A 64-bit count of things that take at least so many bytes each."""
        number: int = self.scalar("Q")
        if number * least_bytes > self._size - self.offset:
            raise ModelError(
                f"{self.path} claims {number:,} {what}, more than its {self._size:,} bytes can hold: "
                "the file is truncated or damaged, fetch it again"
            )
        return number

    def string(self) -> str:
        try:
            return self.take(self.count("characters", 1)).decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path} has text that is not UTF-8 before byte {self.offset:,}") from error

    def value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self._array()
        return self.scalar(self._code(type_id))

    def _code(self, type_id: int) -> str:
        if type_id not in _SCALARS:
            raise ModelError(f"{self.path} holds a metadata value of the unknown type {type_id}")
        return _SCALARS[type_id]

    def _array(self) -> list[Any]:
        type_id = self.scalar("I")
        if type_id == _STRING:
            return self._strings(self.count("strings", 8))
        code = self._code(type_id)
        width = struct.calcsize("<" + code)
        number = self.count("array elements", width)
        return list(struct.unpack(f"<{number}{code}", self.take(number * width)))

    def _strings(self, number: int) -> list[str]:
        """What `string` would give, in one loop: a vocabulary and its merges are 100,000 of them."""
        data, size, at = self._data, self._size, self.offset
        length_of = struct.Struct("<Q").unpack_from
        found: list[str] = []
        try:
            for _ in range(number):
                start = at + 8
                at = start + length_of(data, at)[0] if start <= size else size + 1
                if at > size:
                    break
                found.append(str(data[start:at], "utf-8"))
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path} has text that is not UTF-8 before byte {at:,}") from error
        if len(found) < number:
            raise ModelError(
                f"{self.path} ends at byte {size:,}, inside the text of a list: the file is truncated or "
                "damaged, fetch it again"
            )
        self.offset = at
        return found
