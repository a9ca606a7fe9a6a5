"""The kernels run on the GPU where there is one, else in Triton's interpreter.

Triton decides when it is imported, and so do the kernels: before any test module here, and not by a fixture.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton  # noqa: F401
