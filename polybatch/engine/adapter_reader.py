"""Adapters that are being read from disk, in a thread so that the engine goes on stepping."""

from __future__ import annotations

import queue
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from polybatch.adapters.weights import AdapterWeights
from polybatch.engine import messages as ms


class ReadsAdapters(Protocol):
    """Where adapters come from; `polybatch.adapters.store.AdapterStore` is the real one."""

    def read(self, path: str | Path) -> AdapterWeights: ...


class AdapterReader:
    """Reads one folder after the other, in the order of the messages that ask for it."""

    def __init__(self, source: ReadsAdapters, inbox: queue.SimpleQueue[ms.ToEngine]) -> None:
        self._source, self._inbox = source, inbox
        self._reading: dict[int, Future[AdapterWeights]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def take(self, message: ms.AddAdapter) -> Future[AdapterWeights] | None:
        """What was read for a message, or how that failed.

        None at first: the message comes back by the inbox when its folder is read.
        """
        found = self._reading.pop(message.call_id, None)
        if found is not None:
            return found
        if self._thread is None:
            # One thread of torch's: more would get in the way of the steps.
            self._thread = ThreadPoolExecutor(1, "adapters", torch.set_num_threads, (1,))
        reading = self._thread.submit(self._source.read, message.path)
        self._reading[message.call_id] = reading
        reading.add_done_callback(lambda _: self._inbox.put(message))
        return None
