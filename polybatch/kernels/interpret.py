"""Triton's interpreter, made to run with the NumPy that is installed."""

from __future__ import annotations

import os
from typing import Any


def is_interpreted() -> bool:
    """Whether kernels run in the interpreter; decided by the environment when they are defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def prepare() -> None:
    """Let scalars of interpreted kernels be loop bounds. Does nothing where kernels are compiled.

    Triton 3.6 holds them as arrays of one element, which NumPy 2.4 no longer takes as indices.
    """
    if not is_interpreted():
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if getattr(patch, "takes_indices", False):
        return

    def with_item(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with_item.takes_indices = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = with_item
