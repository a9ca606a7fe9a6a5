"""All metrics of dsmoe: one definition for each.

A new metric is an entry in this file (`moe/load_cv` is MOE_LOAD_CV) and a value under its name in the code that
computes it. With the standard library alone: docs/metrics.md, reports and job scripts (`dsmoe.launch.attempts`, whose
Python may have no torch) read these definitions as well as the meter.
"""

from __future__ import annotations

from dsmoe.metrics.metric import Combine, Metric, Reduction, When, pattern

GROUPS = {
    "train": "Training",
    "optim": "Optimizer",
    "progress": "Progress",
    "throughput": "Throughput",
    "memory": "Memory",
    "checkpoint": "Checkpoints",
    "moe": "Routing and experts",
    "eval": "Held-out text",
}
"""The title of each group of metrics, in the order of reports."""

_OVER_TOKENS = Reduction(micro_batches=Combine.RATIO, ranks=Combine.RATIO)
_OVER_LAYERS_TOO = Reduction(micro_batches=Combine.RATIO, ranks=Combine.RATIO, layers=Combine.RATIO)
_RATE = Reduction(steps=Combine.RATIO, ranks=Combine.MIN)
_SECONDS = Reduction(steps=Combine.MEAN, ranks=Combine.MAX)
_OF_RANKS_LINKS = Reduction(micro_batches=Combine.SUM, ranks=Combine.MEAN, layers=Combine.SUM)
_MEAN = Reduction(micro_batches=Combine.MEAN, ranks=Combine.MEAN, layers=Combine.MEAN)
_OF_WORST_LAYER = Reduction(micro_batches=Combine.SUM, ranks=Combine.SUM, layers=Combine.MAX)

_PALM = "PaLM ([arXiv:2204.02311](https://arxiv.org/abs/2204.02311), appendix B)"
_MEGATRON = "Megatron-LM"

TRAIN_LOSS = Metric(
    "train/loss",
    unit="nats per token",
    meaning="Cross entropy of the step's batch, without auxiliary losses",
    when=When.TRAINING,
    reduction=_OVER_TOKENS,
)

OPTIM_GRAD_NORM = Metric(
    "optim/grad_norm",
    unit="",
    meaning="L2 norm of the gradient before clipping, every parameter counted once on any layout",
    when=When.TRAINING,
)
OPTIM_LR = Metric("optim/lr", unit="", meaning="Learning rate that the step used", when=When.TRAINING)
OPTIM_SKIPPED_STEPS = Metric(
    "optim/skipped_steps",
    unit="steps",
    meaning="Steps of the run so far that changed nothing, because a loss or gradient was not finite",
    when=When.TRAINING,
)

PROGRESS_TOKENS = Metric(
    "progress/tokens", unit="tokens", meaning="Tokens of all steps of the run so far", when=When.TRAINING
)
PROGRESS_PERCENT = Metric(
    "progress/percent", unit="%", meaning="Steps of the run so far / all its steps", when=When.TRAINING
)

