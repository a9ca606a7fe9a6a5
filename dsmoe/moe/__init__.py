"""The MoE layer, one file per step: route, balance, limit, dispatch, compute, combine, count."""

from dsmoe.moe.layer import MoE
from dsmoe.moe.layout import Layout
from dsmoe.moe.stats import LayerStatistics, read_statistics
from dsmoe.moe.step_updates import begin_step, hold_drop_rate, update_routers

__all__ = ["LayerStatistics", "Layout", "MoE", "begin_step", "hold_drop_rate", "read_statistics", "update_routers"]
