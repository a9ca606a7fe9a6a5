"""Step 5, compute: every local expert over its rows, as grouped products over stacked weights.

Shape suffixes: see `dsmoe.moe.router`.
"""

from __future__ import annotations

import copy
import hashlib

import torch
import torch.nn.functional as F
from torch import nn

from dsmoe.moe.dispatch import Dispatched


def mark_expert_parameters(module: nn.Module, group_name: str) -> None:
    """Tell DeepSpeed that these parameters differ between the ranks of an expert group.

    It then averages their gradients, counts their norm and shards their state over the expert-data group.
    """
    for parameter in module.parameters():
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = group_name  # type: ignore[attr-defined]


def seed_of(seed: int, *names: object) -> int:
    """A 63-bit seed that depends on all of `seed` and `names` and on nothing else, on any machine."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def normal_from(seed: int, tensor: torch.Tensor, std: float) -> None:
    """Fill `tensor` in place from N(0, std^2), with a generator of its own; a meta tensor has nothing to fill."""
    if tensor.is_meta:
        return
    generator = torch.Generator(device=tensor.device).manual_seed(seed)
    with torch.no_grad():
        # Drawn in fp32 whatever the dtype, so that bf16 weights are the rounded fp32 ones.
        tensor.copy_(torch.empty_like(tensor, dtype=torch.float32).normal_(0.0, std, generator=generator))


class SwiGLUExperts(nn.Module):
    """L SwiGLU experts, W2 (silu(W1 x) * W3 x) each, in two stacked weights and two grouped products.

    `gate_up` [L, 2I, D] holds W1 over W3, `down` [L, D, I] holds W2. Rows of a grouped product must start at
    multiples of 16 bytes, so D and I must be multiples of 8.

    Args:
        hidden_size: D.
        ffn_size: I.
        num_local_experts: L.
    """

    def __init__(self, hidden_size: int, ffn_size: int, num_local_experts: int) -> None:
        super().__init__()
        if hidden_size % 8 or ffn_size % 8:
            raise ValueError(f"hidden_size ({hidden_size}) and expert_ffn_size ({ffn_size}) must be multiples of 8")
        self.num_local_experts = num_local_experts
        self.gate_up = nn.Parameter(torch.empty(num_local_experts, 2 * ffn_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_local_experts, hidden_size, ffn_size))

    def forward(self, dispatched: Dispatched) -> torch.Tensor:
        """[N, D] -> [N, D]; rows past the last end are left undefined."""
        rows_ND, ends_L = dispatched.rows_ND, dispatched.ends_L
        if rows_ND.shape[0] == 0:
            # A grouped product over no rows is undefined; this keeps the parameters in the graph with zero gradients.
            return rows_ND + 0.0 * (self.gate_up.sum() + self.down.sum())
        gate_up_NI = F.grouped_mm(rows_ND, self.gate_up.transpose(-2, -1), offs=ends_L)
        gate_NI, up_NI = gate_up_NI.chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate_NI) * up_NI, self.down.transpose(-2, -1), offs=ends_L)

    def initialise(self, seed: int, first_expert: int, std: float, down_std: float) -> None:
        """Fill each expert from N(0, std^2) (`down`: down_std) by *global* id: the layout does not matter."""
        for local in range(self.num_local_experts):
            normal_from(seed_of(seed, "gate_up", first_expert + local), self.gate_up[local], std)
            normal_from(seed_of(seed, "down", first_expert + local), self.down[local], down_std)


class ModuleExperts(nn.Module):
    """L copies of a user's own module, each over its own rows.

    A Python loop that knows its row counts on the host: `SwiGLUExperts` is the fast way.

    Args:
        expert: maps [n, D] to [n, D], or to a tuple whose first element is that.
        num_local_experts: L.
    """

    def __init__(self, expert: nn.Module, num_local_experts: int) -> None:
        super().__init__()
        self.num_local_experts = num_local_experts
        self.experts = nn.ModuleList(copy.deepcopy(expert) for _ in range(num_local_experts))

    def forward(self, dispatched: Dispatched) -> torch.Tensor:
        """[N, D] -> [N, D]; rows past the last end are zero."""
        ends = dispatched.ends_L.tolist() if dispatched.counts_L is None else None
        counts = dispatched.counts_L if ends is None else [b - a for a, b in zip([0, *ends], ends, strict=False)]
        assert counts is not None
        outputs = []
        for expert, rows in zip(self.experts, dispatched.rows_ND[: sum(counts)].split(counts), strict=True):
            output = expert(rows)
            outputs.append(output[0] if isinstance(output, tuple) else output)
        num_undefined = dispatched.rows_ND.shape[0] - sum(counts)
        if num_undefined:
            outputs.append(dispatched.rows_ND.new_zeros((num_undefined, dispatched.rows_ND.shape[1])))
        return torch.cat(outputs)

    def initialise(self, seed: int, first_expert: int) -> None:
        """Draw each copy anew by its *global* id, through the `reset_parameters` that torch's modules have.

        A module of the user's without one keeps the values it was copied with.
        """
        for local, expert in enumerate(self.experts):
            devices = {p.device for p in expert.parameters() if p.device.type == "cuda"}
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed_of(seed, first_expert + local))
                for module in expert.modules():
                    reset = getattr(module, "reset_parameters", None)
                    if callable(reset):
                        reset()
