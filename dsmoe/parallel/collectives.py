"""All-to-all with a gradient, in two halves to overlap it, and the bytes sent.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm
from torch.autograd.function import once_differentiable

from dsmoe.parallel.groups import ExpertGroup
from dsmoe.runtime.watchdog import record_position


@dataclass
class Traffic:
    """Bytes that this rank has sent to other ranks since the last `take`, by link."""

    intra: float = 0.0
    inter: float = 0.0

    def take(self) -> tuple[float, float]:
        """Return the bytes sent over (intra-node, inter-node) links, and set them to zero."""
        taken = (self.intra, self.inter)
        self.intra = self.inter = 0.0
        return taken

    def add(self, group: ExpertGroup, rows_ND: torch.Tensor, counts: Sequence[int] | None) -> None:
        """Count an exchange of `rows_ND` that sends rank r of `group` `counts[r]` rows (None: equal parts)."""
        # By row, because `rows_ND` has those of this rank as well, which do not travel.
        row_bytes = rows_ND.nbytes / max(len(rows_ND), 1)
        for peer, near in enumerate(group.same_node):
            if peer == group.rank:
                continue
            size = row_bytes * (len(rows_ND) / group.size if counts is None else counts[peer])
            if near:
                self.intra += size
            else:
                self.inter += size


@dataclass(frozen=True)
class Exchange:
    """An exchange of rows among the ranks of a group.

    `send_counts[r]` rows go to rank r and `receive_counts[r]` come from it; None for both exchanges equal parts.
    """

    group: ExpertGroup
    traffic: Traffic
    send_counts: Sequence[int] | None = None
    receive_counts: Sequence[int] | None = None

    def reversed(self) -> Exchange:
        """Return the exchange that takes the rows back."""
        return Exchange(self.group, self.traffic, self.receive_counts, self.send_counts)

    def start(self, rows_ND: torch.Tensor) -> Transfer:
        """Send the rows without waiting, and without a gradient; on CUDA on a stream of NCCL's own."""
        # Held by `Transfer`: the memory of a copy that nobody holds could be used again while it is read.
        sent = rows_ND.contiguous()
        # From counts on the host: nothing is read from the device.
        num_received = rows_ND.shape[0] if self.receive_counts is None else sum(self.receive_counts)
        received = rows_ND.new_empty((num_received, *rows_ND.shape[1:]))
        work = comm.all_to_all_single(
            received,
            sent,
            output_split_sizes=None if self.receive_counts is None else list(self.receive_counts),
            input_split_sizes=None if self.send_counts is None else list(self.send_counts),
            group=self.group.handle,
            async_op=True,
        )
        self.traffic.add(self.group, rows_ND, self.send_counts)
        return Transfer(sent, received, work)


@dataclass(frozen=True)
class Transfer:
    """Rows under way, the result of `Exchange.start`.

    Keeps both buffers alive: another stream, or gloo's thread, reads and writes them until `wait`. After `wait` all
    work of the current stream comes after the transfer, the reuse of the buffers' memory too, provided that the stream
    is the one that made them. It is: autograd runs each backward on the stream of its forward.
    """

    sent: torch.Tensor
    received: torch.Tensor
    work: Any

    def wait(self) -> torch.Tensor:
        """Wait and return the rows received; on CUDA only the current stream waits, not the host."""
        self.work.wait()
        return self.received


def exchange_counts(counts_E: torch.Tensor, group: ExpertGroup) -> torch.Tensor:
    """Exchange the numbers of rows: [R * L] to send, by (rank, local expert) -> [R * L] to receive."""
    # Not asynchronous: callers read the result next.
    received = torch.empty_like(counts_E)
    comm.all_to_all_single(received, counts_E.contiguous(), group=group.handle)
    return received


def largest_of(value: int, group: ExpertGroup, device: torch.device) -> int:
    """Return the largest of the ranks' values; read on the host."""
    values = torch.tensor([value], device=device)
    comm.all_reduce(values, op=comm.ReduceOp.MAX, group=group.handle)
    return int(values)


def all_to_all(rows_ND: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """Exchange rows with every rank of the group; the gradient is the exchange in the other direction.

    Args:
        rows_ND: [N, D] rows ordered by destination rank.
        exchange: the ranks, and the rows for each.

    Returns:
        [rows received, D], ordered by source rank.
    """
    return start_all_to_all(rows_ND, exchange).wait()


# A forward pass, and its backward pass in reverse order:
#   _Start.forward     rows leave            _Wait.backward     gradients leave, by the reversed exchange
#   dense path         while they travel     dense path         its gradients while those travel
#   _Wait.forward      rows are there        _Start.backward    gradients are there
def start_all_to_all(rows_ND: torch.Tensor, exchange: Exchange) -> InFlight:
    """Start an `all_to_all`: work between this call and `wait` is done while the rows travel.

    So in the backward pass: autograd runs in reverse order of creation. The gradients leave when it reaches `wait`, the
    work between start and wait gets its gradients while they travel, and only this half waits for them.
    """
    state = _ExchangeState(exchange)
    return InFlight(_Start.apply(rows_ND, state), state)


@dataclass
class _ExchangeState:
    """State that the halves of an exchange share; refers to neither, or the graph would keep itself alive."""

    exchange: Exchange
    transfer: Transfer | None = None

    def receive(self) -> torch.Tensor:
        assert self.transfer is not None, "wait only once, and after the start"
        # Emptied, so that the backward pass can put its own transfer there, and the sent rows are freed.
        received, self.transfer = self.transfer.wait(), None
        return received


@dataclass(frozen=True)
class InFlight:
    """Rows under way, with a gradient.

    `link`, a tensor [0], ties the halves together in autograd's graph instead of the rows, so that none of its hooks
    and checks ever sees a buffer that is still being written.
    """

    link: torch.Tensor
    state: _ExchangeState

    def wait(self) -> torch.Tensor:
        """Wait and return the rows received: [rows received, D], ordered by source rank."""
        return _Wait.apply(self.link, self.state)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: torch.Tensor, state: _ExchangeState) -> torch.Tensor:
        ctx.state = state
        state.transfer = state.exchange.start(rows_ND)
        return rows_ND.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.state.receive(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: torch.Tensor, state: _ExchangeState) -> torch.Tensor:
        ctx.state = state
        return state.receive()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Backward exchanges have no `agree`: here the watchdog learns where the rank is.
        record_position(f"{ctx.state.exchange.group.label}, backward exchange")
        ctx.state.transfer = ctx.state.exchange.reversed().start(grad_ND)
        return grad_ND.new_empty(0), None
