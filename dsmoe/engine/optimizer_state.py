"""This rank's share of the fp32 masters and moments, found in DeepSpeed's optimizer wrappers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dsmoe.config.errors import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state per element."""


@dataclass(frozen=True)
class Fragment:
    """A range of a flattened parameter, and the optimizer's tensor that has its values in fp32."""

    parameter: torch.nn.Parameter
    start: int
    master: torch.Tensor
    """Key of the optimizer's state; the parameter itself where it is its own master."""
    offset: int
    """Start of the range in the flattened master."""
    numel: int

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the range in a tensor of the master's shape (its values, a moment): a flat view."""
        # Shares the memory, so that a load writes into the optimizer's own tensors.
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def inner_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """Torch's AdamW, which ZeRO and the mixed-precision wrappers keep as `.optimizer`."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def fragments(engine: DeepSpeedEngine) -> list[Fragment]:
    """Every range of a parameter that this rank optimizes.

    Raises:
        UserError: a wrapper that dsmoe does not know, whose state a checkpoint would silently miss.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):  # fp32 without ZeRO: the model's own weights
        return [Fragment(p, 0, p, 0, p.numel()) for group in optimizer.param_groups for p in group["params"]]
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2: this rank's part of each flat group
        return _linked(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups)
    if hasattr(optimizer, "fp32_groups"):  # bf16 at stage 0
        return [
            Fragment(weight, 0, master, 0, master.numel())
            for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for weight, master in zip(weights, masters, strict=True)
        ]
    raise UserError(
        f"the deepspeed section makes DeepSpeed use {type(optimizer).__name__}, whose state dsmoe cannot save; "
        f"remove the settings that choose it"
    )


def check_links(found: list[Fragment]) -> None:
    """Check, before the first step, that each master is the weight that DeepSpeed says it is of.

    DeepSpeed's tables of ranges are for its own use: a wrong one would make a checkpoint that loads silently wrong.
    """
    for fragment in found:
        weight = fragment.parameter.detach().view(-1).narrow(0, fragment.start, fragment.numel)
        # Before the first step a master is a copy of its weight: rounded back, it is the weight exactly.
        if not torch.equal(fragment.view(fragment.master).to(weight), weight):
            raise RuntimeError(f"DeepSpeed's master of a weight {tuple(fragment.parameter.shape)} is of another one")


def moments_of(engine: DeepSpeedEngine, fragment: Fragment) -> dict[str, torch.Tensor]:
    """The optimizer's state for the fragment's master; empty before the first step."""
    return inner_optimizer(engine).state.get(fragment.master, {})


def make_moments(engine: DeepSpeedEngine, found: list[Fragment]) -> None:
    """Make the optimizer's state for every master, as its first step would."""
    optimizer = inner_optimizer(engine)
    fused = optimizer.defaults.get("fused")
    # Each master once: under ZeRO many fragments share one.
    for master in {id(fragment.master): fragment.master for fragment in found}.values():
        state = optimizer.state[master]
        if not state:
            # Where torch's AdamW keeps it: a fused step adds to it on the device.
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if fused else "cpu")
            state.update({name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS})


# A group of a (6 elements) and b (4), flattened to 10, on two ranks:
#   flat group    a a a a a | a b b b b
#   rank 0        Fragment(a, start=0, offset=0, numel=5)
#   rank 1        Fragment(a, start=5, offset=0, numel=1), Fragment(b, start=0, offset=1, numel=4)
def _linked(groups: list[list[torch.nn.Parameter]], partitions: list[torch.Tensor]) -> list[Fragment]:
    """The range of each parameter that is in this rank's flat partition, as DeepSpeed has noted it there."""
    links = [
        (parameter, flat, link)
        for parameters, flat in zip(groups, partitions, strict=True)
        for parameter in parameters
        # None: no element of it is in this rank's partition.
        if (link := parameter._hp_mapping) is not None  # type: ignore[attr-defined]
    ]
    return [
        Fragment(
            p, link.lp_fragment_address.start, flat, link.hp_fragment_address.start, link.hp_fragment_address.numel
        )
        for p, flat, link in links
    ]
