"""A process that tries out specs, so that one that takes too long or too much can be killed alone.

    python -m polybatch.structured.worker

stdin: frames of four bytes of length and msgpack, first a `Vocabulary`, then specs. stdout: a frame per spec,
null or what is wrong with it. Imports no torch.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import BinaryIO

import msgspec

from polybatch.errors import RequestError
from polybatch.structured.grammar import GrammarCompiler
from polybatch.structured.spec import StructuredSpec
from polybatch.structured.vocabulary import Vocabulary

MAX_MEMORY_BYTES = 2 << 30
MEMORY_STATUS = 77
"""Exit status of a process whose memory did not suffice."""
HEADER_BYTES = 4


def frame(message: object) -> bytes:
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(HEADER_BYTES, "little") + data


def _receive(stream: BinaryIO) -> bytes | None:
    header = stream.read(HEADER_BYTES)
    return stream.read(int.from_bytes(header, "little")) if len(header) == HEADER_BYTES else None


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    first = _receive(sys.stdin.buffer)
    if first is None:
        return
    vocabulary = msgspec.msgpack.decode(first, type=Vocabulary)
    compiler = GrammarCompiler(lambda: vocabulary)
    while (data := _receive(sys.stdin.buffer)) is not None:
        answer: str | None = None
        try:
            compiler.compile(msgspec.msgpack.decode(data, type=StructuredSpec))
        except RequestError as error:
            answer = str(error)
        sys.stdout.buffer.write(frame(answer))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    try:
        main()
    except MemoryError:
        os._exit(MEMORY_STATUS)
