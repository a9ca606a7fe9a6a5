"""DeepSpeed's own configuration, generated from ours, and which of its keys are ours to set."""

from __future__ import annotations

import copy
from typing import Any

from dsmoe.config.schema import Config

OWNED_KEYS = {
    "train_batch_size": "train.batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_tokens",
    "optimizer": "the optimizer section",
    "scheduler": "optimizer.schedule",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "gradient_clipping": "optimizer.grad_clip",
    "zero_optimization.stage": "parallel.zero_stage",
    "tensorboard": "observe.tensorboard",
    "steps_per_print": "observe.log_every",
    "checkpoint": "the checkpoint section",
    "communication_data_type": None,
    "data_types.grad_accum_dtype": None,
    "data_types.param_dtype": "train.precision",
    "zero_allow_untested_optimizer": None,
}
"""DeepSpeed's keys, dotted, that dsmoe sets from the key named beside it, or (None) without asking."""

REDUCE_BUCKET_ELEMENTS = 250_000_000
"""What a reduction bucket of ZeRO holds: in fp32 as many bytes, 1.0 GB, as DeepSpeed's own 5e8 in bf16."""

FREE_KEYS = (
    *("activation_checkpointing", "aio", "autotuning", "comet", "comms_logger", "compile"),
    *("csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last", "datastates_ckpt", "disable_allgather"),
    *("disable_python_gc", "dump_state", "expert_parallel", "flops_profiler", "gradient_allreduce_op"),
    *("gradient_predivide_factor", "hybrid_engine", "log_level", "managed_gradient_accumulation", "memory_breakdown"),
    *("pipeline", "prescale_gradients", "seq_parallel_communication_data_type", "tensor_parallel", "timers"),
    *("torch_autocast", "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb"),
    *("weight_quantization", "zero_force_ds_cpu_optimizer", "zero_optimization"),
)
"""The other top-level keys that DeepSpeed 0.19.8 reads; it ignores any further one without a word."""


def to_deepspeed(config: Config, accumulation_steps: int) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`.

    `accumulation_steps` is the number of micro-batches of one rank in an optimizer step. DeepSpeed derives
    `train_batch_size` itself. The user's `deepspeed` section is merged on top, mapping by mapping.
    """
    stage = config.parallel.zero_stage
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "communication_data_type": "fp32",  # of gradients, which are summed in fp32 (dsmoe.train.gradient_sums)
        "zero_optimization": {"stage": stage},
        # Without ZeRO, DeepSpeed averages the experts' norms over the ranks instead of adding them up (0.19.8,
        # runtime/utils.py:413), so there dsmoe clips and DeepSpeed must not.
        "gradient_clipping": config.optimizer.grad_clip if stage >= 1 else 0.0,
        "steps_per_print": None,  # dsmoe prints
        "wall_clock_breakdown": False,
    }
    if stage >= 1:
        generated["zero_optimization"] |= {
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
            "overlap_comm": config.cluster.device != "cpu",  # there are no streams to overlap on
        }
    return _merge(generated, config.deepspeed)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `base` with `top` over it: mappings key by key, everything else replaces."""
    merged = copy.deepcopy(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged
