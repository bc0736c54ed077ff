"""embedding for CUDA against the reference; in Triton's interpreter where there is no GPU."""

import pytest
import torch

from polybatch.kernels.embedding import embedding as reference
from polybatch.kernels.embedding.cuda import embedding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 64, 1500])
def test_ids_come_from_the_host_or_from_the_last_samples(dtype, width):
    generator = torch.Generator().manual_seed(width)
    table = torch.randn(11, width, generator=generator).to(dtype)
    # Ids that the device replaces may be anything.
    token_ids = torch.tensor([0, 10, -5, 7, 10**9], dtype=torch.int32)
    source = torch.tensor([-1, -1, 2, -1, 0], dtype=torch.int32)
    sampled = torch.tensor([4, 99, 9], dtype=torch.int32)
    expected = table[[0, 10, 9, 7, 4]]
    assert torch.equal(reference(token_ids, source, sampled, table), expected)
    out = torch.full((5, width), torch.nan, dtype=dtype, device=DEVICE)
    embedding(*(x.to(DEVICE) for x in (token_ids, source, sampled, table)), out=out)
    assert torch.equal(out.cpu(), expected)


def test_no_tokens_are_no_rows():
    none = torch.zeros(0, dtype=torch.int32)
    assert embedding(none, none, none, torch.zeros(2, 4)).shape == (0, 4)
