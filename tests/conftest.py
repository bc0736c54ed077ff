"""Settings of every test run; shared helpers are in `helpers.py`, beside this file."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Tests work on tiny tensors, for which waking threads costs many times the work. Read when torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU, CUDA kernels run in Triton's interpreter. Read when a kernel is defined.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _interpreted_loop_bounds() -> Iterator[None]:
    """Triton 3.6 interprets scalars as arrays of one element, which NumPy 2.4 no longer takes as indices."""
    if "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def with_item(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_item)
        yield


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The GGUF file of the demo's model, downloaded where the cache lacks it.

    Tried once a session; where it fails, every test that needs the model is skipped with the reason.
    """
    from polybatch.errors import ModelError
    from polybatch.models.builtin import fetch_builtin

    try:
        return fetch_builtin("smollm2-135m-instruct", progress=print)
    except ModelError as error:
        pytest.skip(f"needs the demo's model: {error}")


@pytest.fixture(scope="session")
def real_oracle(real_model: Path) -> Any:
    """The demo's model as transformers reads it from the same file, in float32. Leave it as it was."""
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(
        real_model.parent, gguf_file=real_model.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
