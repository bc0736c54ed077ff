"""Checks specs in a killable process before the engine sees them; lives in the front, on its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from polybatch.errors import EngineError, PolybatchError, RequestError
from polybatch.structured.spec import StructuredSpec
from polybatch.structured.vocabulary import Vocabulary
from polybatch.structured.worker import HEADER_BYTES, MAX_MEMORY_BYTES, MEMORY_STATUS, frame

logger = logging.getLogger("polybatch.structured")

MAX_CHECK_S = 3.0
MAX_START_S = 30.0
MAX_WAITING = 64
MAX_CACHED = 4_096

_FROM_OUTSIDE = frozenset((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
_NO_MEMORY = b"memory allocation of"
"""What Rust says before it aborts."""


class BusyError(PolybatchError):
    """Too many specs wait to be tried out; the same one may be taken later."""


class _DeathError(Exception):
    """The process ended. status: as `returncode` tells it. said: the end of its stderr."""

    def __init__(self, status: int, said: bytes) -> None:
        super().__init__(status)
        self.status, self.said = status, said

    @property
    def is_from_outside(self) -> bool:
        """Whether somebody else ended it, as the kernel does when the machine is short of memory."""
        return -self.status in _FROM_OUTSIDE

    def __str__(self) -> str:
        how = signal.Signals(-self.status).name if self.status < 0 else f"exit status {self.status}"
        said = self.said.decode("utf-8", "replace").strip().splitlines()
        return f"{how}: {said[-1][:200]}" if said else how


class GrammarChecker:
    """Tries out specs one after the other, each within max_s; remembers verdicts.

    vocabulary: called in a thread when first needed.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary], max_s: float = MAX_CHECK_S) -> None:
        self._vocabulary, self._max_s = vocabulary, max_s
        self._verdicts: OrderedDict[StructuredSpec, str | None] = OrderedDict()
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._num_waiting = 0

    async def check(self, spec: StructuredSpec) -> None:
        """Raises RequestError that says what is wrong with the spec, BusyError, or EngineError."""
        if spec not in self._verdicts:
            if self._num_waiting >= MAX_WAITING:
                raise BusyError(f"{self._num_waiting} grammars wait to be compiled: try again later")
            self._num_waiting += 1
            try:
                async with self._lock:
                    if spec not in self._verdicts:
                        self._verdicts[spec] = await self._ask(spec)
            finally:
                self._num_waiting -= 1
            if len(self._verdicts) > MAX_CACHED:
                self._verdicts.popitem(last=False)
        message = self._verdicts[spec]
        if message is not None:
            raise RequestError(message, field=spec.kind)

    async def close(self) -> None:
        """End the process. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _ask(self, spec: StructuredSpec) -> str | None:
        """What is wrong with a spec. One whose process somebody else ended is tried once more."""
        try:
            return await self._try(spec)
        except _DeathError as death:
            logger.warning("the process that compiles grammars was ended: %s", death)
        try:
            return await self._try(spec)
        except _DeathError as death:
            raise EngineError(f"the process that compiles grammars was ended twice: {death}") from death

    async def _try(self, spec: StructuredSpec) -> str | None:
        """Raises _DeathError where the spec is not to blame."""
        try:
            if self._process is None:
                await self._start()
            async with asyncio.timeout(self._max_s):
                return await self._exchange(spec)
        except TimeoutError:
            await self.close()
            logger.warning("a %s took more than %g s to compile", spec.kind, self._max_s)
            return f"{spec.kind} takes more than {self._max_s:g} s to compile: simplify it"
        except (asyncio.IncompleteReadError, ConnectionError):
            death = await self._bury()
            if death.is_from_outside:
                raise death from None
            logger.warning("a %s ended the process that compiled it: %s", spec.kind, death)
            if death.status == MEMORY_STATUS or _NO_MEMORY in death.said:
                limit = f"{MAX_MEMORY_BYTES >> 30} GiB"
                return f"{spec.kind} takes more than {limit} of memory to compile: simplify it"
            return f"{spec.kind} cannot be used: compiling it failed ({death})"
        except asyncio.CancelledError:
            # An answer on its way would be taken for the next spec's.
            await self.close()
            raise

    async def _bury(self) -> _DeathError:
        """How a process ended that does so by itself."""
        process = self._process
        assert process is not None
        assert process.stderr is not None
        try:
            async with asyncio.timeout(self._max_s):
                said = await process.stderr.read()
                status = await process.wait()
        except TimeoutError:
            # It closed its output and goes on.
            said, status = b"", -signal.SIGKILL
        await self.close()
        return _DeathError(status, said)

    async def _start(self) -> None:
        """Raises RequestError for a model that cannot be constrained, EngineError if the process fails."""
        vocabulary = await asyncio.to_thread(self._vocabulary)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "polybatch.structured.worker",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            # Ctrl-C is for the server, which may still need it.
            start_new_session=True,
            # Threads that numpy starts would take address space, which is limited there.
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(frame(vocabulary))
        # Loading the vocabulary is not on the first spec's account.
        try:
            async with asyncio.timeout(MAX_START_S):
                refusal = await self._exchange(StructuredSpec(choice=("ready",)))
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
            await self.close()
            raise EngineError(f"the process that compiles grammars does not start: {error!r}") from error
        if refusal is not None:
            await self.close()
            raise RequestError(refusal, field="structured")

    async def _exchange(self, spec: StructuredSpec) -> str | None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(frame(spec))
        await process.stdin.drain()
        header = await process.stdout.readexactly(HEADER_BYTES)
        data = await process.stdout.readexactly(int.from_bytes(header, "little"))
        return msgspec.msgpack.decode(data, type=str | None)
