"""What the server remembers of files and batches: records in SQLite, contents as files beside it.

    DATA_DIR/batches.sqlite   records, one row each
    DATA_DIR/files/ID         contents of uploaded files and of outputs
    DATA_DIR/work/            uploads that are not whole yet, and batches that are not over yet

A content is there before its record, and goes after it: what has no record is rubbish of a crash, removed at
the next start. Every method may be called from any thread.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import threading
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from polybatch.errors import ConfigError
from polybatch.server.batches.objects import Batch, StoredFile

T = TypeVar("T", Batch, StoredFile)

# seq: order of creation. is_over: of a batch that will not change any more.
_TABLES = """
CREATE TABLE IF NOT EXISTS files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL,
    size INTEGER NOT NULL, purpose TEXT NOT NULL, expires_s INTEGER, record BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS files_of ON files (tenant, seq);
CREATE TABLE IF NOT EXISTS batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL,
    is_over INTEGER NOT NULL, record BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS batches_of ON batches (tenant, seq);
"""


class Store:
    """Records and contents below one folder, which belongs to one server at a time.

    Raises ConfigError if the folder cannot be used or another server uses it.
    """

    def __init__(self, folder: Path) -> None:
        self._files, self.work = folder / "files", folder / "work"
        self._lock = threading.Lock()
        try:
            for path in (folder, self._files, self.work):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._held = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"--data-dir {folder} cannot be used: {error}") from error
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._db = sqlite3.connect(
                folder / "batches.sqlite", isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_TABLES)
        except OSError as error:
            os.close(self._held)
            raise ConfigError(f"--data-dir {folder} is in use by another server: choose another") from error
        except sqlite3.DatabaseError as error:
            os.close(self._held)
            raise ConfigError(f"{folder / 'batches.sqlite'} is not usable: {error}") from error
        self._remove_rubbish()

    def close(self) -> None:
        with self._lock:
            self._db.close()
        os.close(self._held)

    def _remove_rubbish(self) -> None:
        known = {id for (id,) in self._db.execute("SELECT id FROM files")}
        for path in self._files.iterdir():
            if path.name not in known:
                path.unlink()
        unfinished = {batch.id for batch in self.unfinished_batches()}
        for path in self.work.iterdir():
            if path.name not in unfinished:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def path_of(self, file_id: str) -> Path:
        """Where a file's content lies. file_id: of a record, never of a client."""
        return self._files / file_id

    def upload_path(self) -> Path:
        """A new place for a content that is on its way."""
        return self.work / f"upload-{uuid.uuid4().hex}"

    def add_file(self, file: StoredFile, content: Path) -> None:
        """Take in a content that lies in `work`, with its record."""
        self.place(file.id, content)
        try:
            with self._lock:
                self._insert_file(file)
        except sqlite3.Error:
            self.path_of(file.id).unlink()
            raise

    def place(self, file_id: str, content: Path) -> None:
        """Take in a content that lies in `work`; its record is to follow."""
        _sync(content)
        content.rename(self.path_of(file_id))
        _sync(self._files)

    def _insert_file(self, file: StoredFile) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO files (id, tenant, size, purpose, expires_s, record) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (file.id, file.tenant, file.size, file.purpose, file.expires_s, msgspec.json.encode(file)),
        )

    def file(self, file_id: str, tenant: str, now_s: float) -> StoredFile | None:
        """A file of the tenant that has not expired."""
        with self._lock:
            row = self._db.execute(
                "SELECT record FROM files WHERE id = ? AND tenant = ? AND IFNULL(expires_s > ?, 1)",
                (file_id, tenant, now_s),
            ).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=StoredFile)

    def files(
        self,
        tenant: str,
        now_s: float,
        *,
        purpose: str | None,
        after: str | None,
        limit: int,
        is_newest_first: bool,
    ) -> list[StoredFile]:
        """Files of a tenant in order of creation, beginning after one of them."""
        where = "IFNULL(expires_s > ?, 1)"
        values: list[float | str] = [now_s]
        if purpose is not None:
            where += " AND purpose = ?"
            values.append(purpose)
        return self._page("files", StoredFile, tenant, where, values, after, limit, is_newest_first)

    def usage(self, tenant: str) -> tuple[int, int]:
        """Number and bytes of a tenant's files."""
        with self._lock:
            row = self._db.execute(
                "SELECT COUNT(*), SUM(size) FROM files WHERE tenant = ?", (tenant,)
            ).fetchone()
        return row[0], row[1] or 0

    def delete_file(self, file_id: str) -> None:
        with self._lock:
            self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path_of(file_id).unlink(missing_ok=True)

    def delete_expired(self, now_s: float) -> int:
        """Delete files whose time is over; returns how many."""
        with self._lock:
            rows = self._db.execute("SELECT id FROM files WHERE expires_s <= ?", (now_s,)).fetchall()
        for (file_id,) in rows:
            self.delete_file(file_id)
        return len(rows)

    def add_batch(self, batch: Batch) -> None:
        """Keep a new batch, its input linked so that deleting the file does it no harm."""
        folder = self.work / batch.id
        folder.mkdir()
        try:
            os.link(self.path_of(batch.input_file_id), folder / "input.jsonl")
            _sync(folder)
            with self._lock:
                self._db.execute(
                    "INSERT INTO batches (id, tenant, is_over, record) VALUES (?, ?, 0, ?)",
                    (batch.id, batch.tenant, msgspec.json.encode(batch)),
                )
        except (OSError, sqlite3.Error):
            shutil.rmtree(folder)
            raise

    def update_batch(self, batch: Batch, outputs: Iterable[StoredFile] = ()) -> None:
        """Keep what has become of a batch, in one transaction with its output files."""
        with self._lock:
            self._db.execute("BEGIN")
            try:
                for file in outputs:
                    self._insert_file(file)
                self._db.execute(
                    "UPDATE batches SET is_over = ?, record = ? WHERE id = ?",
                    (batch.status.is_over, msgspec.json.encode(batch), batch.id),
                )
                self._db.execute("COMMIT")
            except sqlite3.Error:
                # Some errors have ended the transaction themselves.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def remove_work(self, batch: Batch) -> None:
        """Forget how a batch that is over was worked on."""
        folder = self.work / batch.id
        if folder.exists():
            shutil.rmtree(folder)

    def batch(self, batch_id: str, tenant: str) -> Batch | None:
        with self._lock:
            row = self._db.execute(
                "SELECT record FROM batches WHERE id = ? AND tenant = ?", (batch_id, tenant)
            ).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=Batch)

    def batches(self, tenant: str, *, after: str | None, limit: int) -> list[Batch]:
        """Batches of a tenant, newest first, beginning after one of them."""
        return self._page("batches", Batch, tenant, "1", [], after, limit, True)

    def unfinished_batches(self) -> list[Batch]:
        """Of all tenants, in order of creation."""
        with self._lock:
            rows = self._db.execute("SELECT record FROM batches WHERE NOT is_over ORDER BY seq").fetchall()
        return [msgspec.json.decode(record, type=Batch) for (record,) in rows]

    def _page(
        self,
        table: str,
        kind: type[T],
        tenant: str,
        where: str,
        values: list[float | str],
        after: str | None,
        limit: int,
        is_newest_first: bool,
    ) -> list[T]:
        order, sign = ("DESC", "<") if is_newest_first else ("ASC", ">")
        values = [tenant, *values]
        if after is not None:
            # A stranger's id is like one that does not exist: nothing comes after it.
            where += f" AND seq {sign} (SELECT seq FROM {table} WHERE id = ? AND tenant = ?)"
            values += [after, tenant]
        query = f"SELECT record FROM {table} WHERE tenant = ? AND {where} ORDER BY seq {order} LIMIT ?"
        with self._lock:
            rows = self._db.execute(query, (*values, limit)).fetchall()
        return [msgspec.json.decode(record, type=kind) for (record,) in rows]


def _sync(path: Path) -> None:
    """Have a file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
