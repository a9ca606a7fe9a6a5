"""Every key a dsmoe YAML file may have, with its type, default and unit.

A key is here only when something reads it. Values that follow from others (data degree, accumulation
steps, tokens per step) are properties in `dsmoe.plan`, never keys.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema


def _whole_number(value: object) -> object:
    """Let `1e9` stand for an integer (YAML reads it as a float), and keep `true` from standing for 1."""
    if isinstance(value, bool):
        raise ValueError("a bool is not a number")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _zero_is_never(value: object) -> object:
    """Let 0 switch off what happens at an interval."""
    return None if value == 0 and not isinstance(value, bool) else value


# Upper limits are far above what anybody trains, and low enough for arithmetic on every value to end at once.
PositiveInt = Annotated[int, Field(ge=1, le=10**18), BeforeValidator(_whole_number)]
Interval = Annotated[
    PositiveInt | None,
    BeforeValidator(_zero_is_never),
    WithJsonSchema({"anyOf": [{"minimum": 0, "type": "integer"}, {"type": "null"}]}),
]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**18), BeforeValidator(_whole_number)]
Width = Annotated[int, Field(ge=1, le=2**24), BeforeValidator(_whole_number)]
MOST_TOKENS = 2**31
"""Of a vocabulary, and of a sequence."""
Length = Annotated[int, Field(ge=1, le=MOST_TOKENS), BeforeValidator(_whole_number)]
Layers = Annotated[int, Field(ge=1, le=10_000), BeforeValidator(_whole_number)]
Devices = Annotated[int, Field(ge=1, le=2**20), BeforeValidator(_whole_number)]
Timeout = Annotated[int, Field(ge=1, le=10**6), BeforeValidator(_whole_number)]
"""Seconds: eleven days, of which the milliseconds fit the 32 bits that torch's store and gloo count them in."""
PositiveFloat = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Percent = Annotated[float, Field(gt=0, lt=100)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=128)]
"""Of a folder, with room for what is put before and behind it: file systems take 255 bytes."""
Text = Annotated[str, Field(min_length=1)]
"""Of a path or a name: an empty one, as a variable that is set to nothing leaves, would stand for something else."""


class Section(BaseModel):
    """A frozen mapping that refuses keys it does not know; numbers are not accepted as strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Device(Section):
    """An accelerator that is not in `dsmoe.plan.devices`, described by its data sheet."""

    memory_gib: PositiveFloat
    """Usable device memory in GiB."""
    peak_tflops: PositiveFloat
    """Dense bf16 matrix rate in TFLOP/s, without sparsity; the denominator of MFU."""


class Cluster(Section):
    """The machines: how many, and what is in them."""

    nodes: Annotated[int, Field(ge=1, le=100_000), BeforeValidator(_whole_number)] = 1
    """Machines."""
    devices_per_node: Annotated[int, Field(ge=1, le=1_024), BeforeValidator(_whole_number)] = 1
    """Devices in each machine; one process drives one device."""
    device: Text | Device | None = None
    """A name known to `dsmoe.plan.devices` (`cpu` trains over gloo), a description, or null: any CUDA device, without
    MFU."""
    interface: Text | None = None
    """The network interface between nodes (`eth0`, `ib0`), as `ip address` lists it on every one of them; null leaves
    the choice to NCCL and gloo, which are wrong at times where there are several."""
    hosts: Text | None = None
    """The nodes' names, rank 0's first, for `dsmoe launch --hostfile`: `node[01-08]`, or `alpha,beta`."""
    hostfile: Text | None = None
    """Instead of `hosts`: a file that has them already, with `NAME slots=DEVICES` on each line."""
    elastic: bool = False
    """Train on whatever devices the launcher has started: `parallel.expert` and the micro-batch follow, the batch
    stays. Else a world of another size is refused."""
    collective_timeout_seconds: Timeout = 1800
    """How long a collective may wait, in every process group, before the run is stopped."""
    intra_node_gbps: PositiveFloat | None = None
    """What a device can send to another of its node, in GB/s one way; null promises nothing. `dsmoe preflight` measures
    it."""
    inter_node_gbps: PositiveFloat | None = None
    """What a device can send to another node while all devices of its node send, in GB/s one way."""
    intra_node_us: PositiveFloat | None = None
    """Microseconds that an exchange of next to nothing takes inside a node."""
    inter_node_us: PositiveFloat | None = None
    """The same between nodes."""


class Parallel(Section):
    """How the model is laid over the devices. The data degrees are derived."""

    tensor: Devices = 1
    """Devices that share one copy of the dense weights, each holding a slice of every matrix."""
    expert: Devices = 1
    """Devices over which the experts of a layer are spread; divides `moe.num_experts`."""
    expert_tensor: Devices = 1
    """Devices that share one expert, each holding a slice of its matrices."""
    sequence: bool = False
    """With `tensor`: between the blocks, each of its devices holds a slice of the sequence instead of all of it."""
    all_to_all: Literal["flat", "hierarchical"] = "flat"
    """How tokens reach experts on other nodes: one row for every choice, or one per node and token, which is handed on
    inside the node. The same where all experts of a layer are within one node."""
    overlap_chunks: Devices = 1
    """Into how many parts a micro-batch's exchange is cut, so that experts work on one while others travel."""
    zero_stage: Annotated[Literal[0, 1, 2], BeforeValidator(_whole_number)] = 1
    """What DeepSpeed shards over the data group: nothing, optimizer states (1), gradients as well (2)."""


