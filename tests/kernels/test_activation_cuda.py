"""silu_mul for CUDA against the reference; in Triton's interpreter where there is no GPU."""

import pytest
import torch

from polybatch.kernels.activation import silu_mul as reference
from polybatch.kernels.activation.cuda import silu_mul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 97), (2, 1500), (0, 8)])
def test_it_equals_the_reference_at_odd_widths_and_strides(dtype, rows, width):
    buffer = torch.randn(rows, 2 * width + 3, generator=torch.Generator().manual_seed(width)).mul(5).to(dtype)
    gate_up = buffer[:, : 2 * width]
    out = torch.full((rows, width + 2), torch.nan, dtype=dtype, device=DEVICE)
    silu_mul(buffer.to(DEVICE)[:, : 2 * width], out=out[:, :width])
    # The interpreter cuts bfloat16 off where a GPU rounds it.
    tight = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-5}[dtype]
    torch.testing.assert_close(out[:, :width].cpu(), reference(gate_up), rtol=tight, atol=1e-6)
    assert out[:, width:].isnan().all()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_large_gates_neither_overflow_nor_vanish():
    gate_up = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, 2.0, 2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    got = silu_mul(gate_up).cpu()
    assert torch.equal(got[0, 2:], torch.tensor([0.0, 200.0, 2e4]))
    assert (got[0, :2].abs() < 1e-20).all()


def test_silu_is_rounded_before_the_product():
    gate_up = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).half()
    gate, up = gate_up.chunk(2, dim=1)
    twice = torch.nn.functional.silu(gate) * up
    once = (torch.nn.functional.silu(gate.float()) * up.float()).half()
    got = silu_mul(gate_up.to(DEVICE)).cpu()
    assert (once != twice).float().mean() > 0.1
    # The last bit of an exponential may tip a value over a rounding edge.
    assert (got != twice).float().mean() < 0.01
