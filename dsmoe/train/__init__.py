"""Training: the engine over DeepSpeed, one readable step, evaluation, checkpoints."""

from dsmoe.train.engine import initialize
from dsmoe.train.trainer import Trainer

__all__ = ["Trainer", "initialize"]
