"""The output file of a job: append-only JSON lines behind a lock, repaired after a crash.

Law: after `recover`, the file is a sequence of complete output lines of this job, no input line
answered twice, and the journal marks exactly those. Only an unfinished last line is ever cut, or
what follows the last journaled byte and is not a complete line (a block that a power cut lost).
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from polybatch.errors import ConfigError, EngineError
from polybatch.jobs.journal import ERROR, OK, PENDING, Journal, digest
from polybatch.jobs.lines import ID_PREFIX, OutputRecord, decode_output

RECOVER_BATCH = 1_000
_LINE_START = b'{"id":"' + ID_PREFIX.encode()


class OutputFile:
    """An output file open for appending, locked against a second process.

    size: bytes written so far, torn ones never included.
    Raises ConfigError if it cannot be opened or another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise ConfigError(
                f"{path} is being written by another process: wait for it or choose another output"
            ) from error
        self.size = os.fstat(self._fd).st_size

    def append(self, data: bytes) -> None:
        """Hand whole lines to the operating system; they survive this process from here on."""
        view = memoryview(data)
        while view:
            try:
                written = os.write(self._fd, view)
            except OSError as error:
                # Half a line must not stay behind for the next append to follow.
                os.ftruncate(self._fd, self.size)
                raise EngineError(
                    f"cannot write {self.path}: {error.strerror}; make room and run the same command again"
                ) from error
            view = view[written:]
        self.size += len(data)

    def sync(self) -> None:
        """Reach the disk: what is written survives the machine from here on."""
        os.fsync(self._fd)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        os.fsync(self._fd)
        self.size = size

    def close(self) -> None:
        os.close(self._fd)

    def recover(self, journal: Journal, fingerprint: str | None) -> None:
        """Bring file and journal into agreement after any interruption.

        fingerprint: `system_fingerprint` of this job's results; others are refused. None where it is up to a
        server.
        Raises ConfigError if the file holds something that is not this job's output.
        """
        start = journal.output_bytes
        if start > self.size:
            journal.forget_results()
            start = 0
        states: dict[int, int] = {}
        offset = start
        with open(self.path, "rb") as stream:
            stream.seek(start)
            for data in stream:
                record = decode_output(data) if data.endswith(b"\n") else None
                if record is None:
                    self._check_torn(data, start)
                    self.truncate(offset)
                    break
                offset += len(data)
                self._check_ours(record, journal, fingerprint, states)
                states[record.number] = ERROR if record.is_error else OK
                if len(states) >= RECOVER_BATCH:
                    journal.mark(states, offset)
                    states.clear()
        self.sync()
        journal.mark(states, offset)

    def _check_torn(self, data: bytes, start: int) -> None:
        """What is not a line may go if the journal vouches for all before it, or if it looks like ours."""
        is_ours = not data.endswith(b"\n") and (data.startswith(_LINE_START) or _LINE_START.startswith(data))
        if start == 0 and not is_ours:
            raise ConfigError(
                f"{self.path} holds something else than this job's results: "
                "choose another output, or replace it with --overwrite"
            )

    def _check_ours(
        self, record: OutputRecord, journal: Journal, fingerprint: str | None, states: dict[int, int]
    ) -> None:
        row = journal.row(record.number)
        key = None if record.custom_id is None else digest(record.custom_id)
        if row is None or row[0] != key:
            raise ConfigError(
                f"{self.path} answers line {record.number} with custom_id {record.custom_id!r}, which the "
                "input does not have there: it is another job's; choose another output or use --overwrite"
            )
        if fingerprint is not None and record.fingerprint not in (None, fingerprint):
            raise ConfigError(
                f"{self.path} was written with another model, adapters or parameters "
                f"({record.fingerprint}, now {fingerprint}): run with the old ones, choose another output, "
                "or start over with --overwrite"
            )
        if row[1] != PENDING or record.number in states:
            raise ConfigError(
                f"{self.path} answers line {record.number} twice: it was edited; start over with --overwrite"
            )
