"""A training run: its folder, one readable step, evaluation, and what it says at its end."""

from dsmoe.train.initialize import initialize
from dsmoe.train.trainer import Trainer

__all__ = ["Trainer", "initialize"]
