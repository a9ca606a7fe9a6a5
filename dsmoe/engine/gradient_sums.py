"""Sum the gradients of a bf16 model in fp32: over micro-batches and over ranks, at every ZeRO stage.

bf16 has 8 bits of precision: of 512 micro-batches summed in it a gradient keeps an error of 4 %, of a ring of 2,048
ranks one of 5 to 12 %. DeepSpeed sums in the parameters' dtype unless told otherwise; its own fp32 way at ZeRO stage 1
is another wrapper (`BF16_Optimizer`), which keeps bf16 gradients beside the fp32 sums and fails on a rank that owns no
parameter of a group (0.19.8, runtime/utils.py:952), and at stage 0 there is none. So torch's autograd is told that the
gradients are fp32 (`Tensor.grad_dtype`), and DeepSpeed that its buffers are.

Bytes of gradients on a device, with S shared and X expert parameters, `dp` data and `edp` expert-data ranks:

| ZeRO stage | between micro-batches | in addition while the optimizer steps |
|---|---|---|
| 0 | 4 (S + X) | |
| 1 | 4 (S + X) | 4 (S / dp + X / edp) |
| 2 | 4 (S / dp + X / edp) | |

At stages 1 and 2 a reduction bucket of `zero_optimization.reduce_bucket_size` fp32 elements (dsmoe: 2.5e8, 1.0 GB) is
added, two with `overlap_comm`; and at every stage, in the backward pass, the bf16 gradient that is being added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def sum_in_fp32(engine: DeepSpeedEngine) -> None:
    """Make autograd sum into fp32 `.grad`s whatever the parameters' dtype, and DeepSpeed reduce them in fp32.

    Called when the engine has been made; `communication_data_type: fp32` in its config does the rest.
    """
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            # torch refuses to change the dtype beside a gradient of another one.
            parameter.grad = None
            parameter.grad_dtype = torch.float32
    optimizer = engine.optimizer
    if hasattr(optimizer, "gradient_accumulation_dtype"):  # ZeRO 1 and 2
        # The bucket has the first parameter's dtype, and fp32 routers' gradients pass it as well (0.19.8,
        # runtime/zero/stage_1_and_2.py:3256). The sum over all ranks is kept in `gradient_accumulation_dtype` (:1040).
        optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32
        optimizer.gradient_accumulation_dtype = torch.float32
        _forget_sums_of_skipped_steps(optimizer)


def _forget_sums_of_skipped_steps(optimizer: Any) -> None:
    """With the optimizer on the host, begin the sums anew after a step that was skipped.

    ZeRO keeps them (0.19.8, runtime/zero/stage_1_and_2.py:3055): what is not finite would stay in the sums of a bf16
    model for ever, and every later step would be skipped.
    """
    reset = optimizer.reset_cpu_buffers

    def reset_with_sums() -> None:
        """Called when a step has been taken, and then there are none, and when it is skipped."""
        reset()
        # As ZeRO does with the optimizer on the device (:3060): the keys stay, without sums.
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))

    optimizer.reset_cpu_buffers = reset_with_sums


def fill_missing_gradients(module: nn.Module) -> None:
    """Give a parameter that no micro-batch has used zeros, so that every rank reduces as much; ZeRO stage 0.

    DeepSpeed would make them of the parameter's dtype (0.19.8, runtime/engine.py:3863).
    """
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
