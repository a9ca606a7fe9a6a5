"""DeepSpeed's configuration: generating it from dsmoe's, and checking the `deepspeed` section of the YAML file."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from dsmoe.config.errors import Problem
from dsmoe.config.schema import Config
from dsmoe.config.suggestions import closest_key
from dsmoe.config.yaml_text import show_value

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
    "zero_force_ds_cpu_optimizer": None,
    "zero_optimization.contiguous_gradients": None,
    "zero_optimization.offload_optimizer": "optimizer.offload",
    "zero_optimization.reduce_scatter": None,
}
"""DeepSpeed's keys, dotted, that dsmoe sets, each with the key of dsmoe that it follows from, if any."""

REDUCE_BUCKET_ELEMENTS = 250_000_000
"""Elements of a reduction bucket of ZeRO: 1.0 GB in fp32, as large as DeepSpeed's default of 5e8 elements in bf16."""

_MOST_ELEMENTS = 10**11
"""The largest bucket: 400 GB in fp32, more than any device has."""

_MONITORS = (
    "DeepSpeed's monitors see none of dsmoe's metrics, which are in metrics.jsonl and in TensorBoard's files "
    "(observe.tensorboard); `wandb sync --sync-tensorboard` reads the latter"
)
_LOADER = "dsmoe reads its data itself, as the data section says"
_SCALING = "gradients are summed in fp32, which needs no scaling"
_SAVES = "dsmoe saves by itself, as the checkpoint section says"
_STAGE_3 = "it belongs to ZeRO-3, which DeepSpeed refuses for experts; parallel.zero_stage is at most 2"
REFUSED_KEYS = {
    "aio": "it is for ZeRO-3 with NVMe, and DeepSpeed refuses ZeRO-3 for experts; use optimizer.offload",
    "activation_checkpointing": "DeepSpeed's engine does not read it; use train.recompute",
    "autotuning": "it tries batch sizes, which dsmoe sets; set train.micro_batch_size and parallel yourself",
    "comet": _MONITORS,
    "compile": "DeepCompile cannot compile dsmoe's exchange of tokens",
    "csv_monitor": _MONITORS,
    "data_efficiency": _LOADER,
    "dataloader_drop_last": _LOADER,
    "datastates_ckpt": _SAVES,
    "disable_allgather": "DeepSpeed 0.19.8 ignores it",
    "expert_parallel": "use parallel.expert",
    "gradient_allreduce_op": "a step's gradient is the mean over its tokens",
    "gradient_predivide_factor": _SCALING,
    "hybrid_engine": "it generates text for reinforcement learning, and dsmoe pretrains",
    "managed_gradient_accumulation": "use train.batch_tokens, from which the accumulation steps follow",
    "pipeline": "there is no pipeline parallelism; use parallel.expert, parallel.tensor and train.recompute",
    "prescale_gradients": _SCALING,
    "seq_parallel_communication_data_type": "use parallel.sequence",
    "tensor_parallel": "use parallel.tensor",
    "torch_autocast": "use train.precision",
    "use_data_before_expert_parallelism": "the parallel section lays out the groups",
    "wandb": _MONITORS,
    "weight_quantization": "it is for inference",
    "zero_optimization.allgather_partitions": "DeepSpeed 0.19.8 ignores it",
    "zero_optimization.allgather_sequential": _STAGE_3,
    "zero_optimization.compute_grad_norm": "clipping (optimizer.grad_clip) and metrics need the norm",
    "zero_optimization.cpu_offload": "use optimizer.offload",
    "zero_optimization.cpu_offload_param": _STAGE_3,
    "zero_optimization.cpu_offload_use_pin_memory": "use optimizer.offload",
    "zero_optimization.elastic_checkpoint": _SAVES,
    "zero_optimization.enable_sanity_checks": _STAGE_3,
    "zero_optimization.gather_16bit_weights_on_model_save": _STAGE_3,
    "zero_optimization.leaf_module": _STAGE_3,
    "zero_optimization.legacy_stage1": "DeepSpeed 0.19.8 has no other stage 1",
    "zero_optimization.load_from_fp32_weights": _SAVES,
    "zero_optimization.log_trace_cache_warnings": _STAGE_3,
    "zero_optimization.max_live_parameters": _STAGE_3,
    "zero_optimization.max_reuse_distance": _STAGE_3,
    "zero_optimization.memory_efficient_linear": _STAGE_3,
    "zero_optimization.mics_*": _STAGE_3,
    "zero_optimization.model_persistence_threshold": _STAGE_3,
    "zero_optimization.module_granularity_threshold": _STAGE_3,
    "zero_optimization.offload_param": _STAGE_3,
    "zero_optimization.override_module_apply": _STAGE_3,
    "zero_optimization.param_persistence_threshold": _STAGE_3,
    "zero_optimization.pipeline_loading_checkpoint": _SAVES,
    "zero_optimization.prefetch_bucket_size": _STAGE_3,
    "zero_optimization.round_robin_gradients": (
        "DeepSpeed 0.19.8 then files the optimizer's state under other weights, and checkpoints would be wrong"
    ),
    "zero_optimization.save_muon_momentum_buffer_in_memory": _STAGE_3,
    "zero_optimization.stage3_*": _STAGE_3,
    "zero_optimization.sub_group_size": _STAGE_3,
    "zero_optimization.super_offload": _STAGE_3,
    "zero_optimization.use_all_reduce_for_fetch_params": _STAGE_3,
    "zero_optimization.zenflow": "its state cannot be saved",
    "zero_optimization.zero_hpz_partition_size": _STAGE_3,
    "zero_optimization.zero_quantized_*": _STAGE_3,
}
"""DeepSpeed's keys, dotted, that dsmoe cannot honour, each with the reason or the replacement; `*` is any ending."""


