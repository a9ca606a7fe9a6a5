"""The MoE layer, one file per step: route, balance, limit, dispatch, compute, combine, count."""

from dsmoe.moe.layer import MoE
from dsmoe.moe.stats import LayerStatistics, read_statistics

__all__ = ["LayerStatistics", "MoE", "read_statistics"]
