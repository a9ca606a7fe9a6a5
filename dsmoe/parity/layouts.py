"""The configs that `dsmoe parity` trains side by side: layouts, and a model small enough for all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dsmoe.config.effects import effect_of
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config, Parallel
from dsmoe.config.sections.base import Level

T = TypeVar("T")
R = TypeVar("R")

SHORT_NAMES = {
    "tp": "parallel.tensor",
    "sp": "parallel.sequence",
    "ep": "parallel.expert",
    "etp": "parallel.expert_tensor",
    "zero": "parallel.zero_stage",
    "a2a": "parallel.all_to_all",
    "chunks": "parallel.overlap_chunks",
    "nodes": "cluster.nodes",
}
"""Config keys by the short names in a layout; `dp`, the data degree, stands for the number of devices."""

MOST_LOCAL_RANKS = 16
"""More processes than that are a typing error, or more than one machine is for."""

SMALL_HEADS, SMALL_HEAD_DIM, SMALL_WIDTH, SMALL_SEQUENCE, SMALL_VOCABULARY = 4, 8, 16, 32, 264
"""Sizes of a shrunk model, but for what tensor degrees ask for; the vocabulary holds all bytes."""

Overrides = Mapping[str, Any]
"""Values by dotted key."""


@dataclass(frozen=True)
class Layout:
    """One layout to be compared: how it was written, its ranks, and the settings that make it."""

    text: str
    ranks: int
    overrides: Overrides

    @property
    def tensor(self) -> int:
        """The tensor degree."""
        return int(self.overrides["parallel.tensor"])

    @property
    def data(self) -> int:
        """The data degree."""
        return self.ranks // self.tensor


ONE_RANK = "tp=1,ep=1,dp=1"


def parse_layout(text: str, world_size: int | None = None) -> Layout:
    """Read `tp=2,ep=4,zero=1`; a key that is not there has its default, whatever the config says.

    Args:
        text: pairs of a key of `SHORT_NAMES`, `dp`, or a dotted config key, and its value.
        world_size: the ranks that were launched; None for the fewest that the degrees (and `dp`) can do with, on this
            machine.

    Raises:
        UserError: a key that does not exist, a value that is no number, or degrees that no number of ranks suits.
    """
    pairs = [_pair(part, text) for part in text.split(",")]
    given = dict(pairs)
    if len(given) < len(pairs):
        raise UserError(f"layout '{text}' has a key twice; keep one of them")
    if not given.keys() & {*SHORT_NAMES.values(), "dp"}:
        raise UserError(
            f"'{text}' is a setting for all layouts rather than a layout: write it before --layouts, or with a degree "
            f"where it is for that layout only, as tp=1,{text}"
        )
    overrides = {f"parallel.{name}": value for name, value in Parallel().model_dump().items()}
    overrides |= {key: value for key, value in given.items() if key != "dp"}
    degrees = ("parallel.tensor", "parallel.expert", "parallel.expert_tensor")
    tensor, expert, slices = (_count(overrides[key], key, text) for key in degrees)
    data = _count(given["dp"], "dp", text) if "dp" in given else None
    ranks = math.lcm(tensor, expert * slices) if data is None else tensor * data
    if world_size is not None:
        if data is not None and ranks != world_size:
            raise UserError(f"layout '{text}' has {tensor} x {data} = {ranks} ranks, and {world_size} were launched")
        return Layout(text, world_size, overrides)
    nodes = _count(overrides.setdefault("cluster.nodes", 1), "cluster.nodes", text)
    ranks = ranks if data is not None else math.lcm(ranks, nodes)
    if ranks % nodes:
        raise UserError(f"layout '{text}': {ranks} ranks cannot be on {nodes} nodes alike; change dp or nodes")
    if ranks > MOST_LOCAL_RANKS:
        raise UserError(
            f"layout '{text}' takes {ranks} processes, and at most {MOST_LOCAL_RANKS} are started on one machine; "
            f"for more, run the command under the launcher: torchrun ... -m dsmoe parity ..."
        )
    machine = {"cluster.devices_per_node": ranks // nodes, "cluster.device": "cpu"}
    return Layout(text, ranks, {**overrides, **machine})


def parse_layouts(texts: Sequence[str], world_size: int | None = None) -> list[Layout]:
    """Read several, as `parse_layout` does.

    Raises:
        UserError: a line for each that cannot be.
    """
    return all_of(texts, lambda text: parse_layout(text, world_size))


def all_of(items: Iterable[T], make: Callable[[T], R]) -> list[R]:
    """Return what `make` returns for each item.

    Raises:
        UserError: it has refused some; what it says of each, once.
    """
    made, problems = [], []
    for item in items:
        try:
            made.append(make(item))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return made


def comparable(config: Config, steps: int, precision: str) -> dict[str, Any]:
    """The settings under which every layout is to train the same model to rounding, by key.

    They change what a step computes, and never a tensor or the size of a step. Token drops, noise and `force_balanced`
    go by the tokens that one rank has, so they go. The learning rate starts high, so that a few steps move the weights,
    and Adam's eps is large enough that the rounding of a gradient near zero does not become a whole step of its weight.
    """
    settings: dict[str, Any] = {
        "train.steps": steps,
        "train.tokens": None,
        "train.precision": precision,
        "train.eval_every": None,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "optimizer.decay_steps": None,
        "optimizer.min_lr": 0.0,
        "optimizer.eps": max(config.optimizer.eps, 1e-6),
        "observe.tensorboard": False,
    }
    if config.moe is not None:
        enough = config.moe.num_experts / config.moe.top_k
        capacity = config.moe.capacity
        settings |= {
            "moe.capacity.factor": None if capacity.factor is None else enough,
            "moe.capacity.eval_factor": None if capacity.eval_factor is None else enough,
            "moe.capacity.target_drop_percent": None,
            "moe.router.noise": "none",
            "moe.router.force_balanced": False,
        }
    return _only("math", settings)


MICRO_BATCHES = 4
"""Sequences of a step, on the layout of most data ranks: gradients are summed over them as well as over ranks."""


def shrunk(config: Config, layouts: Sequence[Layout], text: str) -> dict[str, Any]:
    """The settings that make `config` small enough for any machine, by key.

    Its experts, choices, layers' kinds, optimizer and options stay; widths, layers, sequences and the batch become
    small, and the corpus is the file `text`, byte by byte. What a step computes stays but for `_small_corpus`.
    """
    tensors = {layout.tensor for layout in layouts}
    unit = math.lcm(*tensors, *(layout.overrides["parallel.expert_tensor"] for layout in layouts))
    sequence, micro_batch = math.lcm(SMALL_SEQUENCE, unit), min(config.train.micro_batch_size, 2)
    data_ranks = math.lcm(*(layout.data for layout in layouts))
    batch = {
        "train.sequence_length": sequence,
        "train.batch_tokens": MICRO_BATCHES * data_ranks * micro_batch * sequence,
    }
    evaluation = {
        "train.micro_batch_size": micro_batch,
        "train.eval_sequences": 4 * micro_batch,
        "train.eval_batches": None,
    }
    return {
        **_only("step", batch),
        **_only("free", evaluation),
        **_only("tensor", {**_small_model(config, unit, tensors), **_small_experts(config, unit)}),
        **_small_corpus(config, text, sequence),
    }


def _only(level: Level, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, none of which changes more than others of this level; free ones may be among them."""
    effects = {key: effect_of(key) for key in settings}
    others = [key for key, effect in effects.items() if effect is None or effect.level not in (level, "free")]
    assert not others, f"{', '.join(others)}: not of the effect {level}"
    return settings


