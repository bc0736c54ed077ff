"""Compile Triton's kernels side by side before they are needed."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import triton
from triton.runtime.jit import JITFunction


@contextmanager
def rehearsal(num_threads: int) -> Iterator[None]:
    """Launches of kernels inside only compile them, each once, by so many threads; leaving waits for all.

    One compilation takes seconds, of one core. Whatever else runs inside runs as ever, over what kernels
    left unwritten. Not for two threads at a time. Leaving raises what the first failed compilation raised.
    """
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        return run(self, *args, grid=grid, warmup=True, **options)

    # The mode is not left where it raises: errors are kept for afterwards.
    with ThreadPoolExecutor(num_threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True) as mode:
        # There is no setting for it: every launch ends here, `kernel[grid]` and `kernel.warmup` alike.
        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = run
    for compiled in mode.raw_futures:
        compiled.result()


__all__ = ["rehearsal"]
