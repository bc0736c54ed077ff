"""A step's metadata: named arrays in one buffer, filled on the host and sent to the device in one copy.

The device's addresses never change, so that a captured graph reads each step's numbers where it read the
last one's. The host fills a ring of pinned buffers, because the copy of step n may still wait on the
device while step n + 1 is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

_ALIGNMENT = 64
_DEPTH = 3
_TORCH_DTYPES = {
    "int32": torch.int32,
    "int64": torch.int64,
    "float32": torch.float32,
    "float64": torch.float64,
}


class StepFields:
    """Arrays by name, on the host (`host`, numpy views of the current buffer) and the device (`on`).

    fields: name -> (shape, numpy dtype). On the CPU host and device are the same memory.
    """

    def __init__(self, fields: Mapping[str, tuple[Shape, Any]], device: torch.device) -> None:
        offsets: dict[str, int] = {}
        size = 0
        for name, (shape, dtype) in fields.items():
            offsets[name] = size
            num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
            size += -(-max(num_bytes, 1) // _ALIGNMENT) * _ALIGNMENT
        self._is_cuda = device.type == "cuda"
        self._hosts = [
            torch.zeros(size, dtype=torch.uint8, pin_memory=self._is_cuda)
            for _ in range(_DEPTH if self._is_cuda else 1)
        ]
        self._sent: list[torch.cuda.Event | None] = [None] * len(self._hosts)
        self._device = (
            torch.zeros(size, dtype=torch.uint8, device=device) if self._is_cuda else self._hosts[0]
        )
        self._views = [
            {
                name: buffer.numpy()[offsets[name] :][: math.prod(shape) * np.dtype(dtype).itemsize]
                .view(dtype)
                .reshape(shape)
                for name, (shape, dtype) in fields.items()
            }
            for buffer in self._hosts
        ]
        self.on: dict[str, torch.Tensor] = {}
        for name, (shape, dtype) in fields.items():
            kind = _TORCH_DTYPES[np.dtype(dtype).name]
            held = self._device[offsets[name] :][: math.prod(shape) * kind.itemsize]
            self.on[name] = held.view(kind).view(shape)
        self._turn = 0

    @property
    def raw(self) -> Array:
        """The bytes under `host`, all arrays together; laid out alike wherever the fields are the same."""
        whole: Array = self._hosts[self._turn].numpy()
        return whole

    @property
    def host(self) -> dict[str, Array]:
        """The arrays to fill for the next `send`; they hold what an earlier step left."""
        return self._views[self._turn]

    def open(self) -> dict[str, Array]:
        """Turn to the next host buffer, waiting for the device if it has yet to read it; returns `host`."""
        self._turn = (self._turn + 1) % len(self._hosts)
        sent = self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        return self.host

    def send(self) -> None:
        """Copy what was filled to the device, in the order of the current stream."""
        if not self._is_cuda:
            return
        self._device.copy_(self._hosts[self._turn], non_blocking=True)
        event = self._sent[self._turn] or torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._sent[self._turn] = event
