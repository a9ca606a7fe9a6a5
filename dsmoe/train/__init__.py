"""Training: the engine over DeepSpeed, one readable step, schedule, evaluation, checkpoints."""

from dsmoe.train.engine import initialize
from dsmoe.train.trainer import Trainer

__all__ = ["Trainer", "initialize"]
