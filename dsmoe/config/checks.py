"""What must hold between keys that are each right by themselves: arithmetic on the config, on any machine.

Every message names the keys, their values and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches

from dsmoe.config.deepspeed import FREE_KEYS, OWNED_KEYS
from dsmoe.config.schema import Config, Source

Problem = tuple[str, str]
"""The dotted key that a problem is about, for its place in the file, and the message."""

_ROW_ALIGNMENT = 8
"""grouped_mm reads rows in pieces of 16 bytes: 8 numbers in bf16."""
_BYTES_VOCABULARY = 257
"""256 byte values and the end-of-document token."""


def cross_field_problems(config: Config) -> list[Problem]:
    """Return every contradiction between keys of a config whose keys are valid one by one."""
    return [problem for check in _CHECKS for problem in check(config)]


def world_size(config: Config) -> int:
    """Return the number of ranks: one for each device."""
    return config.cluster.nodes * config.cluster.devices_per_node


def _tensor_layout(config: Config) -> Iterator[Problem]:
    tensor, world = config.parallel.tensor, world_size(config)
    if world % tensor:
        nearest = _nearest(tensor, _divisors(world))
        yield (
            "parallel.tensor",
            f"parallel.tensor ({tensor}) must divide the number of devices ({_world(config)}); nearest: {nearest}",
        )
    if config.parallel.sequence and tensor == 1:
        yield (
            "parallel.sequence",
            "parallel.sequence (true) would be unused: parallel.tensor is 1; remove it or raise parallel.tensor",
        )


def _tensor_slices(config: Config) -> Iterator[Problem]:
    """Check that tensor ranks get equal parts of all that is cut."""
    model, tensor = config.model, config.parallel.tensor
    num_kv_heads = model.num_kv_heads or model.num_heads
    sizes = {
        "model.num_heads": model.num_heads,
        "model.vocab_size": model.vocab_size,
        "train.sequence_length": config.train.sequence_length,
    }
    if model.ffn_size is not None:
        sizes["model.ffn_size"] = model.ffn_size
    if config.moe is not None and config.moe.shared_expert_ffn_size is not None:
        sizes["moe.shared_expert_ffn_size"] = config.moe.shared_expert_ffn_size
    if config.moe is not None and config.moe.residual:
        sizes["moe.expert_ffn_size"] = config.moe.expert_ffn_size
    for key, size in sizes.items():
        if size % tensor:
            larger = -(-size // tensor) * tensor
            yield key, f"{key} ({size}) must be a multiple of parallel.tensor ({tensor}); the next is {larger}"
    if num_kv_heads % tensor and tensor % num_kv_heads:
        yield (
            "model.num_kv_heads",
            f"model.num_kv_heads ({num_kv_heads}) and parallel.tensor ({tensor}): one must divide the other, so that "
            f"every rank has equally many key/value heads",
        )


def _expert_layout(config: Config) -> Iterator[Problem]:
    key, expert, inner = "parallel.expert", config.parallel.expert, config.parallel.expert_tensor
    world = world_size(config)
    fitting = [degree for degree in _divisors(world) if world % (degree * inner) == 0]
    if config.moe is None:
        if expert > 1:
            yield key, f"parallel.expert ({expert}) needs experts, but moe is null; set parallel.expert: 1 or give moe"
        if inner > 1:
            yield (
                "parallel.expert_tensor",
                f"parallel.expert_tensor ({inner}) needs experts, but moe is null; set parallel.expert_tensor: 1",
            )
    elif config.moe.num_experts % expert:
        num_experts = config.moe.num_experts
        divisors = _divisors(num_experts)
        message = f"parallel.expert ({expert}) must divide moe.num_experts ({num_experts})"
        yield key, f"{message}; nearest: {_nearest(expert, divisors)}{_also_fits(expert, divisors, fitting, world)}"
    if world % (expert * inner):
        product = f"{expert} * {inner} = {expert * inner}"
        remedy = f"nearest parallel.expert: {_nearest(expert, fitting)}" if fitting else "lower parallel.expert_tensor"
        yield (
            key,
            f"parallel.expert * parallel.expert_tensor ({product}) must divide the number of devices "
            f"({_world(config)}); {remedy}",
        )


def _all_to_all(config: Config) -> Iterator[Problem]:
    """Check that nodes have equal parts of a copy of the experts where tokens go through every node's ranks alike."""
    parallel, per_node = config.parallel, config.cluster.devices_per_node
    copy = parallel.expert * parallel.expert_tensor
    if parallel.all_to_all == "hierarchical" and copy % per_node and per_node % copy:
        product = f"{parallel.expert} * {parallel.expert_tensor} = {copy}"
        yield (
            "parallel.all_to_all",
            f"parallel.all_to_all (hierarchical) wants a copy of the experts to be on whole nodes, or within one: "
            f"parallel.expert * parallel.expert_tensor ({product}) must be a multiple or a divisor of "
            f"cluster.devices_per_node ({per_node}); change one of them, or set parallel.all_to_all: flat",
        )


