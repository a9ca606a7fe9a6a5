"""What is random in a forward pass, and whether a pass repeats an earlier one for activation checkpointing.

A pass in training draws from a key, which follows from (seed of the layer, step, number of the pass in the step, rank).
Activation checkpointing runs some passes a second time during the backward pass: in another order, several of them
outstanding, nested in each other, or with torch's generator not restored. A counter of passes cannot know which one is
repeated, and neither can torch's generator where nobody restores it. The tokens tell: `Draws` notes a fingerprint of
the tokens of each pass, and a pass that runs during a backward pass takes the number of the pass whose fingerprint is
the nearest. That need not be the same to the bit, since a checkpointed block may round differently the second time
(compiled code with and without gradients, sums in another order). All of it stays on the device.

Example: passes 0, 1 and 2 bring tokens with the fingerprints 0.3, -1.2 and 0.3. Seen again in the backward pass, -1.2
has number 1. 0.3 has two candidates, and autograd's sequence numbers decide: the node that is going backward was made
after pass 0 and before pass 2, so pass 0 is repeated.

Shape suffixes: see `dsmoe.moe.router`; P noted passes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from dsmoe.parallel.random_weights import seed_of

_LARGEST = 2**63 - 1
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""2^64 over the golden ratio, SplitMix64's step, as a signed number."""


