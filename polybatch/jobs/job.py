"""A job: an input file, an output file and a journal that agree with each other.

    open_job -> index the input (refusing duplicates) or compare it with the journal
             -> repair the output -> Job, ready to be continued

What a job *is* (input, model, adapters, parameters that change answers) is written to the journal
when it begins; continuing it as something else is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from polybatch.errors import ConfigError
from polybatch.jobs.journal import Journal
from polybatch.jobs.lines import Line, custom_id_of, read_lines
from polybatch.jobs.output import OutputFile

SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Job:
    """An opened job. fingerprint: `system_fingerprint` of its results. was_resumed: OUT was there."""

    input: Path
    output: OutputFile
    journal: Journal
    fingerprint: str
    was_resumed: bool

    def pending_lines(self) -> Iterator[Line]:
        """The input lines that still need a result, in order; holds one line at a time."""
        pending = self.journal.pending()
        wanted = next(pending, None)
        with open(self.input, "rb") as stream:
            for line in read_lines(stream):
                if wanted is None:
                    return
                if line.number == wanted:
                    yield line
                    wanted = next(pending, None)

    def close(self) -> None:
        self.journal.close()
        self.output.close()


def open_job(
    input_path: Path,
    output_path: Path,
    facts: Mapping[str, str],
    *,
    resume: bool = True,
    overwrite: bool = False,
    is_served: bool = False,
) -> Job:
    """Begin a job or continue one.

    facts: name -> value of everything besides the input that changes answers.
    overwrite: drop what an earlier run wrote. resume: False refuses an output that exists.
    is_served: a server answers the rows, and its `system_fingerprint` is its own.
    Raises ConfigError: input unreadable or with duplicate custom_ids, output of another job or in
    use, journal of a job with other facts. Nothing is written to the output in these cases.
    """
    if not input_path.is_file():
        raise ConfigError(f"input {input_path} is not a file")
    existed = output_path.exists()
    if existed and output_path.samefile(input_path):
        raise ConfigError(f"input and output are both {input_path}: choose another output")
    if existed and not (resume or overwrite):
        raise ConfigError(f"{output_path} exists: continue it with --resume or replace it with --overwrite")
    output = OutputFile(output_path)
    journal: Journal | None = None
    try:
        if overwrite or output.size == 0:
            _discard(output, journal_path(output_path))
        journal = Journal(journal_path(output_path))
        all_facts = {"input": _file_digest(input_path), **facts}
        fingerprint = job_fingerprint(facts)
        known = journal.facts()
        if known is None:
            journal.index(_index_rows(input_path))
            journal.begin(all_facts)
        else:
            known.pop("output_bytes", None)
            _check_same(output_path, known, all_facts)
        output.recover(journal, None if is_served else fingerprint)
    except BaseException:
        if journal is not None:
            journal.close()
        if not existed and output.size == 0:
            output_path.unlink()
            remove_journal(journal_path(output_path))
        output.close()
        raise
    return Job(input_path, output, journal, fingerprint, was_resumed=output.size > 0)


def journal_path(output: Path) -> Path:
    return output.with_name(output.name + ".journal.sqlite")


def remove_journal(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _discard(output: OutputFile, journal: Path) -> None:
    remove_journal(journal)
    output.truncate(0)


def _index_rows(path: Path) -> Iterator[tuple[int, str | None]]:
    with open(path, "rb") as stream:
        for line in read_lines(stream):
            yield line.number, custom_id_of(line)


def _check_same(output: Path, known: Mapping[str, str], now: Mapping[str, str]) -> None:
    for name in sorted(known.keys() | now.keys()):
        before, after = known.get(name, "unset"), now.get(name, "unset")
        if before != after:
            change = "has changed" if name == "input" else f"was {before}, now it is {after}"
            raise ConfigError(
                f"cannot continue {output}: its {name} {change}. Run it as before, choose another output, "
                "or start over with --overwrite"
            )


def job_fingerprint(facts: Mapping[str, str]) -> str:
    """Short name for everything besides the input that changes answers."""
    text = "\n".join(f"{name}={facts[name]}" for name in sorted(facts))
    return "pb_" + hashlib.sha256(text.encode()).hexdigest()[:12]


def _file_digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_fingerprint(name_or_path: str) -> str:
    """Recognise a checkpoint by name or, if it is a file or folder, by content without reading it all.

    Names, sizes, and the first and last MiB of each file; names are taken as they are.
    """
    path = Path(name_or_path)
    if not path.exists():
        return name_or_path
    hasher = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    for file in files:
        size = file.stat().st_size
        hasher.update(f"{file.name}:{size}\n".encode())
        with open(file, "rb") as stream:
            hasher.update(stream.read(SAMPLE_BYTES))
            stream.seek(max(0, size - SAMPLE_BYTES))
            hasher.update(stream.read(SAMPLE_BYTES))
    return f"{path.name}:{hasher.hexdigest()[:16]}"
