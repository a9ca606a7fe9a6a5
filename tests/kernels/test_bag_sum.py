"""The bag sum's kernel against the same sum in float64."""

from __future__ import annotations

import pytest
import torch

from dsmoe.kernels.bag_sum import bag_sum
from tests.kernels import DTYPES, ROUNDING
from tests.moe import DEVICE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_bags", "bag_size", "num_rows", "width"),
    [(7, 3, 21, 40), (1, 1, 1, 1), (5, 11, 20, 8), (3, 2, 6, 1500), (0, 2, 4, 8), (4, 2, 0, 8), (6, 1, 9, 1024)],
)
def test_kernel_is_its_twin(num_bags: int, bag_size: int, num_rows: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    rows_ND = torch.randn(num_rows, width, generator=generator).to(DEVICE, dtype)
    row_UK = torch.randint(0, num_rows + 3, (num_bags, bag_size), generator=generator).to(DEVICE)
    padded_ND = torch.cat([rows_ND.double(), rows_ND.new_zeros(3, width).double()])
    expected_SD = padded_ND[row_UK].sum(1)

    out_UD = bag_sum(rows_ND, row_UK)

    assert out_UD.dtype == dtype
    error = ROUNDING[dtype] * expected_SD.abs() + bag_size * ROUNDING[torch.float32] * padded_ND[row_UK].abs().sum(1)
    assert (out_UD.double() - expected_SD).abs().le(error).all()


def test_bags_without_rows_are_zero_and_nothing_else_is_read() -> None:
    rows_ND = torch.full((4, 8), torch.nan, device=DEVICE)
    rows_ND[2] = 1.0
    row_UK = torch.tensor([[4, 5], [2, 2**40], [2, 2]], device=DEVICE)
    assert torch.equal(bag_sum(rows_ND, row_UK)[:, 0].cpu(), torch.tensor([0.0, 1.0, 2.0]))


def test_offsets_beyond_32_bits() -> None:
    """More elements than int32 counts; all rows but the last stay untouched, so that a CPU has no page of them."""
    width = 4096
    num_rows = 2**31 // width + 2
    rows_ND = torch.empty(num_rows, width, dtype=torch.bfloat16, device=DEVICE)
    rows_ND[-1] = torch.arange(width, device=DEVICE) % 128
    row_UK = torch.tensor([[num_rows - 1], [num_rows]], device=DEVICE)
    out_UD = bag_sum(rows_ND, row_UK)
    assert torch.equal(out_UD[0], rows_ND[-1])
    assert not out_UD[1].any()


def test_one_row_each_is_an_exact_copy() -> None:
    rows_ND = torch.randn(9, 24, dtype=torch.bfloat16, device=DEVICE)
    row_S1 = torch.randperm(9, device=DEVICE)[:, None]
    assert torch.equal(bag_sum(rows_ND, row_S1), rows_ND[row_S1[:, 0]])