THROUGHPUT_TOKENS_PER_SECOND = Metric(
    "throughput/tokens_per_second",
    unit="tokens/s",
    meaning="Tokens of all ranks / seconds of the slowest rank, without evaluations and checkpoints",
    when=When.TRAINING,
    reduction=_RATE,
)
THROUGHPUT_TOKENS_PER_SECOND_PER_DEVICE = Metric(
    "throughput/tokens_per_second_per_device",
    unit="tokens/s",
    meaning="The same / number of ranks",
    when=When.TRAINING,
    reduction=_RATE,
)
THROUGHPUT_STEP_SECONDS = Metric(
    "throughput/step_seconds",
    unit="s",
    meaning="Wall time of a step, without evaluations and checkpoints",
    when=When.TRAINING,
    reduction=_SECONDS,
)
THROUGHPUT_DATA_WAIT_SECONDS = Metric(
    "throughput/data_wait_seconds",
    unit="s",
    meaning="Part of a step's wall time in which the rank waited for its data",
    when=When.TRAINING,
    reduction=_SECONDS,
)
THROUGHPUT_TFLOPS_PER_DEVICE = Metric(
    "throughput/tflops_per_device",
    unit="TFLOP/s",
    meaning="Model FLOPs, forward and backward, of the active parameters and of full attention, per second and rank; "
    "neither recomputation nor padding counts",
    when=When.TRAINING,
    reduction=_RATE,
    source=_PALM,
)
THROUGHPUT_TFLOPS_PER_DEVICE_CAUSAL = Metric(
    "throughput/tflops_per_device_causal",
    unit="TFLOP/s",
    meaning="The same with half of the attention, as the causal mask leaves",
    when=When.TRAINING,
    reduction=_RATE,
    source=_MEGATRON,
)
THROUGHPUT_MFU_PERCENT = Metric(
    "throughput/mfu_percent",
    unit="%",
    meaning="Model FLOPs utilisation: `throughput/tflops_per_device` / the device's dense bf16 peak",
    when=When.PEAK_KNOWN,
    reduction=_RATE,
    source=_PALM,
)
THROUGHPUT_MFU_PERCENT_CAUSAL = Metric(
    "throughput/mfu_percent_causal",
    unit="%",
    meaning="The same with `throughput/tflops_per_device_causal`",
    when=When.PEAK_KNOWN,
    reduction=_RATE,
    source=_MEGATRON,
)

MEMORY_PEAK_GIB = Metric(
    "memory/peak_gib",
    unit="GiB",
    meaning="Most memory since the start that torch's allocator reserved on the device; on a CPU, the process's peak "
    "resident size",
    when=When.TRAINING,
    reduction=Reduction(ranks=Combine.MAX),
)

CHECKPOINT_STALL_SECONDS = Metric(
    "checkpoint/stall_seconds",
    unit="s",
    meaning="Time that training stood still for checkpoints since the line before",
    when=When.SAVED,
    reduction=Reduction(steps=Combine.SUM, ranks=Combine.MAX),
)