def _small_corpus(config: Config, text: str, sequence: int) -> dict[str, Any]:
    """Settings of a small corpus, and of the mathematics that has to follow it and the small sizes."""
    return {
        "data.sources": [{"name": "sums", "path": text}],
        "data.tokenizer": "bytes",
        "data.validation_fraction": 0.05,
        "model.max_sequence_length": sequence,  # as long as its sequences
        "model.init_std": max(config.model.init_std, 0.08),  # gradients as large as a wide model's
    }


def as_overrides(settings: Overrides) -> list[str]:
    """The settings as `load_config` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def changes(config: Config, settings: Overrides) -> list[str]:
    """`key old -> new` for those that the config has otherwise."""
    tree = config.model_dump()

    def old(key: str) -> Any:
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        return value

    return [f"{key} {json.dumps(old(key))} -> {json.dumps(new)}" for key, new in settings.items() if old(key) != new]


def _small_model(config: Config, unit: int, tensors: set[int]) -> dict[str, Any]:
    model = config.model
    heads = math.lcm(SMALL_HEADS, unit)
    grouped = model.num_kv_heads is not None and model.num_kv_heads < model.num_heads
    # Two key/value heads are a divisor or a multiple of these tensor degrees; one is of any.
    key_value_heads = 2 if model.num_kv_heads != 1 and all(degree == 1 or degree % 2 == 0 for degree in tensors) else 1
    dense_layers, moe_every = min(model.dense_layers, 1), min(model.moe_every, 2)
    sizes = {
        "vocab_size": -(-SMALL_VOCABULARY // unit) * unit,
        "hidden_size": heads * SMALL_HEAD_DIM,
        "num_layers": min(model.num_layers, dense_layers + 2 * moe_every),
        "num_heads": heads,
        "num_kv_heads": key_value_heads if grouped else None,
        "head_dim": None if model.head_dim is None else 2 * SMALL_HEAD_DIM,
        "ffn_size": None if model.ffn_size is None else SMALL_WIDTH * unit,
        "dense_layers": dense_layers,
        "moe_every": moe_every,
    }
    return {f"model.{name}": value for name, value in sizes.items()}


def _small_experts(config: Config, unit: int) -> dict[str, Any]:
    moe, width = config.moe, SMALL_WIDTH * unit
    if moe is None:
        return {}
    shared = {} if moe.shared_expert_ffn_size is None else {"moe.shared_expert_ffn_size": width}
    return {"moe.expert_ffn_size": width, **shared}


def _pair(part: str, text: str) -> tuple[str, Any]:
    name, equals, value = (word.strip() for word in part.partition("="))
    if not equals or not value:
        raise UserError(f"layout '{text}': '{part}' is not written key=value, as in tp=2,ep=4,zero=1")
    known = [*SHORT_NAMES, "dp"]
    if name not in known and "." not in name:
        raise UserError(f"layout '{text}': there is no key {name}; there are {', '.join(known)}, section.key")
    key = SHORT_NAMES.get(name, name)
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _count(value: Any, key: str, text: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"layout '{text}': {key} is a number from 1 on, not {value}")
    return value
