"""`dsmoe.MoE`: a drop-in `deepspeed.moe.layer.MoE` with dsmoe's routing, dropping, dispatch and experts.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import nn

from dsmoe.config import schema
from dsmoe.engine import deepspeed_registry
from dsmoe.moe.balance import Balance, count_experts
from dsmoe.moe.capacity import Capacity, spread_over_slices
from dsmoe.moe.deepspeed_arguments import DeepSpeedArguments, Sections, check_kind, check_switches, to_sections
from dsmoe.moe.dispatch import Dispatch, join_dense
from dsmoe.moe.experts import (
    ExpertDraw,
    ModuleExperts,
    RouterAndExperts,
    StackedExperts,
    mark_expert_parameters,
)
from dsmoe.moe.hierarchical import choose_dispatch
from dsmoe.moe.layout import Layout, check_sizes
from dsmoe.moe.replay import Draws, repeating
from dsmoe.moe.router import Router
from dsmoe.moe.stats import RoutingStatistics
from dsmoe.nn.feed_forward import FeedForward
from dsmoe.parallel.groups import ExpertGroup
from dsmoe.parallel.mappings import copy_weight_to_tensor_parallel_region
from dsmoe.parallel.random_weights import seed_of, uniform_from


class MoE(DeepSpeedMoE):
    """A Mixture-of-Experts layer that DeepSpeed's engine recognises as its own.

    Takes every argument of `deepspeed.moe.layer.MoE` with its meaning and default; changing the import is enough. The
    sections of a YAML file set what DeepSpeed's layer cannot do: `dsmoe.Router`, `dsmoe.Balance`, `dsmoe.Capacity` and
    `dsmoe.Experts` document every option; docs/moe_layer.md has the formulas.
    Intended differences: evaluation is deterministic, experts start different from each other (drawn by their global
    id), all k have the same semantics, and drops are exact (`drop_policy`) and random only where asked: `use_rts`,
    `use_tutel` and `top2_2nd_expert_sampling` are accepted and change nothing.

    Args:
        hidden_size: D, the width of a token.
        expert: a module that maps [n, D] to [n, D]; L copies of it are made. None makes experts of inner width
            `experts.expert_ffn_size` in stacked weights, which is faster.
        num_experts: E, over all ranks.
        ep_size: R, the ranks (times `layout.expert_tensor`) that share one copy of all experts.
        k: experts per token.
        capacity_factor: see `dsmoe.moe.capacity.expert_capacity`; None is dropless.
        eval_capacity_factor: the same in evaluation, independent of training: a layer that trains dropless with
            `capacity_factor=None` still drops in evaluation at the default of 1.0.
        min_capacity: the least capacity.
        use_residual: a dense MLP like one expert, mixed with the experts by coefficients that are learned from the
            token (PR-MoE, arXiv 2201.05596).
        noisy_gate_policy: None, 'Jitter' or 'RSample': DeepSpeed's names for `noise` 'none', 'jitter' and 'gumbel'.
        drop_tokens: False is dropless, whatever the factors say.
        use_rts: no effect.
        use_tutel: no effect.
        enable_expert_tensor_parallelism: must be False under tensor parallelism; `layout.expert_tensor` cuts experts.
        top2_2nd_expert_sampling: no effect.
        router: the choice of a token's experts, instead of `noisy_gate_policy`. None divides the chosen scores by
            their sum for k > 1, as DeepSpeed does.
        balance: losses and a bias that keep the experts evenly used. Its `aux_loss` flows by itself with the output's
            gradient; None leaves that loss to the caller, who adds the returned one as with DeepSpeed.
        capacity: the limit of each expert, instead of `capacity_factor`, `eval_capacity_factor`, `min_capacity` and
            `drop_tokens`.
        experts: the widths and the activation of the stacked experts and of the dense path.
        layout: the layout over ranks and memory.
        seed: of all weights (but those of an `expert` without `reset_parameters`), noise and random drops; None draws
            one from torch's generator.
        redraw_experts: draw each copy of `expert` anew, by its global id, through the `reset_parameters` of its
            modules, so that experts start different. False keeps the weights that `expert` came with in every copy,
            as DeepSpeed does (for pretrained or specially initialised ones).

    Attributes:
        loss_scale: factor of the attached losses; `dsmoe.initialize` sets it to 1 / accumulation steps, as the engine
            does with the model's loss. In a loop of your own that scales its loss (accumulation, fp16), set it to the
            same factor.

    Raises:
        UserError: arguments that make no layer, or say the same thing twice.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module | None = None,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float | None = 1.0,
        eval_capacity_factor: float | None = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        *,
        router: schema.Router | None = None,
        balance: schema.Balance | None = None,
        capacity: schema.Capacity | None = None,
        experts: schema.Experts | None = None,
        layout: Layout | None = None,
        seed: int | None = None,
        redraw_experts: bool = True,
    ) -> None:
        # Not DeepSpeed's own __init__: it would build its gate and deep-copied experts only to throw them away.
        nn.Module.__init__(self)
        check_sizes(hidden_size=hidden_size, num_experts=num_experts, ep_size=ep_size, k=k)
        check_switches(enable_expert_tensor_parallelism and deepspeed_registry.has_model_parallel_unit(), use_tutel)
        given = DeepSpeedArguments(
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            min_capacity=min_capacity,
            use_residual=use_residual,
            noisy_gate_policy=noisy_gate_policy,
            drop_tokens=drop_tokens,
        )
        sections = to_sections(k, expert, given, router, balance, capacity, experts)
        self.layout = Layout() if layout is None else layout
        check_kind("layout", self.layout, Layout)
        self.layout.check(num_experts, ep_size, expert, sections.experts)
        self.enable_expert_tensor_parallelism = enable_expert_tensor_parallelism
        self.num_experts, self.num_local_experts, self.k, self.ep_size = num_experts, num_experts // ep_size, k, ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.pad = sections.capacity.pad
        self.loss_scale = 1.0
        self._make_modules(hidden_size, expert, sections)
        # On the CPU whatever the default device, which may be meta and have no numbers.
        seed = seed if seed is not None else int(torch.randint(2**62, (), device="cpu"))
        exchange = ep_size * self.layout.expert_tensor
        rank = dist.get_rank() % exchange if dist.is_initialized() else 0
        copies = expert is not None and not redraw_experts
        self._draw = ExpertDraw(seed, rank, self.layout.expert_tensor, copies)
        self.reset_experts()
        self._draw_dense_weights()
        self._draws = Draws()
        self._dispatches: dict[bool, Dispatch] = {}
        if exchange == 1:
            self.set_expert_group(ExpertGroup.alone())

    def _make_modules(self, hidden_size: int, expert: nn.Module | None, sections: Sections) -> None:
        """Make the parts of the layer, without drawing their weights.

        The dense path's names lack "expert": DeepSpeed's checkpoints leave out names that contain it (0.19.8,
        runtime/engine.py:5003).
        """
        layout, options, tensor_group = self.layout, sections.experts, self.layout.tensor_group
        self.balance = Balance(self.num_experts, sections.balance, tensor_group)
        self.limit = Capacity(self.num_experts, self.k, sections.capacity, layout.max_tokens)
        experts: StackedExperts | ModuleExperts
        if expert is None:
            recompute, num_slices = layout.recompute_experts, layout.expert_tensor
            experts = StackedExperts(hidden_size, self.num_local_experts, options, recompute, num_slices)
        else:
            experts = ModuleExperts(expert, self.num_local_experts)
        mark_expert_parameters(experts, self.expert_group_name)
        router = Router(hidden_size, self.num_experts, self.k, sections.router, tensor_group)
        # Under DeepSpeed's names: its engine, its checkpoints and users' code reach into `deepspeed_moe`.
        self.deepspeed_moe = RouterAndExperts(router, experts, self.expert_group_name, self.ep_size)
        self.use_residual = options.residual
        self.shared = self.mlp = None
        # Within the layer every rank has its own tokens, as between the blocks under sequence parallelism.
        over_sequence = replace(tensor_group, sequence=True)
        if options.shared_expert_ffn_size is not None:
            self.shared = FeedForward(hidden_size, options.shared_expert_ffn_size, options.activation, over_sequence)
        if options.residual:
            self.mlp = expert
            if options.expert_ffn_size is not None:
                self.mlp = FeedForward(hidden_size, options.expert_ffn_size, options.activation, over_sequence)
            self.coefficient = nn.Linear(hidden_size, 2)
        self.statistics = RoutingStatistics(self.num_experts)

    @property
    def router(self) -> Router:
        """Step 1 of the forward pass; `deepspeed_moe.gate`."""
        return self.deepspeed_moe.gate

    @property
    def experts(self) -> StackedExperts | ModuleExperts:
        """Step 5 of the forward pass; `deepspeed_moe.experts`."""
        return self.deepspeed_moe.experts

    def reset_experts(self, std: float = 0.02, down_std: float = 0.02, seed: int | None = None) -> None:
        """Draw this rank's experts anew from their global ids and the layer's seed; `seed` replaces that one."""
        self._draw = replace(self._draw, seed=self._draw.seed if seed is None else seed, stds=(std, down_std))
        self._draw.fill(self.experts)

    def _draw_dense_weights(self) -> None:
        """Draw router, shared expert and residual MLP from the layer's seed: torch's draws would depend on slices."""
        for name, dense in (("shared", self.shared), ("mlp", self.mlp)):
            if isinstance(dense, FeedForward):
                dense.initialise(seed_of(self._draw.seed, name), *self._draw.stds)
        weights = {"router": self.router.weight}
        if self.use_residual:
            weights |= {f"coefficient.{name}": p for name, p in self.coefficient.named_parameters()}
        # torch's own distribution of `nn.Linear`: uniform within 1 / sqrt(D).
        for name, weight in weights.items():
            uniform_from(seed_of(self._draw.seed, name), weight, self.router.weight.shape[1] ** -0.5)

    def set_expert_group(self, group: ExpertGroup) -> None:
        """Exchange tokens over `group` from now on.

        A rank whose place in the group is not the one that was assumed when the layer was made draws its experts anew.

        Raises:
            RuntimeError: the experts would be drawn anew, but have been changed since they were made.
        """
        size = self.ep_size * self.layout.expert_tensor
        assert group.size == size, (
            f"expert group of {group.size} for ep_size {self.ep_size} x {self.layout.expert_tensor}"
        )
        mark_expert_parameters(self.experts, self.expert_group_name)
        self._draw = self._draw.moved_to(group.rank, self.experts)
        self._dispatches = {
            padded: choose_dispatch(group, padded, self.layout.overlap_chunks) for padded in (False, True)
        }

    @property
    def expert_place(self) -> tuple[int, int]:
        """The global id of this rank's first expert, and the number of this rank's slice of each expert."""
        return self._draw.place(self.num_local_experts)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MoE:
        """Move or cast; new parameters (of `to_empty`) get the marks of the old ones."""
        super()._apply(fn, recurse)
        mark_expert_parameters(self.experts, self.expert_group_name)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the marks of expert parameters, which copies and pickles lose."""
        super().__setstate__(state)
        mark_expert_parameters(self.experts, self.expert_group_name)

    def _create_process_groups(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Find the registered expert group, or have DeepSpeed make it; DeepSpeed's engine calls this."""
        # A group that `set_expert_group` gave stays. At ep_size 1 nothing is exchanged, and DeepSpeed still needs its
        # expert-data group.
        if self._dispatches and self.ep_size > 1:
            return
        if not deepspeed_registry.has_expert_group(self.expert_group_name):
            deepspeed_registry.create_expert_groups(self.ep_size, use_data_before_expert_parallel_)
        if self.ep_size > 1:
            self.set_expert_group(ExpertGroup.registered(self.expert_group_name))

    def forward(
        self, hidden_states: torch.Tensor, used_token: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route, limit, dispatch, compute, combine, join, count.

        Args:
            hidden_states: [..., D].
            used_token: [T] or [...], 0 or False where a token is padding: it is not routed, not counted, and its
                output is zero.

        Returns:
            The output [..., D]; the load-balancing loss, unweighted (detached where `aux_loss` > 0, since it then
            flows by itself); and the assignments per expert before dropping, [E] int64.
        """
        run = self._forward if self._compiles(hidden_states) else self._forward_uncompiled
        return run(hidden_states, used_token)

    def _compiles(self, hidden_states: torch.Tensor) -> bool:
        """Return whether torch.compile can trace a pass: one rank, static shapes, no host read, nothing random."""
        alone = self.ep_size * self.layout.expert_tensor * self.layout.tensor_group.size == 1
        return alone and not self._is_random and self.experts.compiles(hidden_states)

    def _forward(
        self, hidden_states: torch.Tensor, used_token: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x_TD, mask_T = self._tokens(hidden_states, used_token)
        key = self._begin_pass(x_TD)
        # The capacity is for routers whose experts choose: they take C tokens each.
        routing = self.router(x_TD, mask_T, self.balance.bias, key, self.limit.capacity_for(len(x_TD)))
        assigned_E = count_experts(routing.experts_TK, self.num_experts)
        # Before anything is dropped: the losses judge the router's wishes, not the capacity.
        losses = self.balance.losses(routing, assigned_E, hidden_states.shape[:-2].numel())

        assignments = self.limit(routing, assigned_E, key)
        weights_TK = self.limit.weights(routing, assignments)
        if self.training:
            weights_TK = self.balance.attach(weights_TK, losses, self.loss_scale)
        # Statistics and weights stay per expert; only the exchange sees slices, as experts of their own.
        sent, sent_weights_TK = assignments, weights_TK
        if self.layout.expert_tensor > 1:
            sent = spread_over_slices(assignments, self.layout.expert_tensor, self.num_local_experts)
            sent_weights_TK = weights_TK.repeat_interleave(self.layout.expert_tensor, dim=1)
        exchange = self._exchange(assignments.capacity)
        chunks = exchange.dispatch(x_TD, sent_weights_TK, sent)
        dense_TD = self._dense(x_TD)  # while the rows travel
        y_TD = exchange.combine(chunks, self.experts)
        if dense_TD is not None:
            mix_T2 = self._mix(x_TD) if self.use_residual else None
            y_TD = join_dense(y_TD, dense_TD, mix_T2, routing.mask_T)

        # Once per pass, not again when it is recomputed. torch.compile evaluates a condition once, when it traces:
        # there `count` adds nothing in a recomputation.
        first = torch.compiler.is_compiling() or not repeating()
        if self.training and first:
            self.statistics.count(routing, assignments, losses)
        output = y_TD.view(hidden_states.shape)
        # With a coefficient the loss flows through the weights already: added by the caller, it would count twice.
        l_aux = losses.balance.detach() if self.balance.options.aux_loss else losses.balance
        if first:
            self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts = l_aux, assigned_E
        return output, l_aux, assigned_E

    # Whole passes are left to the interpreter: traced in pieces, a pass would break its graph at every exchange.
    _forward_uncompiled = torch.compiler.disable(_forward)

    def _tokens(
        self, hidden_states: torch.Tensor, used_token: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the tokens [T, D], zeros where masked so that nothing of them spreads, and the mask [T] as bool."""
        leading, width = hidden_states.shape[:-1], hidden_states.shape[-1]
        hidden_size = self.router.weight.shape[1]
        if width != hidden_size:
            raise ValueError(f"hidden_states has width {width}, and this MoE layer hidden_size {hidden_size}")
        x_TD = hidden_states.reshape(-1, width)
        if used_token is None:
            return x_TD, None
        if used_token.shape not in (leading, x_TD.shape[:1]):
            raise ValueError(
                f"used_token has shape {tuple(used_token.shape)}; give one value per token, {tuple(leading)} or "
                f"{tuple(x_TD.shape[:1])}"
            )
        mask_T = used_token.reshape(-1).bool()
        # Not by a product: padding may hold NaN, and NaN times 0 is NaN.
        return torch.where(mask_T[:, None], x_TD, 0.0), mask_T

    def begin_step(self, step: int) -> None:
        """Begin optimizer step `step`: random draws follow from its number, and counts start from 0."""
        self._draws.begin_step(step)
        self.statistics.clear()
        self.take_traffic()

    @property
    def _is_random(self) -> bool:
        return self.router.noise.is_random or self.limit.drop_policy.is_random

    def _begin_pass(self, x_TD: torch.Tensor) -> torch.Tensor | None:
        """Return the key of this forward pass, None where nothing is random; see `dsmoe.moe.replay`."""
        return self._draws.begin(self._draw.seed, x_TD, self.training) if self._is_random else None

    def take_traffic(self) -> tuple[float, float]:
        """Return the bytes sent over (intra-node, inter-node) links since the last call, backward passes included."""
        taken = [dispatch.traffic.take() for dispatch in self._dispatches.values()]
        return sum(intra for intra, _ in taken), sum(inter for _, inter in taken)

    def _exchange(self, capacity: int | None) -> Dispatch:
        if not self._dispatches:
            raise RuntimeError(
                f"this MoE layer has ep_size {self.ep_size} and no expert group yet: pass the model to "
                f"deepspeed.initialize or dsmoe.initialize first, or call set_expert_group"
            )
        # By pass: training may have a capacity where evaluation has none, and the other way round.
        return self._dispatches[capacity is not None and self.pad]

    def _mix(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the weights of experts and residual MLP for each token, [T, 2]."""
        weight, bias = (
            copy_weight_to_tensor_parallel_region(p, self.layout.tensor_group)
            for p in (self.coefficient.weight, self.coefficient.bias)
        )
        return nn.functional.linear(x_TD, weight, bias).softmax(dim=-1)

    def _dense(self, x_TD: torch.Tensor) -> torch.Tensor | None:
        """Return the output of the dense path: shared expert, residual MLP, or None without one."""
        dense = self.mlp if self.use_residual else self.shared
        output = None if dense is None else dense(x_TD)
        return output[0] if isinstance(output, tuple) else output
