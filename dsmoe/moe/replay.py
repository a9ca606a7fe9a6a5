"""Keys of a forward pass's random numbers, the same when activation checkpointing repeats the pass.

A pass in training draws from a key, which follows from (seed of the layer, step, number of the pass in the step, rank).
Activation checkpointing runs some passes a second time during the backward pass: in another order, several of them
outstanding, nested in each other, or with torch's generator not restored. Neither a counter of passes nor an unrestored
generator knows which pass is repeated. The tokens tell: `Draws` notes a fingerprint of the tokens of each pass, and a
pass that runs during a backward pass takes the number of the pass with the nearest fingerprint. Nearest and not equal,
since a checkpointed block may round differently the second time (compiled code with and without gradients, sums in
another order). Everything stays on the device.

Example: three passes of a step, each in a checkpoint that began at autograd's sequence number `start`.

    pass           0       1       2
    fingerprint    0.3    -1.2     0.3
    start          10      20      30
    -1.2 again, in the backward pass of any node: pass 1
     0.3 again, in the backward pass of node 15: pass 0, the last that had begun before the node; of node 35: pass 2

Shape suffixes: see `dsmoe.moe`; N is one row per noted pass.
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
    """Return `not repeating()`, a scalar on the device of `like`."""
    return torch.full((), not repeating(), device=like.device)


@_is_first_pass.register_fake
def _(like: torch.Tensor) -> torch.Tensor:
    return torch.empty((), dtype=torch.bool, device=like.device)


def repeating() -> bool:
    """Return whether autograd is going backward in this thread, so that a forward pass can only be a recomputation."""
    return torch._C._current_graph_task_id() != -1


def unless_repeating(addend: torch.Tensor) -> torch.Tensor:
    """Return `addend`, or zeros in a recomputation; for code that torch.compile traces."""
    return torch.where(torch.ops.dsmoe.is_first_pass(addend), addend, 0.0)


class Draws:
    """The keys that one layer's forward passes draw from.

    Args:
        capacity: passes that are noted; older ones are forgotten. One step has fewer, recomputations included.
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
        """Begin a pass over these tokens and return its key, an int64 scalar on their device; the host reads nothing.

        The key depends on (seed, step, number of the pass, rank) in training, and on (seed, rank) in evaluation, which
        so repeats itself.
        """
        if not training:
            # `full` is a launch with the number as its argument; `tensor` would be a copy, for which the host waits.
            return torch.full((), _seed(seed, "evaluation"), device=x_TD.device)
        place, going_backward = self._place(), _GoingBackward.current()
        # Tensors made in inference mode could not be overwritten by a pass outside of it.
        with torch.inference_mode(False), torch.no_grad():
            print_4 = _fingerprint(x_TD)
            match = None
            if going_backward is not None:
                # Selective checkpointing has seen the operations of the first pass, and wants no others in this one.
                with _disable_current_modes():
                    match = self._match(print_4, going_backward)
            if match is None:
                # On the device, because the number of a repeated pass is only known there.
                number = torch.full((), self.count, device=x_TD.device)
                self._note(print_4, *place, number, -1)
                self.count += 1
            else:  # noted too: a checkpoint within a checkpoint repeats a recomputation
                assert going_backward is not None
                print_4, number = match
                self._note(print_4, *place, number, going_backward.code)
            return self.key(seed, number)

    def key(self, seed: int, number: torch.Tensor) -> torch.Tensor:
        """Return the key of pass `number` of this step."""
        # SplitMix64 at position `number` of the sequence that begins at the step's seed.
        return _mix(number * _GOLDEN + _seed(seed, self.step))

    def _place(self) -> tuple[int, int]:
        """Return the sequence number of autograd's next node, now and at the begin of this checkpoint.

        A checkpoint of torch's is known by the pair of hooks that it sets for saved tensors: each sets its own.
        """
        # Sequence numbers grow with every node of this thread's graph, so they order passes, checkpoints and nodes.
        now, hooks = torch.autograd._get_sequence_nr(), torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is None:
            return now, now
        # Weak, since the hook holds the checkpoint's inputs; and not by `id`, which a later hook may have again.
        if self._hook is None or self._hook() is not hooks[0]:
            self._hook, self._hooked_at = weakref.ref(hooks[0]), now
        return now, self._hooked_at

    def _match(self, print_4: torch.Tensor, now: _GoingBackward) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return fingerprint and number of the noted pass that is repeated; None where none is noted."""
        if not self._noted or self._prints_N4 is None:
            return None
        noted = slice(min(self._noted, self._capacity))
        place_N, start_N, number_N, repeated_for_N = self._facts_4N[:, noted]
        # NaN counts as far: where the tokens have NaN, all passes are equally near, and the graph decides.
        distance_N = (self._prints_N4[noted] - print_4).abs().amax(1).nan_to_num(nan=torch.inf)
        # All that are as near as the nearest: passes over the same tokens have equal fingerprints.
        nearest_N = distance_N == distance_N.min()
        # Of passes over the same tokens, the candidates are those of the checkpoint that is repeated. A reentrant
        # checkpoint has a node, made before its passes: the passes after it. Other checkpoints have none, and the node
        # that goes backward is inside: the passes of the last checkpoint that had begun before the node.
        if now.is_checkpoint:
            candidate_N = nearest_N & (place_N > now.node)
        else:
            start_N = torch.where(nearest_N & (start_N <= now.node), start_N, -1)
            candidate_N = nearest_N & (start_N == start_N.max())
        # Where the graph rules out all of them, the order of the passes alone decides.
        candidate_N = torch.where(candidate_N.any(), candidate_N, nearest_N)
        # A checkpoint may hold several passes over the same tokens; they are repeated in their order, so the turn is
        # the number of those that were repeated already for this node.
        turn = (nearest_N & (repeated_for_N == now.code)).sum().clamp(max=candidate_N.sum() - 1)
        # The candidate number `turn`, as an index on the device: reading it would make the host wait.
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
        """Leave out the noted passes when copied or pickled: no copy goes backward through them."""
        forgotten = {"_noted": 0, "_prints_N4": None, "_hook": None}
        return {name: value for name, value in self.__dict__.items() if name != "_facts_4N"} | forgotten


@dataclass(frozen=True)
class _GoingBackward:
    """The backward pass that this thread is in.

    Attributes:
        task: its number.
        node: the sequence number of its present node.
        is_checkpoint: the node is a reentrant checkpoint, torch's or DeepSpeed's; else a node inside a checkpoint of
            the other kind, which is repeated because the node needs tensors that were not kept.
    """

    task: int
    node: int
    is_checkpoint: bool

    @classmethod
    def current(cls) -> _GoingBackward | None:
        """Return the backward pass of this thread; None outside of one."""
        if not repeating():
            return None
        task, node = torch._C._current_graph_task_id(), torch._C._current_autograd_node()
        if node is None:
            return cls(task, _LARGEST, False)
        return cls(task, node._sequence_nr(), node.name().startswith("CheckpointFunction"))

    @property
    def code(self) -> int:
        """Task and node in one number, 23 and 40 bits."""
        # 63 bits, so that no code is negative: -1 means a first pass.
        return self.task % 2**23 * 2**40 + self.node % 2**40


def uniform(key: torch.Tensor | None, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return fp32 numbers from U(0, 1), without 0 and 1: the same for the same key, on every device.

    SplitMix64 (Steele et al. 2014) of a counter, two numbers from each of its words: (bits + 0.5) / 2^23 of the high 23
    bits of either half. None draws from torch's generator.

    Example: key 0.

        word 1         0xE220A8397B1DCDAF
        low half       0x7B1DCDAF >> 9 = 4034278     (4034278 + 0.5) / 2^23 = 0.480924
        high half      0xE220A839 >> 9 = 7409748     (7409748 + 0.5) / 2^23 = 0.883311
    """
    if key is None:
        # torch draws 0 as well, whose logarithm Gumbel noise takes.
        return torch.rand(shape, device=device).clamp_(min=2**-25)
    count = math.prod(shape)
    # From 1 on: SplitMix64 steps before it mixes.
    words = _mix(torch.arange(1, (count + 1) // 2 + 1, device=device) * _GOLDEN + key)
    # The mask removes the signs that the shift brings in. 23 bits and the half are the 24 that fp32 has.
    bits = (words.view(torch.int32)[:count] >> 9) & 0x7FFFFF
    return ((bits.float() + 0.5) * 2**-23).view(shape)


def _mix(words: torch.Tensor) -> torch.Tensor:
    """Return SplitMix64's finaliser in int64, which wraps; the masks make torch's signed shifts bring in zeros."""
    words = (words ^ ((words >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    words = (words ^ ((words >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return words ^ ((words >> 31) & (2**33 - 1))


def _seed(seed: int, *when: object) -> int:
    return seed_of(seed, "random", *when, dist.get_rank() if dist.is_initialized() else 0)


def _fingerprint(x_TD: torch.Tensor) -> torch.Tensor:
    """Return a fingerprint of the tokens: [4] fp32, each the sum of all entries with other random weights.

    Tokens that differ by rounding have nearly the same, other tokens have other ones.
    """
    num_tokens, width = x_TD.shape
    key = torch.zeros((), dtype=torch.int64, device=x_TD.device)
    with torch.autocast(x_TD.device.type, enabled=False):
        # A product of two weights per entry, one by token and one by column: T + D random numbers and not T * D.
        tokens_4T = uniform(key, (4, num_tokens), x_TD.device) - 0.5
        width_4D = uniform(key + 1, (4, width), x_TD.device) - 0.5
        return ((tokens_4T @ x_TD.detach().float()) * width_4D).sum(1)
