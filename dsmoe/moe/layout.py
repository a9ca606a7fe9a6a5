"""The layout of an MoE layer over ranks and memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from dsmoe.config.errors import UserError, refuse
from dsmoe.config.schema import Experts
from dsmoe.config.sections.moe import dense_path_slice_problems
from dsmoe.config.suggestions import divisors_of, nearest_of
from dsmoe.parallel.groups import TensorGroup


@dataclass(frozen=True)
class Layout:
    """The layout of an MoE layer over ranks and memory: speed and bytes, never the result.

    Attributes:
        expert_tensor: ranks over which the inner width of each expert is cut, neighbours; 1 keeps experts whole.
        tensor_group: the ranks of one micro-batch, each of which brings its equal part of every sequence. The balancing
            losses are those of the whole micro-batch, the gradients of replicated weights are summed over the ranks,
            and the shared expert is cut over them; capacity stays each rank's own.
        max_tokens: the most tokens that any rank brings to a forward pass, the same on all ranks. With it a padded
            exchange has a static size; without it, the ranks agree on one at every pass, which reads a number on the
            host.
        overlap_chunks: parts that the exchange is cut into, so that the experts work on one while others travel.
        recompute_experts: compute the pre-activations of stacked experts again in the backward pass.

    Raises:
        UserError: a value is of another type, or a size no whole number of at least 1.
    """

    expert_tensor: int = 1
    tensor_group: TensorGroup = field(default_factory=TensorGroup.alone)
    max_tokens: int | None = None
    overlap_chunks: int = 1
    recompute_experts: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.tensor_group, TensorGroup):
            raise UserError(f"tensor_group must be groups.tensor_group() or left out, not {self.tensor_group!r}")
        if not isinstance(self.recompute_experts, bool):
            raise UserError(f"recompute_experts must be True or False, not {self.recompute_experts!r}")
        check_sizes(expert_tensor=self.expert_tensor, overlap_chunks=self.overlap_chunks)
        if self.max_tokens is not None:
            check_sizes(max_tokens=self.max_tokens)

    def check(self, num_experts: int, ep_size: int, expert: nn.Module | None, experts: Experts) -> None:
        """Check that the layout fits a layer's experts and dense path.

        Raises:
            UserError: the layout does not fit.
        """
        if num_experts % ep_size:
            nearest = nearest_of(ep_size, divisors_of(num_experts))
            raise UserError(f"ep_size ({ep_size}) must divide num_experts ({num_experts}); nearest: {nearest}")
        if expert is not None and self.expert_tensor > 1:
            raise UserError(
                f"expert_tensor ({self.expert_tensor}) cuts stacked experts only; give expert_ffn_size in Experts(...) "
                f"instead of expert"
            )
        refuse(dense_path_slice_problems(experts, self.tensor_group.size))
        if expert is not None and experts.residual and self.tensor_group.size > 1:
            raise UserError(
                f"a residual MLP over {self.tensor_group.size} tensor ranks needs expert_ffn_size in Experts(...), not "
                f"expert"
            )


def check_sizes(**sizes: int) -> None:
    """Refuse a size that is not a whole number of at least 1.

    Raises:
        UserError: names the first such size.
    """
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