# Looked up whenever a compiled graph runs, not once when it is traced or captured.
@torch.library.custom_op("dsmoe::is_first_pass", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _is_first_pass(like: torch.Tensor) -> torch.Tensor:
    """The contrary of `repeating`, a scalar on the device of `like`."""
    return torch.full((), not repeating(), device=like.device)


@_is_first_pass.register_fake
def _(like: torch.Tensor) -> torch.Tensor:
    return torch.empty((), dtype=torch.bool, device=like.device)


def repeating() -> bool:
    """Whether autograd is going backward in this thread, so that a forward pass can only be a recomputation."""
    return torch._C._current_graph_task_id() != -1


def unless_repeating(addend: torch.Tensor) -> torch.Tensor:
    """`addend`, or zeros in a recomputation; for code that torch.compile traces."""
    return torch.where(torch.ops.dsmoe.is_first_pass(addend), addend, 0.0)


class Draws:
    """The keys that one layer's forward passes draw from.

    Args:
        capacity: how many passes are noted; older ones are forgotten. One step has fewer, recomputations included.
    """

    def __init__(self, capacity: int = 4096) -> None:
        self.step = 0
        """The optimizer step."""
        self.count = 0
        """Passes of the step so far, without recomputations."""
        self._capacity = capacity
        self._noted = 0
        self._prints_N4: torch.Tensor | None = None
        """Fingerprints. `_facts_4N` are, of each pass, the two of `_place`, its number, and for which node of
        autograd's graph it was a recomputation, -1 for none."""
        self._hook: weakref.ref[Any] | None = None
        self._hooked_at = 0

    def begin_step(self, step: int) -> None:
        """Start optimizer step `step`."""
        self.step = step
        self.count = self._noted = 0

    @torch.compiler.disable
    def begin(self, seed: int, x_TD: torch.Tensor, training: bool) -> torch.Tensor:
        """Begin a pass over these tokens: its key, an int64 scalar on their device; the host reads nothing.

        It depends on (seed, step, number of the pass, rank) in training, and in evaluation, which so repeats itself,
        on (seed, rank).
        """
        if not training:
            return torch.full((), _seed(seed, "evaluation"), device=x_TD.device)
        place, going_backward = self._place(), _GoingBackward.current()
        with torch.inference_mode(False), torch.no_grad():
            print_4 = _fingerprint(x_TD)
            match = None
            if going_backward is not None:
                # Selective checkpointing has seen the operations of the first pass, and wants no others in this one.
                with _disable_current_modes():
                    match = self._match(print_4, going_backward)
            if match is None:
                number = torch.full((), self.count, device=x_TD.device)
                self._note(print_4, *place, number, -1)
                self.count += 1
            else:  # noted too: a checkpoint within a checkpoint repeats a recomputation
                assert going_backward is not None
                print_4, number = match
                self._note(print_4, *place, number, going_backward.code)
            return self.key(seed, number)

    def key(self, seed: int, number: torch.Tensor) -> torch.Tensor:
        """The key of pass `number` of this step."""
        return _mix(number * _GOLDEN + _seed(seed, self.step))

    def _place(self) -> tuple[int, int]:
        """The sequence number that autograd's next node gets, and which it was at the begin of this checkpoint.

        torch's checkpoints take care of what is kept for the backward pass by a pair of hooks, each by its own.
        """
        now, hooks = torch.autograd._get_sequence_nr(), torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is None:
            return now, now
        if self._hook is None or self._hook() is not hooks[0]:
            self._hook, self._hooked_at = weakref.ref(hooks[0]), now
        return now, self._hooked_at

    def _match(self, print_4: torch.Tensor, now: _GoingBackward) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Fingerprint and number of the noted pass that is repeated, None where none is noted."""
        if not self._noted or self._prints_N4 is None:
            return None
        noted = slice(min(self._noted, self._capacity))
        place_N, start_N, number_N, repeated_for_N = self._facts_4N[:, noted]
        distance_N = (self._prints_N4[noted] - print_4).abs().amax(1).nan_to_num(nan=torch.inf)
        nearest_N = distance_N == distance_N.min()
        # Of passes over the same tokens those of the checkpoint that is repeated, one after the other: the first that
        # came after the checkpoint's node; or, if it has none, those of the last that had begun before this node.
        if now.is_checkpoint:
            candidate_N = nearest_N & (place_N > now.node)
        else:
            start_N = torch.where(nearest_N & (start_N <= now.node), start_N, -1)
            candidate_N = nearest_N & (start_N == start_N.max())
        candidate_N = torch.where(candidate_N.any(), candidate_N, nearest_N)
        turn = (nearest_N & (repeated_for_N == now.code)).sum().clamp(max=candidate_N.sum() - 1)
        match = (candidate_N & (candidate_N.cumsum(0) - 1 == turn)).int().argmax()[None]
        return self._prints_N4.index_select(0, match)[0], number_N.index_select(0, match)[0]

    def _note(self, print_4: torch.Tensor, *facts: torch.Tensor | int) -> None:
        if self._prints_N4 is None or self._prints_N4.device != print_4.device:
            self._noted = 0
            self._prints_N4 = print_4.new_zeros(self._capacity, 4)
            self._facts_4N = torch.zeros(4, self._capacity, dtype=torch.int64, device=print_4.device)
        slot = self._noted % self._capacity
        self._prints_N4[slot] = print_4
        for row, fact in enumerate(facts):
            self._facts_4N[row, slot] = fact
        self._noted += 1

    def __getstate__(self) -> dict[str, Any]:
        """For copying and pickling: without the passes, of which no copy goes backward."""
        forgotten = {"_noted": 0, "_prints_N4": None, "_hook": None}
        return {name: value for name, value in self.__dict__.items() if name != "_facts_4N"} | forgotten


@dataclass(frozen=True)
class _GoingBackward:
    """The backward pass that this thread is in.

    Attributes:
        task: its number.
        node: the sequence number of its present node.
        is_checkpoint: whether that is a reentrant checkpoint, torch's or DeepSpeed's; else it is a node in one of the
            other kind, which is repeated because the node wants what was not kept.
    """

    task: int
    node: int
    is_checkpoint: bool

    @classmethod
    def current(cls) -> _GoingBackward | None:
        """None outside of a backward pass."""
        if not repeating():
            return None
        task, node = torch._C._current_graph_task_id(), torch._C._current_autograd_node()
        if node is None:
            return cls(task, _LARGEST, False)
        return cls(task, node._sequence_nr(), node.name().startswith("CheckpointFunction"))

    @property
    def code(self) -> int:
        """Task and node in one number."""
        return self.task % 2**23 * 2**40 + self.node % 2**40


def uniform(key: torch.Tensor | None, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """fp32 numbers from U(0, 1), neither of which occurs: the same for the same key, on every device.

    SplitMix64 (Steele et al. 2014) of a counter, two numbers from each of its words. None draws from torch's generator.
    """
    if key is None:
        return torch.rand(shape, device=device).clamp_(min=2**-25)
    count = math.prod(shape)
    words = _mix(torch.arange(1, (count + 1) // 2 + 1, device=device) * _GOLDEN + key)
    bits = (words.view(torch.int32)[:count] >> 9) & 0x7FFFFF
    return ((bits.float() + 0.5) * 2**-23).view(shape)


def _mix(words: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser, in int64, which wraps; torch has no shift that brings in zeros."""
    words = (words ^ ((words >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    words = (words ^ ((words >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return words ^ ((words >> 31) & (2**33 - 1))


def _seed(seed: int, *when: object) -> int:
    return seed_of(seed, "random", *when, dist.get_rank() if dist.is_initialized() else 0)


def _fingerprint(x_TD: torch.Tensor) -> torch.Tensor:
    """Four numbers that say which tokens these are: [4] fp32, each the sum of all entries with random weights.

    Other tokens have others, tokens that differ by rounding nearly the same.
    """
    num_tokens, width = x_TD.shape
    key = torch.zeros((), dtype=torch.int64, device=x_TD.device)
    with torch.autocast(x_TD.device.type, enabled=False):
        tokens_4T = uniform(key, (4, num_tokens), x_TD.device) - 0.5
        width_4D = uniform(key + 1, (4, width), x_TD.device) - 0.5
        return ((tokens_4T @ x_TD.detach().float()) * width_4D).sum(1)
