"""Compile operations once per machine and keep them on disk.

An operation is a Python function over 64-bit addresses, compiled by numba to a C function. Its
micro-kernels are emitted, so numba's own staleness check (the stamp of one source file) cannot see
what it depends on: the cache folder is therefore named by a hash of every kernel source, the versions
of numba and llvmlite, and the instruction set. Deleting the folder is always safe.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import time
import types as python_types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
from numba.core import types

logger = logging.getLogger("polybatch.kernels")

# numba's own annotations do not know these
_cfunc: Any = numba.cfunc
_numba_config: Any = numba.config

OP_SIGNATURE = types.void(types.int64, types.int64, types.int64, types.int64)
"""op(args, state, tid, num_threads): addresses of the operation's row and of the step's state."""


@functools.cache
def detect_isa() -> str:
    """Name of the widest instruction set that kernels have variants for: "avx512" or "generic".

    "avx512" stands for AVX-512 with its dot products of bfloat16 and of int8.
    """
    features = llvmlite.binding.get_host_cpu_features()
    needed = ("avx512f", "avx512bw", "avx512vl", "avx512bf16", "avx512vnni")
    return "avx512" if all(features.get(name, False) for name in needed) else "generic"


@functools.cache
def _source_digest() -> str:
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    kernels = Path(__file__).parents[1]
    for path in (*sorted(kernels.glob("cpu/*.py")), *sorted(kernels.glob("*/cpu*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_root() -> Path:
    """Folder of compiled kernels: `$XDG_CACHE_HOME` or `~/.cache`, then polybatch/kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "polybatch" / "kernels"


_compiled: dict[str, Any] = {}


def rebind(function: Callable[..., Any], bindings: dict[str, Any], variant: str) -> Any:
    """The same code with `bindings` in place of globals of those names: one variant of a kernel.

    The variant's name becomes part of the compiled symbol. Without it, code loaded from the cache and
    code compiled now can carry equal symbols, and the linker would silently join one to the other.
    """
    bound = python_types.FunctionType(
        function.__code__, {**function.__globals__, **bindings}, function.__name__
    )
    bound.__qualname__ = f"{function.__name__}_{re.sub('[^0-9a-zA-Z]', '_', variant)}"
    bound.__module__ = function.__module__
    return bound


def compile_function(
    name: str,
    function: Callable[..., None],
    signature: Any = OP_SIGNATURE,
    bindings: dict[str, Any] | None = None,
    isa: str | None = None,
) -> int:
    """Address of `function` compiled for `signature`, from the cache where possible.

    name: unique per variant; with the sources' hash it is the whole identity of the code.
    bindings: micro-kernels and constants of this variant, put in place of the function's globals.
    isa: "avx512" or "generic"; default, what this processor has.
    """
    isa = isa or detect_isa()
    key = f"{name}-{isa}"
    if key not in _compiled:
        # No closures: numba hashes closure cells into its index, and emitted kernels hash anew in
        # every process. Globals are not hashed; the folder's name stands for them.
        bound = rebind(function, bindings or {}, key)
        folder = cache_root() / f"{_source_digest()}-{isa}" / name
        started = time.perf_counter()
        previous = _numba_config.CACHE_DIR
        _numba_config.CACHE_DIR = str(folder)
        try:
            compiled = _cfunc(signature, nopython=True, cache=True)(bound)
        finally:
            _numba_config.CACHE_DIR = previous
        seconds = time.perf_counter() - started
        if seconds > 1.0:
            logger.info("compiled %s for %s in %.1f s; kept in %s", name, isa, seconds, folder.parent)
        _compiled[key] = compiled
    return int(_compiled[key].address)
