"""What must hold between keys that are each right by themselves: arithmetic on the config, on any machine.

Every message names the keys, their values and what to do. Here are model, data, optimizer and training; layouts,
`moe` and `deepspeed` have files of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from dsmoe.config.deepspeed_checks import deepspeed_problems
from dsmoe.config.errors import Problem
from dsmoe.config.layout_checks import LAYOUT_CHECKS, world_size
from dsmoe.config.moe_checks import MOE_CHECKS
from dsmoe.config.nearest import divisors_of, nearest_multiples_of, nearest_of
from dsmoe.config.partial import UnsoundError
from dsmoe.config.schedules import default_decay_steps, schedule_named, with_decay_steps
from dsmoe.config.schema import Config, Source

_BYTES_VOCABULARY = 257
"""256 byte values and the end-of-document token."""

_LEAST_SHARE = 1e-15
"""Of the samples: the longest run has fewer than one over this."""


def cross_field_problems(config: Config) -> list[Problem]:
    """Return every contradiction between keys of a config whose keys are valid one by one.

    In a `sound_part` of one, those between the keys that are there: a check ends where it wants another.
    """
    problems: list[Problem] = []
    for check in _CHECKS:
        with suppress(UnsoundError):
            problems.extend(check(config))
    return problems


def _attention(config: Config) -> Iterator[Problem]:
    model = config.model
    num_kv_heads = model.num_kv_heads or model.num_heads
    if model.num_heads % num_kv_heads:
        yield (
            "model.num_kv_heads",
            f"model.num_kv_heads ({num_kv_heads}) must divide model.num_heads ({model.num_heads}); "
            f"nearest: {nearest_of(num_kv_heads, divisors_of(model.num_heads))}",
        )
    if model.head_dim is None and model.hidden_size % model.num_heads:
        yield (
            "model.num_heads",
            f"model.num_heads ({model.num_heads}) must divide model.hidden_size ({model.hidden_size}); "
            f"nearest: {nearest_of(model.num_heads, divisors_of(model.hidden_size))}, or set model.head_dim",
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
            f"nearest: {nearest_multiples_of(model.head_dim, 2)}",
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


def _evaluation(config: Config) -> Iterator[Problem]:
    train = config.train
    if train.eval_sequences is not None and train.eval_batches is not None:
        yield (
            "train.eval_batches",
            f"train.eval_sequences ({train.eval_sequences}) and train.eval_batches ({train.eval_batches}, in eights) "
            "both say how much is evaluated; remove eval_batches, or set it to null if it is included",
        )


def _batch(config: Config) -> Iterator[Problem]:
    train = config.train
    data_degree, rest = divmod(world_size(config), config.parallel.tensor)
    unit = train.micro_batch_size * train.sequence_length
    if rest:  # there is no data degree then, and that is reported
        if train.batch_tokens % unit:
            yield (
                "train.batch_tokens",
                f"train.batch_tokens ({train.batch_tokens}) must be a multiple of train.micro_batch_size * "
                f"train.sequence_length ({train.micro_batch_size} * {train.sequence_length} = {unit}), whatever the "
                f"number of data ranks becomes; nearest: {nearest_multiples_of(train.batch_tokens, unit)}",
            )
        return
    unit *= data_degree
    if train.batch_tokens % unit:
        yield (
            "train.batch_tokens",
            f"train.batch_tokens ({train.batch_tokens}) must be a multiple of data ranks * train.micro_batch_size * "
            f"train.sequence_length ({data_degree} * {train.micro_batch_size} * {train.sequence_length} = {unit}); "
            f"nearest: {nearest_multiples_of(train.batch_tokens, unit)}",
        )


def _learning_rate(config: Config) -> Iterator[Problem]:
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield (
            "optimizer.min_lr",
            f"optimizer.min_lr ({optimizer.min_lr:g}) must be at most optimizer.lr ({optimizer.lr:g})",
        )
    if optimizer.decay_steps is not None and not schedule_named(optimizer.schedule).takes_decay_steps:
        yield (
            "optimizer.decay_steps",
            f"optimizer.decay_steps ({optimizer.decay_steps}) would be unused: optimizer.schedule is "
            f"{optimizer.schedule}; remove it or set optimizer.schedule: {' or '.join(with_decay_steps())}",
        )
    if optimizer.offload and config.parallel.zero_stage == 0:
        yield (
            "optimizer.offload",
            "optimizer.offload (true) needs parallel.zero_stage (0) to be 1 or 2, at which DeepSpeed can keep the "
            "optimizer on the host",
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
    elif schedule_named(optimizer.schedule).takes_decay_steps:
        decay = optimizer.decay_steps or default_decay_steps(steps)
        origin = "" if optimizer.decay_steps else ", a fifth of the steps"
        if warmup + decay > steps:
            yield (
                "optimizer.decay_steps" if optimizer.decay_steps else "optimizer.warmup_steps",
                f"optimizer.warmup_steps ({warmup}) + optimizer.decay_steps ({decay}{origin}) must be at most the "
                f"number of steps ({total}); with this warm-up, decay_steps can be up to {steps - warmup}",
            )


def _data(config: Config) -> Iterator[Problem]:
    names: set[str] = set()
    total = sum(source.weight for source in config.data.sources)
    for index, source in enumerate(config.data.sources):
        key = f"data.sources.{index}"
        yield from _source(key, source)
        if source.weight / total < _LEAST_SHARE:
            yield (
                f"{key}.weight",
                f"{key}.weight ({source.weight:g}) is {source.weight / total:.1g} of all weights ({total:g}), of which "
                "no run would see a sequence; leave the source out, or give it a larger weight",
            )
        if source.name in names:
            yield f"{key}.name", f'{key}.name ("{source.name}") is taken by an earlier source; give it another name'
        names.add(source.name)
    if config.data.tokenizer == "bytes" and config.data.end_of_document is not None:
        yield (
            "data.end_of_document",
            f"data.end_of_document ({config.data.end_of_document!r}) is for a tokenizer's file, and data.tokenizer is "
            "bytes, which has an end of its own; remove it",
        )
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


def _observe(config: Config) -> Iterator[Problem]:
    detail, every = config.observe.layer_detail_every, config.observe.log_every
    if detail is not None and detail % every:
        yield (
            "observe.layer_detail_every",
            f"observe.layer_detail_every ({detail}) must be a multiple of observe.log_every ({every}); "
            f"nearest: {nearest_multiples_of(detail, every)}",
        )


def _checkpoint(config: Config) -> Iterator[Problem]:
    options, evaluations = config.checkpoint, config.train.eval_every
    every, milestones, best = options.every, options.keep_every, options.keep_best
    if milestones is not None and (every is None or milestones % every):
        nearest = f"; nearest: {nearest_multiples_of(milestones, every)}" if every else "; set that"
        yield (
            "checkpoint.keep_every",
            f"checkpoint.keep_every ({milestones}) must be a multiple of checkpoint.every "
            f"({'null' if every is None else every}){nearest}",
        )
    if best and (every is None or evaluations is None or (every % evaluations and evaluations % every)):
        yield (
            "checkpoint.keep_best",
            f"checkpoint.keep_best ({best}) goes by evaluations of the steps that are saved: train.eval_every "
            f"({'null' if evaluations is None else evaluations}) and checkpoint.every "
            f"({'null' if every is None else every}) must be set, and one a multiple of the other",
        )


_CHECKS: tuple[Callable[[Config], Iterable[Problem]], ...] = (
    *LAYOUT_CHECKS,
    _attention,
    _layers,
    *MOE_CHECKS,
    _data,
    _learning_rate,
    _length,
    _batch,
    _evaluation,
    _checkpoint,
    _observe,
    deepspeed_problems,
)
