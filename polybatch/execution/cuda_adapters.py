"""Adapters in the pages of a GPU's pool: loads on a stream of their own, tables for the `lora` kernels.

An adapter is laid out once, in pinned host memory and the pool's dtype, as its pages will look. A load copies
that image to the device in large pieces and scatters its pages, while the compute stream goes on until a
step uses the adapter (`wait`). Where rows lie is written to `words` on the device when an adapter is first
used, not per step. `words` is a bounded arena: when it is full, it starts afresh with the adapters of the
step at hand, and others follow when they are used again.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from polybatch.adapters.layout import AdapterLayout, ModuleRows, plan_layout
from polybatch.adapters.weights import AdapterWeights
from polybatch.config import ModelSpec
from polybatch.errors import EngineError
from polybatch.execution.adapter_words import AdapterWords, adapter_words
from polybatch.kernels.lora.work import ABSENT, GROUPS, TILE_FIELDS

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

# Words on the device per page of the pool. An adapter of more words takes more pages, so that whatever is
# resident has room; rank 16 on seven modules, alike in all layers of an 8B model, needs 6 per page.
WORDS_PER_PAGE = 256


@dataclass(slots=True)
class _Adapter:
    """A known adapter. index: its row of `templates`. pages: where it was loaded.

    is_placed: its words are on the device. ready: a load that the compute stream has yet to wait for.
    """

    index: int
    layout: AdapterLayout
    words: AdapterWords
    pages: tuple[int, ...] = ()
    is_placed: bool = False
    ready: torch.cuda.Event | None = None

    @property
    def num_pages(self) -> int:
        if not self.layout.num_pages:
            return 0
        return max(self.layout.num_pages, -(-self.words.size // WORDS_PER_PAGE))


class CudaAdapters:
    """Adapters of one pool. Loads and steps happen in the order of the calls; one thread owns it.

    arena: [layers, num_pages, page_bytes] uint8. dtype: of adapter rows. On the CPU copies are synchronous.
    host_cache_bytes: pinned images kept for later loads, least recently used first to go.
    staging_bytes: of the device buffer through which images pass, in whole pages.

    words: int32, on the arena's device, at an address that never changes.
    templates: [N, groups, TILE_FIELDS], tile records but for their tokens; see `work.fill`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        arena: torch.Tensor,
        dtype: torch.dtype,
        *,
        host_cache_bytes: int = 8 << 30,
        staging_bytes: int = 64 << 20,
    ) -> None:
        self._shapes = spec.linear_shapes
        self._dtype = dtype
        self._num_layers, self._num_pages, self._page_bytes = arena.shape
        self._device = arena.device
        self._is_cuda = arena.device.type == "cuda"
        # 8-byte elements: pages are copied whole, whatever they hold.
        self._rows = arena.view(torch.int64).view(self._num_layers * self._num_pages, -1)
        self._images: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._image_bytes, self._max_image_bytes = 0, host_cache_bytes
        self._adapters: dict[str, _Adapter] = {}
        self._free_indices: list[int] = []
        num_words = self._num_pages * WORDS_PER_PAGE
        self.words = torch.full((num_words,), ABSENT, dtype=torch.int32, device=arena.device)
        self._num_words = 0
        self.templates = np.zeros((16, len(GROUPS), TILE_FIELDS), np.int32)
        if self._is_cuda:
            num_rows = max(1, staging_bytes // self._page_bytes)
            self._stream = torch.cuda.Stream(arena.device)  # type: ignore[no-untyped-call]
            self._staging = torch.empty(
                num_rows, self._rows.shape[1], dtype=self._rows.dtype, device=arena.device
            )
            self._targets = torch.empty(num_rows, dtype=torch.int64, device=arena.device)

    def pages_needed(self, weights: AdapterWeights) -> int:
        """Pages that the adapter takes; 0 for one that changes only the vocabulary layers.

        Raises AdapterError if a row does not fit in a page.
        """
        return self._know(weights).num_pages

    def prepare(self, weights: AdapterWeights) -> None:
        """Lay the adapter out in pinned memory ahead of its first load, where the host cache has room."""
        adapter = self._know(weights)
        num_bytes = adapter.layout.num_pages * self._num_layers * self._page_bytes
        if self._image_bytes + num_bytes <= self._max_image_bytes:
            self._image(weights, adapter.layout)

    def load(self, weights: AdapterWeights, pages: Sequence[int]) -> None:
        """Start copying an adapter's rows into these pages of every layer.

        The copy begins when what the current stream was given so far is done: that may still read what the
        pages held. Raises EngineError if the pages are not as many as `pages_needed`.
        """
        adapter = self._know(weights)
        if len(pages) != adapter.num_pages:
            raise EngineError(
                f"adapter {weights.digest[:12]} takes {adapter.num_pages} pages; the plan gives "
                f"{len(pages)}: ask pages_needed when the adapter is registered"
            )
        adapter.pages, adapter.is_placed = tuple(pages), False
        if not adapter.layout.num_pages:
            return
        image = self._image(weights, adapter.layout)
        ids = np.asarray(pages[: adapter.layout.num_pages], np.int64)
        rows = (np.arange(self._num_layers)[:, None] * self._num_pages + ids).reshape(-1)
        if self._is_cuda:
            adapter.ready = self._copy(image, torch.from_numpy(rows).pin_memory())
        else:
            self._rows.index_copy_(0, torch.from_numpy(rows), image)

    def wait(self, digests: Sequence[str]) -> None:
        """Let the current stream wait for the loads of these adapters. Call it before their first step."""
        for digest in digests:
            adapter = self._adapters.get(digest)
            if adapter is not None and adapter.ready is not None:
                torch.cuda.current_stream(self._device).wait_event(adapter.ready)
                adapter.ready = None

    def place(self, digests: Sequence[str], resident: Mapping[str, Sequence[int]]) -> Int32s:
        """Make these adapters' words valid on the device, in the order of the current stream.

        Call it once a step, after the step's loads and before `work.fill`, with all adapters of the step.
        resident: digest -> pages. Returns each one's row of `templates`, [len(digests)].
        Raises EngineError for an adapter that was never loaded or lies in other pages.
        """
        adapters = [self._resident(digest, resident) for digest in digests]
        missing = {adapter.index: adapter for adapter in adapters if not adapter.is_placed}
        if self._num_words + sum(adapter.words.size for adapter in missing.values()) > len(self.words):
            for adapter in self._adapters.values():
                adapter.is_placed = False
            self._num_words = 0
            missing = {adapter.index: adapter for adapter in adapters}
        for adapter in missing.values():
            self._place(adapter)
        return np.array([adapter.index for adapter in adapters], np.int32)

    def index_of(self, digest: str) -> int | None:
        """The adapter's row of `templates`, None where it is unknown; its row is valid after `place`."""
        adapter = self._adapters.get(digest)
        return None if adapter is None else adapter.index

    def forget(self, digest: str) -> None:
        """Drop what is known of an adapter, and its image; its pages belong to the scheduler. Idempotent."""
        adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self._free_indices.append(adapter.index)
        image = self._images.pop(digest, None)
        if image is not None:
            self._image_bytes -= image.nbytes

    def _resident(self, digest: str, resident: Mapping[str, Sequence[int]]) -> _Adapter:
        adapter = self._adapters.get(digest)
        if adapter is None or not adapter.pages or adapter.pages != tuple(resident.get(digest, ())):
            if adapter is not None and not adapter.num_pages:
                return adapter
            raise EngineError(
                f"adapter {digest[:12]} has a chunk but is not resident: the plan must load it and name "
                "its pages"
            )
        return adapter

    def _place(self, adapter: _Adapter) -> None:
        if adapter.words.size:
            ids = np.asarray(adapter.pages, np.int64)
            starts = torch.from_numpy(adapter.words.starts(ids, self._page_bytes))
            held = self.words[self._num_words : self._num_words + len(starts)]
            held.copy_(starts.pin_memory() if self._is_cuda else starts, non_blocking=True)
        self.templates[adapter.index] = adapter.words.template_at(self._num_words)
        self._num_words += adapter.words.size
        adapter.is_placed = True

    def _know(self, weights: AdapterWeights) -> _Adapter:
        known = self._adapters.get(weights.digest)
        if known is not None:
            return known
        ranks = [
            {m: ModuleRows(d.rank, d.gain is not None, d.bias is not None) for m, d in layer.items()}
            for layer in weights.layers
        ]
        layout = plan_layout(ranks, self._shapes, self._dtype.itemsize, self._page_bytes)
        words = adapter_words(layout)
        index = self._free_indices.pop() if self._free_indices else len(self._adapters)
        if index == len(self.templates):
            self.templates = np.concatenate([self.templates, np.zeros_like(self.templates)])
        self._adapters[weights.digest] = adapter = _Adapter(index, layout, words)
        return adapter

    def _image(self, weights: AdapterWeights, layout: AdapterLayout) -> torch.Tensor:
        """The adapter's pages, [layers * pages, page_bytes / 8] int64, pinned; kept while there is room."""
        image = self._images.pop(weights.digest, None)
        if image is None:
            image = self._written(weights, layout)
            self._image_bytes += image.nbytes
        self._images[weights.digest] = image
        while self._image_bytes > self._max_image_bytes:
            _, dropped = self._images.popitem(last=False)
            self._image_bytes -= dropped.nbytes
        return image

    def _written(self, weights: AdapterWeights, layout: AdapterLayout) -> torch.Tensor:
        num_rows = self._num_layers * layout.num_pages
        image = torch.zeros(num_rows, self._page_bytes // 8, dtype=torch.int64, pin_memory=self._is_cuda)
        flat = image.view(-1).view(self._dtype)
        for index, deltas in enumerate(weights.layers):
            first_page = index * layout.num_pages
            for module, delta in deltas.items():
                places = layout.layers[index][module]
                rows = [(places.a_page, places.a_offset, delta.a), (places.b_page, places.b_offset, delta.b)]
                for place, vector in ((places.gain, delta.gain), (places.bias, delta.bias)):
                    if place is not None and vector is not None:
                        rows.append((np.array([place.page]), np.array([place.offset]), vector[None]))
                for page, offset, values in rows:
                    starts = (first_page + page.astype(np.int64)) * self._page_bytes + offset
                    _write(flat, starts // self._dtype.itemsize, values)
        return image

    def _copy(self, image: torch.Tensor, rows: torch.Tensor) -> torch.cuda.Event:
        """Copy an image to the device, piece by piece, and from there to its pages. rows: of `_rows`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for low in range(0, len(image), len(self._staging)):
                piece = slice(low, min(low + len(self._staging), len(image)))
                count = piece.stop - low
                self._staging[:count].copy_(image[piece], non_blocking=True)
                self._targets[:count].copy_(rows[piece], non_blocking=True)
                self._rows.index_copy_(0, self._targets[:count], self._staging[:count])
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event


def _write(flat: torch.Tensor, starts: Int64s, values: torch.Tensor) -> None:
    """Write rows to their starts, those a fixed stride apart in one copy."""
    if not values.numel():
        return
    width = values.shape[1]
    strides = np.diff(starts)
    # A run ends where its stride changes, and before a row that fills the tail of an earlier page.
    ends = set((np.flatnonzero(np.diff(strides)) + 2).tolist()) | set(
        (np.flatnonzero(strides < 0) + 1).tolist()
    )
    for low, high in itertools.pairwise([0, *sorted(ends), len(starts)]):
        if low < high:
            stride = int(strides[low]) if high - low > 1 else width
            flat.as_strided((high - low, width), (stride, 1), int(starts[low])).copy_(values[low:high])


__all__ = ["WORDS_PER_PAGE", "CudaAdapters"]
