"""The MoE layer, one file per step: route, balance, limit, dispatch, compute, combine, count.

A tensor's shape is the suffix of its name: `scores_TE` is [T, E]. The one legend of the package; files point here.

    A  assignments: T * K, one per choice; token-major, or sorted where the text says so
    B  sequences of a micro-batch
    C  capacity: rows that an expert accepts from one rank
    D  hidden size
    E  experts, over all ranks
    F  features of an attention head
    G  groups: of experts, and of query heads that share a key/value head
    H  query heads of this rank
    I  inner width of an expert or a feed-forward
    J  rows worked on at a time: those of one expert, those of one chunk of the loss
    K  choices per token
    L  experts of this rank
    M  choices in the order in which they travel
    N  rows of a buffer
    O  rows of one block of J
    P  ranks of a node
    R  ranks of the group that a tensor is exchanged over
    S  positions of a sequence: all, or this rank's slice of them
    T  tokens of this rank
    U  source rows, in no order: this rank's tokens, or rows received from other ranks
    V  vocabulary: all, or this rank's slice of it
    W  counts announced for a node: rows, rows for each of its ranks, choices for each of its ranks
    X  chunks that an exchange is cut into
    Y  nodes
    Z  width of the pre-activation: 2 I where the activation is gated, else I
    n  any number of columns
    x  experts of one group

A digit is itself: `mix_T2` is [T, 2].
"""

from dsmoe.moe.layer import MoE
from dsmoe.moe.layout import Layout
from dsmoe.moe.stats import LayerStatistics, read_statistics
from dsmoe.moe.step_updates import begin_step, hold_drop_rate, update_routers

__all__ = ["LayerStatistics", "Layout", "MoE", "begin_step", "hold_drop_rate", "read_statistics", "update_routers"]
