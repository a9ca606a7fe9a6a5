"""Step 2, balance: losses and a bias that keep the experts evenly used, computed before anything is dropped.

Three means that can be combined: the load-balancing loss, the z-loss, and a bias on the selection. The means that need
the counts of all ranks and micro-batches of a step (`scope` global, the bias) are updated between the steps by
`dsmoe.moe.step_updates.update_routers`.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from dsmoe.config import schema
from dsmoe.kernels import on_gpu
from dsmoe.moe.router import Routing
from dsmoe.parallel.groups import TensorGroup
from dsmoe.parallel.mappings import all_reduce, reduce_from_tensor_parallel_region


class BalanceLosses(NamedTuple):
    """The load-balancing loss and the z-loss of one micro-batch, unweighted scalars."""

    balance: torch.Tensor
    z: torch.Tensor


class Balance(nn.Module):
    """The means that keep the experts of one layer evenly used.

    Args:
        num_experts: E.
        options: the means and their strengths; a coefficient of 0 attaches no loss. The `scope` says over what f is
            counted: `micro_batch`, the tokens of a data rank's micro-batch (Switch, GShard); `sequence`, each sequence
            by itself (DeepSeek-V3, eq. 17 to 20); `global`, all ranks and micro-batches of the optimizer step *before*
            this one. A `bias_update_rate` above 0 keeps a selection bias (DeepSeek-V3, arXiv 2408.15664).
        tensor_group: the ranks that each have as many tokens of every sequence of one micro-batch. The losses are those
            of the whole micro-batch, and each rank's gradient is that of its tokens.

    Attributes:
        bias: [E] fp32, added to the scores for selection; None without one. Saved with the model.
        load_share: [E] fp32, f of the previous optimizer step, at first 1 / E; None but under scope `global`. Saved
            with the model, so that a resumed run continues exactly.
    """

    _keep_in_fp32_modules_strict = ("bias", "load_share")
    """For DeepSpeed's `data_types.buffer_dtype`: under it these buffers stay fp32."""

    bias: torch.Tensor | None
    load_share: torch.Tensor | None

    def __init__(self, num_experts: int, options: schema.Balance, tensor_group: TensorGroup | None = None) -> None:
        super().__init__()
        self.options = options
        self.tensor_group = tensor_group or TensorGroup.alone()
        self.register_buffer("bias", torch.zeros(num_experts) if options.bias_update_rate else None)
        even = torch.full((num_experts,), 1.0 / num_experts)
        self.register_buffer("load_share", even if options.scope == "global" else None)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Balance:
        """Move with the model, but stay fp32: bf16 would swallow steps of 0.001 from a bias of 0.5 on."""
        # The values from before: a cast to bf16 and back has lost digits.
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    @property
    def needs_counts(self) -> bool:
        """True if `update` has anything to do."""
        return self.bias is not None or self.load_share is not None

    def losses(self, routing: Routing, assigned_E: torch.Tensor, num_sequences: int) -> BalanceLosses:
        """Return the losses of one micro-batch of `num_sequences` sequences, one after the other."""
        group = self.tensor_group
        if self.options.scope == "sequence":
            balance = sequence_balancing_loss(routing, num_sequences, group)
        else:
            share_E = self.load_share
            if share_E is None:  # scope micro_batch: counted now, over the ranks of the micro-batch
                # No gradient: counts of choices are integers. The loss pulls on P alone.
                counts_E = assigned_E if group.size == 1 else all_reduce(assigned_E, group)
                share_E = counts_E / counts_E.sum().clamp(min=1)
            balance = load_balancing_loss(routing, share_E, group)
        return BalanceLosses(balance, router_z_loss(routing, group))

    def attach(self, weights_TK: torch.Tensor, losses: BalanceLosses, scale: float) -> torch.Tensor:
        """Return the router weights with the weighted losses attached: their gradients flow together."""
        if self.options.aux_loss:
            weights_TK = attach_loss(weights_TK, losses.balance, self.options.aux_loss * scale)
        if self.options.z_loss:
            weights_TK = attach_loss(weights_TK, losses.z, self.options.z_loss * scale)
        return weights_TK

    @torch.no_grad()
    def update(self, counts_E: torch.Tensor, applied: torch.Tensor | None = None) -> None:
        """Update by the assignments of one optimizer step, summed over all ranks and micro-batches; no host read.

        bias_e += rate * sign(mean(count) - count_e): an expert with less than its part becomes easier to choose
        (arXiv 2408.15664, alg. 1). f_e = count_e / sum(count) serves the next step's loss. Both stay as they are
        where `applied`, a bool on the device, is false.
        """
        # By multiplication and `where`: `applied` is on the device, and the host does not wait for it.
        if self.bias is not None:
            # The sign: a step of the same size, whatever the number of tokens.
            change_E = self.options.bias_update_rate * (counts_E.mean() - counts_E).sign().to(self.bias.dtype)
            self.bias += change_E if applied is None else change_E * applied
        if self.load_share is not None:
            share_E = (counts_E / counts_E.sum().clamp(min=1)).to(self.load_share.dtype)
            self.load_share.copy_(share_E if applied is None else torch.where(applied, share_E, self.load_share))


