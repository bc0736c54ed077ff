"""What the front needs of a model without running it: its tokenizer, its fingerprint, adapters by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from polybatch.adapters.weights import AdapterWeights
from polybatch.engine.ports import TextTokenizer
from polybatch.engine.stub import is_stub
from polybatch.errors import EngineError, RequestError
from polybatch.execution.fake import ByteTokenizer
from polybatch.models.loader import load_model
from polybatch.request import AdapterRef

MAX_NAMES_IN_ERROR = 10


@dataclass(frozen=True, slots=True)
class FrontModel:
    """tokenizer: None for models without. fingerprint: equal for equal checkpoints."""

    tokenizer: TextTokenizer | None
    fingerprint: str


def open_front(model: str) -> FrontModel:
    """Open a model's tokenizer; its weights are only looked at. Raises ModelError."""
    if is_stub(model):
        return FrontModel(ByteTokenizer(), model)
    loaded = load_model(model)
    return FrontModel(loaded.tokenizer, loaded.fingerprint)


class AdapterTable:
    """Adapters that the engine process has, as an `AdapterSource` for the door: names only, no weights."""

    def __init__(self) -> None:
        self._refs: dict[str, AdapterRef] = {}

    def replace(self, refs: Iterable[AdapterRef]) -> None:
        self._refs = {ref.name: ref for ref in refs}

    def put(self, ref: AdapterRef) -> None:
        self._refs[ref.name] = ref

    def drop(self, name: str) -> None:
        self._refs.pop(name, None)

    def list(self) -> tuple[AdapterRef, ...]:
        return tuple(self._refs[name] for name in sorted(self._refs))

    def get(self, name: str) -> AdapterRef:
        """Raises RequestError that says which names there are."""
        if name in self._refs:
            return self._refs[name]
        known = sorted(self._refs)
        more = f" and {len(known) - MAX_NAMES_IN_ERROR} more" if len(known) > MAX_NAMES_IN_ERROR else ""
        shown = ", ".join(known[:MAX_NAMES_IN_ERROR]) or "none"
        raise RequestError(f"adapter {name!r} is unknown; known are {shown}{more}", field="adapter")

    def mix(self, ref: AdapterRef) -> AdapterRef:
        raise EngineError("the front mixes nothing")

    def weights(self, digest: str) -> AdapterWeights:
        raise EngineError("the front holds no weights")

    def hold(self, digest: str) -> None:
        raise EngineError("the front holds no weights")

    def release(self, digest: str) -> None:
        raise EngineError("the front holds no weights")
