"""What a run tells: metric definitions, reductions over ranks, sinks, the console line."""

from dsmoe.metrics.console import console_line
from dsmoe.metrics.meter import Meter
from dsmoe.metrics.sinks import JsonLines, Sink, TensorBoard

__all__ = ["JsonLines", "Meter", "Sink", "TensorBoard", "console_line"]
