"""Step 5, compute: every local expert over its rows.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dsmoe.config import schema
from dsmoe.config.errors import refuse
from dsmoe.config.sections.moe import row_problems
from dsmoe.moe.dispatch import Dispatched
from dsmoe.moe.grouped_ffn import ExpertRows, expert_ffn, runs_in_groups
from dsmoe.moe.permutation import gather_rows, gather_weights, sum_rows
from dsmoe.moe.router import Router
from dsmoe.nn.activations import find_activation
from dsmoe.nn.linear import mark_split
from dsmoe.parallel.random_weights import normal_from, seed_of
from dsmoe.parallel.sharding import Shard


def mark_expert_parameters(module: nn.Module, group_name: str) -> None:
    """Tell DeepSpeed that these parameters differ between the ranks of an exchange group.

    It then averages their gradients and shards their state over the expert-data group, and counts their norm on every
    rank, also on those whose dense parameters are the slices of another's.
    """
    for parameter in module.parameters():
        mark_split(parameter)
        # The attributes by which DeepSpeed knows an expert parameter (0.19.8, moe/utils.py:27) and its process group.
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = group_name  # type: ignore[attr-defined]


class StackedExperts(nn.Module):
    """L feed-forward experts in two stacked weights, computed together.

    `gate_up` [L, Z, D] and `down` [L, D, I]. A gated activation has Z = 2 I, the gate's rows before the others, and
    computes down (act(gate x) * up x); otherwise Z = I, and there is no gate in `gate_up`. With slices, I is that of
    one. Rows of a grouped product must start at multiples of 16 bytes, so D and I must be multiples of 8.

    An expert's output is the sum of its slices' outputs, so each slice is like an expert of its own (see
    `dsmoe.moe.capacity.spread_over_slices`).

    Args:
        hidden_size: D.
        num_local_experts: L.
        options: `expert_ffn_size` is I over all slices.
        recompute: compute the pre-activation again in the backward pass; see `dsmoe.moe.grouped_ffn.ExpertRows`.
        num_slices: parts that the experts' inner width is cut into; this module holds one of them.
    """

    def __init__(
        self,
        hidden_size: int,
        num_local_experts: int,
        options: schema.Experts,
        recompute: bool = False,
        num_slices: int = 1,
    ) -> None:
        super().__init__()
        ffn_size = options.expert_ffn_size
        assert ffn_size is not None, "without a width, experts are copies of a module"
        refuse(row_problems(hidden_size, ffn_size, num_slices))
        self.num_local_experts = num_local_experts
        self.activation = find_activation(options.activation)
        self.recompute = recompute
        self.num_slices = num_slices
        width, parts = ffn_size // num_slices, self.activation.shape.input_matrices
        # Not drawn here: an expert is drawn by its global id, which only the layer can know.
        self.gate_up = nn.Parameter(torch.empty(num_local_experts, parts * width, hidden_size))
        self.down = nn.Parameter(torch.empty(num_local_experts, hidden_size, width))

    def forward(self, dispatched: Dispatched) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs for each source row, [U, D]."""
        source_UD = dispatched.source_UD
        dtype = _dtype_of_products(source_UD)
        # Cast outside of the autograd function, so that autograd casts the weights' gradients back.
        return expert_ffn(
            source_UD.to(dtype),
            dispatched.weights_UK,
            self.gate_up.to(dtype),
            self.down.to(dtype),
            ExpertRows(dispatched.row_map, dispatched.ends_L, self.activation, self.recompute),
        )

    def compiles(self, x: torch.Tensor) -> bool:
        """Return whether torch.compile can trace the experts' work on `x`: torch 2.13 groups products in bf16 only."""
        return runs_in_groups(x.device.type) and _dtype_of_products(x) == torch.bfloat16

    def initialise(self, seed: int, first_expert: int, std: float, down_std: float, slice_index: int = 0) -> None:
        """Fill each expert from N(0, std^2) (`down`: down_std) by *global* id: the layout does not matter."""
        gate_up, down = self.shards(slice_index)
        # One expert at a time: of slices the whole expert is drawn, and a part of it kept.
        for local in range(self.num_local_experts):
            normal_from(seed_of(seed, "gate_up", first_expert + local), self.gate_up[local], std, gate_up)
            normal_from(seed_of(seed, "down", first_expert + local), self.down[local], down_std, down)

    # `gate_up` of one expert, I = 4 in two slices: rows 0-3 are the gate's, rows 4-7 the others. Slice 1 is the rows
    # 2, 3, 6, 7, so that it has gate and up of the same inner columns, and the columns 2, 3 of `down`.
    def shards(self, slice_index: int) -> tuple[Shard, Shard]:
        """Return slice number `slice_index` of each expert's `gate_up` [Z, D] and `down` [D, I]."""
        parts = self.activation.shape.input_matrices
        return Shard(0, slice_index, self.num_slices, parts), Shard(1, slice_index, self.num_slices)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save an entry per expert: DeepSpeed's engine writes a file per expert, and finds it by these names.

        Its checkpoints fail on a tensor that holds several experts. The entries are views: nothing is copied.
        """
        for name, stacked in self.named_parameters(recurse=False):
            for local, one in enumerate(stacked if keep_vars else stacked.detach()):
                destination[f"{prefix}deepspeed_experts.{local}.{name}"] = one

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, _ in self.named_parameters(recurse=False):
            entries = [f"{prefix}deepspeed_experts.{local}.{name}" for local in range(self.num_local_experts)]
            # Otherwise torch looks up the stacked weight by its own name, and reports that as missing.
            if all(entry in state_dict for entry in entries):
                state_dict[f"{prefix}{name}"] = torch.stack([state_dict.pop(entry) for entry in entries])
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ModuleExperts(nn.Module):
    """L copies of a user's own module, each over its own rows; `deepspeed_experts`, as in DeepSpeed's layer.

    A Python loop that reads its row counts on the host: `StackedExperts` is the fast alternative.

    Args:
        expert: maps [n, D] to [n, D], or to a tuple whose first element is that.
        num_local_experts: L.
    """

    def __init__(self, expert: nn.Module, num_local_experts: int) -> None:
        super().__init__()
        self.num_local_experts = num_local_experts
        self.deepspeed_experts = nn.ModuleList(copy.deepcopy(expert) for _ in range(num_local_experts))

    def forward(self, dispatched: Dispatched) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs for each source row, [U, D]."""
        row_map = dispatched.row_map
        # Gathered, since a user's module takes plain rows: unlike in `expert_ffn`, autograd keeps them.
        rows_ND = gather_rows(dispatched.source_UD, row_map)
        ends = dispatched.ends_L.tolist()
        counts = [end - first for first, end in zip([0, *ends], ends, strict=False)]
        outputs = []
        for expert, rows in zip(self.deepspeed_experts, rows_ND[: ends[-1]].split(counts), strict=True):
            # Also without rows, so that its weights have a gradient, of zeros, on every rank.
            output = expert(rows)
            outputs.append(output[0] if isinstance(output, tuple) else output)
        outputs.append(torch.zeros_like(rows_ND[ends[-1] :]))  # rows behind the last expert's end
        weight_N1 = gather_weights(dispatched.weights_UK, row_map)[:, None]
        # fp32 weights times bf16 outputs are fp32: rounded once, before the sum.
        out_ND = torch.cat(outputs)
        return sum_rows((out_ND * weight_N1).to(out_ND.dtype), row_map)

    def compiles(self, _: torch.Tensor) -> bool:
        """Return False: the number of each module's rows is read on the host."""
        return False

    def initialise(self, seed: int, first_expert: int) -> None:
        """Draw each copy anew by its *global* id, through the `reset_parameters` that torch's modules have.

        A module of the user's without that method keeps the values it was copied with.
        """
        for local, expert in enumerate(self.deepspeed_experts):
            # In a fork of torch's generators, since `reset_parameters` draws from them.
            # The CPU's generator is forked in any case.
            devices = {p.device for p in expert.parameters() if p.device.type == "cuda"}
            with torch.random.fork_rng(devices=devices):
                # A seed of its own for each expert: its numbers do not depend on the experts that the rank drew before.
                torch.manual_seed(seed_of(seed, first_expert + local))
                for module in expert.modules():
                    reset = getattr(module, "reset_parameters", None)
                    if callable(reset):
                        reset()


