"""What a DeepSpeed engine has of a checkpoint on this rank, as boxes of the tensors that one rank alone would have.

The names: `model/NAME` is a parameter, exact (the fp32 master where there is one); `exp_avg/NAME`, `exp_avg_sq/NAME`
and `step/NAME` are AdamW's; `buffer/NAME` is what the MoE layers carry from step to step; `rng/DEVICE` has a row for
each rank.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dsmoe.checkpoint.ranges import boxes_of_range
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
from dsmoe.parallel.sharding import Box, Placement

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MODEL, STEP, BUFFER, RNG = "model", "step", "buffer", "rng"


@dataclass(frozen=True)
class Part:
    """A box of a global tensor, and a view of its elements on this rank, to be read or written."""

    key: str
    shape: tuple[int, ...]
    """The global tensor's."""
    box: Box
    here: torch.Tensor

    @property
    def is_weight(self) -> bool:
        """Whether it is of a parameter, or its master."""
        return self.key.startswith(f"{MODEL}/")


@dataclass(frozen=True)
class Spot:
    """A box of a parameter of the whole model, and where it is in the flattened range that this rank has."""

    name: str
    shape: tuple[int, ...]
    box: Box
    start: int
    """Where, in the range, the box `around` begins whose elements follow one another."""
    around: Box
    inner: Box
    """The spot within `around`."""

    def part(self, kind: str, range_: torch.Tensor) -> Part:
        """The spot in a flat tensor of the range."""
        around = range_.narrow(0, self.start, self.around.size).view(self.around.shape)
        return Part(f"{kind}/{self.name}", self.shape, self.box, self.inner.of(around))

    @property
    def is_first(self) -> bool:
        """Whether the parameter's first element is here."""
        return not any(self.box.start)


def spots(placement: Placement, shape: tuple[int, ...], start: int, numel: int) -> Iterator[Spot]:
    """The elements [start, start + numel) of this rank's tensor of `shape`, as boxes of the whole one."""
    before = 0
    for around in boxes_of_range(shape, start, start + numel):
        for piece in placement.pieces:
            common = around.overlap(piece.here)
            if common is not None:
                there = common.seen_from(piece.here).moved(piece.there.start)
                yield Spot(placement.name, placement.shape, there, before, around, common.seen_from(around))
        before += around.size