class Model(Section):
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    vocab_size: Length
    """Rows of the embedding; at least as many as the tokenizer has tokens."""
    hidden_size: Width
    """Width of the residual stream."""
    num_layers: Layers
    """Transformer blocks, dense and MoE together."""
    num_heads: Width
    """Query heads."""
    num_kv_heads: Width | None = None
    """Key/value heads; null means as many as `num_heads`."""
    head_dim: Width | None = None
    """Width of one head; null means hidden_size / num_heads."""
    ffn_size: Width | None = None
    """Inner width of the dense SwiGLU blocks; needed only when some layer is dense."""
    dense_layers: Annotated[int, Field(ge=0, le=10_000), BeforeValidator(_whole_number)] = 0
    """The first n layers stay dense."""
    moe_every: Layers = 1
    """After the dense layers, every n-th layer is an MoE layer (the last of each n)."""
    max_sequence_length: Length
    """The longest sequence the model is made for, in tokens."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in every RMSNorm."""
    qk_norm: bool = False
    """RMSNorm over each query and key head (Qwen3)."""
    tie_embeddings: bool = False
    """The output layer uses the embedding's weights."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""


class Router(Section):
    """How scores, always in fp32, become each token's experts and their weights."""

    choice: Literal["token", "expert"] = "token"
    """Every token chooses its top_k experts, or every expert its C tokens (top_k on average; Zhou et al. 2022)."""
    leak_future: bool = False
    """Says that you know that `choice: expert` lets a token see those after it, which makes training losses too low and
    text generation impossible."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax` over the experts (Mixtral, Qwen3), or the `sigmoid` of each logit (DeepSeek-V3)."""
    normalize_weights: bool = True
    """Divide the k chosen scores by their sum (Mixtral, Qwen3); false keeps the scores themselves (Switch)."""
    scale: PositiveFloat = 1.0
    """What the weights are then multiplied by (DeepSeek-V3: 2.5)."""
    num_groups: Devices = 1
    """Groups of neighbouring experts, as nodes hold them; with more than one, each token keeps to its best groups."""
    top_k_groups: Devices = 1
    """How many groups a token may choose its experts from."""
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    """What a group is worth: its best expert's score (DeepSeek-V2) or the sum of its best two (DeepSeek-V3)."""
    noise: Literal["none", "jitter", "gumbel"] = "none"
    """In training only: the router's input times 1 +- 0.01 (`jitter`), or experts drawn at random in proportion to
    their softmax scores (`gumbel`)."""
    force_balanced: bool = False
    """For benchmarks only: tokens take the experts in turn, so that every expert has the same load."""


class Balance(Section):
    """What keeps the experts evenly used, in any combination; 0 switches one off."""

    aux_loss: NonNegativeFloat = 0.01
    """Coefficient of the Switch/GShard load-balancing loss."""
    scope: Literal["micro_batch", "sequence", "global"] = "micro_batch"
    """What that loss counts the experts' shares over: a rank's micro-batch, each sequence (DeepSeek-V3), or all ranks
    and micro-batches of the optimizer step before."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of the ST-MoE router z-loss."""
    bias_update_rate: NonNegativeFloat = 0.0
    """Balance by a bias on the choice of experts that moves by this much per step (DeepSeek-V3: 0.001)."""