def _experts(config: Config) -> Iterator[Problem]:
    model, moe = config.model, config.moe
    if moe is None:
        return
    if moe.top_k > moe.num_experts:
        yield "moe.top_k", f"moe.top_k ({moe.top_k}) must be at most moe.num_experts ({moe.num_experts})"
    if moe.top_k == 1 and moe.router.normalize_weights:
        yield (
            "moe.router.normalize_weights",
            "moe.router.normalize_weights (true) with moe.top_k (1) makes every weight 1, so the loss gives the router "
            "no gradient; set moe.router.normalize_weights: false",
        )
    if moe.residual and moe.shared_expert_ffn_size is not None:
        yield (
            "moe.residual",
            f"moe.residual (true) and moe.shared_expert_ffn_size ({moe.shared_expert_ffn_size}) both add a dense "
            "feed-forward that every token passes; remove one: the shared expert is added, the residual MLP is mixed "
            "in by learned coefficients",
        )
    slices = config.parallel.expert_tensor
    for key, size, unit in (
        ("model.hidden_size", model.hidden_size, _ROW_ALIGNMENT),
        ("moe.expert_ffn_size", moe.expert_ffn_size, _ROW_ALIGNMENT * slices),
    ):
        if size % unit:
            nearest = _nearest_multiples(size, unit)
            each = f" in each of {slices} slices (parallel.expert_tensor)" if unit > _ROW_ALIGNMENT else ""
            yield key, f"{key} ({size}) must be a multiple of {unit} for grouped_mm{each}; nearest: {nearest}"


def _expert_choice(config: Config) -> Iterator[Problem]:
    """Check routing by the experts' choice."""
    if config.moe is None or config.moe.router.choice == "token":
        return
    moe, router = config.moe, config.moe.router
    if not router.leak_future:
        yield (
            "moe.router.choice",
            "moe.router.choice (expert) lets a token of this causal model see the tokens after it: its loss would be "
            "too low, and it could not generate; set moe.router.choice: token, or moe.router.leak_future: true to "
            "train it all the same",
        )
    for name in ("factor", "eval_factor"):
        if getattr(moe.capacity, name) is None:
            key = f"moe.capacity.{name}"
            yield (
                key,
                f"{key} (null) must be set with moe.router.choice: expert, as it says how many tokens an expert takes",
            )
    idle = {
        "moe.router.normalize_weights": (router.normalize_weights, False),
        "moe.router.num_groups": (router.num_groups, 1),
        "moe.router.force_balanced": (router.force_balanced, False),
        "moe.balance.bias_update_rate": (moe.balance.bias_update_rate, 0.0),
        "moe.capacity.target_drop_percent": (moe.capacity.target_drop_percent, None),
    }
    for key, (value, default) in idle.items():
        if value != default:
            shown = "null" if default is None else str(default).lower()
            yield key, f"{key} ({str(value).lower()}) has no meaning with moe.router.choice: expert; set it to {shown}"


