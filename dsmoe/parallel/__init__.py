"""Live process groups, and collectives that autograd understands."""

from dsmoe.parallel.distributed import Rank, join_processes, leave_processes
from dsmoe.parallel.groups import ExpertGroup, Groups, TensorGroup

__all__ = ["ExpertGroup", "Groups", "Rank", "TensorGroup", "join_processes", "leave_processes"]
