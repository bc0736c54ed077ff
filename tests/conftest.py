"""Settings of every test run; shared helpers are in `helpers.py`, beside this file."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

# Tests work on tiny tensors, for which waking threads costs many times the work. Read when torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU, CUDA kernels run in Triton's interpreter. Read when a kernel is defined.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _interpreter() -> None:
    """Only where some test file brought Triton along."""
    if "triton" in sys.modules:
        from polybatch.kernels.interpret import prepare

        prepare()


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
