import torch

from tests.moe import DEVICE

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
"""Relative error allowed: some operations in fp32, of which bf16 sees one rounding. A GPU rounds to the nearest
(`test_sm90.py` looks for the instruction); Triton's interpreter cuts off."""
