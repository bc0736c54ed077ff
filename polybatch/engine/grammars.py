"""Requests that wait for their grammar, which a thread compiles so that the engine goes on stepping."""

from __future__ import annotations

import contextlib
import queue
from concurrent.futures import ThreadPoolExecutor

from polybatch.engine import messages as ms
from polybatch.errors import RequestError
from polybatch.request import FinishReason
from polybatch.structured.grammar import GrammarCompiler
from polybatch.structured.spec import StructuredSpec


class WaitingForGrammars:
    """Holds `Submit` messages back and puts them into the inbox again once their grammar is known."""

    def __init__(self, grammars: GrammarCompiler, inbox: queue.SimpleQueue[ms.ToEngine]) -> None:
        self._grammars, self._inbox = grammars, inbox
        self._held: dict[str, ms.Submit] = {}
        self._returning: set[int] = set()
        self._thread: ThreadPoolExecutor | None = None

    def holds(self, message: ms.Submit) -> bool:
        """Whether a message is none of the loop's business for now, or any more."""
        request_id, spec = message.request.request_id, message.request.params.structured
        if id(message) in self._returning:
            self._returning.discard(id(message))
            # Else it was aborted while it waited.
            is_wanted = self._held.get(request_id) is message
            if is_wanted:
                del self._held[request_id]
            return not is_wanted
        if spec is None or self._grammars.is_known(spec):
            return False
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "grammars")
        self._held[request_id] = message
        self._thread.submit(self._compile, message, spec)
        return True

    def abort(self, request_id: str) -> ms.RequestDelta | None:
        """Forget a message that is held; returns the end of its request, None if it is not held."""
        message = self._held.pop(request_id, None)
        if message is None:
            return None
        ends = [
            ms.CompletionDelta(index, "", [], finish_reason=FinishReason.ABORT)
            for index in range(message.request.params.n)
        ]
        return ms.RequestDelta(request_id, ends, is_finished=True)

    def _compile(self, message: ms.Submit, spec: StructuredSpec) -> None:
        """Thread. An error is remembered by the compiler, and raised where the request is submitted."""
        try:
            with contextlib.suppress(RequestError):
                self._grammars.compile(spec)
        finally:
            self._returning.add(id(message))
            self._inbox.put(message)
