"""What the engine needs of its neighbours, so that stubs can take their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from polybatch.detokenizer import DecodesTokens
from polybatch.request import AdapterRef

if TYPE_CHECKING:  # it brings torch, which --help need not wait for
    from polybatch.adapters.weights import AdapterWeights


class TextTokenizer(DecodesTokens, Protocol):
    """Text to tokens and back; `polybatch.tokenizer.Tokenizer` is the real one."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def token_text(self, token_id: int) -> str: ...

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str: ...


class AdapterSource(Protocol):
    """Registered adapters; `polybatch.adapters.store.AdapterStore` is the real one."""

    def get(self, name: str) -> AdapterRef:
        """Raises RequestError for an unknown name."""
        ...

    def mix(self, ref: AdapterRef) -> AdapterRef:
        """Make a mixture's weights; returns it with its pages. Raises RequestError."""
        ...

    def weights(self, digest: str) -> AdapterWeights: ...

    def hold(self, digest: str) -> None: ...

    def release(self, digest: str) -> None: ...