def _expert_groups(config: Config) -> Iterator[Problem]:
    """Check group-limited routing; one group is none."""
    if config.moe is None:
        return
    moe, router = config.moe, config.moe.router
    if moe.num_experts % router.num_groups:
        nearest = _nearest(router.num_groups, _divisors(moe.num_experts))
        yield (
            "moe.router.num_groups",
            f"moe.router.num_groups ({router.num_groups}) must divide moe.num_experts ({moe.num_experts}); "
            f"nearest: {nearest}",
        )
        return
    size = moe.num_experts // router.num_groups
    within = f"{router.top_k_groups} * {moe.num_experts} / {router.num_groups} = {router.top_k_groups * size}"
    if router.top_k_groups > router.num_groups:
        yield (
            "moe.router.top_k_groups",
            f"moe.router.top_k_groups ({router.top_k_groups}) must be at most moe.router.num_groups "
            f"({router.num_groups})",
        )
    elif router.num_groups > 1 and moe.top_k > router.top_k_groups * size:
        yield (
            "moe.router.top_k_groups",
            f"moe.top_k ({moe.top_k}) must fit into the moe.router.top_k_groups that a token may use ({within} "
            f"experts); raise moe.router.top_k_groups to {-(-moe.top_k // size)}",
        )
    if router.num_groups > 1 and router.group_score == "top2_sum" and size < 2:
        yield (
            "moe.router.group_score",
            f"moe.router.group_score (top2_sum) needs two experts in a group, and moe.router.num_groups "
            f"({router.num_groups}) leaves one; set moe.router.group_score: max",
        )


def _capacity(config: Config) -> Iterator[Problem]:
    if config.moe is None:
        return
    capacity = config.moe.capacity
    target, factor = capacity.target_drop_percent, capacity.factor
    if target is not None and factor is None:
        yield (
            "moe.capacity.target_drop_percent",
            f"moe.capacity.target_drop_percent ({target:g}) needs a moe.capacity.factor to begin with, and that is "
            "null (dropless); set moe.capacity.factor",
        )
    elif target is not None and factor is not None and factor > capacity.max_factor:
        yield (
            "moe.capacity.factor",
            f"moe.capacity.factor ({factor:g}) must be at most moe.capacity.max_factor ({capacity.max_factor:g}) where "
            "moe.capacity.target_drop_percent moves it",
        )
    if capacity.renormalize_dropped and factor is None and capacity.eval_factor is None:
        yield (
            "moe.capacity.renormalize_dropped",
            "moe.capacity.renormalize_dropped (true) would be unused: moe.capacity.factor and eval_factor are null, so "
            "nothing is dropped; remove it",
        )


def _attention(config: Config) -> Iterator[Problem]:
    model = config.model
    num_kv_heads = model.num_kv_heads or model.num_heads
    if model.num_heads % num_kv_heads:
        yield (
            "model.num_kv_heads",
            f"model.num_kv_heads ({num_kv_heads}) must divide model.num_heads ({model.num_heads}); "
            f"nearest: {_nearest(num_kv_heads, _divisors(model.num_heads))}",
        )
    if model.head_dim is None and model.hidden_size % model.num_heads:
        yield (
            "model.num_heads",
            f"model.num_heads ({model.num_heads}) must divide model.hidden_size ({model.hidden_size}); "
            f"nearest: {_nearest(model.num_heads, _divisors(model.hidden_size))}, or set model.head_dim",
        )
    elif model.head_dim is None and model.hidden_size // model.num_heads % 2:
        width = f"{model.hidden_size} / {model.num_heads} = {model.hidden_size // model.num_heads}"
        yield (
            "model.num_heads",
            f"model.hidden_size / model.num_heads ({width}) must be even, because rotary positions turn pairs; "
            "change one of them or set model.head_dim",
        )
    elif model.head_dim is not None and model.head_dim % 2:
        yield (
            "model.head_dim",
            f"model.head_dim ({model.head_dim}) must be even, because rotary positions turn pairs; "
            f"nearest: {_nearest_multiples(model.head_dim, 2)}",
        )


def _layers(config: Config) -> Iterator[Problem]:
    model = config.model
    num_moe_layers = 0
    if config.moe is not None:
        # Layer i is an MoE layer if i >= dense_layers and (i - dense_layers + 1) % moe_every == 0.
        num_moe_layers = max(0, model.num_layers - model.dense_layers) // model.moe_every
        if num_moe_layers == 0:
            yield (
                "model",
                f"model.num_layers ({model.num_layers}), model.dense_layers ({model.dense_layers}) and model.moe_every "
                f"({model.moe_every}) leave no MoE layer; dense_layers + moe_every must be at most num_layers, "
                "or set moe: null",
            )
    num_dense_layers = model.num_layers - num_moe_layers
    if num_dense_layers and model.ffn_size is None:
        yield (
            "model",
            f"model.ffn_size is missing: {num_dense_layers} of {model.num_layers} layers are dense; "
            "set it to their inner width",
        )
    if not num_dense_layers and model.ffn_size is not None:
        yield (
            "model.ffn_size",
            f"model.ffn_size ({model.ffn_size}) would be unused: all {model.num_layers} layers are MoE layers, whose "
            "width is moe.expert_ffn_size; remove it",
        )


