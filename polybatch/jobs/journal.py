"""The journal of a job: which lines of the input are answered, in SQLite beside the output.

It is an index over the output file and never the truth: results live in the output alone, which is
written and synced first. A journal that is behind, or gone, is brought up to date from the output.
Memory is bounded by SQLite's page cache, whatever the number of rows.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from polybatch.errors import ConfigError

SCHEMA_VERSION = "1"
CACHE_KIB = 4 << 10
INDEX_BATCH = 2_000
PENDING_BATCH = 1_000
MAX_DUPLICATES_SHOWN = 5

PENDING, OK, ERROR = 0, 1, 2

_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rows (
    line INTEGER PRIMARY KEY,
    custom_id BLOB UNIQUE,
    state INTEGER NOT NULL DEFAULT 0
);
"""


def digest(custom_id: str) -> bytes:
    """16 bytes that stand for a custom_id, so that the index does not grow with its length."""
    return hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Journal:
    """One job's journal.

    facts: what the job is (input, model, parameters), as strings, written once the index is complete.
    rows: line number, digest of its custom_id (NULL where it has none), state.
    output_bytes: the output is known to be whole up to here, and its rows are marked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            self._db.executescript(_TABLES)
            self._db.execute("SELECT COUNT(*) FROM facts").fetchone()
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"{path} is not a usable journal ({error}): delete it, and it is rebuilt from the output"
            ) from error

    def close(self) -> None:
        self._db.close()

    def facts(self) -> dict[str, str] | None:
        """What the job is, or None while its index is not complete."""
        rows = dict(self._db.execute("SELECT name, value FROM facts"))
        return rows if rows.pop("journal", None) == SCHEMA_VERSION else None

    def index(self, rows: Iterable[tuple[int, str | None]]) -> None:
        """Record every line and its custom_id, all pending. Starts over if an index is there.

        Raises ConfigError that names both lines of each duplicate custom_id.
        """
        self._db.executescript("DELETE FROM facts; DELETE FROM rows;")
        duplicates: list[str] = []
        batch: list[tuple[int, str | None]] = []
        for row in rows:
            batch.append(row)
            if len(batch) >= INDEX_BATCH:
                duplicates += self._insert(batch)
                batch.clear()
            if len(duplicates) >= MAX_DUPLICATES_SHOWN:
                break
        duplicates += self._insert(batch)
        if duplicates:
            raise ConfigError(
                "custom_id must be unique: "
                + "; ".join(duplicates[:MAX_DUPLICATES_SHOWN])
                + ": rename one of each"
            )

    def _insert(self, batch: list[tuple[int, str | None]]) -> list[str]:
        keyed = [(line, None if custom_id is None else digest(custom_id)) for line, custom_id in batch]
        self._db.execute("BEGIN")
        try:
            self._db.executemany("INSERT INTO rows (line, custom_id) VALUES (?, ?)", keyed)
        except sqlite3.IntegrityError:
            self._db.execute("ROLLBACK")
        else:
            self._db.execute("COMMIT")
            return []
        duplicates = []
        for (line, custom_id), (_, key) in zip(batch, keyed, strict=True):
            found = self._db.execute("SELECT line FROM rows WHERE custom_id = ?", (key,)).fetchone()
            if found is not None:
                duplicates.append(f"{custom_id!r} is on lines {found[0]} and {line}")
            else:
                self._db.execute("INSERT INTO rows (line, custom_id) VALUES (?, ?)", (line, key))
        return duplicates

    def begin(self, facts: Mapping[str, str]) -> None:
        """Declare the index complete and say what the job is."""
        with self._db:
            self._db.execute("BEGIN")
            self._set("journal", SCHEMA_VERSION)
            self._set("output_bytes", "0")
            for name, value in facts.items():
                self._set(name, value)

    def _set(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", (name, value))

    @property
    def output_bytes(self) -> int:
        row = self._db.execute("SELECT value FROM facts WHERE name = 'output_bytes'").fetchone()
        return 0 if row is None else int(row[0])

    def mark(self, states: Mapping[int, int], output_bytes: int) -> None:
        """Record finished lines, line -> OK or ERROR, in one transaction.

        The output must already be synced up to output_bytes.
        """
        with self._db:
            self._db.execute("BEGIN")
            self._db.executemany(
                "UPDATE rows SET state = ? WHERE line = ?", ((state, line) for line, state in states.items())
            )
            self._set("output_bytes", str(output_bytes))

    def forget_results(self) -> None:
        """Mark every line pending again, before the output is read from its start."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute("UPDATE rows SET state = 0 WHERE state != 0")
            self._set("output_bytes", "0")

    def row(self, line: int) -> tuple[bytes | None, int] | None:
        """(digest of the custom_id, state) of a line, or None if the input has no such row."""
        row = self._db.execute("SELECT custom_id, state FROM rows WHERE line = ?", (line,)).fetchone()
        return None if row is None else (row[0], row[1])

    def pending(self) -> Iterator[int]:
        """Numbers of the lines without a result, ascending; lines may be marked meanwhile."""
        after = -1
        while True:
            page = self._db.execute(
                "SELECT line FROM rows WHERE line > ? AND state = 0 ORDER BY line LIMIT ?",
                (after, PENDING_BATCH),
            ).fetchall()
            if not page:
                return
            yield from (line for (line,) in page)
            after = page[-1][0]

    def counts(self) -> tuple[int, int, int]:
        """Rows in all, rows with a result, rows with an error line."""
        row = self._db.execute(
            "SELECT COUNT(*), SUM(state = ?), SUM(state = ?) FROM rows", (OK, ERROR)
        ).fetchone()
        return row[0], row[1] or 0, row[2] or 0
