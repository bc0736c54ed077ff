"""Who watches the requests of an `AsyncLLM` go by: metrics, traces."""

from __future__ import annotations

from polybatch.engine.messages import RequestDelta
from polybatch.request import Request


class Observer:
    """Sees nothing; subclasses do. Called on the event loop for every token, so be quick and never raise.

    Every request that was submitted ends once: in a delta that `is_finished`, or in `dropped`.
    """

    def submitted(self, request: Request) -> None:
        """The engine was given a request."""

    def received(self, request: Request, delta: RequestDelta) -> None:
        """A request gained something, or ended."""

    def dropped(self, request: Request, *, is_failed: bool) -> None:
        """A request ended without a last delta: the engine failed, or nobody listens any more."""