def count_experts(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count the entries of `experts` that name each expert, [E] int64; entries equal to E (masked) are left out.

    `torch.bincount` reads its result's size back to the host, which a training step must not do.
    """
    flat_A = experts.reshape(-1)
    if on_gpu(flat_A):
        from dsmoe.kernels.permute import count_by_expert

        return count_by_expert(flat_A, num_experts)
    # One bin more, for masked entries, which is cut off: the size is static.
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat_A.device)
    return counts.scatter_add_(0, flat_A, torch.ones_like(flat_A))[:num_experts]


def load_balancing_loss(routing: Routing, share_E: torch.Tensor, group: TensorGroup | None = None) -> torch.Tensor:
    """Return the Switch/GShard loss E * sum_e f_e * P_e, a scalar that is 1 under perfect balance.

    f_e (`share_E`) is the share of the assignments that chose expert e, before dropping, and P_e the mean over the
    tokens of e's score as a probability, by the score's `over_experts` (Switch Transformer, eq. 4 to 6; for
    k > 1, f is divided by k as in GShard, so the optimum stays 1; DeepSeek-V3, eq. 19). The tokens are those of all
    ranks of `group`.
    """
    mean_E = mean_over_tokens(routing.probabilities_TE, routing.mask_T, group)
    return share_E.numel() * torch.dot(share_E.to(mean_E.dtype), mean_E)


def sequence_balancing_loss(routing: Routing, num_sequences: int, group: TensorGroup | None = None) -> torch.Tensor:
    """Return the mean over the sequences of E * sum_e f_e * P_e of each (DeepSeek-V3, eq. 17 to 20).

    Sequences without an unmasked token are left out of the mean. Each rank of `group` has a part of every sequence.
    """
    group = group or TensorGroup.alone()
    num_tokens, num_experts = routing.probabilities_TE.shape
    # T tokens are B sequences of S, one after the other.
    shape = (num_sequences, num_tokens // max(num_sequences, 1), -1)
    probabilities_BSE = routing.probabilities_TE.view(*shape[:2], num_experts)
    used_BS = probabilities_BSE.new_ones(shape[:2])
    if routing.mask_T is not None:
        used_BS = routing.mask_T.view(shape[:2]).to(used_BS.dtype)
    # Each rank has S / ranks tokens of every sequence: lengths, scores and counts are sums over the ranks.
    length_B = reduce_from_tensor_parallel_region(used_BS.sum(dim=1), group)
    total_BE = reduce_from_tensor_parallel_region((probabilities_BSE * used_BS[..., None]).sum(dim=1), group)
    mean_BE = total_BE / length_B.clamp(min=1)[:, None]
    chosen = routing.experts_TK.view(num_sequences, shape[1] * routing.experts_TK.shape[1])
    # A column more for masked choices (expert E), as in `count_experts`.
    counts_BE = torch.zeros(num_sequences, num_experts + 1, dtype=mean_BE.dtype, device=mean_BE.device)
    counts_BE = counts_BE.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=mean_BE.dtype))[:, :num_experts]
    counts_BE = reduce_from_tensor_parallel_region(counts_BE, group)
    share_BE = counts_BE / counts_BE.sum(dim=1, keepdim=True).clamp(min=1)
    # Fully masked sequences have P = 0 and add nothing to the sum; they must not count in the mean either.
    num_used = (length_B > 0).sum().clamp(min=1)
    return num_experts * (share_BE * mean_BE).sum() / num_used


def router_z_loss(routing: Routing, group: TensorGroup | None = None) -> torch.Tensor:
    """Return the mean squared logsumexp of the logits, a loss that keeps the logits small (ST-MoE, eq. 5)."""
    return mean_over_tokens(routing.logits_TE.logsumexp(dim=-1).square(), routing.mask_T, group)


def mean_over_tokens(
    values: torch.Tensor, mask_T: torch.Tensor | None, group: TensorGroup | None = None
) -> torch.Tensor:
    """Return the mean of [T, ...] over the unmasked tokens of all ranks of `group`; 0 without any."""
    group = group or TensorGroup.alone()
    if mask_T is None:
        count, total = values.new_full((), len(values)), values.sum(dim=0)
    else:
        weight = mask_T.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))
        count, total = mask_T.sum().to(values.dtype), (values * weight).sum(dim=0)
    # Sum and count in one collective.
    both = reduce_from_tensor_parallel_region(torch.cat([total.reshape(-1), count.reshape(1)]), group)
    return both[:-1].view_as(total) / both[-1].clamp(min=1)


def attach_loss(values: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
    """Return a copy of `values` whose backward pass also sends the gradient of `scale * loss`.

    The model's own loss need not know of `loss`, however deep the layer sits (as in Megatron-Core). A copy and not a
    view: torch.compile recreates the views that leave a graph, without the attached loss.
    """
    return _AttachLoss.apply(values, loss, scale)


# backward: the values' gradient passes unchanged, and the loss gets `scale`, as if `scale * loss` were a term of the
# model's own loss. No tensor is kept but a 1 of the loss's dtype and device.
class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        ctx.loss_like = loss.new_ones(())
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grad_values, ctx.loss_like * ctx.scale, None