def _length(config: Config) -> Iterator[Problem]:
    train = config.train
    if train.sequence_length > config.model.max_sequence_length:
        yield (
            "train.sequence_length",
            f"train.sequence_length ({train.sequence_length}) must be at most model.max_sequence_length "
            f"({config.model.max_sequence_length}); lower the one or raise the other",
        )
    if train.steps is None and train.tokens is None:
        yield "train", "train.steps or train.tokens must say how long to train; set one of them"
    if train.steps is not None and train.tokens is not None:
        yield (
            "train.tokens",
            f"train.steps ({train.steps}) and train.tokens ({train.tokens}) are both set; "
            "remove one, or set it to null if it is included",
        )
    if train.tokens is not None and train.tokens < train.batch_tokens:
        yield (
            "train.tokens",
            f"train.tokens ({train.tokens}) must be at least train.batch_tokens ({train.batch_tokens}), one step",
        )


def _batch(config: Config) -> Iterator[Problem]:
    train = config.train
    data_degree, rest = divmod(world_size(config), config.parallel.tensor)
    if rest:  # there is no data degree then, and that is reported
        return
    unit = data_degree * train.micro_batch_size * train.sequence_length
    if train.batch_tokens % unit:
        yield (
            "train.batch_tokens",
            f"train.batch_tokens ({train.batch_tokens}) must be a multiple of data ranks * train.micro_batch_size * "
            f"train.sequence_length ({data_degree} * {train.micro_batch_size} * {train.sequence_length} = {unit}); "
            f"nearest: {_nearest_multiples(train.batch_tokens, unit)}",
        )


def _learning_rate(config: Config) -> Iterator[Problem]:
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield (
            "optimizer.min_lr",
            f"optimizer.min_lr ({optimizer.min_lr:g}) must be at most optimizer.lr ({optimizer.lr:g})",
        )
    if optimizer.decay_steps is not None and optimizer.schedule != "wsd":
        yield (
            "optimizer.decay_steps",
            f"optimizer.decay_steps ({optimizer.decay_steps}) would be unused: optimizer.schedule is "
            f"{optimizer.schedule}; remove it or set optimizer.schedule: wsd",
        )
    yield from _schedule(config)


def _schedule(config: Config) -> Iterator[Problem]:
    """Check the parts of the schedule against the length of the run, where that is known."""
    optimizer, train = config.optimizer, config.train
    if (train.steps is None) == (train.tokens is None):
        return
    steps = train.steps or (train.tokens or 0) // train.batch_tokens
    if steps == 0:
        return
    total = f"{steps}, from train.steps" if train.steps else f"{steps} = train.tokens // train.batch_tokens"
    warmup = optimizer.warmup_steps
    if warmup >= steps:
        yield (
            "optimizer.warmup_steps",
            f"optimizer.warmup_steps ({warmup}) must be less than the number of steps ({total})",
        )
    elif optimizer.schedule == "wsd":
        decay = optimizer.decay_steps or steps // 5
        origin = "" if optimizer.decay_steps else ", a fifth of the steps"
        if warmup + decay > steps:
            yield (
                "optimizer.decay_steps" if optimizer.decay_steps else "optimizer.warmup_steps",
                f"optimizer.warmup_steps ({warmup}) + optimizer.decay_steps ({decay}{origin}) must be at most the "
                f"number of steps ({total}); with this warm-up, decay_steps can be up to {steps - warmup}",
            )


