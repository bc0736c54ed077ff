"""Bring a file to another machine in parts, each small enough for one transfer.

    here:   python -m benchmarks.cuda.carry split model.gguf --into parts
    there:  python -m benchmarks.cuda.carry keep parts --store /var/tmp/kept      (once per part)

`split` writes model.gguf.0 and so on, and model.gguf.json with the sizes and SHA-256 of all parts and of the
whole. `keep` copies what has come into the store; once all parts are there it joins them, checks the whole
and prints its path. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

PART_MIB = 48


def split(file: Path, into: Path, part_bytes: int) -> list[Path]:
    """Write the parts of a file and what they must be; returns the parts."""
    content = file.read_bytes()
    pieces = [content[start : start + part_bytes] for start in range(0, len(content), part_bytes)]
    into.mkdir(parents=True, exist_ok=True)
    described = {"name": file.name, "sha256": _sha256(content), "parts": [_sha256(piece) for piece in pieces]}
    (into / f"{file.name}.json").write_text(json.dumps(described, indent=1) + "\n")
    parts = [into / f"{file.name}.{number}" for number in range(len(pieces))]
    for part, piece in zip(parts, pieces, strict=True):
        part.write_bytes(piece)
    return parts


def keep(folder: Path, store: Path) -> Path | None:
    """Take what has come into the store; the joined file once it is complete, None before.

    Raises ValueError for a part or a whole that is not what was split.
    """
    store.mkdir(parents=True, exist_ok=True)
    for manifest in folder.glob("*.json"):
        shutil.copy(manifest, store)
    (manifest,) = store.glob("*.json")
    described: dict[str, Any] = json.loads(manifest.read_text())
    parts = [store / f"{described['name']}.{number}" for number in range(len(described["parts"]))]
    for part, expected in zip(parts, described["parts"], strict=True):
        arrived = folder / part.name
        if arrived.exists():
            if _sha256(arrived.read_bytes()) != expected:
                raise ValueError(f"{arrived.name} is not the part that was split: bring it again")
            shutil.copy(arrived, part)
    if not all(part.exists() for part in parts):
        return None
    whole = b"".join(part.read_bytes() for part in parts)
    if _sha256(whole) != described["sha256"]:
        raise ValueError(
            f"the parts of {described['name']} do not make the file that was split: bring all again"
        )
    joined: Path = store / described["name"]
    joined.write_bytes(whole)
    return joined


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda.carry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    splitting = commands.add_parser("split")
    splitting.add_argument("file", type=Path)
    splitting.add_argument("--into", type=Path, required=True)
    splitting.add_argument("--part-mib", type=int, default=PART_MIB)
    keeping = commands.add_parser("keep")
    keeping.add_argument("folder", type=Path)
    keeping.add_argument("--store", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "split":
        for part in split(arguments.file, arguments.into, arguments.part_mib * 2**20):
            print(part)
        return
    joined = keep(arguments.folder, arguments.store)
    print(
        joined if joined is not None else "parts are missing still", file=sys.stdout if joined else sys.stderr
    )


if __name__ == "__main__":
    main()
