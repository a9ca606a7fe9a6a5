"""A rank's share of a checkpoint: the state of a DeepSpeed engine as chunks of global tensors.

A global tensor is one that a single rank would have. Names: `model/NAME` is a parameter, exact (the fp32 master where
there is one); `exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME` are AdamW's; `buffer/NAME` is what the MoE layers carry
from step to step; `rng/DEVICE` has a row for each rank.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.engine.optimizer_state import (
    MOMENTS,
    Fragment,
    check_links,
    fragments,
    inner_optimizer,
    make_moments,
    moments_of,
)
from dsmoe.parallel.sharding import Box, ShardedTensor, boxes_of_range

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MODEL, STEP, BUFFER, RNG = "model", "step", "buffer", "rng"

NamedBox = tuple[str, Box]
"""The name of a global parameter, and a box of it."""


@dataclass(frozen=True)
class Chunk:
    """A box of a global tensor with its values on this rank, a view to be read or written."""

    key: str
    """Kind and name of the global tensor: `exp_avg/blocks.1.ffn.up.weight`."""
    shape: tuple[int, ...]
    """Shape of the global tensor."""
    box: Box
    values: torch.Tensor
    """The box's elements, of its shape."""

    @classmethod
    def whole(cls, key: str, tensor: torch.Tensor) -> Chunk:
        """Return the chunk that is all of a tensor."""
        return cls(key, tuple(tensor.shape), Box.whole(tensor.shape), tensor)

    @property
    def is_weight(self) -> bool:
        """True if it is of a parameter, or of its master."""
        return self.key.startswith(f"{MODEL}/")


# From a ZeRO fragment to chunks. Rank 1 of 2 has the columns 3-5 of a weight of 2 x 6, its tensor is 2 x 3, and ZeRO
# gives it the elements [2, 5) of that tensor, flattened:
#   local tensor    .  . [0]     Box((0, 2), (1, 1)) of the local tensor, flat[0:1] -> Box((0, 5), (1, 1)) of the weight
#                  [1  2] .      Box((1, 0), (1, 2)) of the local tensor, flat[1:3] -> Box((1, 3), (1, 2)) of the weight
def chunks_of_range(
    sharded: ShardedTensor, shape: tuple[int, ...], start: int, values: Mapping[str, torch.Tensor]
) -> Iterator[list[Chunk]]:
    """Yield a range of a flattened rank's tensor as chunks of the global tensor: for each box, one of each kind.

    Args:
        sharded: the rank's tensor as boxes of the global one.
        shape: of the rank's tensor.
        start: the first element of the range, in the flattened tensor.
        values: by kind (`model`, `exp_avg`), the values of the range; flat, of equal size. Chunks are views of them.
    """
    numel, begin = next(iter(values.values())).numel(), 0
    # Cut twice: into boxes, then where the rank's tensor has side by side what is apart in the global one (gate, up).
    for box in boxes_of_range(shape, start, start + numel):
        for local_box, global_box in sharded.boxes:
            common = box.overlap(local_box)
            if common is None:
                continue
            # `common` is in the rank's tensor: the same elements in the global tensor, and within `box`.
            target, inner = common.relative_to(local_box).shifted(global_box.start), common.relative_to(box)
            yield [
                Chunk(
                    f"{kind}/{sharded.name}",
                    sharded.shape,
                    target,
                    # A box is one run of `flat`, so this is a view: a load writes through it into master and moments.
                    inner.view(flat.narrow(0, begin, box.size).view(box.shape)),
                )
                for kind, flat in values.items()
            ]
        begin += box.size


