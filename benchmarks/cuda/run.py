"""Measure the engine on one GPU: `python -m benchmarks.cuda.run --out results/cuda --only G1,G2`.

    ceilings      read bandwidth, matmul rate, the vendor's linear layers: floors of everything else
    G1 … G4       plain batch, decode steps, prefill, shared prefix
    G5 G5steps    adapters: throughput and decode steps
    G6 G6ttft     a thousand adapters: throughput under traffic, first tokens
    G6cluster     the same, those that need running adapters first
    transformers  G1 by transformers' continuous batching
    peft          adapters mixed in one batch by peft

Each piece writes NAME.json into the folder, after every figure, and has a hard limit of time; a piece that
fails or hangs costs the others nothing. Pieces that share an engine run in one process. Prints a table, and
one line of JSON at the end. Start with the ceilings: later calls with the same folder read them there.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.cuda import figures, report
from benchmarks.cuda.figures import Figure
from polybatch.bench import meter, results

ENGINE_PIECES = ("G1", "G2", "G3", "G4", "G5", "G5steps", "G6", "G6ttft")
GROUPS = (("ceilings",), ENGINE_PIECES, ("G6cluster",), ("transformers",), ("peft",))
ALL = tuple(piece for group in GROUPS for piece in group)
GRACE_S = 15.0
"""Between the polite end of a piece's time and the end of its process."""


class PieceTimeoutError(BaseException):
    """A piece's time is up. No `Exception`, which engines take for a failure of theirs and go on."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--bundle", type=Path, help="one JSON file besides, with all pieces of the folder")
    parser.add_argument("--only", default=",".join(ALL), help="comma-separated pieces")
    parser.add_argument("--limit-s", type=float, default=180, help="seconds that a piece may take")
    parser.add_argument("--model", default="random:llama-3.1-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quantization")
    parser.add_argument("--memory", default="48GiB", help="of the page pool")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="per step")
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes, for trials")
    parser.add_argument("--traffic-s", type=float, default=20.0, help="per rate of G6")
    parser.add_argument("--rates", default="8,16,40", help="requests per second of G6")
    parser.add_argument("--ttft-rate", type=float, default=8.0)
    parser.add_argument("--many-adapters", type=int, default=1000, help="registered in G6")
    parser.add_argument("--few-adapters", type=int, default=64)
    parser.add_argument("--adapter-cluster", type=int, help="of the engine in all pieces but G6cluster")
    parser.add_argument("--in-process", action="store_true", help="run the pieces here, in this process")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.only.split(",")) - set(ALL)
    if unknown:
        parser.error(f"--only has {', '.join(sorted(unknown))}; pieces are {', '.join(ALL)}")
    return arguments


def supervise(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Run each group of pieces in a process of its own, again for what a dead process left undone."""
    wanted = arguments.only.split(",")
    for group in GROUPS:
        todo = [piece for piece in group if piece in wanted]
        while todo:
            for piece in todo:
                (arguments.out / f"{piece}.json").unlink(missing_ok=True)
            command = [sys.executable, "-m", "benchmarks.cuda.run", *argv]
            limit = len(todo) * (arguments.limit_s + GRACE_S) + 120
            child = [*command, "--in-process", "--only", ",".join(todo)]
            try:
                died = f"the process ended with status {subprocess.run(child, timeout=limit).returncode}"
            except subprocess.TimeoutExpired:
                died = f"the process was ended after {limit:.0f} s"
            undone = [piece for piece in todo if not _is_complete(arguments.out, piece)]
            if undone:
                _mark_dead(arguments, undone[0], died)
            todo = undone[1:]


def _is_complete(out: Path, piece: str) -> bool:
    file = out / f"{piece}.json"
    return file.exists() and json.loads(file.read_text())["seconds"] > 0


def _mark_dead(arguments: argparse.Namespace, piece: str, died: str) -> None:
    """Keep the figures that a piece had when its process ended, and say that it did."""
    file = arguments.out / f"{piece}.json"
    known = json.loads(file.read_text()) if file.exists() else {**context(arguments), "piece": piece}
    results.write(file, {"figures": [], "seconds": 0.0, **known, "error": died})
    _bundle(arguments)


def run_here(arguments: argparse.Namespace) -> None:
    """Run pieces in this process, writing each one's file after every figure."""
    pieces = arguments.only.split(",")
    measured = _pieces(arguments)
    described = context(arguments)
    for piece in pieces:
        start = time.perf_counter()
        found: list[Figure] = []
        error = None
        extra: dict[str, object] = {}
        _set_limit(arguments.limit_s)
        try:
            for figure in measured[piece](extra):
                found.append(figure)
                print(f"{piece}: {figure.key} {figures.number(figure.value)} {figure.unit}", file=sys.stderr)
                # Not complete yet: 0 seconds.
                _write(arguments, piece, found, None, 0.0, {**described, **extra})
        except (Exception, PieceTimeoutError) as failure:  # noqa: BLE001 - the piece's file says what it was
            traceback.print_exc()
            error = f"{type(failure).__name__}: {failure}"[:1000]
        finally:
            _set_limit(None)
        spent = max(0.1, time.perf_counter() - start)
        _write(arguments, piece, found, error, spent, {**described, **extra})


