"""Adapters in the pages of a GPU's pool: loads on streams of their own, tables for the `lora` kernels.

An adapter stays in host memory as long as it is registered, once, pinned and in the pool's dtype (`pack`). A
load sends that memory to the device in large pieces and scatters its rows to their pages, while the compute
stream goes on until a step uses the adapter (`wait`); what the host has to know for it is worked out ahead
(`prepare`). Where rows lie is written to `words` on the device when an adapter is first used, not per step.
`words` is a bounded arena: when it is full, it starts afresh with the adapters of the step at hand, and
others follow when they are used again.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from polybatch.adapters.layout import ModuleRows, plan_layout
from polybatch.adapters.pack import locate, pack
from polybatch.adapters.weights import AdapterWeights
from polybatch.config import ModelSpec
from polybatch.errors import EngineError
from polybatch.execution.adapter_loads import AdapterShape, adapter_shape
from polybatch.execution.adapter_staging import Source, Staging
from polybatch.execution.adapter_words import adapter_words
from polybatch.kernels.lora.carried import fits
from polybatch.kernels.lora.work import ABSENT, GROUPS, TILE_FIELDS

Int32s = npt.NDArray[np.int32]
Ranks = tuple[tuple[tuple[str, ModuleRows], ...], ...]

# Words on the device per page of the pool. An adapter of more words takes more pages, so that whatever is
# resident has room; rank 16 on seven modules, alike in all layers of an 8B model, needs 6 per page.
WORDS_PER_PAGE = 256


@dataclass(slots=True)
class _Adapter:
    """A known adapter. index: its row of `templates`. pages: where it was loaded.

    is_placed: its words are on the device. source: what a load copies, while `owner` is alive.
    """

    index: int
    shape: AdapterShape
    pages: tuple[int, ...] = ()
    is_placed: bool = False
    source: Source | None = None
    owner: weakref.ref[AdapterWeights] | None = None

    @property
    def can_carry(self) -> bool:
        """Pairs of A and B alone, which the spare columns hold."""
        return self.shape.words.size > 0 and not self.shape.has_scales and fits(self.shape.words.template)

    @property
    def num_pages(self) -> int:
        if not self.shape.layout.num_pages:
            return 0
        return max(self.shape.layout.num_pages, -(-self.shape.words.size // WORDS_PER_PAGE))

    def keep(self, weights: AdapterWeights, source: Source) -> None:
        """Keep a source, and the host memory that it points to, no longer than the weights."""
        self.owner, self.source = weakref.ref(weights, self._drop), source

    def _drop(self, owner: weakref.ref[AdapterWeights]) -> None:
        if self.owner is owner:
            self.owner = self.source = None


@dataclass(slots=True)
class _Load:
    """A load that the compute stream has yet to wait for. is_old: a step was launched since."""

    events: tuple[torch.cuda.Event, ...]
    is_old: bool = False


class CudaAdapters:
    """Adapters of one pool. Loads and steps happen in the order of the calls; one thread owns it.

    arena: [layers, num_pages, page_bytes] uint8. dtype: of adapter rows. On the CPU copies are synchronous.
    staging_bytes: of device memory through which loads pass.

    words: int32, on the arena's device, at an address that never changes.
    templates: [N, groups, TILE_FIELDS], tile records but for their tokens; see `work.fill`.
    """

    def __init__(
        self, spec: ModelSpec, arena: torch.Tensor, dtype: torch.dtype, *, staging_bytes: int = 64 << 20
    ) -> None:
        self._shapes = spec.linear_shapes
        self._dtype = dtype
        self._num_pages, self._page_bytes = arena.shape[1:]
        self._device = arena.device
        self._is_cuda = arena.device.type == "cuda"
        self._staging = Staging(arena, dtype, staging_bytes)
        self._adapters: dict[str, _Adapter] = {}
        self._known_shapes: weakref.WeakValueDictionary[Ranks, AdapterShape] = weakref.WeakValueDictionary()
        self._free_indices: list[int] = []
        self._loads: dict[str, _Load] = {}
        num_words = self._num_pages * WORDS_PER_PAGE
        self.words = torch.full((num_words,), ABSENT, dtype=torch.int32, device=arena.device)
        self._num_words = 0
        self.templates = np.zeros((16, len(GROUPS), TILE_FIELDS), np.int32)

    def pages_needed(self, weights: AdapterWeights) -> int:
        """Pages that the adapter takes; 0 for one that changes only the vocabulary layers.

        Raises AdapterError if a row does not fit in a page.
        """
        return self._know(weights).num_pages

    def pack(self, weights: AdapterWeights) -> AdapterWeights:
        """The adapter as loads want it, prepared. Whoever keeps the result need not keep `weights`."""
        packed = pack(weights, self._dtype, pin=self._is_cuda)
        self.prepare(packed)
        return packed

    def prepare(self, weights: AdapterWeights) -> None:
        """Work out ahead what loads of the adapter copy, once for these weights.

        Weights that `pack` did not return, and would not return as they are, are copied to host memory of
        the pool's own, which is held as long as they are.
        """
        self._source(self._know(weights), weights)

    def load(self, weights: AdapterWeights, pages: Sequence[int]) -> None:
        """Start copying an adapter's rows into these pages of every layer.

        Pages are written when what the current stream was given so far is done: that may still read what
        they held. Raises EngineError if the pages are not as many as `pages_needed`.
        """
        adapter = self._know(weights)
        if len(pages) != adapter.num_pages:
            raise EngineError(
                f"adapter {weights.digest[:12]} takes {adapter.num_pages} pages; the plan gives "
                f"{len(pages)}: ask pages_needed when the adapter is registered"
            )
        adapter.pages, adapter.is_placed = tuple(pages), False
        if not adapter.shape.layout.num_pages:
            return
        page_ids = np.asarray(pages[: adapter.shape.layout.num_pages], np.int32)
        events = self._staging.load(self._source(adapter, weights), page_ids)
        if events:
            self._loads[weights.digest] = _Load(events)

    def wait(self, digests: Sequence[str]) -> None:
        """Let the current stream wait for the loads of these adapters. Call it before their first step.

        It waits as well for loads from before an earlier call: their pages may have another owner by now.
        """
        for digest, load in list(self._loads.items()):
            if load.is_old or digest in digests:
                for event in load.events:
                    torch.cuda.current_stream(self._device).wait_event(event)
                del self._loads[digest]
            load.is_old = True

    def place(self, digests: Sequence[str], resident: Mapping[str, Sequence[int]]) -> Int32s:
        """Make these adapters' words valid on the device, in the order of the current stream.

        Call it once a step, after the step's loads and before `work.fill`, with all adapters of the step.
        resident: digest -> pages. Returns each one's row of `templates`, [len(digests)].
        Raises EngineError for an adapter that was never loaded or lies in other pages.
        """
        adapters = [self._resident(digest, resident) for digest in digests]
        missing = {adapter.index: adapter for adapter in adapters if not adapter.is_placed}
        if self._num_words + sum(adapter.shape.words.size for adapter in missing.values()) > len(self.words):
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

    def can_carry(self, digest: str) -> bool:
        """Whether the base model's products can take the adapter along; see `lora.carried`."""
        adapter = self._adapters.get(digest)
        return adapter is not None and adapter.can_carry

    def forget(self, digest: str) -> None:
        """Drop what is known of an adapter; its pages belong to the scheduler. Idempotent."""
        adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self._free_indices.append(adapter.index)

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
        words = adapter.shape.words
        if words.size:
            ids = np.asarray(adapter.pages, np.int64)
            starts = torch.from_numpy(words.starts(ids, self._page_bytes))
            held = self.words[self._num_words : self._num_words + len(starts)]
            held.copy_(starts.pin_memory() if self._is_cuda else starts, non_blocking=True)
        self.templates[adapter.index] = words.template_at(self._num_words)
        self._num_words += words.size
        adapter.is_placed = True

    def _know(self, weights: AdapterWeights) -> _Adapter:
        known = self._adapters.get(weights.digest)
        if known is not None:
            return known
        shape = self._shape(weights)
        index = self._free_indices.pop() if self._free_indices else len(self._adapters)
        if index == len(self.templates):
            self.templates = np.concatenate([self.templates, np.zeros_like(self.templates)])
        self._adapters[weights.digest] = adapter = _Adapter(index, shape)
        return adapter

    def _shape(self, weights: AdapterWeights) -> AdapterShape:
        """Where the rows of adapters with these ranks go, shared among them."""
        ranks = tuple(
            tuple(
                (module, ModuleRows(delta.rank, delta.gain is not None, delta.bias is not None))
                for module, delta in sorted(layer.items())
            )
            for layer in weights.layers
        )
        shape = self._known_shapes.get(ranks)
        if shape is None:
            size = self._dtype.itemsize
            layout = plan_layout([dict(layer) for layer in ranks], self._shapes, size, self._page_bytes)
            shape = adapter_shape(layout, adapter_words(layout), self._shapes, size)
            self._known_shapes[ranks] = shape
        return shape

    def _source(self, adapter: _Adapter, weights: AdapterWeights) -> Source:
        """What loads copy."""
        source = adapter.source
        if source is None or adapter.owner is None or adapter.owner() is not weights:
            part = self._part(weights)
            runs = locate(part, self._dtype)
            if runs is None or not runs.suits(pin=self._is_cuda):
                runs = locate(pack(part, self._dtype, pin=self._is_cuda), self._dtype)
                assert runs is not None
            plan = adapter.shape.plan(runs.starts, self._staging.piece_bytes, pin=self._is_cuda)
            source = Source.of(runs, plan)
            adapter.keep(weights, source)
        return source

    def _part(self, weights: AdapterWeights) -> AdapterWeights:
        """What of an adapter lies in this pool."""
        return weights


__all__ = ["WORDS_PER_PAGE", "CudaAdapters"]
