"""rms_norm for CUDA against transformers; in Triton's interpreter where there is no GPU."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from polybatch.errors import EngineError
from polybatch.kernels.norm.cuda import rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layer(weight, eps=1e-5):
    norm = LlamaRMSNorm(len(weight), eps).to(weight.dtype)
    norm.weight = torch.nn.Parameter(weight)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 97, 1024, 5120])
@pytest.mark.parametrize("with_residual", [False, True])
def test_it_equals_transformers_after_its_residual_sum(dtype, width, with_residual):
    generator = torch.Generator().manual_seed(width)
    x, residual = torch.randn(2, 3, width, generator=generator).mul(4).to(dtype)
    weight = torch.randn(width, generator=generator).to(dtype)
    stream = residual.clone().to(DEVICE) if with_residual else None
    out = torch.full_like(x, torch.nan, device=DEVICE)
    got = rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5, residual=stream, out=out)
    assert got is out
    whole = residual + x if with_residual else x
    # The interpreter cuts bfloat16 off where a GPU rounds it.
    tight = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-4}[dtype]
    if stream is not None and dtype is not torch.bfloat16:
        assert torch.equal(stream.cpu(), whole)
    torch.testing.assert_close(out.cpu(), layer(weight)(whole), rtol=tight, atol=1e-6)


def test_sums_and_products_round_where_transformers_round_them():
    # Squares of small integers sum exactly in any order, so only the places of rounding could differ.
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randint(-8, 9, (2, 5, 256), generator=generator).half()
    weight = torch.randn(256, generator=generator).half()
    got = rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5, residual=residual.clone().to(DEVICE))
    expected = layer(weight)(residual + x)
    # The last bit of the inverse root may tip a value over a rounding edge.
    assert (got.cpu() != expected).float().mean() < 0.002


def test_chosen_rows_are_normalised_and_the_residual_stays():
    x, residual = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weight = torch.ones(40, device=DEVICE)
    before = residual.clone()
    out = torch.full((4, 40), torch.nan, device=DEVICE)
    rows = torch.tensor([5, -1, 0, 2], dtype=torch.int32, device=DEVICE)
    rms_norm(x, weight, 1e-5, residual=residual, rows=rows, out=out)
    assert torch.equal(residual, before)
    assert out[1].isnan().all()
    everything = rms_norm(x, weight, 1e-5, residual=residual)
    assert torch.equal(out[[0, 2, 3]], everything[[5, 0, 2]])


def test_rows_may_be_strided_and_normalised_in_place():
    wide = torch.randn(4, 50, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    weight = torch.randn(33, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    before = wide.clone()
    expected = rms_norm(wide[:, :33].contiguous(), weight, 1e-6)
    rms_norm(wide[:, :33], weight, 1e-6, out=wide[:, :33])
    assert torch.equal(wide[:, :33], expected)
    assert torch.equal(wide[:, 33:], before[:, 33:])


def test_rows_too_wide_for_registers_are_refused():
    with pytest.raises(EngineError, match="16385 elements"):
        rms_norm(torch.zeros(1, 16385), torch.zeros(16385), 1e-5)
