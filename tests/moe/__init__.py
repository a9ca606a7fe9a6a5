import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the tests of single layers run. CUDA_VISIBLE_DEVICES= (empty) keeps them on the CPU."""