class Capacity(Section):
    """How many assignments an expert accepts from one rank: of its micro-batch, or `parallel.tensor` slice of one."""

    factor: PositiveFloat | None = None
    """C = max(minimum, ceil(tokens * top_k / num_experts * factor)); null is dropless."""
    eval_factor: PositiveFloat | None = None
    """The same in evaluation; null evaluates dropless."""
    minimum: PositiveInt = 4
    """The smallest C, for micro-batches with few tokens."""
    drop_policy: Literal["probability", "position", "random"] = "probability"
    """Which assignments stay: the highest router weights, the first in sequence order, or any with equal chance."""
    renormalize_dropped: bool = False
    """Spread the weight of a token's dropped choices over its kept ones."""
    target_drop_percent: Percent | None = None
    """Let the factor move slowly, on log steps, so that this share of the assignments is dropped; null leaves it."""
    max_factor: PositiveFloat = 2.0
    """The highest factor that `target_drop_percent` may lead to, which bounds the memory."""
    pad: bool = True
    """Exchange full [E, C, D] buffers (static shapes, no host read) instead of only what is kept."""


class Moe(Section):
    """The expert layers; `moe: null` trains the dense model."""

    num_experts: Annotated[int, Field(ge=2, le=65_536), BeforeValidator(_whole_number)]
    """Experts in each MoE layer, over the whole cluster."""
    top_k: Devices = 2
    """Experts that each token visits."""
    expert_ffn_size: Width
    """Inner width of one expert."""
    shared_expert_ffn_size: Width | None = None
    """Inner width of a shared expert, which every token passes besides its own (DeepSeek); null means none."""
    residual: bool = False
    """Mix the experts' output with a dense MLP's of `expert_ffn_size` by learned coefficients (PR-MoE)."""
    activation: Literal["swiglu", "geglu", "gelu", "relu2"] = "swiglu"
    """The activation of all of these: gated (SwiGLU, GEGLU: three matrices each) or not (GELU, squared ReLU: two)."""
    router: Router = Router()
    """How a token chooses its experts."""
    balance: Balance = Balance()
    """What keeps the experts evenly used."""
    capacity: Capacity = Capacity()
    """How much an expert accepts."""


class Source(Section):
    """One corpus. Its name labels its own validation loss."""

    name: Name
    """Label of the source in metrics and in the cache."""
    path: Text | None = None
    """A file, a folder, a glob, or `builtin:shakespeare` / `builtin:python`."""
    hub: Text | None = None
    """A data set on the Hugging Face hub, instead of `path`."""
    split: Text = "train"
    """The hub data set's split."""
    format: Literal["text", "jsonl", "parquet"] = "text"
    """How the files at `path` are read: `text`, a file is one document; `jsonl`, one JSON object a line, or in a file
    named `.json` also one array of objects; `parquet`, a row is a document. Text and jsonl may be compressed (gz, bz2,
    xz, zst, lz4). Of a folder are read: `.txt`; `.jsonl`, `.ndjson` and `.json`; or `.parquet`."""
    text_field: Text = "text"
    """The field that holds the text (jsonl, parquet, hub); no other field is looked at."""
    bad_records: Literal["refuse", "skip"] = "refuse"
    """What a record without usable text does (no JSON, no such field, null, not UTF-8; a text file is one record):
    `refuse` stops and names it, `skip` leaves it out and counts it. A damaged file is always refused."""
    weight: PositiveFloat = 1.0
    """Share of the training sequences, relative to the other sources'; exact, however small."""


class Data(Section):
    """What is read, how it becomes tokens, and where they are kept."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1, strict=False)]  # not strict: YAML has lists, no tuples
    """The corpora, mixed by weight."""
    tokenizer: Text = "bytes"
    """`bytes` (256 byte values and an end-of-document token), or a `tokenizers` JSON file."""
    end_of_document: Text | None = None
    """The token of that file that follows every document, as text (`<|im_end|>`); null takes one of the usual names:
    `<|endoftext|>`, `</s>`, `<|end_of_text|>`, `<eos>`."""
    cache_dir: Text = ".cache/dsmoe"
    """Folder of the tokenized corpora; runs with the same data share it."""
    validation_fraction: Fraction = 0.05
    """Part of each source's bytes held out, whole documents at a time."""
    seed: NonNegativeInt = 0
    """Decides the split and the order of the training sequences."""
    changed_order: Literal["refuse", "accept"] = "refuse"
    """What becomes of a run that goes on with other sources, weights, text or seed than its checkpoint was made with,
    and so reads some text again and leaves other out: `refuse` says how much, `accept` goes on."""