class EngineState:
    """The chunks of a checkpoint that an engine has on this rank. Make it before the first step.

    Args:
        engine: DeepSpeed's.
        sharded: each parameter as boxes of the whole model, by its name in `engine.module`.
    """

    def __init__(self, engine: DeepSpeedEngine, sharded: Mapping[str, ShardedTensor]) -> None:
        self.engine = engine
        named = dict(engine.module.named_parameters())
        # By identity: a fragment knows its parameter, and not the name.
        self._sharded = {id(parameter): sharded[name] for name, parameter in named.items()}
        self._fragments = fragments(engine)
        check_links(self._fragments)
        own_masters = {id(f.parameter) for f in self._fragments if f.master is f.parameter}
        # Without a master on this rank, or with a share of one only: loading a master leaves these as they are.
        self._not_masters = [parameter for parameter in named.values() if id(parameter) not in own_masters]

    def _name(self, parameter: torch.Tensor) -> str:
        return self._sharded[id(parameter)].name

    def _fragment_chunks(self, fragment: Fragment, tensors: Mapping[str, torch.Tensor]) -> Iterator[list[Chunk]]:
        """Yield for each box of the fragment a chunk of each of `tensors`, which have the shape of its master."""
        parameter = fragment.parameter
        values = {kind: fragment.view(tensor) for kind, tensor in tensors.items()}
        return chunks_of_range(self._sharded[id(parameter)], tuple(parameter.shape), fragment.start, values)

    def _master_chunks(self, fragment: Fragment) -> Iterator[Chunk]:
        return (chunk for (chunk,) in self._fragment_chunks(fragment, {MODEL: fragment.master}))

    def _weight_chunks(self, parameter: torch.Tensor) -> Iterator[Chunk]:
        values = {MODEL: parameter.detach().view(-1)}
        found = chunks_of_range(self._sharded[id(parameter)], tuple(parameter.shape), 0, values)
        return (chunk for (chunk,) in found)

    # The optimizer does not know these: they have no master, and no fragment.
    def _frozen(self) -> list[torch.Tensor]:
        return [parameter for parameter in self._not_masters if not parameter.requires_grad]

    def boxes(self) -> list[NamedBox]:
        """Return the boxes of parameters that this rank could write; replicas have the same."""
        masters = [
            (self._name(fragment.parameter), chunk.box)
            for fragment in self._fragments
            for chunk in self._master_chunks(fragment)
        ]
        frozen = [(self._name(p), chunk.box) for p in self._frozen() for chunk in self._weight_chunks(p)]
        return masters + frozen

    def to_save(self, owned: set[NamedBox]) -> Iterator[Chunk]:
        """Yield values and optimizer state of the boxes in `owned`: views of what the next step changes."""
        for fragment in self._fragments:
            name, state = self._name(fragment.parameter), moments_of(self.engine, fragment)
            # No moments before the first step: then none are saved.
            tensors = {MODEL: fragment.master, **{kind: state[kind] for kind in MOMENTS if kind in state}}
            # Weight and moments are cut alike, and one rank writes all of a box.
            for chunks in self._fragment_chunks(fragment, tensors):
                box = chunks[0].box
                if (name, box) not in owned:
                    continue
                yield from chunks
                # One count per parameter, written by the rank that writes its first element.
                if state and not any(box.start):
                    yield Chunk(f"{STEP}/{name}", (), Box((), ()), state["step"])
        for parameter in self._frozen():
            name = self._name(parameter)
            yield from (chunk for chunk in self._weight_chunks(parameter) if (name, chunk.box) in owned)

    def bytes_to_save(self, owned: set[NamedBox]) -> int:
        """Return the size of all that `to_save` yields when there are moments, but for a few bytes per parameter."""
        element_bytes = {self._name(parameter): parameter.element_size() for parameter in self._frozen()}
        # Master and two moments.
        optimized = torch.float32.itemsize * (1 + len(MOMENTS))
        return sum(box.size * element_bytes.get(name, optimized) for name, box in owned)

    def weights_to_load(self) -> Iterator[Chunk]:
        """Yield the chunks that parameters and masters are read into."""
        for fragment in self._fragments:
            yield from self._master_chunks(fragment)
        # Read, and not cast from the masters, of which this rank may have a share alone. Frozen ones too.
        for parameter in self._not_masters:
            yield from self._weight_chunks(parameter)

    def forget_moments(self) -> None:
        """Leave the optimizer as it was before the first step."""
        inner_optimizer(self.engine).state.clear()

    def moments_to_load(self) -> tuple[list[Chunk], Callable[[], None]]:
        """Return the chunks that the optimizer's state is read into, and what is to be called afterwards.

        Makes the state where there is none.
        """
        make_moments(self.engine, self._fragments)
        chunks: list[Chunk] = []
        steps = []
        for fragment in self._fragments:
            state = moments_of(self.engine, fragment)
            for chunks_of_box in self._fragment_chunks(fragment, {kind: state[kind] for kind in MOMENTS}):
                chunks += chunks_of_box
            # Of its own, and not the optimizer's: ZeRO has one for many parameters, which must be compared first.
            counted = torch.zeros((), dtype=torch.float32)
            steps.append((fragment, counted))
            chunks.append(Chunk(f"{STEP}/{self._name(fragment.parameter)}", (), Box((), ()), counted))
        return chunks, lambda: self._set_steps(steps)

    def _set_steps(self, steps: Iterable[tuple[Fragment, torch.Tensor]]) -> None:
        # ZeRO has one master, and so one count of steps, for many parameters; a checkpoint has a count for each.
        counts: dict[int, set[float]] = {}
        for fragment, counted in steps:
            counts.setdefault(id(fragment.master), set()).add(float(counted))
            moments_of(self.engine, fragment)["step"].copy_(counted)
        differing = next((found for found in counts.values() if len(found) > 1), None)
        if differing:
            raise UserError(
                f"the checkpoint's parameters have taken different numbers of optimizer steps ({sorted(differing)}), "
                f"and ZeRO keeps one number for many parameters; resume it with parallel.zero_stage=0"
            )

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return what the model saves besides parameters: the same on every rank and every layout."""
        # By the state dict, which leaves out non-persistent buffers and has the layers' extra state.
        module = self.engine.module
        names = {name for name, _ in module.named_buffers()}
        # References: extra state aside, nothing is copied.
        saved = module.state_dict()
        return {name: x.detach() for name, x in saved.items() if name in names or name.endswith("_extra_state")}

    def floats(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all floating-point state of this rank as it is (weights, masters, moments, buffers), roughly named."""
        yield from ((f"{MODEL}/{name}", x.detach()) for name, x in self.engine.module.named_parameters())
        # ZeRO has many fragments in one flat master: each master once.
        for fragment in {id(f.master): f for f in self._fragments}.values():
            yield f"{MODEL} (masters)", fragment.master.detach()
            state = moments_of(self.engine, fragment)
            yield from ((f"{kind} (moments)", state[kind]) for kind in MOMENTS if kind in state)
        yield from ((f"{BUFFER}/{name}", x) for name, x in self.buffers().items() if x.is_floating_point())

    def set_buffers(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put back all or some of what `buffers` returned."""
        # Not strict, since the parameters are not among them.
        self.engine.module.load_state_dict(dict(values), strict=False)


def owned_boxes(boxes: Sequence[NamedBox], group: dist.ProcessGroup) -> set[NamedBox]:
    """Return the boxes, out of those that this rank has, that this rank writes; collective."""
    boxes_by_rank: list[Sequence[NamedBox]] = [[] for _ in range(dist.get_world_size())]
    # Names and numbers over gloo, once per run.
    dist.all_gather_object(boxes_by_rank, list(boxes), group=group)
    return assign_writers(boxes_by_rank)[dist.get_rank()]


# Four boxes on two ranks; D is on rank 0 alone. Largest first, each to the holder with the least so far:
#   A (6 elements, ranks 0 and 1) -> rank 0, which then writes 6
#   B (4, ranks 0 and 1)          -> rank 1, which then writes 4
#   C (3, ranks 0 and 1)          -> rank 1, which then writes 7
#   D (2, rank 0)                 -> rank 0, which then writes 8
def assign_writers(boxes_by_rank: Sequence[Sequence[NamedBox]]) -> list[set[NamedBox]]:
    """Assign each box, replicated or not, to one of the ranks that have it, balancing elements.

    Args:
        boxes_by_rank: for each rank the boxes that it has.

    Returns:
        For each rank the boxes that it writes; the same on every rank that asks.
    """
    holders: dict[NamedBox, list[int]] = {}
    for rank, boxes in enumerate(boxes_by_rank):
        for box in boxes:
            holders.setdefault(box, []).append(rank)
    elements = [0] * len(boxes_by_rank)
    owned: list[set[NamedBox]] = [set() for _ in boxes_by_rank]
    # Name and start break ties, so that every rank comes to the same assignment without another message.
    for box, ranks in sorted(holders.items(), key=lambda item: (-item[0][1].size, item[0][0], item[0][1].start)):
        writer = min(ranks, key=lambda rank: (elements[rank], rank))
        elements[writer] += box[1].size
        owned[writer].add(box)
    return owned


def not_finite(tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """Return for each tensor, in order, whether an element is infinite or NaN: bool, on the device.

    Copies nothing, and the host waits for nothing.
    """
    flags = [_has_bad(tensor).to(device, non_blocking=True) for _, tensor in tensors]
    # One tensor of flags, so that whoever wants to know reads once.
    return torch.stack(flags) if flags else torch.zeros(0, dtype=torch.bool, device=device)


def _has_bad(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.numel() or not tensor.is_floating_point():
        return torch.zeros((), dtype=torch.bool, device=tensor.device)
    # The extremes tell, without a bool per element: aminmax is NaN where any element is.
    return ~torch.isfinite(torch.stack(tensor.aminmax())).all()


def bad_state(chunks: Iterable[Chunk], device: torch.device) -> str | None:
    """Name what no training leaves in these chunks: a value that is not finite, a negative mean of squares or count."""
    # Integers, as random states are, are always finite.
    floats = [chunk for chunk in chunks if chunk.values.is_floating_point()]
    infinite = not_finite(((chunk.key, chunk.values) for chunk in floats), device).tolist()
    key = next((chunk.key for chunk, is_bad in zip(floats, infinite, strict=True) if is_bad), None)
    if key is not None:
        return f"a state that is not finite ({key} has NaN or infinite elements)"
    counts = [c for c in floats if c.key.startswith(("exp_avg_sq/", f"{STEP}/")) and c.values.numel()]
    signs = [(chunk.values.amin() < 0).to(device) for chunk in counts]
    negative = torch.stack(signs).tolist() if signs else []
    key = next((chunk.key for chunk, is_bad in zip(counts, negative, strict=True) if is_bad), None)
    return None if key is None else f"a state that cannot be ({key} has negative elements)"


def rng_chunks(states: Mapping[str, torch.Tensor]) -> list[Chunk]:
    """Return the rows of this rank's random states."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return [
        # `state[None]` is a view: what is read arrives in `states`.
        Chunk(f"{RNG}/{name}", (world_size, len(state)), Box((rank, 0), (1, len(state))), state[None])
        for name, state in states.items()
    ]


def rng_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of torch's generators of this rank, uint8."""
    states = {"cpu": torch.get_rng_state()}
    return states if device.type == "cpu" else {**states, "cuda": torch.cuda.get_rng_state(device)}


def set_rng_states(states: Mapping[str, torch.Tensor]) -> None:
    """Put back what `rng_states` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def layout_of(config: Config, device: torch.device) -> dict[str, Any]:
    """Describe the ranks that a state is of: random states are restored on ranks of the same layout only."""
    ranks = config.cluster.nodes * config.cluster.devices_per_node
    parallel = config.parallel.model_dump(mode="json")
    return {"ranks": ranks, **parallel, "precision": config.train.precision, "device": device.type}


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a state depends on."""
    names = ("dsmoe", "torch", "deepspeed")
    return {"python": platform.python_version(), **{name: sys.modules[name].__version__ for name in names}}