@dataclass(frozen=True)
class Kind:
    """The values that DeepSpeed can use for one of its keys."""

    words: str
    """The values as a noun phrase, for messages."""
    holds: Callable[[Any], bool]
    """Returns whether a value is one of them."""


def _whole(least: int, most: int = 10**18, multiple: int = 1) -> Kind:
    words = f"a whole number from {least} to {most:g}" + (f", a multiple of {multiple}" if multiple > 1 else "")
    return Kind(words, lambda value: _is_number(value) and least <= value <= most and value % multiple == 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _are_patterns(value: Any) -> bool:
    """Return whether DeepSpeed can join the list to a regular expression (0.19.8, runtime/keep_in_fp32.py:54)."""
    if not _is_list_of_text(value):
        return False
    try:
        re.compile("|".join(name.replace("*", ".*") for name in value))
    except (re.error, RecursionError, OverflowError):
        return False
    return True


_SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
_NUMBER = Kind("a number from 0 to 1e+30", lambda value: _is_number(value) and 0 <= value <= 1e30)
_FILE = Kind("the name of a file", lambda value: isinstance(value, str) and value != "" and "\0" not in value)
_TEXTS = Kind("a list of text", _is_list_of_text)

FREE_KEYS: dict[str, Any] = {
    "comms_logger": {
        **dict.fromkeys(("debug", "enabled", "prof_all", "verbose"), _SWITCH),
        "prof_ops": _TEXTS,
    },
    "data_types": {
        "buffer_dtype": _one_of("bf16", "fp16", "fp32"),
        "keep_in_fp32_modules": Kind(
            "auto or a list of patterns of names", lambda value: value == "auto" or _are_patterns(value)
        ),
    },
    "disable_python_gc": _SWITCH,
    "dump_state": _SWITCH,
    "flops_profiler": {
        **dict.fromkeys(("detailed", "enabled"), _SWITCH),
        "module_depth": _whole(-1, 4),  # a depth below the deepest module ends the run; -1 is the full depth
        "output_file": _FILE,
        "profile_step": _whole(1),
        "recompute_fwd_factor": _NUMBER,
        "top_modules": _whole(1),
    },
    "log_level": _one_of("debug", "info", "warning", "error", "critical"),
    "memory_breakdown": _SWITCH,
    "timers": {"throughput": dict.fromkeys(("enabled", "synchronized"), _SWITCH)},
    "vocabulary_size": _whole(1),
    "wall_clock_breakdown": _SWITCH,
    "zero_optimization": {
        "allgather_bucket_size": _whole(2, _MOST_ELEMENTS, multiple=2),
        "ignore_unused_parameters": _SWITCH,
        "overlap_comm": _SWITCH,
        "parameter_alignment": _SWITCH,
        "reduce_bucket_size": _whole(1, _MOST_ELEMENTS),
        "use_multi_rank_bucket_allreduce": _SWITCH,
    },
}
"""The other keys that DeepSpeed 0.19.8 uses at ZeRO stages 1 and 2, and the values that each key works with.

DeepSpeed silently ignores most other keys, and checks few values before it uses them.
"""


def to_deepspeed(config: Config, accumulation_steps: int) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`, with the user's `deepspeed` section merged on top.

    Args:
        config: the whole config.
        accumulation_steps: micro-batches of one rank in an optimizer step; DeepSpeed derives `train_batch_size`.
    """
    stage = config.parallel.zero_stage
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "communication_data_type": "fp32",  # dtype of the gradients in reductions: see dsmoe.engine.gradient_sums
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
            "overlap_comm": config.cluster.device != "cpu",  # a CPU has no streams to overlap on
        }
    if config.optimizer.offload:
        on_cuda = config.cluster.device != "cpu"
        generated["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": on_cuda}
        generated["zero_force_ds_cpu_optimizer"] = False  # lets torch's fused AdamW step on the host
    return _merge(generated, _with_whole_numbers(config.deepspeed))


def _with_whole_numbers(value: Any) -> Any:
    """Return the user's section with whole floats, as YAML reads `1e6`, turned into integers, as DeepSpeed needs."""
    if isinstance(value, dict):
        return {key: _with_whole_numbers(child) for key, child in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `base` with `top` merged over it: mappings key by key, everything else replaced."""
    merged = copy.deepcopy(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def deepspeed_problems(config: Config) -> Iterator[Problem]:
    """Yield a problem for each key of the `deepspeed` section that a user cannot set, or not to this value.

    DeepSpeed itself would silently ignore some of these, and end every rank with a traceback for others.
    """
    yield from _section_problems("", config.deepspeed, FREE_KEYS)


def _section_problems(section: str, given: dict[str, Any], free: dict[str, Any]) -> Iterator[Problem]:
    """Yield the problems of one section of DeepSpeed's config.

    Args:
        section: dotted path of the section, ending with a dot; empty for the whole config.
        given: the user's values.
        free: the keys of the section that a user may set.
    """
    for name, value in given.items():
        key = f"{section}{name}"
        if "." not in name and (remedy := _refusal(key)):
            yield f"deepspeed.{key}", f"deepspeed.{key} {remedy}"
        elif name in free:
            yield from _value_problems(key, value, free[name])
        else:
            guess = closest_key(name, free)
            remedy = f"did you mean '{guess}'?" if guess else f"the keys are {', '.join(free)}"
            yield f"deepspeed.{key}", f"deepspeed.{key}: unknown to DeepSpeed; {remedy}"


def _refusal(key: str) -> str:
    """Return why a user may not set a key of DeepSpeed, and the remedy; "" if the key is not refused."""
    if key in OWNED_KEYS:
        return f"is set by dsmoe; remove it{f' and use {ours}' if (ours := OWNED_KEYS[key]) else ''}"
    reason = next((text for pattern, text in REFUSED_KEYS.items() if fnmatchcase(key, pattern)), "")
    return f"cannot be used with dsmoe: {reason}; remove it" if reason else ""


def _value_problems(key: str, value: Any, free: Kind | dict[str, Any]) -> Iterator[Problem]:
    if isinstance(free, Kind):
        if not free.holds(value):
            got = show_value(value)
            yield f"deepspeed.{key}", f"deepspeed.{key}: expected {free.words}, got {got}; change or remove it"
    elif isinstance(value, dict):
        yield from _section_problems(f"{key}.", value, free)
    else:
        got = show_value(value)
        yield f"deepspeed.{key}", f"deepspeed.{key}: expected a mapping of {', '.join(free)}, got {got}"