class Optimizer(Section):
    """AdamW with decoupled weight decay on matrices only, and the learning-rate schedule."""

    lr: PositiveFloat
    """The highest learning rate, reached after the warm-up."""
    min_lr: NonNegativeFloat = 0.0
    """The learning rate at the end of the decay."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    """Decay of Adam's running mean of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to Adam's denominator."""
    weight_decay: NonNegativeFloat = 0.1
    """Part of a weight removed per step, times the learning rate."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest global gradient norm over all parameters, experts included; 0 does not clip."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up; `wsd` stays high and decays at the end."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises linearly from 0."""
    offload: bool = False
    """Keep the fp32 weights and moments in the host's memory, and step there: less device memory, slower steps. Needs
    `parallel.zero_stage` 1 or 2."""
    decay_steps: PositiveInt | None = None
    """`wsd` only: length of the final decay; null means a fifth of the steps."""


class Train(Section):
    """How long, how much at once, in which precision."""

    steps: PositiveInt | None = None
    """Optimizer steps; give `steps` or `tokens`, not both."""
    tokens: PositiveInt | None = None
    """Training tokens; the last step is the last full batch of them."""
    batch_tokens: PositiveInt
    """Tokens per optimizer step over the whole cluster."""
    micro_batch_size: Length = 1
    """Sequences per device per forward pass."""
    sequence_length: Length
    """Tokens in one training sequence."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the forward and backward pass; `bf16` keeps fp32 master weights in the optimizer."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What is computed again in the backward pass rather than kept: `selective`, the first product of the experts,
    which is most of what an MoE layer keeps; `full`, each block from its input."""
    seed: NonNegativeInt = 0
    """Decides the initial weights."""
    eval_every: Interval = None
    """Steps between evaluations; null or 0 evaluates only before the first and after the last step."""
    eval_sequences: PositiveInt | None = None
    """Held-out sequences per source in an evaluation: the same text however many devices there are and whatever the
    micro-batch; null means 128."""
    eval_batches: PositiveInt | None = None
    """An older way to say `eval_sequences`: in eights, whatever the micro-batch."""


class Checkpoint(Section):
    """When the run is saved, and what a new start does with what it finds."""

    every: Interval = None
    """Steps between checkpoints; null or 0 saves only after the last step."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay."""
    keep_every: Interval = None
    """Checkpoints of steps that are multiples of this stay as well; null or 0 keeps none for its step."""
    keep_best: NonNegativeInt = 0
    """How many checkpoints of the lowest validation loss stay as well, of those that an evaluation came with; of each
    held-out text, if that has changed in the course of the run: losses on two texts do not compare."""
    asynchronous: bool = True
    """Train on while a checkpoint is being written: training stands still for the copy to host memory only, which takes
    about 12 bytes per parameter, divided by the ranks."""
    resume: Text = "auto"
    """`auto` continues the run folder's newest checkpoint if there is one, `always` insists on one, `never` refuses
    a folder that has one; anything else is the path of a checkpoint."""
    weights_from: Text | None = None
    """Path of a checkpoint whose weights a run begins with, for fine-tuning: optimizer state, schedule, data and step
    begin anew. A run that has a checkpoint of its own continues that."""


class Observe(Section):
    """What is written down while training."""

    log_every: PositiveInt = 1
    """Steps between lines on the console and in `metrics.jsonl`."""
    layer_detail_every: Interval = None
    """Steps between per-layer metrics (`moe/layer_003/...`), a multiple of `log_every`; null or 0 never."""
    tensorboard: bool = True
    """Write the metrics as TensorBoard events as well."""


class Config(Section):
    """One run: the root of the YAML file (`include` is resolved while loading and is not part of it)."""

    name: Name
    """The run's name, and the name of its folder."""
    runs_dir: Text = "runs"
    """The run folder is `runs_dir/name`."""
    cluster: Cluster = Cluster()
    """The machines."""
    parallel: Parallel = Parallel()
    """The layout over them."""
    model: Model
    """The transformer around the experts."""
    moe: Moe | None = None
    """The experts; null trains a dense model."""
    data: Data
    """The corpora and the tokenizer."""
    optimizer: Optimizer
    """AdamW and the learning-rate schedule."""
    train: Train
    """Length, batch and precision."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving and resuming."""
    observe: Observe = Observe()
    """Metrics."""
    deepspeed: dict[str, Any] = {}
    """Merged into the generated DeepSpeed config; a key that dsmoe owns is refused."""
