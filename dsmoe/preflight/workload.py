"""The load that a run puts on the machines: its matrix products and its messages, by arithmetic, without torch.

Everything here is arithmetic on the config, so the ranks agree on it without a word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

from dsmoe.config.deepspeed import to_deepspeed
from dsmoe.config.registry import entry_named
from dsmoe.config.schema import Config
from dsmoe.config.sections.model import DENSE_ACTIVATION
from dsmoe.config.sections.moe import ACTIVATION_SHAPES
from dsmoe.plan import Plan, Topology, head_dim, num_moe_layers
from dsmoe.plan.topology import Axis, RankGroups

Operation = Literal["all_reduce", "all_to_all"]

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default `zero_optimization.reduce_bucket_size`: larger gradients are reduced in parts."""
MAX_ROUNDS = 16
"""Most partners of each rank: all, of up to 16, else evenly spaced ones. A slow node is slow with each."""

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Product:
    """`count` matrix products of together `rows` rows: [rows / count, inner] x [inner, width] each."""

    name: str
    rows: int
    inner: int
    width: int
    count: int = 1

    @property
    def flops(self) -> int:
        """A multiply and an add are two."""
        return 2 * self.rows * self.inner * self.width

    @property
    def numbers(self) -> int:
        """Numbers that it reads and writes: what the buffers must hold."""
        return self.rows * (self.inner + self.width) + self.count * self.inner * self.width

    @property
    def shape(self) -> str:
        """`8 x 1,024 x 4,096 x 14,336` for people: experts, rows of each, inner, width."""
        experts = [self.count] if self.count > 1 else []
        return " x ".join(f"{size:,}" for size in (*experts, self.rows // self.count, self.inner, self.width))

    def within(self, numbers: int, flops: float) -> Product:
        """The same with so few rows and experts that its buffers hold `numbers` and it takes `flops`, at most."""
        count = max(1, min(self.count, numbers // (2 * self.inner * self.width)))
        in_memory = (numbers - count * self.inner * self.width) // (self.inner + self.width)
        in_time = int(flops // (2 * self.inner * self.width))
        rows = min(self.rows * count // self.count, in_memory, in_time)
        return Product(self.name, max(rows // count, 1) * count, self.inner, self.width, count)


@dataclass(frozen=True)
class Message:
    """A collective that the run will do in every step, over which of its groups."""

    name: str
    groups: str
    """An axis of the topology; `across` or `inside` are the levels of a hierarchical exchange."""
    size: int
    """Ranks in a group."""
    operation: Operation
    bytes: int
    """Bytes of each rank's buffer."""

    @property
    def bus_factor(self) -> float:
        """Factor from bytes per second to what a device sends per second, as nccl-tests counts bus bandwidth."""
        return (2 if self.operation == "all_reduce" else 1) * (self.size - 1) / self.size


def products(plan: Plan) -> list[Product]:
    """The heaviest dense product of the forward pass, and the experts' first."""
    config, topology = plan.config, plan.topology
    model, moe, train = config.model, config.moe, config.train
    tokens = train.micro_batch_size * train.sequence_length
    hidden, dense_layers = model.hidden_size, model.num_layers - num_moe_layers(config)
    # By how often it is done in a step: the output head once, the others in every layer.
    candidates = [
        (1, "output head", model.vocab_size),
        (model.num_layers, "query", model.num_heads * head_dim(model)),
        (dense_layers, "dense FFN", ACTIVATION_SHAPES[DENSE_ACTIVATION].input_matrices * (model.ffn_size or 0)),
    ]
    _, name, width = max(candidates, key=lambda c: c[0] * c[2])
    found = [Product(name, tokens, hidden, max(1, width // topology.tensor))]
    if moe is not None and num_moe_layers(config):
        parts = entry_named(ACTIVATION_SHAPES, "moe.activation", moe.activation).input_matrices
        width, experts = parts * moe.expert_ffn_size // topology.expert_tensor, moe.num_experts // topology.expert
        # Every rank of a balanced exchange gets as many rows as it sends.
        rows = max(experts, _exchanged_rows(config, topology) // experts * experts)
        found.append(Product("experts", rows, hidden, width, experts))
    return found


def messages(plan: Plan) -> list[Message]:
    """The collectives of a step, those of groups of one rank left out."""
    config, topology = plan.config, plan.topology
    bytes_each = 2 if config.train.precision == "bf16" else 4
    zero = to_deepspeed(config, plan.batch.accumulation_steps)["zero_optimization"]
    bucket = int(zero.get("reduce_bucket_size", BUCKET_ELEMENTS))
    tokens, hidden = config.train.micro_batch_size * config.train.sequence_length, config.model.hidden_size

    def message(name: str, groups: str, size: int, operation: Operation, numbers: int) -> Message:
        return Message(name, groups, size, operation, numbers * bytes_each)

    found = [
        message("gradients", "data", topology.data, "all_reduce", min(plan.per_device.shared, bucket)),
        message("tensor", "tensor", topology.tensor, "all_reduce", tokens * hidden),
    ]
    if config.moe is not None and num_moe_layers(config):
        experts = min(plan.per_device.experts, bucket)
        found.append(message("expert gradients", "expert_data", topology.expert_data, "all_reduce", experts))
        rows = _exchanged_rows(config, topology)
        if levels := topology.exchange_levels():
            across, inside = (len(groups[0]) for groups in levels)
            # One row per token and node that some choice of it is on: at most one per choice.
            first = rows * min(across, config.moe.top_k) // config.moe.top_k
            found.append(message("dispatch across nodes", "across", across, "all_to_all", first * hidden))
            found.append(message("dispatch inside nodes", "inside", inside, "all_to_all", rows * hidden))
        else:
            found.append(message("dispatch", "exchange", topology.exchange, "all_to_all", rows * hidden))
    return [m for m in found if m.size > 1 and m.bytes]


def group_ranks(topology: Topology, message: Message) -> RankGroups:
    """The ranks of every group that does `message`."""
    if message.groups in ("across", "inside"):
        levels = topology.exchange_levels()
        assert levels is not None
        return levels[message.groups == "inside"]
    return topology.groups(cast(Axis, message.groups))


def rounds(number: int) -> list[Pairs]:
    """Pair `number` of anything so that each meets each other in turn; nobody is in two pairs of a round.

    The circle method of round-robin tournaments; where that is more than `MAX_ROUNDS`, as many of its rounds.
    """
    places = number + number % 2  # with an odd number, whoever is paired with the last place sits out
    found = []
    for turn in range(places - 1):
        ring = [0, *((place + turn) % (places - 1) + 1 for place in range(places - 1))]
        pairs = ((ring[i], ring[places - 1 - i]) for i in range(places // 2))
        if met := tuple((min(pair), max(pair)) for pair in pairs if max(pair) < number):
            found.append(met)
    if len(found) <= MAX_ROUNDS:
        return found
    return [found[turn * len(found) // MAX_ROUNDS] for turn in range(MAX_ROUNDS)]


def _exchanged_rows(config: Config, topology: Topology) -> int:
    """Rows that a rank sends in one exchange: full buffers where they are padded, else one per choice."""
    moe = config.moe
    assert moe is not None
    # Tensor ranks have a slice of the tokens each, and overlapping cuts the micro-batch.
    share = topology.tensor * config.parallel.overlap_chunks
    tokens = max(1, config.train.micro_batch_size * config.train.sequence_length // share)
    rows = tokens * moe.top_k
    if moe.capacity.factor is not None and moe.capacity.pad:
        each = math.ceil(rows / moe.num_experts * moe.capacity.factor)
        rows = moe.num_experts * max(moe.capacity.minimum, each)
    return rows * topology.expert_tensor
