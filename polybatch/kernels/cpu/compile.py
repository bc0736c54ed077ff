"""Compile operations once per machine and keep them on disk.

An operation is a Python function over 64-bit addresses, compiled by numba to a C function. Its
micro-kernels are emitted, so numba's own staleness check (the stamp of one source file) cannot see
what it depends on: the cache folder is therefore named by a hash of every kernel source, the versions
of Python, numba and llvmlite, the processor and the instruction set. Deleting the folder is always safe.

A kernel that is on disk is mapped by `objects.py` and numba is never imported; what only numba can make is
`Deferred` until a kernel has to be compiled. Where objects cannot be mapped, numba's own cache serves.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import time
import types as python_types
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from polybatch.kernels.cpu import objects

logger = logging.getLogger("polybatch.kernels")

_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni")


class Deferred:
    """What only numba can make, made when a kernel that uses it is compiled; most starts never do."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    @functools.cached_property
    def made(self) -> Any:
        return self._make()

    def __call__(self, *args: Any) -> Any:
        """For the type checker: kernels call these; Python itself never does."""
        raise TypeError("a device function exists only inside compiled kernels")


def inner_function(function: Any, bindings: dict[str, Any], variant: str) -> Deferred:
    """A part of a kernel, compiled into its callers, over the same kind of bindings as the kernel itself."""
    bindings = dict(bindings)

    def make() -> Any:
        import numba

        return numba.njit(rebind(function, bindings, variant))

    return Deferred(make)


@functools.cache
def _processor() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo; what Python knows where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {"model name": platform.processor()}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


@functools.cache
def detect_isa() -> str:
    """Name of the widest instruction set that kernels have variants for: "avx512" or "generic".

    "avx512" stands for AVX-512 with its dot products of bfloat16 and of int8.
    """
    flags = _processor().get("flags")
    if flags is not None:
        return "avx512" if set(_AVX512) <= set(flags.split()) else "generic"
    import llvmlite.binding

    features = llvmlite.binding.get_host_cpu_features()
    needed = (name.replace("_", "") for name in _AVX512)
    return "avx512" if all(features.get(name, False) for name in needed) else "generic"


@functools.cache
def _source_digest() -> str:
    processor = [_processor().get(key, "") for key in ("model name", "flags")]
    versions = [platform.python_version(), version("numba"), version("llvmlite")]
    digest = hashlib.sha256("\n".join(versions + processor).encode())
    kernels = Path(__file__).parents[1]
    for path in (*sorted(kernels.glob("cpu/*.py")), *sorted(kernels.glob("*/cpu*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_root() -> Path:
    """Folder of compiled kernels: `$XDG_CACHE_HOME` or `~/.cache`, then polybatch/kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "polybatch" / "kernels"


_addresses: dict[str, int] = {}
_by_numba: list[Any] = []
"""Operations that numba compiled in this process; their code lives as long as they do."""
_missing: list[str] | None = None
_wanted: Collection[str] | None = None


@contextlib.contextmanager
def looking_up() -> Iterator[list[str]]:
    """Inside, nothing is compiled: kernels that are not on disk get address 0 and their names are listed."""
    global _missing
    _missing = []
    try:
        yield _missing
    finally:
        _missing = None


@contextlib.contextmanager
def compiling_only(names: Collection[str]) -> Iterator[None]:
    """Inside, kernels other than these get address 0: one of several processes' share of the work."""
    global _wanted
    _wanted = names
    try:
        yield
    finally:
        _wanted = None


def rebind(function: Callable[..., Any], bindings: dict[str, Any], variant: str) -> Any:
    """The same code with `bindings` in place of globals of those names: one variant of a kernel.

    Everything deferred among the names that the code uses is made now.
    The variant's name becomes part of the compiled symbol. Without it, code loaded from the cache and
    code compiled now can carry equal symbols, and the linker would silently join one to the other.
    """
    names = {**function.__globals__, **bindings}
    for name in function.__code__.co_names:
        if isinstance(value := names.get(name), Deferred):
            names[name] = value.made
    bound = python_types.FunctionType(function.__code__, names, function.__name__)
    bound.__qualname__ = f"{function.__name__}_{re.sub('[^0-9a-zA-Z]', '_', variant)}"
    bound.__module__ = function.__module__
    return bound


def compile_function(
    name: str,
    function: Callable[..., None],
    num_args: int = 4,
    bindings: dict[str, Any] | None = None,
    isa: str | None = None,
) -> int:
    """Address of `function` compiled for int64 arguments, from the cache where possible.

    name: unique per variant; with the sources' hash it is the whole identity of the code.
    num_args: an operation takes addresses of its row and of the step's state, tid and number of threads.
    bindings: micro-kernels and constants of this variant, put in place of the function's globals.
    isa: "avx512" or "generic"; default, what this processor has.
    """
    isa = isa or detect_isa()
    key = f"{name}-{isa}"
    if key in _addresses:
        return _addresses[key]
    folder = cache_root() / f"{_source_digest()}-{isa}"
    path = folder / f"{name}.kernel"
    if objects.is_supported() and path.exists():
        try:
            _addresses[key] = objects.load(path)
            return _addresses[key]
        except objects.ObjectFileError as error:
            logger.warning("%s: compiling it again", error)
    if _missing is not None:
        _missing.append(name)
    if _missing is not None or (_wanted is not None and name not in _wanted):
        return 0
    started = time.perf_counter()
    compiled = _compile(rebind(function, bindings or {}, key), num_args, path.with_suffix(""))
    _addresses[key] = _keep(compiled, path)
    seconds = time.perf_counter() - started
    if seconds > 1.0:
        logger.info("compiled %s for %s in %.1f s; kept in %s", name, isa, seconds, folder)
    return _addresses[key]


def _compile(bound: Any, num_args: int, folder: Path) -> Any:
    """numba's C function, from numba's own cache in `folder` where it is there."""
    import numba
    from numba.core import types

    # numba's own annotations do not know these
    config: Any = numba.config
    cfunc: Any = numba.cfunc
    signature = types.void(*[types.int64] * num_args)
    # No closures: numba hashes closure cells into its index, and emitted kernels hash anew in
    # every process. Globals are not hashed; the folder's name stands for them.
    previous = config.CACHE_DIR
    config.CACHE_DIR = str(folder)
    try:
        return cfunc(signature, nopython=True, cache=True)(bound)
    finally:
        config.CACHE_DIR = previous


def _keep(compiled: Any, path: Path) -> int:
    """Write an operation's object beside numba's cache and map it; numba's own address where that fails."""
    if objects.is_supported():
        try:
            objects.save(path, compiled.native_name, compiled._library._get_compiled_object())
            address = objects.load(path)
            shutil.rmtree(path.with_suffix(""))  # numba's copy, which nobody needs any more
            return address
        except objects.ObjectFileError as error:
            path.unlink()
            logger.warning("%s: starting takes numba", error)
    _by_numba.append(compiled)
    return int(compiled.address)
