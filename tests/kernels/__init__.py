import torch

from tests.moe import DEVICE

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
"""Relative error allowed: some operations in fp32, of which bf16 sees one rounding. A GPU rounds to the nearest
(`test_sm90.py` looks for the instruction); Triton's interpreter cuts off."""

OTHER_SIZES = {
    "activation_backward": [
        {"tile": 4096, "columns": 512, "warps": 8},
        {"tile": 256, "columns": 128, "warps": 1},
        {"tile": 256, "columns": 1024, "warps": 2},
    ],
    "activation_forward": [
        {"tile": 1024, "columns": 1024, "warps": 4},
        {"tile": 256, "columns": 128, "warps": 1},
        {"tile": 256, "columns": 1024, "warps": 2},
    ],
    "bag_sum": [
        {"columns": 2048, "columns_per_warp": 512, "unroll": 4},
        {"columns": 128, "columns_per_warp": 512, "unroll": 1},
        {"columns": 512, "columns_per_warp": 128, "unroll": 16},
    ],
    "permute": [{"block": 64, "warps": 2}, {"block": 32, "warps": 1}, {"block": 256, "warps": 8}],
    "topk_router": [{"tile": 1024, "warps": 2}, {"tile": 512, "warps": 1}, {"tile": 4096, "warps": 8}],
}
"""Sizes besides the default, three of each kernel; the first has to compile for an H100 without spills."""