class EngineState:
    """The parts of a checkpoint that an engine has on this rank. Make it before the first step.

    Args:
        engine: DeepSpeed's.
        placements: by each parameter's name in `engine.module`, where it is in the whole model.
    """

    def __init__(self, engine: DeepSpeedEngine, placements: Mapping[str, Placement]) -> None:
        self.engine = engine
        named = dict(engine.module.named_parameters())
        self._placement = {id(parameter): placements[name] for name, parameter in named.items()}
        self._fragments = fragments(engine)
        check_links(self._fragments)
        self._optimized = [(f, list(self._spots(f.parameter, f.start, f.numel))) for f in self._fragments]
        own_masters = {id(f.parameter) for f in self._fragments if f.master is f.parameter}
        # These have no master on this rank, or only a share of one.
        whole = [parameter for parameter in named.values() if id(parameter) not in own_masters]
        self._whole = [(parameter, list(self._spots(parameter, 0, parameter.numel()))) for parameter in whole]

    def _spots(self, parameter: torch.Tensor, start: int, numel: int) -> Iterator[Spot]:
        return spots(self._placement[id(parameter)], tuple(parameter.shape), start, numel)

    def boxes(self) -> list[tuple[str, Box]]:
        """The boxes of parameters that this rank could write; replicas have the same."""
        return [(spot.name, spot.box) for _, spots in (*self._optimized, *self._frozen()) for spot in spots]

    def _frozen(self) -> list[tuple[torch.Tensor, list[Spot]]]:
        return [(parameter, spots) for parameter, spots in self._whole if not parameter.requires_grad]

    def to_save(self, owned: set[tuple[str, Box]]) -> Iterator[Part]:
        """For the boxes in `owned`, the values and the optimizer's state; views of what the next step changes."""
        for fragment, spots in self._optimized:
            state = moments_of(self.engine, fragment)
            tensors = {MODEL: fragment.master, **{kind: state[kind] for kind in MOMENTS if kind in state}}
            for spot in (spot for spot in spots if (spot.name, spot.box) in owned):
                yield from (spot.part(kind, fragment.of(tensor)) for kind, tensor in tensors.items())
                if state and spot.is_first:
                    yield Part(f"{STEP}/{spot.name}", (), Box((), ()), state["step"])
        for parameter, spots in self._frozen():
            mine = (spot for spot in spots if (spot.name, spot.box) in owned)
            yield from (spot.part(MODEL, parameter.detach().view(-1)) for spot in mine)

    def bytes_to_save(self, owned: set[tuple[str, Box]]) -> int:
        """Size of all that `to_save` gives when there are moments, but for a few bytes for each parameter."""
        masters = sum(s.box.size for _, spots in self._optimized for s in spots if (s.name, s.box) in owned)
        frozen = sum(
            spot.box.size * parameter.element_size()
            for parameter, spots in self._frozen()
            for spot in spots
            if (spot.name, spot.box) in owned
        )
        return masters * torch.float32.itemsize * (1 + len(MOMENTS)) + frozen

    def weights_to_load(self) -> Iterator[Part]:
        """Where parameters and masters are to be written."""
        for fragment, spots in self._optimized:
            yield from (spot.part(MODEL, fragment.of(fragment.master)) for spot in spots)
        for parameter, spots in self._whole:
            yield from (spot.part(MODEL, parameter.detach().view(-1)) for spot in spots)

    def forget_moments(self) -> None:
        """Leave the optimizer as it was before the first step."""
        inner_optimizer(self.engine).state.clear()

    def moments_to_load(self) -> tuple[list[Part], Callable[[], None]]:
        """Where the optimizer's state is to be written, and what is to be called afterwards.

        Makes the state where there is none.
        """
        make_moments(self.engine, self._fragments)
        parts, steps = [], []
        for fragment, spots in self._optimized:
            state = moments_of(self.engine, fragment)
            parts += [spot.part(kind, fragment.of(state[kind])) for kind in MOMENTS for spot in spots]
            counted = torch.zeros((), dtype=torch.float32)
            steps.append((fragment, counted))
            parts.append(Part(f"{STEP}/{spots[0].name}", (), Box((), ()), counted))
        return parts, lambda: self._set_steps(steps)

    def _set_steps(self, steps: Iterable[tuple[Fragment, torch.Tensor]]) -> None:
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
        """What the model saves besides parameters: the same on every rank, whatever the layout."""
        module = self.engine.module
        names = {name for name, _ in module.named_buffers()}
        saved = module.state_dict()
        return {name: x.detach() for name, x in saved.items() if name in names or name.endswith("_extra_state")}

    def floats(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All floating-point state of this rank as it is: weights, masters, moments, buffers; under rough names."""
        yield from ((f"{MODEL}/{name}", x.detach()) for name, x in self.engine.module.named_parameters())
        masters = {id(f.master): f for f, _ in self._optimized}
        for fragment in masters.values():
            yield f"{MODEL} (masters)", fragment.master.detach()
            state = moments_of(self.engine, fragment)
            yield from ((f"{kind} (moments)", state[kind]) for kind in MOMENTS if kind in state)
        yield from ((f"{BUFFER}/{name}", x) for name, x in self.buffers().items() if x.is_floating_point())

    def set_buffers(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put back what `buffers` gave, all or some of it."""
        self.engine.module.load_state_dict(dict(values), strict=False)


def not_finite(tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """Which of the tensors have an infinite element or one that is no number: bool, on the device, by their order.

    Nothing is copied, and the host waits for nothing: the smallest and the largest element tell.
    """
    flags = [_has_bad(tensor).to(device, non_blocking=True) for _, tensor in tensors]
    return torch.stack(flags) if flags else torch.zeros(0, dtype=torch.bool, device=device)


def _has_bad(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.numel() or not tensor.is_floating_point():
        return torch.zeros((), dtype=torch.bool, device=tensor.device)
    return ~torch.isfinite(torch.stack(tensor.aminmax())).all()  # aminmax passes on what is no number


def bad_state(parts: Iterable[Part], device: torch.device) -> str | None:
    """What no training leaves in these parts: an element that is not finite, or a negative mean of squares or count."""
    floats = [part for part in parts if part.here.is_floating_point()]
    infinite = not_finite(((part.key, part.here) for part in floats), device).tolist()
    key = next((part.key for part, is_bad in zip(floats, infinite, strict=True) if is_bad), None)
    if key is not None:
        return f"a state that is not finite ({key} has NaN or infinite elements)"
    counts = [part for part in floats if part.key.startswith(("exp_avg_sq/", f"{STEP}/")) and part.here.numel()]
    signs = [(part.here.amin() < 0).to(device) for part in counts]
    negative = torch.stack(signs).tolist() if signs else []
    key = next((part.key for part, is_bad in zip(counts, negative, strict=True) if is_bad), None)
    return None if key is None else f"a state that cannot be ({key} has negative elements)"


def whole_part(key: str, tensor: torch.Tensor) -> Part:
    """The part that is all of a tensor."""
    return Part(key, tuple(tensor.shape), Box.all_of(tensor.shape), tensor)


def rng_parts(states: Mapping[str, torch.Tensor]) -> list[Part]:
    """The rows of this rank's random states."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return [
        Part(f"{RNG}/{name}", (world_size, len(state)), Box((rank, 0), (1, len(state))), state[None])
        for name, state in states.items()
    ]


def rng_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators of this rank, as bytes."""
    states = {"cpu": torch.get_rng_state()}
    return states if device.type == "cpu" else {**states, "cuda": torch.cuda.get_rng_state(device)}


def set_rng_states(states: Mapping[str, torch.Tensor]) -> None:
    """Put back what `rng_states` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def layout_of(config: Config, device: torch.device) -> dict[str, Any]:
    """Which ranks a state is of: random states are those of ranks of the same layout."""
    ranks = config.cluster.nodes * config.cluster.devices_per_node
    parallel = config.parallel.model_dump(mode="json")
    return {"ranks": ranks, **parallel, "precision": config.train.precision, "device": device.type}


def versions() -> dict[str, str]:
    """Of what a state depends on besides its config."""
    names = ("dsmoe", "torch", "deepspeed")
    return {"python": platform.python_version(), **{name: sys.modules[name].__version__ for name in names}}