def _data(config: Config) -> Iterator[Problem]:
    names: set[str] = set()
    for index, source in enumerate(config.data.sources):
        key = f"data.sources.{index}"
        yield from _source(key, source)
        if source.name in names:
            yield f"{key}.name", f'{key}.name ("{source.name}") is taken by an earlier source; give it another name'
        names.add(source.name)
    vocab_size = config.model.vocab_size
    if config.data.tokenizer == "bytes" and vocab_size < _BYTES_VOCABULARY:
        yield (
            "model.vocab_size",
            f"model.vocab_size ({vocab_size}) must be at least {_BYTES_VOCABULARY} for data.tokenizer: bytes "
            "(256 byte values and the end of a document)",
        )


def _source(key: str, source: Source) -> Iterator[Problem]:
    if source.path is None and source.hub is None:
        yield key, f"{key}.path or {key}.hub must say where the text is; set one of them"
    if source.path is not None and source.hub is not None:
        yield f"{key}.hub", f'{key}.path ("{source.path}") and {key}.hub ("{source.hub}") are both set; remove one'
    elif source.hub is not None and source.format != "text":
        yield (
            f"{key}.format",
            f"{key}.format ({source.format}) is for files, and this source is a hub data set; remove it",
        )
    elif source.path is not None and source.split != "train":
        yield (
            f"{key}.split",
            f'{key}.split ("{source.split}") is for hub data sets, and this source is a path; remove it',
        )


def _deepspeed(config: Config) -> Iterator[Problem]:
    for key, ours in OWNED_KEYS.items():
        holder: object = config.deepspeed
        *sections, name = key.split(".")
        for section in sections:
            holder = holder.get(section, {}) if isinstance(holder, dict) else {}
        if isinstance(holder, dict) and name in holder:
            remedy = f"remove it and use {ours}" if ours else "remove it"
            yield f"deepspeed.{key}", f"deepspeed.{key} is set by dsmoe; {remedy}"
    if not isinstance(config.deepspeed.get("zero_optimization", {}), dict):
        yield "deepspeed.zero_optimization", "deepspeed.zero_optimization must be a mapping, it is merged into ours"


def _unknown_to_deepspeed(config: Config) -> Iterator[Problem]:
    """Find the top-level keys that DeepSpeed would ignore without a word."""
    known = (*FREE_KEYS, *(key for key in OWNED_KEYS if "." not in key))
    for name in config.deepspeed:
        if name not in known:
            guess = get_close_matches(name, known, 1)
            remedy = f"did you mean '{guess[0]}'?" if guess else f"the keys are {', '.join(FREE_KEYS)}"
            yield f"deepspeed.{name}", f"deepspeed.{name}: unknown to DeepSpeed; {remedy}"


def _observe(config: Config) -> Iterator[Problem]:
    detail, every = config.observe.layer_detail_every, config.observe.log_every
    if detail is not None and detail % every:
        yield (
            "observe.layer_detail_every",
            f"observe.layer_detail_every ({detail}) must be a multiple of observe.log_every ({every}); "
            f"nearest: {_nearest_multiples(detail, every)}",
        )


_CHECKS: tuple[Callable[[Config], Iterable[Problem]], ...] = (
    _tensor_layout,
    _tensor_slices,
    _expert_layout,
    _all_to_all,
    _attention,
    _layers,
    _experts,
    _expert_choice,
    _expert_groups,
    _capacity,
    _data,
    _learning_rate,
    _length,
    _batch,
    _observe,
    _deepspeed,
    _unknown_to_deepspeed,
)


def _world(config: Config) -> str:
    cluster = config.cluster
    return f"{cluster.nodes} nodes x {cluster.devices_per_node} = {world_size(config)}"


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _neighbours(value: int, valid: list[int]) -> list[int]:
    """Return the valid values next to an invalid one, below and above."""
    return [n for n in valid if n < value][-1:] + [n for n in valid if n > value][:1]


def _either(values: Iterable[int]) -> str:
    return " or ".join(map(str, values))


def _nearest(value: int, valid: list[int]) -> str:
    return _either(_neighbours(value, valid))


def _nearest_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return _either(n for n in (below, below + unit) if n)


def _also_fits(expert: int, divisors: list[int], fitting: list[int], world: int) -> str:
    """Name a degree that suits the devices too, where the nearest divisors of num_experts do not."""
    both = [degree for degree in divisors if degree in fitting]
    if not both or set(both) & set(_neighbours(expert, divisors)):
        return ""
    best = min(both, key=lambda degree: abs(degree - expert))
    return f" ({best} divides the {world} devices as well)"
