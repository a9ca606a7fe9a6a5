"""What a run tells: metric definitions, reductions over ranks, sinks, the console line."""

from dsmoe.observe.console import console_line
from dsmoe.observe.meter import Meter
from dsmoe.observe.sinks import JsonLines, Sink, TensorBoard

__all__ = ["JsonLines", "Meter", "Sink", "TensorBoard", "console_line"]
