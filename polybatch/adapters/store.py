"""Adapters that the engine may serve: names on the outside, content digests on the inside.

A name points at one digest; several names may point at the same. Weights live in host memory as long as a
name or a request holds their digest, so an adapter may be removed, or its name given other weights, while
requests that use the old ones still run. Not thread-safe but for `read`: one thread owns it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from polybatch.adapters.mix import MixtureCache, mix_weights, num_bytes
from polybatch.adapters.peft_lora import load_peft
from polybatch.adapters.weights import AdapterWeights
from polybatch.errors import AdapterError, EngineError, RequestError
from polybatch.models.weights import ModelWeights
from polybatch.request import AdapterRef

MAX_NAME_CHARS = 256
MAX_NAMES_IN_ERROR = 10


class AdapterStore:
    """Registered adapters of one base model.

    num_pages: pages of the pool that an adapter takes while resident; the executor knows.
    pack: makes of an adapter what the store keeps of it, see `PackingExecutor`; None: it is kept as it is.
    """

    def __init__(
        self,
        base: ModelWeights,
        num_pages: Callable[[AdapterWeights], int],
        pack: Callable[[AdapterWeights], AdapterWeights] | None = None,
    ) -> None:
        self._base = base
        self._num_pages = num_pages
        self._pack = pack
        self._refs: dict[str, AdapterRef] = {}
        self._weights: dict[str, AdapterWeights] = {}
        self._holders: dict[str, int] = {}
        self._mixtures = MixtureCache()

    def register(self, name: str, path: str | Path) -> AdapterRef:
        """Load an adapter under a name. A name in use gets the new weights; the old stay while held.

        Raises AdapterError, changing nothing, if the name or the adapter is bad.
        """
        _check_name(name)
        return self.add_weights(name, self.read(path))

    def read(self, path: str | Path) -> AdapterWeights:
        """An adapter's weights, for `add_weights`; any thread may call this. Raises AdapterError."""
        return load_peft(path, self._base)

    def add_weights(self, name: str, weights: AdapterWeights) -> AdapterRef:
        """`register` for an adapter that is in memory already; its shapes must be those of the base model.

        Raises AdapterError, changing nothing, if the name is bad or the pool's pages cannot hold it.
        """
        _check_name(name)
        ref = AdapterRef(name, weights.digest, self._num_pages(weights))
        # Equal digests are equal weights: the copy held already stays, so that nothing is stored twice.
        self._keep(weights)
        self.hold(weights.digest)
        old = self._refs.get(name)
        self._refs[name] = ref
        if old is not None:
            self.release(old.digest)
        return ref

    def remove(self, name: str) -> AdapterRef:
        """Forget a name; its weights go when nothing holds them. Raises RequestError for an unknown name."""
        ref = self.get(name)
        del self._refs[name]
        self.release(ref.digest)
        return ref

    def get(self, name: str) -> AdapterRef:
        """The adapter of a name. Raises RequestError(field="adapter") that names close or known ones."""
        ref = self._refs.get(name)
        if ref is None:
            raise RequestError(f"adapter {name!r} is unknown: {self._hint(name)}", field="adapter")
        return ref

    def mix(self, ref: AdapterRef) -> AdapterRef:
        """Make the mixture that a reference with `parts` describes; `weights` has it while in use or kept.

        Raises RequestError if a part is not in the store or cannot be mixed, or the pool cannot hold the sum.
        """
        known = self._mixtures.get(ref.digest)
        if known is not None:
            return replace(known, name=ref.name)
        weights = self._weights.get(ref.digest)
        if weights is None:
            parts = [
                (self._name_of(digest, ref), self._weights.get(digest), scale) for digest, scale in ref.parts
            ]
            held = [(name, part, scale) for name, part, scale in parts if part is not None]
            if len(held) < len(parts):
                raise RequestError(
                    f"an adapter of the mixture {ref.name!r} is not what it was when the request came: "
                    "send it again",
                    field="adapter",
                )
            weights = mix_weights(ref.digest, held)
        try:
            mixed = replace(ref, num_pages=self._num_pages(weights))
        except AdapterError as error:
            raise RequestError(f"adapter {ref.name!r}: {error}", field="adapter") from error
        self._keep(weights)
        self.hold(ref.digest)
        for digest in self._mixtures.put(mixed, num_bytes(weights)):
            self.release(digest)
        return mixed

    def list(self) -> tuple[AdapterRef, ...]:
        """All registered adapters, by name."""
        return tuple(self._refs[name] for name in sorted(self._refs))

    def weights(self, digest: str) -> AdapterWeights:
        """Host weights of a digest that a name or a request holds. Raises EngineError for any other."""
        try:
            return self._weights[digest]
        except KeyError:
            raise EngineError(f"adapter weights {digest[:12]} are not held by any name or request") from None

    def hold(self, digest: str) -> None:
        """Keep the weights of a digest until `release`, whatever becomes of its names."""
        if digest not in self._weights:
            raise EngineError(f"adapter weights {digest[:12]} cannot be held: they are not in the store")
        self._holders[digest] = self._holders.get(digest, 0) + 1

    def release(self, digest: str) -> None:
        """Undo one `hold`; the last one frees the weights."""
        count = self._holders.get(digest, 0)
        if not count:
            raise EngineError(f"adapter weights {digest[:12]} are released more often than held")
        if count > 1:
            self._holders[digest] = count - 1
        else:
            del self._holders[digest], self._weights[digest]

    def _keep(self, weights: AdapterWeights) -> None:
        if weights.digest not in self._weights:
            self._weights[weights.digest] = weights if self._pack is None else self._pack(weights)

    def _name_of(self, digest: str, mixture: AdapterRef) -> str:
        """The name by which a mixture asked for a digest, for errors."""
        names = (name for name, ref in self._refs.items() if ref.digest == digest)
        return next((name for name in names if f"{name}*" in mixture.name), digest[:12])

    def _hint(self, name: str) -> str:
        if not self._refs:
            return "no adapter is registered; add one with add_adapter or --adapter name=path"
        if close := difflib.get_close_matches(str(name), self._refs, n=3):
            return f"did you mean {' or '.join(repr(c) for c in close)}?"
        known = sorted(self._refs)
        more = f" and {len(known) - MAX_NAMES_IN_ERROR} more" if len(known) > MAX_NAMES_IN_ERROR else ""
        return f"known are {', '.join(known[:MAX_NAMES_IN_ERROR])}{more}"


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise AdapterError(
            f"adapter name is {str(name)[:80]!r}; it must be 1 to {MAX_NAME_CHARS} printable characters, "
            "not only spaces"
        )


__all__ = ["AdapterStore"]