def _dtype_of_products(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@dataclass(frozen=True)
class ExpertDraw:
    """The source of a rank's expert weights, kept to draw them again where the rank turns out to be another."""

    seed: int
    rank: int
    """The rank in the exchange group; `expert_tensor` neighbours share a set of experts."""
    expert_tensor: int
    copies: bool
    """The experts are copies of a user's module and keep its weights."""
    stds: tuple[float, float] = (0.02, 0.02)
    """Standard deviations of the first and the second weight of stacked experts."""

    def place(self, num_local_experts: int) -> tuple[int, int]:
        """Return the global id of the rank's first expert and the number of its slice."""
        # Neighbours have the slices of the same experts, as `spread_over_slices` numbers them.
        expert_rank, slice_index = divmod(self.rank, self.expert_tensor)
        return expert_rank * num_local_experts, slice_index

    def fill(self, experts: StackedExperts | ModuleExperts) -> None:
        """Draw the experts."""
        first, slice_index = self.place(experts.num_local_experts)
        if isinstance(experts, StackedExperts):
            experts.initialise(self.seed, first, *self.stds, slice_index)
        elif not self.copies:
            experts.initialise(self.seed, first)

    def moved_to(self, rank: int, experts: StackedExperts | ModuleExperts) -> ExpertDraw:
        """Return the same draw for `rank`, after drawing `experts` anew if that is another rank.

        Raises:
            RuntimeError: the experts have been changed since they were drawn.
        """
        if rank == self.rank:
            return self
        # Weights that were loaded or trained must not be overwritten: they are untouched if they equal their draw.
        if not self.copies:
            # Exact: a draw from the same seed has the same bits.
            fresh = copy.deepcopy(experts)
            self.fill(fresh)
            if not all(map(torch.equal, fresh.parameters(), experts.parameters())):
                raise RuntimeError(
                    f"rank {rank} of the expert group was made as if it were rank {self.rank}, and its experts have "
                    f"been changed since: make the MoE layer after the processes have joined (torch.distributed is "
                    f"initialised), and load weights after that"
                )
        moved = replace(self, rank=rank)
        moved.fill(experts)
        return moved


class RouterAndExperts(nn.Module):
    """Router and experts under the names of DeepSpeed's layer, with the attributes that others read there.

    Parameters thus have the same names in the same order in both layers, and either reads the checkpoints of
    DeepSpeed's engine, which goes by names.

    Attributes:
        l_aux: the second value that the layer's last forward pass returned.
        exp_counts: the third.
    """

    l_aux: torch.Tensor
    exp_counts: torch.Tensor

    def __init__(self, gate: Router, experts: StackedExperts | ModuleExperts, ep_group_name: str, ep_size: int) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.ep_group_name = ep_group_name
        self.ep_size = ep_size
        self.num_local_experts = experts.num_local_experts

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the last pass's tensors when copied or pickled: one with a graph refuses both."""
        return {name: value for name, value in self.__dict__.items() if name not in ("l_aux", "exp_counts")}
