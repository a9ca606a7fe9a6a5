"""Collectives with a gradient, and the bytes that they send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm
from torch.autograd.function import once_differentiable

from dsmoe.parallel.groups import ExpertGroup


@dataclass
class Traffic:
    """Bytes that this rank has sent to other ranks since the last `take`, by link."""

    intra: float = 0.0
    inter: float = 0.0

    def take(self) -> tuple[float, float]:
        """The bytes sent over (intra-node, inter-node) links; starts again from zero."""
        taken = (self.intra, self.inter)
        self.intra = self.inter = 0.0
        return taken

    def add(self, group: ExpertGroup, rows_ND: torch.Tensor, counts: Sequence[int] | None) -> None:
        """Count one exchange of `rows_ND` in which rank r of `group` is sent `counts[r]` rows (None: equal parts)."""
        row_bytes = rows_ND.nbytes / max(len(rows_ND), 1)
        for peer, near in enumerate(group.same_node):
            if peer == group.rank:
                continue
            size = row_bytes * (len(rows_ND) / group.size if counts is None else counts[peer])
            if near:
                self.intra += size
            else:
                self.inter += size


def all_to_all(
    rows_ND: torch.Tensor,
    group: ExpertGroup,
    traffic: Traffic,
    send_counts: Sequence[int] | None = None,
    receive_counts: Sequence[int] | None = None,
) -> torch.Tensor:
    """Exchange rows with every rank of `group`; its gradient is the exchange in the other direction.

    Args:
        rows_ND: [N, D] rows ordered by destination rank.
        group: the ranks that take part, each with its own N.
        traffic: counts the bytes sent, those of the backward pass too.
        send_counts: rows for each rank; None sends N / size to each.
        receive_counts: rows from each rank; None where `send_counts` is None.

    Returns:
        [sum(receive_counts), D] rows ordered by source rank.
    """
    return _AllToAll.apply(rows_ND, group, traffic, send_counts, receive_counts)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: torch.Tensor,
        group: ExpertGroup,
        traffic: Traffic,
        send_counts: Sequence[int] | None,
        receive_counts: Sequence[int] | None,
    ) -> torch.Tensor:
        ctx.arguments = group, traffic, receive_counts, send_counts
        return _exchange(rows_ND, group, traffic, send_counts, receive_counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return _exchange(grad_ND, *ctx.arguments), None, None, None, None


def _exchange(
    rows_ND: torch.Tensor,
    group: ExpertGroup,
    traffic: Traffic,
    send_counts: Sequence[int] | None,
    receive_counts: Sequence[int] | None,
) -> torch.Tensor:
    num_received = rows_ND.shape[0] if receive_counts is None else sum(receive_counts)
    received = rows_ND.new_empty((num_received, *rows_ND.shape[1:]))
    comm.all_to_all_single(
        received,
        rows_ND.contiguous(),
        output_split_sizes=None if receive_counts is None else list(receive_counts),
        input_split_sizes=None if send_counts is None else list(send_counts),
        group=group.handle,
    )
    traffic.add(group, rows_ND, send_counts)
    return received