MOE_BALANCE_LOSS = Metric(
    "moe/balance_loss",
    unit="",
    meaning="Load-balancing loss `E * sum_e f_e * P_e` without its coefficient, 1 when even; `f_e`: the expert's share "
    "of the assignments before dropping, `P_e`: its mean score",
    when=When.MOE,
    reduction=_MEAN,
    source="Switch Transformer ([arXiv:2101.03961](https://arxiv.org/abs/2101.03961), eq. 4 to 6)",
    in_every_layer=True,
)
MOE_Z_LOSS = Metric(
    "moe/z_loss",
    unit="",
    meaning="Router z-loss without its coefficient: mean over the tokens of `logsumexp(logits)^2`",
    when=When.MOE,
    reduction=_MEAN,
    source="ST-MoE ([arXiv:2202.08906](https://arxiv.org/abs/2202.08906), eq. 5)",
    in_every_layer=True,
)
MOE_ROUTER_LOGIT_RMS = Metric(
    "moe/router_logit_rms",
    unit="",
    meaning="Root of the mean squared router logit over tokens and experts; where it grows without end the router "
    "saturates, and a z-loss helps",
    when=When.MOE,
    reduction=Reduction(micro_batches=Combine.RATIO, ranks=Combine.RATIO, layers=Combine.MEAN),
    in_every_layer=True,
)
MOE_ROUTING_ENTROPY_NORMALIZED = Metric(
    "moe/routing_entropy_normalized",
    unit="",
    meaning="Entropy of the mean score over the experts / `log E`: 1 when the router uses all experts alike, 0 when it "
    "uses one",
    when=When.MOE,
    reduction=Reduction(micro_batches=Combine.SUM, ranks=Combine.SUM, layers=Combine.MEAN),
    in_every_layer=True,
)
MOE_LOAD_MAX_OVER_MEAN = Metric(
    "moe/load_max_over_mean",
    unit="",
    meaning="Assignments of the fullest expert before dropping / mean over the experts: 1 when even, MaxVio + 1",
    when=When.MOE,
    reduction=_OF_WORST_LAYER,
    source="[arXiv:2408.15664](https://arxiv.org/abs/2408.15664), eq. 4",
    in_every_layer=True,
)
MOE_LOAD_CV = Metric(
    "moe/load_cv",
    unit="",
    meaning="Coefficient of variation of the experts' assignments before dropping: population standard deviation / "
    "mean",
    when=When.MOE,
    reduction=_OF_WORST_LAYER,
    in_every_layer=True,
)
MOE_DEAD_EXPERT_PERCENT = Metric(
    "moe/dead_expert_percent",
    unit="%",
    meaning="Experts that no token of the step chose",
    when=When.MOE,
    reduction=_OF_WORST_LAYER,
    in_every_layer=True,
)
MOE_DROPPED_PERCENT = Metric(
    "moe/dropped_percent",
    unit="%",
    meaning="Assignments lost to the capacity",
    when=When.MOE,
    reduction=_OVER_LAYERS_TOO,
    in_every_layer=True,
)
MOE_DROPPED_WEIGHT_PERCENT = Metric(
    "moe/dropped_weight_percent",
    unit="%",
    meaning="Router weight lost to the capacity",
    when=When.MOE,
    reduction=_OVER_LAYERS_TOO,
    in_every_layer=True,
)
MOE_CAPACITY_USED_PERCENT = Metric(
    "moe/capacity_used_percent",
    unit="%",
    meaning="Slots of the capacity that hold an assignment; 100 without a capacity",
    when=When.MOE,
    reduction=_OVER_LAYERS_TOO,
    in_every_layer=True,
)
MOE_CAPACITY_FACTOR = Metric(
    "moe/capacity_factor",
    unit="",
    meaning="Capacity factor of the logged step, which moves to hold the drop rate",
    when=When.DROP_RATE_HELD,
    reduction=Reduction(layers=Combine.MAX),
)
MOE_ALL_TO_ALL_GIB_INTRA = Metric(
    "moe/all_to_all_gib/intra",
    unit="GiB",
    meaning="Bytes that a rank sent to others of its node in the logged step's exchanges, forward and backward",
    when=When.MOE,
    reduction=_OF_RANKS_LINKS,
)
MOE_ALL_TO_ALL_GIB_INTER = Metric(
    "moe/all_to_all_gib/inter",
    unit="GiB",
    meaning="The same to ranks of other nodes",
    when=When.MOE,
    reduction=_OF_RANKS_LINKS,
)

EVAL_LOSS = Metric(
    "eval/loss",
    unit="nats per token",
    meaning="Cross entropy of the held-out text of all sources",
    when=When.EVALUATION,
    reduction=_OVER_TOKENS,
)
EVAL_BITS_PER_BYTE = Metric(
    "eval/bits_per_byte",
    unit="bits per byte",
    meaning="The same in bits / bytes of text that the tokens stand for: comparable between tokenizers",
    when=When.EVALUATION,
    reduction=_OVER_TOKENS,
)
EVAL_SOURCE_LOSS = Metric(
    "eval/<source>/loss",
    unit="nats per token",
    meaning="Cross entropy of one source's held-out text",
    when=When.EVALUATION,
    reduction=_OVER_TOKENS,
)
EVAL_SOURCE_BITS_PER_BYTE = Metric(
    "eval/<source>/bits_per_byte",
    unit="bits per byte",
    meaning="The same in bits / bytes of that text",
    when=When.EVALUATION,
    reduction=_OVER_TOKENS,
)
EVAL_HELD_OUT = Metric(
    "eval/held_out",
    unit="text",
    meaning="An object that says of each source which text was evaluated: losses compare where it is the same; not in "
    "TensorBoard, nor in lines of earlier versions",
    when=When.EVALUATION,
)

METRICS = tuple(value for value in globals().values() if isinstance(value, Metric))
"""Every metric above, in order."""


def find(key: str) -> Metric | None:
    """Return the metric that is written under a key of `metrics.jsonl`; None where no definition has that name."""
    return next((metric for metric in METRICS if any(pattern(name).fullmatch(key) for name in metric.names)), None)