def _write(
    arguments: argparse.Namespace, piece: str, found: list[Figure], error: str | None, spent: float,
    described: dict[str, object],
) -> None:  # fmt: skip
    content = figures.piece_document(piece, found, error, spent, described)
    results.write(arguments.out / f"{piece}.json", content)
    _bundle(arguments)


def _bundle(arguments: argparse.Namespace) -> None:
    if arguments.bundle:
        results.write(arguments.bundle, {"pieces": figures.read(arguments.out)})


def _set_limit(seconds: float | None) -> None:
    """Interrupt after so many seconds; end the process where even that does not get through."""
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    faulthandler.cancel_dump_traceback_later()
    if seconds:
        faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True)


def _on_alarm(number: int, frame: object) -> None:
    raise PieceTimeoutError("the piece's time is up: raise --limit-s or lower --runs")


Piece = Callable[[dict[str, object]], Iterator[Figure]]


def _pieces(arguments: argparse.Namespace) -> dict[str, Piece]:
    """The pieces by name; what they need is imported and loaded when one of them is run."""
    from benchmarks.cuda.floors import Ceilings
    from benchmarks.cuda.pieces import PIECES, Bench, Setup
    from polybatch.bench.roofline import Limits
    from polybatch.models.random_weights import open_random

    options = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Setup) if f.name in arguments}
    if arguments.adapter_cluster is not None:
        options["options"] = {"adapter_cluster": arguments.adapter_cluster}
    setup = Setup(**{**options, "rates": tuple(float(rate) for rate in arguments.rates.split(","))})
    file = arguments.out / "ceilings.json"
    read = json.loads(file.read_text()).get("ceilings") if file.exists() else None
    known = None
    if read is not None:
        limits = Limits(read["limits"]["read_gbs"], read["limits"]["gflops"])
        known = Ceilings(limits, {int(batch): ms for batch, ms in read["linears_ms"].items()})
    bench = Bench(setup, known)

    def ceilings(extra: dict[str, object]) -> Iterator[Figure]:
        from benchmarks.cuda.ceilings import BATCHES, ROWS, measure

        spec = open_random(setup.model.removeprefix("random:"))[0].spec
        readings = measure(spec, setup.device, BATCHES, ROWS // setup.shrink)
        extra |= {"ceilings": asdict(readings.ceilings), "readings": asdict(readings)}
        yield Figure("reads", readings.ceilings.limits.read_gbs, "GB/s")
        yield Figure("matmul", readings.matmul_all_tflops, "TFLOP/s")
        for batch, ms in readings.linears_ms.items():
            yield Figure(f"linears M={batch}", ms, "ms")

    def transformers(extra: dict[str, object]) -> Iterator[Figure]:
        from benchmarks.cuda.peers import continuous_batching

        return continuous_batching(setup)

    def peft(extra: dict[str, object]) -> Iterator[Figure]:
        from benchmarks.cuda.peers import mixed_adapters

        return mixed_adapters(setup)

    def ours(piece: str) -> Piece:
        return lambda extra: PIECES[piece](bench)

    return {
        "ceilings": ceilings,
        "transformers": transformers,
        "peft": peft,
        **{piece: ours(piece) for piece in (*ENGINE_PIECES, "G6cluster")},
    }


def context(arguments: argparse.Namespace) -> dict[str, object]:
    """Where, with what and how the pieces ran."""
    return {
        "format": results.FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": results.portable_command(["python", "-m", "benchmarks.cuda.run", *_without_child_flags()]),
        "model": os.path.basename(arguments.model),
        "precision": arguments.quantization or "bfloat16",
        "device": _device(arguments.device),
        "machine": asdict(meter.machine()),
        "versions": _versions(),
    }


def _without_child_flags() -> list[str]:
    argv = sys.argv[1:]
    return argv[: argv.index("--in-process")] if "--in-process" in argv else argv


def _device(name: str) -> dict[str, object]:
    import torch

    if not name.startswith("cuda"):
        return {"name": name}
    properties = torch.cuda.get_device_properties(name)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def _versions() -> dict[str, str]:
    import importlib.metadata as metadata

    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "peft"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    import polybatch

    return {"polybatch": polybatch.__version__, **found}


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    arguments = parse(given)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.in_process:
        signal.signal(signal.SIGALRM, _on_alarm)
        run_here(arguments)
        return
    supervise(arguments, given)
    documents = figures.read(arguments.out)
    sys.stdout.write(report.markdown(documents))
    found = {figure.key: figure.value for figure in figures.figures_of(documents)}
    print(json.dumps({"out": arguments.out.name, "figures": found}))


if __name__ == "__main__":
    main()
